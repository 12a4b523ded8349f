"""This project and its peers on one workload, side by side: all are started once, and every case goes round them all.

    python -P bench/compare.py --workload build/workload \\
        --peer 'PYTHON bench/peers/vllm_cpu.py build/workload' \\
        --peer 'PYTHON bench/peers/vllm_cpu.py build/workload --no-lora' \\
        --peer 'PYTHON bench/peers/peft_nf4.py build/workload' \\
        --peer 'PYTHON bench/peers/llamacpp_q4.py MODEL.Q4_1.gguf'

``make peers`` installs them and prints these commands. A system is asked for a case seconds after the one before it,
so that all see the same drift of the machine; whoever is not asked is stopped (SIGSTOP) meanwhile, and takes no time
from who is. A case is run once for a few tokens first (adapters loaded, memory touched), then ``--rounds`` times by
each, in an order that changes. Compared are medians of the rounds' ratios. The cases are those of bench/workload.py,
and the first token of a prompt of 512 tokens. Appends JSON lines to bench/results/compare.jsonl.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from subprocess import PIPE
from typing import Any

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))
from results_file import ResultsFile
from workload import CASES, FIRST_TOKEN_CASES, Case

OURS = "manylora"
ALL_CASES = (*CASES, *FIRST_TOKEN_CASES)
Rounds = dict[int, dict[str, float]]
"""What a system measured of a case, by round."""


class System:
    """A process that answers as bench/peers/resident.py says, stopped while it is not asked."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self.command = shlex.join(command)
        with log.open("a") as errors:
            self._process = subprocess.Popen(
                command, stdin=PIPE, stdout=PIPE, stderr=errors, text=True, start_new_session=True
            )
        try:
            self.name = str(self._answer()["system"])
        except BaseException:
            self.end()
            raise
        self._stop()

    def measure(self, case: Case) -> dict[str, float]:
        """Raises RuntimeError if the process has ended."""
        self._signal(signal.SIGCONT)
        try:
            assert self._process.stdin is not None
            try:
                print(json.dumps(dataclasses.asdict(case)), file=self._process.stdin, flush=True)
            except BrokenPipeError:
                raise RuntimeError(f"{self.name} has ended") from None
            return self._answer()
        finally:
            self._stop()

    def end(self) -> None:
        self._signal(signal.SIGCONT)
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # what was written when it had ended already
            self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"it ended with exit code {self._process.wait()} instead of an answer")
        answer = json.loads(line)
        assert isinstance(answer, dict)
        return answer

    def _stop(self) -> None:
        self._signal(signal.SIGSTOP)

    def _signal(self, number: signal.Signals) -> None:
        """To the process and its children; nothing if they are gone."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, number)


def can(system: str, case: Case) -> bool:
    """Whether a system has what the case needs."""
    if system.startswith("llama.cpp"):
        return case.rows == 1 and not case.adapters
    if system.endswith("bf16 adapters"):
        return case.adapters > 0
    return not (case.adapters and "(lora off)" in system)


def warm_up(case: Case) -> Case:
    return dataclasses.replace(case, output_tokens=min(case.output_tokens, 4))


def table(results: Mapping[str, Mapping[Case, Rounds]], cases: Iterable[Case], key: str = "seconds") -> list[str]:
    """Tokens a second by system and case, medians of the rounds; in brackets ours as a multiple of the peer's: the
    median of the rounds' ratios, and their range. With one token out: milliseconds, and ours as a share of the peer's.
    """
    lines = []
    for case in cases:
        is_first = case.output_tokens == 1
        lines.append(
            f"{case}, {case.prompt_tokens} tokens in, {case.output_tokens} out"
            + (f", {key}" if key != "seconds" else "")
        )
        for system, cells in results.items():
            rounds = {number: values[key] for number, values in cells.get(case, {}).items() if key in values}
            if not rounds:
                continue
            # The first token is part of the prompt's time.
            tokens = case.tokens - (key == "decode_seconds") * case.rows
            own = statistics.median(rounds.values())
            text = f"{own * 1e3:10.0f} ms" if is_first else f"{tokens / own:10.1f} tokens/s"
            ours = {n: v[key] for n, v in results.get(OURS, {}).get(case, {}).items() if key in v}
            if system != OURS and (both := sorted(rounds.keys() & ours.keys())):
                ratios = [ours[n] / rounds[n] if is_first else rounds[n] / ours[n] for n in both]
                text += (
                    f"   {statistics.median(ratios):6.2f} ({min(ratios):.2f}-{max(ratios):.2f}, {len(ratios)} rounds)"
                )
            lines.append(f"  {system:36}{text}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", type=Path, required=True, help="folder with model/ and adapters/")
    parser.add_argument("--peer", action="append", default=[], metavar="COMMAND", help="one of bench/peers; repeatable")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--rounds-of", action="append", default=[], metavar="SYSTEM=N",
        help="fewer for a system, by the name it gives itself; repeatable, e.g. 'peft nf4=1', which takes minutes",
    )  # fmt: skip
    parser.add_argument(
        "--limit", type=float, default=240, metavar="S",
        help="a system that has taken this long over a case is not asked for it again (default 240)",
    )  # fmt: skip
    parser.add_argument(
        "--cases", nargs="+", metavar="ROWS/ADAPTERS", help="only these, e.g. 1/0 8/8 512/1 (first token)"
    )
    parser.add_argument("--note", default="", help="kept with the results: what was special about this run")
    options = parser.parse_args()
    by_name = {
        f"{case.prompt_tokens}/{case.adapters}" if case in FIRST_TOKEN_CASES else str(case): case for case in ALL_CASES
    }
    if unknown := set(options.cases or ()) - set(by_name):
        parser.error(f"--cases: {', '.join(sorted(unknown))}: not among {', '.join(by_name)}")
    cases = [by_name[name] for name in options.cases or by_name]

    fewer = {name: int(count) for name, _, count in (text.rpartition("=") for text in options.rounds_of)}

    log = Path(tempfile.gettempdir()) / f"bench-compare-{os.getpid()}.log"
    ours = [sys.executable, "-P", str(Path(__file__).parent / "peers" / "ours.py"), str(options.workload)]
    systems: list[System] = []
    results: dict[str, dict[Case, Rounds]] = defaultdict(lambda: defaultdict(dict))
    file = ResultsFile("compare", note=options.note)
    try:
        for command in (ours, *map(shlex.split, options.peer)):
            print(f"starting {shlex.join(command)} (what it prints: {log})", file=sys.stderr, flush=True)
            systems.append(System(command, log))
        if unknown := fewer.keys() - {system.name for system in systems}:
            raise RuntimeError(f"--rounds-of: no system calls itself {', '.join(sorted(unknown))}")
        with tqdm(total=len(cases) * (1 + options.rounds), unit="round", dynamic_ncols=True) as bar:
            for case in cases:
                able = [system for system in systems if can(system.name, case)]
                bar.set_description(f"{case}, {case.prompt_tokens} in: warm-up")
                for system in able:
                    system.measure(warm_up(case))
                bar.update()
                taken: dict[str, float] = defaultdict(float)
                for number in range(options.rounds):
                    turn = number % len(able)
                    for system in (*able[turn:], *able[:turn]):
                        if taken[system.name] > options.limit or number >= fewer.get(system.name, options.rounds):
                            continue
                        bar.set_description(f"{case}, {case.prompt_tokens} in: {system.name}")
                        measured = system.measure(case)
                        taken[system.name] += measured["seconds"]
                        results[system.name][case][number] = measured
                        file.keep({"system": system.name, "round": number, **dataclasses.asdict(case), **measured})
                    bar.update()
                bar.write("\n".join(table(results, [case])))
    except RuntimeError as error:
        sys.exit(f"{error}; its last words are in {log}")
    finally:
        for system in systems:
            system.end()
    print("\n".join(table(results, cases)))
    single = [case for case in cases if case.rows == 1 and case.output_tokens > 1]
    print("\n".join(table(results, single, "decode_seconds")))


if __name__ == "__main__":
    main()
