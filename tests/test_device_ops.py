"""Which operations a server computes with: by the flag, by the processor, and by what the self-test finds."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from numba.core import event

from manylora.kernels import cpu
from manylora.kernels.torch_ops import TorchOps
from manylora.server.config import ConfigError, CpuKernels, EngineConfig, ServeConfig
from manylora.server.device_ops import ComputePath, check_cpu_kernels, choose_path, lora_dtype
from manylora.server.engine.request import Request, SamplingParams
from manylora.server.model.synthetic import synthetic_base, synthetic_spec
from manylora.server.serving import Running, build
from tests.checkpoints import checkpoints

__all__ = ["checkpoints"]  # a fixture

CPU = torch.device("cpu")
needs_avx2 = pytest.mark.skipif(not cpu.available(), reason="no AVX2 and FMA here")
FASTEST: Any = getattr(cpu.best(), "name", "avx2")
"""The variant that ``auto`` is here. A process has one, so others are tested in ``kernels/test_cpu_variants.py``."""


def chosen(asked: CpuKernels = "auto", **changes: Any) -> ComputePath:
    spec = synthetic_spec("tiny", **changes)
    return choose_path(CPU, asked, spec, synthetic_base(spec), progress=False)


def test_the_flag_knows_every_variant() -> None:
    assert set(get_args(CpuKernels)) == {"auto", "torch", *(variant.name for variant in cpu.VARIANTS)}


@needs_avx2
@pytest.mark.parametrize("asked", ["auto", FASTEST])
def test_kernels_that_run_and_are_right_are_taken(asked: CpuKernels, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    path = chosen(asked)
    assert (path.ops.name, path.lora) == ("numba", "auto")
    assert f"CPU kernels ({FASTEST}, NF4 in int16): ready in" in caplog.text
    assert cpu.in_use().name == FASTEST
    assert "tested against torch in" in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


GEMMA2: dict[str, Any] = {
    "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "hidden_act": "gelu_pytorch_tanh", "head_dim": 32,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"query_pre_attn_scalar": 32}, "no cap on attention scores"),
        ({"query_pre_attn_scalar": 24, "attn_logit_softcapping": None}, "scale attention scores by head_dim"),
    ],
)
def test_what_the_cuda_kernels_cannot_compute_is_refused_at_load(changes: dict[str, Any], reason: str) -> None:
    """Before anything is asked of a device: this runs without one."""
    pytest.importorskip("triton")
    spec = synthetic_spec("tiny", **GEMMA2, **changes)
    with pytest.raises(ConfigError, match=f"--device: cuda cannot compute this model: .*{reason}"):
        choose_path(torch.device("cuda"), "auto", spec, synthetic_base(spec), progress=False)


def test_torch_can_be_asked_for() -> None:
    path = chosen("torch")
    assert isinstance(path.ops, TorchOps)
    assert path.lora == "torch", "adapters too"


@needs_avx2
@pytest.mark.parametrize(
    ("kernel", "named"),
    [
        ("_attend_kernel", "attention"),
        ("_nf4_kernel", "NF4 linear of 128 inputs"),
        ("_expand_kernel", "adapters at `down`"),
        ("_silu_mul_kernel", "SiLU"),
    ],
)
def test_wrong_kernels_are_not_used_at_all(
    kernel: str, named: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from numba import cfunc

    from manylora.kernels.cpu import compiling

    @cfunc(compiling.KERNEL)
    def nothing(arguments, part, parts):  # type: ignore[no-untyped-def]
        pass

    one = next(one for one in compiling.all_kernels() if one.name == kernel)
    monkeypatch.setitem(one.__dict__, "address", nothing.address)
    path = chosen()
    assert isinstance(path.ops, TorchOps)
    assert path.lora == "torch"
    warning = next(record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    assert "do not compute what torch does here" in warning
    assert named in warning
    with pytest.raises(ConfigError, match=f"^--cpu-kernels: {FASTEST}: they do not compute what torch does.*differ"):
        chosen(FASTEST)


@needs_avx2
def test_kernels_that_cannot_be_compiled_are_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from manylora.kernels.cpu import compiling

    def fail(each: Any) -> int:
        raise OSError("no space left on device")

    monkeypatch.setattr(compiling, "compile_all", fail)
    assert isinstance(chosen().ops, TorchOps)
    assert "they cannot be compiled (OSError: no space left on device)" in caplog.text


@pytest.mark.parametrize("lacking", ["avx2", "fma"])
def test_a_processor_without_the_features(
    lacking: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cpu, "_host_features", lambda: frozenset({"avx2", "fma"}) - {lacking})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(ConfigError, match=f"^--cpu-kernels: avx2 cannot run here: this processor has no {lacking}"):
        check_cpu_kernels("avx2")
    path = chosen()
    assert isinstance(path.ops, TorchOps)
    assert f"this processor has no {lacking}" in caplog.text
    check_cpu_kernels("auto")
    check_cpu_kernels("torch")


WIDE = frozenset({"avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl"})


def test_the_widest_vectors_that_the_processor_has(monkeypatch: pytest.MonkeyPatch) -> None:
    def best_with(features: frozenset[str]) -> str | None:
        monkeypatch.setattr(cpu, "_host_features", lambda: features)
        return getattr(cpu.best(), "name", None)

    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert best_with(WIDE) == "avx512"
    for one in sorted(WIDE):
        assert best_with(WIDE - {one}) == (None if one in ("avx2", "fma") else "avx2")


def test_kernels_that_are_too_wide_for_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_host_features", lambda: frozenset({"avx2", "fma", "avx512f"}))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    lacking = "this processor has no avx512bw and no avx512dq and no avx512vl"
    with pytest.raises(ConfigError, match=f"^--cpu-kernels: avx512 cannot run here: {lacking}; `auto` takes what can"):
        chosen("avx512")


def test_a_process_has_one_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    wide, narrow = cpu.VARIANTS
    monkeypatch.setattr(cpu, "_in_use", None)
    monkeypatch.setattr(cpu, "_host_features", lambda: WIDE)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert cpu.in_use() is wide, "the fastest, unless one was chosen"
    with pytest.raises(RuntimeError, match="the CPU kernels of this process are avx512's already, not avx2's"):
        cpu.choose(narrow)
    monkeypatch.setattr(cpu, "_in_use", None)
    cpu.choose(narrow)
    cpu.choose(narrow)
    assert cpu.in_use() is narrow, "though others would run, too"
    monkeypatch.setattr(cpu, "_in_use", None)
    monkeypatch.setattr(cpu, "_host_features", frozenset)
    with pytest.raises(RuntimeError, match=r"no CPU kernels avx512: .*no avx512f.*; no CPU kernels avx2: .*no avx2"):
        cpu.in_use()


def test_what_was_asked_for_is_what_the_kernels_are_made_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before they are imported: also where a wider variant could run."""
    made: list[cpu.Variant] = []

    def choose(variant: cpu.Variant) -> None:
        made.append(variant)
        raise OSError("far enough")

    monkeypatch.setattr(cpu, "_host_features", lambda: WIDE)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(cpu, "choose", choose)
    for asked in ("avx2", "avx512", "auto"):
        with pytest.raises(OSError, match="far enough"):
            chosen(asked)  # type: ignore[arg-type]
    assert [one.name for one in made] == ["avx2", "avx512", "avx512"]


