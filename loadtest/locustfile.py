"""The same load test inside locust itself, for its web page (live charts, a button to stop) and its CSV.

    locust -f loadtest/locustfile.py --host http://127.0.0.1:8000 --profile ramp     # then http://localhost:8089
    locust -f loadtest/locustfile.py --host http://127.0.0.1:8000 --headless --profile smoke

loadtest/run.py is the usual way: it needs no running server, and says more. Options and results are the same. locust's
--users, --spawn-rate and --run-time do not apply: the profile says how many, and for how long.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

from locust import events
from locust.env import Environment

sys.path.insert(0, str(Path(__file__).resolve().parent))

from loadgen.errors import LoadTestError
from loadgen.options import add_options, settings_of
from loadgen.report import console_text, write_results
from loadgen.session import LoadTest
from loadgen.settings import bearer
from loadgen.target import look_at
from loadgen.users import ClosedUser, OpenUser, Shape, bind

__all__ = ["ClosedUser", "OpenUser", "Shape"]  # which locust finds here


@events.init_command_line_parser.add_listener
def options(parser: Any) -> None:
    add_options(parser, has_profile=True)


@events.init.add_listener
def prepare(environment: Environment, **_: Any) -> None:
    """Before anything runs, so that what is wrong ends locust at once. SystemExit with 2."""
    options = environment.parsed_options
    try:
        settings = settings_of(options)
        if not environment.host:
            raise LoadTestError("--host: which server?")
        load = LoadTest(settings, look_at(environment.host.rstrip("/"), bearer(settings.bearer)))
        bind(load)
        load.prepare(environment)
    except LoadTestError as error:
        logging.error("%s", error)
        raise SystemExit(2) from None


@events.test_stop.add_listener
def report(environment: Environment, **_: Any) -> None:
    load = Shape.load
    if not load.begun:
        return
    load.interrupted = not load.over.is_set()
    load.stop()
    summary = write_results(load, "")
    logging.info("%s", console_text(summary, load.settings.out))
    environment.process_exit_code = 0 if summary["passed"] else 1
    if environment.web_ui is not None:
        prepare(environment)  # the page's start button begins another
