"""``python -m manylora.deploy.ray_serve``: a fleet on this machine, or on the Ray cluster at ``RAY_ADDRESS``."""

from __future__ import annotations

import contextlib
import os
import queue
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from manylora.server.config import ConfigError

if TYPE_CHECKING:
    from manylora.deploy.ray_serve.app import FleetConfig

REFUSED, FAILED, DONE = 2, 1, 0
_APPLICATION = "manylora"

_OBJECT_STORE = 80 << 20
"""Bytes; requests and answers are passed on without it, but Ray wants 75 MiB at least."""


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGINT or SIGTERM; the process's exit code. SIGHUP restarts the replicas one after the other."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not os.environ.get("RAY_ADDRESS"):
        # A cluster of one machine, whose processes listen on 127.0.0.1 alone. Ray knows that kind from desktops, and
        # reads this when it is imported. Its key is nobody else's, and is left nowhere.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    from manylora.deploy.ray_serve.app import fleet_config, parser

    try:
        config = fleet_config(parser().parse_args(argv))
    except ConfigError as error:
        sys.stderr.write(f"manylora: {error}\n")
        return REFUSED
    from ray import serve

    orders: queue.SimpleQueue[str] = queue.SimpleQueue()
    with _ray(max(config.replicas, config.max_replicas or 0) * config.cpus):
        for one in (signal.SIGINT, signal.SIGTERM):  # Ray has set its own, which end the process at once
            signal.signal(one, lambda *_: orders.put("end"))
        signal.signal(signal.SIGHUP, lambda *_: orders.put("restart"))
        api = config.server.api
        serve.start(http_options={"host": api.host, "port": api.port}, proxy_location="HeadOnly")
        try:
            _deploy(config)
        except RuntimeError as error:
            _say(f"the fleet does not come up: {error}")
            return FAILED
        _say(f"serving fleet on http://{api.host}:{api.port} ({config.replicas} replicas)")
        restarting: threading.Thread | None = None
        while orders.get() == "restart":
            if restarting is None or not restarting.is_alive():
                # Beside this thread, so that it can be ended meanwhile.
                restarting = threading.Thread(target=_restart, args=(config,), daemon=True)
                restarting.start()
        serve.shutdown()
    return DONE


def _deploy(config: FleetConfig) -> None:
    """Have Ray run what ``config`` says, and wait until it does. Raises RuntimeError."""
    from ray import serve

    from manylora.deploy.ray_serve.app import application

    serve.run(application(config), name=_APPLICATION, route_prefix="/", logging_config=_quiet())


def _restart(config: FleetConfig) -> None:
    """Replace all replicas, one after the other, each when its requests are over."""
    _say("restarting the replicas, one after the other")
    try:
        _deploy(replace(config, generation=f"{config.generation}@{time.time()}"))
    except RuntimeError as error:
        _say(f"the restart does not come to its end: {error}")
    else:
        _say("the replicas are restarted")


def _say(text: str) -> None:
    sys.stderr.write(f"manylora: {text}\n")
    sys.stderr.flush()


def _quiet() -> dict[str, object]:
    """Ray's own lines for each request are not wanted: each replica writes an access log."""
    return {"enable_access_log": False, "log_level": "WARNING"}


@contextlib.contextmanager
def _ray(cpus: float) -> Iterator[None]:
    """Be connected to the cluster at RAY_ADDRESS, or to one of this process's own, which listens on this machine alone
    and is gone at the end."""
    import ray

    from manylora.deploy.ray_serve.loopback import HOOK

    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False)
        try:
            yield
        finally:
            ray.shutdown()
        return
    # Short, as sockets' paths have an end. And to be in: Ray's workers search the directory that we are in for modules,
    # where the repository has folders called `kernels` and `adapters`.
    directory = tempfile.mkdtemp(prefix="mlray-")
    os.chdir(directory)
    try:
        ray.init(
            address="local",
            num_cpus=max(int(cpus + 0.999), 1),
            object_store_memory=_OBJECT_STORE,
            include_dashboard=False,
            runtime_env={"worker_process_setup_hook": HOOK},
            _temp_dir=directory,
        )
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
