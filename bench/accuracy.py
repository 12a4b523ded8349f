"""What each arithmetic of the CPU does to the next token's distribution, and what bf16 does to it.

    python -P bench/accuracy.py --model build/workload/model       # any base that `manylora serve` takes; 5 minutes
    python -P bench/accuracy.py --model build/workload/model --windows 1 --arithmetics int16 int8
    python -P bench/accuracy.py --model build/workload/model --adapter examples/adapters/pirate

Every position of a text has a distribution p by torch in fp32, from the same NF4 weights, and another, q, by what is
measured: fp32, int16 and int8 are the kernels' (``--cpu-arithmetic``), with keys and values as they then hold them;
``bf16`` is torch with weights, activations, keys and values in bfloat16, which is how a QLoRA base is computed most
often. With ``--adapter`` every token has it, as the server holds it beside each arithmetic (in bf16 beside ``bf16``,
in fp32 for the reference). Reported are

- the Kullback-Leibler divergence, sum p ln(p / q), in nats a token: its mean and its 99th percentile;
- at how many positions both have the same most likely token;
- the text's perplexity by q.

The text: of LICENSE, README.md, docs/architecture.md and docs/log.md, as they are in this checkout, the first 2048
tokens each, in windows of 512 that know nothing of one another: 8192 tokens. ``text`` in a result is a digest of them:
only results with the same one are comparable to the last digit. Appends a JSON line for each arithmetic to
bench/results/accuracy.jsonl. No times: other programs may run beside it.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))
from results_file import ResultsFile

from manylora.adapters.peft_loader import load_peft_adapter
from manylora.adapters.versions import AdapterRef
from manylora.kernels import cpu
from manylora.kernels.lora import BatchedLora
from manylora.kernels.lora_pool import LoraPool
from manylora.kernels.lora_weights import LoraWeights
from manylora.kernels.ops import Ops
from manylora.kernels.sites import RANK_PAGE
from manylora.kernels.torch_ops import TorchOps
from manylora.server.engine.batch import build_batch
from manylora.server.engine.request import AdapterUse, Request, SamplingParams, ScheduledRow, StepPlan
from manylora.server.model.decoder import Decoder
from manylora.server.model.decoder_weights import DecoderWeights
from manylora.server.model.exact_inputs import with_exact_inputs
from manylora.server.model.families import ModelSpec
from manylora.server.model.forward_batch import ForwardBatch
from manylora.server.model.kv_cache import KVCache
from manylora.server.model.loader import load_base
from manylora.server.model.tokenizer import Tokenizer
from manylora.server.model.weights import BaseWeights

WINDOW: Final = 512
"""Tokens that are computed at once, and see one another."""
TEXTS: Final = ("LICENSE", "README.md", "docs/architecture.md", "docs/log.md")
REFERENCE: Final = "reference"
ARITHMETICS: Final[dict[str, Callable[[], Ops]]] = {
    REFERENCE: lambda: TorchOps("cpu", torch.float32, resident=True),
    "bf16": lambda: TorchOps("cpu", torch.bfloat16, resident=True),
    "fp32": lambda: cpu.in_use().make_ops("fp32"),
    "int16": lambda: cpu.in_use().make_ops("int16"),
    "int8": lambda: cpu.in_use().make_ops("int8"),
}
HELD: Final[dict[str, torch.dtype]] = {
    REFERENCE: torch.float32,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "int16": torch.int16,
    "int8": torch.int8,
}
"""What an adapter is held in beside each."""
_ROWS: Final = 64
"""Positions whose distributions are compared at once: in fp64, some 25 MB each for a vocabulary of 50,000."""


class Model:
    """A base computed by some operations. Takes the weights over, as ``DecoderWeights.prepare`` does.

    ``window``: tokens at most that are computed at once. ``adapter``: what all of them are computed with, held in
    ``held``.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: BaseWeights,
        ops: Ops,
        window: int,
        adapter: LoraWeights | None = None,
        held: torch.dtype = torch.float32,
    ) -> None:
        lora = None
        self._uses: tuple[AdapterUse, ...] = ()
        if adapter is not None:
            rank = adapter.max_rank
            pool = LoraPool(
                spec.lora_shapes(), max_slots=1, max_pages=-(-rank // RANK_PAGE), max_rank=rank, dtype=ops.dtype,
                page_dtype=held,
            )  # fmt: skip
            pool.write(0, adapter)
            lora, self._uses = BatchedLora(pool, "auto" if ops.name == "numba" else "torch"), (_ADAPTER,)
        prepared = DecoderWeights.prepare(spec, weights, ops, max_context=window)
        self._decoder = Decoder(spec, with_exact_inputs(spec, prepared, ops), ops, lora)
        self._cache = KVCache(spec, KVCache.pages_for(window), ops)

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """The last layer's output for a text of its own, ``[tokens, hidden]``. ``ids``: int64 ``[tokens]``."""
        return self._decoder.hidden(self._batch(ids), self._cache)

    def logits(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """fp32 ``[tokens, vocab]``, of what ``hidden`` gave for ``ids``."""
        return self._decoder.logits(hidden, self._batch(ids), None).float()

    def _batch(self, ids: torch.Tensor) -> ForwardBatch:
        return batch_of(ids, self._uses)


_ADAPTER: Final = AdapterUse(AdapterRef("adapter", "measured"))


def batch_of(ids: torch.Tensor, uses: tuple[AdapterUse, ...] = ()) -> ForwardBatch:
    """A text of its own, as the server computes a prompt, with the adapters of the first slots."""
    request = Request("accuracy", ids.tolist(), SamplingParams())
    request.adapters, request.slots = uses, tuple(range(len(uses)))
    request.pages = list(range(KVCache.pages_for(len(ids))))
    return build_batch(StepPlan((ScheduledRow(request, 0, len(ids)),)))


class Comparison:
    """Gathers, window by window, how far one model's distributions are from the reference's."""

    def __init__(self) -> None:
        self._divergence: list[torch.Tensor] = []
        self._surprise: list[torch.Tensor] = []
        self._same = 0

    def add(self, reference: torch.Tensor, logits: torch.Tensor, ids: torch.Tensor) -> None:
        """A window: both ``[tokens, vocab]``, ``ids`` int64 ``[tokens]``. The last token has nothing after it that the
        perplexity could take."""
        for first in range(0, len(ids), _ROWS):
            rows = slice(first, first + _ROWS)
            log_p, log_q = (one[rows].double().log_softmax(-1) for one in (reference, logits))
            self._divergence.append((log_p.exp() * (log_p - log_q)).sum(-1))
            self._same += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
            after = ids[first + 1 : first + 1 + _ROWS]
            self._surprise.append(-log_q[: len(after)].gather(1, after[:, None])[:, 0])

    def result(self) -> dict[str, Any]:
        divergence, surprise = torch.cat(self._divergence), torch.cat(self._surprise)
        return {
            "tokens": len(divergence),
            "kl_mean": rounded(float(divergence.mean())),
            "kl_p99": rounded(float(divergence.quantile(0.99))),
            "same_top": round(self._same / len(divergence), 5),
            "perplexity": round(math.exp(float(surprise.mean())), 4),
        }


def rounded(value: float) -> float:
    """To three digits."""
    return float(f"{value:.3g}")


def windows_of(tokenizer: Tokenizer, texts: Sequence[str], each: int) -> list[torch.Tensor]:
    """The first ``each`` windows of every text, int64 ``[WINDOW]``. Raises ValueError if one has fewer."""
    found: list[torch.Tensor] = []
    for text in texts:
        ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False))
        if len(ids) < each * WINDOW:
            raise ValueError(f"a text has {len(ids)} tokens: {each} windows of {WINDOW} take {each * WINDOW}")
        found += ids[: each * WINDOW].split(WINDOW)
    return found


