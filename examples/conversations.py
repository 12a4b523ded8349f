"""What the scripts that make training data share: their command line, and the format that finetune.py reads."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

Pair = tuple[str, str]  # what the user says, what the assistant answers


def arguments(description: str | None) -> argparse.Namespace:
    """``out`` (an existing folder), ``count`` and ``seed``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "data", help="folder to write [%(default)s]"
    )
    parser.add_argument("--count", type=int, default=800, help="training conversations [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="[%(default)s]")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def write(path: Path, pairs: list[Pair]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for ask, answer in pairs:
            messages = [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    print(f"{path.name}: {len(pairs)} conversations")
