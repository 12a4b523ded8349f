"""``manylora plan``: what it says beside what a server that was built so really holds."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from manylora.kernels import cpu
from manylora.kernels.cuda import nf4_words
from manylora.kernels.sites import LAYER_PROJECTIONS
from manylora.server import cli
from manylora.server.bandwidth import measure_bandwidth
from manylora.server.config import ConfigError, EngineConfig, ServeConfig
from manylora.server.engine.request import Request, SamplingParams, ScheduledRow, StepPlan
from manylora.server.model.kv_cache import KVCache
from manylora.server.model.synthetic import synthetic_adapter, synthetic_nf4, synthetic_spec
from manylora.server.plan import as_json, readable
from manylora.server.plan_command import Wish, make_plan, serve_command
from manylora.server.serving import Running, build
from manylora.server.sizing import (
    Form,
    _linear_bytes,
    adapter_bytes,
    base_bytes,
    logits_bytes,
    page_bytes,
    table_bytes,
)
from tests.checkpoints import checkpoints

__all__ = ["checkpoints"]  # a fixture

MIB = 1 << 20
WITHIN = 0.05
"""What plan promises."""
SIZES: dict[str, Any] = {"device": "cpu", "max_rank": 32, "max_device_adapters": 3, "kv_memory": 2 * MIB}


def wish(model: Path | str, *, adapters: int | None = 3, memory: int | None = None, **sizes: Any) -> Wish:
    return Wish(str(model), EngineConfig(**{**SIZES, **sizes}), adapters, 16, memory, 20e9)


def tensor_bytes(value: Any) -> int:
    """Of all tensors that an object of this server holds, each once."""
    seen: dict[int, int] = {}

    def look(one: Any) -> None:
        if isinstance(one, torch.Tensor):
            storage = one.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
        elif isinstance(one, dict):
            for part in one.values():
                look(part)
        elif isinstance(one, (tuple, list)):
            for part in one:
                look(part)
        elif type(one).__module__.startswith("manylora."):
            look(vars(one))

    look(value)
    return sum(seen.values())


def built(model: Path, **sizes: Any) -> Running:
    return build(ServeConfig(model=str(model), engine=EngineConfig(**{**SIZES, **sizes})), progress=False)


@pytest.mark.parametrize(
    ("kernels", "arithmetic"), [("auto", "int16"), ("auto", "int8"), ("auto", "fp32"), ("torch", "int16")]
)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_server_holds_what_was_planned(
    family: str, kernels: str, arithmetic: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """The base, keys and values, and the pool, tensor by tensor, of a server that was really built."""
    if kernels == "auto" and not cpu.available():
        pytest.skip("no AVX2 and FMA here: auto is torch")
    asked = {"cpu_kernels": kernels, "cpu_arithmetic": arithmetic}
    planned = make_plan(wish(checkpoints[family], **asked))
    running = built(checkpoints[family], **asked)
    integers = kernels == "auto" and arithmetic != "fp32"
    assert planned.form.kv_dtype == (torch.int16 if integers else torch.float32)
    assert planned.sizes == replace(
        running.sizes, table_bytes=planned.sizes.table_bytes, host_memory=planned.sizes.host_memory
    )
    assert planned.form == running.plan.form
    found = planned.budget
    assert found.base == pytest.approx(tensor_bytes(running.decoder.weights), rel=WITHIN)
    assert found.kv == tensor_bytes(running.runner._cache.layers)
    # All but the page tables, ranks and scaling, which are a few numbers a slot and layer.
    held = tensor_bytes([running.pool.sites, running.pool.page_scales])
    assert found.slots == pytest.approx(held, rel=0.01)
    assert found.kv == running.plan.budget.kv <= SIZES["kv_memory"]
    kept = {site for layer in running.decoder.weights.layers for site in layer.exact}
    assert kept == ({"qkv", "gate_up", "down"} if arithmetic == "int8" else set())


def test_what_an_adapter_takes(checkpoints: dict[str, Path]) -> None:
    planned = make_plan(wish(checkpoints["llama"]))
    running = built(checkpoints["llama"])
    weights = synthetic_adapter(planned.spec.lora_shapes(), 16)
    assert sum(pair.nbytes for pair in weights.pairs.values()) == adapter_bytes(planned.spec, 16, 2)
    before = running.pool.nbytes
    running.pool.write(0, weights)
    assert running.pool.nbytes - before == page_bytes(planned.spec, planned.form, LAYER_PROJECTIONS)


def test_words_for_cuda_take_what_is_planned() -> None:
    """Packed on the CPU: the layout's bytes are the same there."""
    for n, k in ((128, 192), (320, 256)):
        weight = synthetic_nf4(n, k, torch.Generator().manual_seed(0))
        words = nf4_words.pack([weight], torch.bfloat16)
        assert _linear_bytes(n, k, 64, "words") == pytest.approx(words.nbytes, rel=WITHIN)


