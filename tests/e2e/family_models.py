"""Tiny random models of the families that are not Llama's shape, adapters made for them by PEFT, and both sides of a
comparison: ours, served from files, and transformers with PEFT over the very weights that are served.

Everything that a family has is on, and large enough to matter: weights are drawn wide, so that attention is far from
uniform and caps bite; norms are random; prompts are longer than every window. ``CASES`` names modules by hand, not by
the server's own tables.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from manylora.server.config import CpuKernels, EngineConfig, ServeConfig
from manylora.server.engine.request import AdapterUse, Request, SamplingParams, ScheduledRow, StepPlan
from manylora.server.model.loader import LoadedBase, load_base
from manylora.server.serving import Running, build
from tests.checkpoints import SIZES, save_tokenizer

PROMPT = 29
GREEDY = 24
LAYERS = 4
"""So that every other layer, and every third, is another one."""

ROPE = {"rope_type": "default", "rope_theta": 100.0}
"""So fast that all pairs of a head turn within a short prompt."""

SEPARATE: dict[tuple[str, ...], str] = {
    ("q",): "model.layers.{}.self_attn.q_proj",
    ("k",): "model.layers.{}.self_attn.k_proj",
    ("v",): "model.layers.{}.self_attn.v_proj",
    ("o",): "model.layers.{}.self_attn.o_proj",
    ("gate",): "model.layers.{}.mlp.gate_proj",
    ("up",): "model.layers.{}.mlp.up_proj",
    ("down",): "model.layers.{}.mlp.down_proj",
}
PHI3: dict[tuple[str, ...], str] = {
    ("q", "k", "v"): "model.layers.{}.self_attn.qkv_proj",
    ("o",): "model.layers.{}.self_attn.o_proj",
    ("gate", "up"): "model.layers.{}.mlp.gate_up_proj",
    ("down",): "model.layers.{}.mlp.down_proj",
}
GPT2: dict[tuple[str, ...], str] = {
    ("q", "k", "v"): "transformer.h.{}.attn.c_attn",
    ("o",): "transformer.h.{}.attn.c_proj",
    ("up",): "transformer.h.{}.mlp.c_fc",
    ("down",): "transformer.h.{}.mlp.c_proj",
}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def lora(targets: Sequence[str] | str, **options: Any) -> peft.LoraConfig:
    modules = targets if isinstance(targets, str) else list(targets)
    return peft.LoraConfig(task_type="CAUSAL_LM", target_modules=modules, **{"r": 8, "lora_alpha": 16, **options})


def _usual(modules: Sequence[str], attention: str, mlp: str, embedding: str) -> dict[str, Any]:
    """Adapters of many kinds, with a family's own names."""
    return {
        "all": lora(modules),
        "rank-1": lora([attention], r=1),
        "rank-33": lora([mlp], r=33, use_rslora=True),
        "patterns": lora(modules, rank_pattern={attention: 3}, alpha_pattern={mlp: 5}),
        "some-layers": lora(modules, layers_to_transform=[1, 3]),
        "dora": lora(modules, use_dora=True),
        "head": lora([attention, "lm_head"]),
        "embedding": lora([attention, embedding]),
        "dora-embedding": lora([attention, embedding], use_dora=True),
        "tokens": lora([attention], trainable_token_indices=[3, 7, 100]),
        "saved-head": lora([mlp], modules_to_save=["lm_head"]),
        "vera": peft.VeraConfig(task_type="CAUSAL_LM", r=16, target_modules=[attention, mlp], save_projection=True),
        "adalora": peft.AdaLoraConfig(
            task_type="CAUSAL_LM", init_r=8, target_r=8, lora_alpha=16, target_modules=[attention, mlp], total_step=10
        ),
    }


GPT2_SIZES = {
    "vocab_size": 320, "n_embd": 64, "n_layer": LAYERS, "n_head": 4, "n_positions": 256, "bos_token_id": 257,
    "eos_token_id": 258,
}  # fmt: skip
SAVED_EMBEDDING = lora(["q_proj"], modules_to_save=["embed_tokens"])


