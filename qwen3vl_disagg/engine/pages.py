"""Page accounting of the key-value cache, in one place. Pure: page ids and counts only, no tensors.

A page is in one of three states: free; taken by one or more sequences; or kept, with keys and values that a later
prompt may begin with, until its room is needed. What a kept page holds is known by a trie: its content under the
page before it. A look-up compares whole contents, so it cannot be fooled by a collision of hashes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

PageContent = Hashable
"""All that the keys and values of a page depend on, besides the pages before it."""


ROOT = 0
"""The node before the first page."""


@dataclass
class Prefix:
    """Pages that hold the beginning of some contents, and the node of each."""

    pages: list[int] = field(default_factory=list)
    nodes: list[int] = field(default_factory=list)
    num_evicted: int = 0
    """Of the pool, when it was looked up."""

    @property
    def node(self) -> int:
        """Of the last page."""
        return self.nodes[-1] if self.nodes else ROOT

    def shorten(self, stop: int) -> None:
        """To so many pages at most."""
        del self.pages[stop:], self.nodes[stop:]


@dataclass
class PagePool:
    """Hands out page ids `0 .. num_pages - 1`, all that are asked for or none. `keep`: remember contents."""

    num_pages: int
    page_size: int
    keep: bool = False
    num_evicted: int = 0

    def __post_init__(self) -> None:
        if self.num_pages < 1 or self.page_size < 1:
            raise ValueError(f"need at least one page of one token, got {self.num_pages} pages of {self.page_size}")
        self._free = list(range(self.num_pages - 1, -1, -1))
        self._users: dict[int, int] = {}
        """Taken pages -> how many sequences have them."""
        self._kept: OrderedDict[int, None] = OrderedDict()
        """Pages that no sequence has, with known content; the next to be evicted comes first."""
        self._pages: dict[tuple[int, PageContent], int] = {}
        """(node before, content) -> page: the trie's edges."""
        self._entries: dict[int, tuple[int, tuple[int, PageContent]]] = {}
        """Page with known content -> its node, and the edge to it. Nodes are numbers that are never used twice, so what
        hung below a page that was evicted cannot be reached any more."""
        self._nodes = {ROOT}
        self._last_node = ROOT

    @property
    def num_free(self) -> int:
        """Pages that can be had now, kept ones among them."""
        return len(self._free) + len(self._kept)

    @property
    def num_kept(self) -> int:
        return len(self._kept)

    def is_kept(self, page: int) -> bool:
        """No sequence has it, but its content is known."""
        return page in self._kept

    def unknown(self, pages: Iterable[int]) -> list[int]:
        """Those of a sequence's pages whose content is not known: no other sequence reads them, or ever will."""
        return [page for page in pages if page not in self._entries]

    def pages_for(self, num_tokens: int) -> int:
        """Pages that `num_tokens` fill: 17 tokens on pages of 16 take 2."""
        return -(-num_tokens // self.page_size)

    def find(self, contents: Sequence[PageContent], stop: int | None = None, known: Prefix | None = None) -> Prefix:
        """The pages that hold the longest beginning of these contents (of the first `stop`). Nothing is taken.

        `known`: what was found of the same contents before, which is brought up to date: only what may have changed
        since is looked at.
        """
        prefix = Prefix() if known is None else known
        pages, nodes = prefix.pages, prefix.nodes
        if prefix.num_evicted != self.num_evicted:
            entries = self._entries
            gone = (n for n, (page, node) in enumerate(zip(pages, nodes, strict=True)) if _node(entries, page) != node)
            first = next(gone, len(pages))
            del pages[first:], nodes[first:]
            prefix.num_evicted = self.num_evicted
        for content in islice(contents, len(pages), stop):
            page = self._pages.get((prefix.node, content))
            if page is None:
                break
            pages.append(page)
            nodes.append(self._entries[page][0])
        return prefix

    def allocate(self, count: int, shared: Iterable[int] = ()) -> list[int] | None:
        """Take the pages `shared` (found before) and `count` new ones: [*shared, *new]. None when there are too few."""
        shared = list(shared)
        if count > self.num_free - sum(page in self._kept for page in shared):
            return None
        for page in shared:
            self._kept.pop(page, None)
            self._users[page] = self._users.get(page, 0) + 1
        new = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        self._users.update((page, 1) for page in new)
        return [*shared, *new]

    def _evict(self) -> int:
        page, _ = self._kept.popitem(last=False)
        node, edge = self._entries.pop(page)
        del self._pages[edge]
        self._nodes.discard(node)
        self.num_evicted += 1
        return page

    def free(self, pages: list[int]) -> None:
        """Give a sequence's pages back, in their order, when it ends or is preempted (`Scheduler`). ValueError if one
        of them was not handed out.

        Those that others have stay taken; those with known content are kept until a page is short, the beginning of the
        sequence longest.
        """
        stray = [page for page in pages if page not in self._users]
        if stray or len(set(pages)) != len(pages):
            raise ValueError(f"pages {stray or pages} are not taken once each")
        for page in reversed(pages):
            self._users[page] -= 1
            if self._users[page]:
                continue
            del self._users[page]
            if page in self._entries:
                self._kept[page] = None
            else:
                self._free.append(page)

    def remember(self, page: int, before: int, content: PageContent) -> int | None:
        """A taken page is full and will not change: it holds `content`, after the node `before` (ROOT at first).

        Returns the content's node, which may be that of another page with the same; None if the one before is gone.
        """
        if not self.keep or before not in self._nodes:
            return None
        if page not in self._users or page in self._entries:
            raise ValueError(f"page {page} is not taken, or its content is known")
        edge = (before, content)
        if edge in self._pages:
            return self._entries[self._pages[edge]][0]
        self._last_node += 1
        self._nodes.add(self._last_node)
        self._pages[edge] = page
        self._entries[page] = (self._last_node, edge)
        return self._last_node


def _node(entries: Mapping[int, tuple[int, tuple[int, PageContent]]], page: int) -> int | None:
    entry = entries.get(page)
    return None if entry is None else entry[0]
