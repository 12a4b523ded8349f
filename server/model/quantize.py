"""From a 16/32-bit model to NF4: tensor by tensor, into memory or into a checkpoint that transformers reads too."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from manylora.server.model.bnb_format import BLOCKSIZE, encode, quantize, torch_dtype
from manylora.server.model.checkpoint import FLOAT_TYPES
from manylora.server.model.errors import BadCheckpoint, ModelError, UnsupportedModel
from manylora.server.model.families import ModelSpec
from manylora.server.model.layout import (
    LM_HEAD,
    check_plain,
    embed_name,
    plain_shapes,
    projection_shapes,
    stored_weights,
)
from manylora.server.model.opened import OpenedModel
from manylora.server.model.progress import Progress
from manylora.server.model.resolve import open_model, resolve
from manylora.server.model.writer import (
    MAX_SHARD,
    check_disk,
    check_new_directory,
    new_directory,
    quantization_config,
    write_groups,
    write_json,
)


def estimated_bytes(spec: ModelSpec) -> int:
    """Bytes of the quantised checkpoint: 4 bits and an 8-bit scale per 64 for projections, the rest in full."""
    packed = sum(n * k for n, k in projection_shapes(spec).values())
    plain = sum(torch.Size(shape).numel() for shape in plain_shapes(spec).values())
    scales = packed // 64 + packed // 4096 + 2048 * len(projection_shapes(spec))
    return packed // 2 + scales + plain * torch_dtype(spec.dtype).itemsize


def check_unquantized(opened: OpenedModel) -> None:
    """Check that a 16/32-bit model holds the tensors its config says, in types that are read, before any is used.

    Raises BadCheckpoint or UnsupportedModel naming every tensor at fault. A head that is stored although the config
    ties it must be the embedding, or one of the two would be dropped.
    """
    source, spec = opened.source, opened.spec
    check_plain(opened.what, spec, {name: info.shape for name, info in source.infos.items()})
    names = [*plain_shapes(spec), *projection_shapes(spec)]
    odd = {f"{name} ({source.infos[name].dtype})" for name in names if source.infos[name].dtype not in FLOAT_TYPES}
    if odd:
        raise UnsupportedModel(opened.what, f"weights that are not {', '.join(FLOAT_TYPES)}: {', '.join(sorted(odd))}")
    if not spec.tie_embeddings or LM_HEAD not in source.infos:
        return
    embed = embed_name(spec)
    if source.infos[LM_HEAD].shape != source.infos[embed].shape or not torch.equal(
        source.get(LM_HEAD), source.get(embed)
    ):
        raise BadCheckpoint(
            opened.what,
            "its config ties lm_head to the embedding (`tie_word_embeddings`), but it holds another lm_head",
        )


def quantized_groups(
    opened: OpenedModel, *, nested: bool = True, device: torch.device | str = "cpu", progress: bool = True
) -> Iterator[dict[str, torch.Tensor]]:
    """The model's tensors as an NF4 checkpoint holds them, on the CPU; one weight and its scales at a time.

    Everything is first cast to the config's dtype, as transformers does when it loads the source; the projections are
    then quantised on ``device``. (One type throughout also matters to transformers when it reads the result: it takes
    the other tensors of a quantised checkpoint as they are, and fails where they mix.)

    Raises BadCheckpoint when tensors are missing, unexpected or misshapen, all of them named before the first is read,
    or not finite; UnsupportedModel when they cannot be quantised.
    """
    check_unquantized(opened)
    source, spec = opened.source, opened.spec
    shapes = projection_shapes(spec)
    names = [*plain_shapes(spec), *shapes]
    widths = {name: k for name, (_, k) in shapes.items() if k % BLOCKSIZE}
    if widths:
        raise UnsupportedModel(
            opened.what, f"its rows of {sorted(set(widths.values()))} are not whole NF4 blocks of 64"
        )
    transposed = {stored.weight for stored in stored_weights(spec) if stored.transposed}
    dtype = torch_dtype(spec.dtype)
    sizes = {name: torch.Size(source.infos[name].shape).numel() * 2 for name in names}
    with Progress("Quantising to NF4", sum(sizes.values()), show=progress) as bar:
        for name in names:
            tensor = source.get(name).to(dtype)
            if name in shapes:
                # bitsandbytes has every weight as [N, K], whichever way round its source is.
                tensor = tensor.T.contiguous() if name in transposed else tensor
                try:
                    weight = quantize(tensor.to(device), nested=nested)
                except ValueError as error:
                    raise BadCheckpoint(opened.what, f"{name} cannot be quantised: {error}") from error
                yield encode(name, weight.to("cpu"))
            else:
                if not bool(torch.isfinite(tensor).all()):
                    raise BadCheckpoint(opened.what, f"{name} holds values that are not finite")
                yield {name: tensor}
            bar.advance(sizes[name])


def write_checkpoint(
    opened: OpenedModel,
    directory: Path,
    *,
    nested: bool = True,
    device: torch.device | str = "cpu",
    progress: bool = True,
    max_shard: int = MAX_SHARD,
) -> None:
    """Write the NF4 checkpoint of ``opened`` into the existing ``directory``: weights, configs and tokenizer.

    Raises OSError when the disk refuses, NotEnoughDisk before anything is quantised when it will.
    """
    check_disk(f"{opened.what} in NF4", estimated_bytes(opened.spec), directory)
    groups = quantized_groups(opened, nested=nested, device=device, progress=progress)
    write_groups(groups, directory, max_shard=max_shard)
    opened.save_tokenizer(directory)
    if opened.generation_config:
        write_json(directory / "generation_config.json", opened.generation_config)
    quantization = quantization_config(nested=nested, dtype=opened.spec.dtype)
    write_json(directory / "config.json", {**opened.config, "quantization_config": quantization})


def quantize_checkpoint(
    src: str,
    dst: str | os.PathLike[str],
    *,
    nested: bool = True,
    device: torch.device | str = "cpu",
    progress: bool = True,
    max_shard: int = MAX_SHARD,
) -> Path:
    """Quantise the model ``src`` (directory, GGUF file or hub id) into the new directory ``dst``; returns it.

    The result appears whole or not at all, and loads with transformers and bitsandbytes as well as here. Raises
    ModelError when ``src`` cannot be used, ``dst`` exists already, or the disk is full.
    """
    target = Path(dst).expanduser()
    check_new_directory(target)
    opened = open_model(resolve(src))
    if opened.quantized:
        raise ModelError(f"{opened.what} is quantised to NF4 already; serve it as it is.")
    opened.tokenizer()  # a checkpoint that cannot be served is not worth the wait
    with new_directory(target) as temporary:
        write_checkpoint(opened, temporary, nested=nested, device=device, progress=progress, max_shard=max_shard)
    return target
