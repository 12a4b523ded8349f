"""The flags of every command, with the help that teaches them. What they mean is checked in config.py."""

from __future__ import annotations

import argparse
from typing import Any

Commands = Any  # argparse keeps the class of add_subparsers' result private


def _command(commands: Commands, name: str, summary: str, description: str, example: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=f"example:\n{example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def add_serve(commands: Commands) -> argparse.ArgumentParser:
    parser = _command(
        commands,
        "serve",
        "serve a base model and its adapters over HTTP",
        "Load a base model, in NF4, and serve it with any number of LoRA adapters to OpenAI's, vLLM's and SGLang's\n"
        "clients. Adapters loaded over HTTP are remembered and come back after a restart with the same flags.",
        "  manylora serve --model Qwen/Qwen3-0.6B --adapter alice=./alice --adapter bob=org/bob-lora\n"
        "  curl localhost:8000/v1/completions -H 'Content-Type: application/json' \\\n"
        '    -d \'{"model": "alice", "prompt": "Once upon a time", "max_tokens": 32}\'',
    )
    add = parser.add_argument_group("model").add_argument
    add(
        "--model", metavar="M", help="checkpoint directory, .gguf file or hub id (default: the demo base, if installed)"
    )
    add("--served-model-name", metavar="NAME", help="what requests call the base (default: its folder, file or hub id)")
    add("--cache-dir", metavar="DIR", help="where the quantised base is cached (default: the user's cache directory)")

    add = parser.add_argument_group("adapters").add_argument
    add("--adapter", metavar="NAME=PATH", action="append", default=[], help="load an adapter; may be repeated")
    add("--adapter-dir", metavar="DIR", help="load every adapter directory in DIR, named by its folder")
    add(
        "--auto-merge",
        metavar="SHARE:SECONDS[:MODE]",
        help="merge an adapter into a copy of the weights by itself while it has more than SHARE (0 to 1) of the "
        "tokens generated over the last SECONDS; MODE is exact (default) or compact (default: off)",
    )
    add(
        "--watch",
        metavar="SECONDS",
        type=float,
        nargs="?",
        const=5.0,
        help="look at --adapter-dir every so often, and load, replace and unload as its folders come, change and go "
        "(default, if given without a number: %(const)g)",
    )
    add(
        "--adapters-on-demand",
        metavar="N",
        type=int,
        nargs="?",
        const=1000,
        default=0,
        help="let requests name any folder below an --adapter-root: it is loaded then; at most N at a time, the least "
        "recently used idle one is forgotten (off by default; N, if not given: %(const)s)",
    )
    add(
        "--adapter-root",
        metavar="DIR",
        action="append",
        default=[],
        help="allow loading adapters from below DIR over HTTP; may be repeated (default: --adapter-dir, if given)",
    )
    add(
        "--state-dir",
        metavar="DIR",
        help="remembers adapters across restarts and keeps uploads; `none` for neither "
        "(default: ~/.local/state/manylora/<model>-<port>, or under XDG_STATE_HOME)",
    )
    add("--max-upload", metavar="BYTES", default="1GiB", help="largest upload of an adapter (default: %(default)s)")

    add = parser.add_argument_group("HTTP").add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    add("--port", type=int, default=8000, help="port to listen on; 0 for any that is free (default: %(default)s)")
    add(
        "--api-key",
        metavar="K",
        action="append",
        default=[],
        help="a key that requests must bear; may be repeated (default: $MANYLORA_API_KEY, or open)",
    )
    add(
        "--admin-key",
        metavar="K",
        help="the key for managing adapters (default: $MANYLORA_ADMIN_KEY; without one, only a server that listens on "
        "this machine alone can be managed)",
    )
    add(
        "--keys",
        metavar="FILE",
        help="tenants: their keys, adapters and limits, as `manylora keys` writes them; read again on SIGHUP",
    )
    add("--no-playground", action="store_true", help="no page at /, where answers can be tried out in a browser")
    add("--protect-metrics", action="store_true", help="/metrics takes the admin key: it names adapters and tenants")
    add(
        "--request-timeout",
        metavar="SECONDS",
        type=float,
        default=600.0,
        help="abort a request that takes longer; 0 for any (default: %(default)g)",
    )
    add(
        "--client-timeout",
        metavar="SECONDS",
        type=float,
        default=60.0,
        help="drop a client that sends its request, or takes its answer, too slowly (default: %(default)g)",
    )
    add("--max-body", metavar="BYTES", default="16MiB", help="largest body of other requests (default: %(default)s)")
    add(
        "--max-speculative-tokens",
        metavar="N",
        type=int,
        default=8,
        help="the most that a request may have guessed at once by its speculative_config; 0 to take none (default: "
        "%(default)s)",
    )
    add("--allow-request-chat-template", action="store_true", help="let requests bring their own chat template")
    add(
        "--tool-call-parser",
        metavar="P",
        default="auto",
        help="how the model writes tool calls: auto (as its chat template does), hermes, llama3_json, mistral, "
        "mistral_args, or none to take no tools (default: %(default)s)",
    )
    add(
        "--shutdown-grace",
        metavar="SECONDS",
        type=float,
        default=30.0,
        help="how long running requests may take to finish after SIGTERM (default: %(default)g)",
    )
    add("--log-level", default="info", metavar="LEVEL", help="debug, info, warning or error (default: %(default)s)")
    add("--log-format", default="text", metavar="F", help="text, or json: an object a line (default: %(default)s)")
    add(
        "--otlp-endpoint",
        metavar="URL",
        help="send traces to this OpenTelemetry collector, over HTTP (needs the extra `otel`; default: off)",
    )

    add_sizes(parser, max_rank=256)
    return parser


def add_sizes(parser: argparse.ArgumentParser, *, max_rank: int | None) -> None:
    """The flags of ``EngineConfig``."""
    add = parser.add_argument_group("sizes (by default chosen for the device and the model, and logged)").add_argument
    add("--device", default="auto", metavar="D", help="auto, cpu or cuda (default: %(default)s)")
    add(
        "--cpu-kernels",
        default="auto",
        metavar="K",
        help="auto, avx512, avx2 or torch: what a CPU computes with; auto tests the fastest kernels that it can run "
        "against torch, and takes torch if they fail (default: %(default)s)",
    )
    add(
        "--cpu-arithmetic",
        default="int16",
        metavar="A",
        help="int16, int8 or fp32: how the CPU kernels multiply NF4 weights, and the table that makes logits. int16 "
        "rounds both sides to integers, off by 1e-4 of a product, a twelfth or less of what bf16 would be; int8 is off "
        "by 0.65 percent but for the largest inputs, which are exact, so that answers are about as near to fp32's as "
        "in bf16, and takes 0.7 to 0.9 of the time on a processor with VNNI, and half of the table more memory; fp32 "
        "rounds nothing but sums, and takes two to three times as long for few rows (default: %(default)s)",
    )
    add(
        "--lora-dtype",
        default="auto",
        metavar="T",
        help="auto, int16, int8, float32 or bfloat16: what adapters are held in on the device. On a CPU auto is what "
        "--cpu-arithmetic says; int16 is whole numbers of 1/32767 of the largest of each rank, half the bytes of "
        "float32; int8 of 1/127, a quarter of the bytes, and a delta is off by about one percent of itself; bfloat16 "
        "is exact for adapters that were saved so (default: %(default)s)",
    )
    add("--threads", type=int, metavar="N", help="CPU threads of the forward pass")
    add("--max-rows", type=int, metavar="N", help="requests computed together")
    add("--max-batch-tokens", type=int, metavar="N", help="tokens computed in one step; longer prompts go in chunks")
    add("--max-context", type=int, metavar="N", help="tokens of a prompt and its completion together")
    add("--max-queue", type=int, default=1024, metavar="N", help="requests that may wait (default: %(default)s)")
    add("--max-device-adapters", type=int, metavar="N", help="adapters on the device at once; more take turns")
    add("--table-memory", metavar="BYTES", help="embedding and lm_head rows that adapters replace, on the device")
    add("--host-memory", metavar="BYTES", help="adapters in host memory; more are read again (default: a quarter)")
    add("--max-host-adapters", type=int, metavar="N", help="adapters in host memory at once (default: what fits)")
    rank = "--rank" if max_rank is None else "%(default)s"
    add("--max-rank", type=int, default=max_rank, metavar="R", help=f"largest rank of an adapter (default: {rank})")
    add(
        "--kv-memory",
        metavar="BYTES",
        help="memory for keys and values, e.g. 2GiB; they are held in 16-bit "
        "integers by the CPU kernels, in fp32 with --cpu-arithmetic fp32",
    )
    add(
        "--prefix-cache",
        choices=("on", "off"),
        default="on",
        help="keep keys and values of past requests in what --kv-memory leaves, for requests that begin alike: of one "
        "tenant, one adapter version and scale, and one cache_salt (default: %(default)s)",
    )


def add_plan(commands: Commands) -> argparse.ArgumentParser:
    parser = _command(
        commands,
        "plan",
        "say what a server would take, and how fast it could be at best",
        "Print the memory that a server of these sizes takes, part by part, how many adapters it holds where, and how\n"
        "long a decode step takes at least: what it must read over the memory's bandwidth. No weight is read. What\n"
        "does not fit is refused (exit code 2), with what to change. The same code sizes `serve`, which logs it.",
        "  manylora plan --model Qwen/Qwen3-0.6B --adapters 100 --rank 16 --memory 24GiB",
    )
    add = parser.add_argument_group("what is to be served").add_argument
    add(
        "--model", metavar="M", help="checkpoint directory, .gguf file or hub id (default: the demo base, if installed)"
    )
    add("--adapters", type=int, metavar="N", help="how many adapters there will be")
    add("--rank", type=int, default=16, metavar="R", help="of the adapters (default: %(default)s)")
    add(
        "--context",
        type=int,
        default=512,
        metavar="N",
        help="tokens of a request, for the floor (default: %(default)s)",
    )
    add("--memory", metavar="BYTES", help="of the device; on a CPU of the machine (default: what is free here)")
    add(
        "--bandwidth",
        metavar="B",
        help="bytes a second of its memory, such as 3350GB (default: measured, if it is here)",
    )
    add("--json", action="store_true", help="print JSON, in bytes and milliseconds")
    add_sizes(parser, max_rank=None)
    return parser


def add_quantize(commands: Commands) -> argparse.ArgumentParser:
    parser = _command(
        commands,
        "quantize",
        "write a model's NF4 checkpoint",
        "Quantise a 16- or 32-bit model to NF4 and write it as a checkpoint that transformers and bitsandbytes load\n"
        "too. `serve` does the same on its own, into its cache; this is for keeping or moving the result.",
        "  manylora quantize Qwen/Qwen3-0.6B ./qwen3-0.6b-nf4",
    )
    parser.add_argument("source", metavar="SRC", help="checkpoint directory, .gguf file or hub id")
    parser.add_argument("destination", metavar="DST", help="new directory; nothing is ever overwritten")
    return parser


def add_merge(commands: Commands) -> argparse.ArgumentParser:
    parser = _command(
        commands,
        "merge",
        "write a base and an adapter as one plain checkpoint",
        "Merge an adapter into a base, as PEFT's merge_and_unload does, and write the result as a bf16 checkpoint\n"
        "that transformers loads. The sums are made in fp32 and rounded once. A DoRA is normed over BASE as it is\n"
        "given: give the weights it was trained on.",
        "  manylora merge Qwen/Qwen3-0.6B ./adapters/alice ./qwen3-alice",
    )
    parser.add_argument("base", metavar="BASE", help="checkpoint directory, .gguf file or hub id; 16 bits or NF4")
    parser.add_argument("source", metavar="ADAPTER", help="adapter directory or hub id")
    parser.add_argument("destination", metavar="OUT", help="new directory; nothing is ever overwritten")
    return parser


def add_inspect(commands: Commands) -> argparse.ArgumentParser:
    parser = _command(
        commands,
        "inspect",
        "say what loading an adapter would report",
        "Check an adapter as `serve` would, and print its ranks, scales, modules and warnings, or every reason why it\n"
        "would be refused (exit code 2). Without --model only what needs no base is checked.",
        "  manylora inspect ./adapters/alice --model Qwen/Qwen3-0.6B",
    )
    parser.add_argument("source", metavar="ADAPTER", help="adapter directory or hub id")
    parser.add_argument("--model", metavar="M", help="the base: checkpoint directory, .gguf file or hub id")
    parser.add_argument("--max-rank", type=int, default=256, metavar="R", help="largest rank (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def add_keys(commands: Commands) -> dict[str, argparse.ArgumentParser]:
    """The subcommands of ``keys``, by name."""
    parser = _command(
        commands,
        "keys",
        "make and revoke the keys of tenants",
        "Change a key file, which `serve --keys FILE` reads: who may use the server, which adapters, and how much.\n"
        "The file holds hashes of keys only. A running server reads it again on SIGHUP.",
        "  manylora keys add keys.toml acme --adapters 'acme-*' --requests-per-second 5",
    )
    actions = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def action(name: str, summary: str, example: str) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = actions.add_parser(
            name, help=summary, description=summary, epilog=f"example: manylora keys {example}"
        )
        made.add_argument("file", metavar="FILE", help="the key file")
        return made

    adding = action(
        "add",
        "Make a key, and the tenant if it is new. The key is printed, once; the file gets its hash.",
        "add keys.toml acme --adapters 'acme-*' shared --share 2",
    )
    adding.add_argument("name", metavar="NAME", help="the tenant")
    adding.add_argument("--note", metavar="TEXT", help="whom or what the key is for")
    add = adding.add_argument_group("a new tenant").add_argument
    add("--adapters", metavar="PATTERN", nargs="+", help="adapters it may use: names, * and ? for any characters")
    add("--no-base", action="store_true", help="it may not use the base without an adapter")
    add("--share", metavar="WEIGHT", type=float, help="its share of the server when others wait too (default: 1)")
    add("--max-waiting", metavar="N", type=int, help="its requests that may wait (default: --max-queue)")
    add("--requests-per-second", metavar="R", type=float, help="on average; each choice counts as one")
    add("--burst", metavar="N", type=int, help="requests at once after a pause (default: two seconds' worth)")
    add("--tokens-per-minute", metavar="N", type=int, help="of prompts and outputs, on average")
    listing = action("list", "Show the tenants and the names of their keys.", "list keys.toml")
    revoking = action("revoke", "Take a key out of the file.", "revoke keys.toml 9f86d081884c")
    revoking.add_argument("key", metavar="KEY", help="its name, as `list` shows it")
    return {"add": adding, "list": listing, "revoke": revoking}


def add_adapters(commands: Commands) -> dict[str, argparse.ArgumentParser]:
    """The subcommands of ``adapters``, by name."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--url", default="http://127.0.0.1:8000", help="the server (default: %(default)s)", metavar="URL"
    )
    shared.add_argument("--admin-key", metavar="K", help="its admin key (default: $MANYLORA_ADMIN_KEY)")
    shared.add_argument("--json", action="store_true", help="print the server's answer as JSON")
    parser = _command(
        commands,
        "adapters",
        "manage the adapters of a running server",
        "List, load, unload, pin and merge the adapters of a running server.",
        "  manylora adapters load alice ./adapters/alice --url http://127.0.0.1:8000",
    )
    actions = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def action(name: str, summary: str, example: str) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = actions.add_parser(
            name, parents=[shared], help=summary, description=summary, epilog=f"example: manylora adapters {example}"
        )
        return made

    listed = action("list", "Show every adapter.", "list --json")
    load = action("load", "Load an adapter into the server.", "load alice ./adapters/alice --replace")
    load.add_argument("name", metavar="NAME")
    load.add_argument(
        "source", metavar="SOURCE", nargs="?", help="directory below one of the server's --adapter-root, or a hub id"
    )
    load.add_argument("--alias-of", metavar="OTHER", help="instead of SOURCE: the version that OTHER has now")
    load.add_argument("--replace", action="store_true", help="replace the adapter that has this name")
    load.add_argument("--pin", action="store_true", help="keep it on the device even when idle")
    load.add_argument("--upload", action="store_true", help="send the directory's files, to a server elsewhere")
    unload = action("unload", "Unload an adapter; running requests finish.", "unload alice")
    unload.add_argument("name", metavar="NAME")
    pin = action("pin", "Keep an adapter on the device even when idle.", "pin alice")
    pin.add_argument("name", metavar="NAME")
    pin.add_argument("--off", action="store_true", help="no longer keep it there")
    merge = action(
        "merge", "Compute an adapter's requests with merged weights, at the base's own speed.", "merge alice"
    )
    merge.add_argument("name", metavar="NAME")
    merge.add_argument(
        "--mode",
        choices=("exact", "compact"),
        default="exact",
        help="exact: merged weights in 16 bits, which takes memory; compact: in NF4, with a drift that is measured and "
        "told (default: %(default)s)",
    )
    unmerge = action("unmerge", "Compute the merged adapter's requests beside the base again.", "unmerge")
    return {"list": listed, "load": load, "unload": unload, "pin": pin, "merge": merge, "unmerge": unmerge}
