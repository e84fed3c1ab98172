"""A config written again in either spelling is read as the same model, wherever its rotary settings stood."""

from __future__ import annotations

import errno
import os
from dataclasses import replace

import pytest

from qwen3vl_disagg.checkpoint import convert, read_config
from qwen3vl_disagg.checkpoint import folder as folder_module
from qwen3vl_disagg.checkpoint.convert import convert as write_again
from qwen3vl_disagg.core.errors import CheckpointError, InputError
from qwen3vl_disagg.model.config import YarnScaling
from tests.support.weights import SMALLEST, edit_json, write_smallest

YARN = YarnScaling(factor=2.5, original_max_position_embeddings=1024, attention_factor=1.25, truncate=False)


def theta_twice(text):
    text["rope_parameters"] = {**text.pop("rope_scaling"), "rope_theta": text["rope_theta"]}


def theta_in_scaling(text):
    text["rope_scaling"]["rope_theta"] = text.pop("rope_theta")


def theta_null(text):
    text["rope_scaling"]["rope_theta"] = text["rope_theta"]
    text["rope_theta"] = None


def null_beside(text):
    text["rope_parameters"] = None


def empty_beside(text):
    text["rope_parameters"] = {}


def both(text):
    text["rope_parameters"] = {**text["rope_scaling"], "rope_theta": text["rope_theta"]}


def old_type(text):
    text["rope_scaling"]["type"] = text["rope_scaling"].pop("rope_type")


def experts_null(text):
    text |= {"num_local_experts": text["num_experts"], "num_experts": None}


EDITS = [theta_twice, theta_in_scaling, theta_null, null_beside, empty_beside, both, old_type, experts_null]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
@pytest.mark.parametrize("layout", ["hub", "v5"])
def test_read_as_the_same_model(tmp_path, layout, edit):
    config = replace(SMALLEST, text=replace(SMALLEST.text, yarn=YARN, rope_theta=12345.5))
    folder = write_smallest(tmp_path / "0", config)
    edit_json(folder, lambda raw: edit(raw["text_config"]))
    assert read_config(folder).text == config.text
    write_again(folder, tmp_path / "1", layout=layout)
    assert read_config(tmp_path / "1") == read_config(folder)

    def there(raw):
        text = raw["text_config"]
        names = {"hub": ("rope_scaling", "rope_theta", "num_experts"), "v5": ("rope_parameters", "num_local_experts")}
        kept = set().union(*names.values()) & {name for name, value in text.items() if value is not None}
        assert kept == set(names[layout])

    edit_json(tmp_path / "1", there)


def test_what_would_be_another_model_is_not_written(tmp_path, monkeypatch):
    folder = write_smallest(tmp_path / "0")

    def wrong(raw, spelling):
        return {**raw, "text_config": {**raw["text_config"], "rope_theta": 1e4}}

    monkeypatch.setattr(convert, "respelled", wrong)
    with pytest.raises(CheckpointError, match=r"config\.json: would be another model as written"):
        write_again(folder, tmp_path / "1")
    assert [path.name for path in tmp_path.iterdir()] == ["0"]


def test_what_cannot_be_read_is_not_said_of_the_new_folder(tmp_path, monkeypatch):
    folder = write_smallest(tmp_path / "0")
    opened = folder_module.safe_open

    def failing(path, **options):
        if path.parent == folder:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return opened(path, **options)

    monkeypatch.setattr(folder_module, "safe_open", failing)
    with pytest.raises(CheckpointError) as caught:
        write_again(folder, tmp_path / "1")
    assert caught.value.problems == ["model.safetensors: cannot be read: Input/output error"]
    monkeypatch.undo()

    read_bytes = type(folder).read_bytes

    def gone(path):
        if path.name == "preprocessor_config.json":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return read_bytes(path)

    monkeypatch.setattr(type(folder), "read_bytes", gone)
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json: cannot be read: Permission denied"):
        write_again(folder, tmp_path / "1")
    monkeypatch.undo()
    monkeypatch.setattr(type(folder), "write_bytes", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(InputError, match=r"--out .*: No space left"):
        write_again(folder, tmp_path / "1")
    assert [path.name for path in tmp_path.iterdir()] == ["0"]
