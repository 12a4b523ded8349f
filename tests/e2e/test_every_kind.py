"""Every kind of adapter that PEFT writes, against PEFT itself: logits on the same base, all kinds in one mixed batch.

For tiny Llama, Qwen2 and Qwen3 models the base is quantised as it is served, and PEFT gets the dequantised weights, so
both sides have the very same base. Every adapter is made by PEFT with all of its trained parameters drawn at random
(nothing zero), saved, and loaded by both sides from the files. Partial targets and ranks of 1, 8 and 64 are among them.

**The bound.** PEFT in fp64 is the truth. How far its own fp32 is from that (``own``, measured here for each adapter) is
what fp32 costs on this model with this adapter. Our sums are one chain each where torch's keep some 32 partial sums, so
a sum of n terms rounds n times in a row instead of n / 32: errors of random sign grow with the root of that, 5.7 times
at most. Folding (DoRA's gain into B, VeRA's vectors, Khatri-Rao products) rounds each factor once or twice more, which
adds errors of the size of single roundings. Doubled, for the maximum over thousands of logits of two independent
samples: 12 times ``own``. The smallest change that a mistake would make is far above it, as the last test shows.
"""

from __future__ import annotations

import copy
import gc
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from manylora.adapters.errors import AdapterRefused
from manylora.server.config import EngineConfig, ServeConfig
from manylora.server.engine.request import AdapterUse, Request, SamplingParams, ScheduledRow, StepPlan
from manylora.server.model.layout import projection_weight
from manylora.server.model.loader import load_base
from manylora.server.serving import Running, build

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ATTENTION = ["q_proj", "v_proj"]
MLP = ["gate_proj", "down_proj"]
TARGETS = {"attention": ATTENTION, "mlp": MLP, "all": ALL}
CHAIN_FACTOR = 12
PROMPT = 24


