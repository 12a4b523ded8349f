"""Why the engine does not take a request.

EngineRefusal
├── QueueFull        its tenant's queue is full; ``retry_after`` seconds is a guess at when not       -> HTTP 429
│   └── GrammarQueueFull too many of its tenant's grammars wait to be compiled                         -> HTTP 429
├── EngineDraining   the engine is shutting down and takes nothing new                                -> HTTP 503
├── PromptTooLong    prompt and output together could never fit; both numbers are in the message      -> HTTP 400
├── AdaptersNeverFit the adapters named together have no room on the device, however idle it is       -> HTTP 400
├── InvalidRequest   the request makes no sense to the engine (no prompt, an id in use, ...)           -> HTTP 400
└── MergeRefused     an adapter cannot be merged, or there is none to unmerge                         -> HTTP 400
    └── MergeBusy    another merge is being made                                                      -> HTTP 409
"""

from __future__ import annotations


class EngineRefusal(Exception):
    """Base of every refusal by ``Engine.submit``; ``str(e)`` is fit to be shown to a client."""


class QueueFull(EngineRefusal):
    """``tenant``: whose queue it is; empty on a server without tenants."""

    _queue, _things = "queue", "requests"

    def __init__(self, waiting: int, limit: int, retry_after: int, tenant: str = "") -> None:
        whose = f"The {self._queue} of {tenant}" if tenant else f"The {self._queue}"
        super().__init__(f"{whose} is full: {waiting} {self._things} wait, {limit} may. Try again in {retry_after} s.")
        self.waiting = waiting
        self.limit = limit
        self.retry_after = retry_after
        """Whole seconds, at least 1: the value of the ``Retry-After`` header."""


class GrammarQueueFull(QueueFull):
    """Of the grammars to be compiled (``grammar.compile_queue``)."""

    _queue, _things = "compilation queue", "grammars"


class EngineDraining(EngineRefusal):
    def __init__(self) -> None:
        super().__init__("The server is shutting down and takes no new requests.")


class PromptTooLong(EngineRefusal):
    def __init__(self, n_prompt: int, max_tokens: int, limit: int) -> None:
        super().__init__(
            f"The prompt has {n_prompt} tokens and max_tokens is {max_tokens}: {n_prompt + max_tokens} together, "
            f"but this server's limit is {limit}."
        )
        self.n_prompt = n_prompt
        self.max_tokens = max_tokens
        self.limit = limit


class AdaptersNeverFit(EngineRefusal):
    """The message has the numbers, and the option that changes them."""


class InvalidRequest(EngineRefusal):
    """The message names what is wrong."""


class MergeRefused(EngineRefusal):
    """The message has the reason; ``param`` the field at fault, if it is one."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class MergeBusy(MergeRefused):
    def __init__(self) -> None:
        super().__init__("Another merge is being made or undone. Try again when it is done.")
