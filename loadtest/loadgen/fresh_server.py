"""A ``manylora serve`` of the load test's own: started, waited for, ended."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import requests

from loadgen.errors import TargetError

ROOT = Path(__file__).resolve().parents[2]
DEMO_FLAGS = ("--served-model-name", "smollm2", "--adapter-dir", str(ROOT / "examples" / "adapters"))
READY_S = 900.0
"""The first start quantises the base and compiles the kernels."""
_STOP_S = 60.0
_TOLD_S = 10.0
_SERVING = re.compile(r"serving \S+ on (http://[^\s\"]+)")


@dataclass(frozen=True)
class FreshServer:
    """A process that is ready, and where it listens."""

    url: str
    process: subprocess.Popen[bytes]

    def end(self) -> int:
        """SIGTERM; its exit code, -9 if it did not end by itself within a minute."""
        _end(self.process)
        return self.process.returncode


@contextlib.contextmanager
def fresh_server(flags: Sequence[str], log: Path, ready_s: float = READY_S) -> Iterator[str]:
    """The URL of a ``fresh_process``."""
    with fresh_process(flags, log, ready_s) as server:
        yield server.url


@contextlib.contextmanager
def fresh_process(flags: Sequence[str], log: Path, ready_s: float = READY_S) -> Iterator[FreshServer]:
    """On a free port of this machine, while the block runs. Its output goes to ``log``; what it would remember, and
    uploads, to a folder that is gone afterwards. TargetError, with the end of the log, if it does not get ready."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="loadtest-") as state, log.open("wb") as output:
        command = [str(Path(sys.executable).parent / "manylora"), "serve", "--port", "0", "--state-dir", state, *flags]
        try:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        except OSError as error:
            raise TargetError(f"{command[0]}: {error}") from None
        try:
            yield FreshServer(_wait(process, log, ready_s), process)
        finally:
            _end(process)


def _wait(process: subprocess.Popen[bytes], log: Path, ready_s: float) -> str:
    began = told = time.monotonic()
    while True:
        text = log.read_text(errors="replace")
        if process.poll() is not None:
            raise TargetError(f"the server ended with exit code {process.returncode}; its log, {log}:\n{text[-2000:]}")
        found = _SERVING.search(text)
        if found is not None:
            with contextlib.suppress(requests.RequestException):
                if requests.get(f"{found[1]}/ready", timeout=3).ok:
                    return found[1]
        now = time.monotonic()
        if now - began > ready_s:
            raise TargetError(f"the server was not ready after {ready_s:.0f} s; its log, {log}:\n{text[-2000:]}")
        if now - told > _TOLD_S:
            print(f"waiting for the server to be ready ({now - began:.0f} s; see {log})", flush=True)
            told = now
        time.sleep(0.2)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Politely, then not."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()
