"""Options that cannot be."""

import pytest
import torch

from qwen3vl_disagg.core.devices import resolve_device
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


@pytest.mark.parametrize(
    ("num_gpus", "num_ranks", "local_rank", "kind", "said"),
    [
        (0, 1, 0, "cpu", ""),
        (4, 8, 0, "cpu", "4 GPUs here, and 8 ranks"),
        (4, 8, 3, "cpu", ""),  # once for a host
        (8, 8, 3, "cuda", ""),
    ],
)
def test_auto_says_why_it_takes_the_cpu(monkeypatch, caplog, num_gpus, num_ranks, local_rank, kind, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    assert resolve_device("auto", local_rank=local_rank, num_local_ranks=num_ranks).type == kind
    assert len(caplog.messages) == bool(said)
    assert all(said in line for line in caplog.messages)
