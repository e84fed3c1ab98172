"""Planted bugs that only a second account shows: of deadlines, grants, places and turns, and of who is told what."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from qwen3vl_disagg.core.errors import DisaggError
from qwen3vl_disagg.core.requests import VisualItem
from qwen3vl_disagg.language.kept_answers import KeptAnswers
from qwen3vl_disagg.language.request_book import RequestBook
from qwen3vl_disagg.protocol import attempts, routing, session
from qwen3vl_disagg.protocol.admission import Admission
from qwen3vl_disagg.protocol.allocator import BlockAllocator
from qwen3vl_disagg.protocol.attempts import Attempts
from qwen3vl_disagg.protocol.encode_sessions import (
    ENCODING,
    SENDING,
    EncodeSessions,
    Outgoing,
    _Outlet,
)
from qwen3vl_disagg.protocol.language_sessions import LanguageSessions
from qwen3vl_disagg.protocol.link_state import LinkState
from qwen3vl_disagg.protocol.messages import (
    Decoded,
    Finished,
    Grant,
    Header,
    ItemLost,
    Message,
    Nack,
    PromptLogprobs,
    RequestFailed,
    Resume,
    Stale,
    Submit,
    Tokens,
)
from qwen3vl_disagg.protocol.placement import EncodeRankState
from qwen3vl_disagg.protocol.router import Router
from qwen3vl_disagg.protocol.routing import Admit, Send
from qwen3vl_disagg.protocol.session import Session
from qwen3vl_disagg.protocol.session_events import FrameIn, PayloadSent, Recall, SendFrame, Tell
from qwen3vl_disagg.protocol.suspects import Suspects
from tools.simulation.mutants import method, mutant, swap

# ---- the encode side ----


@mutant("a-grant-is-not-heard-while-encoding", "I11", "what is granted anew while it is encoded waits for a resume")
def _() -> Iterator[None]:
    grant_again = method(EncodeSessions, "_grant_again")

    def ignore(self: EncodeSessions, outlet: _Outlet, item: Outgoing, grant: Grant | Resume, now: float) -> None:
        if item.state != ENCODING:
            grant_again(self, outlet, item, grant, now)

    with swap(EncodeSessions, "_grant_again", ignore):
        yield


@mutant("what-was-given-up-is-parked", "I15", "rows that nobody wants are kept when their link breaks")
def _() -> Iterator[None]:
    park = method(EncodeSessions, "_park")

    def keep(self: EncodeSessions, item: Outgoing, now: float) -> None:
        was_dropped, item.is_dropped = item.is_dropped, False
        park(self, item, now)
        item.is_dropped = was_dropped

    with swap(EncodeSessions, "_park", keep):
        yield


@mutant("places-of-the-urgent-go-to-equals", "I12", "what is no more urgent than others takes places for the urgent")
def _() -> Iterator[None]:
    def is_full(
        self: EncodeSessions, dues: list[float], places: int, item: Outgoing, clips: Sequence[float] = ()
    ) -> bool:
        num_before = bisect_left(dues, item.due) - max(0, bisect_right(clips, item.due) - self.limits.max_clips)
        return num_before >= places or len(dues) >= places + self.limits.max_urgent

    with swap(EncodeSessions, "_is_full", is_full):
        yield


@mutant("what-is-ready-last-goes-first", "I16", "payloads of a link go in the wrong order")
def _() -> Iterator[None]:
    take_turn = method(EncodeSessions, "_take_turn")

    def last(self: EncodeSessions, outlet: _Outlet, now: float) -> None:
        if outlet.turn is None and outlet.ready:
            outlet.ready.rotate(1)
        take_turn(self, outlet, now)

    with swap(EncodeSessions, "_take_turn", last):
        yield


@mutant("a-link-goes-on-though-it-did-not-send", "I11", "a payload that was not sent does not end its link")
def _() -> Iterator[None]:
    payload_sent = method(EncodeSessions, "_payload_sent")

    def ignore(self: EncodeSessions, event: PayloadSent, now: float) -> None:
        if event.error is None:
            payload_sent(self, event, now)

    with swap(EncodeSessions, "_payload_sent", ignore):
        yield


@mutant("bytes-take-no-time", "I11", "how large a payload is does not matter for how long it may be sent")
def _() -> Iterator[None]:
    go = method(EncodeSessions, "_go")

    def same(self: EncodeSessions, item: Outgoing, state: str, now: float, *, more_s: float = 0.0) -> None:
        go(self, item, state, now, more_s=0.0 if state == SENDING else more_s)

    with swap(EncodeSessions, "_go", same):
        yield


@mutant("old-links-get-no-answer", "I9", "who speaks of a link that is gone is not told so")
def _() -> Iterator[None]:
    frame_in = method(EncodeSessions, "_frame_in")

    def silent(self: EncodeSessions, event: FrameIn, now: float) -> None:
        frame_in(self, event, now)
        self._actions = [a for a in self._actions if not (isinstance(a, SendFrame) and isinstance(a.frame.body, Stale))]

    with swap(EncodeSessions, "_frame_in", silent):
        yield


# ---- the language side ----


@mutant("lost-links-have-no-epoch", "I11", "the router is not told which link an item was lost with")
def _() -> Iterator[None]:
    lose = method(LanguageSessions, "_lose")

    def forget(self: LanguageSessions, session: Session, reason: str, now: float, dead_epoch: int = 0) -> None:
        lose(self, session, reason, now)

    with swap(LanguageSessions, "_lose", forget):
        yield


@mutant("recalls-without-need", "I10", "the engine is asked for rows that it was never given")
def _() -> Iterator[None]:
    let_go = method(LanguageSessions, "_let_go")

    def recall(self: LanguageSessions, session: Session, now: float, *, gives_back: bool = False) -> None:
        if session.is_under_way and session.received == session.first and not gives_back:
            self._actions.append(Recall(*session.key))
        let_go(self, session, now, gives_back=gives_back)

    with swap(LanguageSessions, "_let_go", recall):
        yield


@mutant("one-block-at-a-time", "I11", "of many free blocks an item gets one")
def _() -> Iterator[None]:
    num_free = method(BlockAllocator, "num_free")

    def one(self: BlockAllocator, pool: str) -> int:
        return min(1, num_free(self, pool))

    with swap(BlockAllocator, "num_free", one):
        yield


@mutant("each-block-is-a-run", "I12", "blocks that are neighbours go in pieces of their own")
def _() -> Iterator[None]:
    def apart(blocks: Sequence[int], block_size: int, rows: int, max_rows: int | None = None) -> list[tuple[int, int]]:
        size = block_size if max_rows is None else min(block_size, max_rows)
        places = [(block * block_size + row, row) for block in blocks for row in range(0, block_size, size)]
        runs, left = [], rows
        for start, row in places:
            if left > 0:
                length = min(size, block_size - row, left)
                runs.append((start, start + length))
                left -= length
        return runs

    with swap(session, "row_runs", apart):
        yield


@mutant("due-when-it-came", "I11", "how long a request may wait for its first token is not heard")
def _() -> Iterator[None]:
    begin = method(RequestBook, "begin")

    def at_once(self: RequestBook, message: Submit, now: float) -> float:
        return begin(self, msgspec.structs.replace(message, due_s=0.0), now)

    with swap(RequestBook, "begin", at_once):
        yield


@mutant("epochs-are-never-forgotten", "I15", "the epochs of links of ranks that are gone are kept for ever")
def _() -> Iterator[None]:
    def keep(self: LanguageSessions, now: float) -> None:
        return

    with swap(LanguageSessions, "_forget_peers", keep):
        yield


@mutant("headers-are-answered-twice", "I8", "a header that is refused is answered twice")
def _() -> Iterator[None]:
    answer = method(LanguageSessions, "_header")

    def twice(self: LanguageSessions, link: LinkState, header: Header, now: float) -> None:
        answer(self, link, header, now)
        if isinstance(self._actions[-1], SendFrame) and isinstance(self._actions[-1].frame.body, Nack):
            self._actions.append(link.send(self._actions[-1].frame.body, now))

    with swap(LanguageSessions, "_header", twice):
        yield


@mutant("losses-are-told-without-need", "I11", "an item that goes on is told as lost")
def _() -> Iterator[None]:
    wait = method(LanguageSessions, "_wait")

    def lose(self: LanguageSessions, session: Session, now: float) -> None:
        had_grant = session.grant is not None and session.received == session.first
        wait(self, session, now)
        if had_grant and session.encode_rank not in self.links:
            self._actions.append(Tell(ItemLost(**session.ids, reason="no link")))

    with swap(LanguageSessions, "_wait", lose):
        yield


@mutant("kept-without-bound", "I12", "answers that have ended are kept however many there are")
def _() -> Iterator[None]:
    def keep(self: KeptAnswers) -> None:
        return

    with swap(KeptAnswers, "_make_room", keep):
        yield


@mutant("log-probabilities-are-not-kept", "I17", "who adopts a request does not hear of its prompt")
def _() -> Iterator[None]:
    note = method(KeptAnswers, "note")

    def drop(self: KeptAnswers, message: Tokens | Finished | RequestFailed | PromptLogprobs, now: float) -> bool:
        if isinstance(message, PromptLogprobs):
            return self.is_heard(message.request_id)
        return bool(note(self, message, now))

    with swap(KeptAnswers, "note", drop):
        yield


# ---- the router ----


@mutant("cancelled-after-its-end", "I15", "a language rank is told to end what it has just said to be over")
def _() -> Iterator[None]:
    end = method(Router, "_end")

    def cancel(
        self: Router, request_id: str, error: DisaggError | None = None, *, by_language_rank: bool = False
    ) -> None:
        end(self, request_id, error)

    with swap(Router, "_end", cancel):
        yield


@mutant("good-images-are-not-told", "I14", "who waits does not hear that an image has been decoded")
def _() -> Iterator[None]:
    from_encode = method(Attempts, "from_encode")

    def drop(self: Attempts, rank: int, message: Message, now: float) -> None:
        if not isinstance(message, Decoded):
            from_encode(self, rank, message, now)

    with swap(Attempts, "from_encode", drop):
        yield


@mutant("idle-time-counts-as-waiting", "I11", "who is refused is told to wait as long as nothing was to be done")
def _() -> Iterator[None]:
    measure = method(Admission, "_measure")

    def always(self: Admission, now: float) -> None:
        if self._waiting:
            measure(self, now)

    with swap(Admission, "_measure", always):
        yield


@mutant("what-is-served-does-not-count", "I11", "who is refused is told to wait as if nothing had been served")
def _() -> Iterator[None]:
    leave = method(Admission, "leave")

    def drop(self: Admission, request_id: str, now: float, *, is_served: bool, sample: int | None = None) -> None:
        leave(self, request_id, now, is_served=False, sample=sample)

    with swap(Admission, "leave", drop):
        yield


@mutant("contents-have-no-place-of-their-own", "I11", "the same image goes to whatever encode rank has the least to do")
def _() -> Iterator[None]:
    def least(digest: str, work: int, candidates: Mapping[int, EncodeRankState]) -> int:
        return min(candidates, key=lambda rank: (candidates[rank].work, rank))

    with swap(attempts, "choose_encode_rank", least):
        yield


@mutant("slow-ranks-keep-what-they-have", "I11", "nothing is taken from a slow encode rank")
def _() -> Iterator[None]:
    def keep(self: Attempts, now: float) -> None:
        return

    with swap(Attempts, "relieve", keep):
        yield


@mutant("harmful-first", "I11", "what encode ranks died over is tried before all others")
def _() -> Iterator[None]:
    innocent_first = method(Attempts, "_innocent_first")

    def reverse(self: Attempts, keys: Iterable[tuple[str, int]], now: float) -> list[tuple[str, int]]:
        return list(innocent_first(self, keys, now))[::-1]

    with swap(Attempts, "_innocent_first", reverse):
        yield


@mutant("links-are-not-looked-at", "I11", "items go to encode ranks that cannot send to their language rank")
def _() -> Iterator[None]:
    def everybody(self: Attempts, language_rank: int) -> dict[int, EncodeRankState]:
        return dict(self._staying)

    with swap(Attempts, "linked", everybody):
        yield


@mutant("told-to-go-again-and-again", "I15", "an encode rank that may leave is told so after each event")
def _() -> Iterator[None]:
    dismiss = method(Attempts, "dismiss")

    def again(self: Attempts) -> None:
        for state in self.ranks.values():
            state.is_dismissed = False
        dismiss(self)

    with swap(Attempts, "dismiss", again):
        yield


@mutant("prompts-that-come-together-are-split", "I14", "of prompts that come together some are taken")
def _() -> Iterator[None]:
    admit = method(Router, "_admit")

    def split(self: Router, events: Sequence[Admit], now: float) -> None:
        for event in events:
            admit(self, [event], now)

    with swap(Router, "_admit", split):
        yield


@mutant("taken-while-shutting-down", "I11", "a hub that takes no more takes requests")
def _() -> Iterator[None]:
    absence = method(Router, "_absence")

    def never(self: Router) -> DisaggError | None:
        was, self.is_draining = self.is_draining, False
        error: DisaggError | None = absence(self)
        self.is_draining = was
        return error

    with swap(Router, "_absence", never):
        yield


@mutant("rows-cost-nothing", "I16", "a request's first token is due as if it had no images")
def _() -> Iterator[None]:
    submit = method(Router, "_submit")

    def cheap(self: Router, event: Admit, rank: int, timeout_s: float) -> None:
        submit(self, event, rank, timeout_s)
        last = self._actions[-1]
        if event.items and event.target_s > -math.inf and isinstance(last, Send) and isinstance(last.message, Submit):
            message = msgspec.structs.replace(last.message, due_s=last.message.due_s / 2)
            self._actions[-1] = Send(last.role, last.rank, message)

    with swap(Router, "_submit", cheap):
        yield


@mutant("the-last-suspect-is-forgotten", "I11", "where suspects are too many, the newest is forgotten")
def _() -> Iterator[None]:
    died = method(Suspects, "died")

    def newest(self: Suspects, under_way: Any, now: float) -> list[str]:
        most, self.max_remembered = self.max_remembered, 1 << 20
        condemned: list[str] = died(self, under_way, now)
        self.max_remembered = most
        while len(self._records) > most:
            self._records.popitem()
        return condemned

    with swap(Suspects, "died", newest):
        yield


@mutant("frames-that-are-decoded-do-not-count", "I11", "a clip's work is that of the frames that are looked at")
def _() -> Iterator[None]:
    def seen(visual: VisualItem) -> int:
        frames, height, width = visual.grid
        return 2 * frames * height * width

    with swap(routing, "encode_work", seen):
        yield
