"""A PEFT adapter directory to ``AdapterWeights``: applied in full, or refused with every reason in one message.

The tensors of the file are the truth about which modules are adapted, and the config must agree with them in both
directions: a module that only one of the two knows is how wrong weights are served without anyone noticing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from manylora.adapters.adapter_config import AdapterConfig
from manylora.adapters.base import BaseModel
from manylora.adapters.errors import AdapterRefused
from manylora.adapters.kinds import kind_of
from manylora.adapters.peft_assembly import Assembly
from manylora.adapters.peft_config import ParsedConfig, parse_config
from manylora.adapters.peft_files import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterFiles,
    largest_weights,
    most_tensors,
    read_files,
)
from manylora.adapters.peft_report import bounded
from manylora.adapters.safetensors_file import SafetensorsCorrupt, TensorEntry, read_header
from manylora.adapters.weights import AdapterWeights, LoadReport
from manylora.kernels.sites import LoraShapes

__all__ = [
    "CONFIG_FILE", "WEIGHTS_FILE", "Inspection", "check_peft_adapter", "inspect_peft_adapter", "load_peft_adapter",
]  # fmt: skip


@dataclass(frozen=True)
class Inspection:
    """What can be said about an adapter directory without a base: for ``manylora inspect``."""

    version: str
    peft_type: str | None
    kind: str | None
    """What people call it: LoRA, DoRA, AdaLoRA, ...; ``None`` for what is not served."""
    base_model: str | None
    config: AdapterConfig | None
    """``None`` if its type is not served or its config is malformed."""
    tensors: tuple[TensorEntry, ...]
    reasons: tuple[str, ...]
    """Why it would be refused whatever the base; more may be found against one."""

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.tensors)


def load_peft_adapter(
    path: Path | str,
    shapes: LoraShapes,
    *,
    base: BaseModel | None = None,
    base_name: str | None = None,
    strict_base: bool = False,
) -> AdapterWeights:
    """Read the adapter in directory ``path`` for a base of the given shapes.

    Args:
        path: holds ``adapter_config.json`` and ``adapter_model.safetensors``; see adapters.source for other sources.
        base: the served base. Without it an adapter that cannot be folded without the base's weights (DoRA, trained
            biases, tables that may be tied) is refused, and copies of base weights that PEFT saves beside an adapted
            embedding are not compared, which is a warning.
        base_name: the served base; an adapter that names another one (compared by the last component of the path or
            id) gets a warning, or is refused if ``strict_base``. ``None``: not compared.

    Returns:
        The adapter, folded into the one shape of ``kernels.lora_weights``, on the CPU, and copied: the directory may
        change or go away afterwards.

    Raises:
        AdapterRefused: with every reason found.
        AdapterSourceNotFound: there is no adapter in ``path``, or it cannot be read.
    """
    loaded = _load(Path(path), shapes, base, base_name, strict_base)
    if loaded.needs_base:
        loaded.reasons.append(f"the base's own weights are needed for {', '.join(loaded.needs_base)}")
    return loaded.result(Path(path))


def check_peft_adapter(
    path: Path | str, shapes: LoraShapes, *, base_name: str | None = None, strict_base: bool = False
) -> LoadReport:
    """The checks of ``load_peft_adapter`` as far as they go without the base's weights, and their report.

    What only the weights can tell (a DoRA's gains, trained biases, whether tables are tied) is a warning. Raises as
    ``load_peft_adapter`` does.
    """
    loaded = _load(Path(path), shapes, None, base_name, strict_base)
    if loaded.needs_base:
        loaded.warnings.append(
            f"not checked in full: the base's own weights are needed for {', '.join(loaded.needs_base)}"
        )
    return loaded.result(Path(path)).report


def inspect_peft_adapter(path: Path | str) -> Inspection:
    """What the adapter in directory ``path`` is, without a base to check it against; no tensor is looked into.

    Raises AdapterSourceNotFound, and AdapterRefused if its files cannot be read at all.
    """
    path = Path(path)
    files = read_files(path)
    parsed = parse_config(files.config)
    reasons = list(parsed.reasons)
    entries: list[TensorEntry] = []
    try:
        entries = read_header(files.weights)
    except SafetensorsCorrupt as error:
        reasons.append(f"{WEIGHTS_FILE} is corrupt: {error}")
    return Inspection(
        version=files.version(),
        peft_type=parsed.peft_type,
        kind=_kind_name(parsed),
        base_model=parsed.base_model,
        config=parsed.adapter,
        tensors=tuple(entries),
        reasons=tuple(bounded(reasons)),
    )


@dataclass
class _Loaded:
    """A load before it is known whether anything stands against it."""

    files: AdapterFiles
    assembly: Assembly | None
    reasons: list[str]
    warnings: list[str]

    @property
    def needs_base(self) -> list[str]:
        return self.assembly.needs_base if self.assembly is not None else []

    def result(self, path: Path) -> AdapterWeights:
        if self.reasons or self.assembly is None:
            raise AdapterRefused(f"in {path}", bounded(self.reasons))
        lora = self.assembly.weights()
        return AdapterWeights(
            version=self.files.version(),
            lora=lora,
            report=self.assembly.report(lora, self.warnings),
            chat_template=self.files.chat_template,
            not_composable=self.assembly.not_composable(lora),
        )


def _load(path: Path, shapes: LoraShapes, base: BaseModel | None, base_name: str | None, strict_base: bool) -> _Loaded:
    files = read_files(path, largest_weights(shapes))
    parsed = parse_config(files.config)
    reasons = list(parsed.reasons)
    warnings: list[str] = []
    _check_base(parsed, base_name, reasons if strict_base else warnings)
    assembly = None
    if parsed.adapter is not None:
        try:
            entries = read_header(files.weights, most_tensors(shapes))
        except SafetensorsCorrupt as error:
            reasons.append(f"{WEIGHTS_FILE} is corrupt: {error}")
        else:
            assembly = Assembly(parsed.adapter, parsed.refused_fields, shapes, base, files.weights)
            reasons.extend(assembly.run(entries))
            warnings.extend(assembly.warnings)
    return _Loaded(files, assembly, reasons, warnings)


def _check_base(parsed: ParsedConfig, base_name: str | None, complaints: list[str]) -> None:
    if base_name is None:
        return
    if parsed.base_model is None:
        complaints.append("the config does not say which base the adapter was trained on")
    elif _last_component(parsed.base_model) != _last_component(base_name):
        complaints.append(f"it was trained on {parsed.base_model}, and the served base is {base_name}")


def _last_component(name: str) -> str:
    return name.replace("\\", "/").rstrip("/").rpartition("/")[2].lower()


def _kind_name(parsed: ParsedConfig) -> str | None:
    if parsed.adapter is None:
        return None
    kind = kind_of(parsed.adapter)
    return kind.name if kind is not None else "trainable tokens"
