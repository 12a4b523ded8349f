"""``manylora adapters ...``: what each action asks of a server, and how its answer is shown. Standard library only."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from manylora.server.config import ConfigError

if TYPE_CHECKING:
    from manylora.server.admin_client import AdminClient

Act = Callable[["AdminClient", argparse.Namespace], dict[str, Any]]

_MIB: Final = 1 << 20


def _load(client: AdminClient, arguments: argparse.Namespace) -> dict[str, Any]:
    replace, pinned = arguments.replace, arguments.pin or None
    if arguments.alias_of is not None:
        if arguments.source is not None or arguments.upload:
            raise ConfigError("--alias-of", "an alias has the weights of the other adapter; give no SOURCE or --upload")
        return client.alias(arguments.name, arguments.alias_of, replace=replace, pinned=pinned)
    if arguments.source is None:
        raise ConfigError("SOURCE", "give the adapter's directory or hub id, or --alias-of")
    source = Path(arguments.source).expanduser()
    if arguments.upload:
        return client.upload(arguments.name, source, replace=replace, pinned=arguments.pin)
    # A directory here is meant by its path, wherever the server was started; what is none may be a hub id.
    where = str(source.absolute()) if source.is_dir() else arguments.source
    return client.load(arguments.name, where, replace=replace, pinned=pinned)


ACTIONS: Final[Mapping[str, Act]] = {
    "list": lambda client, _arguments: client.list(),
    "load": _load,
    "unload": lambda client, arguments: client.unload(arguments.name),
    "pin": lambda client, arguments: client.pin(arguments.name, not arguments.off),
    "merge": lambda client, arguments: client.merge(arguments.name, arguments.mode),
    "unmerge": lambda client, _arguments: client.unmerge(),
}


def shown(answer: Mapping[str, Any]) -> str:
    """An answer of the server as text for people. Raises KeyError or TypeError for one that has not the fields."""
    match answer.get("object"):
        case "list":
            return _table(answer["data"])
        case "adapter.deleted":
            return f"{answer['name']} is unloaded."
        case "adapter.merge":
            return _merged(answer)
        case "adapter.unmerge":
            return f"{answer['name']} is no longer merged; its requests are computed beside the base again."
        case _:
            return "\n".join([_table([answer]), *(f"warning: {warning}" for warning in answer["warnings"])])


def _merged(answer: Mapping[str, Any]) -> str:
    lines = [
        f"{answer['name']} (version {answer['version'][:12]}) is merged, {answer['mode']}: "
        f"{answer['bytes'] / _MIB:.1f} MiB of weights besides the base's."
    ]
    drift = answer.get("drift")
    if drift is not None:
        lines.append(
            f"Drift of its logits from the unmerged adapter's, on a probe: at most {drift['max']:.3g}, "
            f"on average {drift['mean']:.3g}."
        )
    return "\n".join(lines)


def _table(adapters: Sequence[Mapping[str, Any]]) -> str:
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "NAME": lambda one: one["name"],
        "VERSION": lambda one: one["version"][:12],
        "STATE": lambda one: one["state"],
        "TIER": lambda one: one["tier"],
        "MERGED": lambda one: one.get("merged") or "no",
        "PINNED": lambda one: "yes" if one["pinned"] else "no",
        "RANKS": lambda one: ",".join(map(str, one["ranks"])) or "-",
        "MIB": lambda one: f"{one['bytes'] / _MIB:.1f}",
        "RUNNING": lambda one: str(one["requests_in_flight"]),
        "TOKENS": lambda one: str(one["generation_tokens"]),
    }
    if any(one.get("alias_of") for one in adapters):
        columns["ALIAS OF"] = lambda one: one.get("alias_of") or "-"
    rows = [tuple(columns), *(tuple(cell(one) for cell in columns.values()) for one in adapters)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)
