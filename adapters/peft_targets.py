"""Which modules PEFT puts an adapter on, and which rank and alpha its patterns give a module. Torch-free.

``module`` is a module's path in the base model as PEFT sees it: ``model.layers.3.self_attn.q_proj``, ``lm_head``. The
methods raise PatternsTooSlow for regular expressions that take too long.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from manylora.adapters.patterns import Patterns

EMBED_PATHS = ("model.embed_tokens", "transformer.wte")
"""Of the served families; a base has one of them (``LoraShapes.names``)."""
HEAD_PATH = "lm_head"
TABLE_PATHS: Mapping[str, tuple[str, ...]] = {"embed": EMBED_PATHS, "lm_head": (HEAD_PATH,)}
TABLE_NAMES: Mapping[str, str] = {
    "embed_tokens": "embed", "wte": "embed", **dict.fromkeys(EMBED_PATHS, "embed"), HEAD_PATH: "lm_head",
}  # fmt: skip
"""What ``modules_to_save`` and ``trainable_token_indices`` may name, and the projection that it means."""


@dataclass(frozen=True)
class Targets:
    """``target_modules`` and its companions, with PEFT's meaning."""

    target_modules: str | tuple[str, ...]
    exclude_modules: str | tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    saved: frozenset[str] = frozenset()
    """Paths of ``modules_to_save``, which get no adapter."""
    patterns: Patterns = field(default_factory=Patterns, compare=False, repr=False)

    def __contains__(self, module: str) -> bool:
        """Whether PEFT would put an adapter on ``module``, a linear layer or the embedding."""
        if module in self.saved or self._is_named_by(self.exclude_modules, module):
            return False
        if isinstance(self.target_modules, str):
            if self.target_modules.lower() == "all-linear":
                return module not in (HEAD_PATH, *EMBED_PATHS)  # the output layer is left out; the other is not linear
            return self.patterns.match(self.target_modules, module, whole=True) is not None
        if module in self.target_modules:  # a full path overrides layers_to_transform
            return True
        return self._is_named_by(self.target_modules, module) and self._layer_is_chosen(module)

    def idle(self, modules: Iterable[str]) -> list[str]:
        """The names in ``target_modules`` that match none of ``modules``; none where it is a regular expression."""
        if isinstance(self.target_modules, str):
            return []
        known = tuple(modules)
        return sorted(n for n in self.target_modules if not any(m == n or m.endswith(f".{n}") for m in known))

    def names_a_table(self) -> bool:
        """Whether ``target_modules`` names the embedding or the output layer, by the rule that PEFT ties them by."""
        if isinstance(self.target_modules, str):
            return any(self._is_named_by(self.target_modules, name) for name in ("embed_tokens", HEAD_PATH))
        return any(name.rpartition(".")[2] in ("embed_tokens", HEAD_PATH) for name in self.target_modules)

    def _is_named_by(self, names: str | tuple[str, ...], module: str) -> bool:
        """PEFT's rule for a regular expression (whole path) or a list (whole path, or its end after a dot)."""
        if isinstance(names, str):
            return self.patterns.match(names, module, whole=True) is not None
        return any(module == name or module.endswith(f".{name}") for name in names)

    def _layer_is_chosen(self, module: str) -> bool:
        if not self.layers_to_transform:
            return True
        # The lazy prefix finds the first number in the path: a later one would be an expert's.
        patterns = (
            [layer_number_after(pattern) for pattern in self.layers_pattern]
            if self.layers_pattern
            else [r".*?\.[^.]*\.(?P<idx>\d+)\."]
        )
        for pattern in patterns:
            if match := self.patterns.match(pattern, module):
                return int(match["idx"]) in self.layers_to_transform
        return False


def layer_number_after(pattern: str) -> str:
    """The regular expression that PEFT makes of a ``layers_pattern``."""
    return rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\."


def path_or_suffix(pattern: str) -> str:
    """The regular expression that PEFT makes of a key of ``rank_pattern`` or ``alpha_pattern``."""
    return rf"(.*\.)?({pattern})$"


def all_matches(patterns: Patterns, keys: Iterable[str], module: str) -> list[str]:
    """The keys that match the whole path or a suffix of it that begins after a dot; the first counts, as in PEFT."""
    return [key for key in keys if patterns.match(path_or_suffix(key), module)]
