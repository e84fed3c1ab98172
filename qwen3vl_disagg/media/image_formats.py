"""The image formats: how each is recognized and read, what decodes it, and what is done with one that is cut off.

One table for headers, decoding children, messages, docs/media.md and the catalogue of the tests.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from qwen3vl_disagg.media.image_headers import (
    TIFF_ORDERS,
    BadHeader,
    read_avif,
    read_bmp,
    read_gif,
    read_jpeg,
    read_png,
    read_tiff,
    read_webp,
)

Mending = Literal["png", "jpeg", "webp", "rows"]
"""The ways of `media/partial.py`."""


@dataclass(frozen=True)
class ImageInfo:
    """What the header says. Width and height in pixels as shown, that is after the orientation (EXIF's, 1 .. 8)."""

    format: str
    width: int
    height: int
    orientation: int = 1

    @property
    def stored_size(self) -> tuple[int, int]:
        """(width, height) before the orientation is applied."""
        return (self.height, self.width) if self.orientation >= 5 else (self.width, self.height)


@dataclass(frozen=True, kw_only=True)
class ImageFormat:
    is_one: Callable[[bytes], bool]
    """Whether the content is of it."""
    read: Callable[[bytes], tuple[int, int, int]]
    """(width, height, orientation) as the header says, by whatever `struct` and indexing raise for a bad one."""
    plugins: tuple[str, ...]
    """The modules of Pillow that decode it."""
    shown: str
    """Which picture of several, for docs/media.md."""
    turned_by: str
    """What tells its orientation, for docs/media.md."""
    mending: Mending | None = None
    """How what is there of a cut or damaged one is found; None: it is refused."""
    min_share: float = 0.75
    """Of the pixels: a picture of which less is there is refused."""
    end: bytes = b""
    """The mark that ends a file, after the last `end_after`, if the library does not look for it."""
    end_after: bytes = b""


def _brands(data: bytes) -> set[bytes]:
    """Major and compatible brands of a file of boxes; none for another one."""
    if data[4:8] != b"ftyp":
        return set()
    (size,) = struct.unpack_from(">I", data, 0)
    body = data[8 : min(size, 8 + 4 * 64)]
    return {body[at : at + 4] for at in range(0, len(body) - 3, 4) if at != 4}


FORMATS: dict[str, ImageFormat] = {
    "JPEG": ImageFormat(
        is_one=lambda data: data.startswith(b"\xff\xd8\xff"),
        read=read_jpeg,
        plugins=("Jpeg", "Mpo"),
        shown="the first of a camera's file of several (MPO)",
        turned_by="EXIF, else XMP",
        mending="jpeg",
        end=b"\xff\xd9",
        end_after=b"\xff\xda",
    ),
    "PNG": ImageFormat(
        is_one=lambda data: data.startswith(b"\x89PNG\r\n\x1a\n"),
        read=read_png,
        plugins=("Png",),
        shown="the default picture, also where it is not a part of the animation",
        turned_by="EXIF, else XMP, before the pixels",
        mending="png",
        end=b"IEND",
    ),
    "WEBP": ImageFormat(
        is_one=lambda data: data.startswith(b"RIFF") and data[8:12] == b"WEBP",
        read=read_webp,
        plugins=("WebP",),
        shown="the first frame",
        turned_by="EXIF, else XMP",
        mending="webp",
        min_share=0.5,
    ),
    "GIF": ImageFormat(
        is_one=lambda data: data.startswith((b"GIF87a", b"GIF89a")),
        read=read_gif,
        plugins=("Gif",),
        shown="the first frame",
        turned_by="",
        mending="rows",
        min_share=0.5,  # flat rows take next to no bytes: one that lacks a tenth of these may lack half of its rows
        end=b"\0;",
    ),
    "BMP": ImageFormat(
        is_one=lambda data: data.startswith(b"BM"),
        read=read_bmp,
        plugins=("Bmp",),
        shown="the only one",
        turned_by="the sign of its height",
        mending="rows",
    ),
    "AVIF": ImageFormat(
        is_one=lambda data: bool(_brands(data) & {b"avif", b"avis"}),
        read=read_avif,
        plugins=("Avif",),
        shown="the primary picture",
        turned_by="its boxes, not its EXIF",
    ),
    "TIFF": ImageFormat(
        is_one=lambda data: data[:4] in TIFF_ORDERS,
        read=read_tiff,
        plugins=("Tiff",),
        shown="the first page",
        turned_by="the tag of its first directory",
    ),
}
"""Pillow's name -> the format, in the order in which they are tried and named."""

_HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
FOREIGN: dict[str, Callable[[bytes], bool]] = {
    "HEIC": lambda data: bool(_brands(data) & _HEIC_BRANDS),
    "JPEG 2000": lambda data: data.startswith((b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51")),
    "JPEG XL": lambda data: data.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")),
    "PDF": lambda data: data.startswith(b"%PDF-"),
    "SVG or HTML": lambda data: data.lstrip()[:1] == b"<",
    "BigTIFF": lambda data: data.startswith((b"II+\0", b"MM\0+")),
}
"""Formats that are known and not taken."""


def foreign_format(data: bytes) -> str | None:
    """The name of a format that is known and not taken."""
    return next((name for name, is_one in FOREIGN.items() if is_one(data[:512])), None)


def read_header(data: bytes) -> ImageInfo:
    """The header of an image whose format its content tells. BadHeader if there is none."""
    for name, form in FORMATS.items():
        if form.is_one(data):
            try:
                width, height, orientation = form.read(data)
            except BadHeader:
                raise
            except (struct.error, IndexError, KeyError, ValueError) as error:
                raise BadHeader(f"the {name} header is cut off or says nonsense") from error
            if orientation >= 5:
                width, height = height, width
            return ImageInfo(name, width, height, orientation)
    raise BadHeader("no known format")
