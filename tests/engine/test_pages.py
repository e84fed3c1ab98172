import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from qwen3vl_disagg.engine.pages import PagePool


def test_seventeen_tokens_take_two_pages_of_sixteen():
    pool = PagePool(3, 16)
    pages = pool.allocate(17)
    assert pages is not None
    assert len(pages) == 2
    assert pool.allocate(17) is None
    assert pool.num_free == 1


def test_a_page_is_freed_once():
    pool = PagePool(4, 2)
    pages = pool.allocate(4)
    assert pages is not None
    pool.free(pages)
    with pytest.raises(ValueError, match="not taken"):
        pool.free(pages)
    with pytest.raises(ValueError, match="not taken"):
        pool.free([99])
    again = pool.allocate(2)
    assert again is not None
    with pytest.raises(ValueError, match="once each"):
        pool.free(again * 2)


class PoolMachine(RuleBasedStateMachine):
    """Against a plain dict of owners."""

    def __init__(self):
        super().__init__()
        self.pool = PagePool(7, 3)
        self.owned: list[list[int]] = []

    @rule(tokens=st.integers(1, 25))
    def allocate(self, tokens):
        free = 7 - sum(map(len, self.owned))
        pages = self.pool.allocate(tokens)
        if -(-tokens // 3) > free:
            assert pages is None
        else:
            assert len(pages) == -(-tokens // 3)
            self.owned.append(pages)

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def free(self, data):
        self.pool.free(self.owned.pop(data.draw(st.integers(0, len(self.owned) - 1))))

    @invariant()
    def no_page_has_two_owners(self):
        pages = [page for pages in self.owned for page in pages]
        assert len(set(pages)) == len(pages)
        assert set(pages) <= set(range(7))
        assert self.pool.num_free == 7 - len(pages)


TestPool = PoolMachine.TestCase