def test_an_installation_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not cpu.available()
    with pytest.raises(ConfigError, match="numba is not installed"):
        check_cpu_kernels("avx2")


@needs_avx2
def test_a_model_that_the_kernels_cannot_compute(caplog: pytest.LogCaptureFixture) -> None:
    odd = {"hidden_size": 96, "num_attention_heads": 4, "head_dim": 24, "intermediate_size": 192}
    path = chosen(**odd)
    assert isinstance(path.ops, TorchOps)
    assert "its head size 24 is no multiple of 16" in caplog.text
    with pytest.raises(ConfigError, match=f"--cpu-kernels: {FASTEST}: .*head size 24"):
        chosen(FASTEST, **odd)


def test_cpu_kernels_on_cuda_are_refused() -> None:
    with pytest.raises(ConfigError, match="--device cuda uses no CPU kernels"):
        EngineConfig(device="cuda", cpu_kernels="avx2")


def test_what_adapters_are_held_in() -> None:

    assert lora_dtype("auto", "cpu", torch.float32) == torch.float32
    assert lora_dtype("float32", "cpu", torch.float32) == torch.float32
    assert lora_dtype("bfloat16", "cpu", torch.float32) == torch.bfloat16
    assert lora_dtype("int16", "cpu", torch.float32) == torch.int16
    for arithmetic, held in (("int16", torch.int16), ("int8", torch.int8), ("fp32", torch.float32)):
        assert lora_dtype("auto", "cpu", torch.float32, arithmetic) == held
        assert lora_dtype("float32", "cpu", torch.float32, arithmetic) == torch.float32
        assert lora_dtype("int16", "cpu", torch.float32, arithmetic) == torch.int16
    assert lora_dtype("int8", "cpu", torch.float32) == torch.int8
    assert lora_dtype("auto", "cuda", torch.bfloat16) == torch.bfloat16
    with pytest.raises(ConfigError, match=r"^--lora-dtype: on cpu adapters are held in bfloat16, got float32"):
        lora_dtype("float32", "cpu", torch.bfloat16)
    with pytest.raises(ConfigError, match=r"^--lora-dtype: on cuda adapters are held in bfloat16, got int16"):
        lora_dtype("int16", "cuda", torch.bfloat16)


class _Compiles(event.Listener):  # type: ignore[misc]
    """What numba compiles while it listens."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_start(self, event: Any) -> None:
        self.seen.append(str(event.data.get("dispatcher")))

    def on_end(self, event: Any) -> None:
        pass


async def _greedy(running: Running) -> tuple[int, ...]:
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    tokens, _ = await running.engine.submit(Request("r", list(range(3, 40)), params)).result()
    return tokens.token_ids


@needs_avx2
def test_every_variant_serves_and_compiles_nothing_meanwhile(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    answers = {}
    for asked in ("auto", FASTEST, "torch"):
        config = ServeConfig(
            model=str(checkpoints["llama"]),
            cache_dir=tmp_path,
            engine=EngineConfig(device="cpu", cpu_kernels=asked, max_rows=4, max_context=64, max_batch_tokens=32),
        )
        running = build(config, progress=False)
        listener = _Compiles()
        with event.install_listener("numba:compile", listener):
            running.engine.start()
            answers[asked] = asyncio.run(_greedy(running))
        asyncio.run(running.close())
        assert listener.seen == [], "compiled while serving"
    assert len(answers["torch"]) == 8
    assert answers["torch"] == answers[FASTEST] == answers["auto"]
