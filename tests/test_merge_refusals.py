"""`manylora merge`: what it refuses, with which words, and that it never leaves half of a checkpoint."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from manylora.server import merge_command
from manylora.server.model.errors import ModelError
from tests.checkpoints import save_tokenizer
from tests.merge_cases import (
    ADAPTERS,
    load,
    make_adapter,
    make_bases,
    merge,
)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny bf16 checkpoints; not to be written to."""
    return make_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="module")
def adapter(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(bases["llama"], tmp_path_factory.mktemp("adapters") / "a", **ADAPTERS["lora"])


def test_an_existing_directory_is_refused_unless_empty(
    bases: dict[str, Path], adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("precious")
    assert merge(bases["llama"], adapter, out) == 2
    assert "exists already; name a new directory" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["mine"]
    assert merge(bases["llama"], adapter, out / "mine") == 2
    (out / "mine").unlink()
    assert merge(bases["llama"], adapter, out) == 0


@pytest.mark.parametrize("raised", [KeyboardInterrupt, OSError("disk full"), RuntimeError])
def test_an_interrupted_write_leaves_nothing(
    bases: dict[str, Path],
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    raised: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    seen: list[list[str]] = []
    real: Callable[..., torch.Tensor] = merge_command.merge_weight

    def breaks(*arguments: Any) -> torch.Tensor:
        seen.append([path.name for path in tmp_path.iterdir()])
        if len(seen) > 5:
            raise raised
        return real(*arguments)

    monkeypatch.setattr(merge_command, "merge_weight", breaks)
    if raised is RuntimeError:
        with pytest.raises(RuntimeError):
            merge(bases["llama"], adapter, tmp_path / "out")
    else:
        assert merge(bases["llama"], adapter, tmp_path / "out") == (1 if raised is KeyboardInterrupt else 2)
    assert "out" not in seen[-1]  # it was under way, out of sight
    assert len(seen[-1]) == 1
    assert list(tmp_path.iterdir()) == []
    if isinstance(raised, OSError):
        assert "out cannot be written: disk full" in capsys.readouterr().err


def test_sigterm_leaves_nothing(bases: dict[str, Path], adapter: Path, tmp_path: Path) -> None:
    script = (
        "import sys, time; from manylora.server import cli, merge_command\n"
        "real = merge_command.merge_weight\n"
        "def slow(*arguments):\n    print('merging', flush=True); time.sleep(60); return real(*arguments)\n"
        "merge_command.merge_weight = slow\n"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    line = [sys.executable, "-P", "-c", script, "merge", str(bases["llama"]), str(adapter), str(tmp_path / "out")]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "merging\n"
        assert len(list(tmp_path.iterdir())) == 1
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 1
        assert time.monotonic() - started < 30
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_before_anything_is_read(
    bases: dict[str, Path],
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))
    assert merge(bases["llama"], adapter, tmp_path / "out") == 2
    assert "GB free. Make room" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_bias_without_a_place_is_refused(
    bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = make_adapter(bases["llama"], tmp_path / "a", r=2, target_modules=["o_proj"], lora_bias=True)
    assert merge(bases["llama"], adapter, tmp_path / "out") == 2
    err = capsys.readouterr().err
    assert "it adds a bias to `o` (2 of them)" in err
    assert "PEFT cannot merge it either" in err
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_overflows_is_refused_by_its_module(
    bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = make_adapter(bases["llama"], tmp_path / "a", r=2, target_modules=["o_proj"])
    file = adapter / "adapter_model.safetensors"
    save_file({name: tensor * 1e21 for name, tensor in load_file(file).items()}, file)
    assert merge(bases["llama"], adapter, tmp_path / "out") == 2
    assert "model.layers.0.self_attn.o_proj" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_sum_beyond_bf16_names_the_weight(
    bases: dict[str, Path],
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Finite in fp32, and infinite once rounded.
    highest = torch.finfo(torch.float32).max
    monkeypatch.setattr(merge_command, "merge_weight", lambda weight, *_: torch.full_like(weight, highest))
    assert merge(bases["llama"], adapter, tmp_path / "out") == 2
    err = capsys.readouterr().err
    assert "Merging fails at model.layers.0.self_attn.q_proj.weight: the sum is beyond what bf16 holds" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda base, adapter: (adapter / "adapter_config.json").write_text("{"), "not valid JSON"),
        (lambda base, adapter: (adapter / "adapter_config.json").unlink(), "holds no adapter_config.json"),
        (lambda base, adapter: (adapter / "adapter_model.safetensors").write_bytes(b"\0" * 9), "corrupt"),
        (lambda base, adapter: (base / "model.safetensors").write_bytes(b"\0" * 9), "truncated or corrupt"),
        (lambda base, adapter: (base / "tokenizer.json").unlink(), "tokenizer"),
        (lambda base, adapter: (base / "config.json").unlink(), "no config.json"),
    ],
)
def test_bad_input_is_exit_code_2(
    bases: dict[str, Path],
    adapter: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    break_it: Callable[[Path, Path], object],
    message: str,
) -> None:
    import shutil

    base, broken = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(bases["llama"], base)
    shutil.copytree(adapter, broken)
    break_it(base, broken)
    assert merge(base, broken, tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_base_that_is_not_finite_is_named(bases: dict[str, Path], adapter: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    model = load(bases["llama"])
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[3] = float("nan")
    model.save_pretrained(base)
    save_tokenizer(base)
    with pytest.raises(ModelError, match=r"layers\.1\.post_attention_layernorm\.weight holds values that are not fin"):
        merge_command.merge_checkpoint(str(base), str(adapter), tmp_path / "out", progress=False)


def test_nothing_there(bases: dict[str, Path], adapter: Path, tmp_path: Path) -> None:
    assert merge(tmp_path / "nowhere", adapter, tmp_path / "out") == 2
    assert merge(bases["llama"], tmp_path / "nowhere", tmp_path / "out") == 2
    assert merge(bases["llama"], adapter, adapter / "adapter_config.json" / "out") == 2
    assert list(tmp_path.iterdir()) == []
