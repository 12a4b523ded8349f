"""Every kind that PEFT writes computes what PEFT computes: logits of PEFT's own model against the folded weights.

Both run in fp64 on the same base. What differs is that folding is done in fp32 (gains, products of factors): a few
roundings of 2^-24 a weight. These adapters are larger than the base's own weights, and attention over two layers makes
up to 1e-5 of the logits of that; the bound is 1e-4. They move the logits by a good part of themselves, which is
asserted, so that a factor left out is seen.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoHaConfig, LoKrConfig, LoraConfig, TrainableTokensConfig, VeraConfig

from manylora.adapters.peft_loader import load_peft_adapter
from manylora.adapters.weights import AdapterWeights
from tests.adapters.peft_dirs import ALL, SHAPES, HfBase, load_peft, logits, save_peft, tiny_model, with_adapter

TASK: dict[str, Any] = {"task_type": "CAUSAL_LM"}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Models this small are slower on two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def plain_logits(family: str, tied: bool) -> torch.Tensor:
    return logits(tiny_model(family, tied=tied))


def check(path: Path, config: Any, family: str = "Llama", *, tied: bool = False, std: float = 0.3) -> AdapterWeights:
    """Have PEFT write the adapter, read it, and compare."""
    save_peft(path, peft_config=config, model=tiny_model(family, tied=tied), std=std)
    return compare(path, family, tied=tied)


def compare(path: Path, family: str = "Llama", *, tied: bool = False) -> AdapterWeights:
    adapter = load_peft_adapter(path, SHAPES, base=HfBase(tiny_model(family, tied=tied)))
    theirs = logits(load_peft(path, tiny_model(family, tied=tied)))
    ours = logits(with_adapter(tiny_model(family, tied=tied), adapter.lora))
    size = float(theirs.abs().max())
    assert float((theirs - plain_logits(family, tied)).abs().max()) > 0.02 * size, "it does too little to be tested"
    assert float((ours - theirs).abs().max()) < 1e-4 * size
    return adapter


def lora(rank: int, targets: Any, **kwargs: Any) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=8, target_modules=targets, **TASK, **kwargs)


KINDS = {
    "LoRA": lora,
    "DoRA": lambda r, t: lora(r, t, use_dora=True),
    "AdaLoRA": lambda r, t: AdaLoraConfig(init_r=r, lora_alpha=8, total_step=10, target_modules=t, **TASK),
    "VeRA": lambda r, t: VeraConfig(r=r, target_modules=t, d_initial=0.3, **TASK),
    "LoHa": lambda r, t: LoHaConfig(r=r, alpha=4, target_modules=t, **TASK),
    "LoKr": lambda r, t: LoKrConfig(r=r, alpha=4, target_modules=t, **TASK),
}
FAMILIES = ["Llama", "Qwen2", "Qwen3"]
TARGETS = [["q_proj", "v_proj"], ALL, ["k_proj", "down_proj", "lm_head"]]
RANKS = [1, 8, 64]
# Every two of rank, family and targets meet.
SQUARE = [(RANKS[i], FAMILIES[j], TARGETS[(i + j) % 3]) for i in range(3) for j in range(3)]


@pytest.mark.parametrize(("rank", "family", "targets"), SQUARE)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_those_of_peft(kind: str, rank: int, family: str, targets: list[str], tmp_path: Path) -> None:
    adapter = check(tmp_path, KINDS[kind](rank, targets), family)
    assert adapter.report.kind == kind
    assert (adapter.not_composable is not None) == (kind in ("DoRA", "AdaLoRA", "VeRA"))


# --- variants of LoRA ------------------------------------------------------------------------------------------------

EVERYWHERE = ["q_proj", "up_proj", "lm_head", "embed_tokens"]
LORA_VARIANTS: dict[str, dict[str, Any]] = {
    "rsLoRA with patterns": {"use_rslora": True, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"lm_head": 3}},
    "DoRA with rsLoRA and patterns": {"use_dora": True, "use_rslora": True, "rank_pattern": {"lm_head": 3}},
    "DoRA of a lone layer": {"use_dora": True, "layers_to_transform": [1]},
    "bias all": {"bias": "all"},
    "bias lora_only": {"bias": "lora_only"},
    "DoRA with bias all": {"use_dora": True, "bias": "all"},
}


@pytest.mark.parametrize("variant", LORA_VARIANTS)
@pytest.mark.parametrize("tied", [False, True])
def test_variants_of_lora_everywhere(variant: str, tied: bool, tmp_path: Path) -> None:
    check(tmp_path, lora(4, EVERYWHERE, **LORA_VARIANTS[variant]), "Qwen2", tied=tied)


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_bias(family: str, tmp_path: Path) -> None:
    adapter = check(tmp_path, lora(4, ["q_proj", "o_proj", "lm_head"], lora_bias=True), family)
    assert {projection for projection, _ in adapter.lora.vectors} == {"q", "o", "lm_head"}
    assert adapter.not_composable is None, "it is linear in its scale"


def test_lora_bias_and_trained_biases_add_up(tmp_path: Path) -> None:
    adapter = check(tmp_path, lora(4, ["q_proj"], lora_bias=True, bias="all"), "Qwen2")
    assert {projection for projection, _ in adapter.lora.vectors} == {"q", "k", "v"}
    assert "biases" in str(adapter.not_composable)


@pytest.mark.parametrize("kind", ["AdaLoRA", "VeRA"])
def test_trained_biases_of_other_kinds(kind: str, tmp_path: Path) -> None:
    config = KINDS[kind](4, ["q_proj", "o_proj"])
    config.bias = "vera_only" if kind == "VeRA" else "lora_only"
    adapter = check(tmp_path, config, "Qwen2")
    assert {projection for projection, _ in adapter.lora.vectors} == {"q"}


def test_dora_folds_its_gain_into_b(tmp_path: Path) -> None:
    adapter = check(tmp_path, lora(4, EVERYWHERE, use_dora=True))
    assert adapter.lora.vectors.keys() == adapter.lora.pairs.keys()
    assert all(v.gain is not None and v.gain.dtype == torch.float32 for v in adapter.lora.vectors.values())
    assert "DoRA" in str(adapter.not_composable)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_converted_by_peft_is_an_ordinary_lora(init: str, tmp_path: Path) -> None:
    """PEFT subtracts the initial adapter, so that what it saves is a LoRA of twice the rank on the plain base."""
    import warnings

    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(tiny_model(), lora(4, ["q_proj", "v_proj"], init_lora_weights=init))
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(tmp_path / "initial")
        model.peft_config["default"].init_lora_weights = init
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += torch.randn_like(parameter) * 0.2
        model.save_pretrained(tmp_path / "new", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    assert compare(tmp_path / "new").report.ranks == (8,)


# --- AdaLoRA, LoHa, LoKr ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [8, 0])
def test_adalora_that_pruned_ranks(alpha: int, tmp_path: Path) -> None:
    """Some modules keep some of their ranks, one none at all; the scale is still that of the initial rank."""
    config = AdaLoraConfig(init_r=6, lora_alpha=alpha, total_step=10, target_modules=["q_proj", "down_proj"], **TASK)
    kept = [[True] * 6, [False] * 6, [True, False, True, False, False, True], [False, True, False, False, False, False]]
    names = [f"model.layers.{layer}.{m}.lora_E" for layer in (0, 1) for m in ("self_attn.q_proj", "mlp.down_proj")]
    config.rank_pattern = dict(zip(names, kept, strict=True))
    adapter = check(tmp_path, config)
    assert adapter.report.ranks == (1, 3, 6)
    assert ("down", 0) not in adapter.lora.pairs
    # PEFT's guard against a rank of zero moves the scale by too little to be seen in logits.
    assert adapter.lora.pairs["q", 1].scale == pytest.approx((alpha or 3) / (6 + 1e-5), rel=1e-9)


def test_adalora_ignores_what_it_has_of_lora(tmp_path: Path) -> None:
    config = AdaLoraConfig(
        init_r=4,
        total_step=10,
        target_modules=["v_proj", "up_proj"],
        use_rslora=True,
        alpha_pattern={"v_proj": 99},
        r=7,
        **TASK,
    )
    check(tmp_path, config)


@pytest.mark.parametrize("rank", [2, 3, 4, 5])
def test_loha_as_the_products_of_its_columns(rank: int, tmp_path: Path) -> None:
    config = LoHaConfig(r=rank, alpha=5, target_modules=ALL, rank_pattern={"v_proj": 2}, alpha_pattern={"o_proj": 2})
    adapter = check(tmp_path, config)
    assert adapter.lora.pairs["gate", 0].rank == min(rank * rank, 32)
    assert adapter.lora.pairs["v", 0].rank == 4


@pytest.mark.parametrize(
    "changes",
    [
        {"r": 1, "decompose_both": True},
        {"r": 1, "decompose_both": True, "decompose_factor": 8},
        {"r": 2, "decompose_factor": 4, "rank_pattern": {"o_proj": 1}},
        {"r": 3, "decompose_factor": 16, "alpha_pattern": {"k_proj": 2}},
        {"r": 1, "decompose_factor": 5},
        {"r": 4},  # exactly half of the larger side, which PEFT does not split
    ],
)
def test_lokr_by_the_structure_of_its_factors(changes: dict[str, Any], tmp_path: Path) -> None:
    check(tmp_path, LoKrConfig(alpha=4, target_modules=[*ALL, "lm_head"], **changes))


def test_sizes_are_split_as_peft_splits_them() -> None:
    from peft.tuners.lokr.layer import factorization as theirs

    from manylora.adapters.kinds.lokr import factorization as ours

    for size in range(1, 130):
        for factor in (-3, -1, 0, 1, 2, 3, 4, 5, 7, 8, 16, 100, 1000):
            assert ours(size, factor) == theirs(size, factor), (size, factor)


# --- replaced tables -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("ensure", [False, True])
@pytest.mark.parametrize("saved", [["embed_tokens"], ["lm_head"], ["lm_head", "model.embed_tokens"]])
def test_modules_to_save(saved: list[str], ensure: bool, tied: bool, tmp_path: Path) -> None:
    # A target that is saved as a whole gets no factors; PEFT cannot tie it then.
    targets = ["q_proj", "lm_head"] if "lm_head" in saved and not (ensure and tied) else ["q_proj"]
    config = lora(4, targets, modules_to_save=saved, ensure_weight_tying=ensure)
    adapter = check(tmp_path, config, tied=tied)
    both = len(saved) == 2 or (ensure and tied)
    expected = {"embed", "lm_head"} if both else {"embed" if "embed" in saved[0] else "lm_head"}
    assert set(adapter.lora.tables) == expected
    assert dict(adapter.report.replaced_rows) == dict.fromkeys(expected, 64)
    assert "replaces rows" in str(adapter.not_composable)


TOKENS: dict[str, Any] = {
    "list": [9, 3, 60],
    "embed": {"embed_tokens": [9, 3]},
    "lm_head": {"lm_head": [9, 3]},
    "the same for both": {"embed_tokens": [9, 3], "lm_head": [9, 3]},
    "another order": {"embed_tokens": [9, 3], "lm_head": [3, 9]},
    "others": {"embed_tokens": [9, 3], "lm_head": [5]},
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("ids", TOKENS)
def test_retrained_tokens(ids: str, tied: bool, tmp_path: Path) -> None:
    adapter = check(tmp_path, lora(4, ["q_proj"], trainable_token_indices=TOKENS[ids]), tied=tied)
    for rows in adapter.lora.tables.values():
        assert rows.ids.tolist() == sorted(rows.ids.tolist())
    if tied and ids == "list":
        assert adapter.lora.tables["lm_head"].ids.tolist() == [3, 9, 60]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("targets", [None, ["embed_tokens"], ["lm_head"]])
def test_the_type_of_trainable_tokens(targets: list[str] | None, tied: bool, tmp_path: Path) -> None:
    adapter = check(tmp_path, TrainableTokensConfig(token_indices=[8, 2], target_modules=targets, **TASK), tied=tied)
    assert adapter.report.kind == "trainable tokens"
    assert adapter.lora.pairs == {}


def test_tokens_of_both_tables_of_an_untied_base(tmp_path: Path) -> None:
    both = ["embed_tokens", "lm_head"]
    adapter = check(tmp_path, TrainableTokensConfig(token_indices=[8, 2], target_modules=both, **TASK))
    assert not torch.equal(adapter.lora.tables["embed"].rows, adapter.lora.tables["lm_head"].rows)


@pytest.mark.parametrize("kind", ["AdaLoRA", "VeRA", "LoHa", "LoKr"])
def test_tables_beside_other_kinds(kind: str, tmp_path: Path) -> None:
    config = KINDS[kind](2, ["q_proj"])
    config.modules_to_save = ["lm_head"]
    if kind == "AdaLoRA":
        config.trainable_token_indices = [4]
    adapter = check(tmp_path, config)
    assert set(adapter.lora.tables) == ({"lm_head", "embed"} if kind == "AdaLoRA" else {"lm_head"})


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("targets", [["q_proj", "embed_tokens"], ["q_proj", "lm_head"], r".*(q_proj|embed_tokens)"])
def test_factors_tied_between_the_tables(targets: Any, dora: bool, tmp_path: Path) -> None:
    config = lora(4, targets, ensure_weight_tying=True, use_dora=dora)
    adapter = check(tmp_path, config, tied=True)
    assert {"embed", "lm_head"} <= {projection for projection, _ in adapter.lora.pairs}
