"""A base model whose files have been found and whose config has been read, whatever format it is in."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any, Protocol

from manylora.server.model.checkpoint import (
    HF_DTYPES,
    TOKENIZER_FILES,
    SafetensorsSource,
    TensorSource,
    read_configs,
    with_prefix,
)
from manylora.server.model.families import ModelSpec
from manylora.server.model.layout import embed_name
from manylora.server.model.tokenizer import Tokenizer


class OpenedModel(Protocol):
    """Its architecture, its tensors and its tokenizer; no weight has been read yet."""

    @property
    def what(self) -> str:
        """Names the model in messages."""
        ...

    @property
    def spec(self) -> ModelSpec: ...

    @property
    def config(self) -> dict[str, Any]:
        """``config.json`` as transformers would write it."""
        ...

    @property
    def generation_config(self) -> dict[str, Any]: ...

    @property
    def source(self) -> TensorSource: ...

    @property
    def quantized(self) -> bool:
        """Whether the tensors are NF4 already, as bitsandbytes stores it."""
        ...

    def tokenizer(self) -> Tokenizer: ...

    def save_tokenizer(self, directory: Path) -> None:
        """Write the tokenizer's files into ``directory``."""
        ...


class DirectoryModel:
    """A Hugging Face checkpoint directory. Raises ModelNotFound, UnsupportedModel or BadCheckpoint."""

    def __init__(self, directory: Path) -> None:
        self.what = str(directory)
        self.directory = directory
        self.config, self.generation_config = read_configs(directory)
        self.spec = ModelSpec.from_hf_config(self.config, self.generation_config, what=self.what)
        self.quantized = self.config.get("quantization_config") is not None
        stored = SafetensorsSource(directory)
        self._weight_files = tuple(stored.files)
        self.source: TensorSource = with_prefix(stored, self.spec.names.prefix)
        embed = embed_name(self.spec)
        if not (self.config.get("dtype") or self.config.get("torch_dtype")) and embed in self.source.infos:
            # Where the config does not say, transformers takes the type that the weights are stored in.
            dtype = HF_DTYPES.get(self.source.infos[embed].dtype, "float32")
            self.config, self.spec = self.config | {"dtype": dtype}, dataclasses.replace(self.spec, dtype=dtype)

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_directory(self.directory, eos_token_ids=self.spec.eos_token_ids)

    def save_tokenizer(self, directory: Path) -> None:
        for name in TOKENIZER_FILES:
            if (self.directory / name).is_file():
                shutil.copyfile(self.directory / name, directory / name)

    def files(self) -> dict[str, Path]:
        """Every file that makes this model what it is, by name: what its digest covers."""
        names = ("config.json", "generation_config.json", *TOKENIZER_FILES)
        small = {name: self.directory / name for name in names if (self.directory / name).is_file()}
        return small | {path.name: path for path in self._weight_files}
