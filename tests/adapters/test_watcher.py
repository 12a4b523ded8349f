"""A watched directory: folders come, change and go, and nothing is acted upon before it stands still."""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from manylora.adapters.errors import AdapterNotFound, AdapterRefused
from manylora.adapters.registry import AdapterRegistry
from manylora.adapters.versions import LoadedAdapter
from manylora.adapters.watcher import FolderWatcher

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class Rig:
    """A watched directory, and a registry whose versions are the text of the weights; "bad" is refused."""

    def __init__(self, tmp_path: Path) -> None:
        self.root = tmp_path / "watched"
        self.root.mkdir()
        self.loads: list[str] = []
        self.registry = AdapterRegistry(self.load)
        self.watcher = FolderWatcher(self.root, self.registry, interval=0.01)

    def load(self, source: str) -> LoadedAdapter:
        self.loads.append(source)
        path = Path(source) / WEIGHTS
        content = path.read_text() if path.is_file() else "bad"
        if "bad" in content:
            raise AdapterRefused(source, ["it is bad"])
        return LoadedAdapter(content, 1, None, None)

    def write(self, name: str, content: str) -> Path:
        folder = self.root / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text("{}")
        (folder / WEIGHTS).write_text(content)
        return folder

    def poll(self, times: int = 2) -> None:
        for _ in range(times):
            self.watcher.poll()

    def versions(self) -> dict[str, str]:
        return {info.name: info.version for info in self.registry.list()}


