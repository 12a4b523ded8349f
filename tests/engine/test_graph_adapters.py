"""Which adapters a captured step can compute in full, and that the others are computed without."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from manylora.kernels.cuda.ops import CudaLinear
from manylora.kernels.lora_segments import LoraSegments
from manylora.kernels.lora_weights import LoraVectors, LoraWeights, TableRows
from manylora.kernels.sites import LAYER_PROJECTIONS
from manylora.server.engine.batch import adapter_segments
from manylora.server.model.synthetic import synthetic_adapter
from tests.engine.test_decode_graphs import SPEC, Runner, prompt
from tests.kernels.ordered_dot import ordered_dot  # noqa: F401 - a fixture
from tests.model.cuda_model import DEVICE, FP32_ROUNDINGS, Model, Reference, by_slot, last_token, request

SHAPES = SPEC.lora_shapes()


def vectors(*projections: str, seed: int = 1) -> LoraWeights:
    """A gain and a bias on the projections, and pages on some others."""
    random = torch.Generator().manual_seed(seed)
    of_projection = {
        (p, layer): LoraVectors(
            1 + 0.2 * torch.randn(SHAPES.out_features[p], generator=random),
            0.1 * torch.randn(SHAPES.out_features[p], generator=random),
        )
        for p in projections
        for layer in range(SHAPES.layers_of(p))
    }
    return LoraWeights(synthetic_adapter(SHAPES, 5, seed=seed, projections=("q", "up")).pairs, of_projection)


def tables(*names: str) -> LoraWeights:
    random = torch.Generator().manual_seed(2)
    rows = torch.randn(40, SPEC.hidden_size, generator=random) * SPEC.hidden_size**-0.5
    return LoraWeights({}, {}, {name: TableRows(torch.arange(0, 320, 8), rows) for name in names})


@pytest.fixture
def runner() -> Runner:
    return Runner()


def check_against_torch(runner: Runner, weights: LoraWeights, *, in_graph: bool) -> None:
    """A prompt and two decode steps of a base row, a row of ``weights`` and one of another adapter; and whether the
    decode steps were run in static memory."""
    reference = Model(SPEC, Reference(DEVICE, torch.float32, resident=True), "torch")
    for model in (runner.model, reference):
        model.pool.table_bytes = model.pool._free_table_bytes = 10**6
        model.pool.write(1, weights)
    requests = [request(0, 5, None), request(1, 9, 1), request(2, 3, 0)]
    requests[1].prompt_token_ids[:3] = [8, 9, 16]
    a, b = (model.logits(*map(prompt, requests)) for model in (runner.model, reference))
    assert (a - b).abs().max() <= FP32_ROUNDINGS * b.abs().max()
    without = request(1, 9, None)
    without.prompt_token_ids = requests[1].prompt_token_ids
    assert (reference.logits(prompt(without))[0] - b[2]).abs().max() > 0.01, "the adapter changes nothing"
    reference.logits(*map(prompt, requests))
    for token in (16, 3):
        for one in requests:
            one.output_token_ids.append(token)
        rows = list(by_slot(list(map(last_token, requests))))
        b = reference.logits(*rows)
        assert runner.graphs.takes(rows, adapter_segments(rows, DEVICE)) == in_graph
        a = runner.decode_logits(*requests) if in_graph else runner.model.logits(*rows)
        assert (a - b).abs().max() <= FP32_ROUNDINGS * b.abs().max()


def test_gains_and_biases_of_the_layers_are_computed_in_static_memory(runner: Runner) -> None:
    check_against_torch(runner, vectors(*LAYER_PROJECTIONS), in_graph=True)


@pytest.mark.parametrize(
    "weights",
    [vectors("lm_head", "down"), vectors("embed", "q"), tables("embed"), tables("lm_head"), tables("embed", "lm_head")],
    ids=["gain of lm_head", "gain of embed", "rows of embed", "rows of lm_head", "both tables"],
)
def test_the_tables_are_computed_without(runner: Runner, weights: LoraWeights) -> None:
    check_against_torch(runner, weights, in_graph=False)


@pytest.mark.usefixtures("ordered_dot")
def test_rows_beside_vectors_keep_their_bits(runner: Runner) -> None:
    requests = [request(0, 5, None), request(1, 4, 0), request(2, 3, 1)]
    runner.model.pool.write(1, vectors(*LAYER_PROJECTIONS))
    runner.step(*map(prompt, requests))
    together = runner.decode_logits(*requests)
    for i, r in enumerate(requests):
        assert torch.equal(runner.decode_logits(r)[0], together[i]), r.request_id


def test_gains_at_a_weight_that_the_fused_kernel_cannot_hold(runner: Runner) -> None:
    """Its product is another's, and a captured step has no place for what comes between: neither captured nor
    silently left out."""
    ops, layer = runner.model.decoder.ops, runner.model.decoder._layers[0]
    weight = layer.o._weight
    assert isinstance(weight, CudaLinear)
    assert weight.words is not None
    plain = ops._torch.prepare_dense(weight.words.dequantize(), None)  # type: ignore[attr-defined]
    layer.o._weight = CudaLinear(None, plain, None)
    runner.model.pool.write(1, vectors("o"))
    requests = [request(0, 5, None), request(1, 9, 1)]
    runner.model.logits(*map(prompt, requests))
    for one in requests:
        one.output_token_ids.append(3)
    rows = by_slot(list(map(last_token, requests)))
    segments = LoraSegments.from_pairs([(1, 1, 1.0)])
    assert runner.graphs.takes(rows, segments), "nothing was captured yet, so nobody knows"
    with pytest.raises(RuntimeError, match="gains and biases at `o` cannot be computed in a step of static memory"):
        runner.decode_logits(*requests)
    assert not runner.graphs.takes(rows, segments)
    assert runner.graphs.takes(rows, LoraSegments.from_pairs([(1, 2, 1.0)]))
    assert torch.isfinite(runner.model.logits(*rows)).all()
