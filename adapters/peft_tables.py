"""Rows of the embedding and of the output layer that an adapter replaces: ``modules_to_save``, retrained tokens.

Which of the two tables a file's rows are for depends on whether the base ties them, as PEFT has it:

- ``trainable_token_indices`` of the embedding count for a tied output layer too, unless it has others of its own;
- the type TRAINABLE_TOKENS saves the rows of a tied output layer beside the embedding's: they are the same;
- ``modules_to_save`` replaces what it names, and with ``ensure_weight_tying`` both tables of a tied base.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch

from manylora.adapters.adapter_config import AdapterConfig
from manylora.adapters.base import BaseModel
from manylora.adapters.fp32 import equal, equal_but_for_rounding
from manylora.adapters.kinds.kind import Place
from manylora.adapters.peft_tensors import SortedTensors, check_table_shape
from manylora.adapters.safetensors_file import TensorEntry
from manylora.kernels.lora_weights import TableRows
from manylora.kernels.sites import GLOBAL_PROJECTIONS

Read = Callable[[TensorEntry], torch.Tensor | None]
"""A tensor of the file, or None where its dtype or its values were reported as a problem."""

COPIES = "copies of base weights that differ from the served base's"
_MISSING = "tables that the config names and that have no tensors"


class TableReader:
    """Finds the tables of one adapter; problems go to ``tensors``. ``base`` None: taken as not tied, none compared."""

    def __init__(
        self,
        config: AdapterConfig,
        tensors: SortedTensors,
        places: Mapping[str, Place],
        base: BaseModel | None,
        read: Read,
        warnings: list[str],
    ) -> None:
        self.config = config
        self.tensors = tensors
        self.places = {p.projection: p for p in places.values() if p.projection in GLOBAL_PROJECTIONS}
        self.paths = {projection: place.path for projection, place in self.places.items()}
        self.base = base
        self.tied = base is not None and base.tied
        self.read = read
        self.warnings = warnings

    def tables(self) -> dict[str, TableRows]:
        """The tables that have no problem, by projection."""
        whole = self._whole()
        tokens = self._tokens()
        for projection in sorted(whole.keys() & tokens.keys()):
            self.tensors.problem("tables replaced as a whole and by tokens at once", self.paths[projection])
        for path, entry in self.tensors.frozen.items():
            self._check_copy(path, entry, frozen=True)
        return {**tokens, **whole}

    def _whole(self) -> dict[str, TableRows]:
        saved = self.config.saved
        both = bool(saved) and self.config.ensure_weight_tying and self.tied
        expected = frozenset(self.paths) if both else saved
        result = {}
        for projection, path in self.paths.items():
            entry = self.tensors.whole.get(path)
            if entry is not None and projection not in expected:
                self._check_copy(path, entry, frozen=False)
            elif entry is None and projection in expected:
                self.tensors.problem(_MISSING, f"{path} of modules_to_save")
            elif entry is not None:
                if (wrong := check_table_shape(entry, self.places[projection])) is not None:
                    self.tensors.problem("replaced modules of the wrong shape", wrong)
                elif (rows := self.read(entry)) is not None:
                    result[projection] = TableRows(torch.arange(len(rows)), rows)
        if both and len(result) == 2:
            if not equal(result["embed"].rows, result["lm_head"].rows):
                self.tensors.problem(
                    "ensure_weight_tying = true", "embed_tokens and lm_head differ, and the base ties them"
                )
            result["lm_head"] = result["embed"]  # the same rows, in memory once
        return result

    def _tokens(self) -> dict[str, TableRows]:
        ids = dict(self.config.token_ids)
        only_tokens = self.config.peft_type == "TRAINABLE_TOKENS"
        if only_tokens:
            ids = {p: listed for p, listed in ids.items() if self.paths[p] in self.config.targets}
        # A tied output layer follows the embedding, unless it was given other tokens.
        follows = self.tied and "embed" in ids and (only_tokens or ids.get("lm_head", ids["embed"]) == ids["embed"])
        if self.tied and self.config.ensure_weight_tying and "embed" in ids and not follows:
            self.tensors.problem(
                "ensure_weight_tying = true",
                "trainable_token_indices differ between the two tables (PEFT refuses this)",
            )
        if follows and only_tokens:
            ids["lm_head"] = ids["embed"]
        elif follows:
            ids.pop("lm_head", None)
        result = {}
        for projection, listed in ids.items():
            if (rows := self._rows(projection, listed)) is not None:
                result[projection] = rows
        for projection, path in self.paths.items():
            if path in self.tensors.tokens and projection not in ids:
                self.tensors.problem(
                    "retrained tokens that the config does not announce", self.tensors.tokens[path].name
                )
        if follows and "embed" in result:
            if only_tokens and "lm_head" in result and not _equal(result["embed"], result["lm_head"]):
                self.tensors.problem("retrained tokens that differ between tied tables", self.paths["lm_head"])
            result["lm_head"] = result["embed"]
        return result

    def _rows(self, projection: str, ids: tuple[int, ...]) -> TableRows | None:
        place, path = self.places[projection], self.paths[projection]
        vocab, hidden = (place.n_in, place.n_out) if projection == "embed" else (place.n_out, place.n_in)
        entry = self.tensors.tokens.get(path)
        if entry is None:
            self.tensors.problem(_MISSING, f"{path} of trainable_token_indices")
            return None
        if entry.shape != (len(ids), hidden):
            wrong = f"{entry.name} has shape {list(entry.shape)}, expected {[len(ids), hidden]} ({len(ids)} token ids)"
            self.tensors.problem("tensors that are missing or have the wrong shape", wrong)
            return None
        if outside := [i for i in ids if not 0 <= i < vocab]:
            self.tensors.problem(
                "tokens that the base does not have (added tokens are not served)",
                f"{path} has the ids 0 to {vocab - 1}, and the config lists {outside[0]}",
            )
            return None
        if (rows := self.read(entry)) is None:
            return None
        order = np.argsort(np.array(ids, np.int64))
        by_id = torch.from_numpy(order)
        return TableRows(torch.tensor(ids, dtype=torch.int64)[by_id], rows[by_id])

    def _check_copy(self, path: str, entry: TensorEntry, *, frozen: bool) -> None:
        """PEFT saves whole embeddings beside what was trained, of which they are no part: they must be the base's."""
        projection = self.places["embed"].projection if path == self.paths["embed"] else "lm_head"
        if (wrong := check_table_shape(entry, self.places[projection])) is not None:
            self.tensors.problem(COPIES, wrong)
        elif self.base is None:
            if frozen:
                self.warnings.append(f"{entry.name} is a copy of a frozen base weight; it was not compared")
            else:
                self.tensors.problem("whole weights, which are not served unless equal to the base's", entry.name)
        # Saved in 16 bits of another kind, or in fp32 from before the server rounded its own: the same weights.
        elif (copy := self.read(entry)) is not None and (
            gap := equal_but_for_rounding(copy, self.base.table(projection))
        ):
            self.tensors.problem(COPIES, f"{entry.name} (largest difference {gap:.3g})")


def _equal(one: TableRows, other: TableRows) -> bool:
    return torch.equal(one.ids, other.ids) and equal(one.rows, other.rows)
