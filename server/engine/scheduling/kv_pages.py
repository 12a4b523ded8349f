"""The KV pages of the scheduler's requests: what a request finds cached when it starts, what it takes as it goes on,
what it leaves for others (rule 11 in scheduler.py). Torch-free; only the step-loop thread calls it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from manylora.server.engine.request import Request
from manylora.server.engine.scheduling.block_pool import BlockPool
from manylora.server.engine.scheduling.prefix_cache import PageKeys
from manylora.server.engine.scheduling.queue_entry import Entry
from manylora.server.engine.scheduling.scheduler_config import SchedulerConfig


class KvPages:
    """``pool``: the pages themselves. ``num_queries`` and ``num_hits``: prompt tokens of the requests that have started
    and may take cached pages, and those of them that were there; each request is counted once."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.pool = BlockPool(config.num_pages, config.page_size)
        self.num_queries = 0
        self.num_hits = 0
        self._is_caching = config.prefix_cache

    def keys_of(self, request: Request) -> PageKeys | None:
        """For a new entry; None if nothing is cached here."""
        return PageKeys(request, self.pool.page_size) if self._is_caching else None

    def num_found(self, entry: Entry) -> int:
        """The cached pages with which a waiting request could start now. One of its tokens is left to be computed at
        least: the logits after the last one are what it needs next."""
        if entry.keys is None or not entry.takes_cached:
            return 0
        count = (entry.request.num_tokens - 1) // self.pool.page_size
        return self.pool.cache.find(entry.keys.first(count), count)

    def num_to_compute(self, entry: Entry) -> int:
        """Tokens that a waiting request would have to compute if it started now."""
        return entry.request.num_tokens - self.num_found(entry) * self.pool.page_size

    def num_to_take(self, entry: Entry, leaving: Counter[int]) -> int:
        """Pages that a waiting request needs, of those that are free, for all of its known tokens; not those that it
        shares with running requests. ``leaving``: see ``BlockPool.num_in_use``."""
        wanted = self.pool.pages_for(entry.request.num_tokens)
        cached = self.num_found(entry)
        if not cached or entry.keys is None:
            return wanted
        return wanted - self.pool.num_in_use(entry.keys.first(cached), cached, leaving)

    def start(self, entry: Entry) -> None:
        """Give a request that starts what is cached of it."""
        request, cached = entry.request, self.num_found(entry)
        if cached and entry.keys is not None:
            request.pages = self.pool.take(entry.keys.first(cached)[:cached])
            request.num_computed = cached * self.pool.page_size
            entry.num_shown = cached
            entry.charged = max(entry.charged, request.num_computed)  # what nobody computed costs nothing
        if entry.keys is not None and entry.takes_cached and request.num_preemptions == 0:
            request.num_cached = request.num_computed
            self.num_queries += len(request.prompt_token_ids)
            self.num_hits += request.num_cached

    def extend(self, request: Request, num_tokens: int) -> None:
        """Give it pages for its first ``num_tokens`` tokens. RuntimeError if they are not free."""
        lacking = self.pool.pages_for(num_tokens) - len(request.pages)
        if lacking <= 0:
            return
        pages = self.pool.allocate(lacking)
        if pages is None:  # the callers have just counted the free ones
            raise RuntimeError(f"{lacking} KV pages were wanted, {self.pool.num_free} are free")
        request.pages.extend(pages)

    def computed(self, entry: Entry) -> None:
        """Show others the pages that its last step has filled.

        If another page is found to hold the same, as the two were computed at one time, that one stays the cached one.
        The request goes on with its own, and shows nothing that comes after: others could not rely on what comes
        before to stay (prefix_cache.py, "Order")."""
        if entry.keys is None or entry.is_second:
            return
        full = entry.request.num_computed // self.pool.page_size
        if full == entry.num_shown:
            return
        pages, keys = entry.request.pages, entry.keys.first(full)
        for i in range(entry.num_shown, full):
            parent = pages[i - 1] if i else None
            if not self.pool.cache.enter(pages[i], keys[i], parent, entry.keys.versions):
                entry.is_second = True
                return
            entry.num_shown = i + 1

    def release(self, entry: Entry) -> None:
        """A request has ended or was preempted. What it has shown stays cached until the page is needed."""
        self.pool.free(entry.request.pages)
        entry.request.pages = []
        entry.num_shown, entry.is_second = 0, False

    def check_integrity(self, running: Iterable[Entry]) -> None:
        """See ``BlockPool.check_integrity``."""
        self.pool.check_integrity([entry.request.pages for entry in running])
