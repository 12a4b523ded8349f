"""The files of an adapter directory, each read once and within bounds."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from manylora.adapters.adapter_config import MAX_RANK
from manylora.adapters.errors import AdapterRefused, AdapterSourceNotFound
from manylora.adapters.safetensors_file import HEADER_LIMIT
from manylora.kernels.sites import LoraShapes

CONFIG_FILE: Final = "adapter_config.json"
WEIGHTS_FILE: Final = "adapter_model.safetensors"
_PICKLE_FILE: Final = "adapter_model.bin"

# Reading JSON holds Python's lock: some 20 ms a MiB.
_CONFIG_LIMIT: Final = 2 << 20  # AdaLoRA lists every rank of every module
_TOKENIZER_LIMIT: Final = 4 << 20  # it may list a thousand added tokens
_TEMPLATE_LIMIT: Final = 1 << 20


@dataclass(frozen=True)
class AdapterFiles:
    """The bytes of an adapter directory, so that the version is that of the tensors served."""

    config: bytes
    weights: bytearray
    chat_template: str | None

    def version(self) -> str:
        """sha256 over the named, length-prefixed parts: no two different sets of files give the same input."""
        digest = hashlib.sha256(b"manylora adapter 1\n")
        parts: list[tuple[str, bytes | bytearray]] = [(CONFIG_FILE, self.config), (WEIGHTS_FILE, self.weights)]
        if self.chat_template is not None:  # part of what the adapter does: a changed one is a new version
            parts.append(("chat_template", self.chat_template.encode()))
        for name, data in parts:
            digest.update(f"{name} {len(data)}\n".encode())
            digest.update(data)
        return digest.hexdigest()


def largest_weights(shapes: LoraShapes) -> int:
    """Bytes of the largest file that could be served for such a base: fp32, every module, whole tables, twice each."""
    elements = 2 * 2 * shapes.in_features["embed"] * shapes.out_features["embed"]
    for projection in shapes.in_features:
        n_in, n_out = shapes.in_features[projection], shapes.out_features[projection]
        elements += shapes.layers_of(projection) * (MAX_RANK * (n_in + n_out) + 4 * n_out)
    return 4 * elements + HEADER_LIMIT


def most_tensors(shapes: LoraShapes) -> int:
    """How many tensors an adapter of such a base could have: LoKr has four a module, a bias and tables come on top."""
    return 100 + 8 * sum(shapes.layers_of(projection) for projection in shapes.in_features)


def read_files(path: Path, largest: int | None = None) -> AdapterFiles:
    """The adapter's files; a weights file of more than ``largest`` bytes is refused before it is read.

    Raises AdapterSourceNotFound, and AdapterRefused for files that are not read: pickles, and what is too large.
    """
    if not path.is_dir():
        raise AdapterSourceNotFound(f"{path} is not a directory.")
    if not (path / CONFIG_FILE).is_file():
        raise AdapterSourceNotFound(f"{path} holds no {CONFIG_FILE}: it is not a PEFT adapter.")
    if not (path / WEIGHTS_FILE).is_file():
        if (path / _PICKLE_FILE).is_file():
            raise AdapterRefused(
                f"in {path}",
                [
                    f"its weights are in {_PICKLE_FILE}, a pickle, which can run code when it is loaded and is never "
                    "read; convert it where you trust it: safetensors.torch.save_file(torch.load("
                    f"'{_PICKLE_FILE}', weights_only=True), '{WEIGHTS_FILE}')"
                ],
            )
        raise AdapterSourceNotFound(f"{path} holds {CONFIG_FILE} but no {WEIGHTS_FILE}.")
    try:
        config = bytes(_read(path / CONFIG_FILE, _CONFIG_LIMIT))
        template = _chat_template(path)
        weights = _read(path / WEIGHTS_FILE, largest, "than any adapter of this base needs at a rank of 256")
    except _TooLarge as error:
        raise AdapterRefused(f"in {path}", [str(error)]) from error
    except OSError as error:
        raise AdapterSourceNotFound(f"The adapter in {path} cannot be read: {error}") from error
    return AdapterFiles(config, weights, template)


class _TooLarge(Exception):
    pass


def _read(path: Path, limit: int | None, than: str = "") -> bytearray:
    """The file's bytes in a writable buffer, which is what torch.frombuffer wants."""
    size = path.stat().st_size
    if limit is not None and size > limit:
        raise _TooLarge(f"{path.name} has {size} bytes, more {than or f'than the {limit} that are read'}")
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(size)
        view = memoryview(buffer)
        filled = 0
        while filled < len(buffer) and (count := file.readinto(view[filled:])):
            filled += count
        grown = file.read(1)
    view.release()
    if grown:
        raise OSError(f"{path.name} grew while it was read")
    del buffer[filled:]  # shrunk while it was read: what was read is what is checked and hashed
    return buffer


def _chat_template(path: Path) -> str | None:
    """The directory's own chat template, where transformers looks for it; AdapterRefused if that file is malformed."""
    if (path / "chat_template.jinja").is_file():
        try:
            return _read(path / "chat_template.jinja", _TEMPLATE_LIMIT).decode()
        except UnicodeDecodeError as error:
            raise AdapterRefused(f"in {path}", [f"chat_template.jinja is not UTF-8: {error}"]) from error
    if not (path / "tokenizer_config.json").is_file():
        return None
    try:
        document: Any = json.loads(_read(path / "tokenizer_config.json", _TOKENIZER_LIMIT))
        template = document.get("chat_template") if isinstance(document, dict) else None
        if isinstance(template, list):  # several, by name
            named = {str(item.get("name")): item.get("template") for item in template if isinstance(item, dict)}
            template = named.get("default")
        if not isinstance(template, str):
            return None
        size = len(template.encode())
    except (ValueError, RecursionError) as error:
        raise AdapterRefused(f"in {path}", [f"tokenizer_config.json is not valid JSON: {error}"]) from error
    if size > _TEMPLATE_LIMIT:
        raise _TooLarge(f"the chat template has {size} bytes, more than the {_TEMPLATE_LIMIT} that are read")
    return template
