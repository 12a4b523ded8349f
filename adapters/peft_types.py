"""PEFT's adapter types and every field of their configs, classified. Torch-free.

Written against PEFT 0.21.2 (a test holds the tables against the installed one). A field of a served type is in exactly
one of its tables; a key that is in none is refused by name: a field that changes the inference and is skipped would be
the wrong weights, served in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

_EVERY_TYPE: Final = frozenset({"peft_type", "task_type", "base_model_name_or_path"})
_TARGETS: Final = frozenset({"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"})
_TABLES: Final = frozenset({"modules_to_save", "trainable_token_indices", "ensure_weight_tying"})

_HARMLESS: Final[Mapping[str, str]] = {
    "auto_mapping": "class names, for loading by PEFT",
    "peft_version": "who wrote it",
    "revision": "of the base model",
    "inference_mode": "whether the tensors are trainable",
}
_HARMLESS_LORA: Final[Mapping[str, str]] = {
    **_HARMLESS,
    "lora_dropout": "training only",
    "megatron_core": "a module name, used only with megatron_config",
    "loftq_config": "initialisation only; the mode itself is init_lora_weights",
    "eva_config": "initialisation only",
    "corda_config": "initialisation only; the mode itself is init_lora_weights",
    "lora_ga_config": "initialisation only; the mode itself is init_lora_weights",
    "qalora_group_size": "used only with use_qalora",
    "runtime_config": "ignored by PEFT in a file",
    "merge_weights": "of PEFT before 0.3: whether to merge at run time",
}
_HARMLESS_LYCORIS: Final[Mapping[str, str]] = {
    **_HARMLESS,
    "rank_dropout": "training only",
    "module_dropout": "training only",
    "init_weights": "initialisation only",
}

FAN_IN: Final = "for bases that store their weights transposed (GPT-2's Conv1D); this base does not"
_EFFECTIVE: Final = "a decomposition of convolutions, which the served bases do not have"
_REFUSED_LORA: Final[Mapping[str, str]] = {
    "megatron_config": "LoRA over Megatron's parallel layers, which is not served",
    "layer_replication": "layers of the base are repeated, which is not served",
    "target_parameters": "LoRA on bare parameters (mixture-of-experts weights), which is not served",
    "use_qalora": "QALoRA pools its inputs by group, which is not served",
    "enable_lora": "of PEFT before 0.3: LoRA on some slices of a fused layer, which is not served",
}
_REFUSED_UNLESS_NONE_LORA: Final[Mapping[str, str]] = {
    "alora_invocation_tokens": "aLoRA: the delta applies only after an invocation sequence, which is not served",
    "use_bdlora": "BD-LoRA: block-diagonal factors, which are not served",
    "arrow_config": "Arrow: a router over several adapters, which is not served",
    "kasa_config": "KaSA: training truncated the base weights, so that the adapter is wrong on the plain base",
    "velora_config": "VeLoRA: saves the state of its training beside the factors, which is not served",
    "monteclora_config": "MonteCLoRA: trained with sampled perturbations, which is not served",
}


@dataclass(frozen=True)
class ServedType:
    """One served ``peft_type``. ``handled``: read and acted upon. ``harmless``: without effect at inference whatever
    the value, and why. The other two: refused unless falsy, or unless None (some features are switched on by any
    other value, an empty one included)."""

    name: str
    """What people call it."""
    handled: frozenset[str]
    harmless: Mapping[str, str]
    refused: Mapping[str, str]
    refused_unless_none: Mapping[str, str]
    default_rank: int
    biases: tuple[str, ...]
    """Values of ``bias``: none, all of the base's, those of the targeted modules. Empty: it has no such field."""


_ADALORA_SCHEDULE: Final = dict.fromkeys(
    ("target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"),
    "the schedule of the training; the ranks that were kept are in rank_pattern",
)

