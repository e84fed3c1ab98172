"""Events for the router, and a script that plays them."""

from __future__ import annotations

from qwen3vl_disagg.core.errors import Failure, UnavailableError
from qwen3vl_disagg.core.requests import RequestTimings, SamplingParams, VisualItem
from qwen3vl_disagg.protocol.messages import (
    Assign,
    Finished,
    LinksUp,
    NeedItems,
    Submit,
)
from qwen3vl_disagg.protocol.router import Router, RouterLimits
from qwen3vl_disagg.protocol.routing import (
    Action,
    Admit,
    End,
    FromRank,
    RankUp,
    Send,
)

BAD_KEPT = Failure.of(UnavailableError("the answer is no longer there"))


def visual(name: str, side: int = 8) -> VisualItem:
    return VisualItem(
        modality="image",
        digest=name,
        num_bytes=10,
        grid=(1, side, side),
        num_rows=side * side // 4,
        offset=3,
        param=f"messages[0].content[{name}]",
    )


def admit(request_id: str, *names: str, num_tokens: int = 100, timeout_s: float = 100.0, n: int = 1) -> Admit:
    items = [visual(name) for name in names]
    return Admit(request_id, b"\0\0\0\0", num_tokens, items, SamplingParams(n=n), timeout_s)


class Script:
    """A router with its answers sorted by kind. `now` stands still unless moved."""

    def __init__(self, encode: int = 2, language: int = 2, **limits: float) -> None:
        self.router = Router(RouterLimits(**limits))  # type: ignore[arg-type]
        self.now = 0.0
        self.actions: list[Action] = []
        self.languages = list(range(encode, encode + language))
        for rank in self.languages:
            self.do(RankUp("language", rank))
        for rank in range(encode):
            self.do(RankUp("encode", rank))
            self.encode_says(rank, LinksUp(language_ranks=self.languages))

    def do(self, event) -> list[Action]:
        self.actions = self.router.handle(event, self.now)
        return self.actions

    def encode_says(self, rank: int, message) -> list[Action]:
        return self.do(FromRank("encode", rank, message))

    def language_says(self, rank: int, message) -> list[Action]:
        return self.do(FromRank("language", rank, message))

    def start(self, request_id: str, *names: str) -> int:
        """Admit, and let the language rank need all items. Returns that rank."""
        [send] = self.do(admit(request_id, *names))
        assert isinstance(send, Send)
        assert isinstance(send.message, Submit)
        if names:
            self.language_says(send.rank, NeedItems(request_id=request_id, items=list(range(len(names)))))
        return send.rank

    def sent(self, kind: type) -> list[Send]:
        return [a for a in self.actions if isinstance(a, Send) and isinstance(a.message, kind)]

    def assigned(self) -> list[Assign]:
        return [send.message for send in self.sent(Assign)]

    def ends(self) -> list[End]:
        return [a for a in self.actions if isinstance(a, End)]


def finished(request_id: str, sample: int = 0) -> Finished:
    return Finished(request_id=request_id, finish_reason="stop", timings=RequestTimings(), sample=sample)
