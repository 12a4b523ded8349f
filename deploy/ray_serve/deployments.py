"""What runs where, in Ray's words: replicas of the server, the fleet's one process, and the front. All that they decide
is in the modules beside this one."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import ray
from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from manylora.deploy.ray_serve.calls import call, whole
from manylora.deploy.ray_serve.fleet import Changed, Fleet, NotChanged, Orders, Report, Status
from manylora.deploy.ray_serve.fleet_state import FleetFiles
from manylora.deploy.ray_serve.front import Front, Page
from manylora.deploy.ray_serve.member import FleetLost, Member
from manylora.deploy.ray_serve.relay import BrokenOff, Elsewhere, Overcrowded, Part, ReplicaLost, Taken
from manylora.deploy.ray_serve.routes import Body, Route, Scope, of_adapters
from manylora.server.config import ServeConfig
from manylora.server.logs import set_up_logging

_log = logging.getLogger(__name__)

NAMESPACE: Final = "manylora"
_POLLS_AT_ONCE: Final = 10_000


@dataclass(frozen=True)
class FleetAddress:
    """Where the fleet's process is found, and where it keeps its files."""

    name: str
    directory: Path


def seed_of(config: ServeConfig) -> str:
    """Stands for the flags that name adapters (see ``fleet.Report.seed``)."""
    named = [(spec.name, spec.source) for spec in config.adapters]
    return sha256(repr((named, str(config.adapter_dir))).encode()).hexdigest()[:16]


class FleetProcess:
    """``Fleet`` as an actor. What it refuses it returns, as exceptions lose their fields on the way."""

    def __init__(self, directory: Path) -> None:
        logging.basicConfig(level=logging.INFO)
        session = ray.get_runtime_context().get_session_name()
        self._fleet = Fleet(FleetFiles(directory), session)

    async def poll(self, replica: str, report: Report) -> Orders:
        return await self._fleet.poll(replica, report)

    async def leave(self, replica: str) -> None:
        await self._fleet.leave(replica)

    async def change(self, scope: Scope, body: Body) -> Changed | tuple[int, str]:
        try:
            return await self._fleet.change(scope, body)
        except NotChanged as error:
            return error.status, str(error)

    async def status(self) -> Status:
        return self._fleet.status()


class RemoteFleet:
    """The fleet, from another process. It is started by whoever asks first, and again by Ray if its process dies; it
    outlives the replicas, and a change of their configuration."""

    def __init__(self, address: FleetAddress) -> None:
        options: dict[str, Any] = {
            "name": address.name,
            "namespace": NAMESPACE,
            "lifetime": "detached",
            "get_if_exists": True,
            "num_cpus": 0,
            "max_restarts": -1,
            "max_concurrency": _POLLS_AT_ONCE,
        }
        self._actor = ray.remote(FleetProcess).options(**options).remote(address.directory)

    async def poll(self, replica: str, report: Report) -> Orders:
        with _reaching_fleet():
            orders: Orders = await self._actor.poll.remote(replica, report)
            return orders

    async def leave(self, replica: str) -> None:
        with _reaching_fleet():
            await self._actor.leave.remote(replica)

    async def change(self, scope: Scope, body: Body) -> Changed:
        with _reaching_fleet():
            said: Changed | tuple[int, str] = await self._actor.change.remote(scope, body)
        if isinstance(said, Changed):
            return said
        raise NotChanged(*said)

    async def status(self) -> Status:
        with _reaching_fleet():
            status: Status = await self._actor.status.remote()
            return status


@contextlib.contextmanager
def _reaching_fleet() -> Iterator[None]:
    try:
        yield
    except RayError as error:
        raise FleetLost(f"the fleet's process cannot be reached: {error}") from error


