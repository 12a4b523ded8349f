"""The data every layer of the engine shares: sampling parameters, a request's state, and the events it produces.

Torch-free and small on purpose: scheduler, block pool, HTTP layer and tests all import it.
"""

from __future__ import annotations

import enum
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, NamedTuple

from manylora.adapters.versions import AdapterRef
from manylora.server.engine.constraint import Constraint
from manylora.server.engine.drafter import Drafter
from manylora.server.engine.tenant import EVERYBODY, Tenant


@dataclass(frozen=True)
class SamplingParams:
    """How to pick the next token. Defaults are OpenAI's; ``temperature=0`` is greedy.

    ``top_k=0`` and ``top_p=1`` mean "all tokens". ``logprobs=k`` asks for the k most likely tokens at each step
    besides the sampled one (``None``: no log-probabilities at all; 0: the sampled token's only). Log-probabilities are
    those of the model's own distribution, before temperature, penalties and truncation (vLLM's ``raw_logprobs``).
    ``prompt_logprobs=k`` asks for the same of every prompt token but the first. ``max_tokens=0`` computes the prompt
    and ends, which is for them.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    shown_special_ids: frozenset[int] = frozenset()
    """Special tokens whose text is in the output although special tokens are skipped: marks of tool calls."""


FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)  # there may be a million of them
class TokenLogprob:
    """Natural-log probability of one token, and its rank among all tokens (0: the most likely)."""

    token_id: int
    logprob: float
    rank: int


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The sampled token's log-probability and those of the ``SamplingParams.logprobs`` most likely ones."""

    sampled: TokenLogprob
    top: tuple[TokenLogprob, ...]


class SampledToken(NamedTuple):
    """The sampler's answer for one row."""

    token_id: int
    logprobs: TokenLogprobs | None = None


STEP_FAILED: Final = "The engine failed while computing this request; the server's log has the cause."
"""The error of a request that something unexpected happened to."""


@dataclass(frozen=True)
class SampleFailed:
    """The sampler's answer for a row from which no token can be drawn; ``message`` is fit for a client.
    ``is_refusal``: because of what the request asked for."""

    message: str
    is_refusal: bool = False


