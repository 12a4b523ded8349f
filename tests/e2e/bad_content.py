"""What can be wrong with the files of an adapter: edits of a good one, and what its refusal must say."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.e2e.adapters import HIDDEN

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        config = json.loads((path / CONFIG).read_text()) | changes
        (path / CONFIG).write_text(json.dumps(config))

    return edit


def config_text(text: str | bytes) -> Callable[[Path], None]:
    data = text if isinstance(text, bytes) else text.encode()
    return lambda path: (path / CONFIG).write_bytes(data) and None


def edit_tensors(change: Callable[[dict[str, np.ndarray[Any, Any]]], object]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        tensors = load_file(path / WEIGHTS)
        change(tensors)
        save_file(tensors, path / WEIGHTS)

    return edit


def weights_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda path: (path / WEIGHTS).write_bytes(change((path / WEIGHTS).read_bytes())) and None


def edit_header(change: Callable[[str], str]) -> Callable[[Path], None]:
    """Change the JSON text of the weights' header; the data stays."""

    def edit(data: bytes) -> bytes:
        (size,) = struct.unpack("<Q", data[:8])
        header = change(data[8 : 8 + size].decode()).encode()
        return struct.pack("<Q", len(header)) + header + data[8 + size :]

    return weights_bytes(edit)


def set_value(value: float) -> Callable[[Path], None]:
    def change(tensors: dict[str, np.ndarray[Any, Any]]) -> None:
        tensors[FIRST].reshape(-1)[7] = value

    return edit_tensors(change)


def zip_of(data: bytes) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(WEIGHTS, data)
    return packed.getvalue()


def renamed(old: str, new: str) -> Callable[[Path], None]:
    def change(tensors: dict[str, np.ndarray[Any, Any]]) -> None:
        for name in [name for name in tensors if old in name]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return edit_tensors(change)


def widened(tensors: dict[str, np.ndarray[Any, Any]]) -> None:
    for name, tensor in tensors.items():
        if name.endswith("lora_A.weight"):
            tensors[name] = np.ones((tensor.shape[0], 4096), np.float32)


STEM: Final = "base_model.model.model.layers.0.self_attn.q_proj"
FIRST: Final = f"{STEM}.lora_A.weight"
EVIL_PICKLE: Final = pickle.dumps(os.system)
DEEP: Final = "[" * 100_000 + "]" * 100_000
SLOW_REGEX: Final = r"(?:[a-z_.0-9]|[a-z_.0-9]{2}|[a-z_.0-9]{3})*[0-9]"
"""No module's path ends in a digit, which a backtracking matcher finds out in 1.8 ** length steps."""

