"""Breaks the CUDA kernels on purpose, one small fault at a time, and says which test notices.

    python -P tests/kernels/mutations.py [--only NAME] [--jobs 2] [--list] [--out FILE]

A mutation is a text of a source file, another to put in its place, and the few tests that ought to turn red. Each is
made in a private copy of the sources, which pytest then imports instead of the installed ones (checked in every run).
Before that the chosen tests must be green and complete on an unchanged copy. Exit status 1 if a mutation survives or
breaks more than it should, if a test fails without one, or if a text does not occur exactly once: then the source has
changed and the mutation wants to be written anew.

Without a GPU the kernels run in Triton's interpreter, which no fault of `ONLY_ON_A_GPU` can disturb.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("kernels", "server", "adapters", "tests", "bench", "pyproject.toml")
TIMEOUT_S = 60
GPU = Path("/dev/nvidiactl").exists()

Targets = tuple[str, ...]


@dataclass(frozen=True)
class Mutation:
    """``old`` occurs once in ``kernels/<file>``; ``targets`` are pytest's, under ``tests/kernels``."""

    name: str
    file: str
    old: str
    new: str
    targets: Targets
    why: str = ""
    """Of one that only a GPU can show."""


def _of(file: str, *tests: str) -> Targets:
    return tuple(f"tests/kernels/{file}.py::{test}" for test in tests)


WORDS = _of("test_nf4_words", "test_packing_loses_nothing", "test_the_permutes_look_up_every_code_at_every_place",
            "test_values_are_the_nearest_but_for_one")  # fmt: skip
OUTER = _of("test_cuda_more", "test_nested_scales_of_weights_with_many_outer_ones")
EXACT = _of("test_cuda_linear", "test_dequantised_weights_are_exact")
BASE = _of("test_cuda_linear", "test_base_matches_fp64[qkv-17-nested]", "test_base_matches_fp64[down-17-nested]")
WIDE = _of("test_cuda_linear", "test_base_matches_fp64[down-128-nested]")
SPLITS = _of("test_cuda_linear", "test_every_number_of_splits_is_right")
RESIDUAL = _of("test_cuda_linear", "test_the_residual_is_added_in_place")
LORA = _of("test_cuda_linear", *(f"test_adapters_match_fp64[{batch}]" for batch in
           ("qkv-17-unsorted", "down-33-composed", "gate_up-5-skewed_with_base_rows")))  # fmt: skip
BLOCKS = _of("test_cuda_linear", "test_adapters_match_fp64[qkv-17-identical]")
MANY = _of("test_cuda_linear", "test_many_rows_over_many_tiles_of_tokens")
OVERFLOW = _of("test_cuda_linear", "test_a_neighbours_overflow_stays_its_own")
UNWRITTEN = _of("test_cuda_linear", "test_pages_that_were_never_written_are_never_read")
VECTORS = _of("test_cuda_linear", "test_gain_and_bias_of_an_adapter")
COMPOSED = _of("test_cuda_more", "test_gains_of_composed_adapters_are_all_of_the_bases_product")
# Without the fused kernel, which would wait for ever for an entry that is never done.
ALONE = _of("test_lora", "test_matches_the_reference[qkv-uniform-triton]", "test_rank[64-triton]")
FILES = _of("test_cuda_more", "test_deltas_are_those_of_the_files")
EDGE = _of("test_cuda_more", "test_a_single_row_at_the_edge_of_a_tile_of_tokens")
STATIC = _of("test_cuda_more", "test_a_static_routing_follows_every_change_of_the_batch")
TWICE = _of("test_cuda_more", "test_a_slot_named_twice_for_a_row_has_the_sum_of_its_scales")
STALE = _of("test_cuda_more", "test_what_an_earlier_step_left_in_h_reaches_no_row")
HEAD = _of("test_cuda_more", "test_dense_linear_matches_fp64")
_WINDOWED = "[AttentionShape(n_heads=4, n_kv_heads=2, head_dim=64, window=20)-torch.float32]"
DECODE = _of("test_cuda_attention", "test_decode_of_more_tiles_than_shares",
             "test_decode_of_every_length_and_padding_rows" + _WINDOWED)  # fmt: skip
