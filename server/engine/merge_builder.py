"""Makes merged models of the served base, and measures what merging changed. On an admin's thread, beside the step
loop; only what needs the operations' own memory is done on the step loop's thread, between steps."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import torch

from manylora.adapters.weights import AdapterWeights
from manylora.kernels.cpu import available as cpu_kernels_available
from manylora.kernels.lora import BatchedLora
from manylora.kernels.lora_pool import LoraPool
from manylora.kernels.lora_segments import LoraSegments
from manylora.kernels.lora_weights import LoraWeights
from manylora.kernels.ops import PagedSequences
from manylora.kernels.sites import RANK_PAGE
from manylora.server.engine.errors import MergeRefused
from manylora.server.engine.merges import Difference, Measured, MergedModel, MergeMode
from manylora.server.model.decoder import Decoder
from manylora.server.model.forward_batch import ForwardBatch
from manylora.server.model.kv_cache import KVCache
from manylora.server.model.merged import CannotMerge, MergeSize, merge_adapter, merge_size, own_bytes

logger = logging.getLogger(__name__)

PROBE_TOKENS: Final = 48
PROBE_TEXT: Final = (
    "The lighthouse keeper wrote down the weather twice a day: wind from the north-west, 14 knots, rain towards noon. "
    "In the evening he cooked lentils, mended a net and read aloud from a book about stars, although nobody listened."
)


class Between(Protocol):
    """``Engine.call``: runs a function on the step loop's thread, between two steps."""

    def __call__(self, function: Callable[[], Any], /) -> Future[Any]: ...


class MergeBuilder:
    """See ``merges.Builder``.

    Args:
        base: the served base, and the operations that it is computed with.
        between: runs a function between two steps.
        probe: token ids on which merged and unmerged logits are compared.
        warm_up: the calls to be made between steps before a merged model serves (``ModelRunner.merged_warm_up``).
    """

    def __init__(
        self,
        base: Decoder,
        between: Between,
        probe: Sequence[int],
        warm_up: Callable[[MergedModel], Sequence[Callable[[], None]]] = lambda _model: (),
    ) -> None:
        self._base, self._between, self._probe, self._warm_up = base, between, list(probe), warm_up
        self._stopped = threading.Event()

    def size(self, weights: AdapterWeights, mode: MergeMode) -> MergeSize:
        return merge_size(self._base, weights.lora, mode)

    def free_bytes(self) -> int:
        return free_bytes(self._base.ops.device)

    def build(self, weights: AdapterWeights, mode: MergeMode, name: str) -> tuple[Decoder, int]:
        """See ``merges.Builder``."""
        try:
            with _own_stream(self._base.ops.device), _own_thread():
                merged = merge_adapter(self._base, weights.lora, mode, what=name, proceed=self._proceed)
        except CannotMerge as error:
            raise MergeRefused(f"Adapter `{name}` cannot be merged in mode {mode}: {error}.") from error
        return Decoder(self._base.spec, merged, self._base.ops, None), own_bytes(merged, self._base.weights)

    def measure(self, decoder: Decoder, weights: AdapterWeights) -> Measured:
        """Logits of the probe by the merged weights, by the base with the adapter beside it and by the base alone: with
        pages and slots of their own, each between two steps, so that no step waits for all."""
        merged = self._between(lambda: self._logits(decoder, None)).result()
        pool = _pool_for(weights.lora, self._base)
        # The implementation for CUDA is compiled for the serving pool's sizes; this one would have to be anew.
        lora = BatchedLora(pool, "torch" if pool.device.type == "cuda" else "auto")
        adapted = Decoder(self._base.spec, self._base.weights, self._base.ops, lora)
        unmerged = self._between(lambda: self._logits(adapted, 0)).result()
        base = self._between(lambda: self._logits(self._base, None)).result()
        return Measured(drift=_difference(merged, unmerged), effect=_difference(unmerged, base))

    def warm_up(self, model: MergedModel) -> None:
        """See ``merges.Builder``."""
        for call in self._warm_up(model):
            self._between(call).result()

    def stop(self) -> None:
        """See ``merges.Builder``."""
        self._stopped.set()

    def _proceed(self) -> None:
        if self._stopped.is_set():
            raise CancelledError

    @torch.inference_mode()
    def _logits(self, decoder: Decoder, slot: int | None) -> torch.Tensor:
        """fp32 ``[probe, vocab]`` on the host. On the step loop's thread: it uses the operations' scratch memory."""
        device, count = decoder.ops.device, len(self._probe)
        pages = KVCache.pages_for(count)
        sequences = PagedSequences(
            starts=torch.tensor([0, count], dtype=torch.int32, device=device),
            contexts=torch.tensor([count], dtype=torch.int32, device=device),
            tables=torch.arange(pages, dtype=torch.int32, device=device)[None],
            positions=torch.arange(count, dtype=torch.int32, device=device),
            host_starts=(0, count),
        )
        segments = None
        if slot is not None:
            rows = np.arange(count, dtype=np.int32)
            scales, offsets = np.ones(count, np.float32), np.array([0, count], np.int32)
            segments = LoraSegments.from_arrays(rows, scales, [slot], offsets, device)
        batch = ForwardBatch(torch.tensor(self._probe, device=device), sequences, None, segments)
        return decoder.forward(batch, KVCache(decoder.spec, pages, decoder.ops)).cpu()


