"""Typed errors. Each class says who is at fault; the command line and HTTP map them to a status."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Literal, Self, TypeVar

import msgspec

T = TypeVar("T")
MIN_RETRY_S, MAX_RETRY_S = 1.0, 60.0
"""What a client that should try again later may be told."""

ENCODE_ERROR = "encode_error"
"""Code of a fault of ours with an image or clip."""


class DisaggError(Exception):
    """Base of all errors raised on purpose. `code` is a stable machine-readable word, `status` the HTTP status, `param`
    the place in the caller's input that it is about."""

    code = "internal_error"
    status = 500
    param: str | None = None

    def at(self, param: str) -> Self:
        """The same error with its place named, unless one is named already."""
        error = copy.copy(self)
        error.param = self.param or param
        return error


class InputError(DisaggError, ValueError):
    """The caller's input is wrong (exit status 2, HTTP 4xx).

    `param` names the place, e.g. `messages[1].content[0]`; `status` is the HTTP status (400, 413, 415).
    The message is shown to the client: it holds no paths, addresses or library texts.
    """

    code = "invalid_request"

    def __init__(
        self, message: str, *, param: str | None = None, status: int = 400, code: str = "invalid_request"
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.status = status
        self.code = code


class NotBuiltYet(InputError):
    """A capability that the command line knows and this version does not have."""

    def __init__(self, what: str, *, param: str | None = None) -> None:
        super().__init__(f"{what} is not built yet", param=param, code="not_built_yet")


class CheckpointError(DisaggError, ValueError):
    """A checkpoint folder cannot be used. `problems` lists everything wrong, each naming file, tensor and reason."""

    code = "bad_checkpoint"

    def __init__(self, folder: object, problems: list[str]) -> None:
        self.folder = str(folder)
        self.problems = list(problems)
        lines = "".join(f"\n  - {problem}" for problem in problems)
        super().__init__(f"cannot use checkpoint {folder}: {len(problems)} problem(s){lines}")


def attempt(problems: list[str], make: Callable[[], T]) -> T | None:
    """What `make` makes; None, and its problems added to those found before, where it raises CheckpointError."""
    try:
        return make()
    except CheckpointError as error:
        problems += error.problems
        return None


class ServerError(DisaggError):
    """Our own fault (exit status 1, HTTP 500); to try again would not help. `code` says what failed.

    The message is shown to the client: it holds no internals; the cause goes to the log.
    """

    def __init__(self, message: str, *, code: str = "internal_error") -> None:
        super().__init__(message)
        self.code = code


class PreparationFailed(ServerError):
    """The process that made a prompt of a request ended without one."""

    def __init__(self) -> None:
        super().__init__("the server failed to make a prompt of this request", code="preparation_failed")


class OverloadedError(DisaggError):
    """No room now; the client may try again after `retry_after` seconds (HTTP 429)."""

    code = "overloaded"
    status = 429

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class UnavailableError(DisaggError):
    """A role that the request needs is not there, or the server is going down (HTTP 503)."""

    code = "unavailable"
    status = 503

    def __init__(self, message: str, *, retry_after: float = 1.0, code: str = "unavailable") -> None:
        super().__init__(message)
        self.retry_after, self.code = retry_after, code


class Dismissed(DisaggError):
    """The job goes down before this process could begin: it leaves, and nothing failed."""

    code = "dismissed"


class DeadlineError(DisaggError, TimeoutError):
    """A stage took longer than it may (HTTP 504)."""

    code = "deadline_exceeded"
    status = 504


def late() -> DeadlineError:
    """The request's own time limit has passed, in whatever stage."""
    return DeadlineError("the request took longer than its time limit")


class MediaTimeout(DeadlineError):
    """Decoding an image or clip took longer than this server lets it."""

    code = "media_timeout"


class TransferError(DisaggError):
    """A link or a session failed; the item may be tried again on another encode rank."""

    code = "transfer_failed"
    status = 503


class HubGone(TransferError):
    """No frontend answers any more, or none ever did: the job is over, and so is this rank."""

    code = "hub_gone"


class HandshakeError(TransferError):
    """Two ranks that do not fit together. Names the field and both values."""

    code = "handshake_refused"

    def __init__(self, field: str, expected: object, got: object) -> None:
        super().__init__(f"handshake refused: {field}: expected {expected!r}, got {got!r}")
        self.field, self.expected, self.got = field, expected, got


class CanaryFailed(DisaggError):
    """What a rank computes is not what its checkpoint says. Names the part."""

    code = "canary_failed"

    def __init__(self, part: str, problem: str) -> None:
        super().__init__(f"canary: {part}: {problem}")
        self.part, self.problem = part, problem


# ---- from one process to another ----

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
    """An error as what a client must be told, and nothing else. `kind` says whose fault it is, `status` and `code` are
    those of the error behind it."""

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
        known = MediaTimeout if self.code == MediaTimeout.code else KINDS[self.kind]
        error = known(self.message)
        error.code, error.status, error.param = self.code, self.status, self.param
        return error

    @property
    def is_final(self) -> bool:
        """No other rank could do better: the media are bad, or the time is up."""
        return self.kind in ("input", "deadline")


def report(error: DisaggError, prefix: str = "") -> int:
    """One line on stderr; the exit status that fits: 2 for bad input, 1 else."""
    is_input = isinstance(error, CheckpointError) or (isinstance(error, InputError) and error.status < 500)
    param = getattr(error, "param", None)
    print(f"error: {prefix}{f'{param}: ' if param else ''}{error}", file=sys.stderr)
    return 2 if is_input else 1


class DeviceLost(BaseException):
    """The GPU takes no more work of this process, whose end is all that helps. No failure of single requests, so
    nothing that handles these may catch it."""
