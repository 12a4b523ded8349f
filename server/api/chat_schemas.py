"""The bodies that hold a conversation: how it becomes a prompt, and which tools the model may call."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from manylora.server.api.openapi.message_models import Messages
from manylora.server.api.schema_base import Off
from manylora.server.api.schemas import MAX_LOGPROBS, Body, FieldError, GenerationRequest

MAX_TOOLS = 128


class FunctionDefinition(Body):
    """A function that the model may call."""

    # What every format of calls can hold without quoting, and what clients can map to a handler.
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,128}$")
    description: str | None = None
    parameters: dict[str, Any] | None = Field(
        default=None, description="JSON schema of the arguments, an object; without it the function takes none."
    )
    strict: bool | None = Field(
        default=None,
        description="Calls are generated within `parameters`, also where `tool_choice` leaves it to the model to call.",
    )

    def for_template(self) -> dict[str, Any]:
        """As templates expect it, in the order that models were trained on; ``strict`` means nothing to them."""
        given = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {key: value for key, value in given.items() if value is not None}


class Tool(Body):
    type: Literal["function"]
    function: FunctionDefinition

    def for_template(self) -> dict[str, Any]:
        return {"type": "function", "function": self.function.for_template()}


class NamedFunction(Body):
    name: str


class NamedTool(Body):
    """The one function to call."""

    type: Literal["function"]
    function: NamedFunction


def _tool_choice(value: Any) -> Any:
    # Checked here, or the error would be pydantic's list of every member of the union.
    if value in ("none", "auto", "required"):
        return value
    function = value.get("function") if isinstance(value, dict) else None
    is_named = isinstance(function, dict) and function.keys() == {"name"} and isinstance(function["name"], str)
    if is_named and value.keys() == {"type", "function"} and value["type"] == "function":
        return value
    raise ValueError('expected "none", "auto", "required" or {"type": "function", "function": {"name": "..."}}.')


def _as_sent(value: Any) -> Any:
    """Nothing is done here: it is there to say in the document what ``api.messages`` takes."""
    return value


class ChatTemplateFields(Body):
    """How a conversation becomes a prompt. ``messages`` are checked by ``api.messages``, which knows their rules."""

    messages: Annotated[list[dict[str, Any]], BeforeValidator(_as_sent, json_schema_input_type=Messages)] = Field(
        min_length=1
    )
    tools: list[Tool] = Field(default_factory=list, max_length=MAX_TOOLS)
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    add_special_tokens: Off = False
    """A chat template writes the special tokens itself."""

    @model_validator(mode="after")
    def _template_rules(self) -> ChatTemplateFields:
        names = [tool.function.name for tool in self.tools]
        for i, name in enumerate(names):
            if name in names[:i]:
                raise FieldError(f"tools.{i}.function.name", f"`tools` has two functions named `{name}`.")
        if self.add_generation_prompt and self.continue_final_message:
            raise FieldError(
                "add_generation_prompt", "`add_generation_prompt` and `continue_final_message` exclude each other."
            )
        taken = sorted(_TEMPLATE_VARIABLES & self.chat_template_kwargs.keys())
        if taken:
            raise FieldError(
                "chat_template_kwargs",
                f"`chat_template_kwargs` must not hold {', '.join(taken)}: such a name has a meaning already.",
            )
        return self

    @property
    def generation_prompt(self) -> bool:
        """On unless turned off, or unless the last message is to be continued."""
        if self.add_generation_prompt is None:
            return not self.continue_final_message
        return self.add_generation_prompt


_TEMPLATE_VARIABLES = frozenset(
    {"messages", "tools", "chat_template", "add_generation_prompt", "continue_final_message", "conversation"}
    # Arguments of transformers' method that are not variables of the template.
    | {"tokenize", "return_dict", "return_tensors", "padding", "truncation", "max_length", "tokenizer_kwargs"}
    | {"return_assistant_tokens_mask", "documents"}
    # Which Python has taken.
    | {"self"}
)


class ChatRequest(GenerationRequest, ChatTemplateFields):
    """``POST /v1/chat/completions``."""

    max_completion_tokens: int | None = Field(default=None, ge=1)
    tool_choice: Annotated[Literal["none", "auto", "required"] | NamedTool, BeforeValidator(_tool_choice)] = Field(
        default="auto", description="Without `tools` nothing is called, and only `none` and `auto` are taken."
    )
    parallel_tool_calls: bool = Field(default=True, description="Whether one answer may hold several calls.")
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    echo: Off = False

    @model_validator(mode="after")
    def _chat_rules(self) -> ChatRequest:
        self._check_tool_choice()
        if self.top_logprobs is not None and not self.logprobs:
            raise FieldError("top_logprobs", "`top_logprobs` needs `logprobs`: true.")
        both = self.max_tokens, self.max_completion_tokens
        if None not in both and both[0] != both[1]:
            raise FieldError("max_tokens", "`max_tokens` and `max_completion_tokens` disagree; give one of them.")
        return self

    def _check_tool_choice(self) -> None:
        if self.tool_choice == "required" and not self.tools:
            raise FieldError("tool_choice", '`tool_choice` = "required" needs `tools`.')
        if isinstance(self.tool_choice, NamedTool):
            name = self.tool_choice.function.name
            if all(tool.function.name != name for tool in self.tools):
                raise FieldError("tool_choice", f"`tool_choice` names `{name}`, which is not one of `tools`.")


class TokenizeChatRequest(ChatTemplateFields):
    """``POST /tokenize`` of a conversation."""

    model: str | None = None
    return_token_strs: bool = False
