"""What ``manylora serve`` was asked to do: frozen dataclasses, every check in ``__post_init__``.

Each error names the flag that is wrong, what it got and what it takes, so that nothing is discovered later, half way
through a load. Values that depend on the device or the model (``None`` here) are chosen where those are known.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, get_args
from urllib.parse import urlsplit

from manylora.kernels.cpu import Arithmetic
from manylora.server.engine.auto_merge import AutoMerge
from manylora.server.logs import LogFormat
from manylora.server.tenants_file import MAX_KEY_LENGTH, KeyFileError, TenantRules, hashed, read_tenants

Device = Literal["auto", "cpu", "cuda"]
CpuKernels = Literal["auto", "avx512", "avx2", "torch"]
LoraDtype = Literal["auto", "float32", "bfloat16", "int16", "int8"]
ToolCallParser = Literal["auto", "hermes", "llama3_json", "mistral", "mistral_args", "none"]
LogLevel = Literal["debug", "info", "warning", "error"]

_MIB: Final = 1 << 20
_SIZE: Final = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", re.IGNORECASE)
_DECIMAL: Final = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY: Final = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


class ConfigError(ValueError):
    """A flag is wrong; the message begins with its name. The command line turns it into exit code 2."""

    def __init__(self, flag: str, problem: str) -> None:
        super().__init__(f"{flag}: {problem}")
        self.flag = flag


def parse_size(text: str, flag: str = "size") -> int:
    """Bytes of ``"512MiB"``, ``"2GB"``, ``"1.5g"`` or ``"1048576"``. ``k m g t`` are decimal, ``ki mi gi ti`` not."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ConfigError(flag, f"expected a size such as 512MiB, 2GB or 1048576 (bytes), got {text!r}")
    number, unit, binary = match.groups()
    return int(float(number) * (_BINARY if binary else _DECIMAL)[unit.lower()])


