"""What speculation by prompt look-up gains and costs: tokens per second with it, against the same requests without.

    python -P bench/speculation.py                       # the demo base and adapters, 1 and 8 rows; about 4 minutes
    python -P bench/speculation.py --rows 1 --cases copy "story, t=1" --pairs 9

Cases are texts that repeat their prompt (copied, code that is edited, records taken out of it, summaries) and texts
that do not (stories, greedy and sampled). With and without take turns (without, with, with, without, ...) in one
process; the ratio of each pair is what is reported, of the whole (prompts included) and of the time between each row's
first and last token. Every answer must be the same with drafts as without, or the run
fails. First, the time of a step of one row with so many drafts: what a draft costs that is not accepted. Appends JSON
lines to bench/results/speculation.jsonl.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import logging
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).parent))
from results_file import ResultsFile

from manylora.server.cli import demo_base
from manylora.server.config import EngineConfig, ServeConfig
from manylora.server.engine.ngram_drafter import NgramDrafter
from manylora.server.engine.request import AdapterUse, Request, SamplingParams, ScheduledRow, StepPlan
from manylora.server.http_server import new_loop
from manylora.server.model.kv_cache import KVCache
from manylora.server.serving import Running, build, load_adapters

ADAPTERS: Final = Path(__file__).parents[1] / "examples" / "adapters"
OUTPUT: Final = 96
"""Tokens at most."""
STEP_TOKENS: Final = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32)
TEXTS: Final = (
    "The harbour of Brindle was built in 1762 by the merchant Anna Keller. It had three piers of granite, and a "
    "lighthouse at the end of the longest one. In the storm of 1804 the second pier fell, and it was never rebuilt. "
    "Today the harbour is used by fishing boats, and by the ferry to the island of Morra.",
    "Honey bees tell each other where flowers are by a dance. A bee that has found some runs in the figure of an eight "
    "on the comb. The direction of the middle run shows the direction of the flowers, and its length shows how far "
    "away they are. Karl von Frisch described this dance in 1923, and was given the Nobel Prize for it in 1973.",
    "The city council met on Tuesday to talk about the new bridge over the river Lenn. Engineers said that the old "
    "bridge, which was built in 1931, can carry cars for eight more years. The new bridge will cost 42 million euros. "
    "Work is to begin in March, and the bridge is to be opened two years later.",
    "Glass is made of sand, soda and lime. They are melted at 1500 degrees, and the melt is poured onto a bath of "
    "liquid tin, on which it floats and becomes flat. Alastair Pilkington invented this process in 1952. Before that, "
    "glass for windows had to be ground and polished on both sides, which was slow and expensive.",
)
CODE: Final = (
    "def total_price(items, rate):\n    total = 0\n    for item in items:\n        if item.price < 0:\n"
    '            raise ValueError("a price is negative")\n        total += item.price * item.count\n'
    "    return total * (1 + rate)\n",
    "def read_scores(path):\n    scores = {}\n    with open(path) as file:\n        for line in file:\n"
    '            name, score = line.split(",")\n            scores[name] = int(score)\n    return scores\n',
    "def longest_word(text):\n    longest = ''\n    for word in text.split():\n        if len(word) > len(longest):\n"
    "            longest = word\n    return longest\n",
    "def count_days(first, last):\n    if last < first:\n        raise ValueError('last is before first')\n"
    "    days = 0\n    while first < last:\n        first = next_day(first)\n        days += 1\n    return days\n",
)
RECORDS: Final = (
    "John Smith is 42 years old and works as a plumber in Chicago.",
    "Maria Fernandez is 29 years old and works as a translator in Valencia.",
    "Real Madrid beat Barcelona 3-1.",
    "Emma bought 3 umbrellas for $45.",
)
TOPICS: Final = ("a lost key", "two rivers", "a clock that stopped", "the last train")


@dataclass(frozen=True)
class Case:
    ask: str
    about: Sequence[str]
    temperature: float = 0.0
    adapter: str | None = None


CASES: Final = {
    "copy": Case("Repeat the following text word for word.\n\n{}", TEXTS),
    "edit code": Case("Rewrite this function with a docstring, and change nothing else.\n\n```python\n{}```", CODE),
    "records": Case("{}", RECORDS, adapter="json"),
    "summary": Case("Summarise the following text in two sentences.\n\n{}", TEXTS),
    "story": Case("Write a short story about {}.", TOPICS),
    "copy, t=1": Case("Repeat the following text word for word.\n\n{}", TEXTS, 1.0),
    "story, t=1": Case("Write a short story about {}.", TOPICS, 1.0),
}


class Bench:
    def __init__(self, running: Running, drafts: int) -> None:
        self._running, self._drafts = running, drafts
        self._serial = itertools.count()

    def _request(self, case: Case, row: int, *, speculates: bool) -> Request:
        text = case.about[row % len(case.about)]
        if row >= len(case.about):  # two of them, so that no two rows are alike
            text += "\n" + case.about[(row + 1) % len(case.about)]
        serving = self._running.serving
        chat = serving.tokenizer.render_chat_template([{"role": "user", "content": case.ask.format(text)}])
        adapters = () if case.adapter is None else (AdapterUse(serving.registry.acquire(case.adapter)),)
        return Request(
            f"speculation-{next(self._serial)}",
            serving.tokenizer.encode(chat, add_special_tokens=False),
            SamplingParams(max_tokens=OUTPUT, temperature=case.temperature, seed=row),
            adapters,
            drafter=NgramDrafter(self._drafts) if speculates else None,
        )

    async def run(self, case: Case, rows: int, *, speculates: bool) -> tuple[float, float, list[tuple[int, ...]]]:
        """Seconds of all rows at once, their prompts included; from first to last token, added up; and the tokens."""
        requests = [self._request(case, row, speculates=speculates) for row in range(rows)]
        began = time.perf_counter()
        streams = [self._running.engine.submit(request) for request in requests]
        ended = [await stream.result() for stream in streams]
        took = time.perf_counter() - began
        times = [finish.times for _, finish in ended if finish.times is not None]
        decoding = sum(one.ended - one.first_token for one in times if one.first_token is not None)
        return took, decoding, [tokens.token_ids for tokens, _ in ended]

    def counts(self) -> tuple[int, int]:
        """Tokens drafted and accepted until now."""
        found = {}
        for line in self._running.serving.metrics.render().decode().splitlines():
            if line.startswith("vllm:spec_decode_num_"):
                name, value = line.rsplit(" ", 1)
                found[name.partition("{")[0].removesuffix("_total")] = int(float(value))
        return found["vllm:spec_decode_num_draft_tokens"], found["vllm:spec_decode_num_accepted_tokens"]

    async def case(self, name: str, rows: int, pairs: int) -> dict[str, Any]:
        case = CASES[name]
        without: list[float] = []
        ratios: list[float] = []
        decoding_ratios: list[float] = []
        _, _, expected = await self.run(case, rows, speculates=False)
        before = self.counts()
        for pair in range(pairs):
            took, decoding = {}, {}
            for speculates in (False, True) if pair % 2 == 0 else (True, False):
                took[speculates], decoding[speculates], tokens = await self.run(case, rows, speculates=speculates)
                if tokens != expected:
                    raise RuntimeError(f"{name}: other tokens {'with' if speculates else 'without'} drafts")
            without.append(took[False])
            ratios.append(took[False] / took[True])
            decoding_ratios.append(decoding[False] / decoding[True])
        drafted, accepted = (after - was for after, was in zip(self.counts(), before, strict=True))
        n_tokens = sum(map(len, expected))
        return {
            "case": name,
            "rows": rows,
            "drafts": self._drafts,
            "tokens": n_tokens,
            "tokens_per_s_without": round(n_tokens / statistics.median(without), 1),
            "ratio": round(statistics.median(ratios), 3),
            "ratios": [round(ratio, 3) for ratio in ratios],
            "decoding_ratio": round(statistics.median(decoding_ratios), 3),
            "decoding_ratios": [round(ratio, 3) for ratio in decoding_ratios],
            "drafted_per_token": round(drafted / pairs / n_tokens, 3),
            "accepted": round(accepted / drafted, 3) if drafted else None,
        }


def step_ms(running: Running, context: int = 200, rounds: int = 15) -> dict[int, float]:
    """Milliseconds of a step of one base row, by its tokens: one, and drafts of which none is accepted. The tokens of a
    step take turns, so that all of them see the same machine."""
    request = Request("step", [1000 + i for i in range(context)], SamplingParams(temperature=0.0))
    request.pages = list(range(KVCache.pages_for(context + max(STEP_TOKENS))))
    running.runner.execute(StepPlan((ScheduledRow(request, 0, context),)))
    times: dict[int, list[float]] = {tokens: [] for tokens in STEP_TOKENS}
    for _ in range(rounds):
        for tokens in STEP_TOKENS:
            row = ScheduledRow(request, context - 1, tokens, (5,) * (tokens - 1))
            began = time.perf_counter()
            running.runner.execute(StepPlan((row,)))
            times[tokens].append(time.perf_counter() - began)
    return {tokens: round(1e3 * statistics.median(seconds), 2) for tokens, seconds in times.items()}


async def measure(options: argparse.Namespace, running: Running, results: ResultsFile) -> None:
    steps = step_ms(running)
    results.keep({"case": "step of one row", "step_ms": steps})
    print("ms of a step by its tokens:", json.dumps(steps), flush=True)
    running.engine.start()
    bench = Bench(running, options.drafts)
    try:
        await bench.run(CASES["story"], max(options.rows), speculates=True)  # to warm up
        for rows, name in itertools.product(options.rows, options.cases):
            one = await bench.case(name, rows, options.pairs if rows == 1 else max(options.pairs - 2, 1))
            results.keep(one)
            spread = f"{min(one['ratios']):.2f}-{max(one['ratios']):.2f}"
            accepted = "-" if one["accepted"] is None else f"{one['accepted']:.0%}"
            print(
                f"{name:12}{rows:3} rows {one['tokens']:5} tokens {one['tokens_per_s_without']:7.1f} tokens/s without; "
                f"with: x {one['ratio']:.2f} ({spread}), decoding alone x {one['decoding_ratio']:.2f}; "
                f"{one['drafted_per_token']:.2f} drafted a token, "
                f"{accepted} accepted",
                flush=True,
            )
    finally:
        await running.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--pairs", type=int, default=5, help="of one row; two less of several (default 5)")
    parser.add_argument("--drafts", type=int, default=4, help="num_speculative_tokens (default 4)")
    parser.add_argument("--note", default="", help="kept with the results")
    options = parser.parse_args()
    model = demo_base()
    if model is None:
        parser.error("the demo base is not installed")
    logging.basicConfig(level=logging.WARNING)
    config = ServeConfig(
        model=model, adapter_dir=ADAPTERS, engine=EngineConfig(max_rows=32, max_context=1024, prefix_cache=False)
    )
    running = build(config, progress=False)
    load_adapters(running, config)
    results = ResultsFile("speculation", note=options.note, model=Path(model).name)
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(measure(options, running, results))


if __name__ == "__main__":
    main()
