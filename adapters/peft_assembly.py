"""Config and tensors of one adapter against each other and against the base, and what they fold into."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch

from manylora.adapters.adapter_config import MAX_RANK, AdapterConfig
from manylora.adapters.base import BaseModel
from manylora.adapters.fp32 import array, non_finite, tensor
from manylora.adapters.kinds import kind_of
from manylora.adapters.kinds.kind import Place
from manylora.adapters.patterns import PatternsTooSlow
from manylora.adapters.peft_biases import changed_biases
from manylora.adapters.peft_files import WEIGHTS_FILE
from manylora.adapters.peft_report import listed, not_applicable, not_composable, report_of, without_effect
from manylora.adapters.peft_tables import TableReader
from manylora.adapters.peft_tensors import SortedTensors, check_shape, places_of, sort_tensors
from manylora.adapters.peft_types import FAN_IN
from manylora.adapters.safetensors_file import TORCH_DTYPES, TensorEntry
from manylora.adapters.weights import LoadReport
from manylora.kernels.lora_weights import LoraPair, LoraVectors, LoraWeights, Module, TableRows
from manylora.kernels.sites import PROJECTIONS, LoraShapes

_ANNOUNCED_BY: Final = {"lora_magnitude_vector": "use_dora", "lora_B.bias": "lora_bias"}
_WRONG: Final = "tensors that are missing or have the wrong shape"
_DTYPE: Final = "tensors of a dtype that is not served (F32, F16, BF16 are)"


class Assembly:
    """Puts one adapter together; ``run`` collects every problem, and the rest is good if it found none."""

    def __init__(
        self,
        config: AdapterConfig,
        told: frozenset[str],
        shapes: LoraShapes,
        base: BaseModel | None,
        buffer: bytearray,
    ) -> None:
        self.config = config
        self.told = told
        self.base = base
        self.buffer = buffer
        self.kind = kind_of(config)
        self.n_layers = shapes.n_layers
        self.transposed = shapes.names.transposed
        self.table_paths = (shapes.names.embed, shapes.names.head)
        places = places_of(shapes)
        self.places = dict(sorted(places.items(), key=lambda p: (PROJECTIONS.index(p[1].projection), p[1].layer)))
        self.tensors = SortedTensors()
        self.warnings: list[str] = []
        self.needs_base: list[str] = []
        """What cannot be had without ``base``, if it was not given."""
        self._pairs: dict[Module, LoraPair] = {}
        self._vectors: dict[Module, LoraVectors] = {}
        self._tables: dict[str, TableRows] = {}
        self._folded: set[str] = set()
        """Paths of the modules whose tensors have no problem."""
        self._unmatched: list[str] = []
        self._dtypes: set[str] = set()
        self._biased = False

    def run(self, entries: Sequence[TensorEntry]) -> list[str]:
        """Every reason against the adapter; none if it can be served."""
        self.tensors = sort_tensors(entries, self.config.peft_type, self.places, self.n_layers, self.told)
        slow = []
        try:
            with np.errstate(over="ignore", invalid="ignore"):  # what overflows is found in the result
                self._assemble()
        except PatternsTooSlow as error:
            slow.append(str(error))
        return [f"{kind}: {listed(items)}" for kind, items in self.tensors.problems.items()] + slow

    def weights(self) -> LoraWeights:
        return LoraWeights(self._pairs, self._vectors, self._tables)

    def report(self, lora: LoraWeights, warnings: Sequence[str]) -> LoadReport:
        name = self.kind.name if self.kind is not None else "trainable tokens"
        return report_of(name, lora, self._dtypes, self.config.base_model, self._unmatched, warnings)

    def not_composable(self, lora: LoraWeights) -> str | None:
        return not_composable(self.kind, lora, self._biased)

    def _assemble(self) -> None:
        if self.base is None:
            self._note_needs()
        self._check_fan_in()
        adapted = frozenset(self.tensors.parts)
        if self.kind is not None:
            self._check_targets(adapted)
        shared = self._shared(adapted)
        for path, place in self.places.items():
            if path in adapted and self._can_be_folded(place) and shared is not None:
                self._module(place, shared)
        self._biases(adapted)
        reader = TableReader(self.config, self.tensors, self.places, self.base, self._read, self.warnings)
        self._tables = reader.tables()
        for projection in self._tables:
            path = reader.paths[projection]
            if path in adapted:
                self.tensors.problem("modules with both a delta and replaced rows, which is not served", path)
        idle = []
        for path, place in self.places.items():
            read = path in self._folded or self._has_vectors(place)
            if read and all(without_effect(self._pairs.get(m), self._vectors.get(m)) for m in place.modules):
                idle.append(path)
        self._check_effect(adapted, idle)

    def _check_fan_in(self) -> None:
        """``fan_in_fan_out`` says that the base's weights are stored as [in, out], as GPT-2's are and no other's."""
        says = self.config.fan_in_fan_out
        if says and not self.transposed:
            self.tensors.problem("fan_in_fan_out = true", FAN_IN)
        elif says is False and self.transposed:
            self.warnings.append(
                "fan_in_fan_out = false, on a base that stores its weights as [in, out]: taken as true, as PEFT does"
            )

    def _note_needs(self) -> None:
        if self.kind is not None and self.kind.needs_base:
            self.needs_base.append(f"the norms of a {self.kind.name}")
        if self.config.bias != "none" and self.tensors.biases:
            self.needs_base.append("the biases that were trained")
        if self._may_be_tied():
            self.needs_base.append("tables that the base may tie")

    def _may_be_tied(self) -> bool:
        """Whether a tied base gives the adapter another meaning."""
        if self.config.peft_type == "TRAINABLE_TOKENS" or "embed" in self.config.token_ids:
            return True
        return self.config.ensure_weight_tying and (bool(self.config.saved) or self.config.targets.names_a_table())

    def _ties_factors(self) -> bool:
        """Whether PEFT puts the embedding's factors, transposed, on the output layer too."""
        if self.base is None or not self.base.tied or self.config.saved:
            return False
        return self.config.ensure_weight_tying and self.config.targets.names_a_table()

    def _check_targets(self, adapted: frozenset[str]) -> None:
        problem = self.tensors.problem
        ambiguous: list[str] = []
        ties = self._ties_factors()
        for path in self.places:
            targeted = path in self.config.targets or (ties and path in self.table_paths)
            if path in adapted and (clash := self.config.ambiguous_alphas(path)):
                ambiguous.append(f"{path}: {clash[0]!r} counts, as in PEFT, and not {', '.join(map(repr, clash[1:]))}")
            if targeted and path not in adapted:
                problem("modules that the config targets and that have no tensors", path)
            if path in adapted and not targeted:
                problem("modules that have tensors and that the config does not target (PEFT would skip them)", path)
        if ambiguous:
            self.warnings.append(
                "alpha_pattern has patterns that overlap and disagree; PEFT sorts them when it saves, so training may "
                f"have used another one: {listed(ambiguous)}"
            )
        self._unmatched = self.config.targets.idle(self.places)
        if self._unmatched:
            self.warnings.append(f"target_modules that match no module of the base: {listed(self._unmatched)}")
        unknown = [path for path in self.config.kept or () if path not in adapted]
        for path in unknown:
            problem("modules of rank_pattern that have no tensors", path)
        if ties and set(self.table_paths) <= adapted:
            self._check_tied_factors()

    def _check_tied_factors(self) -> None:
        embed, head = (self.tensors.parts[path] for path in self.table_paths)
        for of_embed, of_head in (("lora_embedding_A", "lora_B.weight"), ("lora_embedding_B", "lora_A.weight")):
            one, other = embed.get(of_embed), head.get(of_head)
            if one is None or other is None or one.shape != other.shape[::-1]:
                continue  # reported with the shapes
            if one.dtype not in TORCH_DTYPES or other.dtype not in TORCH_DTYPES:
                continue
            if not np.array_equal(array(one.read(self.buffer)).T, array(other.read(self.buffer))):
                self.tensors.problem(
                    "ensure_weight_tying = true",
                    f"{other.name} is not the transpose of {one.name}, and the base ties them",
                )

    def _shared(self, adapted: frozenset[str]) -> dict[str, torch.Tensor] | None:
        """The tensors that all modules share; None if something is wrong with them."""
        if self.kind is None:
            return {}
        values: dict[str, torch.Tensor] = {}
        expected = self.kind.shared([place for path, place in self.places.items() if path in adapted])
        for name, shape in expected.items():
            entry = self.tensors.shared.get(name)
            if entry is None:
                self.tensors.problem("projections that are not in the file (save_projection)", name)
            elif (wrong := check_shape(entry, shape, self.config.r)) is not None:
                self.tensors.problem(_WRONG, wrong)
            elif (value := self._read(entry)) is not None:
                values[name] = value
        return values if len(values) == len(expected) else None

    def _can_be_folded(self, place: Place) -> bool:
        """Whether PEFT has such a delta at the module, of a rank that is served; else that is said."""
        if self.kind is None:
            return False
        if self.transposed and self.config.fan_in_fan_out is None:
            reason = f"PEFT has no {self.kind.name} on weights that are stored as [in, out]"
        else:
            reason = self.kind.accepts(place) or ""
        if reason:
            self.tensors.problem("modules that the adapter's kind does not have", f"{place.path}: {reason}")
            return False
        if (rank := self.kind.rank(place)) > MAX_RANK:
            self.tensors.problem(
                f"deltas of a rank above {MAX_RANK}, the highest that is served",
                f"{place.path} as a {self.kind.name} has the rank {rank}",
            )
            return False
        return True

    def _module(self, place: Place, shared: dict[str, torch.Tensor]) -> None:
        """Fold one module's tensors, or say what is wrong with them."""
        assert self.kind is not None
        problem = self.tensors.problem
        present = self.tensors.parts[place.path]
        expected = self.kind.parts(place)
        wrong = [f"{place.path} has no {part}" for part in expected if part not in present]
        values: dict[str, torch.Tensor] = {}
        for part, entry in present.items():
            if part not in expected:
                by = f" ({_ANNOUNCED_BY[part]} is not set)" if part in _ANNOUNCED_BY else ""
                problem("tensors that the config does not announce", f"{entry.name}{by}")
                continue
            if (item := check_shape(entry, expected[part], self.config.rank(place.path))) is not None:
                wrong.append(item)
            if (value := self._read(entry)) is not None:
                values[part] = value
        for item in wrong:
            problem(_WRONG, item)
        if wrong or len(values) < len(expected):
            return
        folded = self.kind.fold(place, values, shared, self.base)
        vectors = LoraVectors(folded.gain, folded.bias)
        if (reason := not_applicable(folded.pair, vectors)) is not None:
            problem("values that overflow", f"{place.path}: {reason}")
            return
        self._folded.add(place.path)
        for module, own in folded.split(place).items():
            if own.pair is not None:
                self._pairs[module] = own.pair
            if own.gain is not None or own.bias is not None:
                self._vectors[module] = LoraVectors(own.gain, own.bias)

    def _biases(self, adapted: frozenset[str]) -> None:
        changed = changed_biases(self.config, self.tensors, self.places.values(), adapted, self.base, self._read)
        for path, bias in changed.items():
            place = self.places[path]
            for module, part in zip(place.modules, place.split(tensor(bias)), strict=True):
                own = self._vectors.get(module, LoraVectors())
                assert part is not None
                whole = array(part) if own.bias is None else array(part) + array(own.bias)
                self._vectors[module] = LoraVectors(own.gain, tensor(whole))
        self._biased = bool(changed)

    def _check_effect(self, adapted: frozenset[str], idle: list[str]) -> None:
        if self._tables:
            return
        touched = len(adapted) + sum(
            1 for path, place in self.places.items() if path not in adapted and self._has_vectors(place)
        )
        if not touched and not self.tensors.tokens and not self.tensors.whole:
            self.tensors.problem("nothing to apply", f"{WEIGHTS_FILE} holds no tensor of any module of the base")
        elif touched and len(idle) == touched:
            self.tensors.problem("nothing to apply", "the delta is exactly zero in every module: was it ever trained?")
        elif idle:
            self.warnings.append(f"the delta is exactly zero in {listed(idle)}")

    def _has_vectors(self, place: Place) -> bool:
        return any(module in self._vectors for module in place.modules)

    def _read(self, entry: TensorEntry) -> torch.Tensor | None:
        """A tensor of the file, or None where its dtype or its values are a problem."""
        if entry.dtype not in TORCH_DTYPES:
            self.tensors.problem(_DTYPE, f"{entry.name} is {entry.dtype}")
            return None
        value = entry.read(self.buffer)
        if (bad := non_finite(value)) > 0:
            self.tensors.problem("values that are not finite", f"{bad} in {entry.name}")
            return None
        self._dtypes.add(str(value.dtype).removeprefix("torch."))
        return value
