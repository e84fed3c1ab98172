"""Which files a folder may have, and their headers. What is refused by name: test_damaged.py."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3vl_disagg.checkpoint import load_model, open_checkpoint, read_config
from qwen3vl_disagg.checkpoint.headers import read_header
from qwen3vl_disagg.core.errors import CheckpointError
from tests.support.weights import join_header, split_header, write_smallest

FILE = "model.safetensors"
SHARD_2 = "model-00002-of-00003.safetensors"


@pytest.fixture
def folder(tmp_path):
    return write_smallest(tmp_path / "checkpoint")


@pytest.fixture
def sharded(tmp_path):
    return write_smallest(tmp_path / "sharded", num_shards=3)


def test_single_and_sharded_folders_hold_the_same(folder, sharded):
    with open_checkpoint(folder) as single, open_checkpoint(sharded) as shards:
        assert single.tensors.keys() == shards.tensors.keys()
        assert single.config == shards.config
        assert single.bytes_read == 0


def test_links_within_the_folder_and_into_a_hub_cache_are_followed(tmp_path):
    snapshot = write_smallest(tmp_path / "models--a--b" / "snapshots" / "0123", num_shards=3)
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    (snapshot / SHARD_2).rename(blobs / "digest")
    (snapshot / SHARD_2).symlink_to("../../blobs/digest")
    load_model(snapshot)


def test_missing_folder_and_config(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json: missing"):
        read_config(tmp_path / "nowhere")


@given(data=st.data())
def test_any_damaged_header_is_read_or_refused(tmp_path_factory, data):
    """Bytes changed anywhere in the header and sizes changed by a little: never another exception, never a range
    outside the file."""
    good = join_header({"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, "__metadata__": {}}, b"x" * 24)
    raw = bytearray(good)
    for _ in range(data.draw(st.integers(0, 4))):
        raw[data.draw(st.integers(0, len(raw) - 25))] = data.draw(st.integers(0, 255))
    size = data.draw(st.one_of(st.just(len(raw)), st.integers(0, len(raw) + 8)))
    raw = (bytes(raw) + b"\0" * 8)[:size]
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(raw)
    tensors, found = read_header(path, "damaged")
    if found:
        assert all(problem.startswith("damaged: ") for problem in found)
    else:
        assert all(8 <= info.start <= info.stop <= size for info in tensors.values())
        assert sum(info.num_bytes for info in tensors.values()) == size - 8 - struct.unpack("<Q", raw[:8])[0]


def test_header_of_the_format_s_own_library_is_read(folder):
    header, _ = split_header(folder / FILE)
    with open_checkpoint(folder) as checkpoint:
        assert set(checkpoint.tensors) == set(header) - {"__metadata__"}
        assert all(list(info.shape) == header[name]["shape"] for name, info in checkpoint.tensors.items())
