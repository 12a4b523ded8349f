"""A PEFT adapter directory to ``AdapterWeights``: applied in full, or refused with every reason in one message.

What is served is plain LoRA on the projections of ``kernels.sites``. The tensors of the file are the truth about which
modules carry a delta, and the config must agree with them in both directions: a module that only one of the two knows
is how wrong weights are served without anyone noticing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from manylora.adapters.errors import AdapterRefused, AdapterSourceNotFound
from manylora.adapters.peft_config import ParsedConfig, PeftLoraConfig, parse_config
from manylora.adapters.peft_tensors import SortedTensors, check_copy_shape, check_shape, module_paths, sort_tensors
from manylora.adapters.safetensors_file import TORCH_DTYPES, SafetensorsCorrupt, TensorEntry, read_header
from manylora.adapters.weights import AdapterWeights, LoadReport
from manylora.kernels.lora_weights import LoraPair, LoraWeights
from manylora.kernels.sites import GLOBAL_PROJECTIONS, PROJECTIONS, LoraShapes

CONFIG_FILE: Final = "adapter_config.json"
WEIGHTS_FILE: Final = "adapter_model.safetensors"
_PICKLE_FILE: Final = "adapter_model.bin"
_SHOWN: Final = 4
"""How many modules or tensors with one kind of problem are named before the rest is only counted."""

BaseTensor = Callable[[str], torch.Tensor | None]


@dataclass(frozen=True)
class Inspection:
    """What can be said about an adapter directory without a base: for ``manylora inspect``."""

    version: str
    peft_type: str | None
    base_model: str | None
    config: PeftLoraConfig | None
    """``None`` if it is not a LoRA or its config is malformed."""
    tensors: tuple[TensorEntry, ...]
    reasons: tuple[str, ...]
    """Why it would be refused whatever the base; more may be found against one."""

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.tensors)


@dataclass(frozen=True)
class _Files:
    """The bytes of an adapter directory, each read once, so that the version is that of the tensors served."""

    config: bytes
    weights: bytearray
    chat_template: str | None

    def version(self) -> str:
        """sha256 over the named, length-prefixed parts: no two different sets of files give the same input."""
        digest = hashlib.sha256(b"manylora adapter 1\n")
        parts: list[tuple[str, bytes | bytearray]] = [(CONFIG_FILE, self.config), (WEIGHTS_FILE, self.weights)]
        if self.chat_template is not None:  # part of what the adapter does: a changed one is a new version
            parts.append(("chat_template", self.chat_template.encode()))
        for name, data in parts:
            digest.update(f"{name} {len(data)}\n".encode())
            digest.update(data)
        return digest.hexdigest()


def load_peft_adapter(
    path: Path | str,
    shapes: LoraShapes,
    *,
    base_name: str | None = None,
    strict_base: bool = False,
    base_tensor: BaseTensor | None = None,
) -> AdapterWeights:
    """Read the adapter in directory ``path`` for a base of the given shapes.

    Args:
        path: holds ``adapter_config.json`` and ``adapter_model.safetensors``; see adapters.source for other sources.
        base_name: the served base; an adapter that names another one (compared by the last component of the path or
            id) gets a warning, or is refused if ``strict_base``. ``None``: not compared.
        base_tensor: gives the base's own weight ``[vocab, hidden]`` of ``"embed"`` or ``"lm_head"``. PEFT saves a copy
            of it beside an adapted one; with this the copy is checked to be equal, without it there is a warning.

    Returns:
        The deltas by ``(projection, layer)``, in the file's dtypes, on the CPU, and copied: the directory may change
        or go away afterwards.

    Raises:
        AdapterRefused: with every reason found.
        AdapterSourceNotFound: there is no adapter in ``path``, or it cannot be read.
    """
    path = Path(path)
    files = _read_files(path)
    parsed = parse_config(files.config)
    reasons = list(parsed.reasons)
    warnings: list[str] = []
    _check_base(parsed, base_name, reasons if strict_base else warnings)
    pairs: dict[tuple[str, int], LoraPair] = {}
    if parsed.lora is not None:
        try:
            entries = read_header(files.weights)
        except SafetensorsCorrupt as error:
            reasons.append(f"{WEIGHTS_FILE} is corrupt: {error}")
        else:
            check = _Check(parsed, parsed.lora, shapes, files.weights)
            pairs = check.run(entries, base_tensor)
            reasons.extend(check.reasons())
            warnings.extend(check.warnings)
    if reasons:
        raise AdapterRefused(f"in {path}", reasons)
    return AdapterWeights(
        version=files.version(),
        lora=LoraWeights(pairs),
        report=_report(pairs, parsed.base_model, warnings),
        chat_template=files.chat_template,
    )


def inspect_peft_adapter(path: Path | str) -> Inspection:
    """What the adapter in directory ``path`` is, without a base to check it against; no tensor is looked into.

    Raises AdapterSourceNotFound, and AdapterRefused if its files cannot be read at all.
    """
    path = Path(path)
    files = _read_files(path)
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
        base_model=parsed.base_model,
        config=parsed.lora,
        tensors=tuple(entries),
        reasons=tuple(reasons),
    )


class _Check:
    """Config and tensors against each other and against the base; every problem is collected."""

    def __init__(self, parsed: ParsedConfig, lora: PeftLoraConfig, shapes: LoraShapes, buffer: bytearray) -> None:
        self.told = parsed.refused_fields
        self.lora = lora
        self.shapes = shapes
        self.buffer = buffer
        self.paths = module_paths(shapes)
        self.tensors = SortedTensors()
        self.warnings: list[str] = []

    def run(self, entries: list[TensorEntry], base_tensor: BaseTensor | None) -> dict[tuple[str, int], LoraPair]:
        """The deltas of the modules that have no problem; usable only if ``reasons()`` is empty."""
        self.tensors = sort_tensors(entries, self.paths, self.shapes.n_layers, self.told)
        self._check_targets()
        for module, entry in self.tensors.base_copies.items():
            self._check_copy(module, entry, base_tensor)
        pairs = {}
        zero = []
        for module in sorted(self.tensors.factors, key=self._order):
            if (pair := self._pair(module)) is None:
                continue
            pairs[self.paths[module]] = pair
            if _is_zero(pair):
                zero.append(module)
        if not self.tensors.factors:
            self.tensors.problem("nothing to apply", f"{WEIGHTS_FILE} holds no LoRA tensor of any module of the base")
        elif len(zero) == len(self.tensors.factors):
            self.tensors.problem("nothing to apply", "the delta is exactly zero in every module: was it ever trained?")
        elif zero:
            self.warnings.append(f"the delta is exactly zero in {_listed(zero)}")
        return pairs

    def reasons(self) -> list[str]:
        return [f"{kind}: {_listed(items)}" for kind, items in self.tensors.problems.items()]

    def _check_targets(self) -> None:
        problem = self.tensors.problem
        ambiguous: list[str] = []
        for module in sorted(self.paths, key=self._order):
            targeted, present = self.lora.targets(module), module in self.tensors.factors
            if present and (clash := self.lora.ambiguous_alphas(module)):
                ambiguous.append(
                    f"{module}: {clash[0]!r} counts, as in PEFT, and not {', '.join(map(repr, clash[1:]))}"
                )
            if targeted and not present:
                problem("modules that the config targets and that have no tensors", module)
            if present and not targeted:
                problem("modules that have tensors and that the config does not target (PEFT would skip them)", module)
        if ambiguous:
            self.warnings.append(
                "alpha_pattern has patterns that overlap and disagree; PEFT sorts them when it saves, so training may "
                f"have used another one: {_listed(ambiguous)}"
            )
        if isinstance(self.lora.target_modules, tuple):
            paths = tuple(self.paths)
            idle = [n for n in self.lora.target_modules if not any(p == n or p.endswith(f".{n}") for p in paths)]
            if idle:
                self.warnings.append(f"target_modules that match no module of the base: {_listed(sorted(idle))}")
        if self.lora.ensure_weight_tying and any(
            self._projection(m) in GLOBAL_PROJECTIONS for m in self.tensors.factors
        ):
            problem("ensure_weight_tying = true", "one delta shared by embed_tokens and lm_head, which is not served")

    def _check_copy(self, module: str, entry: TensorEntry, base_tensor: BaseTensor | None) -> None:
        kind = "copies of base weights that differ from the served base's"
        projection = self._projection(module) if module in self.paths else None
        if projection is None:
            self.tensors.problem("tensors that match no module of the base", entry.name)
            return
        features = (self.shapes.in_features[projection], self.shapes.out_features[projection])
        vocab, hidden = features if projection == "embed" else reversed(features)
        if (wrong := check_copy_shape(entry, vocab, hidden)) is not None:
            self.tensors.problem(kind, wrong)
            return
        base = base_tensor(projection) if base_tensor is not None else None
        if base is None:
            if module in self.tensors.frozen_copies:
                self.warnings.append(f"{entry.name} is a copy of a base weight, which LoRA froze; it was not compared")
            else:
                self.tensors.problem("whole weights, which are not served unless equal to the base's", entry.name)
        elif entry.dtype in TORCH_DTYPES:
            # Training in 4 bits casts what is not quantised to float32 (prepare_model_for_kbit_training): same weights.
            copy = entry.read(self.buffer).to(base.dtype)
            if not torch.equal(copy, base.cpu()):
                gap = (copy.float() - base.cpu().float()).abs().max().item()
                self.tensors.problem(kind, f"{entry.name} (largest difference {gap:.3g})")
        else:
            self.tensors.problem("tensors of a dtype that is not served (F32, F16, BF16 are)", _with_dtype(entry))

    def _pair(self, module: str) -> LoraPair | None:
        """The delta of one module, or ``None`` if something is wrong with it."""
        factors = self.tensors.factors[module]
        projection = self._projection(module)
        wrong = check_shape(
            module,
            factors,
            self.lora.rank(module),
            self.shapes.in_features[projection],
            self.shapes.out_features[projection],
        )
        for item in wrong:
            self.tensors.problem("tensors that are missing or have the wrong shape", item)
        unserved = [entry for entry in factors.values() if entry.dtype not in TORCH_DTYPES]
        for entry in unserved:
            self.tensors.problem("tensors of a dtype that is not served (F32, F16, BF16 are)", _with_dtype(entry))
        if unserved:
            return None
        values = {side: entry.read(self.buffer) for side, entry in factors.items()}
        for side, value in values.items():
            if (bad := value.numel() - int(torch.isfinite(value).sum())) > 0:
                self.tensors.problem("values that are not finite", f"{bad} in {factors[side].name}")
        return None if wrong else LoraPair(values["A"], values["B"], self.lora.scale(module))

    def _projection(self, module: str) -> str:
        return self.paths[module][0]

    def _order(self, module: str) -> tuple[int, int]:
        projection, layer = self.paths[module]
        return PROJECTIONS.index(projection), layer


def _read_files(path: Path) -> _Files:
    if not path.is_dir():
        raise AdapterSourceNotFound(f"{path} is not a directory.")
    if not (path / CONFIG_FILE).is_file():
        raise AdapterSourceNotFound(f"{path} holds no {CONFIG_FILE}: it is not a PEFT adapter.")
    if not (path / WEIGHTS_FILE).is_file():
        if (path / _PICKLE_FILE).is_file():
            raise AdapterRefused(
                f"in {path}",
                [
                    f"its weights are in {_PICKLE_FILE}, a pickle, which can run code when it is loaded and is never "
                    "read; convert it where you trust it: safetensors.torch.save_file(torch.load("
                    f"'{_PICKLE_FILE}', weights_only=True), '{WEIGHTS_FILE}')"
                ],
            )
        raise AdapterSourceNotFound(f"{path} holds {CONFIG_FILE} but no {WEIGHTS_FILE}.")
    try:
        weights = _read_whole(path / WEIGHTS_FILE)
        return _Files((path / CONFIG_FILE).read_bytes(), weights, _read_chat_template(path))
    except OSError as error:
        raise AdapterSourceNotFound(f"The adapter in {path} cannot be read: {error}") from error


def _read_whole(path: Path) -> bytearray:
    """The file's bytes in a writable buffer, which is what torch.frombuffer wants."""
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(path.stat().st_size)
        view = memoryview(buffer)
        filled = 0
        while filled < len(buffer) and (count := file.readinto(view[filled:])):
            filled += count
        rest = file.read()
    view.release()
    del buffer[filled:]  # shrunk or grown while it was read: what was read is what is checked and hashed
    return buffer + rest if rest else buffer


