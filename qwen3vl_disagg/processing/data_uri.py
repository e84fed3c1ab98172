"""`data:` URIs as the URL standard parses and the fetch standard's data: URL processor reads them."""

from __future__ import annotations

import base64
import re
from urllib.parse import unquote_to_bytes

from qwen3vl_disagg.core.errors import InputError

_ALPHABET = re.compile(rb"[A-Za-z0-9+/]*")
_BLANKS = b"\t\n\f\r "
_ENDS = "".join(map(chr, range(0x21)))
_NO_BREAKS = {ord(blank): None for blank in "\t\n\r"}
_MAX_HEAD = 4096
"""Characters before the comma."""


def is_data_uri(text: str) -> bool:
    return text[:64].translate(_NO_BREAKS).lstrip(_ENDS)[:5].lower() == "data:"


def read_data_uri(uri: str, where: str, what: str, limit: int) -> bytes:
    """The bytes of one; the declared type is ignored. InputError if it is none, or they are more than `limit`."""
    head, body = split_data_uri(uri, where)
    if is_base64(head):
        return read_base64(body, where, what, limit)
    if len(body) > 3 * limit:  # each byte may take three characters
        raise _too_large(what, limit, where)
    data = unquote_to_bytes(body.translate(_NO_BREAKS).encode("utf-8", "replace"))
    if len(data) > limit:
        raise _too_large(what, limit, where)
    return data


def split_data_uri(uri: str, where: str) -> tuple[str, str]:
    """What is before the comma, without `data:`, and what is behind it, without a fragment.

    Blanks around a URL, and tabs and line breaks anywhere in it, do not count.
    """
    comma = uri.find(",", 0, _MAX_HEAD)
    if comma < 0:
        raise InputError("a data: URI must be data:<type>;base64,<data>", param=where)
    head = uri[:comma].lstrip(_ENDS).translate(_NO_BREAKS)
    return head[len("data:") :], uri[comma + 1 :].partition("#")[0].rstrip(_ENDS)


def is_base64(head: str) -> bool:
    """Whether the head ends with `;base64`, in any case and with blanks around the word."""
    _, semicolon, last = head.rpartition(";")
    return bool(semicolon) and last.strip(" ").lower() == "base64"


def read_base64(body: str, where: str, what: str, limit: int) -> bytes:
    """Forgiving base64 in a URL: percent-encoded, with blanks, with or without padding. InputError if it is none."""
    if len(body) > 8 * limit:  # a third more, three characters for each, and blanks
        raise _too_large(what, limit, where)
    data = body.encode("utf-8", "replace")  # a lone surrogate is no base64 either
    data = (unquote_to_bytes(data) if "%" in body else data).translate(None, _BLANKS)
    if len(data) > limit * 4 // 3 + 4:
        raise _too_large(what, limit, where)
    if len(data) % 4 == 0:
        data = data.removesuffix(b"=").removesuffix(b"=")
    if len(data) % 4 == 1 or not _ALPHABET.fullmatch(data):
        raise InputError("the data: URI is not valid base64", param=where)
    return base64.b64decode(data + b"=" * (-len(data) % 4))


def _too_large(what: str, limit: int, where: str) -> InputError:
    return InputError(f"the {what} is larger than the limit of {limit} bytes", param=where, status=413)
