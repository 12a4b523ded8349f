"""PEFT's ``adapter_config.json``: every field of it classified, and what it says about each module. Torch-free.

Written against PEFT 0.21.2. Each field of its ``LoraConfig`` is in exactly one of the tables below (a test holds them
against the installed PEFT), and a key that is in none is refused by name: a field that changes the inference and is
skipped would be the wrong weights, served in silence.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

HANDLED: Final = frozenset(
    {
        "peft_type",
        "task_type",
        "base_model_name_or_path",
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "init_lora_weights",
        "bias",
        "ensure_weight_tying",
    }
)
"""Fields whose value is read and acted upon."""

HARMLESS: Final[Mapping[str, str]] = {
    "auto_mapping": "class names, for loading by PEFT",
    "peft_version": "who wrote it",
    "revision": "of the base model",
    "inference_mode": "whether the tensors are trainable",
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
"""Fields that do not change the inference, whatever their value, and why not."""

# "Not set" is what PEFT takes for it: some features are switched on by any value but None, an empty one included.
REFUSED_UNLESS_FALSY: Final[Mapping[str, str]] = {
    "use_dora": "DoRA: outputs are rescaled by a trained magnitude, which is not served",
    "lora_bias": "a trained bias on lora_B, which is not served",
    "fan_in_fan_out": "for bases that store their weights transposed (GPT-2's Conv1D); the served bases do not",
    "modules_to_save": "whole modules are replaced, which is not served",
    "trainable_token_indices": "rows of the embedding are replaced, which is not served",
    "megatron_config": "LoRA over Megatron's parallel layers, which is not served",
    "layer_replication": "layers of the base are repeated, which is not served",
    "target_parameters": "LoRA on bare parameters (mixture-of-experts weights), which is not served",
    "use_qalora": "QALoRA pools its inputs by group, which is not served",
    "enable_lora": "of PEFT before 0.3: LoRA on some slices of a fused layer, which is not served",
}
REFUSED_UNLESS_NONE: Final[Mapping[str, str]] = {
    "alora_invocation_tokens": "aLoRA: the delta applies only after an invocation sequence, which is not served",
    "use_bdlora": "BD-LoRA: block-diagonal factors, which are not served",
    "arrow_config": "Arrow: a router over several adapters, which is not served",
    "kasa_config": "KaSA: training truncated the base weights, so that the adapter is wrong on the plain base",
    "velora_config": "VeLoRA: saves the state of its training beside the factors, which is not served",
    "monteclora_config": "MonteCLoRA: trained with sampled perturbations, which is not served",
}

HARMLESS_INIT: Final = frozenset({"gaussian", "eva", "orthogonal", "mica"})
"""Values of init_lora_weights, besides true and false, that leave the base as it was."""

_BASE_CHANGING_INIT: Final = ("pissa", "olora", "corda", "lora_ga")
_MAX_RANK: Final = 256
_MAX_ALPHA: Final = 1e9


@dataclass(frozen=True)
class PeftLoraConfig:
    """The fields of a plain-LoRA ``adapter_config.json`` that matter at inference.

    ``module`` in the methods below is a module's path in the base model as PEFT sees it, for example
    ``model.layers.3.self_attn.q_proj`` or ``lm_head``.
    """

    r: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target_modules: str | tuple[str, ...]
    exclude_modules: str | tuple[str, ...]
    layers_to_transform: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]
    base_model: str | None
    ensure_weight_tying: bool = False

    def rank(self, module: str) -> int:
        key = _first_match(self.rank_pattern, module)
        return self.r if key is None else self.rank_pattern[key]

    def alpha(self, module: str) -> float:
        key = _first_match(self.alpha_pattern, module)
        return self.lora_alpha if key is None else self.alpha_pattern[key]

    def scale(self, module: str) -> float:
        """alpha / r (LoRA, Hu et al. 2021, section 4.1) or alpha / sqrt(r) (rsLoRA, Kalajdzievski 2023, eq. 8)."""
        rank = self.rank(module)
        return self.alpha(module) / (math.sqrt(rank) if self.use_rslora else rank)

    def ambiguous_alphas(self, module: str) -> list[str]:
        """The alpha patterns that match ``module`` if they disagree, the one that counts first; else none.

        PEFT sorts the patterns when it saves them and takes the first match when it loads them, so that training may
        have used another one than everybody who loads the file.
        """
        matching = [pattern for pattern in self.alpha_pattern if re.match(_path_or_suffix(pattern), module)]
        return matching if len({self.alpha_pattern[pattern] for pattern in matching}) > 1 else []

    def targets(self, module: str) -> bool:
        """Whether PEFT would put LoRA on ``module``, a linear layer or the embedding."""
        if _is_named_by(self.exclude_modules, module):
            return False
        if isinstance(self.target_modules, str):
            if (
                self.target_modules.lower() == "all-linear"
            ):  # the output layer is left out, and an embedding is not linear
                return module != "lm_head" and not module.endswith("embed_tokens")
            return re.fullmatch(self.target_modules, module) is not None
        if module in self.target_modules:  # a full path overrides layers_to_transform
            return True
        return _is_named_by(self.target_modules, module) and self._layer_is_chosen(module)

    def _layer_is_chosen(self, module: str) -> bool:
        if not self.layers_to_transform:
            return True
        # The lazy prefix finds the first number in the path: a later one would be an expert's.
        patterns = (
            [_layer_number_after(pattern) for pattern in self.layers_pattern]
            if self.layers_pattern
            else [r".*?\.[^.]*\.(?P<idx>\d+)\."]
        )
        for pattern in patterns:
            if match := re.match(pattern, module):
                return int(match["idx"]) in self.layers_to_transform
        return False


@dataclass(frozen=True)
class ParsedConfig:
    """``lora`` is ``None`` if the file describes no LoRA that could be read further; ``reasons`` then says why.

    With reasons *and* a ``lora``, the adapter is refused all the same, but its tensors can still be looked at, so that
    one message tells everything that is wrong.
    """

    lora: PeftLoraConfig | None
    peft_type: str | None
    base_model: str | None
    reasons: tuple[str, ...]
    refused_fields: frozenset[str] = field(default_factory=frozenset)


def parse_config(data: bytes) -> ParsedConfig:
    """Read and classify the bytes of an ``adapter_config.json``. Raises nothing: what is wrong is in ``reasons``."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        return ParsedConfig(None, None, None, (f"adapter_config.json is not valid JSON: {error}",))
    if not isinstance(document, dict):
        kind = type(document).__name__
        return ParsedConfig(None, None, None, (f"adapter_config.json must hold an object, got a {kind}",))
    return _Reader(document).parse()