@pytest.mark.skipif(not cpu.available(), reason="no AVX2 and FMA here")
def test_scratch_of_the_largest_step(checkpoints: dict[str, Path]) -> None:
    """One step of as many tokens as one may have. Its blocks are of 4 MiB, so the step must be a large one."""
    running = built(checkpoints["llama"], max_batch_tokens=4096, kv_memory=64 * MIB)
    length = running.sizes.max_context
    rows = []
    for first in range(0, 4096, length):
        request = Request(str(first), [1] * length, SamplingParams())
        pages = KVCache.pages_for(length)
        request.pages = list(range(first // 16, first // 16 + pages))
        rows.append(ScheduledRow(request, 0, length))
    running.runner.execute(StepPlan(tuple(rows)))
    ops: Any = running.decoder.ops
    held = sum(block.nbytes for block in ops._scratch._blocks)
    planned = running.plan.budget.scratch
    assert 0.5 * planned <= held <= planned + 4 * MIB, (held, planned)


def test_the_floor_is_the_bytes_over_the_bandwidth(checkpoints: dict[str, Path]) -> None:
    planned = make_plan(wish(checkpoints["llama"]))
    steps = {(step.rows, step.adapters): step for step in planned.steps()}
    assert set(steps) == {(1, 0), (1, 1), (32, 0), (32, 3)}
    running = built(checkpoints["llama"])
    table = tensor_bytes(running.decoder.weights.embedding)
    matrices = running.decoder.nbytes - table
    per_request = planned.context * running.runner._cache.layers[0][0][0].nbytes * 2 * 2 // 16
    assert steps[1, 0].nbytes == pytest.approx(matrices + per_request, rel=WITHIN)
    each = page_bytes(planned.spec, planned.form, LAYER_PROJECTIONS)
    assert steps[32, 3].nbytes - steps[32, 0].nbytes == 3 * each
    for step in steps.values():
        assert step.floor_ms == pytest.approx(step.nbytes / 20e9 * 1e3)


@pytest.mark.skipif(not cpu.available(), reason="no AVX2 and FMA here")
@pytest.mark.parametrize(("width", "vocab"), [(96, 100), (576, 64), (40, 64)])
def test_logits_read_the_table_that_makes_them(width: int, vocab: int) -> None:
    """With 8 bits that is the copy alone; a width of no whole spans has none."""
    from manylora.kernels.cpu.ops import NumbaOps

    table, spec = torch.zeros(vocab, width, dtype=torch.bfloat16), synthetic_spec("llama-3.1-8b")
    spec = replace(spec, hidden_size=width, vocab_size=vocab, tie_embeddings=True)
    for arithmetic in ("int16", "int8"):
        ops = NumbaOps(arithmetic)
        packed = ops.prepare_embedding(table, head=True)
        if ops.exact_inputs and width != 40:
            packed = replace(ops.exactly(packed, torch.arange(8)), exact=None)  # which is next to nothing
        form = Form("cpu", torch.float32, torch.int16, torch.int16, "tiles", coded_head=ops.coded_head)
        assert table_bytes(spec, form)[-1] == packed.nbytes
        assert (packed.codes is not None) == (arithmetic == "int8" and width != 40)
        assert packed.tiles is not None
        copied = packed.codes is not None
        assert logits_bytes(spec, form) == packed.nbytes - (packed.tiles.nbytes if copied else 0)


def test_the_memorys_bandwidth_is_measured() -> None:
    found = measure_bandwidth(torch.device("cpu"))
    assert 0.5e9 < found.bytes_per_second < 2e12
    assert re.fullmatch(r"measured: \d+ threads? reading", found.source)


@pytest.mark.parametrize("arithmetic", ["int16", "int8", "fp32"])
def test_the_command_that_it_prints_gives_the_sizes_that_it_planned(
    arithmetic: str, checkpoints: dict[str, Path]
) -> None:
    asked = wish(checkpoints["qwen3"], memory=1 << 30, table_memory=MIB, cpu_arithmetic=arithmetic)
    planned = make_plan(asked)
    command = serve_command(planned, asked).split()
    assert command[:2] == ["manylora", "serve"]
    running = build(cli.serve_config(cli._parser().parse_args(command[1:])), progress=False)
    assert running.sizes == planned.sizes
    assert running.plan.budget == planned.budget
    assert running.plan.form == planned.form


def test_more_adapters_than_fit_are_told(checkpoints: dict[str, Path]) -> None:
    planned = make_plan(wish(checkpoints["llama"], adapters=1000, host_memory=2 * MIB))
    each = adapter_bytes(planned.spec, 16, 2)
    there = 2 * MIB // each
    assert planned.notes()[-1].endswith(
        f": 3 on the device at once, {there} in host memory; {1000 - there} are read from the disk again when they "
        "are used."
    )
    assert planned.resident == 3
    assert replace(planned, rank=32).resident == 3, "two pages each"
    assert replace(planned, rank=64).resident == 1, "six pages are there, and four are needed for each"


# --- what does not fit, and the command itself ------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_with_what_to_change(checkpoints: dict[str, Path]) -> None:
    model = checkpoints["llama"]
    with pytest.raises(ConfigError, match=r"^--memory: 512\.0 MiB is less than the .* that a server takes without"):
        make_plan(wish(model, memory=512 * MIB))
    many = {"max_device_adapters": 8000, "memory": 1 << 30}
    with pytest.raises(ConfigError, match=r"^--memory: the parts of llama need .* GiB more than 1\.00 GiB") as refused:
        make_plan(wish(model, **many))
    found = re.search(r"Lower --max-device-adapters to (\d+) \(now 8000\)", str(refused.value))
    assert found is not None, refused.value
    slots = int(found[1])
    assert slots > 0
    fewer = wish(model, **{**many, "max_device_adapters": slots})
    assert make_plan(fewer).budget.total() <= 1 << 30, "the advice is right"
    with pytest.raises(ConfigError, match=r"^--memory"):
        make_plan(wish(model, **{**many, "max_device_adapters": slots + 50}))


def test_a_gpu_can_be_planned_for_where_there_is_none(checkpoints: dict[str, Path]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ConfigError, match=r"^--memory: torch sees no CUDA device here"):
        make_plan(wish(checkpoints["llama"], device="cuda"))
    planned = make_plan(replace(wish(checkpoints["llama"], device="cuda", memory=24 << 30), bandwidth=None))
    assert (planned.form.layout, planned.form.dtype) == ("words", torch.bfloat16)
    assert planned.bandwidth is None
    assert readable(planned)[-1].startswith("decode floor: give --bandwidth")
    assert as_json(planned)["decode"]["bytes_per_second"] is None


def test_a_broken_checkpoint_is_refused_from_its_headers(
    checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in checkpoints["llama"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 256}))
    assert cli.main(["plan", "--model", str(tmp_path), "--device", "cpu"]) == 2
    assert "mlp.gate_proj.weight has shape [128, 64], the config says [256, 64]" in capsys.readouterr().err


def test_the_command_prints_the_table(checkpoints: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["plan", "--model", str(checkpoints["qwen2"]), "--adapters", "5", "--rank", "8", "--device", "cpu"]
    flags += ["--memory", "2GiB", "--bandwidth", "25GB/s"]
    assert cli.main(flags) == 0
    text = capsys.readouterr().out
    for part in ("base", "kv", "slots", "tables", "scratch", "host", "process", "total"):
        assert re.search(rf"^  {part} +[\d.]+ [KMG]iB", text, re.MULTILINE), part
    assert "decode floor at 25.0 GB/s (as given), 256 tokens a request, adapters of rank 8" in text
    assert "5 adapters of rank 8 on all projections" in text
    assert re.search(r"manylora serve --model .* --max-rank 8 ", text)
    assert cli.main([*flags, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bytes"]["total"] == sum(n for part, n in found["bytes"].items() if part != "total") <= 2 << 30
    assert found["sizes"]["max_rank"] == 8
    assert found["decode"]["steps"][0].keys() == {"rows", "adapters", "bytes", "floor_ms"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--rank 0", "--rank: expected 1 to 256, got 0"),
        ("--rank 64 --max-rank 16", "--rank: 64 is more than --max-rank 16"),
        ("--adapters -1", "--adapters: expected 0 or more, got -1"),
        ("--memory lots", "--memory: expected a size such as"),
        ("--bandwidth 0", "--bandwidth: expected more than nothing a second"),
        ("--context 0", "--context: expected 1 or more tokens"),
        ("--memory 100MiB", "--memory: 100.0 MiB is less than"),
    ],
)
def test_a_bad_flag_is_named(
    flags: str, message: str, checkpoints: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", "--model", str(checkpoints["llama"]), "--device", "cpu", *flags.split()]) == 2
    assert f"manylora: {message}" in capsys.readouterr().err


def test_a_large_model_in_numbers_known_elsewhere() -> None:
    """Llama-3.1-8B: 6.98e9 weights in NF4 at 4.127 bits (QLoRA, Dettmers et al. 2023, section 3), 1.05e9 at 16."""
    spec = synthetic_spec("llama-3.1-8b")
    form = Form("cuda", torch.bfloat16, torch.bfloat16, torch.bfloat16, "words")
    assert base_bytes(spec, form, max_context=8192) == pytest.approx(6.98e9 * 4.127 / 8 + 1.0507e9 * 2, rel=0.01)
