"""The key file: what it says, and what is wrong with it, without ever repeating what it holds."""

from __future__ import annotations

import hashlib
import traceback
from pathlib import Path

import pytest

from manylora.server.config import ApiConfig, ConfigError
from manylora.server.engine.tenant import Tenant
from manylora.server.tenants_file import KeyFileError, TenantRules, hashed, new_key, parse_tenants, read_tenants

HASH = hashlib.sha256(b"key").hexdigest()
OTHER = hashlib.sha256(b"other").hexdigest()

FULL = f"""
[tenants.acme]
adapters = ["acme-*", "shared/summary"]
base = false
share = 2.5
max_waiting = 64
requests_per_second = 5
burst = 20
tokens_per_minute = 60000

[[tenants.acme.keys]]
sha256 = "{HASH}"
created = 2026-01-02T03:04:05Z
note = "for the shop"

[tenants."beta.x"]
[[tenants.acme.keys]]
sha256 = "{OTHER}"
"""


def test_everything_a_file_can_say() -> None:
    acme, beta = parse_tenants(FULL, Path("f"))
    assert acme == TenantRules(
        Tenant("acme", 2.5, 64),
        adapters=("acme-*", "shared/summary"),
        base=False,
        requests_per_second=5.0,
        burst=20,
        tokens_per_minute=60000,
        keys=(bytes.fromhex(HASH), bytes.fromhex(OTHER)),
    )
    assert beta == TenantRules(Tenant("beta.x"), adapters=(), base=True)  # least: no adapter, no key


def test_an_empty_file_lets_nobody_in() -> None:
    assert parse_tenants("# nothing yet\n", Path("f")) == ()


def test_a_burst_is_two_seconds_worth() -> None:
    for rate, burst in ((5, 10), (0.1, 1), (0.75, 2)):
        [rules] = parse_tenants(f"[tenants.a]\nrequests_per_second = {rate}", Path("f"))
        assert rules.burst == burst


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("[tenants.a]\nbase = 1", "tenants.a.base: expected true or false"),
        ("[tenants.a]\nshare = 0", "tenants.a.share: expected a number from"),
        ("[tenants.a]\nshare = nan", "tenants.a.share: expected a number from"),
        ("[tenants.a]\nshare = inf", "tenants.a.share: expected a number from"),
        ("[tenants.a]\nshare = true", "tenants.a.share: expected a number from"),
        ("[tenants.a]\nmax_waiting = -1", "tenants.a.max_waiting: expected a whole number"),
        ("[tenants.a]\nmax_waiting = 1.5", "tenants.a.max_waiting: expected a whole number"),
        ("[tenants.a]\nmax_waiting = true", "tenants.a.max_waiting: expected a whole number"),
        ("[tenants.a]\nburst = 5", "tenants.a.burst: it needs requests_per_second"),
        ("[tenants.a]\nrequests_per_second = -5", "tenants.a.requests_per_second: expected a number"),
        ("[tenants.a]\ntokens_per_minute = 0", "tenants.a.tokens_per_minute: expected a whole number"),
        ('[tenants.a]\nadapters = "x"', "tenants.a.adapters: expected a list"),
        ("[tenants.a]\nadapters = [1]", "tenants.a.adapters[0]: expected names"),
        ('[tenants.a]\nadapters = ["x", ""]', "tenants.a.adapters[1]: expected names"),
        ('[tenants.a]\nadapters = ["[a-z]"]', "tenants.a.adapters[0]: expected names"),
        ("[tenants.a]\nadaptors = []", "tenants.a: it has a field that is none of adapters, base,"),
        ("[tenants.a]\nkeys = 1", "tenants.a.keys: expected tables [[tenants.a.keys]]"),
        ('[tenants.a]\nkeys = ["x"]', "tenants.a.keys: expected tables"),
        ("[[tenants.a.keys]]", "tenants.a.keys[0].sha256: expected 64 hexadecimal digits"),
        ('[[tenants.a.keys]]\nsha256 = "abc"', "tenants.a.keys[0].sha256: expected 64"),
        (f'[[tenants.a.keys]]\nsha256 = "{HASH.upper()}"', "tenants.a.keys[0].sha256: expected 64"),
        (f'[[tenants.a.keys]]\nsha256 = "{HASH}\\n"', "tenants.a.keys[0].sha256: expected 64"),
        ('[[tenants.a.keys]]\nkey = "x"', "tenants.a.keys[0]: it has a field that is none of created, note, sha256"),
        (f'[[tenants.a.keys]]\nsha256 = "{HASH}"\n' * 2, "tenants.a.keys[1]: tenant a has the same key"),
        (
            f'[[tenants.a.keys]]\nsha256 = "{HASH}"\n[[tenants.b.keys]]\nsha256 = "{HASH}"',
            "tenants.b.keys[0]: tenant a has the same key",
        ),
        ("[tenants]\na = 1", "tenants.a: expected a table"),
        ("tenants = 1", "expected tables [tenants.NAME]"),
        ("[tenant.a]", "expected tables [tenants.NAME] only"),
        ('[tenants.""]', "a tenant's name has 1 to 64"),
        ('[tenants."a b"]', "a tenant's name has 1 to 64"),
        ('[tenants."a\\n"]', "a tenant's name has 1 to 64"),
        (f"[tenants.{'a' * 65}]", "a tenant's name has 1 to 64"),
        ("[tenants.a]\nmax_waiting = " + "9" * 5000, "it is not valid TOML"),
        ("[tenants.a]\n[tenants.a]", "it is not valid TOML (at line 2, column 11)"),
        ("[tenants.a", "it is not valid TOML"),
        ("x = " + "[" * 20000, "f: it is"),
    ],
)
def test_what_is_wrong_is_named(text: str, where: str) -> None:
    with pytest.raises(KeyFileError) as error:
        parse_tenants(text, Path("f"))
    assert str(error.value).startswith("f: ")
    assert where in str(error.value)