CONTENT: Final[dict[str, tuple[Callable[[Path], None], tuple[str, ...]]]] = {
    "truncated": (weights_bytes(lambda data: data[: len(data) // 2]), (WEIGHTS, "truncated")),
    "truncated in its header": (weights_bytes(lambda data: data[:100]), (WEIGHTS, "corrupt")),
    "empty": (weights_bytes(lambda data: b""), (WEIGHTS, "corrupt")),
    "with a tail": (weights_bytes(lambda data: data + b"tail"), (WEIGHTS, "corrupt")),
    "a wrong shape": (edit_tensors(lambda t: t.update({FIRST: t[FIRST].T.copy()})), (FIRST, "shape")),
    "half of a pair": (edit_tensors(lambda t: t.pop(FIRST)), (STEM.removeprefix("base_model.model."), "lora_A")),
    "a NaN": (set_value(float("nan")), (FIRST, "not finite")),
    "an infinity": (set_value(float("-inf")), (FIRST, "not finite")),
    "all zero": (edit_tensors(lambda t: [v.fill(0) for k, v in t.items() if "_B" in k]), ("exactly zero",)),
    "no tensors": (edit_tensors(lambda t: t.clear()), (WEIGHTS,)),
    "a zip": (weights_bytes(zip_of), (WEIGHTS, "corrupt")),
    "a gzip": (weights_bytes(gzip.compress), (WEIGHTS, "corrupt")),
    "a pickle by the name of safetensors": (weights_bytes(lambda data: EVIL_PICKLE), (WEIGHTS, "corrupt")),
    "a rank that is a lie": (edit_config(r=8), ("rank 4 in the file, 8 by the config",)),
    "targets that are a lie": (edit_config(target_modules=["q_proj", "k_proj", "v_proj"]), ("k_proj", "no tensors")),
    "targets that hide tensors": (edit_config(target_modules=["q_proj"]), ("v_proj", "does not target")),
    "layers that are a lie": (edit_config(layers_to_transform=[0, 1]), ("does not target",)),
    "a layer too many": (renamed("layers.29.", "layers.30."), ("layers that the base does not have", "layers.30")),
    "another architecture's names": (renamed("self_attn.q_proj", "attn.c_attn"), ("match no module",)),
    "another model's sizes": (edit_tensors(widened), ("shape", "4096", str(HIDDEN))),
    "a rank of 10**400": (config_text(f'{{"peft_type": "LORA", "r": 1{"0" * 400}}}'), ("r = 1",)),
    "a rank of 10**5000": (config_text(f'{{"peft_type": "LORA", "r": 1{"0" * 5000}}}'), (CONFIG,)),
    "a rank that is true": (edit_config(r=True), ("r = true",)),
    "an alpha of NaN": (edit_config(lora_alpha=float("nan")), ("alpha",)),
    "an alpha of infinity": (edit_config(lora_alpha=float("inf")), ("alpha",)),
    "a config that is a list": (config_text("[]"), (CONFIG, "object")),
    "a config that is not JSON": (config_text("{'r': 4}"), (CONFIG, "not valid JSON")),
    "a config that is not UTF-8": (config_text(b'{"r": "\xff\xfe"}'), (CONFIG,)),
    "a config nested deeply": (config_text(f'{{"rank_pattern": {DEEP}}}'), (CONFIG, "not valid JSON")),
    "a header nested deeply": (edit_header(lambda text: f'{{"__metadata__": {DEEP}, {text[1:]}'), (WEIGHTS, "header")),
    "a key twice in the config": (
        lambda path: (path / CONFIG).write_text('{"r": 16, ' + (path / CONFIG).read_text()[1:]) and None,
        (CONFIG, "'r' occurs twice"),
    ),
    "a key twice in the header": (
        edit_header(lambda text: text.replace(STEM.replace(".0.", ".1."), STEM)),
        (WEIGHTS, "twice"),
    ),
    "a catastrophic target_modules": (edit_config(target_modules=SLOW_REGEX), ("takes too long",)),
    "a hundred thousand keys and one of them twice": (
        config_text("{" + "".join(f'"{i}": 1, ' for i in range(100_000)) + '"99999": 1}'),
        (CONFIG, "occurs twice"),
    ),
    "a hundred thousand tensors and one of them twice": (
        edit_header(lambda text: "{" + "".join(f'"{i}": 1, ' for i in range(100_000)) + '"99999": 1}'),
        (WEIGHTS, "99999", "occurs twice"),
    ),
    "a hundred thousand unknown fields": (
        edit_config(**{f"field{i}": 1 for i in range(100_000)}),
        (CONFIG, "fields"),
    ),
    "an endless repeat": (edit_config(target_modules=r"((a{1,9999}){1,9999}){1,9999}"), ("target_modules",)),
    "not a regular expression": (edit_config(target_modules="*q_proj"), ("target_modules", "regular expression")),
    "a NUL in a tensor's name": (
        edit_header(lambda text: text.replace(FIRST, FIRST.replace("q_proj", "q\\u0000proj"))),
        ("match no module",),
    ),
    "half a character in a tensor's name": (
        edit_header(lambda text: text.replace(FIRST, FIRST.replace("q_proj", "q\\ud800proj"))),
        (),
    ),
    "half a character in the config": (edit_config(base_model_name_or_path="base\ud800"), (CONFIG,)),
    "overlapping tensors": (edit_header(lambda text: text.replace('"data_offsets":[9216,', '"data_offsets":[0,')), ()),
    "a negative offset": (edit_header(lambda text: text.replace('"data_offsets":[0,', '"data_offsets":[-8,')), ()),
    "an enormous shape": (
        edit_header(lambda text: text.replace(f'"shape":[4,{HIDDEN}]', '"shape":[4294967296,4294967296]', 1)),
        (WEIGHTS,),
    ),
    "a header that says 100 MB": (weights_bytes(lambda data: struct.pack("<Q", 100_000_000) + data[8:]), (WEIGHTS,)),
    "a header that says 2**63": (weights_bytes(lambda data: struct.pack("<Q", 1 << 63) + data[8:]), (WEIGHTS,)),
    "a chat template that is not UTF-8": (
        lambda path: (path / "chat_template.jinja").write_bytes(b"\xff{{ messages }}") and None,
        ("chat_template.jinja",),
    ),
    "a tokenizer config nested deeply": (
        lambda path: (path / "tokenizer_config.json").write_text(DEEP) and None,
        ("tokenizer_config.json",),
    ),
    "PEFT of another kind": (edit_config(peft_type="PROMPT_TUNING"), ("peft_type", "PROMPT_TUNING")),
    "a field of the future": (edit_config(use_magic=True), ("use_magic",)),
}
"""An edit of an adapter's directory, and parts of the message with which it is refused."""
