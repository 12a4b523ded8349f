"""The bodies that the server takes: types, ranges and the rules between fields. No field is without effect.

Strict: ``true`` is no number and ``"1"`` no integer. ``body.validate`` has removed ``null`` (it means "not given") and
the fields that change nothing, so what is not listed here is an error.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

MAX_STOPS = 16
MAX_LOGPROBS = 20
MAX_N = 128
MAX_ADAPTERS = 8
MAX_SCALE = 100
_INT64 = 1 << 63

Prompt = str | list[int]


class FieldError(ValueError):
    """A rule between fields is broken; ``param`` is the one to change, and the message says everything."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


def _token_ids(value: list[Any], where: str) -> list[int]:
    # type(), not isinstance: True is an int to Python. Negative ids and ids beyond the vocabulary are caught with it.
    if not all(type(token) is int for token in value):
        raise ValueError(f"{where} must hold token ids only, or strings only.")
    return value


def _prompts(value: Any) -> list[Prompt]:
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise ValueError("expected a string, a list of strings, a list of token ids or a list of such lists.")
    if not value:
        raise ValueError("the list is empty.")
    if isinstance(value[0], int):
        return [_token_ids(value, "the list")]
    if all(isinstance(one, str) for one in value):
        return value
    if all(isinstance(one, list) for one in value):
        return [_token_ids(one, f"list {i}") for i, one in enumerate(value)]
    raise ValueError("the list must hold strings only, token ids only, or lists of token ids only.")


def _stops(value: Any) -> Any:
    stops = [value] if isinstance(value, str) else value
    if isinstance(stops, list):
        if len(stops) > MAX_STOPS:
            raise ValueError(f"at most {MAX_STOPS} stop strings are taken, got {len(stops)}.")
        if "" in stops:
            raise ValueError("a stop string must not be empty.")
    return stops


def _logit_bias(value: Any) -> Any:
    if not isinstance(value, dict):
        raise ValueError("expected an object from token id to bias.")
    biases: dict[int, float] = {}
    for key, bias in value.items():
        if not (isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) < 10):
            raise ValueError(f"the key {key!r:.40} is not a token id.")
        # No NaN can arrive (the JSON is strict), and infinity is outside the range like any other large number.
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise ValueError(f"the bias of token {key} must be a number from -100 to 100.")
        biases[int(key)] = float(bias)
    return biases


class StreamOptions(Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class ScaledAdapter(Body):
    """An adapter with the factor its delta is multiplied by, besides its own alpha / r."""

    name: str = Field(min_length=1, description="As it was loaded; without the base's name before it.")
    scale: float = Field(
        default=1.0,
        ge=-MAX_SCALE,
        le=MAX_SCALE,
        description="Factor on the adapter's delta: 1 is the adapter as it was trained, 0 the base alone.",
    )


class ModelChoice(Body):
    """Which weights answer: ``model``, or ``model`` with one of the extensions that name adapters."""

    model: str = Field(description="The base, an adapter, or `base:adapter`. Echoed in the response.")
    lora_path: str | None = Field(default=None, description="An adapter's name, as SGLang's clients give it.")
    adapters: list[ScaledAdapter] | None = Field(
        default=None,
        description=(
            f"Up to {MAX_ADAPTERS} adapters whose scaled deltas are added up; `model` is then the base or one of "
            "them. A conversation is written by the chat template that all of them share, or else by the base's."
        ),
    )

    @model_validator(mode="after")
    def _adapters_rules(self) -> ModelChoice:
        if self.adapters is None:
            return self
        if self.lora_path is not None:
            raise FieldError("adapters", "`adapters` and `lora_path` exclude each other.")
        if not 1 <= len(self.adapters) <= MAX_ADAPTERS:
            raise FieldError(
                "adapters",
                f"`adapters` must name 1 to {MAX_ADAPTERS} adapters, got {len(self.adapters)}; for the base alone "
                "leave the field out.",
            )
        names = [one.name for one in self.adapters]
        for name in names:
            # Added up, a name repeated by mistake would silently be an adapter of twice the strength.
            if names.count(name) > 1:
                raise FieldError(
                    "adapters", f"`adapters` names `{name}` more than once: name it once, with the sum of its scales."
                )
        return self


class GenerationRequest(ModelChoice):
    """What completions and chat have in common. Ranges are OpenAI's, for the extras vLLM's."""

    n: int = Field(default=1, ge=1, le=MAX_N)
    temperature: float = Field(default=1.0, ge=0, le=100)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=-1)
    min_p: float = Field(default=0.0, ge=0, le=1)
    seed: int | None = Field(default=None, ge=-_INT64, lt=_INT64)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    repetition_penalty: float = Field(default=1.0, gt=0, le=100)
    logit_bias: Annotated[dict[int, float], BeforeValidator(_logit_bias)] = Field(default_factory=dict)
    max_tokens: int | None = Field(default=None, ge=1)
    min_tokens: int = Field(default=0, ge=0)
    stop: Annotated[list[str], BeforeValidator(_stops)] = Field(default_factory=list)
    stop_token_ids: list[int] = Field(default_factory=list, max_length=128)
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    truncate_prompt_tokens: int | None = Field(default=None, ge=-1)
    priority: int = Field(default=0, ge=-_INT64, lt=_INT64)
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _rules(self) -> GenerationRequest:
        if self.stream_options is not None:
            if not self.stream:
                raise FieldError("stream_options", "`stream_options` needs `stream`: true.")
            if self.stream_options.continuous_usage_stats and not self.stream_options.include_usage:
                raise FieldError(
                    "stream_options.continuous_usage_stats",
                    "`stream_options.continuous_usage_stats` needs `include_usage`: true.",
                )
        if self.truncate_prompt_tokens == 0:
            raise FieldError(
                "truncate_prompt_tokens", "`truncate_prompt_tokens` must be at least 1, or -1 for as many as fit."
            )
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)


