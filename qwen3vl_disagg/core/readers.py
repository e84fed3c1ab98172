"""Kinds of values that come from outside. Each reads one value and says what it means; InputError names the place."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from qwen3vl_disagg.core.errors import InputError

Reader = Callable[[object, str], Any]
"""(a value, its place) -> what it means. InputError naming the place."""
_LARGEST = sys.float_info.max


class ValueKind(ABC):
    """What an option's values may be. Called, it is a `Reader` of values as JSON has them; `check` takes what Python
    has: the same, but 5.0 is no whole number."""

    @property
    @abstractmethod
    def values(self) -> str:
        """What they are, for documents."""

    @property
    def flag_type(self) -> Any:
        """Type of a flag of the command line; None where no flag could say it."""
        return None

    @abstractmethod
    def check(self, value: Any, where: str) -> Any:
        """The value, as it is kept. InputError naming `where`."""

    def __call__(self, value: Any, where: str) -> Any:
        return self.check(value, where)

    def tokens(self, value: Any) -> Iterable[int]:
        """The token ids in a checked value: they must be the vocabulary's."""
        return ()


@dataclass(frozen=True)
class Number(ValueKind):
    """A number within bounds; a whole one may be written as 5.0."""

    low: float
    high: float
    is_whole: bool = False

    @property
    def values(self) -> str:
        return f"{int(self.low)} to {int(self.high)}" if self.is_whole else f"{self.low:g} to {self.high:g}"

    @property
    def flag_type(self) -> Any:
        return int if self.is_whole else float

    def check(self, value: Any, where: str) -> Any:
        good = isinstance(value, int if self.is_whole else (int, float)) and not isinstance(value, bool)
        if not good or not self.low <= value <= self.high:
            raise InputError(f"{where} must be a {'whole ' * self.is_whole}number from {self.values}", param=where)
        return value

    def __call__(self, value: Any, where: str) -> Any:
        if self.is_whole and isinstance(value, float) and value.is_integer():
            value = int(value)
        return self.check(value, where)


@dataclass(frozen=True)
class Flag(ValueKind):
    """True or false."""

    @property
    def values(self) -> str:
        return "true, false"

    @property
    def flag_type(self) -> Any:
        return bool

    def check(self, value: Any, where: str) -> bool:
        if not isinstance(value, bool):
            raise InputError(f"{where} must be true or false", param=where)
        return value


@dataclass(frozen=True)
class Strings(ValueKind):
    """A list of strings; one may stand for a list of one."""

    most: int
    most_chars: int

    @property
    def values(self) -> str:
        return f"a string, or up to {self.most}, of 1 to {self.most_chars} characters"

    @property
    def flag_type(self) -> Any:
        return tuple[str, ...]

    def check(self, value: Any, where: str) -> list[str]:
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
            raise InputError(f"{where} must be a string or a list of strings", param=where)
        if len(texts) > self.most or not all(0 < len(text) <= self.most_chars for text in texts):
            problem = f"{where} takes up to {self.most} strings of 1 to {self.most_chars} characters"
            raise InputError(problem, param=where)
        return list(texts)


@dataclass(frozen=True)
class Words(Strings):
    """The same, of which each text may be told by the ids of its tokens: `most_ids` of all of these together."""

    most_ids: int

    @property
    def values(self) -> str:
        return f"{super().values}; in place of one also a list of token ids, {self.most_ids} of all together"

    def check(self, value: Any, where: str) -> list[Any]:
        if not isinstance(value, (list, tuple)):
            return super().check(value, where)
        super().check([word for word in value if not isinstance(word, (list, tuple))], where)
        num_ids = sum(len(word) for word in value if not isinstance(word, str))
        if num_ids > self.most_ids:
            raise InputError(f"{where} have {num_ids} tokens, up to {self.most_ids} may be", param=where)
        ids = TokenIdList(self.most_ids, least=1)
        return [word if isinstance(word, str) else ids.check(word, where) for word in value]

    def tokens(self, value: list[Any]) -> Iterable[int]:
        return [token_id for word in value if not isinstance(word, str) for token_id in word]


@dataclass(frozen=True)
class TokenIdList(ValueKind):
    """A list of token ids."""

    most: int
    least: int = 0

    @property
    def values(self) -> str:
        return f"{self.least} to {self.most} token ids" if self.least else f"up to {self.most} token ids"

    @property
    def flag_type(self) -> Any:
        return tuple[int, ...]

    def check(self, value: Any, where: str) -> list[int]:
        good = isinstance(value, (list, tuple)) and self.least <= len(value) <= self.most
        if not good or not all(type(token_id) is int and 0 <= token_id < 2**31 for token_id in value):
            raise InputError(f"{where} must be a list of {self.values}", param=where)
        return list(value)

    def tokens(self, value: list[int]) -> Iterable[int]:
        return value


@dataclass(frozen=True)
class TokenNumbers(ValueKind):
    """Token id (JSON: a string of digits) -> a finite number."""

    most: int

    @property
    def values(self) -> str:
        return f"an object of up to {self.most} token ids (strings of digits), each with a number"

    def check(self, value: Any, where: str) -> dict[int, float]:
        if not isinstance(value, dict) or len(value) > self.most:
            raise InputError(f"{where} must be an object of up to {self.most} token ids", param=where)
        found: dict[int, float] = {}
        for key, number in value.items():
            text = str(key)
            if not (text.isascii() and text.isdecimal() and len(text) < 10):
                raise InputError(f"{where} takes token ids, not {text[:32]!r}", param=where)
            is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
            if not is_number or not -_LARGEST <= number <= _LARGEST:
                raise InputError(f"{where} of token {text} must be a finite number", param=where)
            found[int(text)] = float(number)
        return found

    def tokens(self, value: dict[int, float]) -> Iterable[int]:
        return value


@dataclass(frozen=True)
class OneOf:
    """Reads one of these words."""

    words: tuple[str, ...]

    def __call__(self, value: object, where: str) -> str:
        if not isinstance(value, str) or value not in self.words:
            raise InputError(f"{where} must be one of {', '.join(self.words)}", param=where)
        return value
