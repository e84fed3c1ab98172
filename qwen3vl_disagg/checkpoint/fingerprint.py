"""What an encode rank and a language rank must agree on before rows travel between them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from qwen3vl_disagg.checkpoint.folder import Checkpoint, open_checkpoint
from qwen3vl_disagg.checkpoint.headers import TensorInfo
from qwen3vl_disagg.checkpoint.layouts import checkpoint_name

_CHUNK = 1 << 20
_SAMPLE = 256
_MATRIX_ROWS = 4
_PROCESSOR_FILES = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
_TOKENIZER_FILES = ("tokenizer.json", "chat_template.jinja", "chat_template.json")
_VISION = checkpoint_name("visual.")


def fingerprint(folder: Path | str) -> dict[str, str]:
    """Each thing to agree on by name. Reads the vision tower's bytes and the small files, no other weights."""
    folder = Path(folder)
    with open_checkpoint(folder) as checkpoint:
        config, vision = checkpoint.config, checkpoint.config.vision
        values: dict[str, object] = {
            "hidden_size": config.text.hidden_size,
            "deepstack_visual_indexes": list(vision.deepstack_visual_indexes),
            "checkpoint_dtype": config.dtype,
            "patch_size": vision.patch_size,
            "temporal_patch_size": vision.temporal_patch_size,
            "spatial_merge_size": vision.spatial_merge_size,
            "image_token_id": config.image_token_id,
            "video_token_id": config.video_token_id,
            "vision_start_token_id": config.vision_start_token_id,
            "vision_end_token_id": config.vision_end_token_id,
            "processor": _files_digest(folder, _PROCESSOR_FILES),
            "tokenizer": _files_digest(folder, _TOKENIZER_FILES),
            "vision_weights": _vision_digest(checkpoint),
            # All of it, entry by entry: each decides rows, or what becomes of them.
            **{f"vision.{name}": value for name, value in asdict(vision).items()},
            **{f"text.{name}": value for name, value in asdict(config.text).items()},
        }
    return {name: str(value) for name, value in values.items()}


def decoder_digest(folder: Path | str) -> str:
    """SHA-256 (hex) over names, dtypes and shapes of the other tensors and a sample of each, of experts that lie in one
    tensor a sample of each. What parts of one decoder must agree on, without reading all of it."""
    digest = hashlib.sha256()
    with open_checkpoint(folder) as checkpoint:
        for name, info in sorted(checkpoint.tensors.items()):
            if name.startswith(_VISION):
                continue
            digest.update(f"{name} {info}\n".encode())
            with (checkpoint.folder / info.file).open("rb", buffering=0) as file:
                for start, length in _samples(info):
                    file.seek(start)
                    digest.update(file.read(length))
    return digest.hexdigest()


def _samples(info: TensorInfo) -> Iterator[tuple[int, int]]:
    """(place in the file, bytes) of what is looked at: of a vector all, of a matrix _SAMPLE bytes of some rows, of each
    expert _SAMPLE bytes; from the first row's beginning to the last one's end."""
    num_rows = info.shape[0] if len(info.shape) > 1 else 1
    if info.num_bytes == 0:
        return
    row_bytes = info.num_bytes // num_rows
    num_samples = num_rows if len(info.shape) == 3 else min(num_rows, _MATRIX_ROWS)
    length = row_bytes if len(info.shape) < 2 else min(_SAMPLE, row_bytes)
    for sample in range(num_samples):
        share = sample / max(1, num_samples - 1)
        row, place = round(share * (num_rows - 1)), round(share * (row_bytes - length))
        yield info.start + row * row_bytes + place, length


def _vision_digest(checkpoint: Checkpoint) -> str:
    """SHA-256 (hex) over names, dtypes, shapes and bytes of the vision tower's tensors, however they are sharded."""
    digest = hashlib.sha256()
    for name, info in sorted(checkpoint.tensors.items()):
        if not name.startswith(_VISION):
            continue
        digest.update(f"{name} {info}\n".encode())  # dtype and shape frame the bytes that follow
        with (checkpoint.folder / info.file).open("rb") as file:
            file.seek(info.start)
            for start in range(info.start, info.stop, _CHUNK):
                digest.update(file.read(min(_CHUNK, info.stop - start)))
    return digest.hexdigest()


def _files_digest(folder: Path, names: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for name in names:
        path = folder / name
        data = path.read_bytes() if path.is_file() else b""
        digest.update(f"{name} {len(data)}\n".encode() + data)
    return digest.hexdigest()
