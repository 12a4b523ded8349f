"""Ray's request router, by our policy.

Of what Ray offers this is the part that is public and fits (2.60; the source says why the others do not):

- ``ray.serve.request_router.RequestRouter`` (``@PublicAPI``) asks ``choose_replicas`` for an order and does the rest:
  room on replicas, waiting where there is none, replicas that died. It sees the request's arguments, so the adapters
  need not be squeezed into a model id, nor be one.
- ``record_routing_stats``, a method of the deployment, is how replicas tell routers what they hold: Ray's controller
  asks each of them every ``request_routing_stats_period_s`` and sends it to all routers.
- ``@serve.multiplexed`` has replicas evict by Ray's own list of models, where this server has slots, pins and
  references, and routes to the replica with the *fewest models* otherwise, whatever it has to do.
- Ray's proxies look at no body, and HAProxy as ingress, which can, cuts a stream off when its replica dies. So there
  is an ingress deployment (``front``) that does.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Final

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from manylora.deploy.ray_serve.affinity import POLICIES, Placements, Policy, Replica
from manylora.deploy.ray_serve.routes import Route, of_adapters

_REMEMBER_S: Final = 5.0
"""Several times the period of reports."""


class AdapterRouter(RequestRouter):  # type: ignore[misc]
    """Asks a policy of ``affinity.POLICIES``, whose name is ``policy`` in ``request_router_kwargs``."""

    def initialize_state(self, policy: str = "affinity") -> None:
        self._policy: Policy = POLICIES[policy]()
        self._placements = Placements(_REMEMBER_S, time.monotonic)

    def update_replicas(self, replicas: Sequence[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self._placements.forget({replica.replica_id.unique_id for replica in replicas})

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # when all of them were full
        route = _route_of(pending_request)
        by_id = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        known = {id: self._known(id, replica) for id, replica in by_id.items()}
        ids = [id for id in by_id if id not in route.avoid] or list(by_id)
        names = of_adapters(route.adapters, _base(candidate_replicas))
        return [[by_id[replica.id]] for replica in self._policy.order(names, [known[id] for id in ids])]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        replica = self.curr_replicas.get(replica_id)
        if replica is not None:
            names = of_adapters(_route_of(pending_request).adapters, _base([replica]))
            self._placements.sent(replica_id.unique_id, names, int(replica.routing_stats.get("slots", 1)))

    def _known(self, id: str, replica: RunningReplica) -> Replica:
        stats = replica.routing_stats
        load = self.replica_queue_len_cache.get(replica.replica_id)
        return Replica(
            id,
            int(stats.get("load", 0)) if load is None else load,
            int(stats.get("rows", 1)),
            self._placements.held(id, frozenset(stats.get("held", ()))),
        )


def _route_of(request: PendingRequest) -> Route:
    """What the request names; other methods than ``Server.answer`` name nothing."""
    return next((argument for argument in request.args if isinstance(argument, Route)), Route())


def _base(replicas: Sequence[RunningReplica]) -> str:
    """What requests call the base; nothing before the first report, by which nobody holds anything either."""
    return next((str(replica.routing_stats["base"]) for replica in replicas if "base" in replica.routing_stats), "")
