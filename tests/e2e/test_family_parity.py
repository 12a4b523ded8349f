"""Each family against transformers, and against PEFT with adapters of the family's own names: logits and greedy runs.

Models, adapters and both sides are made in ``family_models.py``: both compute with the very same weights, so they
differ by rounding alone.

**The bound.** transformers (with PEFT) in fp64 is the truth, and how far its own fp32 is from that (``own``, measured
here over the same logits) is what fp32 costs on this model with this adapter. Our sums are one chain each where torch
keeps some 32 partial sums, so a sum of n terms rounds n times in a row instead of n / 32: errors of random sign grow
with the root of that, 5.7 times at most. Doubled, for the maximum over thousands of logits of two independent samples:
12 times ``own``. exp, tanh and GELU are good to 2 units in the last place, as torch's are, so they are in ``own``.

That the bound is far below what a mistake would make is seen twice: each adapter changes the logits by thirty times
the bound, and so does each feature of the family when its config key is taken away.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from manylora.server.config import CpuKernels
from manylora.server.model.families import ARCHITECTURES
from tests.e2e.family_models import (
    CASES,
    GREEDY,
    PROMPT,
    Case,
    Served,
    adapted,
    greedy,
    prompt_of,
    release,
    request_for,
    serve,
)

CHAIN_FACTOR = 12
KERNELS: tuple[CpuKernels, ...] = ("auto", "torch")


@pytest.fixture(scope="module", params=[(name, kernels) for name in CASES for kernels in KERNELS], ids="-".join)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    name, kernels = request.param
    yield serve(CASES[name], tmp_path_factory.mktemp(name), kernels)
    gc.collect()


def test_every_row_of_a_mixed_greedy_run_equals_peft(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    """Prompt and 24 greedy tokens, all adapters and the base in each step: every logit, and every token."""
    rows = [request_for(served, name, number, number) for number, name in enumerate(served.names)]
    ours = greedy(served, rows)
    worst = []
    for name, row in zip(served.names, rows, strict=True):
        tokens = torch.tensor([[*row.prompt_token_ids, *row.output_token_ids[:-1]]])
        model = adapted(served, name)
        with torch.inference_mode():
            single = model(tokens).logits[0, PROMPT - 1 :].double()
            truth = model.double()(tokens).logits[0, PROMPT - 1 :]
        own = float((single - truth).abs().max())
        error = float((ours[row.request_id].double() - truth).abs().max())
        worst.append((error / own, name or "base", error, own))
        # The truth was computed on our tokens: they are its own greedy ones if each is its best.
        assert truth.argmax(-1).tolist() == row.output_token_ids, name
    release(served, rows)
    worst.sort(reverse=True)
    with capsys.disabled():
        print("\n" + "  ".join(f"{name} {ratio:.1f}" for ratio, name, *_ in worst[:4]), f"own {worst[0][3]:.1e}")
    assert worst[0][0] <= CHAIN_FACTOR, worst[:5]


def test_alone_mixed_and_in_chunks_the_bits_are_the_same(served: Served) -> None:
    """With the CPU kernels; torch's own products promise no such thing."""
    if served.running.decoder.ops.name != "numba":
        pytest.skip("torch's products depend on the number of rows")
    rows = [request_for(served, name, number, number) for number, name in enumerate(served.names)]
    mixed = greedy(served, rows)
    release(served, rows)
    for number, (name, row) in enumerate(zip(served.names, rows, strict=True)):
        alone = [request_for(served, name, number, number)]
        assert torch.equal(greedy(served, alone, chunk=7 + number % 5)[row.request_id], mixed[row.request_id]), name
        release(served, alone)


def test_every_adapter_changes_the_answer(served: Served) -> None:
    """The comparison would be empty if both sides lost a delta."""
    rows = [request_for(served, name, 0, number) for number, name in enumerate(served.names)]
    logits = greedy(served, rows)
    for name, row in zip(served.names[1:], rows[1:], strict=True):
        assert float((logits[row.request_id][0] - logits["row-0"][0]).abs().max()) > 1e-2, name
    release(served, rows)


@pytest.mark.parametrize(
    ("name", "feature"), [(name, feature) for name, case in CASES.items() for feature in case.without], ids=str
)
def test_every_feature_of_the_family_matters(name: str, feature: str, tmp_path: Path) -> None:
    """Without it the logits are others, by far more than the bound: the comparison above sees it."""
    case = CASES[name]
    plain = Case(case.model_type, case.options, case.modules, {}, {}, case.norm_mean, case.sizes)

    def without(path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        changed = {**config, **case.without[feature]}
        # A key that becomes None is as good as absent, but not to every config class.
        kept = {key: value for key, value in changed.items() if value is not None or key in config}
        (path / "config.json").write_text(json.dumps(kept))

    whole, less = serve(plain, tmp_path / "whole", "auto"), serve(plain, tmp_path / "less", "auto", config=without)
    with_it, without_it = (greedy(side, [request_for(side, None, 0, 0)])["row-0"][0] for side in (whole, less))
    assert float((with_it - without_it).abs().max()) > 1e-2


def test_all_architectures_are_compared_somewhere() -> None:
    """A family that is added without a case here has nothing that proves it."""
    elsewhere = {"llama", "mistral", "qwen2", "qwen3"}  # test_every_kind.py, test_parity.py, tests/model/
    assert set(ARCHITECTURES.values()) == elsewhere | {case.model_type for case in CASES.values()}


def test_prompts_reach_beyond_every_window() -> None:
    assert len(prompt_of(0, 320)) == PROMPT > 3 * 8
    assert PROMPT + GREEDY <= 64  # the four pages of a row
