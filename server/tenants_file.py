"""The key file (``--keys FILE``): who may use the server, what, and how much of it. TOML, one table a tenant::

    [tenants.acme]
    adapters = ["acme-*", "shared/summary"]  # names, with * and ? for any characters (`/` too); none, if left out
    base = true                              # whether it may use the base without an adapter; true, if left out
    share = 2.0                              # weight among the tenants who wait; 1, if left out
    max_waiting = 64                         # its requests that may wait; --max-queue, if left out
    requests_per_second = 5.0                # on average, each choice counts as one; unlimited, if left out
    burst = 20                               # requests at once after a pause; two seconds' worth, if left out
    tokens_per_minute = 60000                # of prompts and outputs; unlimited, if left out

    [[tenants.acme.keys]]                    # `manylora keys add` writes these, and prints the key once
    sha256 = "9f86d0..."

The file holds no key, only hashes: sha256 without salt is right for keys of 256 random bits, which nobody can guess,
and for nothing else. No error and no log line repeats what the file holds, as a key may have been put there by mistake.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import secrets
import stat
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NoReturn

from manylora.server.engine.tenant import Tenant

MAX_BYTES: Final = 16 << 20
"""Of a key file: some hundred thousand keys."""

KEY_PREFIX: Final = "mlk_"
"""Of generated keys, so that a scanner finds one that was committed or mailed."""

MAX_KEY_LENGTH: Final = 1024
"""Characters of a key; a longer one is not even hashed."""

_TENANT: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_PATTERN: Final = re.compile(r"[A-Za-z0-9._:/*?-]{1,256}")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_PLACE: Final = re.compile(r"at (?:line \d+, column \d+|end of document)")

_FIELDS: Final = frozenset(
    {"adapters", "base", "share", "max_waiting", "requests_per_second", "burst", "tokens_per_minute", "keys"}
)
_KEY_FIELDS: Final = frozenset({"sha256", "created", "note"})


class KeyFileError(ValueError):
    """The message names the file, and the tenant and the field if it is about one."""


@dataclass(frozen=True)
class TenantRules:
    """One tenant of the key file. ``None``: no limit."""

    tenant: Tenant
    adapters: tuple[str, ...] = ()
    """Names and patterns of names."""
    base: bool = True
    requests_per_second: float | None = None
    burst: int = 0
    """Requests that may come at once; set if ``requests_per_second`` is."""
    tokens_per_minute: int | None = None
    keys: tuple[bytes, ...] = field(default=(), repr=False)
    """sha256 of each."""


def hashed(key: str) -> bytes:
    """sha256 of a key, as the key file has it in hexadecimal digits."""
    return hashlib.sha256(key.encode()).digest()


def new_key() -> str:
    """A key of 256 random bits."""
    return KEY_PREFIX + secrets.token_urlsafe(32)


def check_name(name: str) -> None:
    """Raise ValueError unless a tenant may be called so: its name is a metric's label and a word in the log."""
    if not _TENANT.fullmatch(name):
        raise ValueError("a tenant's name has 1 to 64 letters, digits and . _ - and begins with a letter or digit")


def check_pattern(pattern: object) -> str:
    """The pattern. Raises ValueError if no adapter's name could match it, or it is not one."""
    if not isinstance(pattern, str) or not _PATTERN.fullmatch(pattern):
        raise ValueError("expected names of adapters, with * and ? for any characters")
    return pattern


def read_tenants(path: Path) -> tuple[TenantRules, ...]:
    """The tenants of a key file. Raises KeyFileError for the first thing that is wrong."""
    return parse_tenants(read_text(path), path)


def read_text(path: Path) -> str:
    """Raises KeyFileError."""
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise KeyFileError(f"{path}: {error.strerror}") from None
    if mode & stat.S_IWOTH:
        raise KeyFileError(f"{path}: everybody on this machine may change it; chmod o-w")
    if len(raw) > MAX_BYTES:
        raise KeyFileError(f"{path}: it is larger than {MAX_BYTES} bytes")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise KeyFileError(f"{path}: it is not UTF-8 text") from None


