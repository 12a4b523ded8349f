"""Freed memory goes back to the system, though it lies between pieces that are in use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from manylora.server.engine import heap

PIECE, COUNT = 64 << 10, 4000
"""Below the size from which glibc maps each piece by itself, and gives it back by itself."""


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(heap._malloc_trim() is None, reason="not glibc")
def test_pieces_between_others_are_given_back() -> None:
    pieces = [bytearray(os.urandom(64) * (PIECE // 64)) for _ in range(COUNT)]
    kept = pieces[::16]
    full = resident()
    del pieces
    freed = PIECE * COUNT * 15 // 16
    assert full - resident() < freed // 4, "the C library keeps it: else there is nothing to give back"
    assert heap.give_back()
    assert full - resident() > freed * 3 // 4
    assert len({bytes(piece[:64]) for piece in kept}) == len(kept)


def test_another_c_library_has_nothing_to_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap, "_malloc_trim", lambda: None)
    assert not heap.give_back()
