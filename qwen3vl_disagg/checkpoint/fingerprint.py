"""What an encode rank and a language rank must agree on before rows travel between them."""

from __future__ import annotations

import hashlib
from pathlib import Path

from qwen3vl_disagg.checkpoint.folder import Checkpoint, open_checkpoint
from qwen3vl_disagg.checkpoint.layouts import checkpoint_name

_CHUNK = 1 << 20
_SAMPLE = 256
_PROCESSOR_FILES = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
_TOKENIZER_FILES = ("tokenizer.json", "chat_template.jinja", "chat_template.json")
_VISION = checkpoint_name("visual.")


def vision_digest(folder: Path | str) -> str:
    """SHA-256 (hex) over names, dtypes, shapes and bytes of the vision tower's tensors, however they are sharded."""
    with open_checkpoint(folder) as checkpoint:
        return _vision_digest(checkpoint)


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
        }
    return {name: str(value) for name, value in values.items()}


def decoder_digest(folder: Path | str) -> str:
    """SHA-256 (hex) over names, dtypes, shapes and the first bytes of each of the other tensors: what parts of one
    decoder must agree on, without reading all of it."""
    digest = hashlib.sha256()
    with open_checkpoint(folder) as checkpoint:
        for name, info in sorted(checkpoint.tensors.items()):
            if not name.startswith(_VISION):
                with (checkpoint.folder / info.file).open("rb") as file:
                    file.seek(info.start)
                    digest.update(f"{name} {info}\n".encode() + file.read(min(_SAMPLE, info.num_bytes)))
    return digest.hexdigest()


def _vision_digest(checkpoint: Checkpoint) -> str:
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
