"""Image bytes -> RGB pixels, by the same rules for every image.

Content is sniffed and a declared type ignored. The first frame of an animation, the first picture of a camera's file of
several. EXIF orientation applied; transparency composited on white; 16-bit greys scaled; colour profiles ignored, as
the reference does; then RGB.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFile

from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.media.image_headers import BadHeader, ImageHeader, read_header
from qwen3vl_disagg.media.partial import Loaded, load_partial, note_of

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 64 * 2**20
MAX_BYTES = 20 * 2**20
MAX_ASPECT = 200

_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class ImageInfo:
    """What the header says; width and height as shown, that is after the EXIF orientation."""

    format: str
    width: int
    height: int


def check_aspect(height: int, width: int) -> None:
    """InputError if one side is more than MAX_ASPECT times the other."""
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise InputError(f"image of {width} x {height} pixels: one side is more than {MAX_ASPECT} times the other")


def probe_image(data: bytes) -> ImageInfo:
    """Format and shown size from the header alone, a few milliseconds at most.

    InputError for what is not an allowed image or is larger than allowed. Damage behind the header is not seen.
    """
    header = _checked_header(data)
    width, height = header.width, header.height
    if header.orientation >= 5:
        width, height = height, width
    return ImageInfo(header.format, width, height)


def decode_rgb(data: bytes, notes: list[str] | None = None) -> Image.Image:
    """The image as shown, mode RGB, of the size that `probe_image` tells. InputError for one that is damaged, or of
    which less than half is there; what is missing of another, or was skipped, is appended to `notes`."""
    header = _checked_header(data)
    try:
        loaded = _load(header, data)
        if header.format == "PNG":
            _scale_transparency(loaded.image, depth=data[24])
        image = loaded.cover(_to_rgb(loaded.image))
        if loaded.note and notes is not None:
            notes.append(loaded.note)
        if header.orientation in _TRANSPOSE:
            image = image.transpose(_TRANSPOSE[header.orientation])
        return image
    except MemoryError:
        raise InputError("the image needs more memory than decoding it may take") from None
    except Exception as error:  # whatever the decoder raises, the bytes are the cause; its text stays inside
        raise InputError("the image is damaged or cut off and cannot be decoded") from error


def _load(header: ImageHeader, data: bytes) -> Loaded:
    """In the file's own mode. Raises whatever the library does."""

    def opened(content: bytes) -> ImageFile.ImageFile:
        image = Image.open(io.BytesIO(content), formats=(header.format,))
        if image.size != (header.width, header.height):
            raise ValueError("two sizes")
        return image

    try:
        image = opened(data)
        image.load()
    except MemoryError:
        raise
    except Exception:
        return load_partial(header.format, data, opened)
    return Loaded(image, note_of(header.format, data))


def _checked_header(data: bytes) -> ImageHeader:
    if not data:
        raise InputError("the image is empty (0 bytes)")
    if len(data) > MAX_BYTES:
        raise InputError(f"the image has {len(data)} bytes, the limit is {MAX_BYTES}", status=413)
    try:
        header = read_header(data)
    except BadHeader as error:
        raise InputError(f"not an image of an allowed format ({', '.join(FORMATS)})") from error
    width, height = header.width, header.height
    if width < 1 or height < 1:
        raise InputError(f"the image has no pixels ({width} x {height})")
    if width * height > MAX_PIXELS:
        raise InputError(f"the image has {width * height} pixels, the limit is {MAX_PIXELS}")
    check_aspect(height, width)
    return header


def _scale_transparency(image: Image.Image, depth: int) -> None:
    """The transparent colour of a PNG, which the library leaves as in the file, on the scale of the decoded pixels.

    16-bit colours are decoded to their upper 8 bits, so all colours that share these with the transparent one are.
    """
    colour = image.info.get("transparency")
    if image.mode == "L" and depth in (2, 4) and isinstance(colour, int):
        image.info["transparency"] = colour * (255 // (2**depth - 1))
    elif image.mode == "RGB" and depth == 16 and isinstance(colour, tuple):
        image.info["transparency"] = tuple(level >> 8 for level in colour)


def _to_rgb(image: Image.Image) -> Image.Image:
    transparency = image.info.get("transparency")
    if image.mode.startswith("I"):
        return _deep_grey_to_rgb(image, transparency)
    if "A" in image.getbands() or transparency is not None:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _deep_grey_to_rgb(image: Image.Image, transparency: object) -> Image.Image:
    """16-bit greys scaled to 8 bits (65535 -> 255, to the nearest level), the transparent level white."""
    table = ((np.arange(2**16, dtype=np.uint32) + 128) // 257).astype(np.uint8)
    if isinstance(transparency, int) and 0 <= transparency < 2**16:
        table[transparency] = 255
    grey_HW = np.asarray(image)
    if grey_HW.dtype != np.uint16:
        grey_HW = np.clip(grey_HW, 0, 2**16 - 1).astype(np.uint16)
    return Image.fromarray(table[grey_HW]).convert("RGB")
