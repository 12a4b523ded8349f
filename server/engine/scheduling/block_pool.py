"""Who holds which page of the KV cache. Torch-free; only the step-loop thread calls it."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

from manylora.server.engine.scheduling.prefix_cache import PrefixCache, beginning


class BlockPool:
    """Pages ``0 .. num_pages - 1``, each with the keys and values of ``page_size`` tokens.

    A page is free, used by one or more requests, or idle: cached (prefix_cache.py), and used by nobody now. Idle pages
    count as free. They are handed out when no page is left that holds nothing, least recently used first, whichever
    tenant's they are: what nobody uses is nobody's, and a tenant that fills the cache costs the others time, never
    pages that they use.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        if num_pages < 1 or page_size < 1:
            raise ValueError(f"num_pages and page_size must be at least 1, got {num_pages} and {page_size}")
        self.num_pages = num_pages
        self.page_size = page_size
        self.cache = PrefixCache()
        self.num_evicted = 0
        """Cached pages that made room for others."""
        # A stack: the page freed last is taken first, as it is the one most likely to be in the processor's cache.
        self._free = list(range(num_pages - 1, -1, -1))
        self._users = [0] * num_pages
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Pages that can be had: those that hold nothing, and idle ones."""
        return len(self._free) + len(self._idle)

    @property
    def num_empty(self) -> int:
        """Pages that hold nothing."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_pages - self.num_free

    def users(self, page: int) -> int:
        """How many requests hold the page."""
        return self._users[page]

    def pages_for(self, num_tokens: int) -> int:
        """Pages that ``num_tokens`` tokens occupy."""
        return -(-num_tokens // self.page_size)

    def allocate(self, count: int) -> list[int] | None:
        """``count`` pages for one user, or ``None`` (and nothing taken) if fewer are free."""
        if count < 0:
            raise ValueError(f"cannot allocate {count} pages")
        if count > self.num_free:
            return None
        pages = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for page in pages:
            self._users[page] = 1
        return pages

    def free(self, pages: Sequence[int]) -> None:
        """One user lets go of its pages, in the order of its tokens. RuntimeError if one is not in use: it would then
        be handed out twice."""
        for page in reversed(pages):  # see prefix_cache.py, "Order"
            if not 0 <= page < self.num_pages or not self._users[page]:
                raise RuntimeError(f"page {page} was freed, but is not in use (pages are 0..{self.num_pages - 1})")
            self._users[page] -= 1
            if self._users[page]:
                continue
            if page in self.cache:
                self._idle[page] = None
            else:
                self._free.append(page)

    # --- cached pages ---------------------------------------------------------------------------------------------

    def take(self, keys: Sequence[bytes]) -> list[int]:
        """The cached pages of these keys, for one more user. KeyError if one is not there."""
        pages = [self.cache.page(key) for key in keys]
        for page in pages:
            if not self._users[page]:
                del self._idle[page]
            self._users[page] += 1
        return pages

    def num_in_use(self, keys: Sequence[bytes], count: int, leaving: Counter[int]) -> int:
        """How many of the first ``count`` pages of a chain, all cached, others hold. ``leaving``: by page, users not to
        be counted."""

        def is_in_use(i: int) -> bool:
            page = self.cache.page(keys[i])
            return self._users[page] > leaving[page]

        return beginning(is_in_use, count)

    def forget(self, version: str) -> int:
        """An adapter version is gone: free what was computed with it and nobody uses; how many pages that were."""
        pages = [page for page in self.cache.pages_of(version) if not self._users[page]]
        for page in pages:
            del self._idle[page]
            self.cache.remove(page)
            self._free.append(page)
        return len(pages)

    def _evict(self) -> int:
        page, _ = self._idle.popitem(last=False)
        self.cache.remove(page)
        self.num_evicted += 1
        return page

    def check_integrity(self, held: Iterable[Sequence[int]] | None = None) -> None:
        """Raise RuntimeError, with the numbers, if a page is lost or listed twice, or is held by other than it should.
        ``held``: the pages of each request that has some; None: not looked at."""
        used = sum(map(bool, self._users))
        free, idle = len(self._free), len(self._idle)
        if free + idle + used != self.num_pages:
            raise RuntimeError(f"KV pages: {free} free + {idle} cached + {used} used != {self.num_pages} in all")
        if len({*self._free, *self._idle}) != free + idle or any(
            self._users[page] for page in [*self._free, *self._idle]
        ):
            raise RuntimeError(f"KV pages: the {free} free and {idle} cached ones are not distinct pages nobody uses")
        if any(page in self.cache for page in self._free) or not all(page in self.cache for page in self._idle):
            raise RuntimeError(f"KV pages: of {free} free and {idle} cached ones, some have a key or lack one")
        self.cache.check_integrity(self._users, list(self._idle))
        if held is None:
            return
        users = Counter(page for pages in held for page in pages)
        wrong = [page for page in range(self.num_pages) if users[page] != self._users[page]]
        if wrong:
            page = wrong[0]
            raise RuntimeError(
                f"KV pages: {used} are in use, but requests hold {len(users)} (of {self.num_pages}); page {page} has "
                f"{self._users[page]} users, and {users[page]} requests hold it"
            )
