"""What the server answers, as models: for the document and the tests that hold every response against it.

Responses are built as dictionaries and text where they are made (a stream's at each token), so nothing here runs while
serving. A field with a default may be absent; any other is always there, if only as ``null``.
"""

from __future__ import annotations

from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from manylora.server.api.errors import ERROR_TYPES

FinishReason = Literal["stop", "length", "tool_calls"]


_ERROR_TYPES: Final[list[JsonValue]] = [*sorted(ERROR_TYPES)]


class Answer(BaseModel):
    """Closed: a field that is not here is not sent."""

    model_config = ConfigDict(extra="forbid")


class ErrorDetail(Answer):
    message: str = Field(description="What is wrong and, where it can be said, what to do; fit for a person.")
    type: str = Field(description="The error's class by name.", json_schema_extra={"enum": _ERROR_TYPES})
    param: str | None = Field(description="The field at fault; a dotted path where it is inside another one.")
    code: int = Field(description="The HTTP status.", ge=400, le=599)


class ErrorResponse(Answer):
    """Every error, and the last event of a stream that fails after it began."""

    error: ErrorDetail


class PromptTokensDetails(Answer):
    cached_tokens: int = Field(ge=1, description="Of the prompt tokens, how many the prefix cache had.")


class Usage(Answer):
    prompt_tokens: int = Field(ge=0, description="Each prompt once, however many choices continue it.")
    completion_tokens: int = Field(ge=0)
    total_tokens: int = Field(ge=0)
    prompt_tokens_details: PromptTokensDetails | None = Field(
        default=None, description="If the prefix cache had some of the prompt when its first choice began."
    )


StopReason = int | str | None
_STOP_REASON = "The stop string or stop token id that ended it; null for the end of the sequence and for length."


class PromptLogprob(Answer):
    logprob: float
    rank: int = Field(ge=1, description="1 is the likeliest.")
    decoded_token: str | None


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""By position; null for the first. Keys are token ids."""


class CompletionLogprobs(Answer):
    """Parallel lists, one entry a token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int] = Field(description="Where the token begins in the choice's text, in characters.")


class CompletionChoice(Answer):
    index: int = Field(ge=0, description="prompt x n + choice")
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason
    stop_reason: StopReason = Field(description=_STOP_REASON)
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = Field(default=None, description="With `return_token_ids`.")
    token_ids: list[int] | None = Field(
        default=None, description="With `return_token_ids`: those generated, the one that ended the text too."
    )


class Completion(Answer):
    id: str = Field(pattern="^cmpl-")
    object: Literal["text_completion"]
    created: int = Field(description="Unix seconds.")
    model: str = Field(description="As the request named it.")
    system_fingerprint: str = Field(description="Digests of the base and of each adapter's version.")
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunkChoice(Answer):
    index: int = Field(ge=0)
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: StopReason = Field(description=_STOP_REASON)
    prompt_token_ids: list[int] | None = Field(
        default=None, description="With `return_token_ids`, in the first chunk of each choice."
    )
    token_ids: list[int] | None = Field(default=None, description="With `return_token_ids`: those of this chunk.")


class CompletionChunk(Answer):
    """One ``data:`` event of a streamed completion; the event after the last one is ``data: [DONE]``."""

    id: str = Field(pattern="^cmpl-")
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChunkChoice] = Field(description="Empty in the chunk that carries the whole `usage`.")
    usage: Usage | None = Field(default=None, description="With `stream_options.include_usage`.")


class TokenLogprob(Answer):
    token: str
    logprob: float
    bytes: list[int] = Field(description="The token's UTF-8, which need not be whole characters.")


class ChatTokenLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(Answer):
    content: list[ChatTokenLogprob]
    refusal: None


class CalledFunction(Answer):
    name: str
    arguments: str = Field(description="JSON, as the model wrote it.")


class ToolCall(Answer):
    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(Answer):
    role: Literal["assistant"]
    content: str | None = Field(description="null if there are only tool calls.")
    refusal: None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(Answer):
    index: int = Field(ge=0)
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: StopReason = Field(description=_STOP_REASON)


class ChatCompletion(Answer):
    id: str = Field(pattern="^chatcmpl-")
    object: Literal["chat.completion"]
    created: int = Field(description="Unix seconds.")
    model: str = Field(description="As the request named it.")
    system_fingerprint: str = Field(description="Digests of the base and of each adapter's version.")
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None = None


class FunctionDelta(Answer):
    name: str | None = None
    arguments: str | None = None


class ToolCallDelta(Answer):
    index: int = Field(ge=0)
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta | None = None


class ChatDelta(Answer):
    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(Answer):
    index: int = Field(ge=0)
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: StopReason = Field(default=None, description=_STOP_REASON)


class ChatCompletionChunk(Answer):
    """One ``data:`` event of a streamed chat; the event after the last one is ``data: [DONE]``."""

    id: str = Field(pattern="^chatcmpl-")
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice] = Field(description="Empty in the chunk that carries the whole `usage`.")
    usage: Usage | None = Field(default=None, description="With `stream_options.include_usage`.")


class Model(Answer):
    id: str
    object: Literal["model"]
    created: int = Field(description="Unix seconds; of an adapter, when it was loaded.")
    owned_by: Literal["manylora"]
    root: str = Field(description="Where its weights came from.")
    parent: str | None = Field(description="The base, of an adapter.")
    max_model_len: int


class ModelList(Answer):
    object: Literal["list"]
    data: list[Model]


class Tokenized(Answer):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = Field(description="If `return_token_strs`.")


class Detokenized(Answer):
    prompt: str


class Status(Answer):
    status: Literal["ok", "ready"]


class Difference(Answer):
    """Between two computations of the same logits, on a probe text."""

    max: float
    mean: float


class Merge(Answer):
    name: str
    version: str
    mode: Literal["exact", "compact"]
    bytes: int
    drift: Difference = Field(description="Of the merged weights from the unmerged adapter.")
    adapter_effect: Difference = Field(description="Of the adapter from the base, to hold the drift against.")
    warnings: list[str]
    seconds: float = Field(description="What making the weights took.")
    automatic: bool = Field(description="Merged by --auto-merge, not by a call.")


class AdapterMerged(Merge):
    object: Literal["adapter.merge"]


class AdapterUnmerged(Merge):
    object: Literal["adapter.unmerge"]


class Adapter(Answer):
    object: Literal["adapter"]
    name: str
    version: str = Field(description="Digest of its content.")
    state: Literal["ready", "draining"] = Field(description="`draining`: only finishes its requests.")
    tier: Literal["device", "host", "disk"] = Field(description="Where its weights are now.")
    pinned: bool
    source: str
    alias_of: str | None
    base_model: str | None = Field(description="As its files say.")
    ranks: list[int]
    scales: list[float]
    modules: list[str]
    n_modules: int
    dtype: str
    bytes: int
    warnings: list[str]
    requests_in_flight: int
    prompt_tokens: int = Field(description="Of requests that have ended.")
    generation_tokens: int = Field(description="Of requests that have ended.")
    loaded_at: float = Field(description="Unix seconds.")
    last_used: float | None = Field(description="Unix seconds.")
    merged: Literal["exact", "compact"] | None
    merge: Merge | None


class AdapterList(Answer):
    object: Literal["list"]
    data: list[Adapter]


class AdapterDeleted(Answer):
    object: Literal["adapter.deleted"]
    name: str
    deleted: Literal[True]


class SglangResult(Answer):
    success: bool
    error_message: str
    loaded_adapters: dict[str, str] = Field(description="Sources by name.")
