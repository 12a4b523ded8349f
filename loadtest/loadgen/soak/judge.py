"""Tells right answers from wrong ones, and counts.

**Which weights.** ``system_fingerprint`` names them: base, adapter version or composition, and `-exact` or `-compact`
if merged weights computed the answer. It must be one that the request's names could mean at some time between its
sending and its end (``world``); so it is decided whether an answer may, or must, be a merged one.

**Whether they did.** Its tokens, and log-probabilities where asked for, must be those that the same weights gave when
they were asked alone. Merged answers are held against references recorded while merged, in that mode. Equal means
equal: on the CPU the project promises the same bits in any company, so nothing is rounded. A stream that its client
left is compared as far as it came. An answer without a reference is a failure, not a pass.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loadgen.soak.answers import Answer, Choice
from loadgen.soak.questions import Ask, Reference, References, suffix_of
from loadgen.soak.world import ABSENT, World

KEPT = 200
"""Failures that are written out; more are only counted."""


@dataclass
class Judge:
    """Any thread."""

    references: References
    world: World
    statuses: Counter[int] = field(default_factory=Counter)
    done: Counter[str] = field(default_factory=Counter)
    """What was done, by kind."""
    failed: Counter[str] = field(default_factory=Counter)
    """What was wrong, by kind."""
    failures: list[dict[str, Any]] = field(default_factory=list)
    checked_by: Counter[str] = field(default_factory=Counter)
    """Checked answers, by the weights that gave them."""
    _bases: set[str] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def checked(self) -> int:
        """Answers of which at least one token was compared."""
        return self.checked_by.total()

    def count(self, kind: str, n: int = 1) -> None:
        with self._lock:
            self.done[kind] += n

    def fail(self, kind: str, why: str, **shown: Any) -> None:
        with self._lock:
            self.failed[kind] += 1
            if len(self.failures) < KEPT:
                self.failures.append({"kind": kind, "why": why, **shown})

    def status(self, status: int, what: str, **shown: Any) -> None:
        """Count it. No 5xx is provoked, so each is a failure."""
        with self._lock:
            self.statuses[status] += 1
        if status >= 500:
            self.fail("5xx", f"{what}: HTTP {status}", **shown)

    def answered(self, ask: Ask, moments: Sequence[int], answer: Answer) -> None:
        """A request has ended, or was left."""
        shown = {"asked": ask.body, "leave": ask.leave and vars(ask.leave), "answer": answer.fields()}
        self.count("left before the first token" if answer.left and not answer.events else "left in the stream"
                   if answer.left else f"answers, {'streamed' if ask.body.get('stream') else 'whole'}")  # fmt: skip
        if answer.status:
            self.status(answer.status, "an answer", **shown)
        if answer.broken:
            self.fail("broken answer", answer.broken, **shown)
            return
        allowed = self.world.allowed(ask.uses, moments)
        if answer.status == 404 and ABSENT in allowed:
            self.count("404 while a name was absent")
        elif answer.status not in (0, 200, 429) and answer.status < 500:
            self.fail("refused", f"a good request: HTTP {answer.status}", possible=sorted(allowed), **shown)
        if answer.fingerprints:
            self._check(ask, answer, allowed, shown)

    def _check(self, ask: Ask, answer: Answer, allowed: frozenset[str], shown: Mapping[str, Any]) -> None:
        with self._lock:
            self._bases |= {fingerprint.rpartition("_")[0] for fingerprint in answer.fingerprints}
            n_bases = len(self._bases)
        if len(answer.fingerprints) > 1 or n_bases > 1:
            self.fail("wrong version", f"several: {sorted(answer.fingerprints)}, of {n_bases} bases", **shown)
            return
        suffix = suffix_of(next(iter(answer.fingerprints)))
        if suffix not in allowed:
            self.fail("wrong version", f"{suffix} answered; possible were {sorted(allowed)}", **shown)
            return
        reference = self.references.get((suffix, ask.question.name))
        if reference is None:
            self.fail("no reference", f"{suffix} was never asked `{ask.question.name}`", **shown)
            return
        if not answer.left and set(answer.choices) != set(range(ask.choices)):
            self.fail("wrong answer", f"{ask.choices} choices were asked for, {sorted(answer.choices)} came", **shown)
            return
        compared = 0
        for choice in answer.choices.values():
            problem = difference(choice, reference, ask, answer.left)
            if problem:
                self.fail("wrong answer", f"{suffix}: {problem}", reference=vars(reference), **shown)
                return
            compared += len(choice.tokens) or len(choice.text)
        if compared:
            with self._lock:
                self.checked_by[suffix] += 1


def difference(choice: Choice, reference: Reference, ask: Ask, left: bool) -> str:
    """What is wrong with it; "" if nothing. Beyond the reference's end only a stream that is left can go."""
    n = len(choice.tokens)
    if ask.question.kind == "chat" and not ask.body.get("logprobs"):
        return "" if choice.text == reference.text else f"text {choice.text!r} is not {reference.text!r}"
    known = min(n, len(reference.tokens))
    if tuple(choice.tokens[:known]) != reference.tokens[:known]:
        return f"tokens {choice.tokens} are not {list(reference.tokens)}"
    if choice.logprobs and tuple(choice.logprobs[:known]) != reference.logprobs[:known]:
        return f"log-probabilities {choice.logprobs} are not {list(reference.logprobs)}"
    if ask.body.get("logprobs") and len(choice.logprobs) != n:
        return f"{n} tokens, {len(choice.logprobs)} log-probabilities"
    if reference.is_whole and n > len(reference.tokens):
        return f"{n} tokens, where the text ends after {len(reference.tokens)}"
    if left:
        return ""
    expected = min(ask.max_tokens, len(reference.tokens)) if reference.is_whole else ask.max_tokens
    if n != expected:
        return f"{n} tokens, not {expected}"
    ends = reference.is_whole and n == len(reference.tokens)
    if ask.max_tokens != len(reference.tokens) and choice.finish != ("stop" if ends else "length"):
        return f"it ended by {choice.finish!r} after {n} of {len(reference.tokens)} tokens"
    return ""
