"""Files that are replaced in one step."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from manylora.adapters.durable import replace_text


def test_the_text_is_on_the_disk_before_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)

        def noted(*arguments: Any, name: str = name, real: Any = real) -> None:
            done.append(name)
            real(*arguments)

        monkeypatch.setattr(os, name, noted)
    replace_text(tmp_path / "made" / "state.json", "new å\n")
    assert done == ["fsync", "replace", "fsync"], "the file, its name, the directory"
    assert (tmp_path / "made" / "state.json").read_text(encoding="utf-8") == "new å\n"


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_what_fails_leaves_the_old_text_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "state.json"
    path.write_text("old")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, full)
    with pytest.raises(OSError, match="No space left"):
        replace_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["state.json"]
