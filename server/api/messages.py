"""Chat messages as clients send them, made into what chat templates expect."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from manylora.server.api.errors import bad_request

_ROLES: Final = ("system", "developer", "user", "assistant", "tool")

_KEYS: Final = frozenset(
    {"role", "content", "type", "name", "tool_calls", "tool_call_id", "reasoning_content"}
    # A client may send back a message as it got it; these say nothing unless they have a value.
    | {"refusal", "annotations", "audio", "function_call"}
)


def template_messages(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Check the messages and put them into the templates' form. Raises ApiError naming the message at fault.

    Content parts of text are joined by newlines (as vLLM joins them; templates of text models take strings), the
    arguments of earlier tool calls are parsed, and the role ``developer`` becomes ``system``, which is what the
    models served here were trained with. What a tool answered must name a call that was made before it.
    """
    calls: dict[str, str] = {}
    return [_message(message, f"messages.{i}", calls) for i, message in enumerate(messages)]


def _message(message: dict[str, Any], where: str, calls: dict[str, str]) -> dict[str, Any]:
    """``calls`` has the tool calls so far, names by ids; those of this message are added."""
    # `parsed` is OpenAI's client's own: the content once more, as an object.
    given = {key: value for key, value in message.items() if value is not None}
    if message.get("role") == "assistant":
        given.pop("parsed", None)
    unknown = sorted(given.keys() - _KEYS)
    if unknown:
        raise bad_request(f"`{where}.{unknown[0]}` is not a field of a message.", f"{where}.{unknown[0]}")
    for key, nothing in (("annotations", []), ("audio", None), ("function_call", None)):
        if given.pop(key, nothing) != nothing:
            raise bad_request(f"`{where}.{key}` is not served.", f"{where}.{key}")
    kind = given.pop("type", "text")  # which lm-eval gives to each
    if kind != "text":
        raise bad_request(f'`{where}.type` must be "text", got {kind!r:.40}.', f"{where}.type")
    role = given.get("role")
    if role not in _ROLES:
        raise bad_request(f"`{where}.role` must be one of {', '.join(_ROLES)}, got {role!r:.40}.", f"{where}.role")
    for key in ("name", "tool_call_id", "reasoning_content", "refusal"):
        if not isinstance(given.get(key, ""), str):
            raise bad_request(f"`{where}.{key}` must be a string.", f"{where}.{key}")
    if not given.get("tool_calls", True):
        del given["tool_calls"]  # an empty list says what no list says, but templates take its presence for calls
    _check_tool_fields(given, where, calls)
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
        calls.update({call["id"]: call["function"]["name"] for call in given["tool_calls"] if "id" in call})
    if role == "tool":
        given.setdefault("name", calls[given["tool_call_id"]])  # clients leave it out, and some templates insist on it
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


def _check_tool_fields(message: dict[str, Any], where: str, calls: Mapping[str, str]) -> None:
    """What a tool said belongs to a call; and only the assistant calls."""
    role = message["role"]
    if "tool_calls" in message and role != "assistant":
        raise bad_request(
            f"`{where}.tool_calls`: only messages of the assistant have calls, not of {role!r}.", f"{where}.tool_calls"
        )
    param = f"{where}.tool_call_id"
    if role != "tool":
        if "tool_call_id" in message:
            raise bad_request(f"`{param}`: only messages of the role 'tool' answer a call, not of {role!r}.", param)
        return
    answered = message.get("tool_call_id")
    if answered is None:
        raise bad_request(f"`{param}` is required: the id of the call that this message answers.", param)
    if answered not in calls:
        raise bad_request(
            f"`{param}` is {answered!r:.60}, but no message before it has a tool call of that id.",
            param,
        )


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise bad_request(f"`{where}` must be a list.", where)
    return [_tool_call(call, f"{where}.{i}") for i, call in enumerate(calls)]


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise bad_request(f"`{where}.function.name` must be a string.", f"{where}.function")
    call = {key: value for key, value in call.items() if value is not None}
    if call.get("type", "function") != "function":
        raise bad_request(f'`{where}.type` must be "function"; no other calls are served.', f"{where}.type")
    if not isinstance(call.get("id", ""), str):
        raise bad_request(f"`{where}.id` must be a string.", f"{where}.id")
    # `index` is left over where a client put the call together from a stream: its place in the list says the same.
    for path, unknown in (
        (where, call.keys() - {"id", "type", "function", "index"}),
        # Which OpenAI's client adds: the arguments once more, as an object.
        (f"{where}.function", function.keys() - {"name", "arguments", "parsed_arguments"}),
    ):
        for name in sorted(unknown):
            raise bad_request(f"`{path}.{name}` is not a field of a tool call.", f"{path}.{name}")
    arguments = _arguments(function.get("arguments"), f"{where}.function.arguments")
    identity = {"id": call["id"]} if "id" in call else {}
    return {**identity, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _arguments(arguments: Any, where: str) -> dict[str, Any]:
    """As an object, since templates iterate over it; OpenAI's clients send it as JSON text."""
    if isinstance(arguments, str):
        try:
            is_escaped = "\\u" in arguments
            arguments = json.loads(arguments) if arguments else {}
            if is_escaped:
                # An escaped half of a surrogate pair is a str that no tokeniser can take.
                json.dumps(arguments, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise bad_request(
                f"`{where}` holds an unpaired surrogate (\\ud800 to \\udfff), which is no character.", where
            ) from None
        except (ValueError, RecursionError):
            raise bad_request(f"`{where}` is not valid JSON.", where) from None
    if arguments is None:
        return {}
    if not isinstance(arguments, dict):
        raise bad_request(f"`{where}` must be a JSON object.", where)
    return arguments
