"""The bodies that the server takes: types, ranges and the rules between fields. No field is without effect.

Strict: ``true`` is no number and ``"1"`` no integer. ``body.validate`` has removed ``null`` (it means "not given") and
the fields that change nothing, so what is not listed here is an error.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from manylora.server.api.schema_base import Body as Body  # re-exported: this is where all bodies are found
from manylora.server.api.schema_base import FieldError as FieldError
from manylora.server.api.speculation_schemas import SpeculativeConfig
from manylora.server.api.structured_schemas import StructuredFields

MAX_STOPS = 16
MAX_STOP = 1024
"""Characters: what may become one is looked through again with each token."""
MAX_LOGPROBS = 20
MAX_BAD_WORDS = 128
MAX_BAD_WORD = 256
"""Characters."""
MAX_SALT = 1024
MAX_ALLOWED = 1 << 18
MAX_N = 128
MAX_ADAPTERS = 8
MAX_SCALE = 100
_INT64 = 1 << 63

Prompt = str | list[int]

# What JSON may hold where the validators below take more than one form, for the document.
_TokenList = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
PromptInput = (
    str | _TokenList | Annotated[list[str], Field(min_length=1)] | Annotated[list[_TokenList], Field(min_length=1)]
)
_Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP)]
StopInput = _Stop | Annotated[list[_Stop], Field(max_length=MAX_STOPS)]
BiasInput = Annotated[
    dict[Annotated[str, Field(pattern="^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
    Field(json_schema_extra={"additionalProperties": False}),
]


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
        if any(isinstance(stop, str) and len(stop) > MAX_STOP for stop in stops):
            raise ValueError(f"a stop string must not have more than {MAX_STOP} characters.")
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


class GenerationRequest(ModelChoice, StructuredFields):
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
    logit_bias: Annotated[dict[int, float], BeforeValidator(_logit_bias, json_schema_input_type=BiasInput)] = Field(
        default_factory=dict
    )
    max_tokens: int | None = Field(default=None, ge=1)
    min_tokens: int = Field(default=0, ge=0)
    stop: Annotated[list[str], BeforeValidator(_stops, json_schema_input_type=StopInput)] = Field(default_factory=list)
    stop_token_ids: list[int] = Field(default_factory=list, max_length=128)
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    truncate_prompt_tokens: int | None = Field(default=None, ge=-1)
    priority: int = Field(default=0, ge=-_INT64, lt=_INT64)
    stream: bool = False
    stream_options: StreamOptions | None = None
    prompt_logprobs: int | None = Field(
        default=None,
        ge=0,
        le=MAX_LOGPROBS,
        description="The log-probability of each prompt token, and of so many of the likeliest in its place.",
    )
    cache_salt: str | None = Field(
        default=None,
        min_length=1,
        max_length=MAX_SALT,
        description="Requests with different salts share no cached keys and values, so that none can tell from its "
        "speed what others have sent.",
    )
    speculative_config: SpeculativeConfig | None = Field(
        default=None, description="Guess at tokens and check several at a time; off without it."
    )
    spaces_between_special_tokens: bool = True
    allowed_token_ids: list[int] | None = Field(
        default=None,
        min_length=1,
        max_length=MAX_ALLOWED,
        description="Nothing else is drawn; an answer ends only with one of them.",
    )
    bad_words: list[Annotated[str, Field(min_length=1, max_length=MAX_BAD_WORD)]] = Field(
        default_factory=list,
        max_length=MAX_BAD_WORDS,
        description="As token sequences: a word is not generated as it is tokenised, by itself or after a space.",
    )
    return_tokens_as_token_ids: bool = Field(
        default=False,
        description="Log-probabilities name tokens `token_id:123`, which is unique and never half a character.",
    )

    @model_validator(mode="after")
    def _rules(self) -> GenerationRequest:
        if self.stream and self.prompt_logprobs is not None:
            raise FieldError(
                "prompt_logprobs",
                "`prompt_logprobs` has no place in a stream: leave out `stream`, or use `echo` with `logprobs`.",
            )
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
    def n_drawn(self) -> int:
        """Choices that are generated for each prompt."""
        return self.n

    @property
    def read_logprobs(self) -> int | None:
        """How many log-probabilities of each prompt token the engine is asked for."""
        return self.prompt_logprobs

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)


class CompletionRequest(GenerationRequest):
    """``POST /v1/completions``."""

    prompt: Annotated[list[Prompt], BeforeValidator(_prompts, json_schema_input_type=PromptInput)]
    add_special_tokens: bool = True
    best_of: int | None = Field(
        default=None,
        ge=1,
        le=MAX_N,
        description="Generate so many, and return the `n` with the highest mean log-probability of a token, the best "
        "first. All of them count as used.",
    )
    echo: bool = Field(default=False, description="Begin with the prompt; `logprobs` then has its tokens too.")
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    max_tokens: int | None = Field(
        default=None, ge=0, description="0 only scores the prompt, with `echo` or `prompt_logprobs`."
    )
    return_token_ids: bool = Field(default=False, description="Choices carry `prompt_token_ids` and `token_ids`.")

    @model_validator(mode="after")
    def _completion_rules(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of < self.n:
            raise FieldError("best_of", f"`best_of` ({self.best_of}) must not be below `n` ({self.n}).")
        if self.best_of is not None and self.best_of > self.n and self.stream:
            raise FieldError(
                "best_of",
                f"`best_of` ({self.best_of}) above `n` ({self.n}) cannot be streamed: which choices are the best is "
                "known at the end.",
            )
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            raise FieldError(
                "max_tokens", "`max_tokens` is 0, which takes `echo` or `prompt_logprobs`: else nothing is answered."
            )
        return self

    @property
    def n_drawn(self) -> int:
        return self.n if self.best_of is None else self.best_of

    @property
    def read_logprobs(self) -> int | None:
        echoed = self.logprobs if self.echo else None
        if echoed is None or self.prompt_logprobs is None:
            return self.prompt_logprobs if echoed is None else echoed
        return max(echoed, self.prompt_logprobs)

    @property
    def drawn_logprobs(self) -> int | None:
        """How many log-probabilities of each generated token the engine is asked for; choosing the best takes some."""
        return 0 if self.logprobs is None and self.n_drawn > self.n else self.logprobs


class TokenizeRequest(Body):
    """``POST /tokenize`` of a prompt; ``model`` may be left out, for the base."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True
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
