"""The decoder over the CUDA operations, in the interpreter (or on a GPU), against plain torch and against itself."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from manylora.kernels.cuda.ops import CudaOps
from manylora.server.engine.request import ScheduledRow
from manylora.server.model.families import ModelSpec
from manylora.server.model.synthetic import synthetic_spec
from tests.kernels.ordered_dot import ordered_dot  # noqa: F401 - a fixture
from tests.model.cuda_model import DEVICE, FP32_ROUNDINGS, Model, Reference, by_slot, last_token, request

SPECS = {
    "llama": synthetic_spec("tiny", num_hidden_layers=1),
    "biases": synthetic_spec("tiny", attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "qwen3": synthetic_spec(
        "tiny", architectures=["Qwen3ForCausalLM"], model_type="qwen3", head_dim=48, num_hidden_layers=1
    ),
    "smollm3": synthetic_spec(
        "tiny", architectures=["SmolLM3ForCausalLM"], model_type="smollm3", no_rope_layers=[1, 0]
    ),
    "gemma3": synthetic_spec(
        "tiny", architectures=["Gemma3ForCausalLM"], model_type="gemma3_text", hidden_act="gelu_pytorch_tanh",
        head_dim=32, query_pre_attn_scalar=32, final_logit_softcapping=2.0, sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "gpt2": ModelSpec.from_hf_config(
        {
            "architectures": ["GPT2LMHeadModel"], "vocab_size": 320, "n_embd": 128, "n_layer": 2, "n_head": 4,
            "n_positions": 256,
        }
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SPECS)
def test_matches_torch_over_prefill_and_decode(name: str) -> None:
    spec = SPECS[name]
    ours = Model(spec, CudaOps(DEVICE, torch.float32), "triton")
    reference = Model(spec, Reference(DEVICE, torch.float32, resident=True), "torch")
    requests = [request(0, 5, None), request(1, 19, 0), request(2, 3, 2, 0.5), request(3, 17, 2)]
    prefill = [ScheduledRow(r, 0, len(r.prompt_token_ids)) for r in requests[:3]] + [ScheduledRow(requests[3], 0, 9)]
    chunk = [ScheduledRow(requests[3], 9, 8)]
    for rows in (prefill, chunk):
        a, b = ours.logits(*rows), reference.logits(*rows)
        assert (a - b).abs().max() <= FP32_ROUNDINGS * b.abs().max()
    for r in requests:
        r.output_token_ids.append(7 + len(r.prompt_token_ids))
    a, b = (model.logits(*map(last_token, requests)) for model in (ours, reference))
    assert (a - b).abs().max() <= FP32_ROUNDINGS * b.abs().max()
    assert b.abs().max() > 0.5, "logits of nothing would agree too"


@pytest.mark.usefixtures("ordered_dot")
def test_a_row_alone_has_the_bits_it_has_in_a_batch() -> None:
    ours = Model(SPECS["llama"], CudaOps(DEVICE, torch.float32), "triton")
    requests = [request(0, 5, None), request(1, 3, 0), request(2, 3, 2, 0.5)]
    ours.logits(*(ScheduledRow(r, 0, r.num_tokens) for r in requests))
    for r in requests:
        r.output_token_ids.append(7)
    rows = by_slot(list(map(last_token, requests)))
    together = ours.logits(*rows)
    for i, row in enumerate(rows):  # the base row among them is computed by the kernel without adapters
        assert torch.equal(ours.logits(row)[0], together[i]), f"row {i}"