def test_no_message_and_no_repr_repeats_a_key() -> None:
    """Somebody may put a key where its hash, or something else, belongs."""
    key = new_key()
    for text in (
        f'[[tenants.a.keys]]\nsha256 = "{key}"',
        f'[[tenants.a.keys]]\n{key} = "x"',
        f'[tenants.a]\n{key} = "x"',
        f'[tenants.a]\nadapters = ["{key}+"]',
        f'[tenants."{key} "]',
        f"[{key}]",
        f"[{key}]\n[{key}]",
        f"[tenants.a]\nshare = {key}",
        f'[tenants.a]\nbase = "{key}"',
        f'[tenants.a]\nmax_waiting = "{key}"',
    ):
        with pytest.raises(KeyFileError) as error:
            parse_tenants(text, Path("f"))
        assert key not in "".join(traceback.format_exception(error.value))  # what a log would show
    [rules] = parse_tenants(f'[[tenants.a.keys]]\nsha256 = "{hashed(key).hex()}"', Path("f"))
    assert hashed(key).hex() not in repr(rules)
    assert repr(hashed(key)) not in repr(rules)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match="No such file"):
        read_tenants(tmp_path / "none")
    with pytest.raises(KeyFileError, match="Is a directory"):
        read_tenants(tmp_path)
    path = tmp_path / "latin"
    path.write_bytes(b"# \xe9\n")
    with pytest.raises(KeyFileError, match="not UTF-8"):
        read_tenants(path)
    path.write_text(FULL)
    path.chmod(0o664)
    assert len(read_tenants(path)) == 2
    path.chmod(0o646)
    with pytest.raises(KeyFileError, match="everybody on this machine may change it"):
        read_tenants(path)


def test_keys_are_long_and_different() -> None:
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(key.startswith("mlk_") and len(key) >= 47 and key.isascii() for key in keys)


def test_the_configuration_refuses_a_bad_file_and_shared_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    with pytest.raises(ConfigError, match=r"^--keys: .*keys.toml: No such file"):
        ApiConfig(keys_file=path)
    path.write_text(FULL)
    assert len(ApiConfig(keys_file=path, api_keys=("third",), admin_key="root").read_tenants()) == 2
    with pytest.raises(ConfigError, match=r"^--keys: .*keys.toml: tenants.acme.keys: one of them is also --admin-key"):
        ApiConfig(keys_file=path, admin_key="key")
    with pytest.raises(ConfigError, match="one of them is also --api-key"):
        ApiConfig(keys_file=path, api_keys=("x", "other"))
    path.write_text("[tenants.a]\nbase = 7")
    with pytest.raises(ConfigError, match=r"keys.toml: tenants.a.base: expected true or false"):
        ApiConfig(keys_file=path)


@pytest.mark.parametrize(
    ("fields", "flag"),
    [
        ({"protect_metrics": True}, "--protect-metrics"),
        ({"request_timeout": 0.0}, "--request-timeout"),
        ({"request_timeout": float("nan")}, "--request-timeout"),
        ({"client_timeout": 0.0}, "--client-timeout"),
        ({"client_timeout": float("inf")}, "--client-timeout"),
        ({"api_keys": ("k" * 1025,)}, "--api-key"),
        ({"admin_key": ""}, "--admin-key"),
    ],
)
def test_the_configuration_names_the_flag(fields: dict[str, object], flag: str) -> None:
    with pytest.raises(ConfigError) as error:
        ApiConfig(**fields)  # type: ignore[arg-type]
    assert error.value.flag == flag
