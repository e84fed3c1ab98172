"""Image bytes -> RGB pixels, by the same rules for every image.

Content is sniffed and a declared type ignored. The first frame of an animation, the first picture of a camera's file of
several. EXIF orientation applied; transparency composited on white; 16-bit greys scaled; colour profiles ignored, as
the reference does; then RGB.
"""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
from PIL import Image, ImageFile

from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.media.image_formats import FORMATS, ImageInfo, foreign_format, read_header
from qwen3vl_disagg.media.image_headers import BadHeader
from qwen3vl_disagg.media.partial import Loaded, cover, load_partial, note_of

MAX_PIXELS = 64 * 2**20
MAX_BYTES = 20 * 2**20
MAX_ASPECT = 200
_PHOTOMETRIC = 262

_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def check_aspect(height: int, width: int) -> None:
    """InputError if one side is more than MAX_ASPECT times the other."""
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise InputError(f"image of {width} x {height} pixels: one side is more than {MAX_ASPECT} times the other")


def probe_image(data: bytes) -> ImageInfo:
    """Format and shown size from the header alone, a few milliseconds at most.

    InputError for what is not an allowed image or is larger than allowed. Damage behind the header is not seen.
    """
    if not data:
        raise InputError("the image is empty (0 bytes)")
    if len(data) > MAX_BYTES:
        raise InputError(f"the image has {len(data)} bytes, the limit is {MAX_BYTES}", status=413)
    try:
        info = read_header(data)
    except BadHeader as error:
        name = foreign_format(data)
        found = f": this is {name}" if name else ""
        raise InputError(f"not an image of an allowed format ({', '.join(FORMATS)}){found}") from error
    width, height = info.stored_size
    if width < 1 or height < 1:
        raise InputError(f"the image has no pixels ({width} x {height})")
    if width * height > MAX_PIXELS:
        raise InputError(f"the image has {width * height} pixels, the limit is {MAX_PIXELS}")
    check_aspect(height, width)
    return info


def decode_rgb(data: bytes, notes: list[str] | None = None, info: ImageInfo | None = None) -> Image.Image:
    """The image as shown, mode RGB, of the size that `probe_image` tells. InputError for one that is damaged, or of
    which too little is there; what is missing of another, or was skipped, is appended to `notes`.

    `info`: what `probe_image` has told already.
    """
    info = info or probe_image(data)
    try:
        loaded = _load(info, data)
        if info.format == "PNG":
            _scale_transparency(loaded.image, depth=data[24])
        image = _outside_white(loaded, _to_rgb(loaded.image))
        if loaded.there is not None:
            image = cover(image, loaded.there)
        if loaded.note and notes is not None:
            notes.append(loaded.note)
        return image.transpose(_TRANSPOSE[info.orientation]) if info.orientation in _TRANSPOSE else image
    except MemoryError:
        raise InputError("the image needs more memory than decoding it may take") from None
    except Exception as error:  # whatever the decoder raises, the bytes are the cause; its text stays inside
        raise InputError("the image is damaged or cut off and cannot be decoded") from error


def _load(info: ImageInfo, data: bytes) -> Loaded:
    """In the file's own mode. Raises whatever the library does."""
    region: tuple[int, int, int, int] | None = None

    def opened(content: bytes) -> ImageFile.ImageFile:
        nonlocal region
        image = Image.open(io.BytesIO(content), formats=(info.format,))
        if image.size != info.stored_size:
            raise ValueError("two sizes")
        if info.format == "GIF" and image.tile:
            region = image.tile[0].extents
        return image

    try:
        image = opened(data)
        if info.format == "TIFF":
            return Loaded(_load_tiff(image))
        image.load()
    except MemoryError:
        raise
    except Exception:
        loaded = load_partial(FORMATS[info.format], data, opened)
    else:
        loaded = Loaded(image, note_of(FORMATS[info.format], data))
    return replace(loaded, region=region)


def _load_tiff(image: ImageFile.ImageFile) -> Image.Image:
    """The first page, turned as its orientation says, levels of 16 bits with white at the top."""
    size, is_inverted = image.size, image.mode == "I;16" and getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0
    if image.mode in ("F", "I"):
        raise ValueError("levels that are neither of 8 nor of 16 bits, which viewers do not show alike")
    image.load()
    if image.size != size:
        raise ValueError("turned by what is not in the first directory")
    return Image.fromarray(~np.asarray(image)) if is_inverted else image  # the library inverts the other depths


def _scale_transparency(image: Image.Image, depth: int) -> None:
    """The transparent colour of a PNG, which the library leaves as in the file, on the scale of the decoded pixels.

    16-bit colours are decoded to their upper 8 bits, so all colours that share these with the transparent one are.
    """
    colour = image.info.get("transparency")
    if image.mode == "L" and depth in (2, 4) and isinstance(colour, int):
        image.info["transparency"] = colour * (255 // (2**depth - 1))
    elif image.mode == "RGB" and depth == 16 and isinstance(colour, tuple):
        image.info["transparency"] = tuple(level >> 8 for level in colour)


def _outside_white(loaded: Loaded, rgb: Image.Image) -> Image.Image:
    """What the first picture of a GIF does not cover of its screen is transparent to viewers, and to the library the
    first colour."""
    if loaded.region in (None, (0, 0, *rgb.size)):
        return rgb
    white = Image.new("RGB", rgb.size, "white")
    white.paste(rgb.crop(loaded.region), loaded.region)
    return white


def _to_rgb(image: Image.Image) -> Image.Image:
    transparency = image.info.get("transparency")
    if image.mode.startswith("I"):
        return _deep_grey_to_rgb(image, transparency)
    if image.mode == "La":
        image = image.convert("LA")
    if image.format == "BMP" and image.mode == "RGBA" and image.getchannel("A").getextrema() == (0, 0):
        return image.convert("RGB")  # a fourth byte that nobody filled in: every viewer shows it
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