def _read_chat_template(path: Path) -> str | None:
    """The directory's own chat template, where transformers looks for it; AdapterRefused if that file is malformed."""
    if (path / "chat_template.jinja").is_file():
        return (path / "chat_template.jinja").read_text(encoding="utf-8")
    if not (path / "tokenizer_config.json").is_file():
        return None
    try:
        document: Any = json.loads((path / "tokenizer_config.json").read_bytes())
    except (ValueError, RecursionError) as error:
        raise AdapterRefused(f"in {path}", [f"tokenizer_config.json is not valid JSON: {error}"]) from error
    template = document.get("chat_template") if isinstance(document, dict) else None
    if isinstance(template, list):  # several, by name
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _check_base(parsed: ParsedConfig, base_name: str | None, complaints: list[str]) -> None:
    if base_name is None:
        return
    if parsed.base_model is None:
        complaints.append("the config does not say which base the adapter was trained on")
    elif _last_component(parsed.base_model) != _last_component(base_name):
        complaints.append(f"it was trained on {parsed.base_model}, and the served base is {base_name}")


def _last_component(name: str) -> str:
    return name.replace("\\", "/").rstrip("/").rpartition("/")[2].lower()


def _is_zero(pair: LoraPair) -> bool:
    """Whether no rank contributes: for each, its row of A or its column of B is zero (or the scale is)."""
    if pair.scale == 0:
        return True
    return not bool(((pair.a != 0).any(dim=1) & (pair.b != 0).any(dim=0)).any())


def _report(pairs: Mapping[tuple[str, int], LoraPair], base_model: str | None, warnings: list[str]) -> LoadReport:
    dtypes = {str(tensor.dtype).removeprefix("torch.") for pair in pairs.values() for tensor in (pair.a, pair.b)}
    present = {projection for projection, _ in pairs}
    return LoadReport(
        ranks=tuple(sorted({pair.rank for pair in pairs.values()})),
        scales=tuple(sorted({pair.scale for pair in pairs.values()})),
        modules=tuple(projection for projection in PROJECTIONS if projection in present),
        n_modules=len(pairs),
        nbytes=sum(pair.nbytes for pair in pairs.values()),
        dtype="+".join(sorted(dtypes)),
        base_model=base_model,
        warnings=tuple(warnings),
    )


def _with_dtype(entry: TensorEntry) -> str:
    return f"{entry.name} is {entry.dtype}"


def _listed(items: list[str]) -> str:
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return "; ".join(items[:_SHOWN]) + more