@pytest.fixture
def rig(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Rig:
    caplog.set_level(logging.INFO)
    return Rig(tmp_path)


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    said = [record.getMessage() for record in caplog.records if record.name.endswith("watcher")]
    caplog.clear()
    return said


def test_come_change_go(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    rig.write("a", "one")
    rig.poll()
    assert rig.versions() == {"a": "one"}
    (line,) = lines(caplog)
    assert "adapter a is loaded, version one" in line
    rig.poll(5)
    assert len(rig.loads) == 1
    assert lines(caplog) == []
    rig.write("a", "two")
    rig.write("b", "three")
    rig.poll()
    assert rig.versions() == {"a": "two", "b": "three"}
    assert len(lines(caplog)) == 2
    shutil.rmtree(rig.root / "a")
    rig.poll()
    assert rig.versions() == {"b": "three"}
    (line,) = lines(caplog)
    assert "adapter a is unloaded" in line
    assert rig.watcher._folders.keys() == {"b"}


def test_nothing_is_loaded_while_it_is_being_copied(rig: Rig) -> None:
    folder = rig.write("a", "")
    for i in range(4):
        rig.poll(1)
        (folder / WEIGHTS).write_text("x" * (i + 1))
    assert rig.loads == []
    rig.poll(2)
    assert rig.versions() == {"a": "xxxx"}


def test_gone_for_one_look_is_not_gone(rig: Rig) -> None:
    folder = rig.write("a", "one")
    rig.poll()
    aside = rig.root.parent / "aside"
    folder.rename(aside)
    rig.poll(1)
    aside.rename(folder)
    rig.poll(3)
    assert rig.versions() == {"a": "one"}
    assert len(rig.loads) <= 2


def test_same_size_and_time_but_another_file(rig: Rig) -> None:
    weights = rig.write("a", "one") / WEIGHTS
    rig.poll()
    times = os.stat(weights).st_atime_ns, os.stat(weights).st_mtime_ns
    other = rig.root.parent / "other"
    other.write_text("two")
    os.utime(other, ns=times)
    other.rename(weights)
    rig.poll()
    assert rig.versions() == {"a": "two"}


def test_touching_replaces_nothing(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    folder = rig.write("a", "one")
    rig.poll()
    loaded_at = rig.registry.info("a").loaded_at
    lines(caplog)
    (folder / WEIGHTS).touch()
    rig.poll()
    assert rig.registry.info("a").loaded_at == loaded_at
    assert lines(caplog) == []


def test_a_kubernetes_volume_whose_link_is_swapped(rig: Rig) -> None:
    for date, content in (("..2024", "one"), ("..2025", "two")):
        rig.write(f"{date}/a", content)
    (rig.root / "..data").symlink_to("..2024")
    (rig.root / "a").symlink_to("..data/a")
    rig.poll()
    assert rig.versions() == {"a": "one"}, "and the hidden folders are not adapters"
    (rig.root / "..new").symlink_to("..2025")
    (rig.root / "..new").rename(rig.root / "..data")
    rig.poll()
    assert rig.versions() == {"a": "two"}


def test_links_that_leave_the_directory_are_refused(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    outside = rig.write("../outside", "secret")
    (rig.root / "folder").symlink_to(outside)
    folder = rig.write("file", "x")
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(outside / WEIGHTS)
    rig.poll(4)
    assert rig.versions() == {}
    assert rig.loads == []
    said = lines(caplog)
    assert len(said) == 2
    assert all("lies outside" in line for line in said)


def test_a_failing_folder_is_reported_once_until_it_changes(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    rig.write("a", "one")
    rig.poll()
    lines(caplog)
    rig.write("a", "bad")
    rig.write("pickle", "x")
    (rig.root / "pickle" / WEIGHTS).unlink()
    rig.write("a b", "x")
    rig.poll(5)
    assert rig.versions() == {"a": "one"}, "the old version serves on"
    said = lines(caplog)
    assert len(said) == 3
    assert any("it is bad" in line for line in said)
    assert any("cannot be an adapter's name" in line for line in said)
    rig.write("a", "bad again")
    rig.poll(3)
    assert len(lines(caplog)) == 1
    rig.write("a", "two")
    rig.poll(3)
    assert rig.versions()["a"] == "two"


def test_names_from_elsewhere_are_left_alone(rig: Rig, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    elsewhere = rig.write("../elsewhere", "theirs")
    rig.registry.load("a", str(elsewhere))
    folder = rig.write("a", "ours")
    rig.poll(4)
    assert rig.versions() == {"a": "theirs"}
    (line,) = lines(caplog)
    assert "its name belongs to an adapter from" in line
    shutil.rmtree(folder)
    rig.poll(3)
    assert rig.versions() == {"a": "theirs"}, "not unloaded with the folder"
    rig.write("a", "ours")
    rig.poll(3)
    rig.registry.unload("a")
    rig.poll(2)
    assert rig.versions() == {"a": "ours"}


def test_unloaded_by_hand_stays_so_until_the_files_change(rig: Rig) -> None:
    rig.write("a", "one")
    rig.poll()
    rig.registry.unload("a")
    rig.poll(3)
    assert rig.versions() == {}
    shutil.rmtree(rig.root / "a")
    rig.poll(3)
    with pytest.raises(AdapterNotFound):
        rig.registry.info("a")
    rig.write("a", "two")
    rig.poll()
    assert rig.versions() == {"a": "two"}


def test_a_directory_that_cannot_be_read_takes_nothing_away(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    rig.write("a", "one")
    rig.poll()
    lines(caplog)
    rig.root.rename(rig.root.parent / "aside")
    rig.poll(4)
    assert rig.versions() == {"a": "one"}
    assert len(lines(caplog)) == 1
    rig.watcher._device = -1  # as after an unmount: the empty directory under the mount point
    rig.root.mkdir()
    rig.poll(4)
    assert rig.versions() == {"a": "one"}
    (line,) = lines(caplog)
    assert "not mounted" in line
    rig.root.rmdir()
    (rig.root.parent / "aside").rename(rig.root)
    rig.poll(3)
    assert rig.versions() == {"a": "one"}
    assert len(rig.loads) == 1


def test_an_error_that_nobody_foresaw_stops_nothing(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    broken = rig.registry._load

    def load(source: str) -> LoadedAdapter:
        if source.endswith("a"):
            raise ZeroDivisionError
        return broken(source)

    rig.registry._load = load
    rig.write("a", "one")
    rig.write("b", "two")
    rig.poll(4)
    assert rig.versions() == {"b": "two"}
    assert len(lines(caplog)) == 2


def test_at_the_start_folders_are_taken_as_they_are_and_not_remembered(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    state = tmp_path / "state.json"
    rig.registry = AdapterRegistry(rig.load, state_path=state)
    rig.watcher = FolderWatcher(rig.root, rig.registry)
    rig.write("a", "one")
    rig.write("b", "bad")
    rig.watcher.poll(settled=True)
    assert rig.versions() == {"a": "one"}
    rig.poll(3)
    assert len(rig.loads) == 2
    assert not state.exists()


def test_its_own_thread(rig: Rig) -> None:
    rig.watcher.start()
    rig.write("a", "one")
    deadline = time.monotonic() + 10
    while not rig.versions() and time.monotonic() < deadline:
        time.sleep(0.01)
    rig.watcher.stop()
    assert rig.versions() == {"a": "one"}
    assert not any(thread.name == "manylora-watch" for thread in threading.enumerate())
    FolderWatcher(rig.root, rig.registry).stop()  # never started
