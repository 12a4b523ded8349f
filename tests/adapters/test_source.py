"""Sources: paths stay inside the allowed roots, hub ids are hub ids, uploads appear whole or not at all."""

from __future__ import annotations

import os
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import pytest

from manylora.adapters.errors import AdapterSourceForbidden, AdapterSourceNotFound, AdapterUploadInvalid
from manylora.adapters.source import resolve_source, store_upload

FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """tmp/root/good is allowed, tmp/outside is not."""
    for name in ("root/good", "outside"):
        (tmp_path / name).mkdir(parents=True)
        for file, content in FILES.items():
            (tmp_path / name / file).write_bytes(content)
    return tmp_path / "root"


def no_hub(hub_id: str) -> str:
    raise AssertionError(f"asked the hub for {hub_id}")


def test_directories(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_source(str(root / "good"), allowed_roots=[root], download=no_hub) == root / "good"
    assert resolve_source(str(root / "good"), download=no_hub) == root / "good"
    monkeypatch.chdir(root.parent)
    assert resolve_source("root/good", allowed_roots=[root], download=no_hub) == root / "good", (
        "a path wins over the hub"
    )
    monkeypatch.setenv("HOME", str(root))
    assert resolve_source("~/good", download=no_hub) == root / "good"


@pytest.mark.parametrize(
    "source", ["{root}/../outside", "{outside}", "/etc", "{root}/good/../../outside", "/nonexistent/x", "{root}-evil/x"]
)
def test_outside_is_forbidden_whether_it_exists_or_not(source: str, root: Path) -> None:
    (root.parent / "root-evil" / "x").mkdir(parents=True)
    source = source.format(root=root, outside=root.parent / "outside")
    with pytest.raises(AdapterSourceForbidden, match="lies outside") as caught:
        resolve_source(source, allowed_roots=[root], download=no_hub)
    assert str(root) in str(caught.value)
    assert os.path.abspath(source) in str(caught.value)


def test_links_are_followed_before_judging(root: Path) -> None:
    (root / "link").symlink_to(root.parent / "outside")
    (root / "inner").symlink_to(root / "good")
    (root / "files").mkdir()
    (root / "files" / "adapter_config.json").symlink_to(root / "good" / "adapter_config.json")
    (root / "files" / "adapter_model.safetensors").symlink_to(root.parent / "outside" / "adapter_model.safetensors")
    (root / "template").mkdir()
    (root / "template" / "chat_template.jinja").symlink_to("/etc/passwd")
    assert resolve_source(str(root / "inner"), allowed_roots=[root]) == root / "inner"
    for name in ("link", "files", "template"):
        with pytest.raises(AdapterSourceForbidden):
            resolve_source(str(root / name), allowed_roots=[root])


def test_no_roots_allow_no_path(root: Path) -> None:
    with pytest.raises(AdapterSourceForbidden, match=r"load from: none\."):
        resolve_source(str(root / "good"), allowed_roots=[])


def test_not_there(root: Path) -> None:
    with pytest.raises(AdapterSourceNotFound, match="does not exist"):
        resolve_source(str(root / "nowhere"), allowed_roots=[root])
    with pytest.raises(AdapterSourceNotFound, match="is a file, not a directory"):
        resolve_source(str(root / "good" / "adapter_config.json"))
    with pytest.raises(AdapterSourceNotFound, match="a hub id has the form org/name"):
        resolve_source("name-only", download=no_hub)
    for source in ("", "a\0b"):
        with pytest.raises(AdapterSourceNotFound):
            resolve_source(source)


def test_hub_ids(root: Path) -> None:
    asked: list[str] = []

    def download(hub_id: str) -> str:
        asked.append(hub_id)
        return "/cache/snapshot"

    assert resolve_source("org/some-adapter_1.2", allowed_roots=[root], download=download) == Path("/cache/snapshot")
    assert asked == ["org/some-adapter_1.2"]
    for revision in ("main", "v1.0", "0123abc", "refs/pr/7"):
        assert resolve_source(f"org/name@{revision}", allowed_roots=[root], download=download) == Path(
            "/cache/snapshot"
        )
        assert asked[-1] == f"org/name@{revision}"
    with pytest.raises(AdapterSourceForbidden, match="does not load from the hub"):
        resolve_source("org/name", allow_hub=False, download=no_hub)
    for source in (
        "org/name/more",
        "/org/name",
        "../org/name",
        "./name",
        "org/..",
        "org/na me",
        "org/name@",
        "org/name@-x",
    ):
        with pytest.raises((AdapterSourceNotFound, AdapterSourceForbidden)):
            resolve_source(source, allowed_roots=[root], download=no_hub)


def test_a_revision_goes_to_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[tuple[str, str | None]] = []

    def snapshot(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert not any("*" in pattern and "chat" not in pattern for pattern in allow_patterns)
        asked.append((name, revision))
        return "/cache/snapshot"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    resolve_source("org/name@v2")
    resolve_source("org/name")
    assert asked == [("org/name", "v2"), ("org/name", None)]


def test_hub_when_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(AdapterSourceNotFound, match="could not be fetched from the hub") as caught:
        resolve_source("org/not-cached")
    assert "give its directory" in str(caught.value)


# --- uploads -------------------------------------------------------------------------------------------------------


def test_upload_is_stored_by_content(tmp_path: Path) -> None:
    first = store_upload("a", FILES, tmp_path / "up", 100)
    again = store_upload("b", {name: BytesIO(data) for name, data in FILES.items()}, tmp_path / "up", 100)
    other = store_upload("a", FILES | {"adapter_config.json": b'{"r": 1}'}, tmp_path / "up", 100)
    assert first == again != other
    assert {file.name: file.read_bytes() for file in first.iterdir()} == FILES
    assert sorted((tmp_path / "up").iterdir()) == sorted([first, other])


def test_upload_with_a_chat_template(tmp_path: Path) -> None:
    path = store_upload("a", FILES | {"chat_template.jinja": b"{{ x }}"}, tmp_path, 100)
    assert (path / "chat_template.jinja").read_bytes() == b"{{ x }}"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"missing: adapter_config\.json, adapter_model\.safetensors"),
        ({"adapter_config.json": b"{}"}, r"missing: adapter_model\.safetensors"),
        (FILES | {"../x": b""}, r"unexpected: \.\./x"),
        (FILES | {"adapter_model.bin": b""}, "pickle files are never loaded"),
        (FILES | {"big": b"x"}, "unexpected: big"),
        ({"adapter.zip": b"PK"}, r"unexpected: adapter\.zip; archives are not unpacked"),
        (FILES | {"more.TAR.GZ": b"x"}, "archives are not unpacked"),
    ],
)
def test_wrong_files(files: dict[str, bytes], message: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterUploadInvalid, match=message):
        store_upload("a", files, tmp_path / "up", 100)
    assert not (tmp_path / "up").exists()


def test_too_big_leaves_nothing(tmp_path: Path) -> None:
    class Endless(BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            return b"x" * (size or 0)

    size = sum(map(len, FILES.values()))
    store_upload("a", FILES, tmp_path / "exact", size)
    attempts: list[dict[str, bytes | BinaryIO]] = [
        {**FILES},
        {"adapter_config.json": b"{}", "adapter_model.safetensors": Endless()},
    ]
    for files in attempts:
        with pytest.raises(AdapterUploadInvalid, match=f"larger than the {size - 1} bytes"):
            store_upload("a", files, tmp_path / "up", size - 1)
    assert list((tmp_path / "up").iterdir()) == []


def test_an_upload_that_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    class Broken(BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise ConnectionResetError("gone")

    with pytest.raises(ConnectionResetError):
        store_upload("a", {"adapter_config.json": b"{}", "adapter_model.safetensors": Broken()}, tmp_path, 100)
    assert list(tmp_path.iterdir()) == []


def test_uploads_are_allowed_sources(tmp_path: Path) -> None:
    path = store_upload("a", FILES, tmp_path, 100)
    assert resolve_source(str(path), allowed_roots=[tmp_path]) == path
