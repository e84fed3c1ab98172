"""Images of every mode and container, as files; and files that are no image, or no longer one.

A good one is (how to make it, size as shown); a bad one is (how to make it, HTTP status, part of the message).
"""

from __future__ import annotations

import functools
import struct
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from tests.support.media_bytes import (
    COLOUR,
    COLOUR_ALPHA,
    GREY,
    GREY_ALPHA,
    PALETTE,
    SIZE,
    after_start,
    bmp,
    chunk,
    encode,
    exif,
    exif_of_many_tags,
    picture,
    png,
    png_claiming,
    png_header,
    segment,
    ycck,
)

Good = tuple[Callable[[], bytes], tuple[int, int]]
Bad = tuple[Callable[[], bytes], int, str]

TURNED = (SIZE[1], SIZE[0])
XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
NO_IMAGE, DAMAGED = "not an image", "damaged"


def ramp(depth: int, channels: int = 1) -> np.ndarray:
    """Samples `[H, W, C]` over the whole range of this depth."""
    width, height = SIZE
    row = np.linspace(0, 2**depth - 1, width).astype(np.int64)
    return np.stack([np.roll(row[None].repeat(height, 0), 7 * c, axis=1) for c in range(channels)], axis=-1)


def jpeg(mode: str = "RGB", **options: object) -> bytes:
    return encode(picture(mode=mode), "JPEG", quality=90, **options)


def animated(form: str, **options: object) -> bytes:
    frames = [Image.new("RGB", SIZE, colour) for colour in ("red", "green", "blue")]
    return encode(frames[0], form, save_all=True, append_images=frames[1:], duration=100, **options)


def several_in_one() -> bytes:
    return encode(picture(), "MPO", save_all=True, append_images=[picture((32, 32))])


def with_xmp() -> bytes:
    notes = PngInfo()
    notes.add_itxt("XML:com.adobe.xmp", XMP.decode())
    return encode(picture(), "PNG", pnginfo=notes)


def with_hex_profile() -> bytes:
    text = "\nexif\n      32\n" + exif(6).hex() + "\n"
    notes = PngInfo()
    notes.add_text("Raw profile type exif", text, zip=True)
    return encode(picture(), "PNG", pnginfo=notes)


def gif_in_a_corner() -> bytes:
    """The first picture of this GIF reaches out of its screen of 64 x 48."""
    data = encode(picture(mode="P"), "GIF")
    return data[:6] + struct.pack("<HH", 64, 48) + data[10:]


def gif_with_notes() -> bytes:
    data = encode(picture(mode="P"), "GIF")
    at = data.index(b"\x2c", 13 + 768)
    notes = b"!\xfe" + b"\xc8" + b"n" * 200 + b"\0"
    return data[:at] + notes * 20 + data[at:]


def cut(data: bytes, part: float = 0.5) -> bytes:
    return data[: int(len(data) * part)]


