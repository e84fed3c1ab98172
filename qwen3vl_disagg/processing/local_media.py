"""Media of a caller in this process: files, bytes and pictures of Pillow. Over HTTP nobody gets here."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path
from urllib.parse import unquote, urlsplit

from PIL import Image

from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.media.images import MAX_BYTES, MAX_PIXELS

_MAX_NAME = 40
_AS_THEY_ARE = ("1", "L", "LA", "RGB", "RGBA", "I;16")


def local_bytes(source: object, where: str, what: str, limit: int) -> bytes | None:
    """The bytes of a file by its name, Path or `file:` URL, of bytes, or of a picture; None for anything else.

    InputError naming `where` for what cannot be read, for more than `limit` bytes, and for the address of another host.
    """
    if isinstance(source, Image.Image):
        return picture_bytes(source, where)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source)
    if isinstance(source, os.PathLike):
        return _read_file(Path(os.fsdecode(source)), where, limit)
    if not isinstance(source, str):
        return None
    scheme = source.partition(":")[0].lower()
    if scheme == "file" and source[5:6] == "/":
        return _read_file(_path_of(source, where), where, limit)
    if "://" in source:
        message = f"URLs are not fetched ({scheme[:_MAX_NAME]}:): save the {what} and give the file's name"
        raise InputError(message, param=where, code="unsupported_url")
    return _read_file(Path(source), where, limit)


def picture_bytes(image: Image.Image, where: str) -> bytes:
    """The picture's own pixels, losslessly: nothing of its metadata counts, an EXIF orientation neither.

    The same picture gives the same bytes. InputError for one that is larger than images may be, or cannot be loaded.
    """
    if image.width * image.height > MAX_PIXELS:
        pixels = image.width * image.height
        raise InputError(f"the picture has {pixels} pixels, the limit is {MAX_PIXELS}", param=where)
    try:
        if "transparency" in image.info or image.mode in ("PA", "La", "RGBa"):
            plain = image.convert("LA" if image.mode == "La" else "RGBA")
        else:
            plain = image.copy() if image.mode in _AS_THEY_ARE else image.convert("RGB")
        plain.info = {}
        for form, options in (("PNG", {"compress_level": 1}), ("WEBP", {"lossless": True, "method": 0, "exact": True})):
            out = io.BytesIO()
            plain.save(out, form, **options)
            if out.tell() <= MAX_BYTES or plain.mode == "I;16":
                break
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError("the picture is damaged and cannot be loaded", param=where) from error
    if out.tell() > MAX_BYTES:
        message = f"the picture has {out.tell()} bytes without loss, the limit is {MAX_BYTES}"
        raise InputError(message, param=where, status=413)
    return out.getvalue()


def _path_of(url: str, where: str) -> Path:
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
        raise InputError("a file: URL is file:///path, on this host", param=where, code="unsupported_url")
    return Path(unquote(parts.path))


def _read_file(path: Path, where: str, limit: int) -> bytes:
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # a pipe or device might never end
            raise InputError(f"{str(path)[-_MAX_NAME:]}: not a file", param=where)
        if found.st_size > limit:
            raise InputError(f"{path} is larger than the limit of {limit} bytes", param=where, status=413)
        return path.read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        reason = getattr(error, "strerror", None) or "bad name"
        raise InputError(f"{str(path)[-_MAX_NAME:]}: {reason}", param=where) from None