def _lora(**options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(task_type="CAUSAL_LM", **{"r": 8, "lora_alpha": 16, "target_modules": ALL, **options})


def _kinds() -> dict[str, Any]:
    """Name -> PEFT config."""
    kinds: dict[str, Any] = {}
    for rank in (1, 8, 64):
        for where, modules in TARGETS.items():
            options = {"r": rank, "lora_alpha": 2 * rank, "target_modules": modules}
            kinds[f"lora-{where}-{rank}"] = _lora(**options)
            kinds[f"dora-{where}-{rank}"] = _lora(use_dora=True, **options)
            kinds[f"vera-{where}-{rank}"] = peft.VeraConfig(
                task_type="CAUSAL_LM", r=rank, target_modules=modules, save_projection=True
            )
            kinds[f"adalora-{where}-{rank}"] = peft.AdaLoraConfig(
                task_type="CAUSAL_LM", init_r=rank, target_r=rank, lora_alpha=16, target_modules=modules, total_step=10
            )
        kinds[f"rslora-{rank}"] = _lora(r=rank, use_rslora=True)
        kinds[f"lora-bias-{rank}"] = _lora(r=rank, lora_bias=True)
        kinds[f"lokr-{rank}"] = peft.LoKrConfig(task_type="CAUSAL_LM", r=rank, alpha=16, target_modules=ALL)
        for where, modules in TARGETS.items():
            kinds[f"loha-{where}-{rank}"] = peft.LoHaConfig(
                task_type="CAUSAL_LM", r=rank, alpha=8, target_modules=modules
            )
    kinds |= {
        "patterns": _lora(rank_pattern={"q_proj": 3, "1.mlp.up_proj": 20}, alpha_pattern={"(k|v)_proj": 5}),
        "one-layer": _lora(layers_to_transform=[1]),
        "head": _lora(target_modules=["q_proj", "lm_head"]),
        "embedding": _lora(target_modules=["v_proj", "embed_tokens"]),
        "dora-head": _lora(target_modules=["q_proj", "lm_head"], use_dora=True),
        "dora-embedding": _lora(target_modules=["v_proj", "embed_tokens"], use_dora=True),
        "dora-rslora-patterns": _lora(use_dora=True, use_rslora=True, rank_pattern={"v_proj": 17}),
        "saved-head": _lora(target_modules=ATTENTION, modules_to_save=["lm_head"]),
        "saved-embedding": _lora(target_modules=ATTENTION, modules_to_save=["embed_tokens"]),
        "saved-both": _lora(target_modules=ATTENTION, modules_to_save=["embed_tokens", "lm_head"]),
        "trained-tokens": _lora(target_modules=ATTENTION, trainable_token_indices=[3, 7, 100]),
        "bias-all": _lora(target_modules=ATTENTION, bias="all"),
        "bias-lora-only": _lora(target_modules=ATTENTION, bias="lora_only"),
    }
    return kinds


KINDS = _kinds()


@dataclass
class Family:
    running: Running
    model: Any
    """transformers' model over the dequantised weights, fp32."""
    folder: Path
    names: list[str]
    """Of the adapters that are served; the others were refused by name."""
    refused: dict[str, str]


def _randomise(model: Any, seed: int) -> None:
    """Every parameter that PEFT added or trains, none of it zero, of a size that keeps the model's own."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=random)
            if "magnitude" in name or "original_module" in name or ("base_layer" in name and "bias" not in name):
                if "magnitude" in name:
                    parameter.mul_(1 + 0.2 * noise)
            elif "vera_lambda" in name:
                parameter.copy_(0.3 * noise)
            elif "lora_E" in name:
                parameter.copy_(noise)
            elif any(key in name for key in ("lora_", "hada_", "lokr_")):
                parameter.copy_(0.15 * noise)
            elif parameter.requires_grad:  # modules_to_save, trained biases and tokens
                parameter.add_(0.05 * noise)


def _save(model: Any, folder: Path) -> None:
    """One directory for each kind that PEFT itself can make on this model."""
    for seed, (name, config) in enumerate(KINDS.items()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = peft.get_peft_model(copy.deepcopy(model), copy.deepcopy(config))
            _randomise(adapted, seed)
            adapted.save_pretrained(folder / name)


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def family(
    request: pytest.FixtureRequest, checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Family]:
    path = checkpoints[request.param]
    root = tmp_path_factory.mktemp(f"kinds-{request.param}")
    base = load_base(str(path), cache_dir=root / "cache", progress=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        for (projection, layer), weight in base.weights.projections.items():
            model.get_parameter(projection_weight(projection, layer)).copy_(weight.dequantize())
    _save(model, root / "adapters")
    config = ServeConfig(
        model=request.param,
        engine=EngineConfig(
            cpu_arithmetic="fp32",  # as PEFT's side: what is compared is what adapters add
            max_context=128,
            max_rows=len(KINDS) + 1,
            max_device_adapters=4 * len(KINDS),  # as slots, and two pages for each: some ranks need a dozen
            table_memory=16 << 20,
        ),
    )
    running = build(config, base=base)
    served, refused = [], {}
    for name in KINDS:
        try:
            running.registry.load(name, str(root / "adapters" / name))
            served.append(name)
        except AdapterRefused as error:
            refused[name] = str(error)
    yield Family(running, model, root / "adapters", served, refused)
    del running
    gc.collect()


def _row(family: Family, name: str | None, number: int, first_page: int) -> Request:
    """A request with its pages and, if it has an adapter, its slot."""
    random = torch.Generator().manual_seed(1000 + number)
    vocabulary = family.model.config.vocab_size
    ids = torch.randint(0, vocabulary, (PROMPT,), generator=random).tolist()
    ids[1], ids[-2] = 3, 100  # among the trained tokens
    adapters = () if name is None else (AdapterUse(family.running.registry.acquire(name)),)
    request = Request(f"row-{number}", ids, SamplingParams(temperature=0.0), adapters=adapters)
    request.pages = list(range(first_page, first_page + 3))
    if adapters:
        deadline = time.monotonic() + 60
        while (slot := family.running.slots.acquire(adapters[0].ref)) is None:
            assert time.monotonic() < deadline, f"{name} did not get into its slot"
            time.sleep(0.005)
        request.slots = (slot,)
    return request


def _logits(family: Family, rows: list[Request]) -> dict[str, torch.Tensor]:
    """The last position's logits of each row, all computed in one step; fp32 ``[vocab]``."""
    plan = sorted((ScheduledRow(row, 0, row.num_tokens) for row in rows), key=lambda row: row.request.slots)
    logits = family.running.runner.logits(StepPlan(tuple(plan)))
    return {row.request.request_id: logits[i].clone() for i, row in enumerate(plan)}


def _give_back(family: Family, rows: list[Request]) -> None:
    for row in rows:
        for use in row.adapters:
            family.running.slots.release(use.ref)
            family.running.registry.release(use.ref)


def _of_peft(family: Family, name: str | None, ids: list[int]) -> tuple[float, torch.Tensor]:
    """What PEFT makes of the adapter's files on the same base, in fp64: the last position's logits; and how far fp32
    may be from them: as far as PEFT is in fp32, or as fp64 is if what it embeds is rounded to fp32 in other ways.

    One of them alone may be right by luck: deltas of rank 1, 30 times the weights, make an ill-conditioned model.
    """
    model = copy.deepcopy(family.model)
    if name is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.PeftModel.from_pretrained(model, family.folder / name)
    tokens, random = torch.tensor([ids]), torch.Generator().manual_seed(0)
    with torch.inference_mode():
        results = [model.eval()(tokens).logits[0, -1].double()]
        truth = model.double()(tokens).logits[0, -1]
        embedded = model.get_input_embeddings()(tokens)
        for _ in range(8):
            rounded = embedded * (1 + 2.0**-24 * torch.randn(embedded.shape, generator=random, dtype=torch.float64))
            results.append(model(inputs_embeds=rounded).logits[0, -1])
    return max(float((result - truth).abs().max()) for result in results), truth


def test_all_of_them_are_served(family: Family) -> None:
    assert not family.refused


def test_every_kind_in_one_batch_equals_peft(family: Family) -> None:
    names: list[str | None] = [None, *family.names]
    rows = [_row(family, name, number, 3 * number) for number, name in enumerate(names)]
    mixed = _logits(family, rows)
    worst = []
    for name, row in zip(names, rows, strict=True):
        own, truth = _of_peft(family, name, row.prompt_token_ids)
        error = float((mixed[row.request_id].double() - truth).abs().max())
        worst.append((error / own, name or "base", error, own))
    worst.sort(reverse=True)
    _give_back(family, rows)
    assert worst[0][0] <= CHAIN_FACTOR, worst[:5]


def test_alone_and_mixed_have_the_same_bits(family: Family) -> None:
    names: list[str | None] = [None, *family.names]
    rows = [_row(family, name, number, 3 * number) for number, name in enumerate(names)]
    mixed = _logits(family, rows)
    for row in rows:
        alone = _logits(family, [row])
        assert torch.equal(alone[row.request_id], mixed[row.request_id]), row.adapters
    _give_back(family, rows)


def test_every_kind_changes_the_answer(family: Family) -> None:
    """The comparison with PEFT would be empty if both sides lost a delta: each is far above the bound."""
    names: list[str | None] = [None, *family.names]
    rows = [_row(family, name, 0, 3 * number) for number, name in enumerate(names)]
    for number, row in enumerate(rows):
        row.request_id = f"row-{number}"
    mixed = _logits(family, rows)
    base = mixed["row-0"]
    for name, row in zip(names[1:], rows[1:], strict=True):
        assert float((mixed[row.request_id] - base).abs().max()) > 1e-3, name
    _give_back(family, rows)