def one_row_of_bmp(width: int, height: int, bits: int, **options: object) -> bytes:
    stride = (width * bits + 31) // 32 * 4
    return bmp(bytes(range(256)) * (stride * abs(height) // 256 + 1), width, height, bits, **options)  # type: ignore[arg-type]


def run_lengths(width: int, height: int) -> bytes:
    """A BMP of runs of one pixel each."""
    return bmp((b"\1\1" * width + b"\0\0") * height + b"\0\1", width, height, 8, compression=1, palette=bytes(1024))


def in_pieces(num_pieces: int) -> bytes:
    """A PNG whose pixels are in that many chunks, of which all but the last are empty."""
    data = encode(picture(), "PNG")
    at = data.index(b"IDAT") - 4
    return data[:at] + chunk(b"IDAT", b"") * num_pieces + data[at:]


def copying_exif() -> bytes:
    """A JPEG with 60,000 tags of EXIF that all mean the same 600,000 bytes."""
    block = exif_of_many_tags(60_000, 600_000).removeprefix(b"Exif\0\0")
    return after_start(
        jpeg(), *(segment(0xE1, b"Exif\0\0" + block[at : at + 65000]) for at in range(0, len(block), 65000))
    )


def _png_bad_crc() -> bytes:
    data = bytearray(encode(picture(), "PNG"))
    data[29] ^= 0xFF
    return bytes(data)


PALETTE_BYTES = bytes(value for i in range(256) for value in (i, 255 - i, 128))

GOOD_IMAGES: dict[str, Good] = {
    "jpeg colour": (jpeg, SIZE),
    "jpeg grey": (lambda: jpeg("L"), SIZE),
    "jpeg CMYK": (lambda: jpeg("CMYK"), SIZE),
    "jpeg YCCK": (lambda: ycck(jpeg("CMYK")), SIZE),
    "jpeg progressive": (lambda: jpeg(progressive=True), SIZE),
    "jpeg full chroma": (lambda: jpeg(subsampling=0), SIZE),
    "jpeg ICC": (lambda: jpeg(icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()), SIZE),
    "jpeg XMP orientation 6": (
        lambda: after_start(jpeg(), segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP)),
        TURNED,
    ),
    "jpeg EXIF big-endian 8": (lambda: after_start(jpeg(), segment(0xE1, exif(8, order=">"))), TURNED),
    "jpeg EXIF orientation 0": (lambda: jpeg(exif=exif(0)), SIZE),
    "jpeg EXIF orientation 9": (lambda: jpeg(exif=exif(9)), SIZE),
    "jpeg EXIF damaged": (lambda: after_start(jpeg(), segment(0xE1, exif(6)[:17])), SIZE),
    "jpeg rubbish between segments": (
        lambda: after_start(jpeg(), segment(0xFE, b"note") + b"\0junk\xff\xff\xff"),
        SIZE,
    ),
    "jpeg and a zip behind it": (lambda: jpeg() + b"PK\x03\x04" + bytes(200), SIZE),
    "jpeg of EXIF that copies itself": (copying_exif, SIZE),
    "jpeg of several pictures": (several_in_one, SIZE),
    "jpeg without its end": (lambda: jpeg()[:-2], SIZE),
    "jpeg cut in its last rows": (lambda: cut(jpeg(), 0.9), SIZE),
    "jpeg progressive, cut": (lambda: cut(jpeg(progressive=True), 0.8), SIZE),
    **{
        f"jpeg EXIF orientation {n}": (functools.partial(jpeg, exif=exif(n)), SIZE if n < 5 else TURNED)
        for n in range(1, 9)
    },
    "png colour": (lambda: encode(picture(), "PNG"), SIZE),
    "png colour and alpha": (lambda: encode(picture(mode="RGBA"), "PNG"), SIZE),
    "png 1 bit": (lambda: png(ramp(1), 1, GREY), SIZE),
    "png 2 bits, one transparent": (lambda: png(ramp(2), 2, GREY, chunks=[(b"tRNS", b"\0\2")]), SIZE),
    "png 4 bits": (lambda: png(ramp(4), 4, GREY), SIZE),
    "png grey": (lambda: png(ramp(8), 8, GREY), SIZE),
    "png grey 16 bits": (lambda: png(ramp(16), 16, GREY), SIZE),
    "png grey 16 bits, one transparent": (lambda: png(ramp(16), 16, GREY, chunks=[(b"tRNS", b"\0\0")]), SIZE),
    "png grey and alpha": (lambda: png(ramp(8, 2), 8, GREY_ALPHA), SIZE),
    "png grey and alpha 16 bits": (lambda: png(ramp(16, 2), 16, GREY_ALPHA), SIZE),
    "png colour 16 bits": (lambda: png(ramp(16, 3), 16, COLOUR), SIZE),
    "png colour and alpha 16 bits": (lambda: png(ramp(16, 4), 16, COLOUR_ALPHA), SIZE),
    "png colour, one transparent": (
        lambda: png(ramp(8, 3), 8, COLOUR, chunks=[(b"tRNS", struct.pack(">HHH", 0, 0, 0))]),
        SIZE,
    ),
    "png palette": (lambda: png(ramp(8), 8, PALETTE, chunks=[(b"PLTE", PALETTE_BYTES)]), SIZE),
    "png palette, some transparent": (
        lambda: png(ramp(8), 8, PALETTE, chunks=[(b"PLTE", PALETTE_BYTES), (b"tRNS", bytes(range(200)))]),
        SIZE,
    ),
    "png interlaced": (lambda: png(ramp(8, 3), 8, COLOUR, interlaced=True), SIZE),
    "png EXIF orientation 6": (lambda: encode(picture(), "PNG", exif=exif(6)), TURNED),
    "png XMP orientation 6": (with_xmp, TURNED),
    "png EXIF as text": (with_hex_profile, TURNED),
    "png in 10,000 pieces": (lambda: in_pieces(10_000), SIZE),
    "png of more pixels than its size": (
        lambda: png_header(64, 64) + chunk(b"IDAT", zlib.compress(bytes(2**26))) + chunk(b"IEND", b""),
        (64, 64),
    ),
    "png without its end": (lambda: encode(picture(), "PNG")[:-12], SIZE),
    "png cut in its last rows": (lambda: cut(encode(picture(), "PNG"), 0.9), SIZE),
    "png of a wrong checksum in a text": (
        lambda: png(ramp(8, 3), 8, COLOUR, chunks=[(b"tEXt", b"a\0one")]).replace(b"a\0one", b"a\0two"),
        SIZE,
    ),
    "png animated": (lambda: animated("PNG"), SIZE),
    "webp lossy": (lambda: encode(picture(), "WEBP"), SIZE),
    "webp lossless": (lambda: encode(picture(), "WEBP", lossless=True), SIZE),
    "webp alpha": (lambda: encode(picture(mode="RGBA"), "WEBP", lossless=True), SIZE),
    "webp EXIF orientation 6": (lambda: encode(picture(), "WEBP", exif=exif(6)), TURNED),
    "webp without its last part": (lambda: encode(picture(), "WEBP", exif=exif(1))[:-10], SIZE),
    "webp cut in its last rows": (lambda: cut(encode(picture(), "WEBP", quality=100), 0.9), SIZE),
    "webp animated": (lambda: animated("WEBP"), SIZE),
    "gif": (lambda: encode(picture(mode="P"), "GIF"), SIZE),
    "gif grey": (lambda: encode(picture(mode="L"), "GIF"), SIZE),
    "gif transparent": (lambda: encode(picture(mode="P"), "GIF", transparency=0), SIZE),
    "gif interlaced": (lambda: encode(picture(mode="P"), "GIF", interlace=1), SIZE),
    "gif animated": (lambda: animated("GIF"), SIZE),
    "gif cut in its last rows": (lambda: cut(encode(picture(mode="P"), "GIF"), 0.95), SIZE),
    "gif larger than its screen": (gif_in_a_corner, SIZE),
    "gif with many notes": (gif_with_notes, SIZE),
    "gif and HTML behind it": (lambda: encode(picture(mode="P"), "GIF") + b"<script>alert(1)</script>", SIZE),
    "bmp 24 bits": (lambda: encode(picture(), "BMP"), SIZE),
    "bmp cut in its last rows": (lambda: cut(encode(picture(), "BMP"), 0.9), SIZE),
    "bmp 8 bits": (lambda: encode(picture(mode="P"), "BMP"), SIZE),
    "bmp 32 bits": (lambda: one_row_of_bmp(40, 30, 32), (40, 30)),
    "bmp from top to bottom": (lambda: one_row_of_bmp(40, -30, 24), (40, 30)),
    "bmp run lengths": (
        lambda: bmp(b"\x28\x01\0\0" * 30 + b"\0\1", 40, 30, 8, compression=1, palette=bytes(1024)),
        (40, 30),
    ),
    "avif": (lambda: encode(picture(), "AVIF"), SIZE),
    "avif alpha": (lambda: encode(picture(mode="RGBA"), "AVIF"), SIZE),
    "avif turned": (lambda: encode(picture(), "AVIF", exif=exif(6)), TURNED),
    "avif animated": (lambda: animated("AVIF"), SIZE),
    "tiff": (lambda: encode(picture(), "TIFF"), SIZE),
    "tiff LZW": (lambda: encode(picture(), "TIFF", compression="tiff_lzw"), SIZE),
    "tiff JPEG": (lambda: encode(picture(), "TIFF", compression="jpeg"), SIZE),
    "tiff of several pages": (lambda: animated("TIFF"), SIZE),
    "tiff turned": (lambda: encode(picture(), "TIFF", tiffinfo={274: 6}), TURNED),
    "one pixel": (lambda: encode(picture((1, 1)), "PNG"), (1, 1)),
    "one row of 200": (lambda: encode(picture((200, 1)), "PNG"), (200, 1)),
    "less than a patch": (lambda: encode(picture((31, 17)), "PNG"), (31, 17)),
}

BAD_IMAGES: dict[str, Bad] = {
    "nothing": (lambda: b"", 400, "empty"),
    "text": (lambda: b"hello, I am a png", 400, NO_IMAGE),
    "html": (lambda: b"<!doctype html><img src=x>", 400, NO_IMAGE),
    "svg": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", 400, NO_IMAGE),
    "pdf": (lambda: b"%PDF-1.4\n" + bytes(100), 400, NO_IMAGE),
    "eps": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 400, NO_IMAGE),
    "tiff of floats": (lambda: encode(picture().convert("F"), "TIFF"), 400, DAMAGED),
    "tiff cut": (lambda: cut(encode(picture(), "TIFF")), 400, DAMAGED),
    "tiff whose directory is nowhere": (lambda: b"II*\0\xff\xff\xff\xff" + bytes(100), 400, NO_IMAGE),
    "avif cut": (lambda: cut(encode(picture(), "AVIF"), 0.9), 400, DAMAGED),
    "avif of a million boxes": (lambda: encode(picture(), "AVIF")[:32] + b"\0\0\0\x08free" * 1_000_000, 400, NO_IMAGE),
    "pcx": (lambda: encode(picture(), "PCX"), 400, NO_IMAGE),
    "ppm": (lambda: encode(picture(), "PPM"), 400, NO_IMAGE),
    "tga": (lambda: encode(picture(), "TGA"), 400, NO_IMAGE),
    "jpeg 2000": (lambda: b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(100), 400, NO_IMAGE),
    "psd": (lambda: b"8BPS\0\1" + bytes(100), 400, NO_IMAGE),
    "heic": (lambda: b"\0\0\0\x18ftypheic" + bytes(100), 400, "this is HEIC"),
    "avif of nothing": (lambda: b"\0\0\0\x18ftypavif" + bytes(100), 400, NO_IMAGE),
    "a picture inside a pdf": (lambda: b"%PDF-1.4\n" + jpeg(), 400, NO_IMAGE),
    "bytes over the limit": (lambda: b"\xff\xd8\xff" + bytes(20 * 2**20), 413, "the limit"),
    "jpeg cut": (lambda: cut(jpeg()), 400, DAMAGED),
    "jpeg cut in its header": (lambda: jpeg()[:60], 400, NO_IMAGE),
    "jpeg of two sizes": (
        lambda: after_start(jpeg(), segment(0xC0, struct.pack(">BHHB", 8, 9000, 9, 1) + b"\1\x11\0")),
        400,
        NO_IMAGE,
    ),
    "jpeg cut in its first scan": (lambda: jpeg(progressive=True)[:300], 400, DAMAGED),
    "jpeg lossless": (lambda: jpeg().replace(b"\xff\xc0", b"\xff\xc3", 1), 400, DAMAGED),
    "png cut": (lambda: cut(encode(picture(), "PNG")), 400, DAMAGED),
    "png of wrong checksum": (_png_bad_crc, 400, DAMAGED),
    "png of two sizes": (
        lambda: png(ramp(8, 3), chunks=[(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))]),
        400,
        DAMAGED,
    ),
    "png without pixels": (lambda: png_header(64, 64) + chunk(b"IEND", b""), 400, NO_IMAGE),
    "png of too few pixels": (lambda: png_claiming(64, 64), 400, DAMAGED),
    "png of no width": (lambda: png_claiming(0, 64), 400, "no pixels"),
    "png of 1.2 gigapixels": (lambda: png_claiming(40000, 30000), 400, "pixels, the limit"),
    "png of 72 megapixels": (lambda: png_claiming(9000, 8000), 400, "pixels, the limit"),
    "png 201 times as high": (lambda: encode(picture((1, 201)), "PNG"), 400, "200 times"),
    "webp cut": (lambda: cut(encode(picture(), "WEBP")), 400, DAMAGED),
    "webp that is sound": (lambda: b"RIFF\x24\0\0\0WAVEfmt " + bytes(40), 400, NO_IMAGE),
    "gif cut": (lambda: cut(encode(picture(mode="P"), "GIF"), 0.7), 400, DAMAGED),
    "gif without a picture": (lambda: encode(picture(mode="P"), "GIF")[: 13 + 768] + b";", 400, NO_IMAGE),
    "bmp cut": (lambda: cut(encode(picture(), "BMP")), 400, DAMAGED),
    "bmp of a huge height": (lambda: bmp(bytes(100), 64, 2**31 - 1, 24), 400, "pixels, the limit"),
}
