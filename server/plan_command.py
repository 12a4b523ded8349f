"""``manylora plan``: a server's memory and its decode floor, from a model's config and headers, with no weight read."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

import torch

from manylora.server.bandwidth import Bandwidth, measure_bandwidth
from manylora.server.config import ConfigError, EngineConfig
from manylora.server.device_ops import expected_layout, lora_dtype
from manylora.server.model.layout import check_plain, check_quantized, projection_shapes
from manylora.server.model.opened import OpenedModel
from manylora.server.model.resolve import open_model, resolve
from manylora.server.plan import Plan, largest_slots, size_text
from manylora.server.sizing import PROCESS_BYTES, Form, Room, choose_sizes, free_memory


@dataclass(frozen=True)
class Wish:
    """What is asked for. ``memory``: bytes of the device (of the machine, on a CPU) in all; None: what is free here."""

    model: str
    engine: EngineConfig
    adapters: int | None
    rank: int
    memory: int | None
    bandwidth: float | None
    """Bytes a second; None: measured, if the device is here."""
    context: int = 512


def make_plan(wish: Wish) -> Plan:
    """Raises ModelError for the model, ConfigError for what does not fit or cannot be."""
    if wish.engine.threads is not None:
        torch.set_num_threads(wish.engine.threads)
    found = resolve(wish.model)
    opened = open_model(found)
    spec = opened.spec
    device = _device(wish)
    blocksizes = _checked_blocksizes(opened)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    layout = expected_layout(device, wish.engine.cpu_kernels, spec, blocksizes)
    arithmetic = wish.engine.cpu_arithmetic if layout == "tiles" else None
    pages = lora_dtype(wish.engine.lora_dtype, device, dtype, arithmetic)
    kv = torch.int16 if arithmetic in ("int16", "int8") else dtype
    form = Form(device, dtype, kv, pages, layout, blocksizes, arithmetic == "int8")
    sizes = choose_sizes(wish.engine, spec, form, _room(wish, device))
    plan = Plan(
        found.name,
        spec,
        form,
        sizes,
        rank=wish.rank,
        context=min(wish.context, sizes.max_context),
        adapters=wish.adapters,
        bandwidth=_bandwidth(wish, device),
    )
    if wish.memory is not None:
        _check_fits(plan, wish.memory)
    return plan


def serve_command(plan: Plan, wish: Wish) -> str:
    """The command line of the server that was planned, its sizes written out."""
    engine, sizes = wish.engine, plan.sizes
    flags = ["--model", wish.model, "--device", plan.form.device]
    for flag, value, default in (
        ("--cpu-kernels", engine.cpu_kernels, "auto"),
        ("--cpu-arithmetic", engine.cpu_arithmetic, EngineConfig().cpu_arithmetic),
        ("--lora-dtype", engine.lora_dtype, "auto"),
        ("--max-rows", sizes.max_rows, None),
        ("--max-batch-tokens", sizes.max_batch_tokens, None),
        ("--max-context", sizes.max_context, None),
        ("--max-device-adapters", sizes.max_slots, None),
        ("--max-rank", sizes.max_rank, None),
        ("--kv-memory", plan.budget.kv, None),
        ("--table-memory", sizes.table_bytes, None),
        ("--host-memory", sizes.host_memory, None),
        ("--max-host-adapters", engine.max_host_adapters, None),
        ("--threads", engine.threads, None),
    ):
        if value is not None and value != default:
            flags += [flag, str(value)]
    return shlex.join(["manylora", "serve", *flags])


def _device(wish: Wish) -> str:
    """``cuda`` may be planned for where there is none, if its memory is given."""
    asked = wish.engine.device
    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if asked == "cuda" and not torch.cuda.is_available() and wish.memory is None:
        raise ConfigError("--memory", "torch sees no CUDA device here: say how much memory it has, such as 24GiB")
    return asked


def _checked_blocksizes(opened: OpenedModel) -> dict[str, int]:
    """Weights of one scale, of a checkpoint that is NF4 already; else nothing. Raises ModelError for tensors that are
    missing or of another shape, as loading it would."""
    infos = opened.source.infos
    found = {name: info.shape for name, info in infos.items()}
    if not opened.quantized:
        check_plain(opened.what, opened.spec, found)
        return {}
    check_quantized(opened.what, opened.spec, found)
    return {
        name: n * k // torch.Size(infos[f"{name}.absmax"].shape).numel()
        for name, (n, k) in projection_shapes(opened.spec).items()
    }


def _room(wish: Wish, device: str) -> Room:
    host = free_memory(torch.device("cpu"))
    if wish.memory is None:
        return Room(host if device == "cpu" else free_memory(torch.device(device)), host)
    if device != "cpu":
        return Room(wish.memory, host)
    rest = wish.memory - PROCESS_BYTES
    if rest <= 0:
        raise ConfigError(
            "--memory",
            f"{size_text(wish.memory)} is less than the {size_text(PROCESS_BYTES)} that a server takes without a model",
        )
    return Room(rest, rest)


def _bandwidth(wish: Wish, device: str) -> Bandwidth | None:
    if wish.bandwidth is not None:
        return Bandwidth(wish.bandwidth, "as given")
    if device == "cuda" and not torch.cuda.is_available():
        return None
    return measure_bandwidth(torch.device(device))


def _check_fits(plan: Plan, memory: int) -> None:
    """Raises ConfigError if the parts, all of them full, need more than ``memory``."""
    found = plan.budget
    needed = found.total() if plan.form.on_cpu else found.on_device()
    if needed <= memory:
        return
    sizes, host = plan.sizes, "" if not plan.form.on_cpu else f" or --host-memory (now {size_text(found.host)})"
    slots = largest_slots(plan, needed - memory)
    fewer = (
        f"--max-device-adapters to {slots} (now {sizes.max_slots})" if slots else "--max-rank, --max-device-adapters"
    )
    raise ConfigError(
        "--memory",
        f"the parts of {plan.name} need {size_text(needed)} when all are full, {size_text(needed - memory)} more than "
        f"{size_text(memory)}: base {size_text(found.base)}, kv {size_text(found.kv)}, slots {size_text(found.slots)}, "
        f"tables {size_text(found.tables)}. Lower {fewer}, --kv-memory{host}",
    )