class _Reader:
    """One pass over a config; collects every problem instead of stopping at the first."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document
        self.reasons: list[str] = []
        self.refused: set[str] = set()

    def refuse(self, name: str, reason: str) -> None:
        self.refused.add(name)
        self.reasons.append(reason)

    def parse(self) -> ParsedConfig:
        peft_type = self.document.get("peft_type")
        if peft_type != "LORA":
            self._check_fields(known_only=True)
            what = "has no peft_type" if peft_type is None else f"has peft_type {_show(peft_type)}"
            self.reasons.insert(0, f"adapter_config.json {what}; only LORA is served")
            shown = peft_type if isinstance(peft_type, str) else None
            return ParsedConfig(None, shown, self._base(), tuple(self.reasons), frozenset(self.refused))
        self._check_fields(known_only=False)
        self._check_modes()
        lora = self._lora()
        return ParsedConfig(lora, "LORA", self._base(), tuple(self.reasons), frozenset(self.refused))

    def _base(self) -> str | None:
        base = self.document.get("base_model_name_or_path")
        return base if isinstance(base, str) and base else None

    def _check_fields(self, *, known_only: bool) -> None:
        known = HANDLED | set(HARMLESS) | set(REFUSED_UNLESS_FALSY) | set(REFUSED_UNLESS_NONE)
        for name, value in self.document.items():
            refusal = REFUSED_UNLESS_FALSY.get(name) if value else None
            if value is not None:
                refusal = refusal or REFUSED_UNLESS_NONE.get(name)
            if refusal is not None:
                self.refuse(name, f"{name} = {_show(value)}: {refusal}")
            elif not (known_only or name in known or value is None or value is False or value in ("", [], {})):
                self.refuse(
                    name, f"{name} = {_show(value)}: a field this server does not know, so it cannot be ignored"
                )

    def _check_modes(self) -> None:
        bias = self.document.get("bias", "none")
        if bias != "none":
            self.refuse("bias", f"bias = {_show(bias)}: trained biases are not served")
        task = self.document.get("task_type")
        if task not in (None, "CAUSAL_LM"):
            self.refuse("task_type", f"task_type = {_show(task)}: only CAUSAL_LM is served")
        init = self.document.get("init_lora_weights", True)
        if isinstance(init, bool) or (isinstance(init, str) and init.lower() in HARMLESS_INIT):
            return
        mode = init.lower() if isinstance(init, str) else ""
        if mode.startswith(_BASE_CHANGING_INIT):
            reason = (
                "training changed the base weights, so that the adapter is wrong on the plain base; convert it with "
                "PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=<the adapter as initialised>)"
            )
        elif mode == "loftq":
            reason = (
                "it compensates the quantisation error of LoftQ's own base weights, so that it is wrong on any other "
                "base; PEFT's path_initial_model_for_weight_conversion has no conversion for it: train without it"
            )
        else:
            reason = "an initialisation this server does not know; it may have changed the base weights"
        self.refuse("init_lora_weights", f"init_lora_weights = {_show(init)}: {reason}")

    def _lora(self) -> PeftLoraConfig | None:
        before = len(self.reasons)
        r = self._rank("r", self.document.get("r", 8))
        alpha = self._alpha("lora_alpha", self.document.get("lora_alpha", 8))
        rslora = self._flag("use_rslora")
        tying = self._flag("ensure_weight_tying")
        ranks = {k: self._rank(f"rank_pattern[{k!r}]", v) for k, v in self._pattern("rank_pattern").items()}
        alphas = {k: self._alpha(f"alpha_pattern[{k!r}]", v) for k, v in self._pattern("alpha_pattern").items()}
        target = self._names("target_modules")
        exclude = self._names("exclude_modules")
        layers = self._layers()
        layers_pattern = self._names("layers_pattern")
        if not target and len(self.reasons) == before:
            self.reasons.append(
                "target_modules is missing: the config must say which modules it adapts (PEFT always writes it)"
            )
        if isinstance(target, str) and (layers is not None or layers_pattern):
            self.reasons.append(
                "layers_to_transform and layers_pattern cannot be combined with a target_modules that is a string "
                "(PEFT refuses this too)"
            )
        if layers_pattern and layers is None:
            self.reasons.append("layers_pattern is set without layers_to_transform (PEFT refuses this too)")
        for name in ("target_modules", "exclude_modules"):
            value = self.document.get(name)
            if isinstance(value, str) and value.lower() != "all-linear":
                self._check_regex(name, value, value)
        patterns = (layers_pattern,) if isinstance(layers_pattern, str) else layers_pattern
        for pattern in patterns:
            self._check_regex("layers_pattern", pattern, _layer_number_after(pattern))
        if len(self.reasons) > before:
            return None
        return PeftLoraConfig(
            r=r,
            lora_alpha=alpha,
            use_rslora=rslora,
            rank_pattern=ranks,
            alpha_pattern=alphas,
            target_modules=target,
            exclude_modules=exclude,
            layers_to_transform=layers,
            layers_pattern=tuple(pattern for pattern in patterns if pattern),
            base_model=self._base(),
            ensure_weight_tying=tying,
        )

    def _rank(self, name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MAX_RANK:
            self.reasons.append(f"{name} = {_show(value)}: a rank must be an integer from 1 to {_MAX_RANK}")
            return 1
        return value

    def _alpha(self, name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _MAX_ALPHA:
            self.reasons.append(f"{name} = {_show(value)}: an alpha must be a finite number")
            return 1.0
        return float(value)

    def _flag(self, name: str) -> bool:
        value = self.document.get(name, False)
        if value is not None and not isinstance(value, bool):
            self.reasons.append(f"{name} = {_show(value)}: must be true or false")
        return value is True

    def _pattern(self, name: str) -> dict[str, Any]:
        value = self.document.get(name)
        if not value:
            return {}
        if not isinstance(value, dict):
            self.reasons.append(f"{name} = {_show(value)}: must be an object from module patterns to numbers")
            return {}
        for key in value:
            self._check_regex(name, key, _path_or_suffix(key))
        return value

    def _names(self, name: str) -> str | tuple[str, ...]:
        value = self.document.get(name)
        if not value:
            return ()
        if isinstance(value, str):
            return value
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self.reasons.append(f"{name} = {_show(value)}: must be a string or a list of strings")
            return ()
        return tuple(value)

    def _layers(self) -> tuple[int, ...] | None:
        value = self.document.get("layers_to_transform")
        if value is None:
            return None
        items = value if isinstance(value, list) else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) for item in items):
            self.reasons.append(f"layers_to_transform = {_show(value)}: must be an integer or a list of integers")
            return None
        return tuple(items)

    def _check_regex(self, name: str, pattern: str, as_used: str) -> None:
        try:
            re.compile(as_used)
        except re.error as error:
            self.reasons.append(f"{name}: {_show(pattern)} is not a regular expression: {error}")


def _path_or_suffix(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"


def _layer_number_after(pattern: str) -> str:
    return rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\."


def _first_match(patterns: Mapping[str, Any], module: str) -> str | None:
    """The first key that matches the whole path or a suffix of it that begins after a dot; order is the file's."""
    for pattern in patterns:
        if re.match(_path_or_suffix(pattern), module):
            return pattern
    return None


def _is_named_by(names: str | tuple[str, ...], module: str) -> bool:
    """PEFT's rule for a regular expression (whole path) or a list (whole path, or its end after a dot)."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _show(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
