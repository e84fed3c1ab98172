"""The small trained checkpoint and the scenes it was trained on."""

from pathlib import Path


def tiny_folder() -> Path:
    """The checkpoint inside the package, in the form of a hub folder."""
    return Path(__file__).parent / "tiny"
