"""Rotary position embeddings: the variants a config can ask for, and their frequencies.

Torch-free. The maths is RoFormer's (Su et al. 2021, section 3.2.2) with the context extensions as transformers defines
them in ``modeling_rope_utils.py``, against which the tests compare.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np

RopeKind = Literal["default", "linear", "llama3", "yarn"]

DEFAULT_THETA: Final = 10_000.0

_REQUIRED: Final[Mapping[str, frozenset[str]]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor"}),
    "yarn": frozenset({"factor"}),
}
_OPTIONAL: Final[Mapping[str, frozenset[str]]] = {
    "default": frozenset(),
    "linear": frozenset(),
    "llama3": frozenset({"original_max_position_embeddings"}),
    "yarn": frozenset(
        {
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        }
    ),
}
_COMMON: Final = frozenset({"type", "rope_type", "rope_theta", "partial_rotary_factor", "finetuned"})
"""Keys of every kind. ``finetuned`` (some YaRN configs) records how the model was made and changes nothing."""


@dataclass(frozen=True)
class RopeSpec:
    """The rotary embedding of a model; fields a kind does not use keep their defaults.

    ``original_max_position`` is the context length before extension. ``attention_factor``, ``mscale`` and
    ``mscale_all_dim`` are YaRN's, None when the config leaves them out (see `rope_inv_freq`).
    """

    theta: float = DEFAULT_THETA
    kind: RopeKind = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


def parse_rope(
    config: Mapping[str, Any], max_position: int, *, default_theta: float = DEFAULT_THETA
) -> tuple[RopeSpec, list[str]]:
    """Read the rotary embedding from a Hugging Face config; returns it and every reason to refuse it.

    Two spellings exist: transformers 5 writes one ``rope_parameters`` object; older files have ``rope_theta`` beside an
    optional ``rope_scaling``, whose kind is under ``rope_type`` or, older still, ``type``.
    """
    reasons: list[str] = []
    new, old = config.get("rope_parameters"), config.get("rope_scaling")
    if new and old and new != old:
        reasons.append("the config has both `rope_parameters` and a different `rope_scaling`")
    given = new or old or {}
    if not isinstance(given, Mapping):
        return RopeSpec(), [*reasons, f"the rope parameters are not an object: {given!r}"]
    if any(isinstance(value, Mapping) for value in given.values()):
        return RopeSpec(), [*reasons, "rope parameters that differ between layer types"]

    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in _REQUIRED:
        return RopeSpec(), [*reasons, f"rope type `{kind}` (known: {', '.join(_REQUIRED)})"]
    unknown = sorted(
        key
        for key, value in given.items()
        if value is not None and key not in _COMMON | _REQUIRED[kind] | _OPTIONAL[kind]
    )
    reasons += [f"rope parameter `{key}`, which rope type `{kind}` does not have" for key in unknown]
    missing = sorted(key for key in _REQUIRED[kind] if given.get(key) is None)
    reasons += [f"rope type `{kind}` without its `{key}`" for key in missing]
    for where in (given, config):
        if where.get("partial_rotary_factor") not in (None, 1):
            reasons.append(f"partial rotary embeddings (`partial_rotary_factor` {where['partial_rotary_factor']})")

    def number(key: str, default: float) -> float:
        value = given.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            reasons.append(f"rope parameter `{key}` must be a positive number, got {value!r}")
            return default
        return float(value)

    theta = number("rope_theta", _theta_beside(config, default_theta, reasons))
    # transformers lets a field of the config itself overrule the one inside the rope parameters (Phi-3's habit).
    original = config.get("original_max_position_embeddings", given.get("original_max_position_embeddings"))
    if original is not None and (isinstance(original, bool) or not isinstance(original, int) or original <= 0):
        reasons.append(f"rope parameter `original_max_position_embeddings` must be a positive integer: {original!r}")
        original = None
    spec = RopeSpec(
        theta=theta,
        kind=kind,
        factor=number("factor", 1.0),
        low_freq_factor=number("low_freq_factor", 1.0),
        high_freq_factor=number("high_freq_factor", 4.0),
        original_max_position=original or max_position,
        # YaRN, section 3.2: alpha = 1 and beta = 32 for the Llama family.
        beta_fast=number("beta_fast", 32.0),
        beta_slow=number("beta_slow", 1.0),
        attention_factor=_optional(number("attention_factor", 0.0)),
        mscale=_optional(number("mscale", 0.0)),
        mscale_all_dim=_optional(number("mscale_all_dim", 0.0)),
        truncate=bool(given.get("truncate", True)),
    )
    if kind == "llama3" and spec.high_freq_factor <= spec.low_freq_factor:
        reasons.append("rope type `llama3` with `high_freq_factor` not above `low_freq_factor`")
    return spec, reasons


def _theta_beside(config: Mapping[str, Any], default: float, reasons: list[str]) -> float:
    theta = config.get("rope_theta")
    if theta is None:
        return default
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not theta > 0:
        reasons.append(f"`rope_theta` must be a positive number, got {theta!r}")
        return default
    return float(theta)


def _optional(value: float) -> float | None:
    return value if value > 0 else None


def rope_inv_freq(rope: RopeSpec, head_dim: int) -> tuple[list[float], float]:
    """The ``head_dim / 2`` inverse frequencies (radians per position) and the factor applied to cos and sin.

    Computed in float64: round them once, to fp32. Formulas:

    - default: ``theta ** (-2i / d)`` (RoFormer, eq. 15).
    - linear: positions divided by ``factor`` (Chen et al. 2023, "Extending Context Window ... via Positional
      Interpolation"), which is the frequencies divided by it.
    - llama3: as Llama 3.1's reference code (``apply_scaling``): wavelengths above ``original / low_freq_factor`` are
      stretched by ``factor``, those below ``original / high_freq_factor`` are kept, between them the two are mixed.
    - yarn: NTK-by-parts (Peng et al. 2023, "YaRN", eqs. 17-19) with attention temperature ``0.1 ln(factor) + 1``
      (eq. 22), or the ratio of two such terms when ``mscale`` and ``mscale_all_dim`` are given (DeepSeek).
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    inv_freq = rope.theta**-exponent
    scaling = 1.0
    if rope.kind == "linear":
        inv_freq = inv_freq / rope.factor
    elif rope.kind == "llama3":
        rotations = rope.original_max_position * inv_freq / (2 * math.pi)  # within the original context
        keep = (rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        keep = np.clip(keep, 0.0, 1.0)
        inv_freq = keep * inv_freq + (1 - keep) * inv_freq / rope.factor
    elif rope.kind == "yarn":
        keep = 1.0 - _yarn_ramp(rope, head_dim)
        inv_freq = keep * inv_freq + (1 - keep) * inv_freq / rope.factor
        scaling = _yarn_scaling(rope)
    return [float(value) for value in inv_freq], scaling


def _yarn_ramp(rope: RopeSpec, head_dim: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """How far each dimension pair is interpolated: 0 (fast, kept) to 1 (slow, stretched by the factor)."""

    def dimension(rotations: float) -> float:
        """The pair that turns ``rotations`` times within the original context: YaRN's r(d), solved for d."""
        turns = rope.original_max_position / (rotations * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # transformers' guard against dividing by zero
    return np.clip((np.arange(head_dim // 2, dtype=np.float64) - low) / (high - low), 0.0, 1.0)


def _yarn_scaling(rope: RopeSpec) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor

    def temperature(mscale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * mscale * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return temperature(rope.mscale) / temperature(rope.mscale_all_dim)
    return temperature(1.0)