@dataclass(frozen=True)
class Case:
    """One family. ``options`` are of its config class; ``modules``: projections -> path of the module that holds them,
    one behind the other; ``norm_mean``: about what its norms' weights are drawn. ``without``: config changes that each
    take a feature away, so that the model is another one."""

    model_type: str
    options: Mapping[str, Any]
    modules: Mapping[tuple[str, ...], str]
    adapters: Mapping[str, Any]
    without: Mapping[str, Mapping[str, Any]]
    norm_mean: float = 1.0
    sizes: Mapping[str, Any] = field(default_factory=lambda: SIZES | {"num_hidden_layers": LAYERS})


CASES: dict[str, Case] = {
    "smollm3": Case(
        "smollm3",
        {"no_rope_layer_interval": 2, "pad_token_id": 0, "rope_parameters": ROPE},
        SEPARATE,
        _usual(ALL, "q_proj", "up_proj", "embed_tokens"),
        {"all layers rotated": {"no_rope_layers": [1] * LAYERS}, "theta": {"rope_parameters": None}},
    ),
    "smollm3-windows": Case(
        "smollm3",
        {
            "no_rope_layers": [1, 0, 0, 1], "use_sliding_window": True, "sliding_window": 8, "attention_bias": True,
            "mlp_bias": True, "pad_token_id": 0, "tie_word_embeddings": False,
        },
        SEPARATE,
        {"all": lora(ALL), "bias-all": lora(["q_proj", "up_proj"], bias="all")},
        {"no windows": {"use_sliding_window": False, "layer_types": None}},
    ),
    "phi3": Case(
        "phi3",
        {"sliding_window": 8, "pad_token_id": 0, "original_max_position_embeddings": 256, "rope_parameters": ROPE},
        PHI3,
        _usual(["qkv_proj", "o_proj", "gate_up_proj", "down_proj"], "qkv_proj", "gate_up_proj", "embed_tokens")
        | {
            "all-linear": lora("all-linear"),
            "loha": peft.LoHaConfig(task_type="CAUSAL_LM", r=4, alpha=8, target_modules=["qkv_proj", "down_proj"]),
            "lokr": peft.LoKrConfig(task_type="CAUSAL_LM", r=4, alpha=8, target_modules=["gate_up_proj", "o_proj"]),
            "lora-bias": lora(["qkv_proj", "gate_up_proj"], lora_bias=True),
        },
        {"no windows": {"sliding_window": None}},
    ),
    "phi3-tied": Case(
        "phi3",
        {"num_key_value_heads": 4, "tie_word_embeddings": True, "pad_token_id": 0},
        PHI3,
        {"all": lora(["qkv_proj", "gate_up_proj"])},
        {},
    ),
    "gemma2": Case(
        "gemma2",
        {
            "head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": 8, "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 2.0, "rope_parameters": ROPE, "pad_token_id": 0,
        },
        SEPARATE,
        _usual(ALL, "q_proj", "gate_proj", "embed_tokens") | {"saved-embedding": SAVED_EMBEDDING},
        {
            "score caps": {"attn_logit_softcapping": None},
            "logit cap": {"final_logit_softcapping": None},
            "score scale": {"query_pre_attn_scalar": 32},
            "no windows": {"layer_types": ["full_attention"] * LAYERS},
        },
        norm_mean=0.0,
    ),
    "gemma3": Case(
        "gemma3_text",
        {
            "head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": 8, "pad_token_id": 0,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
            },
        },
        SEPARATE,
        _usual(ALL, "q_proj", "gate_proj", "embed_tokens"),
        {
            "local theta": {
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                }
            },
            "linear rope": {
                "rope_parameters": {
                    "full_attention": {"rope_type": "default", "rope_theta": 100.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
                }
            },
            "score scale": {"query_pre_attn_scalar": 32},
            "no windows": {"layer_types": ["full_attention"] * LAYERS},
        },
        norm_mean=0.0,
    ),
    "gemma3-capped": Case(
        "gemma3_text",
        {
            "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8, "pad_token_id": 0,
            "final_logit_softcapping": 2.0, "attention_bias": True, "tie_word_embeddings": False,
        },
        SEPARATE,
        {"all": lora(ALL)},
        {"logit cap": {"final_logit_softcapping": None}},
        norm_mean=0.0,
    ),
    "gpt2": Case(
        "gpt2",
        {},
        GPT2,
        {
            name: adapter
            for name, adapter in _usual(["c_attn", "c_proj", "c_fc"], "c_attn", "c_fc", "wte").items()
            if name not in ("vera", "adalora")
        }
        | {
            "fan-in-said": lora(["c_attn", "c_proj"], fan_in_fan_out=True),
            "dora-fan-in-said": lora(["c_attn", "c_fc"], fan_in_fan_out=True, use_dora=True),
            "all-linear": lora("all-linear"),
            "one-of-two": lora(["mlp.c_proj"]),
            "saved-embedding": lora(["c_attn"], modules_to_save=["wte"]),
            "bias-lora-only": lora(["c_attn", "c_fc"], bias="lora_only"),
            "lora-bias": lora(["c_attn"], lora_bias=True),
            "vera": peft.VeraConfig(
                task_type="CAUSAL_LM", r=16, target_modules=["c_attn", "c_fc"], save_projection=True,
                fan_in_fan_out=True,
            ),
            "adalora": peft.AdaLoraConfig(
                task_type="CAUSAL_LM", init_r=8, target_r=8, lora_alpha=16, target_modules=["c_attn", "mlp.c_proj"],
                total_step=10, fan_in_fan_out=True,
            ),
        },
        {"score scale": {"scale_attn_weights": False}},
        sizes=GPT2_SIZES,
    ),
    "gpt2-unscaled": Case(
        "gpt2",
        {"scale_attn_weights": False, "tie_word_embeddings": False},
        GPT2,
        {"all": lora(["c_attn", "c_proj", "c_fc"])},
        {},
        sizes=GPT2_SIZES | {"n_inner": 192},
    ),
}  # fmt: skip


