"""The cache of encoded rows: bounded, what is in use stays, the longest unused goes first."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from qwen3vl_disagg.core.requests import VisualItem
from qwen3vl_disagg.encode.embedding_cache import ContentKey, EmbeddingCache, content_key

VISUAL = VisualItem(
    modality="image", digest="d", num_bytes=1, grid=(1, 4, 6), num_rows=6, offset=0, param="messages[0]"
)


def key(name: object) -> ContentKey:
    return ContentKey("image", str(name), (1, 2, 2), (), False, "", 7)


def filled(max_bytes: int, *sizes: int) -> EmbeddingCache[str]:
    """Unpinned entries 0, 1, .. of these sizes."""
    cache = EmbeddingCache[str](max_bytes)
    for number, size in enumerate(sizes):
        assert cache.put(key(number), str(number), size)
        cache.unpin(key(number))
    return cache


def names(cache: EmbeddingCache[str]) -> list[str]:
    return [name for name in map(str, range(10)) if key(name) in cache]


@pytest.mark.parametrize(
    "other",
    [
        (msgspec.structs.replace(VISUAL, modality="video"), 7),
        (msgspec.structs.replace(VISUAL, digest="e"), 7),
        (msgspec.structs.replace(VISUAL, grid=(1, 6, 4)), 7),
        (msgspec.structs.replace(VISUAL, grid=(6, 4, 1)), 7),
        (VISUAL, 8),
    ],
)
def test_whatever_the_rows_depend_on_is_in_the_key(other):
    assert content_key(*other) != content_key(VISUAL, 7)


def test_where_an_item_stands_is_not_in_the_key():
    moved = msgspec.structs.replace(VISUAL, offset=9, param="messages[3]", grid=[1, 4, 6])
    assert content_key(moved, 7) == content_key(VISUAL, 7)


def test_the_longest_unused_goes_first():
    cache = filled(10, 4, 3, 3)
    assert cache.get(key(0)) == "0"
    cache.unpin(key(0))
    cache.put(key(3), "3", 1)
    assert names(cache) == ["0", "2", "3"]
    cache.put(key(4), "4", 6)
    assert names(cache) == ["3", "4"]
    assert (cache.num_bytes, cache.num_pinned_bytes, cache.num_evictions) == (7, 7, 3)


def test_what_is_in_use_stays_and_what_is_not_makes_room():
    cache = filled(10, 4, 4)
    cache.get(key(0))
    cache.get(key(0))
    cache.put(key(2), "2", 9)
    assert (names(cache), cache.num_bytes) == (["0", "2"], 13)
    cache.unpin(key(0))
    assert names(cache) == ["0", "2"], "it is still in use once"
    cache.unpin(key(2))
    assert names(cache) == ["0"], "2 is not in use any more, and there are too many bytes"
    cache.unpin(key(0))
    assert names(cache) == ["0"]


def test_what_can_never_fit_is_not_kept():
    cache = filled(10, 4)
    assert not cache.put(key(1), "1", 11)
    assert names(cache) == ["0"]
    assert not cache.pin(key(1))
    assert cache.put(key(2), "2", 10)
    assert names(cache) == ["2"]


def test_a_cache_of_nothing_keeps_nothing():
    cache = EmbeddingCache[str](0)
    assert not cache.put(key(1), "1", 1)
    assert cache.get(key(1)) is None
    assert (len(cache), cache.num_bytes, cache.num_misses, cache.num_evictions) == (0, 0, 1, 0)


@pytest.mark.parametrize("pins", [0, 1])
def test_a_pin_that_is_not_there_cannot_be_undone(pins):
    cache = filled(10, 4)
    if pins:
        cache.pin(key(0))
        cache.unpin(key(0))
    for name in (0, 1):
        with pytest.raises(ValueError, match="not pinned"):
            cache.unpin(key(name))


def test_an_entry_is_put_once():
    with pytest.raises(ValueError, match="in the cache"):
        filled(10, 4).put(key(0), "0", 4)


class CacheMachine(RuleBasedStateMachine):
    """Against a list of (name, value, bytes, pins), the next to go first."""

    MAX = 20

    def __init__(self) -> None:
        super().__init__()
        self.cache = EmbeddingCache[int](self.MAX)
        self.model: dict[int, list[int]] = {}
        """name -> [value, bytes, pins], in the order of use."""
        self.hits = self.misses = self.evictions = self.last = 0

    def trim(self) -> None:
        while sum(size for _, size, _ in self.model.values()) > self.MAX:
            unused = [name for name, (_, _, pins) in self.model.items() if pins == 0]
            if not unused:
                return
            del self.model[unused[0]]
            self.evictions += 1

    @rule(name=st.integers(0, 6))
    def get(self, name: int) -> None:
        value = self.cache.get(key(name))
        if name in self.model:
            self.model[name] = self.model.pop(name)
            self.model[name][2] += 1
            self.hits += 1
            assert value == self.model[name][0]
        else:
            self.misses += 1
            assert value is None

    @rule(name=st.integers(0, 6), size=st.integers(1, 24))
    def put(self, name: int, size: int) -> None:
        if name in self.model:
            return
        self.last += 1
        assert self.cache.put(key(name), self.last, size) == (size <= self.MAX)
        if size <= self.MAX:
            self.model[name] = [self.last, size, 1]
            self.trim()

    @rule(name=st.integers(0, 6))
    def pin(self, name: int) -> None:
        assert self.cache.pin(key(name)) == (name in self.model)
        if name in self.model:
            self.model[name] = self.model.pop(name)
            self.model[name][2] += 1

    @precondition(lambda self: any(pins for _, _, pins in self.model.values()))
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from([name for name, (_, _, pins) in self.model.items() if pins]))
        self.cache.unpin(key(name))
        self.model[name][2] -= 1
        self.trim()

    @invariant()
    def they_agree(self) -> None:
        assert [name for name in range(7) if key(name) in self.cache] == sorted(self.model)
        assert len(self.cache) == len(self.model)
        assert self.cache.num_bytes == sum(size for _, size, _ in self.model.values())
        assert self.cache.num_pinned_bytes == sum(size for _, size, pins in self.model.values() if pins)
        counts = (self.cache.num_hits, self.cache.num_misses, self.cache.num_evictions)
        assert counts == (self.hits, self.misses, self.evictions)

    @invariant()
    def bytes_are_bounded(self) -> None:
        assert self.cache.num_bytes <= max(self.MAX, self.cache.num_pinned_bytes)


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
