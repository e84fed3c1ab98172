"""What a language rank keeps of answers that a client may ask for again: all that was said of them, so that the next
frontend can hear it too.

Pure: times are given. A request is heard (its frontend lives), or unheard (its frontend died); a kept one runs on, and
its end is kept, for `keep_s` after the death or the end. What is adopted is heard again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from qwen3vl_disagg.protocol.messages import Finished, KeptRequest, Message, PromptLogprobs, RequestFailed, Tokens

KEEP_S = 60.0
MAX_KEPT = 1024
MAX_KEPT_SIZE = 1 << 22
"""Of what ended or is unheard; a token counts 1, with log probabilities 16, and four bytes of a prompt's count 1."""
_LOGPROBS = 16


@dataclass
class _Kept:
    name: str
    said: list[Message] = field(default_factory=list)
    size: int = 0
    is_heard: bool = True
    open: set[int] = field(default_factory=set)
    """Answers that have not ended."""
    until: float = math.inf


class KeptAnswers:
    """By request id. `num_answers`: of a request, to know when its last one ended."""

    def __init__(self, keep_s: float = KEEP_S) -> None:
        self._keep_s = keep_s
        self._kept: dict[str, _Kept] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def begin(self, request_id: str, name: str, num_answers: int) -> None:
        """From now on what is said of this request is kept. An earlier one of that name is forgotten."""
        for other in [key for key, kept in self._kept.items() if kept.name == name and not kept.open]:
            self.forget(other)
        self._kept[request_id] = _Kept(name, open=set(range(num_answers)))

    def note(self, message: Tokens | Finished | RequestFailed | PromptLogprobs, now: float) -> bool:
        """Whether there is somebody to tell it to. One that failed is kept no longer: to ask again is to begin anew."""
        kept = self._kept.get(message.request_id)
        if kept is None:
            return True
        if isinstance(message, RequestFailed):
            self.forget(message.request_id)
            return kept.is_heard
        kept.said.append(message)
        kept.size += _size(message)
        is_heard = kept.is_heard
        if isinstance(message, Finished):
            self.close(message.request_id, message.sample, now)
        return is_heard

    def close(self, request_id: str, sample: int, now: float) -> None:
        """Nothing more comes of this answer."""
        kept = self._kept.get(request_id)
        if kept is None or sample not in kept.open:
            return
        kept.open.discard(sample)
        if not kept.open:
            kept.until = now + self._keep_s
            self._make_room()

    def is_heard(self, request_id: str) -> bool:
        kept = self._kept.get(request_id)
        return kept is None or kept.is_heard

    def unhear(self, request_id: str, now: float) -> bool:
        """Its frontend is dead; whether it runs on all the same."""
        kept = self._kept.get(request_id)
        if kept is None:
            return False
        kept.is_heard, kept.until = False, min(kept.until, now + self._keep_s)
        return True

    def adopt(self, request_id: str) -> list[Message] | None:
        """A new frontend wants it: all that was said so far. None for one that is gone."""
        kept = self._kept.get(request_id)
        if kept is None:
            return None
        kept.is_heard = True
        if kept.open:
            kept.until = math.inf
        return list(kept.said)

    def forget(self, request_id: str) -> None:
        self._kept.pop(request_id, None)

    def expired(self, now: float) -> list[str]:
        """Those that nobody has asked for in time."""
        return [request_id for request_id, kept in self._kept.items() if now >= kept.until]

    def requests(self, last_attempt: int) -> list[KeptRequest]:
        """For the next hello. `last_attempt`: the highest number that this rank has heard of."""
        return [
            KeptRequest(name=kept.name, request_id=request_id, last_attempt=last_attempt)
            for request_id, kept in self._kept.items()
        ]

    def _make_room(self) -> None:
        """Of those that ended the oldest go."""
        ended = [(kept.until, request_id) for request_id, kept in self._kept.items() if not kept.open]
        size = sum(self._kept[request_id].size for _, request_id in ended)
        for _, request_id in sorted(ended):
            if len(self._kept) <= MAX_KEPT and size <= MAX_KEPT_SIZE:
                return
            size -= self._kept[request_id].size
            self.forget(request_id)


def _size(message: Message) -> int:
    if isinstance(message, Tokens):
        return len(message.token_ids) * (_LOGPROBS if message.logprobs else 1)
    if isinstance(message, PromptLogprobs):
        return (len(message.own) + len(message.ranks) + len(message.top_ids) + len(message.top)) // 4
    return 1
