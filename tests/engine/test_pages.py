import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from qwen3vl_disagg.engine.pages import ROOT, PagePool, Prefix


def test_seventeen_tokens_take_two_pages_of_sixteen():
    pool = PagePool(3, 16)
    assert pool.pages_for(17) == 2
    pages = pool.allocate(2)
    assert len(set(pages)) == 2
    assert pool.allocate(2) is None
    assert pool.num_free == 1


def test_a_page_is_freed_once():
    pool = PagePool(4, 2)
    pages = pool.allocate(2)
    pool.free(pages)
    with pytest.raises(ValueError, match="not taken"):
        pool.free(pages)
    with pytest.raises(ValueError, match="not taken"):
        pool.free([99])
    again = pool.allocate(1)
    with pytest.raises(ValueError, match="once each"):
        pool.free(again * 2)


def test_what_is_kept_is_found_and_goes_when_room_is_needed_the_end_first():
    pool = PagePool(4, 2, keep=True)
    [a, b, c] = pool.allocate(3)
    node = pool.remember(a, ROOT, "A")
    assert pool.remember(b, node, "B") not in (node, None)
    pool.free([a, b, c])
    assert pool.num_free == 4
    assert pool.num_kept == 2
    assert pool.find(["A", "B", "C"]).pages == [a, b]
    assert pool.find(["B"]).pages == []  # B is known after A only
    [other, d, e] = pool.allocate(3)
    assert {other, d, e} == {c, b, 3}  # the free ones, then B, which hangs below A
    found = pool.find(["A", "B"])
    assert (found.pages, found.node) == ([a], node)
    shared = pool.allocate(0, [a])
    assert shared == [a]
    assert pool.num_free == 0
    assert pool.allocate(1) is None  # what is taken is not evicted


def test_the_same_content_twice_is_known_once():
    pool = PagePool(4, 2, keep=True)
    [a, b] = pool.allocate(2)
    node = pool.remember(a, ROOT, "A")
    assert pool.remember(b, ROOT, "A") == node
    pool.free([b])
    assert pool.num_kept == 0
    pool.free([a])
    assert pool.num_kept == 1


def test_what_hung_below_a_page_that_is_gone_is_not_found():
    pool = PagePool(2, 2, keep=True)
    [a, b] = pool.allocate(2)
    below = pool.remember(b, pool.remember(a, ROOT, "A"), "B")
    pool.free([a])  # b stays taken
    [again] = pool.allocate(1)
    assert again == a
    assert pool.remember(again, ROOT, "A") != below
    assert pool.find(["A", "B"]).pages == [a]
    assert pool.remember(again, ROOT + 10**6, "X") is None


class PoolMachine(RuleBasedStateMachine):
    """Against owners, and the contents that each page was said to hold, from the first one on."""

    SIZE = 7

    def __init__(self):
        super().__init__()
        self.pool = PagePool(self.SIZE, 3, keep=True)
        self.owned: list[tuple[list[int], list[str], int | None]] = []  # pages, contents known, node of the last
        self.known: dict[tuple[str, ...], Prefix] = {}
        self.holds: dict[int, tuple[str, ...]] = {}
        """What is written in each page, and in those before it in the sequence that wrote it."""

    def look_up(self, contents):
        """From the beginning, and from what was found of these contents the last time."""
        known = self.known.setdefault(tuple(contents), Prefix())
        found = self.pool.find(contents)
        again = self.pool.find(contents, len(contents), known)
        assert again is known
        assert (known.pages, known.nodes) == (found.pages, found.nodes)
        return found

    @rule(contents=st.lists(st.sampled_from("ab"), max_size=5))
    def only_look(self, contents):
        self.look_up(contents)

    @rule(count=st.integers(0, 8), contents=st.lists(st.sampled_from("ab"), max_size=5))
    def allocate(self, count, contents):
        found = self.look_up(contents)
        found, node = found.pages, found.node
        for number, page in enumerate(found):
            assert self.holds[page] == tuple(contents[: number + 1]), "found what is not there"
        others = {page for pages, _, _ in self.owned for page in pages}
        room = self.SIZE - len(others | set(found))
        pages = self.pool.allocate(count, found)
        if count > room:
            assert pages is None
            return
        assert pages[: len(found)] == found
        for page in pages[len(found) :]:
            assert page not in others | set(found)
            self.holds.pop(page, None)
        self.owned.append((pages, contents[: len(found)], node))

    @precondition(lambda self: any(len(pages) > len(known) for pages, known, _ in self.owned))
    @rule(data=st.data(), content=st.sampled_from("ab"))
    def remember(self, data, content):
        choices = [i for i, (pages, known, _) in enumerate(self.owned) if len(pages) > len(known)]
        i = data.draw(st.sampled_from(choices))
        pages, known, node = self.owned[i]
        page = pages[len(known)]
        self.holds[page] = (*known, content)
        known = [*known, content]
        self.owned[i] = (pages, known, None if node is None else self.pool.remember(page, node, content))

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def free(self, data):
        self.pool.free(self.owned.pop(data.draw(st.integers(0, len(self.owned) - 1)))[0])

    @invariant()
    def pages_are_taken_or_can_be_had(self):
        taken = {page for pages, _, _ in self.owned for page in pages}
        assert all(len(set(pages)) == len(pages) for pages, _, _ in self.owned)
        assert taken <= set(range(self.SIZE))
        assert self.pool.num_free == self.SIZE - len(taken)


TestPool = PoolMachine.TestCase
