"""Chat messages as clients send them, made into what chat templates expect."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final

from manylora.server.api.errors import bad_request

_ROLES: Final = ("system", "developer", "user", "assistant", "tool")

_KEYS: Final = frozenset(
    {"role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content"}
    # A client may send back a message as it got it; these say nothing unless they have a value.
    | {"refusal", "annotations", "audio", "function_call"}
)


def template_messages(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Check the messages and put them into the templates' form. Raises ApiError naming the message at fault.

    Content parts of text are joined by newlines (as vLLM joins them; templates of text models take strings), the
    arguments of earlier tool calls are parsed, and the role ``developer`` becomes ``system``, which is what the
    models served here were trained with.
    """
    return [_message(message, f"messages.{i}") for i, message in enumerate(messages)]


def _message(message: dict[str, Any], where: str) -> dict[str, Any]:
    given = {key: value for key, value in message.items() if value is not None}
    unknown = sorted(given.keys() - _KEYS)
    if unknown:
        raise bad_request(f"`{where}.{unknown[0]}` is not a field of a message.", f"{where}.{unknown[0]}")
    for key in ("annotations", "audio", "function_call"):
        if given.pop(key, None):
            raise bad_request(f"`{where}.{key}` is not served.", f"{where}.{key}")
    role = given.get("role")
    if role not in _ROLES:
        raise bad_request(f"`{where}.role` must be one of {', '.join(_ROLES)}, got {role!r:.40}.", f"{where}.role")
    for key in ("name", "tool_call_id", "reasoning_content", "refusal"):
        if not isinstance(given.get(key, ""), str):
            raise bad_request(f"`{where}.{key}` must be a string.", f"{where}.{key}")
    refusal = given.pop("refusal", None)
    if "content" in given:
        given["content"] = _text(given["content"], f"{where}.content")
    elif refusal is not None:
        given["content"] = refusal  # what the assistant said instead
    elif role == "assistant" and given.get("tool_calls"):
        given["content"] = ""
    else:
        raise bad_request(f"`{where}.content` is required.", f"{where}.content")
    if "tool_calls" in given:
        given["tool_calls"] = _tool_calls(given["tool_calls"], f"{where}.tool_calls")
    if role == "developer":
        given["role"] = "system"
    return given


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise bad_request(f"`{where}` must be a string or a list of text parts.", where)
    return "\n".join(_part(part, f"{where}.{i}") for i, part in enumerate(content))


def _part(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in ("text", "refusal"):
        shown = f"parts of type {kind!r:.40}" if kind is not None else "parts without a type"
        raise bad_request(f"`{where}`: {shown} are not served; this model reads text only.", where)
    text = part.get(kind)
    if not isinstance(text, str):
        raise bad_request(f"`{where}.{kind}` must be a string.", f"{where}.{kind}")
    extra = sorted(part.keys() - {"type", kind})
    if extra:
        raise bad_request(f"`{where}.{extra[0]}` is not a field of a content part.", f"{where}.{extra[0]}")
    return text


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise bad_request(f"`{where}` must be a list.", where)
    return [_tool_call(call, f"{where}.{i}") for i, call in enumerate(calls)]


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise bad_request(f"`{where}.function.name` must be a string.", f"{where}.function")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):  # OpenAI's form; templates iterate over an object
        try:
            arguments = json.loads(arguments) if arguments else {}
        except (ValueError, RecursionError):
            raise bad_request(
                f"`{where}.function.arguments` is not valid JSON.", f"{where}.function.arguments"
            ) from None
    return {**call, "function": {**function, "arguments": arguments}}