PREFILL = _of("test_cuda_attention", *(f"test_prefill_of_one_prompt[{n}]" for n in ("17-0", "65-0", "65-20")))
CHUNKS = _of("test_cuda_attention", "test_prefill_of_prompts_and_chunks"
             "[AttentionShape(n_heads=2, n_kv_heads=2, head_dim=32, window=0)-torch.float32]")  # fmt: skip
EPSILON = _of("test_cuda_elementwise", "test_rms_norm_adds_epsilon")
HEADS = _of("test_cuda_elementwise", "test_head_norm_in_place_of_a_column_slice")
ROPE = _of("test_cuda_elementwise", "test_rope_rotates_and_stores")
SILU = _of("test_cuda_elementwise", "test_silu_mul")
BOUNDARIES = _of("test_cuda_sampling", "test_boundaries_that_are_exact")
EDITS = _of("test_cuda_sampling", "test_edits_are_the_hosts_bit_for_bit",
            "test_edits_that_leave_nothing_and_edits_across_blocks")  # fmt: skip
SEARCH = _of("test_cuda_sampling", "test_the_general_search_gives_the_same[ties]",
             "test_the_general_search_gives_the_same[normal]")  # fmt: skip
TIES = _of("test_cuda_more", "test_ties_across_blocks_go_to_the_first_token")

