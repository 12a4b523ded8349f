"""What cached KV pages hold: a key for everything that their keys and values depend on. Torch-free.

The keys and values of a page follow from its tokens, from all tokens before them, and from the weights that computed
them. So a page's key is a chain: ``H(key of the page before, its tokens)``, and the first page's is
``H(root, its tokens)``, where the root says what all of a request's pages have in common:

- the composition, version and scale of each adapter, in one order whatever the client's was. A version is the sha256 of
  the adapter's weights, so a name that is given to other weights finds nothing of what the old ones computed;
- the merged weights, if they compute the request: they are rounded, so their keys and values differ from those of the
  same adapter beside the base. They are named by the one merge that made them, and not by version and mode: nothing has
  to be assumed about how alike two merges are;
- the tenant, and the ``cache_salt``: what is there can be told from what is not by the time to the first token, so
  nobody is to learn in this way what another tenant sent.

The base is the process's, and so are page size, position tables and kernels. Only full pages have keys, and only pages
whose tokens were computed by a step that did not fail are entered.

**Why a wrong page cannot be taken.** Whoever has the key has computed it from its own tokens and root. ``H`` is BLAKE2b
with 256 bits of the exact bytes (token ids as 64-bit numbers, so of one length for each page; the root's fields as
Python writes them, which no two different values share): that two different inputs have one key is as likely as that
two different adapters have one version, which everything else here relies on. So nothing is compared on a hit.

**Order.** A request that holds a cached page holds the cached pages before it in its chain, too. When it lets go of
them, the last goes first. So among pages without a user, those after a page are always older than it, and none is
evicted before what comes after it: of every chain, what is cached, and what is in use, is a beginning.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final

from manylora.server.engine.request import Request

_KEY_BYTES: Final = 32


def root_key(request: Request) -> bytes:
    """What the first page's key begins with; see the module's text."""
    merged = None if request.merged is None else request.merged.identity
    parts = (request.tenant.name, request.cache_salt, merged, request.composition)
    return blake2b(repr(parts).encode(), digest_size=_KEY_BYTES, person=b"manylora root").digest()


class PageKeys:
    """The keys of a request's full pages, each made once."""

    __slots__ = ("_keys", "_page_size", "_request", "_root", "versions")

    def __init__(self, request: Request, page_size: int) -> None:
        self._request = request
        self._page_size = page_size
        self._root = root_key(request)
        self._keys: list[bytes] = []
        self.versions = tuple(version for version, _scale in request.composition)
        """Of the adapters that its keys and values were computed with."""

    def first(self, count: int) -> Sequence[bytes]:
        """Keys of its first ``count`` pages (and perhaps of more), all of whose tokens are known."""
        keys, size = self._keys, self._page_size
        for i in range(len(keys), count):
            tokens = self._request.tokens_between(i * size, (i + 1) * size)
            if len(tokens) != size:
                raise ValueError(f"page {i} has {len(tokens)} known tokens of {size}: it has no key yet")
            before = keys[-1] if keys else self._root
            content = before + array("q", tokens).tobytes()
            keys.append(blake2b(content, digest_size=_KEY_BYTES, person=b"manylora page").digest())
        return keys


@dataclass(frozen=True, slots=True)
class CachedPage:
    """``parent``: the page before it in its chain, None for the first."""

    key: bytes
    parent: int | None
    versions: tuple[str, ...]


class PrefixCache:
    """Which page has which key. Who uses pages, and which go first, is the block pool's to know."""

    def __init__(self) -> None:
        self._page_of: dict[bytes, int] = {}
        self._cached: dict[int, CachedPage] = {}
        self._pages_of: dict[str, dict[int, None]] = {}
        """By version; a dictionary for its order."""

    def __len__(self) -> int:
        return len(self._cached)

    def __contains__(self, page: int) -> bool:
        return page in self._cached

    def page(self, key: bytes) -> int:
        """KeyError if it is not here."""
        return self._page_of[key]

    def find(self, keys: Sequence[bytes], count: int) -> int:
        """How many of the first ``count`` keys of a chain are here. As they are a beginning, few need to be asked
        for."""
        return beginning(lambda i: keys[i] in self._page_of, count)

    def enter(self, page: int, key: bytes, parent: int | None, versions: tuple[str, ...]) -> bool:
        """Remember what the page holds; False, and nothing is changed, if another page holds the same.

        RuntimeError if it has a key already, or what comes before it is not here: it could never be found."""
        if page in self._cached or (parent is not None and parent not in self._cached):
            raise RuntimeError(
                f"page {page} cannot be cached behind page {parent}: one is there already, or one is not"
            )
        if key in self._page_of:
            return False
        self._page_of[key] = page
        self._cached[page] = CachedPage(key, parent, versions)
        for version in versions:
            self._pages_of.setdefault(version, {})[page] = None
        return True

    def remove(self, page: int) -> None:
        cached = self._cached.pop(page)
        del self._page_of[cached.key]
        for version in cached.versions:
            pages = self._pages_of[version]
            del pages[page]
            if not pages:
                del self._pages_of[version]

    def pages_of(self, version: str) -> list[int]:
        """The pages that were computed with an adapter version, alone or among others."""
        return list(self._pages_of.get(version, ()))

    def check_integrity(self, users: Sequence[int], idle: Sequence[int]) -> None:
        """Raise RuntimeError if a page could be evicted before one behind it. ``users``: of each page, how many;
        ``idle``: cached pages without any, in the order in which they would be evicted."""
        if len(self._page_of) != len(self._cached):
            raise RuntimeError(f"prefix cache: {len(self._page_of)} keys for {len(self._cached)} pages")
        places = {page: i for i, page in enumerate(idle)}
        for page, cached in self._cached.items():
            if self._page_of.get(cached.key) != page:
                raise RuntimeError(f"prefix cache: the key of page {page} leads to {self._page_of.get(cached.key)}")
            parent = cached.parent
            if parent is None:
                continue
            if parent not in self._cached or users[parent] < users[page]:
                raise RuntimeError(
                    f"prefix cache: page {page} has {users[page]} users, but what comes before it, page {parent}, is "
                    f"{'used by ' + str(users[parent]) if parent in self._cached else 'not cached'}"
                )
            if parent in places and places[parent] < places[page]:
                raise RuntimeError(f"prefix cache: page {parent} would be evicted before page {page} behind it")


def beginning(holds: Callable[[int], bool], count: int) -> int:
    """Of how many of the first ``count`` places something holds that holds of a beginning of them."""
    return bisect_left(range(count), True, key=lambda i: not holds(i))
