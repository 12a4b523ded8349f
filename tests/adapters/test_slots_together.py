"""Which adapters could all be on the device at once: asked before a request for several of them is queued."""

from __future__ import annotations

import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from manylora.adapters.host_tier import HostTier
from manylora.adapters.slots import SlotManager
from manylora.adapters.versions import AdapterRef


class _Pool:
    max_slots = 3

    def free_pages(self) -> Mapping[str, int]:
        return {"q": 8, "table bytes": 100}

    def write(self, slot: int, weights: Any) -> None:
        raise AssertionError("nothing is uploaded here")

    def clear(self, slot: int) -> None:
        raise AssertionError("nothing is cleared here")


def ref(name: str, version: str = "", **footprint: int) -> AdapterRef:
    kinds = {kind.replace("_", " "): count for kind, count in footprint.items()}
    return AdapterRef(name, version or name * 64, footprint=kinds)


@pytest.mark.parametrize(
    ("refs", "reason"),
    [
        ([], None),
        ([ref("a", q=8)], None),
        ([ref("a", q=4), ref("b", q=4), ref("c", table_bytes=100)], None),
        ([ref(name) for name in "abcd"], r"4 adapters are asked for together, but .* 3 .*\(--max-device-adapters\)"),
        ([ref("a", q=4), ref("b", q=5)], r"of `q` they need 9, this server has 8 \(--max-device-adapters\)"),
        ([ref("a", table_bytes=51), ref("b", q=1, table_bytes=50)], r"of `table bytes` they need 101, .* has 100"),
        # Two names of one version share its slot and its pages.
        ([ref("a", q=8), ref("b", "a" * 64, q=8)], None),
        ([*(ref(name) for name in "abc"), ref("d", "a" * 64)], None),
    ],
)
def test_never_together(refs: list[AdapterRef], reason: str | None) -> None:
    with ThreadPoolExecutor(1) as executor:
        host = HostTier(lambda _source: pytest.fail("nothing is read"), executor=executor)
        slots = SlotManager(_Pool(), host, executor=executor, on_ready=lambda: None)
        found = slots.never_together(refs)
    if reason is None:
        assert found is None
    else:
        assert found is not None
        assert re.search(reason, found), found
