"""Options that cannot be."""

import pytest

from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.core.settings import EncodeOptions


@pytest.mark.parametrize("name", ["embedding_cache_mib", "vision_batch_tokens"])
def test_encode_options_are_not_negative(name):
    EncodeOptions(**{name: 0}).check()
    with pytest.raises(InputError, match="-1: must not be negative") as caught:
        EncodeOptions(**{name: -1}).check()
    assert caught.value.param == name.replace("_", "-")


def test_the_caches_bytes():
    assert EncodeOptions(embedding_cache_mib=3).cache_bytes == 3 * 2**20
