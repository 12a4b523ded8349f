"""Every wrong flag is refused by name, before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from manylora.server.config import (
    AdapterSpec,
    ApiConfig,
    ConfigError,
    EngineConfig,
    ServeConfig,
    default_state_dir,
    is_loopback,
    parse_size,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("1048576", 1 << 20),
        ("512MiB", 512 << 20),
        ("2GB", 2 * 10**9),
        ("1.5g", 15 * 10**8),
        ("1.5 Gi", 3 << 29),
        ("10k", 10_000),
        ("7B", 7),
        ("1tib", 1 << 40),
    ],
)
def test_sizes(text: str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1 2", "1e9", "10 parsecs", "NaN", "1.2.3"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="--kv-memory: expected a size"):
        parse_size(text, "--kv-memory")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "LOCALHOST", "::1", "[::1]", "127.8.9.1"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "10.0.0.1", "example.org", "localhost.example.org", "", "1", "127.1"]
)
def test_public(host: str) -> None:
    assert not is_loopback(host)


def test_adapters_are_name_and_path() -> None:
    assert AdapterSpec.parse("alice=/a=b") == AdapterSpec("alice", "/a=b")
    for text in ("alice", "=x", "alice=", ""):
        with pytest.raises(ConfigError, match="--adapter: expected NAME=PATH"):
            AdapterSpec.parse(text)


@pytest.mark.parametrize(
    ("field", "value", "flag"),
    [
        ("device", "tpu", "--device"),
        ("cpu_kernels", "sse2", "--cpu-kernels"),
        ("lora_dtype", "float16", "--lora-dtype"),
        ("max_rows", 0, "--max-rows"),
        ("max_device_adapters", 0, "--max-device-adapters"),
        ("max_host_adapters", 0, "--max-host-adapters"),
        ("host_memory", 1000, "--host-memory"),
        ("table_memory", -1, "--table-memory"),
        ("max_rank", 0, "--max-rank"),
        ("max_context", 1, "--max-context"),
        ("max_batch_tokens", 0, "--max-batch-tokens"),
        ("max_queue", -1, "--max-queue"),
        ("kv_memory", 1000, "--kv-memory"),
        ("threads", 0, "--threads"),
    ],
)
def test_engine_limits(field: str, value: Any, flag: str) -> None:
    with pytest.raises(ConfigError) as error:
        EngineConfig(**{field: value})
    assert error.value.flag == flag
    assert str(error.value).startswith(f"{flag}: expected ")
    assert str(value) in str(error.value)


def test_each_row_needs_a_token_of_the_step() -> None:
    EngineConfig(max_rows=8, max_batch_tokens=8)
    with pytest.raises(ConfigError, match="--max-batch-tokens"):
        EngineConfig(max_rows=9, max_batch_tokens=8)


@pytest.mark.parametrize(
    ("fields", "flag"),
    [
        ({"host": ""}, "--host"),
        ({"port": -1}, "--port"),
        ({"port": 65536}, "--port"),
        ({"api_keys": ("",)}, "--api-key"),
        ({"api_keys": ("a b",)}, "--api-key"),
        ({"api_keys": ("clé",)}, "--api-key"),
        ({"admin_key": "a\n"}, "--admin-key"),
        ({"api_keys": ("k",), "admin_key": "k"}, "--admin-key"),
        ({"adapter_roots": (Path("/not/there"),)}, "--adapter-root"),
        ({"adapters_on_demand": 1}, "--adapters-on-demand"),
        ({"adapters_on_demand": -1, "adapter_roots": (Path("/"),)}, "--adapters-on-demand"),
        ({"max_body_bytes": 1}, "--max-body"),
        ({"max_upload_bytes": 1}, "--max-upload"),
        ({"max_choices": 0}, "--max-choices"),
        ({"max_speculative_tokens": 65}, "--max-speculative-tokens"),
        ({"max_speculative_tokens": -1}, "--max-speculative-tokens"),
        ({"shutdown_grace": -1}, "--shutdown-grace"),
        ({"shutdown_grace": float("nan")}, "--shutdown-grace"),
    ],
)
def test_http_limits(fields: dict[str, Any], flag: str) -> None:
    with pytest.raises(ConfigError) as error:
        ApiConfig(**fields)
    assert error.value.flag == flag


@pytest.mark.parametrize(
    ("fields", "flag"),
    [
        ({"model": ""}, "--model"),
        ({"served_model_name": " "}, "--served-model-name"),
        ({"log_level": "loud"}, "--log-level"),
        ({"log_format": "xml"}, "--log-format"),
        ({"adapter_dir": Path("/not/there")}, "--adapter-dir"),
        ({"watch": 5.0}, "--watch"),
        ({"watch": 0.0, "adapter_dir": Path("/")}, "--watch"),
        ({"watch": float("nan"), "adapter_dir": Path("/")}, "--watch"),
        ({"adapters": (AdapterSpec("a", "x"), AdapterSpec("a", "y"))}, "--adapter"),
        ({"adapters": (AdapterSpec("base", "x"),), "served_model_name": "base"}, "--adapter"),
    ],
)
def test_serve_checks(fields: dict[str, Any], flag: str) -> None:
    with pytest.raises(ConfigError) as error:
        ServeConfig(**{"model": "m", **fields})
    assert error.value.flag == flag


def test_secrets_are_not_shown() -> None:
    shown = repr(ServeConfig(model="m", api=ApiConfig(api_keys=("secret-1",), admin_key="secret-2")))
    assert "secret" not in shown


def test_where_adapters_are_remembered() -> None:
    def environ(name: str) -> str | None:
        return {"XDG_STATE_HOME": "/state"}.get(name)

    state = Path("/state/manylora")
    assert default_state_dir("org/Model-1", 8000, environ) == state / "Model-1-8000"
    assert default_state_dir("/models/a b.gguf", 80, environ) == state / "a-b-80"
    assert default_state_dir("../..", 80, environ) == state / "model-80"
    assert default_state_dir("m", 0, environ) is None
    home = default_state_dir("m", 1, lambda _name: None)
    assert home == Path.home() / ".local/state/manylora/m-1"
    assert ServeConfig(model="m", state_dir=Path("/s")).registry_state == Path("/s/adapters.json")
    assert ServeConfig(model="m").registry_state is None
