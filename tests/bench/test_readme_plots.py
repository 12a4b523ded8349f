"""The README's pictures, from invented lines that are nowhere but here."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

import readme_plots

HEAD = {"run": "2000-01-01T00:00:00", "machine": "none"}


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(readme_plots, "RESULTS", tmp_path)
    return tmp_path


def write(path: Path, lines: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps({**HEAD, **line}) + "\n" for line in lines))


def compare_lines() -> list[dict[str, object]]:
    rates = {"manylora": 100.0, "vllm-cpu float32": 20.0}
    return [
        {"system": system, "round": number, "rows": rows, "adapters": adapters, "prompt_tokens": 64}
        | {"output_tokens": 64, "seconds": rows * 64 / rate * (1 + 0.1 * number)}
        for system, rate in rates.items()
        for rows, adapters in ((1, 0), (1, 1), (8, 0), (8, 8), (32, 0), (32, 8), (32, 32))
        for number in range(3)
    ]


def test_rates_are_tokens_a_second_by_round() -> None:
    lines = [{**HEAD, **line} for line in compare_lines()]
    lines.append({**lines[0], "output_tokens": 1})  # a first token's time is no rate
    found = readme_plots.rates(lines)
    assert found["manylora"][1, 0] == pytest.approx([100, 100 / 1.1, 100 / 1.2])


def test_what_adapters_add() -> None:
    shares = readme_plots.overheads(
        {
            "manylora": {(8, 0): [100.0, 120.0, 90.0], (8, 8): [80.0]},
            "manylora, bf16 adapters": {(8, 8): [100.0]},
            "vllm-cpu float32": {(8, 8): [20.0]},
            "vllm-cpu float32 (lora off)": {(8, 0): [30.0]},
        }
    )
    assert shares == {"manylora": {(8, 8): pytest.approx(0.25)}, "manylora, bf16 adapters": {(8, 8): 0.0}}, (
        "nothing is shown of what has no base of its own"
    )


def test_the_last_run_that_has_what_is_needed(results: Path) -> None:
    both = [{"run": "1", "way": "a"}, {"run": "1", "way": "b"}, {"run": "2", "way": "a"}]
    write(results / "swaps.jsonl", both)  # type: ignore[arg-type]
    needs = [lambda ln: ln["way"] == "a", lambda ln: ln["way"] == "b"]
    assert {line["run"] for line in readme_plots.last_run("swaps", *needs)} == {"1"}
    assert {line["run"] for line in readme_plots.last_run("swaps", needs[0])} == {"2"}


def test_a_case_is_drawn_from_the_last_run_that_has_it(results: Path) -> None:
    later = [{**line, "run": "later"} for line in compare_lines() if line["rows"] == 8]
    later += [{**line, "run": "first", "output_tokens": 1} for line in compare_lines()]
    later += [{**line, "run": "ours"} for line in compare_lines() if line["system"] == "manylora"]
    write(results / "compare.jsonl", [*compare_lines(), *later])
    runs = {(line["rows"], line["adapters"]): line["run"] for line in readme_plots.compared()}
    assert len(runs) == 7
    assert {case for case, run in runs.items() if run == "later"} == {(8, 0), (8, 8)}


def test_a_file_without_a_run_is_named_and_the_others_drawn(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(results / "compare.jsonl", compare_lines())
    monkeypatch.setattr(sys, "argv", ["readme_plots.py", "--out", str(tmp_path / "pictures")])
    assert readme_plots.main() == 2
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {"throughput.png", "overhead.png"}
    errors = capsys.readouterr().err
    assert "bench/merged.py makes one" in errors
    assert "bench/swaps.py makes one" in errors


def test_equal_results_give_equal_bytes(results: Path) -> None:
    write(results / "compare.jsonl", compare_lines())
    drawn = []
    for name in ("a.png", "b.png"):
        readme_plots.overhead().savefig(results / name, metadata={"Software": None})
        drawn.append((results / name).read_bytes())
    assert drawn[0] == drawn[1]