def is_loopback(host: str) -> bool:
    """Whether a server bound to ``host`` can be reached from this machine only."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False  # another host name: it may resolve to anything, so it is taken to be public


@dataclass(frozen=True)
class AdapterSpec:
    """An adapter to load at the start: ``--adapter name=path``."""

    name: str
    source: str

    @classmethod
    def parse(cls, text: str) -> AdapterSpec:
        name, separator, source = text.partition("=")
        if not separator or not name or not source:
            raise ConfigError("--adapter", f"expected NAME=PATH, got {text!r}")
        return cls(name, source)


def parse_auto_merge(text: str) -> AutoMerge:
    """``--auto-merge SHARE:SECONDS[:MODE]``."""
    try:
        return AutoMerge.parse(text)
    except ValueError as error:
        raise ConfigError("--auto-merge", str(error)) from error


@dataclass(frozen=True)
class EngineConfig:
    """Sizes of the engine. ``None``: chosen for the device and the model at the start, and logged."""

    device: Device = "auto"
    cpu_kernels: CpuKernels = "auto"
    """Which kernels a CPU computes with, by ``kernels.cpu.VARIANTS``; ``auto``: the fastest that it can run and that do
    what torch does; ``torch``: none."""
    cpu_arithmetic: Arithmetic = "int16"
    """How those kernels multiply NF4 weights, and logits'. ``int16``: both sides rounded to integers, off by 1e-4 of a
    product, a twelfth or less of what bf16 would be; ``int8``: off by 0.65 percent, but for the largest inputs,
    which are exact, so that answers are about as near to fp32's as in bf16; fastest on a processor with VNNI; ``fp32``:
    nothing rounded but sums, slower for few rows."""
    lora_dtype: LoraDtype = "auto"
    """What adapters' A and B are held in on the device. ``auto``: on a CPU what ``cpu_arithmetic`` says, else what is
    computed in. ``int16``: whole numbers of 1/32767 of the largest of each rank; ``int8``: of 1/127, half as many
    bytes, and a delta is off by about one percent of itself. ``bfloat16`` on a CPU: as many bytes as ``int16``;
    adapters saved in fp32 or fp16 are rounded to it, those saved in bf16 lose nothing."""
    max_rows: int | None = None
    """Requests computed together in one step."""
    max_device_adapters: int | None = None
    """Adapter slots on the device; more adapters than this take turns."""
    max_host_adapters: int | None = None
    """Adapter versions in host memory; more than this are read again when they are used. ``None``: as many as
    ``host_memory`` holds."""
    table_memory: int | None = None
    """Bytes on the device for rows of the embedding and of ``lm_head`` that adapters replace, all together."""
    host_memory: int | None = None
    """Bytes for adapters in host memory."""
    max_rank: int = 256
    max_context: int | None = None
    """Tokens of prompt and completion together; at most the model's own."""
    max_batch_tokens: int | None = None
    """Tokens computed in one step; longer prompts are prefilled in chunks."""
    max_queue: int = 1024
    """Requests that may wait; one more is answered 429."""
    kv_memory: int | None = None
    """Bytes for keys and values. The CPU kernels hold them in integers of 16 bits and a scale for each vector, or in
    fp32 if that is what they multiply."""
    prefix_cache: bool = True
    """Keep the keys and values of past requests for those that begin alike, until the memory is needed."""
    threads: int | None = None
    """CPU threads of the forward pass."""

    def __post_init__(self) -> None:
        _one_of("--device", self.device, get_args(Device))
        _one_of("--cpu-kernels", self.cpu_kernels, get_args(CpuKernels))
        _one_of("--cpu-arithmetic", self.cpu_arithmetic, get_args(Arithmetic))
        _one_of("--lora-dtype", self.lora_dtype, get_args(LoraDtype))
        if self.device == "cuda" and self.cpu_kernels != "auto":
            raise ConfigError(
                "--cpu-kernels", f"{self.cpu_kernels} was asked for, but --device cuda uses no CPU kernels"
            )
        for flag, value, low, high in (
            ("--max-rows", self.max_rows, 1, 4096),
            ("--max-device-adapters", self.max_device_adapters, 1, 65536),
            ("--max-host-adapters", self.max_host_adapters, 1, 1 << 20),
            ("--host-memory", self.host_memory, _MIB, 1 << 50),
            ("--table-memory", self.table_memory, 0, 1 << 50),
            ("--max-rank", self.max_rank, 1, 1024),
            ("--max-context", self.max_context, 2, 1 << 24),
            ("--max-batch-tokens", self.max_batch_tokens, 1, 1 << 20),
            ("--max-queue", self.max_queue, 0, 1 << 20),
            ("--kv-memory", self.kv_memory, _MIB, 1 << 50),
            ("--threads", self.threads, 1, 4096),
        ):
            _between(flag, value, low, high)
        if self.max_rows is not None and self.max_batch_tokens is not None and self.max_batch_tokens < self.max_rows:
            # Every decoding row costs one token of a step's budget.
            raise ConfigError(
                "--max-batch-tokens", f"{self.max_batch_tokens} is below --max-rows {self.max_rows}: each row needs one"
            )


