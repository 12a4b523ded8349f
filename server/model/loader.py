"""Loading the base model: from whatever the user names to NF4 weights in memory, by way of the cache."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from manylora.server.model.cache import BaseCache, default_cache_dir
from manylora.server.model.checkpoint import MemorySource
from manylora.server.model.digest import digest_files
from manylora.server.model.errors import ModelError
from manylora.server.model.families import ModelSpec
from manylora.server.model.opened import DirectoryModel, OpenedModel
from manylora.server.model.quantize import quantize_checkpoint, quantized_groups, write_checkpoint
from manylora.server.model.reader import read_weights
from manylora.server.model.resolve import open_model, resolve
from manylora.server.model.tokenizer import Tokenizer
from manylora.server.model.weights import BaseWeights

__all__ = ["BaseWeights", "LoadedBase", "load_base", "quantize_checkpoint"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedBase:
    """A base model ready to serve.

    ``digest`` is the sha256 (hex) over the source's config, tokenizer and weight files: the base's identity wherever
    results are cached. ``name`` is what requests call it; ``source`` where its files are.
    """

    spec: ModelSpec
    weights: BaseWeights
    tokenizer: Tokenizer
    digest: str
    name: str
    source: Path


def load_base(
    model: str,
    *,
    cache_dir: Path | None = None,
    device: torch.device | str = "cpu",
    progress: bool = True,
    served_name: str | None = None,
) -> LoadedBase:
    """Load ``model``: a checkpoint directory, a GGUF file, or a hub id, in 16/32 bits or in bitsandbytes' NF4.

    A 16/32-bit model is quantised to NF4 (blocks of 64, nested scales) while it is read, and the result kept in
    ``cache_dir`` (default `default_cache_dir`). ``device`` is where it is quantised and where the weights end up.
    Raises ModelError with one message that says which file is at fault and what to do.
    """
    found = resolve(model)
    cache = BaseCache(cache_dir or default_cache_dir())
    # A directory's config is read first, so that an unsupported model is refused before gigabytes are hashed. A GGUF
    # file's takes seconds to read, and is not needed once it is cached.
    opened = open_model(found) if found.kind == "directory" else None
    files = opened.files() if isinstance(opened, DirectoryModel) else {"model.gguf": found.path}
    digest = digest_files(files, remember=cache.hashes, progress=progress)

    loaded: tuple[OpenedModel, BaseWeights, Tokenizer] | None = None
    if opened is not None and opened.quantized:
        loaded = _read(opened, device, progress)
    else:
        entry = cache.find(digest)
        if entry is not None:
            loaded = _read_entry(cache, digest, entry, device, progress)
    if loaded is None:
        loaded = _quantize(opened or open_model(found), cache, digest, device, progress)
    model_, weights, tokenizer = loaded
    if tokenizer.vocab_size > model_.spec.vocab_size:
        logger.warning(
            "The tokenizer has %d ids, the model embeds %d: prompts with the ids beyond are refused.",
            tokenizer.vocab_size,
            model_.spec.vocab_size,
        )
    return LoadedBase(
        spec=model_.spec,
        weights=weights,
        tokenizer=tokenizer,
        digest=digest,
        name=served_name or found.name,
        source=found.path,
    )


def _read(
    opened: OpenedModel, device: torch.device | str, progress: bool
) -> tuple[OpenedModel, BaseWeights, Tokenizer]:
    tokenizer = opened.tokenizer()
    return opened, read_weights(opened.source, opened.spec, device=device, progress=progress), tokenizer


def _read_entry(
    cache: BaseCache, digest: str, entry: Path, device: torch.device | str, progress: bool
) -> tuple[OpenedModel, BaseWeights, Tokenizer] | None:
    """Read a cached entry; one that turns out broken is dropped, and None returned."""
    try:
        loaded = _read(DirectoryModel(entry), device, progress)
    except ModelError as error:
        cache.discard(digest, str(error))
        return None
    logger.info("The quantised base comes from the cache, %s.", entry)
    return loaded


def _quantize(
    opened: OpenedModel, cache: BaseCache, digest: str, device: torch.device | str, progress: bool
) -> tuple[OpenedModel, BaseWeights, Tokenizer]:
    """Quantise into the cache and read that back; where the cache cannot be written, into memory."""
    tokenizer = opened.tokenizer()  # before the long part: its faults should not cost the user the wait

    def write(directory: Path) -> None:
        write_checkpoint(opened, directory, device=device, progress=progress)

    entry = cache.fill(digest, write)
    if entry is not None:
        loaded = _read_entry(cache, digest, entry, device, progress)
        if loaded is not None:
            return loaded
    tensors: dict[str, torch.Tensor] = {}
    for group in quantized_groups(opened, device=device, progress=progress):
        tensors |= group
    source = MemorySource(opened.what, tensors)
    return opened, read_weights(source, opened.spec, device=device, progress=progress), tokenizer
