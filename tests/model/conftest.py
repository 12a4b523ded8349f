from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import checkpoints

__all__ = ["checkpoints"]  # a fixture


@pytest.fixture
def copied(checkpoints: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """``copied(family, **config_changes)``: a private copy of a checkpoint; a change to None removes the key."""

    def copy(family: str = "llama", **changes: Any) -> Path:
        target = tmp_path / family
        shutil.copytree(checkpoints[family], target)
        if changes:
            config = json.loads((target / "config.json").read_text()) | changes
            kept = {key: value for key, value in config.items() if value is not None}
            (target / "config.json").write_text(json.dumps(kept))
        return target

    return copy