class Server:
    """One replica: the server in this process, as long as the fleet lets it answer."""

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self, config: ServeConfig, fleet: FleetAddress, generation: str
    ) -> None:
        # ``generation`` is looked at by Ray alone, which starts all replicas anew when an argument changes.
        # Not at the top: the fleet's process and the front need not hold torch in memory, nor wait for it.
        from manylora.deploy.ray_serve.local import LocalServer

        set_up_logging(config.log_level, config.log_format)
        self._id = serve.get_replica_context().replica_id.unique_id
        self._local = await asyncio.to_thread(LocalServer, config)
        self._local.start()
        self._open = contextlib.AsyncExitStack()
        await self._open.enter_async_context(self._local.app.router.lifespan_context(self._local.app))
        self._member = Member(self._id, seed_of(config), self._local, RemoteFleet(fleet))
        self._membership = asyncio.ensure_future(self._member.run())
        # Ray sends requests from here on: then it is to have every adapter that the others have.
        serving = asyncio.ensure_future(self._member.wait_until_serving())
        await asyncio.wait({serving, self._membership}, return_when=asyncio.FIRST_COMPLETED)
        serving.result() if serving.done() else self._membership.result()

    async def answer(self, route: Route, scope: Scope, body: Body) -> AsyncGenerator[Part, None]:
        """See ``relay.Replicas.ask``."""
        named = of_adapters(route.adapters, self._local.base)
        term = self._member.term
        if (lack := self._member.lacks((*route.adapters, *named))) is not None:
            yield Elsewhere(self._id, lack, is_passing=term < 0)
            return
        has_begun = False
        async with contextlib.aclosing(call(self._local.app, scope, body)) as answer:
            async for messages in answer:
                if not has_begun:
                    # Only now is it certain which versions were taken, and that they were what the names meant.
                    if self._member.term != term:
                        yield Elsewhere(self._id, "the replica had not heard from the fleet for a while.")
                        return
                    has_begun = True
                    yield Taken(self._id)
                yield messages

    async def page(self, scope: Scope) -> tuple[str, Page]:
        """Its answer to a request without a body, whole; with its id."""
        messages = await whole(self._local.app, scope, Body())
        body = b"".join(message.get("body", b"") for message in messages[1:])
        return self._id, Page(messages[0]["status"], list(messages[0]["headers"]), body)

    def record_routing_stats(self) -> dict[str, Any]:
        """For routers; Ray calls it."""
        return self._local.routing_facts()

    async def check_health(self) -> None:
        """Raises RuntimeError if the replica is to be replaced; Ray calls it."""
        if not self._local.running.serving.engine.is_healthy:
            raise RuntimeError("the engine has stopped")
        if self._membership.done():
            raise RuntimeError(f"it is no member of the fleet any more: {self._membership}")

    async def __del__(self) -> None:
        """Ray calls it when the replica has answered what it had, or has had its time for that."""
        self._membership.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._membership
        await self._open.aclose()
        await self._local.close()
        _log.info("replica %s ended; nothing that requests held is missing", self._id)


class RayReplicas:
    """``front.AllReplicas`` over a deployment handle, whose router is ``router.AdapterRouter``."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle
        self._answering = handle.options(stream=True, method_name="answer")

    async def ask(self, route: Route, scope: Scope, body: Body) -> AsyncGenerator[Part, None]:
        response = self._answering.remote(route, scope, body)
        is_over = False
        try:
            async for part in response:
                yield part
            is_over = True
        except BackPressureError as error:
            raise Overcrowded("So many requests wait for a replica already that this one may not.") from error
        except RayActorError as error:
            raise ReplicaLost(str(error)) from error
        except (RayError, RayServeException) as error:
            raise BrokenOff(str(error)) from error
        finally:
            if not is_over:
                response.cancel()

    async def ask_all(self, scope: Scope) -> Mapping[str, Page]:
        said = await self._handle.broadcast("page", scope).results_async(timeout_s=30, return_exceptions=True)
        return dict(sorted(one for one in said if not isinstance(one, BaseException)))


class Ingress:
    """The front, where Ray's proxies send all requests."""

    def __init__(
        self, servers: DeploymentHandle[Any], config: ServeConfig, fleet: FleetAddress, generation: str
    ) -> None:
        set_up_logging(config.log_level, config.log_format)
        self._servers, self._config, self._fleet = servers, config, fleet

    def __serve_build_asgi_app__(self) -> Front:
        """Ray calls it when the replica starts (``serve.ingress``)."""
        spool = self._fleet.directory / "spool"
        return Front(self._config.api, RayReplicas(self._servers), RemoteFleet(self._fleet), spool)