class CompletionRequest(GenerationRequest):
    """``POST /v1/completions``."""

    prompt: Annotated[list[Prompt], BeforeValidator(_prompts)]
    add_special_tokens: bool = True
    best_of: int | None = Field(default=None, ge=1)
    echo: bool = False
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def _completion_rules(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of < self.n:
            raise FieldError("best_of", f"`best_of` ({self.best_of}) must not be below `n` ({self.n}).")
        if self.best_of is not None and self.best_of > self.n:
            raise FieldError("best_of", f"`best_of` ({self.best_of}) above `n` ({self.n}) is not served yet.")
        if self.echo and self.logprobs is not None:
            raise FieldError(
                "echo", "`echo` together with `logprobs` (log-probabilities of the prompt) is not served yet."
            )
        return self


class ChatTemplateFields(Body):
    """How a conversation becomes a prompt. ``messages`` are checked by ``api.messages``, which knows their rules."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    tools: list[dict[str, Any]] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    add_special_tokens: Literal[False] = False
    """A chat template writes the special tokens itself."""

    @model_validator(mode="after")
    def _template_rules(self) -> ChatTemplateFields:
        if self.add_generation_prompt and self.continue_final_message:
            raise FieldError(
                "add_generation_prompt", "`add_generation_prompt` and `continue_final_message` exclude each other."
            )
        taken = sorted(_TEMPLATE_VARIABLES & self.chat_template_kwargs.keys())
        if taken:
            raise FieldError(
                "chat_template_kwargs",
                f"`chat_template_kwargs` must not hold {', '.join(taken)}: use the field of that name.",
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
)


class ChatRequest(GenerationRequest, ChatTemplateFields):
    """``POST /v1/chat/completions``."""

    max_completion_tokens: int | None = Field(default=None, ge=1)
    tool_choice: Any = None
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    echo: Literal[False] = False

    @model_validator(mode="after")
    def _chat_rules(self) -> ChatRequest:
        if self.tools and self.tool_choice != "none":
            raise FieldError("tools", '`tools` are not served yet, unless `tool_choice` is "none".')
        if self.tool_choice not in (None, "none", "auto"):
            raise FieldError("tool_choice", '`tool_choice` other than "none" is not served yet.')
        if self.top_logprobs is not None and not self.logprobs:
            raise FieldError("top_logprobs", "`top_logprobs` needs `logprobs`: true.")
        both = self.max_tokens, self.max_completion_tokens
        if None not in both and both[0] != both[1]:
            raise FieldError("max_tokens", "`max_tokens` and `max_completion_tokens` disagree; give one of them.")
        return self


class TokenizeRequest(Body):
    """``POST /tokenize`` of a prompt; ``model`` may be left out, for the base."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool = False


class TokenizeChatRequest(ChatTemplateFields):
    """``POST /tokenize`` of a conversation."""

    model: str | None = None
    return_token_strs: bool = False


class DetokenizeRequest(Body):
    """``POST /detokenize``."""

    model: str | None = None
    tokens: list[int]


class VllmLoad(Body):
    """``POST /v1/load_lora_adapter``."""

    lora_name: str = ""
    lora_path: str = ""
    load_inplace: bool = False


class VllmUnload(Body):
    lora_name: str = ""


class SglangLoad(Body):
    """``POST /load_lora_adapter``."""

    lora_name: str
    lora_path: str
    pinned: bool = False


class SglangUnload(Body):
    lora_name: str


class AdapterPut(Body):
    """``PUT /v1/adapters/{name}``: from ``source``, or as another name of what ``alias_of`` means now."""

    source: str | None = Field(
        default=None,
        min_length=1,
        description="A directory inside the allowed roots, or a hub id, perhaps with a revision: `org/name@revision`.",
    )
    alias_of: str | None = Field(
        default=None,
        min_length=1,
        description="Another adapter's name: this one gets the version that it has now, and keeps it when the other is "
        "replaced. Nothing is loaded.",
    )
    replace: bool = True
    pinned: bool | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> AdapterPut:
        if (self.source is None) == (self.alias_of is None):
            raise FieldError("source", "Give either `source` or `alias_of`.")
        return self


class AdapterMerge(Body):
    """``POST /v1/adapters/{name}/merge``."""

    mode: Literal["exact", "compact"] = Field(
        default="exact",
        description="`exact`: merged weights in 16 bits; `compact`: in NF4, as large and as fast as the base's. The "
        "answer's `drift` says by how much logits differ from the unmerged adapter's.",
    )


class AdapterPatch(Body):
    """``PATCH /v1/adapters/{name}``."""

    pinned: bool
