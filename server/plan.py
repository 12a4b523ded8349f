"""What a server will take and how fast it can be at best: the table that ``manylora plan`` prints, and ``serve`` logs.

All bytes come from ``sizing``, by which the server itself is built.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final

from manylora.kernels.ops import PAGE_SIZE
from manylora.kernels.sites import LAYER_PROJECTIONS, RANK_PAGE
from manylora.server.bandwidth import Bandwidth
from manylora.server.model.families import ModelSpec
from manylora.server.model.kv_cache import KVCache
from manylora.server.sizing import (
    Budget,
    Form,
    Sizes,
    adapter_bytes,
    budget,
    linear_bytes,
    logits_bytes,
    page_bytes,
)

_FILE_ITEMSIZE: Final = 2
"""Bytes of a value in an adapter's file; those saved in fp32 have twice that."""


@dataclass(frozen=True)
class Part:
    """A line of the budget."""

    name: str
    nbytes: int
    what: str


@dataclass(frozen=True)
class Step:
    """One decode step: ``nbytes`` must be read for it, which takes ``floor_ms`` at least (None: bandwidth unknown)."""

    rows: int
    adapters: int
    nbytes: int
    floor_ms: float | None


@dataclass(frozen=True)
class Plan:
    """``adapters`` of ``rank`` are to be served, by requests of ``context`` tokens; None: not said how many."""

    name: str
    spec: ModelSpec
    form: Form
    sizes: Sizes
    rank: int
    context: int
    adapters: int | None = None
    bandwidth: Bandwidth | None = None

    @property
    def budget(self) -> Budget:
        return budget(self.spec, self.form, self.sizes)

    @property
    def resident(self) -> int:
        """Adapters of ``rank`` that the device holds at once."""
        return min(self.sizes.max_slots, self.sizes.max_pages // self._pages_each)

    @property
    def in_host_memory(self) -> int:
        """Adapters of ``rank`` that host memory holds, saved in 16 bits."""
        return self.sizes.host_memory // adapter_bytes(self.spec, self.rank, _FILE_ITEMSIZE)

    @property
    def _pages_each(self) -> int:
        return -(-self.rank // RANK_PAGE)

    def parts(self) -> list[Part]:
        """The budget, line by line."""
        sizes, form, found = self.sizes, self.form, self.budget
        dtype, kv = (str(one).removeprefix("torch.") for one in (form.page_dtype, form.kv_dtype))
        held = {"fp32": "dequantised to fp32, as the CPU kernels cannot be used"}.get(form.layout, "NF4")
        return [
            Part("base", found.base, f"{held}; embedding and lm_head in 16 bits"),
            Part(
                "kv",
                found.kv,
                f"{sizes.kv_tokens:,} tokens of all requests, in {kv}; one may have {sizes.max_context:,}",
            ),
            Part("slots", found.slots, f"{sizes.max_slots} slots, {sizes.max_pages} pages of 16 ranks, in {dtype}"),
            Part("tables", found.tables, "rows of embedding and lm_head that adapters may replace"),
            Part(
                "scratch", found.scratch, f"a step of {sizes.max_batch_tokens} tokens, logits of {sizes.max_rows} rows"
            ),
            Part("host", found.host, f"copies of adapters: {self.in_host_memory:,} of rank {self.rank} in 16 bits"),
            Part("process", found.process, "Python, torch, tokenizer, compiled kernels (about)"),
        ]

    def steps(self) -> list[Step]:
        """Decode steps of one row and of all, without adapters and with as many as can be there."""
        rows = self.sizes.max_rows
        distinct = min(rows, self.resident, rows if self.adapters is None else self.adapters)
        cases = dict.fromkeys([(1, 0), (1, min(1, distinct)), (rows, 0), (rows, distinct)])
        return [self._step(*case) for case in cases]

    def _step(self, rows: int, adapters: int) -> Step:
        matrices = linear_bytes(self.spec, self.form) + logits_bytes(self.spec, self.form)
        per_adapter = self._pages_each * page_bytes(self.spec, self.form, LAYER_PROJECTIONS)
        per_token = KVCache.bytes_per_page(self.spec, self.form.kv_dtype) // PAGE_SIZE
        nbytes = matrices + adapters * per_adapter + rows * self.context * per_token
        return Step(rows, adapters, nbytes, self._floor_ms(nbytes))

    def _floor_ms(self, nbytes: int) -> float | None:
        return None if self.bandwidth is None else nbytes / self.bandwidth.bytes_per_second * 1e3

    def notes(self) -> list[str]:
        """What the numbers mean for the adapters that were named."""
        notes = []
        if self.form.on_cpu:
            notes.append("On a CPU the system commits kv and slots as they are first used.")
        if self.adapters is None:
            return notes
        each = adapter_bytes(self.spec, self.rank, _FILE_ITEMSIZE)
        found = f"{self.adapters:,} adapters of rank {self.rank} on all projections, {size_text(each)} each in 16 bits:"
        here, there = min(self.adapters, self.resident), min(self.adapters, self.in_host_memory)
        found += f" {here:,} on the device at once, {there:,} in host memory"
        beyond = self.adapters - there
        notes.append(f"{found}; {beyond:,} are read from the disk again when they are used." if beyond else f"{found}.")
        return notes


def readable(plan: Plan) -> list[str]:
    """The table, line by line."""
    parts = plan.parts()
    lines = [f"{plan.name} on {plan.form.device}: at most"]
    lines += [f"  {part.name:<8} {size_text(part.nbytes):>10}   {part.what}" for part in parts]
    lines.append(f"  {'total':<8} {size_text(sum(part.nbytes for part in parts)):>10}")
    lines += plan.notes()
    return lines + _readable_steps(plan)


def _readable_steps(plan: Plan) -> list[str]:
    known = plan.bandwidth
    if known is None:
        return ["decode floor: give --bandwidth, the device's own (such as 3350GB), as it cannot be measured here."]
    lines = [
        f"decode floor at {known.bytes_per_second / 1e9:.1f} GB/s ({known.source}), {plan.context} tokens a request, "
        f"adapters of rank {plan.rank}: what a step must read"
    ]
    for step in plan.steps():
        assert step.floor_ms is not None
        rows = f"{step.rows} row{'s' if step.rows > 1 else ''}"
        adapters = f"{step.adapters} adapter{'s' if step.adapters > 1 else ''}" if step.adapters else "base alone"
        floor = f"{step.floor_ms:8.2f} ms, at most {step.rows / step.floor_ms * 1e3:,.0f} tokens/s"
        lines.append(f"  {rows:<9} {adapters:<12} {size_text(step.nbytes):>10}   {floor}")
    return lines


def as_json(plan: Plan) -> dict[str, Any]:
    """For machines: bytes and milliseconds."""
    parts = plan.parts()
    known = plan.bandwidth
    return {
        "model": plan.name,
        "device": plan.form.device,
        "layout": plan.form.layout,
        "sizes": {**asdict(plan.sizes), "kv_tokens": plan.sizes.kv_tokens},
        "bytes": {part.name: part.nbytes for part in parts} | {"total": sum(part.nbytes for part in parts)},
        "adapters": {
            "count": plan.adapters,
            "rank": plan.rank,
            "bytes_each": adapter_bytes(plan.spec, plan.rank, _FILE_ITEMSIZE),
            "on_device": plan.resident,
            "in_host_memory": plan.in_host_memory,
        },
        "decode": {
            "context": plan.context,
            "bytes_per_second": None if known is None else round(known.bytes_per_second),
            "bandwidth": None if known is None else known.source,
            "steps": [
                {"rows": s.rows, "adapters": s.adapters, "bytes": s.nbytes, "floor_ms": s.floor_ms}
                for s in plan.steps()
            ],
        },
        "notes": plan.notes(),
    }


def size_text(nbytes: int) -> str:
    """Bytes for people."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB")):
        if nbytes >= unit:
            return f"{nbytes / unit:.2f} {name}" if unit > 1 << 20 else f"{nbytes / unit:.1f} {name}"
    return f"{nbytes / 1024:.1f} KiB"


def largest_slots(plan: Plan, over: int) -> int:
    """The most slots with which ``over`` bytes less would be needed; 0 if there is no such number."""
    each = plan.budget.slots // plan.sizes.max_slots
    return max(0, plan.sizes.max_slots - -(-over // each))