def parse_tenants(text: str, path: Path) -> tuple[TenantRules, ...]:
    """The tenants in a key file's text; ``path`` is for the messages. Raises KeyFileError."""
    try:
        document = tomllib.loads(text)
    except ValueError as error:  # TOMLDecodeError, or a number of thousands of digits
        place = _PLACE.search(str(error))  # the rest of the message may quote the file
        raise KeyFileError(f"{path}: it is not valid TOML{'' if place is None else f' ({place[0]})'}") from None
    except RecursionError:
        raise KeyFileError(f"{path}: it is nested too deeply") from None
    if document.keys() - {"tenants"}:
        raise KeyFileError(f"{path}: expected tables [tenants.NAME] only")
    tables = document.get("tenants", {})
    if not isinstance(tables, dict):
        raise KeyFileError(f"{path}: expected tables [tenants.NAME]")
    rules = tuple(_Table(path, name, table).rules() for name, table in tables.items())
    owners: dict[bytes, str] = {}
    for one in rules:
        for i, key in enumerate(one.keys):
            other = owners.setdefault(key, one.tenant.name)
            if other != one.tenant.name or one.keys.index(key) != i:
                raise KeyFileError(f"{path}: tenants.{one.tenant.name}.keys[{i}]: tenant {other} has the same key")
    return rules


class _Table:
    """One tenant's table, with errors that name what is wrong in it."""

    def __init__(self, path: Path, name: str, table: object) -> None:
        self._path = path
        self._name = name
        try:
            check_name(name)
        except ValueError as error:
            raise KeyFileError(f"{path}: {error}") from None
        if not isinstance(table, dict):
            raise KeyFileError(f"{path}: tenants.{name}: expected a table")
        self._table: Mapping[str, Any] = table
        if table.keys() - _FIELDS:
            self._fail(None, f"it has a field that is none of {', '.join(sorted(_FIELDS))}")

    def rules(self) -> TenantRules:
        rate = self._number("requests_per_second", 1e-3, 1e6)
        burst = self._integer("burst", 1, 1 << 20)
        if burst is not None and rate is None:
            self._fail("burst", "it needs requests_per_second")
        share = self._number("share", 1e-3, 1e6)
        tenant = Tenant(self._name, 1.0 if share is None else share, self._integer("max_waiting", 0, 1 << 20))
        return TenantRules(
            tenant,
            adapters=self._patterns(),
            base=self._flag("base", default=True),
            requests_per_second=rate,
            burst=0 if rate is None else burst or max(1, math.ceil(2 * rate)),
            tokens_per_minute=self._integer("tokens_per_minute", 1, 1 << 50),
            keys=self._keys(),
        )

    def _fail(self, field: str | None, problem: str) -> NoReturn:
        where = f"tenants.{self._name}" + ("" if field is None else f".{field}")
        raise KeyFileError(f"{self._path}: {where}: {problem}")

    def _number(self, field: str, low: float, high: float) -> float | None:
        value = self._table.get(field)
        # type(), not isinstance: true is an int to Python. The comparison refuses nan.
        if value is not None and (type(value) not in (int, float) or not low <= value <= high):
            self._fail(field, f"expected a number from {low:g} to {high:g}")
        return None if value is None else float(value)

    def _integer(self, field: str, low: int, high: int) -> int | None:
        value = self._table.get(field)
        if value is None:
            return None
        if type(value) is not int or not low <= value <= high:
            self._fail(field, f"expected a whole number from {low} to {high}")
        return value

    def _flag(self, field: str, *, default: bool) -> bool:
        value = self._table.get(field, default)
        if not isinstance(value, bool):
            self._fail(field, "expected true or false")
        return value

    def _patterns(self) -> tuple[str, ...]:
        value = self._table.get("adapters", [])
        if not isinstance(value, list):
            self._fail("adapters", "expected a list of names")
        for i, one in enumerate(value):
            try:
                check_pattern(one)
            except ValueError as error:
                self._fail(f"adapters[{i}]", str(error))
        return tuple(value)

    def _keys(self) -> tuple[bytes, ...]:
        value = self._table.get("keys", [])
        if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
            self._fail("keys", f"expected tables [[tenants.{self._name}.keys]]")
        for i, one in enumerate(value):
            if one.keys() - _KEY_FIELDS:
                self._fail(f"keys[{i}]", f"it has a field that is none of {', '.join(sorted(_KEY_FIELDS))}")
            if not isinstance(one.get("sha256"), str) or not _SHA256.fullmatch(one["sha256"]):
                self._fail(f"keys[{i}].sha256", "expected 64 hexadecimal digits in lower case: a key's sha256")
        return tuple(bytes.fromhex(one["sha256"]) for one in value)