SERVED: Final[Mapping[str, ServedType]] = MappingProxyType(
    {
        "LORA": ServedType(
            "LoRA",
            _EVERY_TYPE | _TARGETS | _TABLES
            | {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights", "bias",
               "use_dora", "lora_bias", "fan_in_fan_out"},
            _HARMLESS_LORA,
            _REFUSED_LORA,
            _REFUSED_UNLESS_NONE_LORA,
            8,
            ("none", "all", "lora_only"),
        ),
        "ADALORA": ServedType(
            "AdaLoRA",
            _EVERY_TYPE | _TARGETS | _TABLES | {"init_r", "lora_alpha", "rank_pattern", "bias", "fan_in_fan_out"},
            {
                **_HARMLESS_LORA,
                **_ADALORA_SCHEDULE,
                "r": "of LoRA; AdaLoRA begins with init_r",
                "use_rslora": "of LoRA; AdaLoRA's scale has no such variant",
                "alpha_pattern": "of LoRA; AdaLoRA has one alpha",
                "lora_bias": "of LoRA; AdaLoRA's factors have no bias",
                "init_lora_weights": "AdaLoRA has one initialisation, which leaves the base as it is",
            },
            {**_REFUSED_LORA, "use_dora": "AdaLoRA has no DoRA (PEFT refuses this too)"},
            _REFUSED_UNLESS_NONE_LORA,
            12,
            ("none", "all", "lora_only"),
        ),
        "VERA": ServedType(
            "VeRA",
            _EVERY_TYPE | {"target_modules", "layers_to_transform", "layers_pattern"}
            | {"modules_to_save", "r", "save_projection", "bias", "fan_in_fan_out"},
            {
                **_HARMLESS,
                "projection_prng_key": "initialisation only, where the projections are saved",
                "vera_dropout": "training only",
                "d_initial": "initialisation only",
                "init_weights": "initialisation only",
            },
            {},
            {},
            256,
            ("none", "all", "vera_only"),
        ),
        "LOHA": ServedType(
            "LoHa",
            _EVERY_TYPE | _TARGETS | {"modules_to_save", "r", "alpha", "rank_pattern", "alpha_pattern"},
            _HARMLESS_LYCORIS,
            {"use_effective_conv2d": _EFFECTIVE},
            {},
            8,
            (),
        ),
        "LOKR": ServedType(
            "LoKr",
            _EVERY_TYPE | _TARGETS
            | {"modules_to_save", "r", "alpha", "rank_pattern", "alpha_pattern", "decompose_both", "decompose_factor"},
            {**_HARMLESS_LYCORIS, "rank_dropout_scale": "training only"},
            {"use_effective_conv2d": _EFFECTIVE},
            {},
            8,
            (),
        ),
        "TRAINABLE_TOKENS": ServedType(
            "trainable tokens",
            _EVERY_TYPE | {"target_modules", "token_indices"},
            {**_HARMLESS, "init_weights": "initialisation only"},
            {},
            {},
            1,
            (),
        ),
    }
)  # fmt: skip

REFUSED: Final[Mapping[str, str]] = MappingProxyType(
    {
        "ADAMSS": "AdaMSS, updates in clustered subspaces of the weights",
        "ADAPTION_PROMPT": "LLaMA-Adapter, trained prompts that attention is gated to",
        "BEFT": "BEFT, trained biases of the projections",
        "BOFT": "butterfly orthogonal fine-tuning, a rotation of the weights",
        "C3A": "C3A, circular convolutions",
        "CARTRIDGE": "Cartridge, trained keys and values before the context",
        "CPT": "context-aware prompt tuning, trained tokens before the prompt",
        "DEFT": "DEFT, a projection of the base weights",
        "DELORA": "DeLoRA, a delta that is normalised by the base weights",
        "FOURIERFT": "FourierFT, a delta given by its Fourier coefficients",
        "FROD": "FRoD, rotations of full rank that layers share",
        "GLORA": "GLoRA, products with the base weights",
        "GRALORA": "GraLoRA, a low-rank delta for every block of the weight",
        "HIRA": "HiRA, a Hadamard product with the base weights",
        "HRA": "Householder reflections of the weights",
        "IA3": "IA3, trained factors on activations",
        "LILY": "Lily, factors that layers share, mixed by a router",
        "LN_TUNING": "trained layer norms",
        "MISS": "MiSS, one shard of a matrix used for all of it",
        "MULTITASK_PROMPT_TUNING": "multitask prompt tuning, trained tokens before the prompt",
        "OFT": "orthogonal fine-tuning, a rotation of the weights",
        "OSF": "orthogonal subspace fine-tuning, a change of the base's own singular vectors",
        "P_TUNING": "p-tuning, trained tokens before the prompt",
        "PEANUT": "PEANuT, small networks over the base weights",
        "POLY": "Polytropon, a router over several adapters",
        "PREFIX_TUNING": "prefix tuning, trained keys and values before the context",
        "PROMPT_TUNING": "prompt tuning, trained tokens before the prompt",
        "PSOFT": "PSOFT, a rotation in a subspace of the weights",
        "PVERA": "PVeRA, a VeRA with sampled projections",
        "RANDLORA": "RandLoRA, sums of random factors of full rank",
        "ROAD": "RoAd, rotations of activations",
        "SHADOW": "ShadowPEFT, a second network beside the base",
        "SHIRA": "SHiRA, a sparse delta of high rank",
        "SUPERTUNING": "Super-Tuning, a sparse choice of the base's own weights",
        "TINYLORA": "TinyLoRA, a vector projected through the base's singular vectors",
        "UNILORA": "Uni-LoRA, all factors projected from one vector",
        "VBLORA": "VB-LoRA, factors put together from a bank of vectors",
        "WAVEFT": "WaveFT, a delta given by its wavelet coefficients",
        "XLORA": "X-LoRA, a mixture of LoRA adapters with a trained gate",
        "BONE": "Bone, of PEFT before 0.18",
    }
)
"""Every other ``peft_type``: what it is, in a few words."""
