"""What a caller of this process may hand over: names, paths, file: URLs, bytes and pictures of Pillow."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qwen3vl_disagg import LLM, cli
from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.media.images import MAX_BYTES, decode_rgb
from tests.support.clips import encode_clip, noise_frames
from tests.support.media_bytes import encode, exif, picture


@pytest.fixture(scope="module")
def llm():
    return LLM()


def prepared(llm: LLM, *parts: dict):
    return llm.processor.prepare([{"role": "user", "content": list(parts)}], allow_paths=True)


def test_all_spellings_of_a_file_are_the_same_item(llm, tmp_path):
    path = tmp_path / "a b%41ü.png"
    data = encode(picture(), "PNG")
    path.write_bytes(data)
    url = path.as_uri()
    sources = [str(path), path, data, bytearray(data), memoryview(data), url, url.replace("file:///", "file:/")]
    sources += [url.replace("file:///", "file://localhost/"), "FILE" + url[4:]]
    parts = [{"type": "image", "image": source} for source in sources]
    parts += [{"type": "image_url", "image_url": {"url": source}} for source in sources]
    parts += [{"type": "image_url", "image_url": source} for source in sources]
    prompt = prepared(llm, *parts[:16])
    assert {item.digest for item in prompt.items} == {prepared(llm, parts[0]).items[0].digest}
    assert len({item.digest for item in prepared(llm, *parts[16:]).items}) == 1


def test_a_clip_too(llm, tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(encode_clip(noise_frames(8, 64, 96)))
    for source in (str(path), path, path.as_uri(), path.read_bytes()):
        for part in ({"type": "video", "video": source}, {"type": "video_url", "video_url": {"url": source}}):
            assert prepared(llm, part).media == [path.read_bytes()]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "La", "RGBa", "I;16"])
def test_a_picture_gives_its_own_pixels(llm, mode):
    if mode == "I;16":
        image = Image.fromarray(np.arange(96 * 64, dtype=np.uint16).reshape(64, 96) * 10)
    else:
        source = picture(mode={"La": "LA", "RGBa": "RGBA", "HSV": "RGB", "YCbCr": "RGB"}.get(mode, mode))
        image = source if source.mode == mode else source.convert(mode)
    prompt = prepared(llm, {"type": "image", "image": image}, {"type": "image", "image": image.copy()})
    shown = np.asarray(decode_rgb(prompt.media[0])).astype(int)
    if mode == "I;16":
        expected = np.round(np.asarray(image) / 257).astype(int)[..., None].repeat(3, 2)
    elif mode in ("LA", "RGBA", "La", "RGBa"):
        plain = image.convert("LA") if mode == "La" else image
        rgba = plain.convert("RGBA")
        expected = np.asarray(Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")).astype(
            int
        )
    elif "transparency" in image.info:
        expected = shown
    else:
        expected = np.asarray(image.convert("RGB")).astype(int)
    assert abs(shown - expected).max() <= (1 if mode == "I;16" else 0)
    assert prompt.items[0].digest == prompt.items[1].digest


def test_a_picture_is_taken_as_it_is():
    """Opened from a file that asks for a turn, it is not turned: whoever holds it sees it so."""
    llm = LLM()
    image = Image.open(io.BytesIO(encode(picture(), "JPEG", exif=exif(6))))
    prompt = prepared(llm, {"type": "image", "image": image})
    assert np.array_equal(decode_rgb(prompt.media[0]), image)


def test_frames_may_be_pictures(llm):
    frames = [Image.fromarray(frame) for frame in noise_frames(4, 64, 96)]
    [item] = prepared(llm, {"type": "video", "video": frames, "fps": 2}).items
    assert item.frames == (0, 1, 2, 3)


def test_what_is_too_large_for_a_png_goes_without_loss_some_other_way(llm):
    rng = np.random.default_rng(0)
    levels = rng.integers(0, 4, (2600, 2700, 3), dtype=np.uint8) * 60
    smooth = levels + np.linspace(0, 50, 2700).astype(np.uint8)[None, :, None]
    prompt = prepared(llm, {"type": "image", "image": Image.fromarray(smooth)})
    assert len(prompt.media[0]) <= MAX_BYTES
    assert np.array_equal(decode_rgb(prompt.media[0]), smooth)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("https://example.com/cat.png", r"URLs are not fetched \(https:\): save the image"),
        ("s3://bucket/cat.png", r"URLs are not fetched \(s3:\)"),
        ("file://elsewhere/cat.png", "file:///path, on this host"),
        ("file:///no/such/cat.png", "No such file"),
        ("/no/such/cat.png", "No such file"),
        (Path("/dev/zero"), "not a file"),
        (7, "must be a string"),
        (Image.new("RGB", (1, 300)), "200 times"),
        (Image.new("1", (9000, 9000)), "pixels, the limit"),
        (Image.open(io.BytesIO(encode(picture((200, 200)), "PNG")[:300])), "damaged"),
    ],
    ids=["https", "s3", "other host", "no such URL", "no such path", "device", "number", "thin", "large", "damaged"],
)
def test_what_cannot_be_had(llm, source, message):
    with pytest.raises(InputError, match=message) as caught:
        prepared(llm, {"type": "image", "image": source})
    assert caught.value.param == "messages[0].content[0]"


def test_over_http_none_of_it_is_taken(llm, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encode(picture(), "PNG"))
    for source in (path.as_uri(), str(path), path, path.read_bytes(), picture()):
        with pytest.raises(InputError):
            llm.processor.prepare([{"role": "user", "content": [{"type": "image", "image": source}]}])


def test_the_command_says_that_urls_are_not_fetched(monkeypatch, capsys):
    url = "https://example.com/cat.png"
    monkeypatch.setattr("sys.argv", ["qwen3vl-disagg", "generate", "--image", url, "--prompt", "?"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    err = capsys.readouterr().err
    assert ended.value.code == 2
    assert f"{url}: nothing is fetched from elsewhere" in err
    assert "Traceback" not in err
