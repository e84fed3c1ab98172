"""How an error crosses from one process to another: as what the client must be told, and nothing else."""

from __future__ import annotations

from typing import Literal

import msgspec

from qwen3vl_disagg.core.errors import (
    DeadlineError,
    DisaggError,
    InputError,
    OverloadedError,
    ServerError,
    TransferError,
    UnavailableError,
)

Kind = Literal["input", "deadline", "overloaded", "unavailable", "transfer", "internal"]

KINDS: dict[Kind, type[DisaggError]] = {
    "input": InputError,
    "deadline": DeadlineError,
    "overloaded": OverloadedError,
    "unavailable": UnavailableError,
    "transfer": TransferError,
    "internal": ServerError,
}
"""The one table between errors and what travels. What is in no class before the last is `internal`."""
_INTERNAL = ServerError("the server failed on this request")


class Failure(msgspec.Struct, frozen=True):
    """`kind` says whose fault it is, `status` and `code` are those of the error behind it."""

    kind: Kind
    message: str
    code: str
    status: int
    param: str | None = None

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """What to tell of an error. One that was not raised on purpose, or not for clients, shows nothing of itself."""
        known = next((item for item in KINDS.items() if isinstance(error, item[1])), None)
        if known is None or not isinstance(error, DisaggError):
            return cls("internal", str(_INTERNAL), _INTERNAL.code, _INTERNAL.status)
        kind, base = known
        # Kinds of failed transfers matter to logs only.
        code = base.code if kind == "transfer" else error.code
        return cls(kind, str(error) or code, code, error.status, error.param)

    def error(self) -> DisaggError:
        """The error again, on the other side."""
        error = KINDS[self.kind](self.message)
        error.code, error.status, error.param = self.code, self.status, self.param
        return error

    @property
    def is_final(self) -> bool:
        """No other rank could do better: the media are bad, or the time is up."""
        return self.kind in ("input", "deadline")
