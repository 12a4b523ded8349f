"""What is asked, and the answers by each version of the weights: recorded at the start, one at a time, with nothing
else going on and nothing cached.

A question is all that an answer depends on, given the weights. Everything else (streamed or whole, speculation,
priority, how many tokens, log-probabilities, several choices, what is cached) must not change a token nor a bit of a
log-probability on the CPU, so it is drawn anew for every request. Sampled questions have a seed, and so one answer too.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import httpx

from loadgen.errors import TargetError
from loadgen.prompts import words
from loadgen.soak.answers import Answer, Leave, ask
from loadgen.soak.world import Uses

TOKENS: Final = 12
"""Of a recorded answer. Longer requests are made only to be left; of them so many are compared."""
LONG: Final = 64
_SYSTEM = words(64, "the system prompt of the soak")
_SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Ada", "Bob", "Cyd"]}, "age": {"type": "integer", "minimum": 1, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Question:
    """``fields`` of the body, besides those that name the weights and those that do not matter."""

    name: str
    kind: str
    fields: Mapping[str, Any]

    @property
    def is_structured(self) -> bool:
        return not self.fields.get("ignore_eos", False)


def _completion(name: str, prompt: str, **fields: Any) -> Question:
    return Question(name, "completion", {"prompt": prompt, "temperature": 0, "ignore_eos": True, **fields})


QUESTIONS: Final = (
    _completion("short", "The sea is"),
    # Two that begin alike: a page of one may serve the other, if the weights are the same.
    _completion("prefix-1", f"{_SYSTEM} Tell me about the harbour."),
    _completion("prefix-2", f"{_SYSTEM} Why do bakers get up early?"),
    # Longer than a step takes: computed in chunks.
    _completion("chunked", f"{_SYSTEM} {words(110, 'chunks')}"),
    # Drafts by n-grams are often right here.
    _completion("repeating", "red green blue, red green blue, red green blue, red green"),
    _completion("sampled", "Once upon a time", temperature=0.9, top_p=0.95, seed=17),
    Question(
        "chat", "chat",
        {"messages": [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": "Show all customers."}],
         "temperature": 0, "ignore_eos": True},
    ),
    Question(
        "structured", "completion",
        {"prompt": "A person as JSON: ", "temperature": 0, "guided_json": _SCHEMA},
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Reference:
    """``is_whole``: it ended by itself; a request for more tokens gets no more."""

    tokens: tuple[int | str, ...]
    logprobs: tuple[float, ...]
    text: str
    is_whole: bool


References = dict[tuple[str, str], Reference]
"""By the last part of the fingerprint (version or composition, and mode if merged) and the question's name."""


@dataclass(frozen=True)
class Ask:
    """A request: a question to some weights, and all that must not matter."""

    question: Question
    uses: Uses
    body: Mapping[str, Any]
    leave: Leave | None = None

    @property
    def choices(self) -> int:
        return int(self.body.get("n", 1))

    @property
    def max_tokens(self) -> int:
        return int(self.body["max_tokens"])


def weights_fields(base: str, uses: Uses) -> dict[str, Any]:
    """How a body names them."""
    if not uses:
        return {"model": base}
    if len(uses) == 1 and uses[0][1] == 1.0:
        return {"model": uses[0][0]}
    return {"model": base, "adapters": [{"name": name, "scale": scale} for name, scale in uses]}


def random_ask(rng: random.Random, base: str, uses: Uses) -> Ask:
    """Any question in any way."""
    question = rng.choice(QUESTIONS)
    body = {**question.fields, **weights_fields(base, uses)}
    body["stream"] = rng.random() < 0.6
    body["max_tokens"] = rng.choice([1, 2, 5, 8, TOKENS, TOKENS])
    if question.kind == "completion":
        body["return_token_ids"] = True
        if rng.random() < 0.5:
            body["logprobs"] = rng.choice([1, 3])
    elif rng.random() < 0.5:
        body["logprobs"] = True
    else:
        body["max_tokens"] = TOKENS  # without tokens only the whole text can be compared
    if rng.random() < 0.35:
        body["speculative_config"] = {"num_speculative_tokens": rng.choice([1, 4, 8])}
    if rng.random() < 0.3:
        body["priority"] = rng.choice([-5, -1, 1, 10])
    if rng.random() < 0.15:
        body["cache_salt"] = rng.choice(["a", "b"])
    if rng.random() < 0.1 and "seed" not in body:  # each choice has a seed of its own
        body["n"] = 2
    if not question.is_structured:
        chance = rng.random()
        if chance < 0.28:
            body |= {"max_tokens": LONG, **({"logprobs": True} if question.kind == "chat" else {})}
        if chance < 0.18:
            return Ask(question, uses, body | {"stream": True}, Leave(events=rng.randint(1, 10)))
        if chance < 0.28:
            return Ask(question, uses, body, Leave(after_s=rng.choice([0.001, 0.01, 0.05, 0.2])))
    return Ask(question, uses, body)


class Recorder:
    """Asks every question of some weights, each alone and with a cache of its own."""

    def __init__(self, client: httpx.Client, base: str) -> None:
        self.references: References = {}
        self._client, self._base = client, base
        self._salts = itertools.count()

    def alone(self, question: Question, uses: Uses) -> Ask:
        """With all that an answer can tell: tokens and log-probabilities."""
        body = {**question.fields, **weights_fields(self._base, uses)}
        body |= {"logprobs": True} if question.kind == "chat" else {"logprobs": 1, "return_token_ids": True}
        return Ask(question, uses, body | {"max_tokens": LONG if question.is_structured else TOKENS})

    def ask(self, question: Question, uses: Uses) -> Answer:
        """TargetError if there is no whole answer."""
        body = {**self.alone(question, uses).body, "cache_salt": f"alone {next(self._salts)}"}
        answer = ask(self._client, question.kind, body)
        if answer.status != 200 or answer.broken or len(answer.fingerprints) != 1:
            raise TargetError(f"no reference for `{question.name}` by {uses or 'the base'}: {answer.fields()}")
        return answer

    def record(self, uses: Uses) -> str:
        """The last part of the fingerprint, the same for all questions. TargetError if one has no answer."""
        suffixes = set()
        for question in QUESTIONS:
            answer = self.ask(question, uses)
            suffix = suffix_of(next(iter(answer.fingerprints)))
            suffixes.add(suffix)
            choice = answer.choice(0)
            self.references[suffix, question.name] = Reference(
                tuple(choice.tokens), tuple(choice.logprobs), choice.text, choice.finish == "stop"
            )
        if len(suffixes) != 1:
            raise TargetError(f"{uses or 'the base'} answered with several fingerprints: {sorted(suffixes)}")
        return suffixes.pop()


def suffix_of(fingerprint: str) -> str:
    """What names the adapters, and the mode if they are merged."""
    return fingerprint.rpartition("_")[2]
