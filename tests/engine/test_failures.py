"""What fails in the ranks is told as what it is: by `LLM`, by `generate`, and by a language rank to its hub."""

from __future__ import annotations

import asyncio
import sys

import pytest

from qwen3vl_disagg import LLM, cli
from qwen3vl_disagg.core.errors import InputError, MediaTimeout, ServerError
from qwen3vl_disagg.core.settings import EncodeOptions
from qwen3vl_disagg.encode.worker import EncodeWorker
from qwen3vl_disagg.engine.engine import Engine, EngineOptions
from qwen3vl_disagg.engine.runner import ModelRunner
from qwen3vl_disagg.language.link_server import LinkServer
from qwen3vl_disagg.language.rank import LanguageRank
from qwen3vl_disagg.model.vision import VisionTower
from qwen3vl_disagg.protocol.messages import RankHello
from tests.support.engine import make_engine
from tests.support.fake_ranks import FINGERPRINT, TOKEN, System, collect, in_loop
from tests.support.media_images import jpeg
from tests.support.random_model import random_language_model, small_config
from tests.support.transfer import make_receiver


@pytest.fixture(scope="module")
def llm() -> LLM:
    """One that remembers nothing, so that each question goes all the way."""
    options = EngineOptions(prefix_cache=False)
    return LLM(encode_options=EncodeOptions(embedding_cache_mib=0), engine_options=options)


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("media") / "a.jpg"
    path.write_bytes(jpeg())
    return str(path)


def fail(error: Exception):
    def failing(*_: object, **__: object) -> None:
        raise error

    return failing


TEXT = [{"role": "user", "content": "what is it?"}]
PLACES: list[tuple[type, str, Exception, tuple[type, int, str, str | None]]] = [
    (ModelRunner, "prefill", RuntimeError("secret"), (ServerError, 500, "engine_error", None)),
    (ModelRunner, "decode", RuntimeError("secret"), (ServerError, 500, "engine_error", None)),
    (
        VisionTower,
        "forward",
        RuntimeError("secret"),
        (ServerError, 500, "encode_error", "messages[0].content[0]"),
    ),
    (
        EncodeWorker,
        "preprocess",
        MediaTimeout("decoding the image takes too long"),
        (MediaTimeout, 504, "media_timeout", "messages[0].content[0]"),
    ),
    (
        EncodeWorker,
        "preprocess",
        InputError("damaged"),
        (InputError, 400, "invalid_request", "messages[0].content[0]"),
    ),
]


@pytest.mark.parametrize(("where", "what", "error", "expected"), PLACES, ids=[f"{what}" for _, what, *_ in PLACES])
def test_llm(llm, picture, monkeypatch, where, what, error, expected):
    image = {"type": "image_url", "image_url": {"url": picture}}
    ask = [{"role": "user", "content": [image, {"type": "text", "text": "?"}]}]
    sampling = llm.processor.generation.sampling(max_new_tokens=2)
    with monkeypatch.context() as patched:
        patched.setattr(where, what, fail(error))
        [failed] = llm.chat_each([ask], sampling)
    assert isinstance(failed, expected[0])
    assert (failed.status, failed.code, failed.param) == expected[1:]
    assert "secret" not in str(failed)
    [answer] = llm.chat([ask], sampling)  # nothing is left behind
    assert len(answer.token_ids) == 2


@pytest.mark.parametrize(("where", "error", "status"), [("prefill", RuntimeError("secret"), 1), ("add", None, 2)])
def test_generate(monkeypatch, capsys, where, error, status):
    """A failure of ours is exit status 1, bad input 2; one line each."""
    if where == "prefill":
        monkeypatch.setattr(ModelRunner, "prefill", fail(error))
    else:
        monkeypatch.setattr(Engine, "add", fail(InputError("too long", param="messages")))
    monkeypatch.setattr(sys, "argv", ["qwen3vl-disagg", "generate", "--prompt", "?"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == status
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    expected = "the language model failed on this request" if status == 1 else "messages: too long"
    assert lines == [f"error: {expected}"]


@pytest.mark.parametrize(
    ("where", "error", "expected"),
    [
        ("runner.decode", RuntimeError("secret"), (ServerError, 500, "engine_error")),
        ("runner.prefill", RuntimeError("secret"), (ServerError, 500, "engine_error")),
        ("add", ZeroDivisionError("secret"), (ServerError, 500, "internal_error")),
        ("add", InputError("no", code="x"), (InputError, 400, "x")),
    ],
)
@in_loop
async def test_language_rank(monkeypatch, capsys, where, error, expected):
    engine = make_engine(random_language_model(small_config(), seed=1))
    owner, name = (engine.runner, where[7:]) if where.startswith("runner.") else (engine, where)
    links = LinkServer(make_receiver(engine.config), fingerprint=FINGERPRINT, token=TOKEN, language_rank=1)
    async with System(2, 1) as system:
        address = await links.serve()
        hello = RankHello(
            token=TOKEN, role="language", rank=1, pid=1, fingerprint=FINGERPRINT, link_address=tuple(address)
        )
        rank = LanguageRank(engine, links, hello, system.address)
        running = asyncio.create_task(rank.run())
        await system.join("encode", 0)
        await system.until(lambda: system.hub.readiness().ready)
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, fail(error))
            *_, failed = await collect(system.submit())
        assert isinstance(failed, expected[0]), failed
        assert (failed.status, failed.code) == expected[1:]
        assert "secret" not in str(failed)
        *_, finished = await collect(system.submit())
        assert finished.finish_reason == "length", finished
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
