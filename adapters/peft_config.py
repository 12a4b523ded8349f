"""PEFT's ``adapter_config.json``: every field of it classified, and what it says about each module. Torch-free."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from manylora.adapters.adapter_config import MAX_RANK, AdapterConfig
from manylora.adapters.patterns import Patterns
from manylora.adapters.peft_targets import (
    TABLE_NAMES,
    TABLE_PATHS,
    Targets,
    layer_number_after,
    path_or_suffix,
)
from manylora.adapters.peft_types import REFUSED, SERVED, ServedType

HARMLESS_INIT: Final = frozenset({"gaussian", "eva", "orthogonal", "mica"})
"""Values of init_lora_weights, besides true and false, that leave the base as it was."""

_BASE_CHANGING_INIT: Final = ("pissa", "olora", "corda", "lora_ga")
_MAX_ALPHA: Final = 1e9
_MAX_FIELDS: Final = 500  # PEFT's largest config has some fifty
_MAX_INITIAL_RANK: Final = 1 << 16
"""Of AdaLoRA, which prunes: what it keeps is at most MAX_RANK."""


@dataclass(frozen=True)
class ParsedConfig:
    """``adapter`` is ``None`` if the file describes none that could be read further; ``reasons`` then says why.

    With reasons *and* an ``adapter``, it is refused all the same, but its tensors can still be looked at, so that one
    message tells everything that is wrong.
    """

    adapter: AdapterConfig | None
    peft_type: str | None
    base_model: str | None
    reasons: tuple[str, ...]
    refused_fields: frozenset[str] = field(default_factory=frozenset)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of a key that occurs twice, readers of JSON take the one or the other: what it says is not certain."""
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {key!a:.100} occurs twice")
        result[key] = value
    return result


def parse_config(data: bytes) -> ParsedConfig:
    """Read and classify the bytes of an ``adapter_config.json``. Raises nothing: what is wrong is in ``reasons``."""
    try:
        document = json.loads(data, object_pairs_hook=_distinct)
        json.dumps(document, ensure_ascii=False).encode()  # half a surrogate pair could be shown to nobody
    except (ValueError, RecursionError) as error:
        return ParsedConfig(None, None, None, (f"adapter_config.json is not valid JSON: {error}",))
    if not isinstance(document, dict):
        kind = type(document).__name__
        return ParsedConfig(None, None, None, (f"adapter_config.json must hold an object, got a {kind}",))
    if len(document) > _MAX_FIELDS:
        return ParsedConfig(
            None, None, None, (f"adapter_config.json has {len(document)} fields: PEFT writes no such file",)
        )
    return _Reader(document).parse()