@dataclass(frozen=True)
class TokenEvent:
    """Some new output.

    ``text`` never ends inside a character and may be empty while one is incomplete or while a stop string might be
    beginning; ``token_ids`` are all tokens drawn since the last event. ``prompt_logprobs``, if they were asked for,
    come with the first: one for each prompt token, whose ``sampled`` is that token; None for the first token.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()


@dataclass(frozen=True)
class RequestTimes:
    """``time.monotonic()`` seconds in the life of one request; ``None`` for what it did not reach."""

    arrived: float
    scheduled: float | None
    first_token: float | None
    ended: float


@dataclass(frozen=True)
class FinishEvent:
    """The one final event of a request.

    ``stop_reason`` is the stop string or the stop token id that ended it, ``None`` for end-of-sequence and for length
    (vLLM's convention). ``error`` is set, and fit for a client, if ``reason == "error"``; ``is_unavailable`` then says
    that its adapter could not be brought to the device for now, and that the same request may succeed later;
    ``is_refusal`` that what the request asked for cannot be done.
    """

    reason: FinishReason
    stop_reason: str | int | None
    prompt_tokens: int
    completion_tokens: int
    error: str | None = None
    is_unavailable: bool = False
    times: RequestTimes | None = field(default=None, compare=False)
    """When it happened; two requests that end alike are equal whenever they did."""
    is_refusal: bool = False
    cached_tokens: int = 0
    """Prompt tokens that were found in the prefix cache."""


Event = TokenEvent | FinishEvent


@dataclass(frozen=True)
class AdapterUse:
    """One adapter version of a request, and the factor its delta is multiplied by, besides its own alpha / r."""

    ref: AdapterRef
    scale: float = 1.0


Composition = tuple[tuple[str, float], ...]


def composition_of(uses: Sequence[AdapterUse]) -> Composition:
    """What is computed, whatever names and order it was asked for with: (version, scale), sorted by version; a version
    that is there twice, by two names, has the sum of its scales."""
    if len(uses) == 1:
        return ((uses[0].ref.version, uses[0].scale),)
    scales: dict[str, float] = {}
    for use in uses:
        scales[use.ref.version] = scales.get(use.ref.version, 0.0) + use.scale
    return tuple(sorted(scales.items()))


class RequestState(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class Request:
    """A request as the scheduler and the step loop see it; owned by the step-loop thread once submitted.

    The tokens to compute are ``prompt_token_ids + output_token_ids``; ``num_computed`` of them have their keys and
    values in ``pages``. Preemption sets ``num_computed`` to 0 and frees the pages; everything is then computed again.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    adapters: tuple[AdapterUse, ...] = ()
    """The adapter versions, resolved at admission, whose scaled deltas are added up; empty: the base alone."""
    priority: int = 0
    tenant: Tenant = EVERYBODY
    constraint: Constraint | None = None
    """What the output must match; its own, not shared with other requests."""
    drafter: Drafter | None = None
    """Guesses at its next tokens, which are then computed in one step and checked; without one there is no speculation.
    What is drawn does not depend on it. Its own, too."""
    cache_salt: str | None = None
    """Requests with different ones must not share cached keys and values, although they be equal."""
    arrival_time: float = 0.0
    """``time.monotonic()`` seconds."""

    state: RequestState = RequestState.WAITING
    output_token_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    pages: list[int] = field(default_factory=list)
    slots: tuple[int, ...] = ()
    """Device slots of ``adapters``, in the same order, while the request holds them: all of them or none."""
    merged: Any = None
    """The merged weights that compute the request, bound at submission, or ``None``. Opaque here but for ``identity``,
    a string that no other merge has. With them it takes no slot, although ``adapters`` still names what is merged."""
    prompt_logprobs: list[TokenLogprobs | None] = field(init=False, default_factory=list)
    """If they are asked for, those of the prompt tokens that are known so far: the runner adds to them as it computes
    the prompt. They are kept over a preemption. What is computed by somebody else (a shared prefix) has none, so such a
    request must compute its whole prompt itself."""
    num_preemptions: int = 0
    num_cached: int = 0
    """Prompt tokens whose keys and values were there when it first started."""
    sampling_seed: int = -1
    """64-bit seed of this request's random draws: ``params.seed``, or a random one drawn here. Fixed for the request's
    whole life, so that computing it again after a preemption gives the same tokens."""

    def __post_init__(self) -> None:
        if self.params.prompt_logprobs is not None:
            self.prompt_logprobs.append(None)  # nothing comes before the first token
        if self.sampling_seed < 0:
            seed = self.params.seed
            self.sampling_seed = secrets.randbits(64) if seed is None else seed % 2**64

    @property
    def composition(self) -> Composition:
        """See ``composition_of``. Two requests with equal compositions have the same keys and values for the same
        tokens."""
        return composition_of(self.adapters)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    def tokens_between(self, first: int, last: int) -> list[int]:
        """Those at positions ``first .. last - 1``, as far as they are known."""
        n_prompt = len(self.prompt_token_ids)
        if last <= n_prompt:
            return self.prompt_token_ids[first:last]
        output = self.output_token_ids[max(first - n_prompt, 0) : last - n_prompt]
        return self.prompt_token_ids[first:] + output

    def token_at(self, position: int) -> int:
        n_prompt = len(self.prompt_token_ids)
        return self.prompt_token_ids[position] if position < n_prompt else self.output_token_ids[position - n_prompt]


class ScheduledRow:
    """One request's share of a step: compute tokens ``start .. start + count - 1``. Not to be changed.

    ``drafts``: guesses at the tokens behind the request's known ones; the last of those computed. ``sample`` is true if
    the others are its last known tokens, so that the step's logits give its next one, and, of each draft that turns out
    to be right, the one after it: as it is when the row is made, before anything is appended.
    """

    __slots__ = ("count", "drafts", "request", "sample", "start")  # there is one for each row of each step

    def __init__(self, request: Request, start: int, count: int, drafts: tuple[int, ...] = ()) -> None:
        self.request, self.start, self.count, self.drafts = request, start, count, drafts
        known = len(request.prompt_token_ids) + len(request.output_token_ids)
        self.sample = start + count - len(drafts) == known

    def __repr__(self) -> str:
        drafts = f", drafts={self.drafts}" if self.drafts else ""
        return f"ScheduledRow({self.request.request_id!r}, {self.start}, {self.count}{drafts})"

    @property
    def num_sampled(self) -> int:
        """Tokens whose logits are asked for: the last known one and each draft, as far as they are of this row."""
        return min(self.count, 1 + len(self.drafts)) if self.sample else 0

    def token_at(self, position: int) -> int:
        """One of the tokens to compute, drafts among them."""
        known = self.request.num_tokens
        return self.drafts[position - known] if position >= known else self.request.token_at(position)


@dataclass(frozen=True)
class StepPlan:
    """What one step computes. Rows are sorted by their adapter slots, base rows first, so that the tokens of each
    composition lie together; those with merged weights come last."""

    rows: tuple[ScheduledRow, ...]

    @property
    def num_tokens(self) -> int:
        return sum(row.count for row in self.rows)
