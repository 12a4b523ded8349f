"""Writing a checkpoint that transformers (if NF4, bitsandbytes too) reads: config.json, sharded safetensors, index.

New directories appear whole or not at all.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from manylora.server.model.checkpoint import INDEX_FILE, SINGLE_FILE
from manylora.server.model.errors import ModelError, NotEnoughDisk

MAX_SHARD: Final = 2_000_000_000
"""Bytes per safetensors file; twice as much is in memory while one is written (safetensors serialises a copy)."""

_SPARE: Final = 64_000_000
"""Bytes of free disk asked for beside the weights: tokenizer files, headers, rounding."""


class ShardWriter:
    """Collects tensors and writes them out whenever a shard is full, so that only one shard is in memory."""

    def __init__(self, directory: Path, *, max_shard: int = MAX_SHARD) -> None:
        self._directory = directory
        self._max_shard = max_shard
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[tuple[Path, list[str]]] = []
        self._total = 0

    def add(self, group: Mapping[str, torch.Tensor]) -> None:
        """Add tensors that belong in one file (a weight and its scales: bitsandbytes' readers expect them together)."""
        size = sum(int(tensor.nbytes) for tensor in group.values())
        if self._pending and self._pending_bytes + size > self._max_shard:
            self._flush()
        self._pending |= {name: tensor.contiguous().cpu() for name, tensor in group.items()}
        self._pending_bytes += size
        self._total += size

    def finish(self) -> list[Path]:
        """Write what is pending, name the shards and write the index; returns the weight files."""
        if self._pending or not self._shards:
            self._flush()
        if len(self._shards) == 1:
            single = self._directory / SINGLE_FILE
            self._shards[0][0].rename(single)
            return [single]
        weight_map: dict[str, str] = {}
        files = []
        for number, (path, names) in enumerate(self._shards, start=1):
            file = path.rename(self._directory / f"model-{number:05d}-of-{len(self._shards):05d}.safetensors")
            files.append(file)
            weight_map |= dict.fromkeys(names, file.name)
        write_json(
            self._directory / INDEX_FILE,
            {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(weight_map.items()))},
        )
        return files

    def _flush(self) -> None:
        path = self._directory / f"part-{len(self._shards):05d}.safetensors"
        save_file(self._pending, path, metadata={"format": "pt"})
        self._shards.append((path, list(self._pending)))
        self._pending, self._pending_bytes = {}, 0


def write_groups(groups: Iterable[Mapping[str, torch.Tensor]], directory: Path, *, max_shard: int = MAX_SHARD) -> None:
    """Write all tensors into ``directory``; OSError when the disk refuses."""
    writer = ShardWriter(directory, max_shard=max_shard)
    try:
        for group in groups:
            writer.add(group)
        writer.finish()
    except SafetensorError as error:  # how safetensors reports a failed write, too
        raise OSError(f"writing to {directory} failed: {error}") from error


def check_new_directory(target: Path) -> None:
    """Raise ModelError if ``target`` is there already and is anything but an empty directory."""
    try:
        taken = target.exists() and (not target.is_dir() or any(target.iterdir()))
    except OSError as error:
        raise ModelError(f"{target} cannot be written: {error.strerror or error}.") from error
    if taken:
        raise ModelError(f"{target} exists already; name a new directory.")


@contextlib.contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """Gives a directory beside ``target`` to write into, which becomes ``target`` when the block ends without an error.

    However the block ends otherwise, an interrupt included, nothing is left. Raises ModelError for a ``target`` that
    exists and is not empty, or that the disk refuses (any OSError of the block).
    """
    check_new_directory(target)
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
        yield temporary
        mask = _umask()
        for file in temporary.iterdir():
            file.chmod(0o666 & ~mask)  # safetensors makes its files readable by their owner alone
        temporary.chmod(0o777 & ~mask)
        os.replace(temporary, target)
    except OSError as error:
        raise ModelError(f"{target} cannot be written: {error.strerror or error}.") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def check_disk(what: str, needed: int, directory: Path) -> None:
    """Raise NotEnoughDisk, with both numbers, if the disk of the existing ``directory`` has less than ``needed`` bytes
    and a reserve for tokenizer files, headers and rounding. ``what`` is what is to be written."""
    needed, free = needed + _SPARE, shutil.disk_usage(directory).free
    if needed > free:
        raise NotEnoughDisk(
            f"Writing {what} takes {needed / 1e9:.2f} GB, but {directory.parent} has {free / 1e9:.2f} GB free. "
            "Make room, or choose another place."
        )


def _umask() -> int:
    """The process's file mode mask, which mkdtemp ignores; it can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def quantization_config(*, nested: bool, dtype: str) -> dict[str, Any]:
    """What transformers' ``BitsAndBytesConfig`` writes into config.json for NF4 with a 16-bit head.

    Storage is what counts here; the compute type is advice to transformers (bf16, unless the source is fp16).
    """
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": ["lm_head"],
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": nested,
        "bnb_4bit_compute_dtype": "float16" if dtype == "float16" else "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
    }