def save_model(case: Case, path: Path) -> None:
    """Write the tiny checkpoint, bf16, with a tokenizer."""
    torch.manual_seed(len(case.model_type))
    config = transformers.AutoConfig.for_model(
        case.model_type, **{**case.sizes, **case.options, "initializer_range": 0.25}
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
        elif "norm" in name or ".ln_" in name:
            torch.nn.init.normal_(parameter, mean=case.norm_mean, std=0.3)
    model.save_pretrained(path)
    save_tokenizer(path)


def reference_model(case: Case, path: Path, base: LoadedBase) -> Any:
    """transformers' own model, fp32, with the weights that are served."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for projections, module in case.modules.items():
            for layer in range(base.spec.n_layers):
                served = torch.cat([base.weights.projections[p, layer].dequantize() for p in projections])
                weight = model.get_submodule(module.format(layer)).weight
                weight.copy_(
                    served.T if type(model.get_submodule(module.format(layer))).__name__ == "Conv1D" else served
                )
    return model


def save_adapter(model: Any, config: Any, folder: Path, seed: int) -> None:
    """An adapter as PEFT makes and saves it; no parameter of it is zero."""
    random = torch.Generator().manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(copy.deepcopy(model), copy.deepcopy(config))
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                noise = torch.randn(parameter.shape, generator=random)
                if "magnitude" in name:
                    parameter.mul_(1 + 0.2 * noise)
                elif "vera_lambda" in name:
                    parameter.copy_(0.3 * noise)
                elif "lora_E" in name:
                    parameter.copy_(noise)
                elif any(key in name for key in ("lora_", "hada_", "lokr_")):
                    parameter.copy_(0.15 * noise)
                elif parameter.requires_grad:
                    parameter.add_(0.05 * noise)
        adapted.save_pretrained(folder)


@dataclass
class Served:
    """A family's model on both sides."""

    case: Case
    path: Path
    running: Running
    model: Any
    folder: Path

    @property
    def names(self) -> list[str | None]:
        return [None, *self.case.adapters]


def serve(case: Case, root: Path, kernels: CpuKernels, *, config: Callable[[Path], None] | None = None) -> Served:
    """Save, quantise, load and serve the family's model with all of its adapters. ``config`` may change the
    checkpoint before it is loaded."""
    path = root / "model"
    save_model(case, path)
    if config is not None:
        config(path)
    base = load_base(str(path), cache_dir=root / "cache", progress=False)
    model = reference_model(case, path, base)
    for seed, (name, adapter) in enumerate(case.adapters.items()):
        save_adapter(model, adapter, root / "adapters" / name, seed)
    settings = ServeConfig(
        model=case.model_type,
        engine=EngineConfig(
            max_context=128,
            max_rows=32,
            max_device_adapters=64,
            table_memory=16 << 20,
            cpu_kernels=kernels,
            cpu_arithmetic="fp32",  # as the references' side
        ),
    )
    running = build(settings, base=base, progress=False)
    for name in case.adapters:
        running.registry.load(name, str(root / "adapters" / name))
    return Served(case, path, running, model, root / "adapters")


def prompt_of(number: int, vocabulary: int) -> list[int]:
    random = torch.Generator().manual_seed(1000 + number)
    ids: list[int] = torch.randint(0, min(vocabulary, 256), (PROMPT,), generator=random).tolist()
    ids[1], ids[-2] = 3, 100  # among the trained tokens
    return ids


def request_for(served: Served, name: str | None, number: int, place: int) -> Request:
    """A request in its slot, with pages of its own; ``number`` says which prompt, ``place`` which pages."""
    registry, slots = served.running.registry, served.running.slots
    adapters = () if name is None else (AdapterUse(registry.acquire(name)),)
    prompt = prompt_of(number, served.model.config.vocab_size)
    request = Request(f"row-{place}", prompt, SamplingParams(temperature=0.0), adapters=adapters)
    request.pages = list(range(4 * place, 4 * place + 4))
    if adapters:
        deadline = time.monotonic() + 60
        while (slot := slots.acquire(adapters[0].ref)) is None:
            assert time.monotonic() < deadline, f"{name} did not get into its slot"
            time.sleep(0.005)
        request.slots = (slot,)
    return request


def release(served: Served, rows: Sequence[Request]) -> None:
    for row in rows:
        for use in row.adapters:
            served.running.slots.release(use.ref)
            served.running.registry.release(use.ref)


def step(served: Served, rows: Sequence[Request], done: int, count: int) -> dict[str, torch.Tensor]:
    """Compute tokens ``done .. done + count - 1`` of every row; logits of those whose last token is among them."""
    plan = sorted((ScheduledRow(row, done, count) for row in rows), key=lambda row: row.request.slots)
    logits = served.running.runner.logits(StepPlan(tuple(plan)))
    sampled = [row.request.request_id for row in plan if row.sample]
    return {name: logits[i].clone() for i, name in enumerate(sampled)}


def greedy(served: Served, rows: Sequence[Request], chunk: int = PROMPT) -> dict[str, torch.Tensor]:
    """Logits ``[GREEDY, vocab]`` of each row: its prompt in chunks, then greedy tokens, one a step."""
    logits: dict[str, list[torch.Tensor]] = {row.request_id: [] for row in rows}
    done = 0
    while done < PROMPT + GREEDY - 1:
        count = min(chunk, PROMPT - done) if done < PROMPT else 1
        for name, values in step(served, rows, done, count).items():
            logits[name].append(values)
        done += count
        if done >= PROMPT:
            for row in rows:
                row.output_token_ids.append(int(logits[row.request_id][-1].argmax()))
    return {name: torch.stack(values) for name, values in logits.items()}


def adapted(served: Served, name: str | None) -> Any:
    """PEFT's model of the adapter's files, or transformers' own; fp32."""
    model = copy.deepcopy(served.model)
    if name is None:
        return model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(model, served.folder / name).eval()
