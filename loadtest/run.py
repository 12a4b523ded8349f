"""Load-test a server: many adapters, streamed answers, latencies as users feel them; a report and an exit code.

    python -P loadtest/run.py                     # the server on port 8000; if none answers there, a fresh demo server
    python -P loadtest/run.py --host http://gpu-box:8000 --profile ramp --rate 20 --seconds 120
    python -P loadtest/run.py --clients 32 --popularity distinct --fail-if 'ttft_p95_ms>2000'
    python -P loadtest/run.py --profile swaps --fail-if 'itl_p99_ms>300' --fail-if 'swap_failures>0'
    python -P loadtest/run.py --profile burst --seed 7 --adapters a,b,c --write-trace burst.jsonl
    python -P loadtest/run.py --trace burst.jsonl

A profile is a set of defaults, and any option changes it. An open loop sends on schedule, however slow the server is,
and measures from when a request was due: "how long do users wait at R requests a second?". A closed loop has N clients
that wait for their answers: "how many tokens a second can it do?".

Results go to --out: report.html (for a browser), summary.json, requests.jsonl, trace.jsonl (to be replayed by --trace).
Exit codes: 0 all thresholds kept; 1 one was not, nothing was answered, or it was interrupted; 2 wrong options; 3 no
server.
loadtest/README.md says what each figure means.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import gevent
import locust  # makes the standard library cooperative: before anything that opens a socket
from locust.env import Environment

sys.path.insert(0, str(Path(__file__).resolve().parent))

from loadgen.errors import LoadTestError, ProfileError, TargetError
from loadgen.fresh_server import DEMO_FLAGS, READY_S, ROOT, fresh_server
from loadgen.options import add_options, describe_profiles, settings_of
from loadgen.profiles import requests_of
from loadgen.report import console_text, write_results
from loadgen.session import LoadTest
from loadgen.settings import Settings, bearer
from loadgen.target import Target, answers, look_at, wait_for
from loadgen.traces import write_trace
from loadgen.users import ClosedUser, OpenUser, Shape, bind

DEFAULT_PORT = 8000
DEMO_UPLOAD = ROOT / "examples" / "adapters" / "pirate"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="run.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=describe_profiles(),
    )
    server = made.add_argument_group("server")
    server.add_argument(
        "--host", default="", metavar="URL",
        help="a running server, which must answer (default: on this machine, if one answers there, else a fresh one)",
    )  # fmt: skip
    server.add_argument(
        "--port",
        type=int,
        default=DEFAULT_PORT,
        metavar="N",
        help="without --host: where to look (default %(default)s)",
    )
    server.add_argument("--fresh", action="store_true", help="start a server, whatever else runs; it ends with the run")
    server.add_argument(
        "--server-flags", metavar="FLAGS",
        help="of a fresh server, e.g. '--model DIR --adapter-dir DIR' (default: the demo base and the demo adapters)",
    )  # fmt: skip
    server.add_argument(
        "--wait", type=float, metavar="S",
        help=f"until the server answers (default: 5 for --host, {READY_S:.0f} for a fresh one)",
    )  # fmt: skip
    add_options(made)
    made.add_argument(
        "--write-trace",
        type=Path,
        metavar="FILE",
        help="write the profile's requests and stop; with --adapters NAME,... no server is asked",
    )
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        settings = settings_of(options)
        if options.write_trace is not None:
            return write(settings, options)
        with server(settings, options) as (url, started):
            if started == shlex.join(DEMO_FLAGS) and settings.profile.swaps and settings.swap_upload is None:
                # Its own sources are loaded already, and would be shared: nothing would be swapped.
                settings = replace(settings, swap_upload=DEMO_UPLOAD)
            load = LoadTest(settings, look_at(url, bearer(settings.bearer)))
            return run(load, started)
    except TargetError as error:
        print(f"loadtest: {error}", file=sys.stderr)
        return 3
    except LoadTestError as error:
        print(f"loadtest: {error}", file=sys.stderr)
        return 2


@contextlib.contextmanager
def server(settings: Settings, options: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """The URL of the one to test, and the flags of a fresh one ("" for one that was there)."""
    here = f"http://127.0.0.1:{options.port}"
    if options.fresh and options.host:
        raise LoadTestError("--fresh: not together with --host")
    if options.host:
        url = options.host.rstrip("/")
        wait_for(url, 5.0 if options.wait is None else options.wait)
        yield url, ""
    elif not options.fresh and options.server_flags is None and answers(here):
        print(f"a server answers on {here}: testing that one (--fresh starts another)", flush=True)
        yield here, ""
    else:
        flags = list(DEMO_FLAGS) if options.server_flags is None else shlex.split(options.server_flags)
        print(f"starting manylora serve {shlex.join(flags)}", flush=True)
        with fresh_server(flags, settings.out / "server.log", options.wait or READY_S) as url:
            yield url, shlex.join(flags)


def write(settings: Settings, options: argparse.Namespace) -> int:
    if settings.profile.loop == "closed":
        raise ProfileError("--write-trace: a closed loop has no times of its own; run it, and take its trace.jsonl")
    target = Target("", settings.base, settings.adapters)
    if not settings.adapters and settings.profile.popularity.kind != "mix":
        with server(settings, options) as (url, _):
            target = look_at(url, bearer(settings.bearer))
    adapters = (settings.adapters or target.adapters)[: settings.n_adapters]
    count = write_trace(options.write_trace, requests_of(settings.profile, adapters, settings.base or target.base))
    print(f"{options.write_trace}: {count} requests")
    return 0


def run(load: LoadTest, server_flags: str) -> int:
    """Run it, write the results; the exit code."""
    environment = Environment(
        user_classes=[ClosedUser, OpenUser], events=locust.events, host=load.target.url, shape_class=Shape()
    )
    runner = environment.create_local_runner()
    bind(load)
    load.prepare(environment)

    def interrupt() -> None:
        load.interrupted = True
        load.over.set()

    watched = [gevent.signal_handler(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)]
    profile = load.settings.profile
    what = f"trace {load.settings.trace}" if load.settings.trace else f"profile {profile.name}, {profile.seconds:g} s"
    print(f"load test of {load.target.url}: {what}, {profile.loop} loop, models {', '.join(load.models)}", flush=True)
    try:
        runner.start_shape()
        shape = runner.shape_greenlet
        assert shape is not None
        shape.join()
        load.stop()
    finally:
        runner.quit()
        for handler in watched:
            handler.cancel()
    summary = write_results(load, server_flags)
    print(console_text(summary, load.settings.out), flush=True)
    return 0 if summary["passed"] and not load.interrupted else 1


if __name__ == "__main__":
    sys.exit(main())
