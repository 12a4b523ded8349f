"""A fleet as an application of Ray Serve, from flags: ``fleet`` is what ``serve run`` and a RayService import."""

from __future__ import annotations

import argparse
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from ray import serve
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from manylora.adapters.registry import absolute_source
from manylora.deploy.ray_serve.affinity import POLICIES
from manylora.deploy.ray_serve.deployments import FleetAddress, Ingress, Server
from manylora.deploy.ray_serve.router import AdapterRouter
from manylora.server.cli import serve_config
from manylora.server.cli_flags import add_serve
from manylora.server.config import ConfigError, ServeConfig

_SPARE_S: Final = 10
"""Seconds that Ray waits longer than the server itself for requests to end."""
_REPORTS_S: Final = 1.0
"""Between two reports of what a replica holds."""
_ROWS: Final = 16
"""Rows that a replica is taken to have, where --max-rows does not say."""


@dataclass(frozen=True)
class FleetConfig:
    """What the flags ask for; every check in ``__post_init__``. Raises ConfigError."""

    server: ServeConfig
    replicas: int
    max_replicas: int | None
    """With it, as many replicas as the queue asks for, ``replicas`` at least."""
    target_ongoing: float
    """Requests for each replica, running or waiting, that autoscaling aims at."""
    max_ongoing: int
    """Requests that are sent to one replica at a time; more wait where they can still go to another."""
    ingresses: int
    routing: str
    cpus: float
    gpus: float
    generation: str

    def __post_init__(self) -> None:
        if self.server.watch is not None:
            raise ConfigError(
                "--watch", "replicas would see a folder change at different times; load adapters over HTTP instead"
            )
        if self.server.state_dir is None:
            raise ConfigError("--state-dir", "a fleet needs one: replicas that start later load what it remembers")
        if self.server.api.port == 0:
            raise ConfigError("--port", "Ray's proxies need a port to listen on, not 0")
        if not 1 <= self.replicas <= 10_000:
            raise ConfigError("--replicas", f"expected 1 to 10000, got {self.replicas}")
        if self.max_replicas is not None and not self.replicas <= self.max_replicas <= 10_000:
            raise ConfigError("--max-replicas", f"expected {self.replicas} to 10000, got {self.max_replicas}")
        if not self.target_ongoing > 0:
            raise ConfigError("--target-ongoing", f"expected more than 0, got {self.target_ongoing:g}")
        if self.max_ongoing < 1:
            raise ConfigError("--max-ongoing", f"expected 1 or more, got {self.max_ongoing}")
        if self.ingresses < 1:
            raise ConfigError("--ingresses", f"expected 1 or more, got {self.ingresses}")
        if self.routing not in POLICIES:
            raise ConfigError("--routing", f"expected {' or '.join(POLICIES)}, got {self.routing!r}")
        for flag, value in (("--replica-cpus", self.cpus), ("--replica-gpus", self.gpus)):
            if value < 0:
                raise ConfigError(flag, f"expected 0 or more, got {value:g}")

    @property
    def address(self) -> FleetAddress:
        """Of the fleet's process: one for each directory, so that two fleets in a cluster do not meet."""
        assert self.server.state_dir is not None
        digest = hashlib.sha256(str(self.server.state_dir).encode()).hexdigest()[:12]
        return FleetAddress(f"fleet-{digest}", self.server.state_dir)