@dataclass(frozen=True)
class ApiConfig:
    """The HTTP surface: where it listens, who may use it, and its limits."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    admin_key: str | None = field(default=None, repr=False)
    keys_file: Path | None = None
    """The tenants with their keys, see ``server.tenants_file``."""
    protect_metrics: bool = False
    """``/metrics``, which names every adapter and tenant, takes the admin key."""
    adapter_roots: tuple[Path, ...] = ()
    """The directories that an admin request may load adapters from (hub ids are not paths and always may be)."""
    adapters_on_demand: int = 0
    """Requests may name adapters that are not loaded: folders of ``adapter_roots``, which are then loaded, so many at a
    time. 0: off."""
    playground: bool = True
    """Serve the playground's page at ``/``."""
    upload_dir: Path | None = None
    """Where uploaded adapters are kept; ``None``: uploads are off."""
    allow_request_chat_template: bool = False
    """A template is code that runs here, so requests may not bring their own unless the operator says so."""
    tool_call_parser: ToolCallParser = "auto"
    """The format in which models write tool calls; ``auto``: the one that the chat template shows."""
    max_body_bytes: int = 16 * _MIB
    max_upload_bytes: int = 1024 * _MIB
    max_choices: int = 128
    """Choices of one request: ``n`` times its prompts."""
    max_speculative_tokens: int = 8
    """Drafts at once that a request may ask for; 0: there is no speculation."""
    request_timeout: float | None = 600.0
    """Seconds from a request's arrival to the end of its answer; then it is aborted. ``None``: any."""
    client_timeout: float = 60.0
    """Seconds within which a client must send the head of a request, or take some of what was sent to it."""
    otlp_endpoint: str | None = None
    """URL of an OTLP/HTTP collector that traces are sent to; ``None``: no traces."""
    shutdown_grace: float = 30.0
    """Seconds that running requests get to finish after SIGTERM."""

    def __post_init__(self) -> None:
        _one_of("--tool-call-parser", self.tool_call_parser, get_args(ToolCallParser))
        if not self.host:
            raise ConfigError("--host", "expected a host name or address, got an empty string")
        _between("--port", self.port, 0, 65535)
        for flag, keys in (("--api-key", self.api_keys), ("--admin-key", (self.admin_key,))):
            for key in keys:
                if key is not None and (
                    not 1 <= len(key) <= MAX_KEY_LENGTH or not key.isascii() or not key.isprintable() or " " in key
                ):
                    raise ConfigError(
                        flag, f"a key must be 1 to {MAX_KEY_LENGTH} printable ASCII characters without spaces"
                    )
        if self.admin_key is not None and self.admin_key in self.api_keys:
            raise ConfigError("--admin-key", "it must differ from every --api-key, or clients could manage adapters")
        if self.protect_metrics and self.admin_key is None:
            raise ConfigError("--protect-metrics", "it takes the admin key to see them: give --admin-key")
        self.read_tenants()
        for root in self.adapter_roots:
            if not root.is_dir():
                raise ConfigError("--adapter-root", f"{root} is not a directory")
        _between("--adapters-on-demand", self.adapters_on_demand, 0, 1 << 20)
        if self.adapters_on_demand and not self.adapter_roots:
            raise ConfigError("--adapters-on-demand", "it needs a directory to load from: give --adapter-root")
        _between("--max-body", self.max_body_bytes, 1024, 1 << 40)
        _between("--max-upload", self.max_upload_bytes, 1024, 1 << 40)
        _between("--max-choices", self.max_choices, 1, 4096)
        _between("--max-speculative-tokens", self.max_speculative_tokens, 0, 64)
        if self.request_timeout is not None and not 0.1 <= self.request_timeout <= 7 * 86400:
            raise ConfigError("--request-timeout", f"expected 0.1 to 604800 seconds, got {self.request_timeout:g}")
        if not 0.1 <= self.client_timeout <= 86400:
            raise ConfigError("--client-timeout", f"expected 0.1 to 86400 seconds, got {self.client_timeout:g}")
        if self.otlp_endpoint is not None:
            _check_collector(self.otlp_endpoint)
        if not 0 <= self.shutdown_grace <= 86400:
            raise ConfigError("--shutdown-grace", f"expected 0 to 86400 seconds, got {self.shutdown_grace}")

    @property
    def is_public(self) -> bool:
        """Whether other machines may be able to reach the server."""
        return not is_loopback(self.host)

    def read_tenants(self) -> tuple[TenantRules, ...]:
        """What the key file says now; nothing without one. Raises ConfigError."""
        if self.keys_file is None:
            return ()
        try:
            tenants = read_tenants(self.keys_file)
        except KeyFileError as error:
            raise ConfigError("--keys", str(error)) from error
        own = {"--api-key": self.api_keys, "--admin-key": () if self.admin_key is None else (self.admin_key,)}
        for flag, keys in own.items():
            hashes = {hashed(key) for key in keys}
            for rules in tenants:
                if not hashes.isdisjoint(rules.keys):
                    name = rules.tenant.name
                    raise ConfigError("--keys", f"{self.keys_file}: tenants.{name}.keys: one of them is also {flag}")
        return tenants


