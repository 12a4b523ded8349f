"""Reading Hugging Face checkpoint directories: JSON files, and safetensors in one file or many."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from safetensors import SafetensorError, safe_open

from manylora.server.model.errors import BadCheckpoint, ModelNotFound

SINGLE_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"

HF_DTYPES: Final[Mapping[str, str]] = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""The types a weight may have before quantisation: safetensors' name -> transformers'."""

FLOAT_TYPES: Final = tuple(HF_DTYPES)

TOKENIZER_FILES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)


@dataclass(frozen=True)
class TensorInfo:
    """What a file says of a tensor without reading it; ``dtype`` in safetensors' names (``BF16``, ``U8``)."""

    dtype: str
    shape: tuple[int, ...]


class TensorSource(Protocol):
    """Named tensors that are read one at a time. ``what`` names the source in errors."""

    @property
    def what(self) -> str: ...

    @property
    def infos(self) -> Mapping[str, TensorInfo]: ...

    def get(self, name: str) -> torch.Tensor:
        """The tensor on the CPU, in memory of its own."""
        ...


class SafetensorsSource:
    """The safetensors of a checkpoint directory; only headers are read until a tensor is asked for.

    Raises BadCheckpoint when a file is missing, truncated or not what the index says.
    """

    def __init__(self, directory: Path) -> None:
        self.what = str(directory)
        self.files = weight_files(directory)
        self.infos: dict[str, TensorInfo] = {}
        self._shards: dict[str, Any] = {}
        for file in self.files:
            shard = _open_shard(file)
            for name in shard.keys():  # noqa: SIM118 (not a mapping)
                part = shard.get_slice(name)
                self.infos[name] = TensorInfo(dtype=part.get_dtype(), shape=tuple(part.get_shape()))
                self._shards[name] = shard

    def get(self, name: str) -> torch.Tensor:
        # safetensors returns a view of the mapped file. A copy keeps the base what it was when it was loaded,
        # whatever happens to the file, and never faults when the file is truncated under a running server.
        tensor: torch.Tensor = self._shards[name].get_tensor(name)
        return tensor.clone()


class _Prefixed:
    """A source whose tensors have a prefix in front of their names."""

    def __init__(self, source: TensorSource, prefix: str) -> None:
        self.what, self._source, self._prefix = source.what, source, prefix
        self.infos = {prefix + name: info for name, info in source.infos.items()}

    def get(self, name: str) -> torch.Tensor:
        return self._source.get(name.removeprefix(self._prefix))


def with_prefix(source: TensorSource, prefix: str) -> TensorSource:
    """``source`` with the prefix of a whole model's names, where it was saved without the output layer and so has none
    of them (GPT-2's first checkpoints; transformers reads both)."""
    bare = bool(source.infos) and not any(name.startswith((prefix, "lm_head.")) for name in source.infos)
    return _Prefixed(source, prefix) if bare and prefix != "model." else source


class MemorySource:
    """Tensors that were just made; each is handed over once and then forgotten, so that none is in memory twice."""

    def __init__(self, what: str, tensors: dict[str, torch.Tensor]) -> None:
        self.what = what
        self._tensors = tensors
        self.infos = {
            name: TensorInfo(dtype=_SAFETENSORS_NAMES[tensor.dtype], shape=tuple(tensor.shape))
            for name, tensor in tensors.items()
        }

    def get(self, name: str) -> torch.Tensor:
        return self._tensors.pop(name)


_SAFETENSORS_NAMES: Final[Mapping[torch.dtype, str]] = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises BadCheckpoint naming the file and the place where it breaks off."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadCheckpoint(str(path), f"it cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise BadCheckpoint(str(path), "it is not UTF-8 text; fetch the file again") from error
    except json.JSONDecodeError as error:
        raise BadCheckpoint(str(path), f"it is not valid JSON ({error}); fetch the file again") from error
    if not isinstance(data, dict):
        raise BadCheckpoint(str(path), f"it holds a JSON {type(data).__name__} where an object is expected")
    return data


def read_configs(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """``config.json``, and ``generation_config.json`` (empty if there is none)."""
    config = directory / "config.json"
    if not config.is_file():
        hint = " It is a LoRA adapter: name its base instead." if (directory / "adapter_config.json").is_file() else ""
        raise ModelNotFound(f"{directory} has no config.json, so it is not a model checkpoint.{hint}")
    generation = directory / "generation_config.json"
    return read_json(config), read_json(generation) if generation.is_file() else {}


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint, sorted; raises BadCheckpoint when one is missing or only pickles exist."""
    index, single = directory / INDEX_FILE, directory / SINGLE_FILE
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if (
            not isinstance(weight_map, dict)
            or not weight_map
            or not all(isinstance(v, str) for v in weight_map.values())
        ):
            raise BadCheckpoint(str(index), "it has no `weight_map`; fetch the file again")
        names = sorted(set(weight_map.values()))
        outside = [name for name in names if Path(name).name != name]
        if outside:
            raise BadCheckpoint(str(index), f"it points outside its directory: {', '.join(outside)}")
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise BadCheckpoint(
                str(directory), f"{len(missing)} of {len(names)} weight files are missing: {', '.join(missing)}"
            )
        return [directory / name for name in names]
    if single.is_file():
        return [single]
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern))
    if pickles:
        raise BadCheckpoint(
            str(directory),
            f"its weights are pickles ({', '.join(pickles)}), which can run code when loaded. Convert them where you "
            'trust them: python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{directory}', dtype='auto').save_pretrained('converted')\"",
        )
    raise BadCheckpoint(str(directory), f"it has neither {SINGLE_FILE} nor {INDEX_FILE}")


def _open_shard(path: Path) -> Any:
    try:
        return safe_open(str(path), framework="pt", device="cpu")
    except SafetensorError as error:
        size = path.stat().st_size
        raise BadCheckpoint(
            str(path), f"it is truncated or corrupt ({error}; {size} bytes on disk); fetch the file again"
        ) from error
    except OSError as error:
        raise BadCheckpoint(str(path), f"it cannot be read ({error.strerror or error})") from error
