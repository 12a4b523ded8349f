"""Names that are loaded when they are asked for: found below the roots only, and so many at a time."""

from __future__ import annotations

from pathlib import Path

import pytest

from manylora.adapters.errors import AdapterRefused
from manylora.adapters.on_demand import OnDemand
from manylora.adapters.registry import AdapterRegistry
from manylora.adapters.versions import LoadedAdapter


def load(source: str) -> LoadedAdapter:
    content = (Path(source) / "adapter_config.json").read_text()
    if content == "bad":
        raise AdapterRefused(source, ["it is bad"])
    return LoadedAdapter(f"{source}: {content}", 1, None, None)


def write(path: Path, content: str = "{}") -> Path:
    path.mkdir(parents=True)
    (path / "adapter_config.json").write_text(content)
    return path


@pytest.fixture
def roots(tmp_path: Path) -> list[Path]:
    for name in ("one/a", "one/org/b", "one/.hidden", "two/a", "two/c", "outside"):
        write(tmp_path / name)
    (tmp_path / "one" / "empty").mkdir()
    (tmp_path / "one" / "link").symlink_to(tmp_path / "outside")
    write(tmp_path / "one" / "inner")
    (tmp_path / "one" / "inner" / "adapter_model.safetensors").symlink_to("/etc/passwd")
    (tmp_path / "one" / "within").symlink_to(tmp_path / "one" / "a")
    return [tmp_path / "one", tmp_path / "two"]


def test_names_are_folders_below_the_roots(roots: list[Path]) -> None:
    registry = AdapterRegistry(load)
    on_demand = OnDemand(registry, roots, 10)
    for name, folder in (("a", "one/a"), ("org/b", "one/org/b"), ("c", "two/c"), ("within", "one/within")):
        assert on_demand.load(name)
        assert registry.info(name).source == str(roots[0].parent / folder)
    assert on_demand.load("a"), "it is there: as good"


@pytest.mark.parametrize(
    "name",
    [
        *("", "nobody", "empty", "link", "inner", ".hidden", "../outside", "org/../../outside", "org/./b", "org//b"),
        *("org/", "/etc", "a\0", "x" * 200, "a/.hidden", "one/a", "a b", "~"),
    ],
)
def test_nothing_else_is_found(name: str, roots: list[Path]) -> None:
    registry = AdapterRegistry(load)
    assert not OnDemand(registry, roots, 10).load(name)
    assert registry.list() == []


def test_what_cannot_be_served_says_why(roots: list[Path]) -> None:
    write(roots[0] / "bad", "bad")
    with pytest.raises(AdapterRefused, match="it is bad"):
        OnDemand(AdapterRegistry(load), roots, 10).load("bad")


def test_the_least_recently_used_idle_one_is_forgotten(tmp_path: Path) -> None:
    registry = AdapterRegistry(load, state_path=tmp_path / "state.json")
    for name in "abcdefg":
        write(tmp_path / "root" / name)
    registry.load("theirs", str(write(tmp_path / "theirs")))
    on_demand = OnDemand(registry, [tmp_path / "root"], 3)
    for name in "abc":
        on_demand.load(name)
    registry.release(registry.acquire("b"))
    running = registry.acquire("a")
    registry.pin("c", True)
    on_demand.load("d")
    assert [info.name for info in registry.list()] == ["a", "c", "d", "theirs"], "b: a runs, c is pinned, d is new"
    registry.release(running)
    registry.release(registry.acquire("d"))
    on_demand.load("e")
    assert [info.name for info in registry.list()] == ["c", "d", "e", "theirs"]
    registry.unload("d")
    registry.load("d", str(tmp_path / "theirs"))
    on_demand.load("f")
    on_demand.load("g")
    assert [info.name for info in registry.list()] == ["c", "d", "f", "g", "theirs"], "d is not ours any more"
    again = AdapterRegistry(load, state_path=tmp_path / "state.json")
    again.restore()
    assert [info.name for info in again.list()] == ["c", "d", "theirs"], "nothing but what somebody asked to keep"
