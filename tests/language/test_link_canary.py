"""The rows that go over a new link first: what is lost or exchanged on their way refuses the link, by its name."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from qwen3vl_disagg.core.errors import HandshakeError
from qwen3vl_disagg.encode.link_canary import CheckedRows
from qwen3vl_disagg.encode.links import EncodeLinks
from qwen3vl_disagg.encode.worker import EncodedItem
from qwen3vl_disagg.language import link_server
from qwen3vl_disagg.language.receiver import Receiver
from qwen3vl_disagg.protocol.messages import LinkHello, Resume
from qwen3vl_disagg.transport.buffers import VisualRows
from tests.support.link_peers import FINGERPRINT, VISUAL, Language, language
from tests.support.link_scenarios import CONFIG, LANGUAGE_RANK, TOKEN
from tests.support.transfer import make_encoded

ROWS = CheckedRows(VISUAL, make_encoded(CONFIG))
HIDDEN = CONFIG.text.hidden_size
WAIT_S = 10.0


async def link_up(it: Language, canary: CheckedRows) -> HandshakeError | None:
    """What an encode rank hears that links with such rows: None if the link stands."""
    loop = asyncio.get_running_loop()
    ends: asyncio.Future[HandshakeError | None] = loop.create_future()
    links = EncodeLinks(
        LinkHello(token=TOKEN, encode_rank=0, pid=1, fingerprint=FINGERPRINT),
        on_up=lambda link: ends.set_result(None),
        on_down=lambda link, reason: None,
        on_frame=lambda link, frame: None,
        on_refused=ends.set_result,
        canary=canary,
    )
    links.connect([(LANGUAGE_RANK, *it.address)], it.make_link)
    try:
        return await asyncio.wait_for(ends, WAIT_S)
    finally:
        await links.close()


def refusal(canary: CheckedRows = ROWS) -> HandshakeError | None:
    async def run() -> HandshakeError | None:
        async with language() as it:
            before = it.counts()
            told = await link_up(it, canary)
            assert it.counts() == before  # it takes nobody's room
            return told

    return asyncio.run(run())


def test_right_rows_come_in_two_grants_and_the_link_stands(monkeypatch):
    sent, payload = [], EncodedItem.payload
    monkeypatch.setattr(EncodedItem, "payload", lambda item, grant: sent.append(grant) or payload(item, grant))
    assert refusal() is None
    assert [(grant.row_start, grant.row_stop) for grant in sent] == [(0, 3), (3, 6)]
    assert [isinstance(grant, Resume) for grant in sent] == [False, True]
    assert [grant.deepstack_stop - grant.deepstack_start for grant in sent] == [6, 0]


def exchange_levels(patch: pytest.MonkeyPatch) -> None:
    copy = VisualRows._copy

    def exchanged(self: VisualRows, pieces: Any, start: int, stop: int, out: torch.Tensor) -> None:
        copy(self, pieces, start, stop, out)
        if out.shape[1] > HIDDEN:
            out.copy_(out.roll(HIDDEN, 1))

    patch.setattr(VisualRows, "_copy", exchanged)


def lose_level(patch: pytest.MonkeyPatch) -> None:
    copy = VisualRows._copy

    def lost(self: VisualRows, pieces: Any, start: int, stop: int, out: torch.Tensor) -> None:
        copy(self, pieces, start, stop, out)
        out[:, HIDDEN:] = 0

    patch.setattr(VisualRows, "_copy", lost)


def forget_levels_at_a_resume(patch: pytest.MonkeyPatch) -> None:
    end = Receiver._end

    def forgetful(self: Receiver, item: Any, job: Any, main: Any, deepstack: Any) -> VisualRows:
        rows = end(self, item, job, main, deepstack)
        item.deepstack = []
        return rows

    patch.setattr(Receiver, "_end", forgetful)


def send_levels_exchanged(patch: pytest.MonkeyPatch) -> None:
    payload = EncodedItem.payload

    def exchanged(self: EncodedItem, grant: Any) -> list[torch.Tensor]:
        return payload(dataclasses.replace(self, deepstack=self.deepstack.roll(HIDDEN, 1)), grant)

    patch.setattr(EncodedItem, "payload", exchanged)


@pytest.mark.parametrize(
    ("plant", "field"),
    [
        (exchange_levels, "canary: DeepStack level 0"),
        (lose_level, "canary: DeepStack level 1"),
        (forget_levels_at_a_resume, "canary: transfer"),
        (send_levels_exchanged, "canary: transfer"),
    ],
)
def test_what_happens_to_levels_on_the_way_is_named(plant: Callable, field: str, monkeypatch):
    plant(monkeypatch)
    told = refusal()
    assert told is not None
    assert told.field == field


def test_rows_of_another_picture_are_not_the_announced_ones(monkeypatch):
    announcement = CheckedRows.announcement
    stale = announcement(CheckedRows(VISUAL, make_encoded(CONFIG, seed=9))).digests

    def announce(self: CheckedRows) -> Any:
        return type(said := announcement(self))(visual=said.visual, headers=said.headers, digests=stale)

    monkeypatch.setattr(CheckedRows, "announcement", announce)
    told = refusal()
    assert told is not None
    assert told.field == "canary: main rows"


def test_what_is_in_the_way_of_a_link_stands_in_the_log(monkeypatch, caplog):
    """Nobody refuses it, so it is tried again: once a minute it is said why, and not each time."""
    tries = []

    def broken(*_: Any) -> None:
        tries.append(1)
        raise RuntimeError("CUDA error: of some kind")

    monkeypatch.setattr(link_server, "receive_canary", broken)

    async def run() -> None:
        async with language() as it:
            linking = asyncio.create_task(link_up(it, ROWS))
            async with asyncio.timeout(WAIT_S):
                while len(tries) < 2:
                    await asyncio.sleep(0.02)
            linking.cancel()

    asyncio.run(run())
    said = [record.getMessage() for record in caplog.records if "no link with encode rank" in record.getMessage()]
    assert said == ["no link with encode rank 0: RuntimeError: CUDA error: of some kind"]
