"""Which operations a server computes with: the device's kernels if they fit the model and do what torch does."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from manylora.kernels import cpu
from manylora.kernels.lora import Implementation
from manylora.kernels.lora_page import INTEGERS
from manylora.kernels.nf4_code import NF4_CODE
from manylora.kernels.nf4_tensor import Nf4Tensor
from manylora.kernels.ops import PAGE_SIZE, Ops
from manylora.kernels.torch_ops import TorchOps
from manylora.server.config import ConfigError, CpuKernels, LoraDtype
from manylora.server.model.decoder_weights import attention_shape
from manylora.server.model.families import ModelSpec
from manylora.server.model.layout import projection_shapes
from manylora.server.model.progress import Progress
from manylora.server.model.weights import BaseWeights
from manylora.server.sizing import Layout

logger = logging.getLogger(__name__)

_FLAG = "--cpu-kernels"


@dataclass(frozen=True)
class ComputePath:
    """One way of computing for the whole server, so that a row has the same bits whichever step it is in."""

    ops: Ops
    lora: Implementation


def check_cpu_kernels(asked: CpuKernels) -> None:
    """Raises ConfigError if this machine cannot run the kernels that are asked for: before a model is loaded."""
    for variant in cpu.VARIANTS:
        if variant.name == asked and (reason := cpu.missing(variant)) is not None:
            raise ConfigError(_FLAG, f"{asked} cannot run here: {reason}; `auto` takes what can")


def choose_path(
    device: torch.device,
    asked: CpuKernels,
    spec: ModelSpec,
    weights: BaseWeights,
    *,
    arithmetic: cpu.Arithmetic = "int16",
    progress: bool = True,
) -> ComputePath:
    """The fastest operations that this device and these weights allow; the reason is logged where it is not obvious.

    Raises ConfigError if CPU kernels that were asked for by name cannot serve, or if CUDA's cannot compute the model.
    """
    if device.type == "cuda":
        return ComputePath(_cuda_ops(device, spec, weights), "auto")
    if asked == "torch":
        logger.info("%s torch: no CPU kernels.", _FLAG)
        return _torch_path(device, weights, "torch")
    check_cpu_kernels(asked)
    variant = cpu.best() if asked == "auto" else next(one for one in cpu.VARIANTS if one.name == asked)
    if variant is None:
        return _refused(device, weights, asked, "; ".join(f"{v.name}: {cpu.missing(v)}" for v in cpu.VARIANTS), "torch")
    cpu.choose(variant)
    reason = _unsuited(spec, weights.projections.values())
    if reason is not None:
        return _refused(device, weights, asked, f"they cannot compute this model: {reason}", "auto")
    ops, faults = _compiled_and_tested(variant, arithmetic, spec, weights, progress=progress)
    if ops is None:
        # What is wrong in one place may be wrong in others: nothing of them is used.
        return _refused(device, weights, asked, f"they do not compute what torch does here: {faults}", "torch")
    return ComputePath(ops, "auto")


def lora_dtype(
    asked: LoraDtype, device: str, computed: torch.dtype, arithmetic: cpu.Arithmetic | None = None
) -> torch.dtype:
    """What adapters' pages hold beside operations that compute in ``computed``, and that multiply the base in
    ``arithmetic`` if they are the CPU's kernels: adapters are then held in such integers, too, unless asked otherwise.
    Raises ConfigError for what their kernels cannot read."""
    if asked == "auto":
        return {"int16": torch.int16, "int8": torch.int8}.get(arithmetic or "", computed)
    dtype: torch.dtype = getattr(torch, asked)
    if dtype not in (computed, *((torch.bfloat16, *INTEGERS) if device == "cpu" else ())):
        name = str(computed).removeprefix("torch.")
        raise ConfigError("--lora-dtype", f"on {device} adapters are held in {name}, got {asked}")
    return dtype


def expected_layout(device: str, asked: CpuKernels, spec: ModelSpec, blocksizes: Mapping[str, int]) -> Layout:
    """How ``choose_path`` will have the base held, from shapes alone; a self-test that fails is not foreseen.

    Raises ConfigError for CPU kernels that were asked for by name and cannot serve.
    """
    if device != "cpu":
        return "words"
    if asked == "torch":
        return "fp32"
    check_cpu_kernels(asked)
    variant = cpu.best() if asked == "auto" else next(one for one in cpu.VARIANTS if one.name == asked)
    if variant is None:
        return "fp32"
    cpu.choose(variant)
    reason = _unsuited(spec, _without_bytes(spec, blocksizes))
    if reason is not None and asked != "auto":
        raise ConfigError(_FLAG, f"{asked}: they cannot compute this model: {reason}; `auto` or `torch` serve without")
    return "tiles" if reason is None else "fp32"


def _without_bytes(spec: ModelSpec, blocksizes: Mapping[str, int]) -> Iterator[Nf4Tensor]:
    """The base's weights, shapes only."""
    for name, (n, k) in projection_shapes(spec).items():
        block = blocksizes.get(name, 64)
        packed = torch.empty(n * k // 2, dtype=torch.uint8, device="meta")
        absmax = torch.empty(-(-n * k // block), device="meta")
        yield Nf4Tensor(packed, absmax, torch.tensor(NF4_CODE), (n, k), block)


def _cuda_ops(device: torch.device, spec: ModelSpec, weights: BaseWeights) -> Ops:
    # triton, which a CPU need not have
    from manylora.kernels.cuda import nf4_words
    from manylora.kernels.cuda.ops import CudaOps, unsupported_attention

    for layer in range(spec.n_layers):
        if (reason := unsupported_attention(attention_shape(spec, layer))) is not None:
            raise ConfigError("--device", f"cuda cannot compute this model: {reason}; `--device cpu` can")
    reasons = [r for r in map(nf4_words.unsupported, weights.projections.values()) if r is not None]
    if reasons:
        logger.warning(
            "%d of %d weights are dequantised at every step, which is slow: %s.",
            len(reasons),
            len(weights.projections),
            reasons[0],
        )
    return CudaOps(device, torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16)


def _refused(
    device: torch.device, weights: BaseWeights, asked: CpuKernels, reason: str, lora: Implementation
) -> ComputePath:
    if asked != "auto":
        raise ConfigError(_FLAG, f"{asked}: {reason}; `auto` or `torch` serve without")
    logger.warning("The CPU kernels are not used, which is slow: %s.", reason)
    return _torch_path(device, weights, lora)


def _torch_path(device: torch.device, weights: BaseWeights, lora: Implementation) -> ComputePath:
    n_bytes = sum(w.shape[0] * w.shape[1] for w in weights.projections.values()) * 4
    logger.warning("A dequantised fp32 copy of the base is kept: %d MiB.", n_bytes >> 20)
    return ComputePath(TorchOps(device, torch.float32, resident=True), lora)


def _unsuited(spec: ModelSpec, weights: Iterable[Nf4Tensor]) -> str | None:
    """Why the CPU kernels cannot compute with the model; None if they can."""
    from manylora.kernels.cpu.ops import unsupported  # numba, which need not be there

    if spec.head_dim % PAGE_SIZE:
        return f"its head size {spec.head_dim} is no multiple of {PAGE_SIZE}"
    return next((r for r in map(unsupported, weights) if r is not None), None)


def _compiled_and_tested(
    variant: cpu.Variant, arithmetic: cpu.Arithmetic, spec: ModelSpec, weights: BaseWeights, *, progress: bool
) -> tuple[Ops | None, str]:
    """The operations, every kernel of them compiled; or None and what is wrong with them."""
    from manylora.kernels.cpu import compiling
    from manylora.kernels.cpu.self_test import ModelShapes, self_test

    began = time.monotonic()
    try:
        with Progress(
            f"CPU kernels ({variant.name})", len(compiling.all_kernels()), show=progress, unit="kernel"
        ) as bar:
            n_compiled = compiling.compile_all(lambda: bar.advance(1))
        ops = variant.make_ops(arithmetic)
    except Exception as error:  # noqa: BLE001 - a compiler that fails, in whatever way, is a reason to do without
        return None, f"they cannot be compiled ({type(error).__name__}: {error})"
    compiled = time.monotonic()
    shapes = ModelShapes(
        spec.lora_shapes(),
        tuple(dict.fromkeys((w.shape[1], w.blocksize) for w in weights.projections.values())),
        tuple(dict.fromkeys(attention_shape(spec, layer) for layer in range(spec.n_layers))),
    )
    faults = self_test(ops, shapes, arithmetic)
    if faults:
        return None, "; ".join(map(str, faults))
    logger.info(
        "CPU kernels (%s, NF4 in %s): ready in %.1f s, %d of them compiled, the others from the cache; tested against "
        "torch in %.1f s",
        variant.name,
        arithmetic,
        compiled - began,
        n_compiled,
        time.monotonic() - compiled,
    )
    return ops, ""
