"""Files made to hurt: refused soon, with a message of a reasonable size, and without holding the server up.

"Soon" is twenty seconds here, for machines that are busy with other things: what these files would otherwise take is
hours, or all memory.
"""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from manylora.adapters.errors import AdapterRefused, AdapterSourceNotFound
from manylora.adapters.patterns import Patterns
from manylora.adapters.peft_files import largest_weights
from manylora.adapters.peft_loader import inspect_peft_adapter, load_peft_adapter
from tests.adapters.peft_dirs import SHAPES, plain_config, plain_tensors, write_dir

ENDLESS = r"((?P<a>.)(?!(?P=a))|..)*(?P<b>.)(?=(?P=b)(?P=b)(?P=b))"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def refusal(path: Path, *, within: float = 20.0) -> AdapterRefused:
    start = time.monotonic()
    with pytest.raises(AdapterRefused) as caught:
        load_peft_adapter(path, SHAPES)
    assert time.monotonic() - start < within
    message = str(caught.value)
    assert len(message) < 50_000
    message.encode()
    return caught.value


def header(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ENDLESS},
        {"exclude_modules": ENDLESS},
        {"rank_pattern": {ENDLESS: 3}},
        {"alpha_pattern": {ENDLESS: 3}},
        {"layers_pattern": [ENDLESS], "layers_to_transform": [0]},
        {"rank_pattern": {ENDLESS + "x" * i: 3 for i in range(1000)}},
        {"alpha_pattern": {"|".join(f"{i}{j}" for j in range(500)): 3 for i in range(400)}},
    ],
)
def test_regular_expressions_that_never_end(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Patterns.__init__, "__defaults__", (0.3,))
    error = refusal(write_dir(tmp_path, plain_config(**changes)))
    assert any("takes too long" in reason for reason in error.reasons), error


def test_a_hundred_thousand_unknown_fields(tmp_path: Path) -> None:
    (reason,) = refusal(write_dir(tmp_path, plain_config(**{f"x{i}": 1 for i in range(100_000)}))).reasons
    assert "has 100007 fields" in reason


def test_ten_thousand_wrong_entries(tmp_path: Path) -> None:
    error = refusal(write_dir(tmp_path, plain_config(rank_pattern={f"x{i}": 0 for i in range(10_000)})))
    assert len(error.reasons) == 101


def test_a_config_of_many_megabytes(tmp_path: Path) -> None:
    path = write_dir(tmp_path, json.dumps(plain_config(auto_mapping="x" * (3 << 20))))
    assert "adapter_config.json has" in refusal(path).reasons[0]
    with pytest.raises(AdapterRefused):
        inspect_peft_adapter(path)


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("tokenizer_config.json", " " * (5 << 20), "tokenizer_config.json has 5242880 bytes, more than the 4194304"),
        (
            "tokenizer_config.json",
            json.dumps({"chat_template": "x" * (2 << 20)}),
            "the chat template has 2097152",
        ),
        ("tokenizer_config.json", '{"chat_template": "\\ud800"}', "tokenizer_config.json is not valid JSON"),
        ("tokenizer_config.json", "[" * 100_000, "tokenizer_config.json is not valid JSON"),
        ("chat_template.jinja", "x" * (2 << 20), "chat_template.jinja has 2097152 bytes"),
    ],
)
def test_templates(name: str, text: str, reason: str, tmp_path: Path) -> None:
    (write_dir(tmp_path) / name).write_text(text)
    assert reason in refusal(tmp_path).reasons[0]


def test_a_template_that_is_not_text(tmp_path: Path) -> None:
    (write_dir(tmp_path) / "chat_template.jinja").write_bytes(b"\xff")
    assert "chat_template.jinja is not UTF-8" in refusal(tmp_path).reasons[0]


def numbers(count: int, digits: int) -> str:
    return ",".join(["9" * digits] * count)


@pytest.mark.parametrize(
    "text",
    [
        lambda: b'{"a":' * 200_000,
        lambda: b'{"a":{"dtype":"F32","shape":[' + numbers(900, 4000).encode() + b'],"data_offsets":[0,4]}}',
        lambda: b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,' + b"9" * 4000 + b"]}}",
        lambda: b"{" + b",".join(b'"%d":0' % (i // 2) for i in range(300_000)) + b"}",
        lambda: json.dumps({"x" * (3 << 20): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}).encode(),
        lambda: b'{"\\ud800":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}',
        lambda: b" " * (5 << 20),
    ],
)
def test_headers(text: Callable[[], bytes], tmp_path: Path) -> None:
    (reason,) = refusal(write_dir(tmp_path, tensors=header(text()))).reasons
    assert reason.startswith(f"{WEIGHTS} is corrupt: ")


def test_a_header_of_tens_of_thousands_of_tensors(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    error = refusal(write_dir(tmp_path, tensors=header(json.dumps({f"t{i}": entry for i in range(50_000)}).encode())))
    assert error.reasons[0] == f"{WEIGHTS} is corrupt: it lists 50000 tensors, more than the 228 that could be served"


def test_names_that_would_make_our_own_expressions_slow(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    names = [f"base_model.model.{'lora_A.' * 60}{i}" for i in range(100)]
    names += [f"base_model.model.model.layers.{'9' * 400}{i}.x" for i in range(100)]
    refusal(write_dir(tmp_path, tensors=header(json.dumps(dict.fromkeys(names, entry)).encode())))


def test_a_file_too_large_for_any_adapter_is_not_read(tmp_path: Path) -> None:
    path = write_dir(tmp_path)
    limit = largest_weights(SHAPES)
    with (path / WEIGHTS).open("ab") as file:
        file.truncate(100 << 30)  # sparse: read, it would take all memory
    error = refusal(path)
    assert error.reasons[0] == (
        f"{WEIGHTS} has {100 << 30} bytes, more than any adapter of this base needs at a rank of 256"
    )
    assert limit > sum(t.nbytes for t in plain_tensors(rank=256).values())


def test_a_weights_file_that_is_not_a_file(tmp_path: Path) -> None:
    import os

    path = write_dir(tmp_path)
    (path / WEIGHTS).unlink()
    os.mkfifo(path / WEIGHTS)  # opening it would wait for a writer
    with pytest.raises(AdapterSourceNotFound):
        load_peft_adapter(path, SHAPES)


def test_ranks_without_number(tmp_path: Path) -> None:
    config = plain_config(r=10**12, rank_pattern={"q_proj": 10**300})
    assert len(refusal(write_dir(tmp_path, config)).reasons) == 2


def test_token_ids_without_number(tmp_path: Path) -> None:
    tensors = plain_tensors() | {
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, 32)
    }
    error = refusal(write_dir(tmp_path, plain_config(trainable_token_indices=[10**30, -(10**30)]), tensors))
    assert any("tokens that the base does not have" in reason for reason in error.reasons)
