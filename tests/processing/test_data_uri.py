"""What browsers decode is decoded, and nothing else."""

from __future__ import annotations

import base64
import textwrap
from urllib.parse import quote, quote_from_bytes

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.processing.messages import is_data_uri, read_data_uri

DATA = bytes(range(256)) + b"x"
BODY = base64.b64encode(DATA).decode()
assert BODY.endswith("=")


def read(uri: str, limit: int = 10_000) -> bytes:
    assert is_data_uri(uri)
    return read_data_uri(uri, "here", "image", limit)


@pytest.mark.parametrize(
    "uri",
    [
        f"data:image/png;base64,{BODY}",
        f"DATA:IMAGE/PNG;BASE64,{BODY}",
        f"data:;base64,{BODY}",
        f"data:image/png; base64 ,{BODY}",
        f"data:image/png;name=a.png;charset=utf-8;base64,{BODY}",
        f" \n data:image/png;base64,{BODY} \n",
        "data:image/png;base64," + "\n".join(textwrap.wrap(BODY, 76)),
        "data:image/png;base64," + "\r\n".join(textwrap.wrap(BODY, 64)) + "\r\n",
        "data:image/png;base64," + " \t".join(textwrap.wrap(BODY, 10)),
        "da\nta:image/png;base\n64," + BODY,
        f"data:image/png;base64,{BODY.rstrip('=')}",
        f"data:image/png;base64,{quote(BODY, safe='')}",
        f"data:image/png;base64,{quote(chr(10).join(textwrap.wrap(BODY, 76)), safe='')}",
        f"data:image/png;base64,{BODY}#a fragment",
        f"data:image/png,{quote_from_bytes(DATA)}",
        f"data:,{quote_from_bytes(DATA, safe='')}",
    ],
)
def test_every_spelling(uri):
    assert read(uri) == DATA


def test_a_body_that_is_not_base64_is_its_bytes():
    assert read("data:text/plain,A%20brief%20note,\nand more") == b"A brief note,and more"
    assert read("data:image/png;base64=,QUJD") == b"QUJD"
    assert read("data:;base65,QUJD") == b"QUJD"
    assert read("data:,%zz%4") == b"%zz%4"


@pytest.mark.parametrize(
    "body",
    [
        "QUJDR",
        "QUJ!",
        "QU=JD",
        "QUJD=",
        "====",
        "QUJDRA===",
        "QUJD-_8=",
        "Q\u00e9JD",
        "Q%00JD",
        "QU\ud800D",
        "QU%4A\ud800",
    ],
)
def test_what_is_no_base64(body):
    with pytest.raises(InputError, match="not valid base64") as caught:
        read(f"data:;base64,{body}")
    assert caught.value.param == "here"


@pytest.mark.parametrize("uri", ["data:", "data:image/png;base64", "data:" + "a" * 10_000 + ",x"])
def test_without_a_comma_there_is_nothing(uri):
    with pytest.raises(InputError, match="must be data:"):
        read(uri)


@pytest.mark.parametrize("head", ["data:;base64,", "data:,"])
def test_the_limit_is_of_the_bytes_whatever_they_were_written_as(head):
    text = BODY if "base64" in head else quote_from_bytes(DATA)
    assert read(head + text, len(DATA)) == DATA
    if "base64" in head:
        assert read(head + quote("\n".join(BODY), safe=""), len(DATA)) == DATA
    with pytest.raises(InputError, match="larger than") as caught:
        read(head + text * 20, len(DATA))
    assert caught.value.status == 413


@given(st.binary(max_size=60), st.sets(st.integers(0, 90)))
def test_blanks_anywhere(data, places):
    body = base64.b64encode(data).decode()
    broken = "".join(" \n\t\f\r"[i % 5] * (i in places) + char for i, char in enumerate(body))
    assert read("data:;base64," + broken) == data
    assert read("data:;base64," + broken.rstrip("=\t\n\f\r ")) == data
