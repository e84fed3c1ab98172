"""Folders and files that must be refused by name, from their headers, before any weight is read."""

import os
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3vl_disagg.checkpoint import load_model, open_checkpoint, read_config
from qwen3vl_disagg.checkpoint.headers import read_header
from qwen3vl_disagg.core.errors import CheckpointError
from tests.support.weights import edit_json, join_header, split_header, write_smallest

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_2 = "model-00002-of-00003.safetensors"
NORM = "model.language_model.norm.weight"


@pytest.fixture
def folder(tmp_path):
    return write_smallest(tmp_path / "checkpoint")


@pytest.fixture
def sharded(tmp_path):
    return write_smallest(tmp_path / "sharded", num_shards=3)


def problems(folder):
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert str(folder) in str(caught.value)
    return caught.value.problems


def set_entry(folder, name, **entry):
    header, data = split_header(folder / FILE)
    header[name] |= entry
    (folder / FILE).write_bytes(join_header(header, data))


def test_single_and_sharded_folders_hold_the_same(folder, sharded):
    with open_checkpoint(folder) as single, open_checkpoint(sharded) as shards:
        assert single.tensors.keys() == shards.tensors.keys()
        assert single.config == shards.config
        assert single.bytes_read == 0


@pytest.mark.parametrize("missing", [1, 4, 1000])
def test_truncated(folder, missing):
    path = folder / FILE
    size = path.stat().st_size
    os.truncate(path, size - missing)
    assert problems(folder) == [f"{FILE}: truncated: the header promises {size} bytes, the file has {size - missing}"]


def test_trailing_bytes(folder):
    size = (folder / FILE).stat().st_size
    (folder / FILE).write_bytes((folder / FILE).read_bytes() + b"\0" * 7)
    assert problems(folder) == [f"{FILE}: 7 bytes after the last tensor ({size + 7} bytes, expected {size})"]


@pytest.mark.parametrize("length", [2**63, 100_000_001, 10_000_000])
def test_header_longer_than_the_file_or_the_limit(folder, length):
    (folder / FILE).write_bytes(struct.pack("<Q", length) + b"{}" * 10)
    (problem,) = problems(folder)
    assert problem.startswith(f"{FILE}: header length {length} is more than 20 ")


@pytest.mark.parametrize("size", [0, 3, 7])
def test_too_short_for_a_header(folder, size):
    (folder / FILE).write_bytes(b"\1" * size)
    assert problems(folder) == [f"{FILE}: {size} bytes, too short for a safetensors file"]


@pytest.mark.parametrize(
    "header", [b"{", b"\xff\xfe", b"[]x", b'{"a": 1, "a": 2}', b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"]
)
def test_header_that_is_no_json(folder, header):
    (folder / FILE).write_bytes(join_header(header, b""))
    (problem,) = problems(folder)
    assert problem.startswith(f"{FILE}: header is not JSON: ")


def test_header_that_is_no_object(folder):
    (folder / FILE).write_bytes(join_header(b"[]", b""))
    assert problems(folder) == [f"{FILE}: header is not a JSON object"]


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"dtype": "F31"}, "unknown dtype 'F31'"),
        ({"dtype": None}, "unknown dtype None"),
        ({"shape": [-64]}, "shape [-64] is not a list of non-negative integers"),
        ({"shape": [True]}, "shape [True] is not a list of non-negative integers"),
        ({"shape": "64"}, "shape '64' is not a list of non-negative integers"),
        ({"shape": [10**30]}, "needs"),
        ({"data_offsets": [8, 0]}, "data_offsets [8, 0] are not two rising integers"),
        ({"data_offsets": [0]}, "data_offsets [0] are not two rising integers"),
        ({"shape": [63]}, "F32 [63] needs 252 bytes, data_offsets"),
    ],
)
def test_bad_entry(folder, entry, reason):
    set_entry(folder, NORM, **entry)
    (problem,) = problems(folder)
    assert problem.startswith(f"{FILE}: {NORM}: ")
    assert reason in problem


def test_overlapping_and_shifted_data(folder):
    header, _ = split_header(folder / FILE)
    start, stop = header[NORM]["data_offsets"]
    set_entry(folder, NORM, data_offsets=[start - 4, stop - 4])
    found = problems(folder)
    assert any(NORM in problem and "overlaps the tensor before it" in problem for problem in found)
    assert any("leaves a gap before it" in problem for problem in found)


