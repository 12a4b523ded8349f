"""Who holds which page of the KV cache. Torch-free; only the step-loop thread calls it."""

from __future__ import annotations

from collections.abc import Iterable


class BlockPool:
    """Pages ``0 .. num_pages - 1``, each with the keys and values of ``page_size`` tokens.

    Every page is free or used by exactly one request. (A prefix cache will add pages that are cached: free to take,
    but still holding what they held. They would count as free here and be handed out last.)
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        if num_pages < 1 or page_size < 1:
            raise ValueError(f"num_pages and page_size must be at least 1, got {num_pages} and {page_size}")
        self.num_pages = num_pages
        self.page_size = page_size
        # A stack: the page freed last is taken first, as it is the one most likely to be in the processor's cache.
        self._free = list(range(num_pages - 1, -1, -1))
        self._is_used = bytearray(num_pages)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_pages - len(self._free)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that ``num_tokens`` tokens occupy."""
        return -(-num_tokens // self.page_size)

    def allocate(self, count: int) -> list[int] | None:
        """``count`` pages, or ``None`` (and nothing taken) if fewer are free."""
        if count < 0:
            raise ValueError(f"cannot allocate {count} pages")
        if count > len(self._free):
            return None
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._is_used[page] = 1
        return pages

    def free(self, pages: Iterable[int]) -> None:
        """Give pages back. RuntimeError if one is not in use: it would then be handed out twice."""
        for page in pages:
            if not 0 <= page < self.num_pages or not self._is_used[page]:
                raise RuntimeError(f"page {page} was freed, but is not in use (pages are 0..{self.num_pages - 1})")
            self._is_used[page] = 0
            self._free.append(page)

    def check_integrity(self, expected_used: int | None = None) -> None:
        """Raise RuntimeError, with the numbers, if a page is lost or listed twice, or other than expected are used."""
        used = sum(self._is_used)
        if len(self._free) + used != self.num_pages:
            raise RuntimeError(f"KV pages: {len(self._free)} free + {used} used != {self.num_pages} in all")
        if len(set(self._free)) != len(self._free) or any(self._is_used[page] for page in self._free):
            raise RuntimeError(f"KV pages: the {len(self._free)} free ones are not distinct pages that nobody uses")
        if expected_used is not None and used != expected_used:
            raise RuntimeError(f"KV pages: {used} are in use, but requests hold {expected_used} (of {self.num_pages})")