def digest(windows: Sequence[torch.Tensor]) -> str:
    return hashlib.sha256(torch.cat(list(windows)).numpy().tobytes()).hexdigest()[:16]


def measured(
    spec: ModelSpec,
    weights: Callable[[], BaseWeights],
    windows: Sequence[torch.Tensor],
    names: Sequence[str],
    progress: Callable[[], object] = lambda: None,
    adapter: LoraWeights | None = None,
) -> Iterator[dict[str, Any]]:
    """A result for each arithmetic named. ``weights`` gives the base anew each time, as each model takes it over: two
    are in memory at once. ``progress`` is called after each window."""
    longest = max(map(len, windows))
    with torch.inference_mode():

        def model_in(name: str) -> Model:
            return Model(spec, weights(), ARITHMETICS[name](), longest, adapter, HELD[name])

        reference = model_in(REFERENCE)
        expected = []
        for ids in windows:  # not the logits: they would be 0.8 GB
            expected.append(reference.hidden(ids))
            progress()
        for name in names:
            model = reference if name == REFERENCE else model_in(name)
            comparison = Comparison()
            for ids, hidden in zip(windows, expected, strict=True):
                logits = model.logits(model.hidden(ids), ids)
                comparison.add(reference.logits(hidden, ids), logits, ids)
                progress()
            yield {"arithmetic": name, **comparison.result()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a base, as `manylora serve` takes it")
    parser.add_argument("--windows", type=int, default=4, help="of each of the four texts (default 4)")
    parser.add_argument("--arithmetics", nargs="+", default=list(ARITHMETICS), choices=list(ARITHMETICS))
    parser.add_argument("--adapter", type=Path, help="a PEFT adapter that every token is computed with")
    parser.add_argument("--note", default="", help="kept with the results")
    options = parser.parse_args()
    base = load_base(options.model)
    adapter = None if options.adapter is None else load_peft_adapter(options.adapter, base.spec.lora_shapes())
    root = Path(__file__).parents[1]
    windows = windows_of(base.tokenizer, [(root / text).read_text() for text in TEXTS], options.windows)
    results = ResultsFile(
        "accuracy", note=options.note, model=base.name, base=base.digest[:16], window=WINDOW, text=digest(windows),
        **({} if adapter is None else {"adapter": options.adapter.name, "version": adapter.version[:16]}),
    )  # fmt: skip
    spec = base.spec
    del base

    def weights() -> BaseWeights:
        return load_base(options.model, progress=False).weights

    with tqdm(total=len(windows) * (1 + len(options.arithmetics)), unit="window", dynamic_ncols=True) as bar:
        weights_of_adapter = None if adapter is None else adapter.lora
        for result in measured(spec, weights, windows, options.arithmetics, bar.update, weights_of_adapter):
            results.keep(result)
            bar.write(
                f"{result['arithmetic']:10} KL {result['kl_mean']:.1e} nats a token (99th percentile "
                f"{result['kl_p99']:.1e}), the same most likely token at {result['same_top']:.2%}, perplexity "
                f"{result['perplexity']:.2f}"
            )


if __name__ == "__main__":
    main()