def test_offsets_outside_the_file(folder):
    header, _ = split_header(folder / FILE)
    last = max((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"])
    start, stop = header[last]["data_offsets"]
    set_entry(folder, last, data_offsets=[start + 2**40, stop + 2**40])
    found = problems(folder)
    assert any(last in problem and "gap" in problem for problem in found)
    assert any("truncated" in problem for problem in found)


def test_missing_shard(sharded):
    (sharded / SHARD_2).unlink()
    assert problems(sharded) == [f"{INDEX}: {SHARD_2}: missing"]


def test_everything_wrong_is_listed_at_once(sharded):
    (sharded / SHARD_2).unlink()
    os.truncate(sharded / "model-00003-of-00003.safetensors", 5000)
    edit_json(sharded, lambda config: config["text_config"].pop("head_dim"))
    found = problems(sharded)
    assert "config.json: text_config.head_dim is missing" in found
    assert f"{INDEX}: {SHARD_2}: missing" in found
    assert any("model-00003-of-00003.safetensors: " in problem for problem in found)


def test_index_and_shard_disagree(sharded):
    def move(index):
        names = list(index["weight_map"])
        index["weight_map"][names[0]] = SHARD_2
        index["weight_map"]["model.extra"] = SHARD_2

    edit_json(sharded, move, INDEX)
    found = problems(sharded)
    assert f"{SHARD_2}: model.extra: in {INDEX}, not in the file" in found
    assert any("model-00001-of-00003.safetensors: " in p and f"in the file, not in {INDEX}" in p for p in found)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/../../outside.safetensors", "", "a\0b"])
def test_index_that_leaves_the_folder(sharded, name):
    (sharded.parent / "outside.safetensors").write_bytes((sharded / SHARD_2).read_bytes())
    edit_json(
        sharded,
        lambda index: index["weight_map"].update(
            {tensor: name for tensor, file in index["weight_map"].items() if file == SHARD_2}
        ),
        INDEX,
    )
    assert problems(sharded) == [f"{INDEX}: {name!r}: the path leaves the folder"]


def test_link_out_of_the_folder(sharded):
    outside = sharded.parent / "outside.safetensors"
    (sharded / SHARD_2).rename(outside)
    (sharded / SHARD_2).symlink_to(outside)
    assert problems(sharded) == [f"{INDEX}: {SHARD_2}: a link that leaves the folder"]


def test_config_linked_from_outside(folder):
    outside = folder.parent / "outside.json"
    (folder / "config.json").rename(outside)
    (folder / "config.json").symlink_to(outside)
    with pytest.raises(CheckpointError, match=r"config\.json: a link that leaves the folder"):
        read_config(folder)


def test_links_within_the_folder_and_into_a_hub_cache_are_followed(tmp_path):
    snapshot = write_smallest(tmp_path / "models--a--b" / "snapshots" / "0123", num_shards=3)
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    (snapshot / SHARD_2).rename(blobs / "digest")
    (snapshot / SHARD_2).symlink_to("../../blobs/digest")
    load_model(snapshot)


def test_link_loop_and_folder_in_place_of_a_file(sharded):
    (sharded / SHARD_2).unlink()
    (sharded / SHARD_2).symlink_to(SHARD_2)
    (sharded / "model-00001-of-00003.safetensors").unlink()
    (sharded / "model-00001-of-00003.safetensors").mkdir()
    first, second = problems(sharded)
    assert first == f"{INDEX}: model-00001-of-00003.safetensors: not a regular file"
    assert second.startswith(f"{INDEX}: {SHARD_2}: ")


def test_pickled_weights(folder):
    (folder / FILE).rename(folder / "pytorch_model.bin")
    (problem,) = problems(folder)
    assert problem.startswith("pytorch_model.bin: pickled weights are refused")


def test_pickled_shard(sharded):
    (sharded / SHARD_2).rename(sharded / "two.bin")
    text = (sharded / INDEX).read_text().replace(SHARD_2, "two.bin")
    (sharded / INDEX).write_text(text)
    assert problems(sharded) == [f"{INDEX}: two.bin: not a safetensors file"]


def test_no_weights(folder):
    (folder / FILE).unlink()
    assert problems(folder) == [f"neither {FILE} nor {INDEX} is there"]


def test_single_file_beside_an_index(folder):
    (folder / INDEX).write_text("{}")
    (problem,) = problems(folder)
    assert problem.startswith(f"both {FILE} and {INDEX} are there")


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ("{}", "weight_map is missing or empty"),
        ('{"weight_map": []}', "weight_map is missing or empty"),
        ('{"weight_map": {"a": 3}}', "a: file name 3 is not a string"),
    ],
)
def test_bad_index(sharded, index, reason):
    (sharded / INDEX).write_text(index)
    (problem,) = problems(sharded)
    assert problem.startswith(f"{INDEX}: {reason}")


@pytest.mark.parametrize("config", ["", "nonsense", "[1]", '{"a": 1, "a": 2}', "\0"])
def test_bad_config_file(folder, config):
    (folder / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=r"config\.json: not"):
        read_config(folder)


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
