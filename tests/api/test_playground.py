"""The playground's page as it is served: headers, who may see it, and what its files may hold."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from manylora.server.api import playground
from manylora.server.config import ApiConfig

ROOT = Path(__file__).parents[2]
FOLDER = Path(playground.__file__).parent
PATHS = sorted({playground.PAGE_PATH, *playground.ASSET_PATHS})


@pytest.mark.parametrize("path", PATHS)
def test_every_file_is_served_with_strict_headers(path: str, client: TestClient) -> None:
    answer = client.get(path)
    assert answer.status_code == 200
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    policy = dict(part.split(None, 1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy.pop("default-src") == "'none'"
    assert policy == {
        "script-src": "'self'",
        "style-src": "'self'",
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
    }


def test_the_page_names_only_what_is_served() -> None:
    page = (FOLDER / "page.html").read_text()
    named = {found for found in re.findall(r'(?:src|href)="(/playground/[^"]*)"', page)}
    for module in FOLDER.glob("*.js"):
        named |= {f"/playground/{found}" for found in re.findall(r'from "\./([^"]+)"', module.read_text())}
    assert named == playground.ASSET_PATHS


@pytest.mark.parametrize("name", sorted(playground._FILES))
def test_nothing_comes_from_elsewhere_and_nothing_becomes_markup(name: str) -> None:
    text = (FOLDER / name).read_text()
    assert not re.search(r"https?:|url\(|@import|//[a-z]+\.", text), "no external address"
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|srcdoc", text)
    assert "localStorage" not in text
    assert not re.search(r"<script(?![^>]*src=)|\son\w+=|\sstyle=", text), "no inline script or style"


def test_it_is_open_where_the_api_is_not(connect: Callable[..., TestClient], config: ApiConfig) -> None:
    client = connect(replace(config, host="0.0.0.0", api_keys=("mine",), admin_key="root"))
    for path in PATHS:
        assert client.get(path).status_code == 200
    assert client.get("/v1/models").status_code == 401
    assert client.post("/").status_code == 401, "it is there to be read"


def test_it_can_be_left_out(connect: Callable[..., TestClient], config: ApiConfig) -> None:
    client = connect(replace(config, playground=False))
    for path in PATHS:
        assert client.get(path).status_code == 404
    assert not any(path in client.get("/openapi.json").json()["paths"] for path in PATHS)
    assert client.get("/v1/models").status_code == 200


def test_the_wheel_has_every_file_of_it() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert playground.__name__ in settings["packages"]
    patterns = settings["package-data"][playground.__name__]
    for file in FOLDER.iterdir():
        if file.is_file() and file.suffix != ".py":
            assert any(fnmatch(file.name, pattern) for pattern in patterns), file.name
            assert file.name in playground._FILES, f"{file.name} is of a type that is not served"
