"""A fleet of one machine listens on that machine alone.

Ray does so by itself once its node is 127.0.0.1 (see ``__main__``), but for one port of each replica of Ray Serve: that
is opened on all addresses, whatever Ray is told (``ray/serve/_private/replica.py`` of 2.60: ``[::]:0``; who speaks to
it must know the cluster's token). A worker that runs ``listen_here_only`` before anything else opens it here as well.
"""

from __future__ import annotations

from typing import Any, Final

HOOK: Final = f"{__name__}.listen_here_only"
"""For ``runtime_env={"worker_process_setup_hook": HOOK}``."""


def listen_here_only() -> None:
    """Raises AttributeError where Ray is another version, whose ports are to be looked at anew."""
    from ray._common import tls_utils

    add_port = tls_utils.add_port_to_grpc_server

    def add_port_here(server: Any, address: str) -> Any:
        return add_port(server, address.replace("[::]:", "127.0.0.1:", 1))

    tls_utils.add_port_to_grpc_server = add_port_here
