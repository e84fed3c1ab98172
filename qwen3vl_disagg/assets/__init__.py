"""The small trained checkpoint, the scenes it was trained on, and the server's page."""

from pathlib import Path


def tiny_folder() -> Path:
    """The checkpoint inside the package, in the form of a hub folder."""
    return Path(__file__).parent / "tiny"


def ui_page() -> Path:
    """The page that a server shows, a file of HTML."""
    return Path(__file__).parent / "ui" / "index.html"