M = Mutation
# fmt: off
MUTATIONS: tuple[Mutation, ...] = (
    # --- NF4: the layout, the look-up, the decoding -------------------------------------------------------------------
    M("packing: nibbles of a byte the other way round", "cuda/nf4_words.py",
      ">> 4 * (1 - b)) & 15", ">> 4 * b) & 15", WORDS),
    M("packing: j and b swapped in a word", "cuda/nf4_words.py",
      ".int() << 4 * (2 * j + b)", ".int() << 4 * (4 * b + j)", WORDS),
    M("packing: labels mapped the wrong way", "cuda/nf4_words.py",
      "torch.tensor(lookup.labels,", "torch.tensor(lookup.order,", WORDS),
    M("packing: outer scales of the second matrix misplaced", "cuda/nf4_words.py",
      "one.absmax.numel() * _NESTED_BLOCK", "one.codes.numel()", WORDS),
    M("packing: first block of a row not counted", "cuda/nf4_words.py",
      "dtype=torch.int32, device=device) * blocks", "dtype=torch.int32, device=device)", OUTER),
    M("look-up: a table byte without its sign term", "cuda/nf4_lookup.py",
      "value ^ (0xFF if first & 0x80 else 0)", "value", WORDS),
    M("look-up: zero stored as +0.0", "cuda/nf4_lookup.py",
      "[NF4_CODE.index(0.0)] = -0.0", "[NF4_CODE.index(0.0)] = 0.0", WORDS),
    M("look-up: bytes of the planes interleaved wrongly", "cuda/nf4_lookup.py",
      "0x7362", "0x6372", WORDS),
    M("decode: wrong shift for the odd nibble", "cuda/decode.py",
      "(4 * FIRST + 4)", "(4 * FIRST)", EXACT),
    M("decode: even and odd joined the other way round", "cuda/decode.py",
      "tl.join(b_even, b_odd).permute", "tl.join(b_odd, b_even).permute", EXACT),
    M("decode: j / 2 and j % 2 swapped in the permutation", "cuda/decode.py",
      "permute(0, 3, 4, 1, 2)", "permute(0, 4, 3, 1, 2)", EXACT),
    M("decode: nested scale without its offset", "cuda/decode.py",
      "return b_product + b_offset", "return b_product", EXACT),
    # --- the fused linear layer ---------------------------------------------------------------------------------------
    M("linear: scales of a later iteration one block on", "cuda/nf4_linear.py",
      "p_scale += NB", "p_scale += 1", BASE),
    M("linear: scales of a split begin at block 0", "cuda/nf4_linear.py",
      "p_scale = p_scales + b_n * n_blocks + begin", "p_scale = p_scales + b_n * n_blocks", SPLITS),
    M("linear: outer scale of the iteration's first block for all", "cuda/nf4_linear.py",
      "((b_first + i_block + j) >> 8), mask", "((b_first + i_block) >> 8), mask", BASE),
    M("linear: tail mask off by one block", "cuda/nf4_linear.py",
      "inside = i_block + j < end", "inside = i_block + j < end - 1", BASE),
    M("linear: a split ends one block early", "cuda/nf4_linear.py",
      "tl.minimum(begin + share, n_blocks)", "tl.minimum(begin + share - 1, n_blocks)", SPLITS),
    M("linear: the last split's plane not added", "cuda/nf4_linear.py",
      "tl.range(0, SPLITS, loop", "tl.range(0, SPLITS - 1, loop", SPLITS),
    M("linear: ticket never reset", "cuda/nf4_linear.py",
      "tl.store(p_tickets + i_ticket, 0)", "tl.debug_barrier()", SPLITS),
    M("linear: bias of the first tile for all", "cuda/nf4_linear.py",
      "tl.load(p_bias + b_n)", "tl.load(p_bias + b_n - i_n)", BASE),
    M("linear: residual dropped", "cuda/nf4_linear.py",
      "b_y += tl.load(p_old, mask", "tl.load(p_old, mask", RESIDUAL),
    M("linear: clamp of the last column off by one", "cuda/nf4_linear.py",
      "tl.arange(0, BN), N - 1)", "tl.arange(0, BN), N - 2)", BASE),
    M("linear: the last token not stored", "cuda/nf4_linear.py",
      "(b_tokens[None, :] < M)", "(b_tokens[None, :] < M - 1)", BASE),
    M("linear: one column too many stored", "cuda/nf4_linear.py",
      "(b_columns[:, None] < N)", "(b_columns[:, None] <= N)", BASE),
    M("linear: tile of tokens by another size", "cuda/nf4_linear.py",
      "i_program % m_tiles * BM", "i_program % m_tiles * 16", WIDE),
    # --- adapters in the epilogue -------------------------------------------------------------------------------------
    M("expand: the last segment dropped", "cuda/lora.py",
      "tl.range(begin, end, num_stages=1)", "tl.range(begin, end - 1, num_stages=1)", LORA),
    M("shrink: the last entry dropped", "cuda/lora.py",
      "range(worker, n_entries * n_shares, WORKERS)", "range(worker, (n_entries - 1) * n_shares, WORKERS)", ALONE),
    M("shrink: pages of A by slot, not from the table", "cuda/lora.py",
      "n_pages + page).to(tl.int64)", "n_pages + slot).to(tl.int64)", LORA),
    M("expand: the last piece's page skipped", "cuda/lora.py",
      "is_there = i_piece < end", "is_there = i_piece + 1 < end", LORA),
    M("expand: h read at the wrong rank", "cuda/lora.py",
      "column * 16 + b_ranks[:, None]", "column * 16 + (b_ranks[:, None] ^ 1)", LORA),
    M("shrink: shares of K end early", "cuda/lora.py",
      "tl.minimum((i_share + 1) * SHARE, K)", "tl.minimum((i_share + 1) * SHARE - BK, K)", LORA),
    M("shrink: tail of K off by one", "cuda/lora.py",
      "b_inside = b_k < K", "b_inside = b_k < K - 1", LORA),
    M("shrink: the last share's plane not added", "cuda/lora.py",
      "tl.range(0, n_shares, loop", "tl.range(0, n_shares - 1, loop", LORA),
    M("shrink: ticket never reset", "cuda/lora.py",
      "tl.store(p_tickets + i_entry, 0)", "tl.debug_barrier()", LORA),
    M("shrink: A of layer 0", "cuda/lora.py",
      "* n_layers + layer) * K * 16", "* n_layers) * K * 16", LORA),
    M("expand: B of layer 0", "cuda/lora.py",
      "p_page += layer.to(tl.int64) * 16 * width", "p_page += 0", LORA),
    M("shrink: scaling of layer 0", "cuda/lora.py",
      "(i_projection * n_slots + slot) * n_layers + layer)", "(i_projection * n_slots + slot) * n_layers)", FILES),
    M("shrink: the row's scale not applied", "cuda/lora.py",
      "b_h = b_h * (tl.load(p_scale_at + b_places, mask=b_live, other=0.0) * scaling)[:, None]",
      "b_h = b_h * scaling", LORA),
    M("expand: zero added to the rows of others", "cuda/lora.py",
      "b_y = tl.where(b_mine[None, :], b_y + b_delta, b_y)", "b_y = b_y + b_delta", OVERFLOW),
    M("expand: rows of any slot taken for this one's", "cuda/lora.py",
      "mask=b_m < M, other=-1) == slot", "mask=b_m < M, other=-1) >= 0", LORA),
    M("expand: every pair taken at the first level", "cuda/lora.py",
      "p_token = level * stride_level + b_m", "p_token = b_m", LORA),
    M("expand: a straddling tile without its last projection", "cuda/lora.py",
      "(last >= column_1).to(tl.int32)", "(i_n >= column_1).to(tl.int32)", LORA),
    M("expand: a straddling tile's columns all of one projection", "cuda/lora.py",
      "b_inside = (b_n >= start) & (b_n < stop) & (page >= 0)", "b_inside = (b_n >= start) & (page >= 0)", LORA),
    M("expand: pieces beginning in a tile's last row skipped", "cuda/lora.py",
      "(tl.load(p_piece + 5) < i_m + BM)", "(tl.load(p_piece + 5) < i_m + BM - 1)", EDGE),
    M("expand: pieces ending in a tile's first row skipped", "cuda/lora.py",
      "(tl.load(p_piece + 6) >= i_m)", "(tl.load(p_piece + 6) > i_m)", EDGE),
    M("expand: vectors added once per page", "cuda/lora.py",
      "& (tl.load(p_piece + 7) > 0)", "& (tl.load(p_piece + 7) >= 0)", VECTORS),
    M("expand: gain of what the adapter before left", "cuda/lora.py",
      "* b_base + b_bias", "* b_y + b_bias", COMPOSED),
    # --- work lists, pages, segments ----------------------------------------------------------------------------------
    M("routing: every pair at level 0", "lora_routing.py",
      "levels[order] = np.arange(len(rows)) - starts", "levels[order] = 0", LORA),
    M("routing: a last block of one pair dropped", "lora_routing.py",
      "range(bounds[s], bounds[s + 1], rows_per_block)", "range(bounds[s], bounds[s + 1] - 1, rows_per_block)", BLOCKS),
    M("routing: a projection's first piece left out of its bounds", "lora_routing.py",
      "piece_bounds = [0]", "piece_bounds = [1]", LORA),
    M("routing: base rows at slot 0", "lora_routing.py",
      "slot_at[:] = -1", "slot_at[:] = 0", STALE),
    M("routing: pages of the first segment's slot for all", "lora_routing.py",
      "held[s].get(projection, [])", "held[0].get(projection, [])", LORA),
    M("routing: vectors of slots that have none", "lora_routing.py",
      "has_vectors = projection in contents[s].vectors", "has_vectors = pool.vectors", VECTORS),
    M("routing: last row of a segment excluded", "lora_routing.py",
      "int(rows[levels == level].max())", "int(rows[levels == level].max()) - 1", EDGE),
    M("static routing: other scales are no change", "lora_routing.py",
      "segments.host_scales.tobytes(), ", "", STATIC),
    M("static routing: other bounds are no change", "lora_routing.py",
      ", segments.host_offsets.tobytes())", ")", STATIC),
    M("static routing: a slot's new adapter is no change", "lora_routing.py",
      "(bits, segments.slot_list, self._pool.version)", "(bits, segments.slot_list)", STATIC),
    M("pool: tail of a page of A not zeroed", "lora_pool.py",
      "        a[:, width:] = 0\n", "", UNWRITTEN),
    M("pool: tail of a page of B not zeroed", "lora_pool.py",
      "        b[width:] = 0\n", "", UNWRITTEN),
    M("pool: A reshaped where it should be transposed", "lora_pool.py",
      ".to(a.dtype).T", ".to(a.dtype).reshape(-1, width)", FILES),
    M("pool: every page holds the first 16 ranks of B", "lora_pool.py",
      "pair.b[:, first : first + width]", "pair.b[:, :width]", FILES),
    M("pool: a page taken by two adapters", "lora_pool.py",
      "[self._free[p].pop() for _ in range(n)]", "self._free[p][-n:]", FILES),
    M("segments: the last offset too small", "lora_segments.py",
      "[*slots, slots[-1] + 1]", "[*slots, slots[-1]]", LORA),
    M("segments: scales of a slot named twice not added", "lora_segments.py",
      "merged.get((slot, row), 0.0) + scale", "scale", TWICE),
    # --- lm_head ------------------------------------------------------------------------------------------------------
    M("lm_head: tail of K off by one", "cuda/dense_linear.py",
      "b_inside = k + b_k < K", "b_inside = k + b_k < K - 1", HEAD),
    M("lm_head: clamp of the last column off by one", "cuda/dense_linear.py",
      "tl.arange(0, BN), N - 1)", "tl.arange(0, BN), N - 2)", HEAD),
    M("lm_head: one token too many stored", "cuda/dense_linear.py",
      "(b_tokens[None, :] < M)", "(b_tokens[None, :] <= M)", HEAD),
    # --- attention ----------------------------------------------------------------------------------------------------
    M("attention: page numbers one position early", "cuda/attention.py",
      "p_table + b_j // PAGE", "p_table + (b_j + 1) // PAGE", PREFILL),
    M("attention: the last tile's page skipped", "cuda/attention.py",
      "for tile in range(first, last, BKV)", "for tile in range(first, last - PAGE, BKV)", PREFILL),
    M("attention: causal mask off by one", "cuda/attention.py",
      "(b_j[None, :] <= b_at[:, None])", "(b_j[None, :] < b_at[:, None])", PREFILL),
    M("attention: window off by one in prefill", "cuda/attention.py",
      "b_seen &= b_j[None, :] > b_at[:, None] - WINDOW", "b_seen &= b_j[None, :] >= b_at[:, None] - WINDOW", PREFILL),
    M("attention: window off by one in decode", "cuda/attention.py",
      "tl.maximum(context - WINDOW, 0)", "tl.maximum(context - WINDOW + 1, 0)", DECODE),
    M("attention: output not rescaled to a new maximum", "cuda/attention.py",
      "b_acc = b_acc * b_shrink[:, None]", "b_acc = b_acc * 1.0", DECODE),
    M("attention: merge of the shares without weights", "cuda/attention.py",
      "tl.exp2(b_top - b_max)", "tl.exp2(b_top - b_top)", DECODE),
    M("attention: merge without the last share", "cuda/attention.py",
      "for i in range(shares):\n                p_part = p_unit + i * (G * PLANE)\n",
      "for i in range(shares - 1):\n                p_part = p_unit + i * (G * PLANE)\n", DECODE),
    M("attention: semaphore never reset", "cuda/attention.py",
      "tl.store(p_semaphores + unit, 0)", "tl.debug_barrier()", DECODE),
    M("attention: query heads of a group interleaved", "cuda/attention.py",
      "((i_head * G + b_g) * D)[:, None]", "((b_g * KV_HEADS + i_head) * D)[:, None]", DECODE),
    M("attention: a chunk's tokens placed from its start", "cuda/attention.py",
      "tl.load(p_contexts + seq) - end", "0 - tl.load(p_starts + seq)", CHUNKS),
    # --- norms, rotary embedding, SwiGLU, embedding -------------------------------------------------------------------
    M("norm: epsilon left out", "cuda/elementwise.py",
      "/ D + epsilon)", "/ D)", EPSILON),
    M("norm: one head too many", "cuda/elementwise.py",
      "(b_head < heads)[:, None]", "(b_head <= heads)[:, None]", HEADS),
    M("rope: queries turned the wrong way", "cuda/elementwise.py",
      "b_left * b_cos[None, :] - b_right * b_sin[None, :]", "b_left * b_cos[None, :] + b_right * b_sin[None, :]", ROPE),
    M("rope: halves of the key swapped", "cuda/elementwise.py",
      "(b_right * b_cos + b_left * b_sin)", "(b_left * b_cos + b_right * b_sin)", ROPE),
    M("rope: wrong place in the page", "cuda/elementwise.py",
      "* PAGE + position % PAGE)", "* PAGE + (position + 1) % PAGE)", ROPE),
    M("SwiGLU: exponential of the wrong sign", "cuda/elementwise.py",
      "tl.where(b_gate < 0, b_small, 1.0)", "tl.where(b_gate < 0, 1.0, b_small)", SILU),
    # --- sampling -----------------------------------------------------------------------------------------------------
    M("sampling: a target that is just reached is not", "cuda/sampling_search.py",
      ">= target", "> target", BOUNDARIES),
    M("sampling: place among ties off by one", "cuda/sampling.py",
      "((target - 1 - w_high) // weight)", "((target - w_high) // weight)", BOUNDARIES),
    M("sampling: top_p rounded down", "cuda/sampling.py",
      "target += (target.to(tl.float64) < share).to(tl.int64)", "target += 0", BOUNDARIES),
    M("sampling: order of negative logits reversed", "cuda/sampling_search.py",
      "tl.where(b_bits >= 0, b_bits, b_bits ^ 0x7FFFFFFF)", "tl.where(b_bits >= 0, b_bits, b_bits ^ 0)", SEARCH),
    M("sampling: the bracket's lowest logits not gathered", "cuda/sampling_search.py",
      "b_in = (b_key >= low)", "b_in = (b_key > low)", BOUNDARIES),
    M("sampling: ties of earlier blocks forgotten", "cuda/sampling_search.py",
      "place -= tl.sum", "place += 0 * tl.sum", TIES),
    M("sampling: the last of equal maxima in a lane", "cuda/sampling_search.py",
      "b_more = b_x > b_best", "b_more = b_x >= b_best", TIES),
    M("sampling: edits penalise the wrong sign", "cuda/sampling.py",
      "tl.where(b_x > 0, tl.div_rn", "tl.where(b_x < 0, tl.div_rn", EDITS),
    M("sampling: a row's last edit not undone", "cuda/sampling.py",
      "    last = tl.load(p_offsets + i_row + 1)\n", "    last = tl.load(p_offsets + i_row + 1) - 1\n", EDITS),
)

