"""From what the user wrote (a path, a GGUF file, a hub id) to files on this machine."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from manylora.server.model.checkpoint import TOKENIZER_FILES
from manylora.server.model.errors import ModelNotFound
from manylora.server.model.gguf import GgufModel
from manylora.server.model.opened import DirectoryModel, OpenedModel

_GGUF_TYPE: Final = re.compile(r"[.-](I?Q\d\w*|B?F16|F32)$", re.IGNORECASE)
_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")

_WANTED: Final = ["config.json", "generation_config.json", "*.safetensors", "model.safetensors.index.json"]
"""What is fetched from the hub besides the tokenizer: never pickles, never code."""


@dataclass(frozen=True)
class Resolved:
    """A model's files: a checkpoint directory or a GGUF file, and the name it is served under by default."""

    kind: Literal["directory", "gguf"]
    path: Path
    name: str


def resolve(model: str) -> Resolved:
    """Find ``model``: an existing path first, then a hub id (``org/name`` or ``org/name@revision``), downloaded whole.

    A directory without config.json that holds exactly one GGUF file stands for that file. Raises ModelNotFound.
    """
    path = Path(model).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelNotFound(f"{path} is not a model: give a checkpoint directory or a .gguf file.")
        return Resolved("gguf", path, _gguf_name(path))
    if path.is_dir():
        ggufs = sorted(path.glob("*.gguf"))
        if ggufs and not (path / "config.json").is_file():
            if len(ggufs) > 1:
                raise ModelNotFound(
                    f"{path} holds {len(ggufs)} GGUF files; name one: {', '.join(f.name for f in ggufs)}"
                )
            return Resolved("gguf", ggufs[0], _gguf_name(ggufs[0]))
        return Resolved("directory", path, path.resolve().name)
    if not _HUB_ID.fullmatch(model) or model.endswith(".gguf"):
        raise ModelNotFound(f"There is no model at {path}: no such file or directory, and not a hub id (org/name).")
    return _download(model)


def open_model(found: Resolved) -> OpenedModel:
    """Read the configs of what `resolve` found. Raises ModelError."""
    return DirectoryModel(found.path) if found.kind == "directory" else GgufModel(found.path)


def _gguf_name(path: Path) -> str:
    """The file's name without what says how it was quantised: the model's own name, which adapters know it by."""
    return _GGUF_TYPE.sub("", path.stem) or path.stem


def _download(model: str) -> Resolved:
    repo, _, revision = model.partition("@")
    try:
        path = snapshot_download(repo, revision=revision or None, allow_patterns=[*_WANTED, *TOKENIZER_FILES])
    except GatedRepoError as error:
        raise ModelNotFound(
            f"The hub repository {repo} is gated: accept its terms on huggingface.co and set HF_TOKEN."
        ) from error
    except RevisionNotFoundError as error:
        raise ModelNotFound(f"The hub repository {repo} has no revision {revision}.") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelNotFound(
            f"There is no {repo}: neither a path here nor a hub repository (a private one needs HF_TOKEN)."
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise ModelNotFound(
            f"There is no path {repo} here, and the hub repository of that name is not in the local cache while the "
            "hub is out of reach (offline, or HF_HUB_OFFLINE=1). Give a directory or a .gguf file, or fetch it first: "
            f"hf download {repo}"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise ModelNotFound(f"Fetching {repo} from the hub failed: {error}") from error
    return Resolved("directory", Path(path), repo)