class _Reader:
    """One pass over a config; collects every problem instead of stopping at the first."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document
        self.reasons: list[str] = []
        self.refused: set[str] = set()
        self.readable = True
        self.patterns = Patterns()

    def refuse(self, name: str, reason: str) -> None:
        """A feature that is not served; the rest of the file can be looked at nevertheless."""
        self.refused.add(name)
        self.reasons.append(f"{_clip(name)} = {_show(self.document.get(name))}: {reason}")

    def malformed(self, reason: str) -> None:
        """What makes the rest unreadable."""
        self.readable = False
        self.reasons.append(reason)

    def parse(self) -> ParsedConfig:
        base = self.document.get("base_model_name_or_path")
        base_model = base if isinstance(base, str) and base else None
        peft_type = self.document.get("peft_type")
        served = SERVED.get(peft_type) if isinstance(peft_type, str) else None
        if not isinstance(peft_type, str) or served is None:
            names = f"{', '.join(SERVED)} are served"
            if peft_type is None:
                reason = f"adapter_config.json has no peft_type; {names}"
            else:
                what = REFUSED.get(peft_type) if isinstance(peft_type, str) else None
                reason = f"peft_type = {_show(peft_type)}: {what or 'no type that this server knows'}, is not served"
                reason += "" if what else f" ({names})"
            shown = peft_type if isinstance(peft_type, str) else None
            return ParsedConfig(None, shown, base_model, (reason,), frozenset({"peft_type"}))
        self._check_fields(served)
        self._check_modes(served)
        adapter = self._adapter(peft_type, served, base_model)
        return ParsedConfig(adapter, peft_type, base_model, tuple(self.reasons), frozenset(self.refused))

    def _check_fields(self, served: ServedType) -> None:
        known = served.handled | set(served.harmless) | set(served.refused) | set(served.refused_unless_none)
        for name, value in self.document.items():
            refusal = served.refused.get(name) if value else None
            if value is not None:
                refusal = refusal or served.refused_unless_none.get(name)
            if refusal is not None:
                self.refuse(name, refusal)
            elif not (name in known or value is None or value is False or value in ("", [], {})):
                self.refuse(name, "a field this server does not know, so it cannot be ignored")

    def _check_modes(self, served: ServedType) -> None:
        task = self.document.get("task_type")
        if task not in (None, "CAUSAL_LM"):
            self.refuse("task_type", "only CAUSAL_LM is served")
        if "init_lora_weights" not in served.handled:
            return
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
        self.refuse("init_lora_weights", reason)

    def _adapter(self, peft_type: str, served: ServedType, base_model: str | None) -> AdapterConfig | None:
        has = served.handled
        is_adalora = peft_type == "ADALORA"
        r = self._rank("init_r" if is_adalora else "r", served.default_rank) if peft_type != "TRAINABLE_TOKENS" else 1
        alpha_name = "alpha" if "alpha" in has else "lora_alpha"
        alpha = self._alpha(alpha_name, self.document.get(alpha_name, 8)) if alpha_name in has else 1.0
        ranks: dict[str, int] = {}
        kept = None
        if is_adalora:
            kept = self._kept(r)
        elif "rank_pattern" in has:
            values = self._pattern("rank_pattern")
            ranks = {k: self._rank_value(f"rank_pattern[{_clip(k)!a}]", v) for k, v in values.items()}
        alphas = self._pattern("alpha_pattern") if "alpha_pattern" in has else {}
        alphas = {k: self._alpha(f"alpha_pattern[{_clip(k)!a}]", v) for k, v in alphas.items()}
        saved = self._saved()
        token_ids = self._token_ids()
        targets = self._targets(peft_type, frozenset(path for p in saved for path in TABLE_PATHS[p]))
        if "save_projection" in has and not self._flag("save_projection", default=True):
            self.refuse(
                "save_projection",
                "the random projections are not in the file, and drawn again they may be others on another machine; "
                "save the adapter again with save_projection=True",
            )
        config = AdapterConfig(
            peft_type=peft_type,
            targets=targets,
            r=r,
            alpha=alpha,
            base_model=base_model,
            use_rslora="use_rslora" in has and self._flag("use_rslora"),
            rank_pattern=ranks,
            alpha_pattern=alphas,
            use_dora="use_dora" in has and self._flag("use_dora"),
            lora_bias="lora_bias" in has and self._flag("lora_bias"),
            bias=self._bias(served),
            kept=kept,
            decompose_both="decompose_both" in has and self._flag("decompose_both"),
            decompose_factor=self._factor() if "decompose_factor" in has else -1,
            saved=saved,
            token_ids=token_ids,
            fan_in_fan_out=self._flag("fan_in_fan_out") if "fan_in_fan_out" in has else None,
            ensure_weight_tying="ensure_weight_tying" in has and self._flag("ensure_weight_tying"),
        )
        if config.use_dora and config.lora_bias:
            self.malformed("lora_bias cannot be combined with use_dora (PEFT refuses this too)")
        return config if self.readable else None

    def _targets(self, peft_type: str, saved: frozenset[str]) -> Targets:
        target = self._names("target_modules")
        exclude = self._names("exclude_modules")
        layers = self._layers()
        layers_pattern = self._names("layers_pattern")
        if not target and peft_type == "TRAINABLE_TOKENS":
            target = ("embed_tokens",)
        if not target and not self.document.get("target_modules"):
            self.malformed(
                "target_modules is missing: the config must say which modules it adapts (PEFT always writes it)"
            )
        if isinstance(target, str) and (layers is not None or layers_pattern):
            self.malformed(
                "layers_to_transform and layers_pattern cannot be combined with a target_modules that is a string "
                "(PEFT refuses this too)"
            )
        if layers_pattern and layers is None:
            self.malformed("layers_pattern is set without layers_to_transform (PEFT refuses this too)")
        for name, value in (("target_modules", target), ("exclude_modules", exclude)):
            if isinstance(value, str) and value.lower() != "all-linear":
                self._check_regex(name, value, value)
        patterns = (layers_pattern,) if isinstance(layers_pattern, str) else layers_pattern
        for pattern in patterns:
            self._check_regex("layers_pattern", pattern, layer_number_after(pattern))
        return Targets(target, exclude, layers, tuple(filter(None, patterns)), saved, self.patterns)

    def _saved(self) -> frozenset[str]:
        value = self._names("modules_to_save")
        names = (value,) if isinstance(value, str) else value
        others = [name for name in names if name not in TABLE_NAMES]
        if others:
            self.refuse("modules_to_save", "only lm_head and embed_tokens are served as whole replaced modules")
        return frozenset(TABLE_NAMES[name] for name in names if name in TABLE_NAMES)

    def _token_ids(self) -> dict[str, tuple[int, ...]]:
        if self.document["peft_type"] == "TRAINABLE_TOKENS":
            ids = self._ids("token_indices", self.document.get("token_indices"))
            return {"embed": ids, "lm_head": ids}
        value = self.document.get("trainable_token_indices")
        if not value:
            return {}
        by_name = value if isinstance(value, dict) else {"embed_tokens": value}
        result: dict[str, tuple[int, ...]] = {}
        for name, listed in by_name.items():
            if name not in TABLE_NAMES:
                self.refuse("trainable_token_indices", "only tokens of embed_tokens and lm_head are served")
            else:
                result[TABLE_NAMES[name]] = self._ids(f"trainable_token_indices of {name}", listed)
        return result

    def _ids(self, name: str, value: Any) -> tuple[int, ...]:
        if not isinstance(value, list) or not value or not all(type(item) is int for item in value):
            self.malformed(f"{name} = {_show(value)}: must be a list of token ids")
            return ()
        if len(set(value)) != len(value):
            self.malformed(f"{name} = {_show(value)}: names a token twice")
        return tuple(value)

    def _bias(self, served: ServedType) -> Literal["none", "all", "targets"]:
        value = self.document.get("bias", "none") if served.biases else "none"
        if served.biases and value not in served.biases:
            self.refuse("bias", f"must be one of {', '.join(served.biases)}")
        return "none" if value == "none" else "all" if value == "all" else "targets"

    def _kept(self, r: int) -> dict[str, tuple[bool, ...]] | None:
        value = self.document.get("rank_pattern")
        if not value:
            return None
        if not isinstance(value, dict):
            self.malformed(f"rank_pattern = {_show(value)}: must be an object from parameters to lists")
            return None
        kept = {}
        for key, ranks in value.items():
            module, _, last = key.rpartition(".")
            if last != "lora_E" or not isinstance(ranks, list) or not all(isinstance(item, bool) for item in ranks):
                self.malformed(f"rank_pattern[{_clip(key)!a}]: AdaLoRA lists true and false for a lora_E")
            elif len(ranks) != r:
                self.malformed(f"rank_pattern[{_clip(key)!a}] has {len(ranks)} entries, init_r is {r}")
            else:
                kept[module] = tuple(ranks)
        return kept

    def _rank(self, name: str, default: int) -> int:
        value = self.document.get(name, default)
        return self._rank_value(name, value, _MAX_INITIAL_RANK if name == "init_r" else MAX_RANK)

    def _rank_value(self, name: str, value: Any, most: int = MAX_RANK) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            self.malformed(f"{name} = {_show(value)}: a rank must be an integer from 1 to {most}")
            return 1
        return value

    def _alpha(self, name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _MAX_ALPHA:
            self.malformed(f"{name} = {_show(value)}: an alpha must be a finite number")
            return 1.0
        return float(value)

    def _factor(self) -> int:
        value = self.document.get("decompose_factor", -1)
        if type(value) is not int:
            self.malformed(f"decompose_factor = {_show(value)}: must be an integer")
            return -1
        return value

    def _flag(self, name: str, *, default: bool = False) -> bool:
        value = self.document.get(name, default)
        if value is not None and not isinstance(value, bool):
            self.malformed(f"{name} = {_show(value)}: must be true or false")
        return value is True

    def _pattern(self, name: str) -> dict[str, Any]:
        value = self.document.get(name)
        if not value:
            return {}
        if not isinstance(value, dict):
            self.malformed(f"{name} = {_show(value)}: must be an object from module patterns to numbers")
            return {}
        for key in value:
            self._check_regex(name, key, path_or_suffix(key))
        return value

    def _names(self, name: str) -> str | tuple[str, ...]:
        value = self.document.get(name)
        if not value:
            return ()
        if isinstance(value, str):
            return value
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self.malformed(f"{name} = {_show(value)}: must be a string or a list of strings")
            return ()
        return tuple(value)

    def _layers(self) -> tuple[int, ...] | None:
        value = self.document.get("layers_to_transform")
        if value is None:
            return None
        items = value if isinstance(value, list) else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) for item in items):
            self.malformed(f"layers_to_transform = {_show(value)}: must be an integer or a list of integers")
            return None
        return tuple(items)

    def _check_regex(self, name: str, pattern: str, as_used: str) -> None:
        if (problem := self.patterns.problem(as_used)) is not None:
            self.malformed(f"{name}: {_show(pattern)} is not a regular expression that can be used: {problem}")


def _show(value: Any) -> str:
    return _clip(json.dumps(value))


def _clip(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."
