"""``manylora keys``: what it writes is what ``serve`` reads, and nothing else in the file changes."""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from manylora.server import cli
from manylora.server.keys_command import add_key, list_keys, revoke_key
from manylora.server.tenants_file import KeyFileError, hashed, read_tenants

COMMENTED = """# mine

[tenants.acme] # the first
base = false   # adapters only

  [[tenants.acme.keys]]
sha256 = "{first}" # of the shop
note = "[not a table]"

# about beta
[tenants.beta]
share = 2
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.toml"


def test_a_tenant_and_its_keys(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--adapters", "acme-*", "shared", "--no-base", "--share", "2", "--max-waiting", "9", "--burst", "7"]
    rates = ["--requests-per-second", "3.5", "--tokens-per-minute", "600", "--note", 'for "Anna" \\ bob']
    assert cli.main(["keys", "add", str(path), "acme", *flags, *rates]) == 0
    out = capsys.readouterr()
    key = out.out.strip()
    assert key not in out.err
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert key not in path.read_text()
    [rules] = read_tenants(path)
    assert (rules.tenant.name, rules.tenant.share, rules.tenant.max_waiting) == ("acme", 2.0, 9)
    assert (rules.adapters, rules.base) == (("acme-*", "shared"), False)
    assert (rules.requests_per_second, rules.burst, rules.tokens_per_minute) == (3.5, 7, 600)
    assert rules.keys == (hashed(key),)

    assert cli.main(["keys", "add", str(path), "acme"]) == 0
    second = capsys.readouterr().out.strip()
    assert cli.main(["keys", "add", str(path), "other.tenant"]) == 0
    third = capsys.readouterr().out.strip()
    acme, other = read_tenants(path)
    assert acme.keys == (hashed(key), hashed(second))
    assert other.keys == (hashed(third),)

    assert cli.main(["keys", "list", str(path)]) == 0
    names = [hashed(one).hex()[:12] for one in (key, second, third)]
    assert capsys.readouterr().out.splitlines() == [f"acme: {names[0]}, {names[1]}", f"other.tenant: {names[2]}"]

    assert cli.main(["keys", "revoke", str(path), names[0]]) == 0
    acme, other = read_tenants(path)
    assert (acme.keys, other.keys) == ((hashed(second),), (hashed(third),))
    assert cli.main(["keys", "revoke", str(path), names[1]]) == 0
    assert read_tenants(path)[0].keys == ()  # the tenant stays, with its rules
    assert cli.main(["keys", "revoke", str(path), names[0]]) == 2
    assert "no keys begin with" in capsys.readouterr().err


def test_what_was_there_stays(path: Path) -> None:
    text = COMMENTED.format(first="1" * 64)
    path.write_text(text)
    path.chmod(0o640)
    key = add_key(path, "beta", {})
    assert path.read_text().startswith(text)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert revoke_key(path, hashed(key).hex()) == "beta"
    assert path.read_text().rstrip("\n") == text.rstrip("\n")
    assert revoke_key(path, "1" * 12) == "acme"
    block = text[text.index("  [[tenants") : text.index("\n# about beta")]
    assert path.read_text().rstrip("\n") == text.replace(block, "").rstrip("\n")
    assert [name for name in os.listdir(path.parent) if name != path.name] == []


@pytest.mark.parametrize(
    "text",
    [
        f'tenants.acme.keys = [{{sha256 = "{"1" * 64}"}}]\n',
        f'[tenants.acme]\nkeys = [{{sha256 = "{"1" * 64}"}}]\n',
        f'[tenants.acme]\nkeys = [\n  {{sha256 = "{"1" * 64}"}},\n  {{sha256 = "{"2" * 64}"}},\n]\n',
    ],
)
def test_what_it_cannot_change_is_left_alone(path: Path, text: str) -> None:
    path.write_text(text)
    with pytest.raises(KeyFileError, match=r"nothing was changed"):
        add_key(path, "acme", {})
    assert path.read_text() == text
    with pytest.raises(KeyFileError, match=r"take it out by hand"):
        revoke_key(path, "1" * 64)
    assert path.read_text() == text


def test_refusals(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add = ["keys", "add", str(path)]
    for arguments, message in (
        (["a b"], "a tenant's name has"),
        (["a\n[tenants.b]"], "a tenant's name has"),
        (["a", "--adapters", "x y"], "expected names of adapters"),
        (["a", "--adapters", 'x"]\nbase=1'], "expected names of adapters"),
        (["a", "--note", "x\ny"], "a note has"),
        (["a", "--share", "0"], "tenants.a.share: expected a number"),
        (["a", "--share", "nan"], "tenants.a.share: expected a number"),
        (["a", "--burst", "3"], "tenants.a.burst: it needs requests_per_second"),
    ):
        assert cli.main([*add, *arguments]) == 2, arguments
        out = capsys.readouterr()
        assert message in out.err
        assert out.out == ""
        assert not path.exists()
    assert cli.main([*add, "a"]) == 0
    assert cli.main([*add, "a", "--share", "2"]) == 2
    assert "tenants.a is there already" in capsys.readouterr().err
    assert cli.main(["keys", "add", str(path.parent / "no" / "keys.toml"), "a"]) == 2
    assert cli.main(["keys", "list", str(path.parent / "none.toml")]) == 2
    path.write_text("nonsense")
    assert cli.main([*add, "b"]) == 2
    assert path.read_text() == "nonsense"


def test_a_link_stays_a_link(path: Path) -> None:
    real = path.parent / "real" / "keys.toml"
    real.parent.mkdir()
    path.symlink_to(real)
    add_key(path, "a", {})
    assert path.is_symlink()
    assert len(read_tenants(real)) == 1


def test_many_at_a_time_all_get_in(path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        keys = list(pool.map(lambda i: add_key(path, f"t{i % 4}", {}), range(32)))
    assert sorted(key for rules, _ in list_keys(path) for key in rules.keys) == sorted(map(hashed, keys))
