"""The messages of a conversation, as models: for the document. ``api.messages`` checks what comes, and knows more."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TextPart(_Part):
    type: Literal["text"]
    text: str


class RefusalPart(_Part):
    type: Literal["refusal"]
    refusal: str


Content = str | list[TextPart | RefusalPart]


class PastFunction(_Part):
    name: str
    arguments: str | dict[str, Any] | None = Field(default=None, description="An object, or the JSON text of one.")
    parsed_arguments: Any = Field(default=None, description="As OpenAI's client adds them; changes nothing.")


class PastCall(_Part):
    """A tool call that was made before."""

    id: str | None = Field(default=None, description="By which a message of the role `tool` answers it.")
    type: Literal["function"] | None = "function"
    function: PastFunction
    index: Any = Field(default=None, description="Left over from a stream; changes nothing.")


class _Message(_Part):
    type: Literal["text"] | None = Field(default=None, description="As lm-eval sends it; changes nothing.")
    name: str | None = None
    reasoning_content: str | None = None
    # Clients send back a message as they got it.
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None


class PromptMessage(_Message):
    """What the model is told. `developer` is read as `system`."""

    role: Literal["system", "developer", "user"]
    content: Content


class AssistantMessage(_Message):
    """What the model said. One of `content`, `refusal` and `tool_calls` must be there."""

    role: Literal["assistant"]
    content: Content | None = None
    refusal: str | None = Field(default=None, description="Said instead of `content`.")
    parsed: Any = Field(default=None, description="The content as OpenAI's client parses it; changes nothing.")
    tool_calls: list[PastCall] | None = None


class ToolMessage(_Message):
    """What a tool answered."""

    role: Literal["tool"]
    content: Content
    tool_call_id: str = Field(description="Of a call in a message before this one.")


Messages = Annotated[list[PromptMessage | AssistantMessage | ToolMessage], Field(min_length=1)]
