"""The server in this process, as a member of a fleet: the parts and the application of ``manylora serve``, with nothing
between them that it has not got there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from fastapi import FastAPI

from manylora.deploy.ray_serve.calls import whole
from manylora.deploy.ray_serve.fleet_state import FleetState
from manylora.deploy.ray_serve.following import follow, state_of
from manylora.deploy.ray_serve.routes import Body, Message, Scope
from manylora.server.adapter_loading import first_adapters
from manylora.server.api.app import create_app
from manylora.server.api.managing.stored_uploads import StoredUploads
from manylora.server.config import ServeConfig
from manylora.server.serving import Running, build


class _KeptUploads(StoredUploads):
    """Uploads in a directory that all replicas share. What nobody needs any more is for the fleet to say."""

    def sweep(self) -> None:
        pass


class LocalServer:
    """Implements ``member.Local``. The constructor loads the base and blocks for as long as that takes; it raises
    ModelError and ConfigError."""

    def __init__(self, config: ServeConfig) -> None:
        self.config: Final = config
        # Which adapters there are is remembered by the fleet; uploads go where it looks for them.
        alone = replace(config, state_dir=None, api=replace(config.api, upload_dir=None))
        self.running: Final[Running] = build(alone, progress=False)
        self.app: Final[FastAPI] = create_app(self.running.serving, alone.api)
        if config.api.upload_dir is not None:
            registry, limit = self.running.serving.registry, config.api.max_upload_bytes
            state = self.app.state.manylora
            self.app.state.manylora = replace(
                state, config=config.api, uploads=_KeptUploads(config.api.upload_dir, registry, limit)
            )

    def start(self) -> None:
        """Start the engine, and what watches it. To be called on the event loop that requests will come on."""
        self.running.engine.start()
        if self.running.auto_merger is not None:
            self.running.auto_merger.start()

    async def close(self) -> None:
        """Raises RuntimeError if something that requests held was not given back."""
        await self.running.close()
        self.running.check_integrity()

    @property
    def base(self) -> str:
        """What requests call the base."""
        return self.running.serving.base_name

    def state(self) -> FleetState:
        return state_of(self.running.registry, self.running.merges)

    def follow(self, state: FleetState) -> Mapping[str, str]:
        return follow(state, self.running.registry, self.running.merges)

    def seed(self, state: FleetState, *, restore: bool) -> FleetState:
        if restore:
            self.running.registry.remember(state.adapters)
        first_adapters(self.running.registry, self.config, restore=restore)
        return self.state()

    async def perform(self, scope: Scope, body: Body) -> Sequence[Message]:
        return await whole(self.app, scope, body)

    def routing_facts(self) -> dict[str, Any]:
        """What a router wants to know, see ``router.AdapterRouter``."""
        sizes, stats = self.running.sizes, self.running.engine.stats()
        return {
            "base": self.base,
            "rows": sizes.max_rows,
            "slots": sizes.max_slots,
            "load": stats.running + stats.waiting,
            "held": sorted(self._names_held(stats.resident_versions)),
            "hits": stats.slot_hits,
            "misses": stats.slot_misses,
        }

    def _names_held(self, versions: frozenset[str]) -> set[str]:
        """The names that mean one of ``versions``: aliases share a slot."""
        return {info.name for info in self.running.registry.list() if info.version in versions}
