"""Which templates take tools, and how they write calls: found out by giving each of them a made-up conversation."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from manylora.server.api.tools.formats import PROBE_CALL, PROBE_TOOL, ToolFormat, recognise
from manylora.server.model.errors import ChatTemplateError

if TYPE_CHECKING:
    from manylora.server.api.state import TokenizerLike

_MAX_KNOWN: Final = 1024
"""Templates that are remembered, by digest: every adapter may bring one."""

_TOOL: Final[Mapping[str, Any]] = {
    "type": "function",
    "function": {
        "name": PROBE_TOOL,
        "description": "Nothing.",
        "parameters": {"type": "object", "properties": {"x": {"type": "string", "description": "Anything."}}},
    },
}
_USER: Final[Mapping[str, Any]] = {"role": "user", "content": "Hello"}
_CALL: Final[Mapping[str, Any]] = {
    "role": "assistant",
    "content": "",
    # Nine characters, which is what Mistral's templates insist on.
    "tool_calls": [
        {"id": "probe0001", "type": "function", "function": {"name": PROBE_CALL, "arguments": {"x": "anything"}}}
    ],
}


@dataclass(frozen=True)
class TemplateTools:
    """What is known of a template."""

    takes_tools: bool
    """Whether it shows the tools to the model."""
    format: ToolFormat | None
    """How it writes calls; None if in no way that is known here."""


class KnownTemplates:
    """Remembers what was found out about templates. For any number of threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[str | None, TemplateTools] = OrderedDict()

    async def tools_of(self, tokenizer: TokenizerLike, template: str | None) -> TemplateTools:
        """What ``template`` does with tools; None is the base's own."""
        key = None if template is None else hashlib.sha256(template.encode()).hexdigest()
        with self._lock:
            found = self._known.get(key)
            if found is not None:
                self._known.move_to_end(key)
                return found
        # A template is code that somebody brought, perhaps slow: not on the event loop's thread.
        found = await asyncio.to_thread(_probe, tokenizer, template)
        with self._lock:
            self._known[key] = found
            if len(self._known) > _MAX_KNOWN:
                self._known.popitem(last=False)
        return found


def _probe(tokenizer: TokenizerLike, template: str | None) -> TemplateTools:
    # A template without any notion of calls may refuse the second conversation, but it may still tell the model about
    # tools, and in which format to call them.
    for messages in ([_USER, _CALL], [_USER]):
        try:
            text = tokenizer.render_chat_template(
                messages, chat_template=template, add_generation_prompt=False, tools=[_TOOL]
            )
        except ChatTemplateError:
            continue
        if PROBE_TOOL in text:
            return TemplateTools(takes_tools=True, format=recognise(text))
    return TemplateTools(takes_tools=False, format=None)