ONLY_ON_A_GPU: tuple[Mutation, ...] = (
    M("decode: fast path joins neighbours", "cuda/decode.py",
      "tl.join(_halves(b_0, DTYPE), _halves(b_2, DTYPE))", "tl.join(_halves(b_0, DTYPE), _halves(b_1, DTYPE))", EXACT,
      "the interpreter has no inline PTX (test_nf4_words emulates it; what is done with its results is unseen)"),
    M("decode: nested scale rounded another way", "cuda/decode.py",
      '"mul.rn.f32 $0, $1, $2;"', '"mul.rz.f32 $0, $1, $2;"', EXACT, "the interpreter has no inline PTX"),
    M("linear: adapters added without waiting for the shrink", "cuda/nf4_linear.py",
      "while n_done < n_entries:", "while n_done < 0:", LORA,
      "the interpreter runs the programs one after the other: the shrink is always done"),
    M("linear: planes read before all were written", "cuda/nf4_linear.py",
      'i_ticket, 1, sem="acq_rel")', 'i_ticket, 1, sem="relaxed")', SPLITS,
      "the interpreter runs one program at a time, so memory has one order"),
    M("shrink: done before h is stored", "cuda/lora.py",
      'tl.atomic_add(p_done, 1, sem="release")', 'tl.atomic_add(p_done, 1, sem="relaxed")', LORA,
      "the interpreter runs one program at a time, so memory has one order"),
)
# fmt: on