@dataclass(frozen=True)
class ServeConfig:
    """Everything ``manylora serve`` needs."""

    model: str
    """A directory, a GGUF file or a hub id."""
    served_model_name: str | None = None
    adapters: tuple[AdapterSpec, ...] = ()
    adapter_dir: Path | None = None
    """Every adapter directory in it is loaded, named by its folder."""
    auto_merge: AutoMerge | None = None
    """When to merge an adapter by itself; ``None``: never."""
    watch: float | None = None
    """Seconds between two looks at ``adapter_dir`` for folders that are new, changed or gone; ``None``: one look, at
    the start."""
    state_dir: Path | None = None
    """Remembers the adapters' names and sources across restarts, and keeps uploads; ``None``: nothing is kept."""
    cache_dir: Path | None = None
    """Where the quantised base is cached; ``None``: the loader's default."""
    log_level: LogLevel = "info"
    log_format: LogFormat = "text"
    engine: EngineConfig = field(default_factory=EngineConfig)
    api: ApiConfig = field(default_factory=ApiConfig)

    def __post_init__(self) -> None:
        if not self.model:
            raise ConfigError("--model", "expected a directory, a GGUF file or a hub id, got an empty string")
        if self.served_model_name is not None and not self.served_model_name.strip():
            raise ConfigError("--served-model-name", "expected a name, got an empty string")
        _one_of("--log-level", self.log_level, get_args(LogLevel))
        _one_of("--log-format", self.log_format, get_args(LogFormat))
        seen: set[str] = set()
        for spec in self.adapters:
            if spec.name in seen:
                raise ConfigError("--adapter", f"the name {spec.name!r} is given twice")
            if spec.name == self.served_model_name:
                raise ConfigError("--adapter", f"the name {spec.name!r} is the base model's (--served-model-name)")
            seen.add(spec.name)
        if self.adapter_dir is not None and not self.adapter_dir.is_dir():
            raise ConfigError("--adapter-dir", f"{self.adapter_dir} is not a directory")
        if self.watch is not None:
            if self.adapter_dir is None:
                raise ConfigError("--watch", "there is nothing to watch: give --adapter-dir")
            if not 0.1 <= self.watch <= 86400:
                raise ConfigError("--watch", f"expected 0.1 to 86400 seconds, got {self.watch:g}")

    @property
    def registry_state(self) -> Path | None:
        """The file that remembers the adapters."""
        return None if self.state_dir is None else self.state_dir / "adapters.json"


def default_state_dir(model: str, port: int, environ: Callable[[str], str | None] = os.environ.get) -> Path | None:
    """``$XDG_STATE_HOME/manylora/<model>-<port>``: a restart with the same flags finds what it left.

    ``None`` for port 0, since a restart would have another port. Keyed by both, so that two servers on one machine do
    not overwrite each other's list, and another model on the same port does not try adapters that cannot fit it.
    """
    if port == 0:
        return None
    home = environ("XDG_STATE_HOME") or os.path.join(os.path.expanduser("~"), ".local", "state")
    name = model.rstrip("/").rsplit("/", 1)[-1].removesuffix(".gguf")
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"
    return Path(home) / "manylora" / f"{slug}-{port}"


def _check_collector(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError("--otlp-endpoint", f"expected a URL such as http://127.0.0.1:4318, got {url!r}")
    try:
        found = importlib.util.find_spec("opentelemetry.exporter.otlp.proto.http")
    except ModuleNotFoundError:  # one of the packages above it is not there either
        found = None
    if found is None:
        raise ConfigError("--otlp-endpoint", "OpenTelemetry is not installed: pip install 'manylora[otel]'")


def _between(flag: str, value: int | None, low: int, high: int) -> None:
    if value is not None and not low <= value <= high:
        raise ConfigError(flag, f"expected {low} to {high}, got {value}")


def _one_of(flag: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(flag, f"expected one of {', '.join(allowed)}, got {value!r}")
