"""Page accounting of the key-value cache, in one place. Pure: page ids only, no tensors."""

from __future__ import annotations


class PagePool:
    """Hands out page ids `0 .. num_pages - 1`, all that are asked for or none."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        if num_pages < 1 or page_size < 1:
            raise ValueError(f"need at least one page of one token, got {num_pages} pages of {page_size}")
        self.num_pages, self.page_size = num_pages, page_size
        self._free = list(range(num_pages - 1, -1, -1))
        self._taken: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that `num_tokens` fill: 17 tokens on pages of 16 take 2."""
        return -(-num_tokens // self.page_size)

    def allocate(self, num_tokens: int) -> list[int] | None:
        """Pages for `num_tokens`, or None when not enough are free."""
        count = self.pages_for(num_tokens)
        if count > len(self._free):
            return None
        pages = [self._free.pop() for _ in range(count)]
        self._taken.update(pages)
        return pages

    def free(self, pages: list[int]) -> None:
        """Give pages back. ValueError if one of them was not handed out."""
        stray = [page for page in pages if page not in self._taken]
        if stray or len(set(pages)) != len(pages):
            raise ValueError(f"pages {stray or pages} are not taken once each")
        self._taken.difference_update(pages)
        self._free.extend(reversed(pages))
