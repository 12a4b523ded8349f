"""A server without a model: a byte tokeniser, a scripted engine, and the real registry over adapters made of names."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from manylora.adapters.errors import AdapterRefused, AdapterSourceNotFound
from manylora.adapters.registry import AdapterRegistry
from manylora.adapters.versions import LoadedAdapter
from manylora.server.api.state import Serving
from manylora.server.api.tools.formats import PROBE_TOOL
from manylora.server.engine.errors import EngineDraining, EngineRefusal
from manylora.server.engine.metrics import EngineStats
from manylora.server.engine.request import Event, FinishEvent, Request, TokenEvent, TokenLogprob, TokenLogprobs
from manylora.server.engine.stream import Mailbox, RequestStream
from manylora.server.model.errors import ChatTemplateError

BOS, EOS = 256, 257
BASE_DIGEST = "ba5e" * 16

Step = list[Event]
Script = Callable[[Request], list[Step]]


class FakeTokenizer:
    """Every byte is a token; 256 begins a text and 257 ends it."""

    vocab_size = 258
    special_ids = frozenset({BOS, EOS})
    spaces_special_tokens = False

    def __init__(self) -> None:
        self.templates: list[dict[str, Any]] = []
        """The arguments of every call of ``render_chat_template``, besides those that find out about tools."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        if text.startswith("<s>"):  # a template writes it out
            return [BOS, *self.encode(text.removeprefix("<s>"), add_special_tokens=False)]
        return [BOS] * add_special_tokens + list(text.encode())

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        kept = [i for i in ids if not (skip_special_tokens and i in self.special_ids)]
        return b"".join(self.token_bytes(i) for i in kept).decode("utf-8", "replace")

    def render_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> str:
        """The base's template shows the names of tools and writes calls as Hermes does; others know neither."""
        shown = [tool["function"]["name"] for tool in kwargs.get("tools", ())] if chat_template is None else []
        if PROBE_TOOL not in shown:
            self.templates.append(
                {
                    "messages": list(messages),
                    "chat_template": chat_template,
                    "add_generation_prompt": add_generation_prompt,
                    "continue_final_message": continue_final_message,
                    **kwargs,
                }
            )
        if messages[-1]["content"] == "refuse me":
            raise ChatTemplateError("The chat template refused these messages: no.")
        text = "".join(f"{tool}\n" for tool in shown)
        for message in messages:
            text += f"{message['role']}:{message['content']}\n"
            for call in message.get("tool_calls", ()) if chat_template is None else ():
                text += f"<tool_call>\n{json.dumps(call['function'])}\n</tool_call>\n"
        return "<s>" + (chat_template or "") + text + "assistant:" * add_generation_prompt

    def token_text(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        return {BOS: b"<s>", EOS: b"</s>"}.get(token_id) or bytes([token_id])


def token(text: str, *, logprobs: int | None = None) -> TokenEvent:
    """``text`` as the tokens of its bytes, with log-probabilities -0.5, and -1.5 and less for the runners-up."""
    ids = tuple(text.encode())
    steps: tuple[TokenLogprobs, ...] = ()
    if logprobs is not None:
        steps = tuple(
            TokenLogprobs(TokenLogprob(i, -0.5, 0), tuple(TokenLogprob(i + k, -0.5 - k, k) for k in range(logprobs)))
            for i in ids
        )
    return TokenEvent(text, ids, steps)


def hello(request: Request) -> list[Step]:
    """The default script: " Hello" and " world", then the end of the sequence."""
    k = request.params.logprobs
    if request.params.max_tokens == 0:
        return [[TokenEvent("", ()), finish(request, "length")]]
    return [[token(" Hello", logprobs=k)], [token(" world", logprobs=k), finish(request, "stop", n=12)]]


def finish(request: Request, reason: Any = "stop", *, n: int = 0, stop_reason: Any = None, error: Any = None) -> Event:
    return FinishEvent(reason, stop_reason, len(request.prompt_token_ids), n, error)


def read_logprobs(request: Request) -> tuple[TokenLogprobs | None, ...]:
    """Of the prompt's tokens, in its order: -0.25 times their place, the runners-up less."""
    k = request.params.prompt_logprobs or 0
    return None, *(
        TokenLogprobs(TokenLogprob(t, -0.25 * i, 2), tuple(TokenLogprob(j, -0.25 * i - j - 1, j) for j in range(k)))
        for i, t in enumerate(request.prompt_token_ids[1:], 1)
    )


def endless(request: Request) -> list[Step]:
    """One token, then nothing until it is aborted."""
    return [[token("a", logprobs=request.params.logprobs)]]


class FakeEngine:
    """Plays ``script`` for each request, one step a turn of the loop; owns its requests as the real one does."""

    def __init__(self, registry: AdapterRegistry) -> None:
        self.script: Script = hello
        self.requests: list[Request] = []
        self.refuse: Callable[[Request], EngineRefusal | None] = lambda _request: None
        self.aborted: list[str] = []
        self.is_draining = False
        self.is_healthy = True
        self.resident: tuple[str, ...] = ()
        self._registry = registry
        self._live: dict[str, tuple[Request, RequestStream]] = {}

    @property
    def n_live(self) -> int:
        return len(self._live)

    def submit(self, request: Request) -> RequestStream:
        if self.is_draining:
            raise EngineDraining
        refusal = self.refuse(request)
        if refusal is not None:
            raise refusal
        loop = asyncio.get_running_loop()
        stream = RequestStream(request.request_id, Mailbox(loop), self._abort)
        self.requests.append(request)
        self._live[request.request_id] = (request, stream)
        loop.call_soon(self._play, request, stream, self.script(request))
        return stream

    def _play(self, request: Request, stream: RequestStream, steps: list[Step]) -> None:
        if not steps or request.request_id not in self._live:
            return
        self._deliver(request, stream, steps[0])
        asyncio.get_running_loop().call_later(0.001, self._play, request, stream, steps[1:])

    def _deliver(self, request: Request, stream: RequestStream, events: Step) -> None:
        for event in events:
            if isinstance(event, TokenEvent) and request.prompt_logprobs:
                event = replace(event, prompt_logprobs=read_logprobs(request))
                request.prompt_logprobs.clear()  # with the first event alone
            if isinstance(event, FinishEvent):
                del self._live[request.request_id]
                if request.merged is not None:
                    request.merged.release()
                for use in request.adapters:
                    self._registry.release(use.ref)
            stream.deliver(event)

    def _abort(self, request_id: str) -> None:
        if request_id in self._live:
            self.aborted.append(request_id)
            request, stream = self._live[request_id]
            self._deliver(request, stream, [finish(request, "abort")])

    def abort_everything(self) -> None:
        """What draining does when its time is over."""
        for request_id in list(self._live):
            self._abort(request_id)

    async def drain(self, timeout: float) -> None:  # noqa: ASYNC109
        self.is_draining = True

    def stats(self) -> EngineStats:
        versions = frozenset(info.version for info in self._registry.list() if info.name in self.resident)
        return EngineStats(len(self._live), 0, 0, 1, 0, 0, 0, 4, self.resident, (), versions)


class FakeMetrics:
    def __init__(self) -> None:
        self.tenants: list[Collection[str]] = []
        """What ``retain_tenants`` was called with."""

    def render(self) -> bytes:
        return b"# TYPE up gauge\nup 1.0\n"

    def adapter_tokens(self, name: str) -> tuple[int, int]:
        return (30, 7) if name == "alice" else (0, 0)

    def tenant_label(self, name: str) -> str:
        return name or "_anybody"

    def retain_tenants(self, names: Collection[str]) -> None:
        self.tenants.append(names)


def load_fake(source: str) -> LoadedAdapter:
    """An adapter is any directory with an adapter_config.json, whose text is its content; "bad" in it is refused,
    "template" gives it a chat template of its own, and "nonlinear" makes it one that cannot be composed."""
    path = Path(source)
    if not path.is_dir():
        raise AdapterSourceNotFound(f"{path} does not exist.")
    content = (path / "adapter_config.json").read_text()
    if "bad" in content:
        raise AdapterRefused(path.name, ["it is bad", "and wrong"])
    template = "[own template]" if "template" in content else None
    report = SimpleNamespace(
        ranks=(8,),
        scales=(2.0,),
        modules=("q", "v"),
        n_modules=4,
        nbytes=1024,
        dtype="bfloat16",
        base_model="base",
        warnings=("careful",),
    )
    return LoadedAdapter(
        hashlib.sha256(content.encode()).hexdigest(),
        1024,
        report,
        weights=None,
        not_composable="its outputs are not linear in its scale" if "nonlinear" in content else None,
        chat_template=template,
    )


def write_adapter(directory: Path, content: str = "{}") -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "adapter_config.json").write_text(content)
    return directory


def make_serving(tmp_path: Path, *, base_name: str = "base", max_context: int = 512) -> Serving:
    """A base with the adapters ``alice`` and ``org/bob`` (which has its own chat template)."""
    registry = AdapterRegistry(load_fake, reserved={base_name})
    registry.load("alice", str(write_adapter(tmp_path / "alice", '{"r": 8}')))
    registry.load("org/bob", str(write_adapter(tmp_path / "bob", '{"template": 1}')))
    return Serving(
        engine=FakeEngine(registry),
        registry=registry,
        tokenizer=FakeTokenizer(),
        metrics=FakeMetrics(),
        base_name=base_name,
        base_digest=BASE_DIGEST,
        max_context=max_context,
        base_root="/models/base",
        host={registry.info("alice").version, registry.info("org/bob").version},
    )
