"""What an answer of a route is beside the oracle's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tools.places_parts.answers import Answer
from tools.places_parts.questions import Question

VERDICTS = ("equal", "near ties", "as float32", "wrong")
SHOWN = 5


@dataclass(frozen=True)
class Said:
    """What came for one question. `trouble`: why there is no answer, or why it did not take its route."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    trouble: str = ""


def judge(said: Said, expected: Answer, bound: float) -> str:
    """One of VERDICTS.

    Where the tokens part, what follows is not compared. A near tie: there the logits of both are within `bound` of the
    float32 oracle's best one. As float32: there the answer has that best one, and the oracle in its dtype has not (an
    expert that is as good as another is enough for it). An end that comes earlier or later is a token, too.
    """
    if said.token_ids == expected.token_ids:
        return "equal" if said.text == expected.text and not said.trouble else "wrong"
    both = zip(said.token_ids, expected.token_ids, strict=False)
    at = next((n for n, (mine, theirs) in enumerate(both) if mine != theirs), None)
    if at is None or said.trouble:
        return "wrong"
    best = expected.best[at][0][1]
    mine, theirs = (
        best - dict(expected.best[at]).get(ids[at], -math.inf) for ids in (said.token_ids, expected.token_ids)
    )
    if max(mine, theirs) <= bound:
        return "near ties"
    return "as float32" if mine == 0 else "wrong"


def conclude(
    asked: Sequence[Question], answers: Sequence[Said], expected: Sequence[Answer], bound: float
) -> dict[str, Any]:
    """Counts of a route, and what was wrong."""
    verdicts = [judge(mine, theirs, bound) for mine, theirs in zip(answers, expected, strict=True)]
    wrong = [n for n, verdict in enumerate(verdicts) if verdict == "wrong"]
    return {
        "asked": len(asked),
        **{verdict: verdicts.count(verdict) for verdict in VERDICTS},
        "unanswered": sum(bool(said.trouble) for said in answers),
        "different texts": len({said.text for said in answers}),
        "examples": [
            {
                "question": asked[n].name,
                "said": answers[n].text,
                "expected": expected[n].text,
                "trouble": answers[n].trouble,
            }
            for n in wrong[:SHOWN]
        ],
    }
