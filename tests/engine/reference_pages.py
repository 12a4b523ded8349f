"""The KV pages again, slowly: a cached page *is* the tokens up to its end and what computed them, nothing is hashed,
and who holds what is recomputed from plain lists at each question.

Written from rule 11 atop server/engine/scheduling/scheduler.py and the text of prefix_cache.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

Content = tuple[object, tuple[int, ...]]
"""What computed the keys and values, and all tokens up to the page's end."""


@dataclass(eq=False)
class Holder:
    """A request, as far as its pages go. ``shown``: those of its first pages that are cached; ``own``: the number of
    its other pages."""

    root: object
    tokens: list[int]
    versions: frozenset[str] = frozenset()
    takes: bool = True
    shown: list[Content] = field(default_factory=list)
    own: int = 0
    stopped_showing: bool = False

    @property
    def count(self) -> int:
        return len(self.shown) + self.own


@dataclass
class Cached:
    content: Content
    versions: frozenset[str]
    released: int = 0
    """Number of the event by which its last user let go of it."""


class ReferencePages:
    def __init__(self, num_pages: int, page_size: int, *, caching: bool) -> None:
        self.num_pages, self.page_size, self.caching = num_pages, page_size, caching
        self.holders: list[Holder] = []
        self.cached: list[Cached] = []
        self.n_events = self.n_evicted = self.n_queries = self.n_hits = 0
        self.seen: Counter[str] = Counter()

    def pages_for(self, tokens: int) -> int:
        return (tokens + self.page_size - 1) // self.page_size

    def held_by(self, holders: Collection[Holder]) -> int:
        """Pages, each once."""
        return len({content for holder in holders for content in holder.shown}) + sum(one.own for one in holders)

    def free(self, without: Collection[Holder] = ()) -> int:
        return self.num_pages - self.held_by([holder for holder in self.holders if holder not in without])

    def empty(self) -> int:
        """Pages that hold nothing."""
        return self.num_pages - len(self.cached) - sum(one.own for one in self.holders)

    def content(self, holder: Holder, i: int) -> Content:
        return holder.root, tuple(holder.tokens[: (i + 1) * self.page_size])

    def there(self, holder: Holder) -> list[Content]:
        """What it could start with now."""
        contents = [page.content for page in self.cached]
        found: list[Content] = []
        while holder.takes and (len(found) + 1) * self.page_size < len(holder.tokens):
            content = self.content(holder, len(found))
            if content not in contents:
                break
            found.append(content)
        return found

    def to_take(self, holder: Holder, without: Collection[Holder] = ()) -> int:
        in_use = [content for other in self.holders if other not in without for content in other.shown]
        return self.pages_for(len(holder.tokens)) - sum(content in in_use for content in self.there(holder))

    # --- what happens ---------------------------------------------------------------------------------------------

    def start(self, holder: Holder) -> int:
        """The number of tokens that need not be computed."""
        self.seen["shared with running ones"] += self.to_take(holder) < self.pages_for(len(holder.tokens))
        holder.shown = self.there(holder)
        return len(holder.shown) * self.page_size

    def grow(self, holder: Holder, count: int) -> None:
        holder.own += max(0, count - holder.count)
        while len(self.cached) + sum(one.own for one in self.holders) > self.num_pages:
            used = [content for one in self.holders for content in one.shown]
            idle = [page for page in self.cached if page.content not in used]
            # Of what was released together, the last page of the chain first.
            self.cached.remove(min(idle, key=lambda page: (page.released, -len(page.content[1]))))
            self.n_evicted += 1

    def computed(self, holder: Holder, n_tokens: int) -> None:
        while self.caching and not holder.stopped_showing and (len(holder.shown) + 1) * self.page_size <= n_tokens:
            content = self.content(holder, len(holder.shown))
            if content in [page.content for page in self.cached]:
                holder.stopped_showing = True
                self.seen["computed twice"] += 1
            else:
                self.cached.append(Cached(content, holder.versions))
                holder.shown.append(content)
                holder.own -= 1

    def release(self, holder: Holder) -> None:
        self.n_events += 1
        shown, holder.shown, holder.own, holder.stopped_showing = holder.shown, [], 0, False
        used = [content for one in self.holders for content in one.shown]
        for page in self.cached:
            if page.content in shown and page.content not in used:
                page.released = self.n_events

    def forget(self, version: str) -> None:
        used = [content for one in self.holders for content in one.shown]
        before = len(self.cached)
        self.cached = [page for page in self.cached if version not in page.versions or page.content in used]
        self.seen["forgotten"] += before - len(self.cached)
