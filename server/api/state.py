"""What the HTTP layer needs from the rest of the server, as protocols, so that its tests run over scripted fakes."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Collection, Container, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from fastapi import Request

from manylora.adapters.versions import AdapterInfo, AdapterRef
from manylora.server.api.prompt_work import PromptWork
from manylora.server.api.tools.templates import KnownTemplates
from manylora.server.config import ApiConfig
from manylora.server.engine.constraint import Grammar
from manylora.server.engine.grammar.sources import GrammarSpec
from manylora.server.engine.merges import MergedModel, MergeInfo
from manylora.server.engine.metrics import EngineStats
from manylora.server.engine.request import Event, FinishEvent, TokenEvent
from manylora.server.engine.request import Request as EngineRequest

if TYPE_CHECKING:
    from manylora.server.api.access.keys import KeyRing
    from manylora.server.api.managing.stored_uploads import StoredUploads
    from manylora.server.api.observing.http_metrics import HttpMetrics
    from manylora.server.api.on_demand import OnDemandLoads


class EventStream(Protocol):
    """``engine.stream.RequestStream``: the events of one request."""

    def __aiter__(self) -> AsyncIterator[Event]: ...
    def offer_to(self, taker: Callable[[TokenEvent], bool]) -> None: ...
    async def result(self) -> tuple[TokenEvent, FinishEvent]: ...
    def abort(self) -> None: ...


class EngineLike(Protocol):
    """``engine.engine.Engine``. ``submit`` takes over the request's adapter reference only when it returns."""

    def submit(self, request: EngineRequest) -> EventStream: ...
    async def drain(self, timeout: float) -> None: ...  # noqa: ASYNC109 - what remains is aborted, not abandoned
    def stats(self) -> EngineStats: ...
    @property
    def is_draining(self) -> bool: ...
    @property
    def is_healthy(self) -> bool: ...


class RegistryLike(Protocol):
    """``adapters.registry.AdapterRegistry``; ``load``, ``alias``, ``unload``, ``pin`` and ``sources_in_use`` block on
    the disk."""

    def load(
        self, name: str, source: str, *, replace: bool = False, pinned: bool = False, remember: bool = True
    ) -> AdapterInfo: ...
    def alias(self, name: str, other: str, *, replace: bool = False, pinned: bool = False) -> AdapterInfo: ...
    def sources_in_use(self) -> set[str]: ...
    def when_freed(self, callback: Callable[[AdapterRef], None]) -> None: ...
    def unload(self, name: str) -> None: ...
    def acquire(self, name: str) -> AdapterRef: ...
    def release(self, ref: AdapterRef) -> None: ...
    def pin(self, name: str, pinned: bool) -> AdapterInfo: ...
    def info(self, name: str) -> AdapterInfo: ...
    def list(self, *, draining: bool = False) -> list[AdapterInfo]: ...


class MergesLike(Protocol):
    """``engine.merges.MergeManager``; ``merge`` and ``unmerge`` block, for minutes perhaps."""

    @property
    def current(self) -> MergeInfo | None: ...
    def merge(self, name: str, mode: str) -> MergeInfo: ...
    def unmerge(self) -> MergeInfo: ...
    def bind(self, ref: AdapterRef, scale: float = 1.0, count: int = 1) -> MergedModel | None: ...


class GrammarsLike(Protocol):
    """``engine.grammar.grammars.GrammarCompiler``. ``submit`` compiles on a thread of its own, for tenants in turns;
    the future, of which each call has its own, may raise InvalidGrammar. Raises GrammarQueueFull."""

    def submit(self, spec: GrammarSpec, tenant: str = "") -> Future[Grammar]: ...


class TokenizerLike(Protocol):
    """``model.tokenizer.Tokenizer``."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def special_ids(self) -> frozenset[int]: ...
    @property
    def spaces_special_tokens(self) -> bool: ...
    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...
    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...
    def render_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> str: ...
    def token_text(self, token_id: int) -> str: ...
    def token_bytes(self, token_id: int) -> bytes: ...


class MetricsLike(Protocol):
    """``engine.metrics.Metrics``."""

    def render(self) -> bytes: ...
    def adapter_tokens(self, name: str) -> tuple[int, int]:
        """Prompt and generated tokens of the ended requests for an adapter; zeros if it has had none."""
        ...

    def tenant_label(self, name: str) -> str:
        """The label of a tenant's series."""
        ...

    def retain_tenants(self, names: Collection[str]) -> None:
        """Drop the series of all other tenants."""
        ...


@dataclass(frozen=True)
class Serving:
    """A loaded base with its engine, as ``create_app`` takes it."""

    engine: EngineLike
    registry: RegistryLike
    tokenizer: TokenizerLike
    metrics: MetricsLike
    base_name: str
    """The name that requests use; may itself contain ``:``."""
    base_digest: str
    """Hexadecimal digest of the base's content."""
    max_context: int
    """Tokens of prompt and completion together."""
    host: Container[str] = frozenset()
    """Adapter versions whose weights are in host memory."""
    merges: MergesLike | None = None
    """Merges adapters into copies of the weights; None if that is not served."""
    grammars: GrammarsLike | None = None
    """Compiles what outputs must match; None if that is not served."""
    base_root: str = ""
    """Where the base came from (``root`` in /v1/models); the base's name if empty."""
    created: int = field(default_factory=lambda: int(time.time()))
    """Unix seconds."""


@dataclass(frozen=True)
class AppState:
    """What every endpoint reaches through ``state_of(request)``."""

    serving: Serving
    config: ApiConfig
    admin_executor: Executor
    """Threads of their own for loads, which may take minutes, so that they never use up those of the tokeniser."""
    http_metrics: HttpMetrics
    uploads: StoredUploads | None = None
    """Uploaded adapters; None if uploads are off."""
    on_demand: OnDemandLoads | None = None
    """Loads the adapters that requests name; None if that is off."""
    keys: KeyRing | None = None
    """Who bears which key; None only where an endpoint is tested without the rest."""
    templates: KnownTemplates = field(default_factory=KnownTemplates)
    prompt_work: PromptWork = field(default_factory=PromptWork)


def state_of(request: Request) -> AppState:
    state: AppState = request.app.state.manylora
    return state
