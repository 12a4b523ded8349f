"""Hostile and broken adapters against a real server and the commands: a clear refusal, and nothing else happens.

After every attempt the adapters, the state directory and the folder of uploads are what they were, and the base and a
good adapter answer as before.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import socket
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import httpx
import pytest

from manylora.server import cli
from tests.e2e.adapters import write_adapter
from tests.e2e.bad_content import CONFIG, CONTENT, WEIGHTS
from tests.e2e.server_process import BASE, Server, adapters_by_name, complete, demo_flags, greedy, put_adapter, serving

MAX_UPLOAD: Final = 8 << 20
PROMPT: Final = "The sea is"
GOOD: Final = "good"


@dataclass(frozen=True)
class Target:
    """The server, where it may load from, and what its good models answer."""

    server: Server
    root: Path
    outside: Path
    state: Path
    base: Path
    """The checkpoint that the server quantised the demo base to."""
    expected: dict[str, str]

    def files(self) -> dict[str, int]:
        """Every file and folder of the state directory, with its size, but for the empty folder of uploads."""
        return {
            str(path.relative_to(self.state)): path.stat().st_size if path.is_file() else -1
            for path in sorted(self.state.rglob("*"))
            if path != self.state / "uploads"
        }


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory, base_cache: Path) -> Iterator[Target]:
    folder = tmp_path_factory.mktemp("bad-adapters")
    root, outside, state = folder / "root", folder / "outside", folder / "state"
    root.mkdir()
    outside.mkdir()
    flags = [*demo_flags(base_cache), "--port", "0", "--adapter-root", str(root), "--state-dir", str(state)]
    with serving(folder / "log", *flags, "--max-upload", str(MAX_UPLOAD)) as server:
        with server.client() as client:
            put_adapter(client, GOOD, write_adapter(root / GOOD, seed=1))
            expected = {name: complete(client, greedy(name, PROMPT, 4)).text for name in (BASE, GOOD)}
        assert expected[BASE] != expected[GOOD]
        [base] = (base_cache / "bases").glob("*-nf4-*")
        yield Target(server, root, outside, state, base, expected)


def held(client: httpx.Client) -> list[str]:
    """What the metrics say of adapters in host memory: how many, and their bytes."""
    lines = [line for line in client.get("/metrics").text.splitlines() if line.startswith("manylora_host_adapter")]
    assert len(lines) == 2, lines
    return lines


@pytest.fixture
def client(target: Target) -> Iterator[httpx.Client]:
    """A client; afterwards everything must be as it was."""
    with target.server.client() as client:
        files, adapters, memory = target.files(), adapters_by_name(client), held(client)
        yield client
        client.delete("/v1/adapters/bad")  # so that one that was taken by mistake fails its own test alone
        assert target.files() == files
        now = adapters_by_name(client)
        assert now.keys() == adapters.keys()
        assert now[GOOD]["version"] == adapters[GOOD]["version"]
        assert now[GOOD]["requests_in_flight"] == 0
        assert held(client) == memory
        for name, text in target.expected.items():
            assert complete(client, greedy(name, PROMPT, 4)).text == text, f"{name} answers otherwise now"


@pytest.fixture(scope="module", autouse=True)
def nothing_failed_inside(target: Target) -> Iterator[None]:
    """No attempt of this module may have been a bug of the server that it survived."""
    yield
    log = target.server.log_text()
    assert "Traceback" not in log
    assert " ERROR " not in log


def refused(response: httpx.Response, *parts: str, status: int | None = None) -> None:
    """It is a 4xx in the one shape of errors, and its message has ``parts``."""
    assert 400 <= response.status_code < 500, (response.status_code, response.text[:500])
    if status is not None:
        assert response.status_code == status, response.text[:500]
    error = response.json()["error"]
    assert error["code"] == response.status_code
    for part in parts:
        assert part.lower() in error["message"].lower(), error["message"][:2000]
    assert len(error["message"]) < 20_000


# --- what is in the directory ----------------------------------------------------------------------------------------


@pytest.fixture
def bad(target: Target, request: pytest.FixtureRequest) -> Iterator[Path]:
    """The adapter of a case of CONTENT, inside the root that the server may load from."""
    path = write_adapter(target.root / "bad", seed=2)
    try:
        CONTENT[request.param][0](path)
        yield path
    finally:
        shutil.rmtree(path)


def upload(client: httpx.Client, path: Path, name: str = "bad") -> httpx.Response:
    files = [("files", (file.name, file.read_bytes())) for file in sorted(path.iterdir())]
    return client.put(f"/v1/adapters/{name}", files=files)


@pytest.mark.parametrize(("bad", "case"), [(case, case) for case in CONTENT], indirect=["bad"], ids=list(CONTENT))
def test_bad_content_is_refused_as_a_directory_as_an_upload_and_by_the_commands(
    target: Target, bad: Path, case: str, client: httpx.Client, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = CONTENT[case][1]
    refused(client.put("/v1/adapters/bad", json={"source": str(bad)}), *parts, status=400)
    refused(upload(client, bad), *parts, status=400)
    refused(client.put(f"/v1/adapters/{GOOD}", json={"source": str(bad)}), *parts, status=400)  # the old one stays
    refused(client.post("/v1/load_lora_adapter", json={"lora_name": "bad", "lora_path": str(bad)}), *parts, status=400)
    base = str(target.base)
    assert cli.main(["inspect", str(bad), "--model", base]) == 2
    error = capsys.readouterr().err
    assert all(part.lower() in error.lower() for part in parts), error
    assert cli.main(["merge", base, str(bad), str(tmp_path / "out")]) == 2
    assert list(tmp_path.iterdir()) == []


def test_pickles_are_never_read(target: Target, client: httpx.Client, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_adapter(target.root / "pickled", seed=3)
    (path / WEIGHTS).rename(path / "adapter_model.bin")
    refused(client.put("/v1/adapters/bad", json={"source": str(path)}), "adapter_model.bin", "pickle", status=400)
    refused(upload(client, path), "adapter_model.bin", "pickle", status=400)
    assert cli.main(["inspect", str(path)]) == 2
    assert "pickle" in capsys.readouterr().err
    shutil.rmtree(path)


def test_a_header_of_100_mb(target: Target, client: httpx.Client) -> None:
    path = write_adapter(target.root / "huge-header", seed=3)
    header = b"{" + b" " * 99_999_990 + b"}"
    (path / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header)
    refused(client.put("/v1/adapters/bad", json={"source": str(path)}), WEIGHTS, status=400)
    shutil.rmtree(path)


def test_special_files_are_not_waited_for(target: Target, client: httpx.Client) -> None:
    path = write_adapter(target.root / "special", seed=3)
    (path / WEIGHTS).unlink()
    os.mkfifo(path / WEIGHTS)
    refused(client.put("/v1/adapters/bad", json={"source": str(path)}), WEIGHTS)
    (path / CONFIG).unlink()
    (path / CONFIG).mkdir()
    refused(client.put("/v1/adapters/bad", json={"source": str(path)}), CONFIG)
    shutil.rmtree(path)


def test_a_sparse_file_larger_than_memory_is_not_read(target: Target, client: httpx.Client) -> None:
    path = write_adapter(target.root / "sparse", seed=3)
    os.truncate(path / WEIGHTS, 1 << 42)
    refused(client.put("/v1/adapters/bad", json={"source": str(path)}), WEIGHTS, status=400)
    shutil.rmtree(path)


# --- where it comes from ---------------------------------------------------------------------------------------------


def test_paths_do_not_escape(target: Target, client: httpx.Client) -> None:
    secret = write_adapter(target.outside / "secret", seed=4)
    inside = target.root
    (inside / "link").symlink_to(secret)
    (inside / "roundabout").symlink_to(target.outside)
    mixed = write_adapter(inside / "mixed", seed=5)
    (mixed / WEIGHTS).unlink()
    (mixed / WEIGHTS).symlink_to(secret / WEIGHTS)
    template = write_adapter(inside / "template", seed=5)
    (template / "chat_template.jinja").symlink_to("/etc/passwd")
    sources = [
        *(str(secret), f"{inside}/../outside/secret", f"{inside}/./..//outside/secret", "/", "/proc/self", "~"),
        *(str(inside / "link"), str(inside / "roundabout" / "secret"), str(mixed), str(template)),
        *(f"{inside}/nowhere/../../outside/secret", os.path.relpath(secret), f"{secret}/."),
    ]
    for source in sources:
        refused(client.put("/v1/adapters/bad", json={"source": source}), "outside the directories", status=400)
    # What is there and what is not is told apart for nobody.
    missing = client.put("/v1/adapters/bad", json={"source": str(target.outside / "missing")})
    refused(missing, "outside the directories", status=400)
    for source in (f"file://{secret}", f"{inside}/good\0/../../outside/secret", "", "..", "a" * 5000, f"{inside}/a\nb"):
        refused(client.put("/v1/adapters/bad", json={"source": source}))
    for path in (inside / "link", inside / "roundabout"):
        path.unlink()
    for path in (mixed, template, secret):
        shutil.rmtree(path)


@pytest.mark.parametrize(
    "name", ["%00", "a%00b", "..", "../x", "%2e%2e/x", ".hidden", "a b", "a%0Ab", "x" * 200, BASE, "%C3%A9"]
)
def test_bad_names(target: Target, client: httpx.Client, name: str) -> None:
    source = str(target.root / GOOD)
    refused(httpx_raw(client, "PUT", f"/v1/adapters/{name}", json={"source": source}))
    refused(httpx_raw(client, "PUT", f"/v1/adapters/{name}", files=[("files", (CONFIG, b"{}"))]))


def httpx_raw(client: httpx.Client, method: str, path: str, **options: Any) -> httpx.Response:
    """A request whose path is sent as it is written: httpx would take the dots out."""
    request = client.build_request(method, "/", **options)
    request.url = request.url.copy_with(raw_path=path.encode())
    return client.send(request)


@pytest.mark.parametrize(
    ("body", "part"),
    [
        (b"{", "not valid JSON"),
        (b"[" * 30_000 + b"]" * 30_000, "nested"),
        (b'{"source": {}}', "source"),
        (b'{"source": "a", "sauce": "b"}', "sauce"),
        (b'{"source": "\\ud800"}', "surrogate"),
        (b'{"source": "' + b"a" * (1 << 17) + b'"}', "larger than"),
        (b'{"source": NaN}', "NaN"),
        (b"\xff", "not valid JSON"),
        (b"[]", "object"),
        (b"", "not valid JSON"),
    ],
)
def test_bad_json(client: httpx.Client, body: bytes, part: str) -> None:
    refused(client.put("/v1/adapters/bad", content=body, headers={"Content-Type": "application/json"}), part)


# --- how it is sent --------------------------------------------------------------------------------------------------


def part(name: str, content: bytes, *, filename: str | None = None, boundary: str = "b") -> bytes:
    extra = "" if filename is None else f'; filename="{filename}"'
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{extra}\r\n\r\n'
    return head.encode() + content + b"\r\n"


def multipart(client: httpx.Client, body: bytes, **headers: str) -> httpx.Response:
    headers = {"Content-Type": "multipart/form-data; boundary=b"} | {k.replace("_", "-"): v for k, v in headers.items()}
    return client.put("/v1/adapters/bad", content=body, headers=headers)


def files_of(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def test_zip_uploads(target: Target, client: httpx.Client) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in files_of(target.root / GOOD).items():
            file.writestr(name, content)
        file.writestr("bomb", b"\0" * (64 << 20))
    data = packed.getvalue()
    refused(client.put("/v1/adapters/bad", files=[("files", ("adapter.zip", data))]), "adapter.zip", status=400)
    for kind in ("application/zip", "application/octet-stream", "application/x-tar"):
        refused(client.put("/v1/adapters/bad", content=data, headers={"Content-Type": kind}), kind, status=415)


def test_compressed_bodies_are_not_unpacked(target: Target, client: httpx.Client) -> None:
    good = files_of(target.root / GOOD)
    body = b"".join(part("files", content, filename=name) for name, content in good.items()) + b"--b--\r\n"
    bomb = gzip.compress(b"\0" * (64 << 20))
    for encoding in ("gzip", "deflate", "br", "zstd", "gzip, gzip"):
        refused(multipart(client, gzip.compress(body), Content_Encoding=encoding), "Content-Encoding", status=415)
        refused(multipart(client, bomb, Content_Encoding=encoding), "Content-Encoding", status=415)
    source = json.dumps({"source": str(target.root / GOOD)}).encode()
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    answer = client.put("/v1/adapters/bad", content=gzip.compress(source), headers=headers)
    refused(answer, "Content-Encoding", status=415)


@pytest.mark.parametrize(
    "body",
    [
        part("x", b"1") * 100_000 + b"--b--\r\n",
        part("files", b"1", filename=CONFIG) * 90_000 + b"--b--\r\n",
        part("replace", b"t" * (4 << 20)) + b"--b--\r\n",
        b"--b\r\n" + b"X-Header: y\r\n" * 300_000 + b"\r\n\r\n--b--\r\n",
        b"--b\r\nX-Header: " + b"y" * (4 << 20) + b"\r\n\r\n\r\n--b--\r\n",
        b"--b\r\n\r\nno disposition\r\n--b--\r\n",
        b"--b\r\nContent-Disposition: form-data\r\n\r\nno name\r\n--b--\r\n",
        b"--other--\r\n",
        b"",
        b"--b\r\n",
        part("files", b"{}", filename=CONFIG),
        part("files", b"{}", filename=CONFIG) + part("files", b"", filename=WEIGHTS) + b"--b--\r\n",
        part("files", b"{}", filename="../../" + CONFIG) + b"--b--\r\n",
        part("files", b"{}", filename=CONFIG + "\0.png") + b"--b--\r\n",
        part("files", b"{}", filename="adapter_model.bin") + b"--b--\r\n",
        part("files", b"{}", filename=CONFIG) * 2 + b"--b--\r\n",
        part("pinned", b"perhaps") + b"--b--\r\n",
        part("pinned", b"\xff") + b"--b--\r\n",
        part("source", b"/etc") + b"--b--\r\n",
    ],
    ids=lambda body: f"{body[:60]!r} {len(body)}",
)
def test_bad_multipart(client: httpx.Client, body: bytes) -> None:
    refused(multipart(client, body), status=400)


def test_no_boundary(client: httpx.Client) -> None:
    for kind in (
        "multipart/form-data",
        "multipart/form-data; boundary=",
        f"multipart/form-data; boundary={'b' * 5000}",
    ):
        refused(client.put("/v1/adapters/bad", content=b"--b--\r\n", headers={"Content-Type": kind}), status=400)


def large() -> Iterator[bytes]:
    yield part("files", b"{}", filename=CONFIG) + part("files", b"", filename=WEIGHTS)[:-2]
    for _ in range(64):
        yield b"\0" * (1 << 18)
    yield b"\r\n--b--\r\n"


def test_an_upload_that_is_too_large(client: httpx.Client) -> None:
    data = b"".join(large())
    assert len(data) > MAX_UPLOAD
    refused(multipart(client, data), str(MAX_UPLOAD), status=413)
    # Chunked: no length is declared, so it is found out on the way.
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    try:
        answer = client.put("/v1/adapters/bad", content=large(), headers=headers)
    except httpx.TransportError:
        return  # closed while this side was still sending, which is as clear as it gets
    refused(answer, str(MAX_UPLOAD), status=413)


def raw(server: Server, *pieces: bytes, half_close: bool = True) -> bytes:
    """Send bytes as they are; what comes back until the server closes (or 20 s pass)."""
    where = urlsplit(server.url)
    assert where.hostname is not None
    with socket.create_connection((where.hostname, where.port or 80), timeout=20) as connection:
        try:
            for piece in pieces:
                connection.sendall(piece)
            if half_close:
                connection.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # closed already: what it said before is what counts
        answer = b""
        try:
            while data := connection.recv(1 << 16):
                answer += data
        except OSError:
            pass
        return answer


def head(server: Server, **headers: str) -> bytes:
    lines = {
        "Host": urlsplit(server.url).netloc,
        "Content-Type": "multipart/form-data; boundary=b",
        "Connection": "close",
    } | {name.replace("_", "-"): value for name, value in headers.items()}
    return b"PUT /v1/adapters/bad HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in lines.items()).encode() + b"\r\n"


def test_lying_lengths(target: Target, client: httpx.Client) -> None:
    good = files_of(target.root / GOOD)
    body = b"".join(part("files", content, filename=name) for name, content in good.items()) + b"--b--\r\n"
    # More is declared than is accepted: refused before a byte of it is read.
    assert b" 413 " in raw(target.server, head(target.server, Content_Length=str(1 << 40)), half_close=False)
    # More than comes: the client is gone, and nothing is loaded.
    raw(target.server, head(target.server, Content_Length=str(len(body) + 1000)), body)
    # Less than comes: the rest is no request.
    answer = raw(target.server, head(target.server, Content_Length=str(len(body) // 2)), body)
    assert b" 400 " in answer.split(b"\r\n", 1)[0], answer[:300]
    for lie in ("-1", "abc", "1e3", "99999999999999999999999", "0x10"):
        answer = raw(target.server, head(target.server, Content_Length=lie), b"--b--\r\n")
        status = answer.split(b"\r\n", 1)[0]
        assert b" 400 " in status or b" 413 " in status, answer[:300]
    both = head(target.server, Content_Length="5", Transfer_Encoding="chunked")
    assert b" 400 " in raw(target.server, both, b"0\r\n\r\n").split(b"\r\n", 1)[0]
    endless = raw(
        target.server,
        head(target.server, Transfer_Encoding="chunked"),
        *(b"40000\r\n" + b"\0" * 0x40000 + b"\r\n",) * 64,
    )
    assert not endless or b" 4" in endless.split(b"\r\n", 1)[0], endless[:300]


def test_an_http_header_of_100_mb(target: Target, client: httpx.Client) -> None:
    before = target.server.rss()
    for beginning in (b"PUT /v1/adapters/bad HTTP/1.1\r\nHost: x\r\nX-Long: ", b"GET /v1/adapters/"):
        answer = raw(target.server, beginning, *(b"a" * (1 << 20),) * 100, half_close=False)
        assert not answer or b" 431 " in answer.split(b"\r\n", 1)[0] or b" 400 " in answer.split(b"\r\n", 1)[0]
    many = raw(
        target.server, b"GET /ready HTTP/1.1\r\nHost: x\r\n", *(b"X-Many: y\r\n" * 100_000,) * 10, half_close=False
    )
    assert not many or b" 431 " in many.split(b"\r\n", 1)[0]
    assert target.server.rss() - before < 64 << 20