@dataclass(frozen=True)
class Outcome:
    """``result``: caught, SURVIVED or crashed; ``test``: the first that failed, or what happened instead."""

    result: str
    test: str
    message: str
    seconds: float


GUARD = '''
"""Reports what the tests did, and whether all they imported was this copy's."""
import json, sys
from pathlib import Path

COPY = Path(__file__).resolve().parents[1]
seen = {"failed": [], "passed": 0, "skipped": 0}


def pytest_runtest_logreport(report):
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        seen["failed"].append([report.nodeid, crash.message if crash else str(report.longrepr)])
    elif report.skipped:
        seen["skipped"] += 1
    elif report.when == "call":
        seen["passed"] += 1


def pytest_sessionfinish(session):
    files = {n: getattr(m, "__file__", None) for n, m in list(sys.modules.items())
             if n.startswith(("manylora.", "tests."))}
    seen["imported"] = sum(f is not None for f in files.values())
    seen["strays"] = [n for n, f in files.items() if f and not Path(f).resolve().is_relative_to(COPY)]
    (COPY / "report.json").write_text(json.dumps(seen))
'''


LOADER = """
import json, os, sys
from pathlib import Path

if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
import numpy, pytest, torch, triton.language  # seconds, once for all runs

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        with open("output.txt", "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        status = pytest.main(json.loads(line))
        sys.stdout.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Copy:
    """A private copy of the sources, in which pytest imports ``manylora`` from the copy alone."""

    def __init__(self, folder: Path, jobs: int) -> None:
        self._folder = folder
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(ROOT / name, folder / name)
        package = folder / "imports" / "manylora"  # by folders under its names, as `make check` does for mypy
        package.mkdir(parents=True)
        for name in ("server", "kernels", "adapters"):
            (package / name).symlink_to(Path("../..") / name)
        (folder / "imports" / "mutation_guard.py").write_text(GUARD)
        environment = {
            "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs)),
            **os.environ,
            "PYTHONPATH": str(folder / "imports"),
            # Sources that change within a second keep the time stamp that byte code is compared by.
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        self._loader = subprocess.Popen(
            [sys.executable, "-P", "-c", LOADER],
            cwd=folder, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def close(self) -> None:
        self._loader.communicate()

    def pytest(self, targets: Sequence[str], *options: str) -> tuple[int, dict[str, Any], str]:
        """Exit status, the guard's report, the end of the output."""
        report = self._folder / "report.json"
        report.unlink(missing_ok=True)
        assert self._loader.stdin is not None
        assert self._loader.stdout is not None
        print(
            json.dumps(["-q", "-p", "no:cacheprovider", "-p", "mutation_guard", *options, *targets]),
            file=self._loader.stdin, flush=True,
        )  # fmt: skip
        status = int(self._loader.stdout.readline())
        seen = json.loads(report.read_text()) if report.exists() else {}
        if seen.get("strays") or (status in (0, 1) and not seen.get("imported")):
            raise SystemExit(f"not the copy's modules were imported: {seen.get('strays')}")
        return status, seen, (self._folder / "output.txt").read_text()[-2000:]

    def try_out(self, mutation: Mutation) -> Outcome:
        path = self._folder / "kernels" / mutation.file
        text = path.read_text(encoding="utf-8")
        start = time.monotonic()
        try:
            path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
            status, seen, output = self.pytest(mutation.targets, "-x", "-o", f"timeout={TIMEOUT_S}")
        finally:
            path.write_text(text, encoding="utf-8")
        seconds = time.monotonic() - start
        if status == 0 and seen["passed"]:
            return Outcome("SURVIVED", "", "", seconds)
        if status == 1 and seen.get("failed"):
            test, message = seen["failed"][0]
            # Code that cannot run at all says nothing about the tests, and a test that hangs not enough.
            broken = any(name in message for name in ("NameError", "SyntaxError", "AttributeError", "Timeout"))
            return Outcome("crashed" if broken else "caught", test.removeprefix("tests/"), message, seconds)
        return Outcome("crashed", f"pytest ended with {status}", output, seconds)


