"""Where adapters come from: a directory, a Hugging Face hub id, or files uploaded to the server. Torch-free.

Whatever the source, what comes out is a local directory for adapters.peft_loader. Nothing is loaded here.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, Final

from manylora.adapters.durable import sync_directory
from manylora.adapters.errors import AdapterSourceForbidden, AdapterSourceNotFound, AdapterUploadInvalid

REQUIRED_FILES: Final = ("adapter_config.json", "adapter_model.safetensors")
OPTIONAL_FILES: Final = ("chat_template.jinja", "tokenizer_config.json")
HUB_PATTERNS: Final = (*REQUIRED_FILES, "chat_template*", "tokenizer_config.json")

_HUB_ID: Final = re.compile(
    r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*(@[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9._-]+)*)?"
)
_UNFINISHED: Final = ".upload-"
_ARCHIVES: Final = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")
_CHUNK: Final = 1 << 20


def resolve_source(
    source: str,
    *,
    allowed_roots: Sequence[Path] | None = None,
    allow_hub: bool = True,
    download: Callable[[str], str] | None = None,
) -> Path:
    """The local directory that ``source`` means.

    An existing path is that directory. Anything else that looks like ``org/name`` or ``org/name@revision`` (a branch,
    tag or commit) is a hub id, and its adapter files (``HUB_PATTERNS``) are downloaded into the hub's own cache, or
    found there when offline.

    Args:
        allowed_roots: with any, a path must lie inside one of them after following symbolic links, and so must the
            adapter's files. ``None``: any path (for the command line, whose user can read the files anyway).
        allow_hub: whether hub ids are accepted.
        download: hub id, with its revision if it has one, to local directory; ``None`` is huggingface_hub's.

    Raises:
        AdapterSourceForbidden: outside ``allowed_roots``, whether or not it exists, or a hub id that is not allowed.
        AdapterSourceNotFound: no such directory, or the hub has no such adapter or cannot be reached.
    """
    if not source or "\0" in source:
        raise AdapterSourceNotFound("The adapter's source is empty or holds a NUL character.")
    path = Path(os.path.abspath(os.path.expanduser(source)))
    is_hub_id = _HUB_ID.fullmatch(source) is not None
    if not os.path.exists(path) and is_hub_id:  # unlike Path.exists, False for a name that is too long
        if not allow_hub:
            raise AdapterSourceForbidden(f"{source} is not a directory, and this server does not load from the hub.")
        return Path((download or _download)(source))
    if allowed_roots is not None:  # before anything is said about what exists outside them
        _confine(path, allowed_roots)
        for name in (*REQUIRED_FILES, *OPTIONAL_FILES):
            _confine(path / name, allowed_roots)
    if not os.path.isdir(path):
        exists = os.path.exists(path)
        what = "is a file, not a directory" if exists else "does not exist"
        hint = "" if exists or "/" in source else " (a hub id has the form org/name)"
        raise AdapterSourceNotFound(f"{path} {what}{hint}. Give the directory that holds {REQUIRED_FILES[0]}.")
    return path


def store_upload(name: str, files: Mapping[str, bytes | BinaryIO], root: Path, limit_bytes: int) -> Path:
    """Store uploaded files in a directory of ``root`` named by their content, and return it.

    The directory appears in one step, complete and synced to the disk, or not at all; equal content is stored once.
    The name is used in messages only. Only safetensors are taken: ``files`` must have the ``REQUIRED_FILES`` and may
    have the ``OPTIONAL_FILES``, by their exact names.

    Raises:
        AdapterUploadInvalid: a file is missing or unexpected, or together they exceed ``limit_bytes``.
        OSError: the disk is full or not writable.
    """
    _check_file_names(name, files)
    root.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=root))
    try:
        digest = hashlib.sha256(b"manylora upload 1\n")
        left = limit_bytes
        for file_name in sorted(files):
            content = files[file_name]
            stream = BytesIO(content) if isinstance(content, bytes) else content
            file_digest, size = _write_file(temporary / file_name, stream, left)
            if size > left:
                raise AdapterUploadInvalid(
                    f"The upload of adapter `{name}` is larger than the {limit_bytes} bytes this server accepts."
                )
            left -= size
            digest.update(f"{file_name} {file_digest}\n".encode())
        target = root / digest.hexdigest()
        if not target.is_dir():
            sync_directory(temporary)
            try:
                os.rename(temporary, target)
            except OSError:
                if not target.is_dir():  # else another upload of equal content was first, which is as good
                    raise
        sync_directory(root)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def is_unfinished_upload(name: str) -> bool:
    """Whether ``store_upload`` names a directory so while it writes it."""
    return name.startswith(_UNFINISHED)


def _check_file_names(name: str, files: Mapping[str, object]) -> None:
    missing = [file for file in REQUIRED_FILES if file not in files]
    unexpected = sorted(file for file in files if file not in REQUIRED_FILES and file not in OPTIONAL_FILES)
    problems = []
    if missing:
        problems.append(f"missing: {', '.join(missing)}")
    if unexpected:
        problems.append(f"unexpected: {', '.join(unexpected)}")
    if any(file.endswith((".bin", ".pt", ".pth", ".pkl")) for file in unexpected):
        problems.append("pickle files are never loaded, save as safetensors")
    if any(file.lower().endswith(_ARCHIVES) for file in unexpected):
        problems.append("archives are not unpacked, send the files themselves")
    if problems:
        raise AdapterUploadInvalid(
            f"The upload of adapter `{name}` must have exactly the files {', '.join(REQUIRED_FILES)} and may have "
            f"{', '.join(OPTIONAL_FILES)}; {'; '.join(problems)}."
        )


def _write_file(path: Path, stream: BinaryIO, limit: int) -> tuple[str, int]:
    """Copy a stream to a synced file; returns its sha256 and size. Stops soon after ``limit`` bytes."""
    digest = hashlib.sha256()
    size = 0
    with path.open("xb") as file:
        while size <= limit and (chunk := stream.read(_CHUNK)):
            size += len(chunk)
            digest.update(chunk)
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest(), size


def _confine(path: Path, roots: Sequence[Path]) -> None:
    real = Path(os.path.realpath(path))
    if not any(real.is_relative_to(os.path.realpath(root)) for root in roots):
        shown = ", ".join(str(root) for root in roots) or "none"
        raise AdapterSourceForbidden(f"{path} lies outside the directories this server may load from: {shown}.")


def _download(hub_id: str) -> str:
    """Fetch an adapter's files into the hub's cache, or find them there; AdapterSourceNotFound if neither works."""
    # Here, not above: an adapter on the disk does not need the hub, nor the second that its import takes.
    from huggingface_hub import errors, snapshot_download

    # The HTTP client's own error, by the one name under which both httpx's and its successor's can be had.
    http_error = errors.HTTPError  # type: ignore[attr-defined]
    name, _, revision = hub_id.partition("@")
    try:
        return snapshot_download(name, revision=revision or None, allow_patterns=list(HUB_PATTERNS))
    except errors.GatedRepoError as error:
        raise AdapterSourceNotFound(
            f"{hub_id} is gated on the hub: ask for access there and set HF_TOKEN for this server."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise AdapterSourceNotFound(f"{name} is on the hub, but has no revision {revision!r}.") from error
    except errors.RepositoryNotFoundError as error:
        raise AdapterSourceNotFound(
            f"{hub_id} is neither a directory here nor a repository on the hub (if it is private, set HF_TOKEN)."
        ) from error
    except (http_error, errors.HFValidationError, OSError) as error:
        raise AdapterSourceNotFound(
            f"{hub_id} is not a directory here, and it could not be fetched from the hub: {error} Check the connection "
            "and HF_HUB_OFFLINE, or download the adapter and give its directory."
        ) from error