def _difference(left: torch.Tensor, right: torch.Tensor) -> Difference:
    difference = (left - right).abs_()
    return Difference(max=float(difference.max()), mean=float(difference.double().mean()))


def probe_tokens(encode: Callable[[str], Sequence[int]], *, vocabulary: int, limit: int) -> list[int]:
    """The token ids that drift is measured on: always the same text, at most ``limit`` of its first tokens, of those
    that the model has (a tokenizer may have more)."""
    known = [token for token in encode(PROBE_TEXT) if token < vocabulary]
    return known[: min(PROBE_TOKENS, limit)]


def _pool_for(weights: LoraWeights, base: Decoder) -> LoraPool:
    """One slot, as large as the adapter, which is in it."""
    shapes, ops = base.spec.lora_shapes(), base.ops
    rank = max(weights.max_rank, 1)
    pool = LoraPool(
        shapes, max_slots=1, max_pages=-(-rank // RANK_PAGE), max_rank=rank, dtype=ops.dtype, device=ops.device,
        vectors=bool(weights.vectors), table_bytes=1 << 62,
    )  # fmt: skip
    pool.write(0, weights)
    return pool


@contextlib.contextmanager
def _own_stream(device: torch.device) -> Iterator[None]:
    """On CUDA: a stream beside the step loop's, waited for at the end."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


def _own_thread() -> contextlib.AbstractContextManager[None]:
    """What torch computes here is computed on this thread alone, so that the step loop's keep their processors."""
    if not cpu_kernels_available():
        return contextlib.nullcontext()
    from manylora.kernels.cpu.threads import single_threaded  # numba, which need not be there

    return single_threaded()


def free_bytes(device: torch.device) -> int:
    """Bytes that can be had on the device now: what the driver has and torch holds unused; for the CPU, what the system
    can give without swapping, within the control group's limit."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    return min(_available_bytes(), _group_bytes())


def _available_bytes() -> int:
    """``MemAvailable``: caches that can be dropped count as free. Where there is no such file, free pages only."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return int(os.sysconf("SC_AVPHYS_PAGES")) * int(os.sysconf("SC_PAGE_SIZE"))


def _group_bytes(root: Path = Path("/sys/fs/cgroup")) -> int:
    """What the control group (version 2, as containers have it) leaves; no limit where there is none."""
    try:
        limit = (root / "memory.max").read_text(encoding="ascii").strip()
        used = int((root / "memory.current").read_text(encoding="ascii"))
        statistics = dict(line.split() for line in (root / "memory.stat").read_text(encoding="ascii").splitlines())
        # Counted as used, but given back when somebody needs it.
        return (1 << 62) if limit == "max" else int(limit) - used + int(statistics.get("inactive_file", 0))
    except (OSError, ValueError):
        return 1 << 62