def misplaced(mutations: Sequence[Mutation]) -> list[str]:
    """What is wrong with the list itself."""
    found = []
    for one in mutations:
        count = (ROOT / "kernels" / one.file).read_text(encoding="utf-8").count(one.old)
        if count != 1:
            found.append(f"{one.name}: its text occurs {count} times in kernels/{one.file}: {one.old!r}")
        if one.old == one.new:
            found.append(f"{one.name}: changes nothing")
    names = [one.name for one in mutations]
    return found + [f"{name}: named twice" for name in sorted(set(names)) if names.count(name) > 1]


def unmutated(copies: Sequence[Copy], targets: Sequence[str]) -> list[str]:
    """Which targets are not green, or not all there, without any mutation."""
    shares = [targets[i :: len(copies)] for i in range(min(len(copies), len(targets)))]
    wrong = []
    with ThreadPoolExecutor(len(copies)) as pool:
        for status, seen, output in pool.map(lambda both: both[0].pytest(both[1]), zip(copies, shares, strict=False)):
            wrong += [f"{test}: {message.splitlines()[0]}" for test, message in seen.get("failed", [])]
            if seen.get("skipped"):
                wrong.append(f"{seen['skipped']} of the tests were skipped")
            if status not in (0, 1):
                wrong.append(f"pytest ended with {status}:\n{output}")
    return wrong