def parser() -> argparse.ArgumentParser:
    """The flags of ``manylora serve``, and the fleet's own."""
    made: list[argparse.ArgumentParser] = []

    class Alone:
        """Where ``add_serve`` expects the subcommands of a command line."""

        def add_parser(self, _name: str, **settings: Any) -> argparse.ArgumentParser:
            settings = {key: value for key, value in settings.items() if key != "help"}
            settings["epilog"] = "example:\n  python -m manylora.deploy.ray_serve --replicas 2 --adapter-dir ./adapters"
            made.append(argparse.ArgumentParser(prog="python -m manylora.deploy.ray_serve", **settings))
            return made[0]

    parser = add_serve(Alone())
    add = parser.add_argument_group("the fleet").add_argument
    add("--replicas", type=int, default=2, metavar="N", help="servers, each with the whole base (default: %(default)s)")
    add("--max-replicas", type=int, metavar="N", help="start and end servers by the queue, up to N (default: off)")
    add("--target-ongoing", type=float, metavar="N", help="requests for each that this aims at (default: --max-rows)")
    add("--max-ongoing", type=int, metavar="N", help="requests at one server at a time (default: twice --max-rows)")
    add("--ingresses", type=int, default=1, metavar="N", help="processes that pass requests on (default: %(default)s)")
    add(
        "--routing",
        default="affinity",
        metavar="R",
        help="affinity (a server that holds the adapter, if it is not overloaded) or random, to compare with",
    )
    add("--replica-cpus", type=float, default=1.0, metavar="N", help="CPUs Ray sets aside for each (default: 1)")
    add("--replica-gpus", type=float, default=0.0, metavar="N", help="GPUs Ray sets aside for each (default: none)")
    add("--generation", default="", metavar="TEXT", help="another text than before restarts all servers, one by one")
    return parser


def fleet_config(arguments: argparse.Namespace) -> FleetConfig:
    """Raises ConfigError."""
    server = serve_config(arguments)
    # Replicas run in directories of their own.
    server = replace(
        server,
        model=os.path.abspath(server.model) if os.path.exists(server.model) else server.model,
        adapters=tuple(replace(spec, source=absolute_source(spec.source)) for spec in server.adapters),
    )
    rows = server.engine.max_rows or _ROWS
    return FleetConfig(
        server,
        arguments.replicas,
        arguments.max_replicas,
        rows if arguments.target_ongoing is None else arguments.target_ongoing,
        2 * rows if arguments.max_ongoing is None else arguments.max_ongoing,
        arguments.ingresses,
        arguments.routing,
        arguments.replica_cpus,
        arguments.replica_gpus,
        arguments.generation,
    )


def application(config: FleetConfig) -> serve.Application:
    """What ``ray.serve.run`` takes. It is to be at the route prefix ``/``."""
    scaling: dict[str, Any] = {"num_replicas": config.replicas}
    if config.max_replicas is not None:
        scaling = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=config.replicas,
                max_replicas=config.max_replicas,
                # Ray counts requests that a replica has and those that wait for one: more than rows is a queue.
                target_ongoing_requests=config.target_ongoing,
                upscale_delay_s=5.0,
                downscale_delay_s=300.0,
                metrics_interval_s=1.0,
                look_back_period_s=5.0,
            )
        }
    server = serve.deployment(Server).options(
        name="Server",
        ray_actor_options={"num_cpus": config.cpus, "num_gpus": config.gpus},
        max_ongoing_requests=config.max_ongoing,
        max_queued_requests=max(config.server.engine.max_queue, 1),  # Ray knows no queue of nobody
        graceful_shutdown_timeout_s=config.server.api.shutdown_grace + _SPARE_S,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=5.0,
        health_check_timeout_s=30.0,
        request_router_config=RequestRouterConfig(
            request_router_class=AdapterRouter,
            request_router_kwargs={"policy": config.routing},
            request_routing_stats_period_s=_REPORTS_S,
            request_routing_stats_timeout_s=10.0,
        ),
        **scaling,
    )
    ingress = serve.deployment(serve.ingress()(Ingress)).options(
        name="Ingress",
        num_replicas=config.ingresses,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=100_000,
        graceful_shutdown_timeout_s=config.server.api.shutdown_grace + _SPARE_S,
        graceful_shutdown_wait_loop_s=0.5,
    )
    replicas: DeploymentHandle[Any] = server.bind(config.server, config.address, config.generation)
    application: serve.Application = ingress.bind(replicas, config.server, config.address, config.generation)
    return application


def fleet(args: Mapping[str, Sequence[str]]) -> serve.Application:
    """``import_path: manylora.deploy.ray_serve.app:fleet`` with ``args: {flags: [...]}``, those of the command line.
    Keys are better in the environment (MANYLORA_API_KEY, MANYLORA_ADMIN_KEY) of the process that imports it."""
    unknown = set(args) - {"flags"}
    if unknown:
        raise ConfigError("args", f"expected flags alone, got {sorted(unknown)} too")
    return application(fleet_config(parser().parse_args([str(flag) for flag in args.get("flags", ())])))
