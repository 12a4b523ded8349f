"""``manylora keys``: makes, shows and revokes keys of a key file (``tenants_file`` says what is in it).

The file is the operator's: what is written here is added at its end or cut out of it, so that comments stay. Every
change is read back before it takes the file's place in one step, and those who change the file at the same time wait
for each other.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from manylora.server.tenants_file import (
    KeyFileError,
    TenantRules,
    check_name,
    check_pattern,
    hashed,
    new_key,
    parse_tenants,
    read_tenants,
    read_text,
)

Setting = str | bool | int | float | list[str]

_ID_DIGITS: Final = 12
"""Hexadecimal digits of a key's hash by which it is named."""

_NEW_FILE: Final = """\
# Who may use this server. Hashes only: a key is shown once, when it is made (manylora keys add).
# After a change: kill -HUP the server. What is wrong is logged, and the server keeps what it has.
"""


def add_key(path: Path, name: str, settings: Mapping[str, Setting], note: str | None = None) -> str:
    """Add a key of the tenant ``name``, with the tenant if it is new and the file if it is; the key.

    ``settings`` are fields of a new tenant's table. Raises KeyFileError.
    """
    try:
        check_name(name)
        for pattern in _list(settings.get("adapters", [])):
            check_pattern(pattern)
        if note is not None and not (note.isprintable() and len(note) <= 200):
            raise ValueError("a note has at most 200 characters that can be printed")
    except ValueError as error:
        raise KeyFileError(f"{path}: {error}") from None
    with _locked(path):
        text = read_text(path) if path.exists() else _NEW_FILE
        before = parse_tenants(text, path)
        is_new = all(rules.tenant.name != name for rules in before)
        if settings and not is_new:
            raise KeyFileError(
                f"{path}: tenants.{name} is there already; change {', '.join(sorted(settings))} in the file, or leave "
                "them out to give the tenant another key"
            )
        key = new_key()
        table = name if "." not in name else _toml(name)
        parts = [text.rstrip("\n")]
        if is_new:
            fields = [f"{field} = {_toml(value)}" for field, value in settings.items()]
            parts.append("\n".join([f"[tenants.{table}]", *fields]))
        lines = [f"[[tenants.{table}.keys]]", f"sha256 = {_toml(hashed(key).hex())}"]
        lines.append(f"created = {datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}")
        if note is not None:
            lines.append(f"note = {_toml(note)}")
        parts.append("\n".join(lines))
        changed = "\n\n".join(parts).lstrip("\n") + "\n"
        after = _parsed(changed, path)
        others = [rules for rules in after or () if rules.tenant.name != name]
        if after is None and is_new and settings:
            parse_tenants(changed, path)  # says which of the settings is wrong
        if others != [rules for rules in before if rules.tenant.name != name] or _keys_of(after, name) != (
            *_keys_of(before, name),
            hashed(key),
        ):
            raise KeyFileError(
                f"{path}: the keys of tenants.{name} are not in tables [[tenants.{name}.keys]], to which one could be "
                "added; nothing was changed"
            )
        _replace(path, changed)
    return key


def list_keys(path: Path) -> list[tuple[TenantRules, list[str]]]:
    """The tenants, each with the names of its keys. Raises KeyFileError."""
    return [(rules, [key.hex()[:_ID_DIGITS] for key in rules.keys]) for rules in read_tenants(path)]


def revoke_key(path: Path, key_id: str) -> str:
    """Take the key out whose hash begins with ``key_id``; the name of its tenant, which stays. Raises KeyFileError."""
    if not re.fullmatch(r"[0-9a-f]{8,64}", key_id):
        raise KeyFileError(
            f"{path}: a key is named by 8 or more digits of its hash, as `manylora keys list` shows them"
        )
    with _locked(path):
        text = read_text(path)
        before = parse_tenants(text, path)
        found = [(one.tenant.name, key) for one in before for key in one.keys if key.hex().startswith(key_id)]
        if len(found) != 1:
            raise KeyFileError(f"{path}: {len(found) or 'no'} keys begin with {key_id}; nothing was changed")
        [(name, key)] = found
        changed = "".join(_without(block, key.hex()) for block in re.split(r"(?m)^(?=[ \t]*\[)", text))
        expected = tuple(replace(one, keys=tuple(other for other in one.keys if other != key)) for one in before)
        if _parsed(changed, path) != expected:
            raise KeyFileError(
                f"{path}: the key is not in a table [[tenants.{name}.keys]] of its own; take it out by hand"
            )
        _replace(path, changed)
    return name


def _without(block: str, digest: str) -> str:
    """A table's text, from its head to the next table's; if it holds ``digest``, only the comments after it."""
    if digest not in block:
        return block
    lines = block.splitlines(keepends=True)
    while lines and (not lines[-1].strip() or lines[-1].lstrip().startswith("#")):
        lines.pop()
    return block[sum(map(len, lines)) :]


def _parsed(text: str, path: Path) -> tuple[TenantRules, ...] | None:
    try:
        return parse_tenants(text, path)
    except KeyFileError:
        return None


def _keys_of(tenants: tuple[TenantRules, ...] | None, name: str) -> tuple[bytes, ...]:
    return next((rules.keys for rules in tenants or () if rules.tenant.name == name), ())


def _list(value: Setting) -> list[str]:
    return value if isinstance(value, list) else []


def _toml(value: Setting) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, str):  # printable, so these are all that a basic string needs
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return repr(value)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone among those who change files of this directory; not the file itself, which is replaced."""
    try:
        directory = os.open(path.resolve().parent, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise KeyFileError(f"{path}: its directory: {error.strerror}") from None
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        yield
    finally:
        os.close(directory)


def _replace(path: Path, text: str) -> None:
    """Write the file anew, in one step; a new one is its owner's alone, an old one keeps its mode."""
    target = path.resolve()  # a link stays one
    try:
        mode = target.stat().st_mode & 0o777 if target.exists() else 0o600
        descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name}-", dir=target.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fchmod(file.fileno(), mode)
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise KeyFileError(f"{path}: {error.strerror}") from None