def table(rows: Sequence[tuple[Mutation, Outcome]]) -> str:
    lines = ["| mutation | file | result | the test that caught it | s |", "| --- | --- | --- | --- | --- |"]
    for one, outcome in rows:
        test = f"`{outcome.test}`" if outcome.test else ""
        lines.append(f"| {one.name} | `{one.file}` | {outcome.result} | {test} | {outcome.seconds:.0f} |")
    return "\n".join(lines)


def summary(rows: Sequence[tuple[Mutation, Outcome]]) -> str:
    counts = {result: sum(o.result == result for _, o in rows) for result in ("caught", "SURVIVED", "crashed")}
    return (
        f"{len(rows)} mutations: {counts['caught']} caught, {counts['SURVIVED']} survived, {counts['crashed']} crashed."
    )


def page(rows: Sequence[tuple[Mutation, Outcome]], on_gpu: Sequence[tuple[Mutation, Outcome]]) -> str:
    import triton

    where = "on a GPU" if GPU else "in its interpreter"
    parts = [
        "# Faults made on purpose, and the tests that notice\n",
        "Each line is one small fault in a kernel or in what feeds it, made in a private copy of the sources, with\n"
        "the first test that then failed. Files are under `kernels/`, tests under `tests/`. Made anew by\n",
        "    python -P tests/kernels/mutations.py --out docs/mutations.md\n",
        f"with Triton {triton.__version__}, {where}. {summary(rows)}\n",
        table(rows) + "\n",
        "## Only on a GPU\n",
        "What the interpreter cannot show, for the reason given; not counted above.\n",
    ]
    if on_gpu:
        parts.append(table(on_gpu) + "\n")
    else:
        lines = ["| mutation | file | why |", "| --- | --- | --- |"]
        parts.append(
            "\n".join([*lines, *(f"| {one.name} | `{one.file}` | {one.why} |" for one in ONLY_ON_A_GPU)]) + "\n"
        )
    return "\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="NAME", action="append", help="mutations whose name or file contains this")
    parser.add_argument("--jobs", type=int, default=2, help="copies that run side by side (default: 2)")
    parser.add_argument("--list", action="store_true", help="print the mutations and their tests, run nothing")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table there, in Markdown")
    options = parser.parse_args()

    def chosen(mutations: Sequence[Mutation]) -> list[Mutation]:
        names = options.only
        return [one for one in mutations if not names or any(name in one.name or name in one.file for name in names)]

    wrong = misplaced((*MUTATIONS, *ONLY_ON_A_GPU))
    if wrong:
        print("\n".join(wrong))
        return 1
    counted, uncounted = chosen(MUTATIONS), chosen(ONLY_ON_A_GPU) if GPU else []
    if options.list:
        for one in (*counted, *chosen(ONLY_ON_A_GPU)):
            print(f"{one.name} ({one.file}){': ' + one.why if one.why else ''}", *one.targets, sep="\n    ")
        return 0
    if not counted and not uncounted:
        parser.error("no mutation has such a name")
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder, contextlib.ExitStack() as cleanup:
        copies = [Copy(Path(folder).resolve() / str(i), options.jobs) for i in range(max(1, options.jobs))]
        cleanup.callback(lambda: [one_copy.close() for one_copy in copies])
        targets = sorted({target for one in (*counted, *uncounted) for target in one.targets})
        start = time.monotonic()
        wrong = unmutated(copies, targets)
        print(
            f"unchanged: {len(targets)} targets, {'RED' if wrong else 'green'}, {time.monotonic() - start:.0f} s",
            flush=True,
        )
        if wrong:
            print("\n".join(wrong))
            return 1
        free: queue.SimpleQueue[Copy] = queue.SimpleQueue()
        for one_copy in copies:
            free.put(one_copy)

        def try_out(one: Mutation) -> Outcome:
            copy = free.get()
            try:
                outcome = copy.try_out(one)
            finally:
                free.put(copy)
            message = " ".join(outcome.message.split())[:100]
            print(f"{outcome.result:8} {outcome.seconds:4.0f} s  {one.name}: {outcome.test}  [{message}]", flush=True)
            if outcome.result == "crashed":
                print(outcome.message, flush=True)
            return outcome

        with ThreadPoolExecutor(len(copies)) as pool:
            outcomes = list(pool.map(try_out, (*counted, *uncounted)))
    rows = list(zip(counted, outcomes, strict=False))
    on_gpu = list(zip(uncounted, outcomes[len(counted) :], strict=True))
    print(f"\n{table([*rows, *on_gpu])}\n\n{summary(rows)}")
    if options.out is not None:
        options.out.write_text(page(rows, on_gpu), encoding="utf-8")
    return int(any(outcome.result != "caught" for _, outcome in rows))


if __name__ == "__main__":
    raise SystemExit(main())
