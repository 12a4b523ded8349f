"""Rows whose next tokens a constraint narrows down: what may be drawn, and what the rows beside them see of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from manylora.server.engine import engine as engine_module
from manylora.server.engine.constraint import Constraint, ConstraintFailed
from manylora.server.engine.detokenizer import Detokenizer
from manylora.server.engine.grammar.grammars import GrammarCompiler
from manylora.server.engine.grammar.sources import GrammarSpec
from manylora.server.engine.grammar.vocabulary import GrammarVocabulary
from manylora.server.engine.request import STEP_FAILED, Request, SampledToken, SampleFailed
from manylora.server.engine.sampler import Sampler
from tests.engine.harness import Setup, go, output, running
from tests.engine.test_sampler import made, random_logits
from tests.fakes import FakeTokenizer, request

VOCAB = 300
PARAMS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.3, "top_p": 0.7},
    {"temperature": 1.7, "top_k": 5},
    {"temperature": 2.0, "top_k": 290},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 1.0, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
    {"temperature": 0.0, "logit_bias": {7: 100.0, 11: -100.0}},
    {"temperature": 1.0, "presence_penalty": 2.0, "frequency_penalty": -2.0, "repetition_penalty": 0.3},
    {"temperature": 1.0, "logprobs": 5, "logit_bias": {3: 50.0}},
    {"temperature": 0.0, "logprobs": 0},
]


class Allows:
    """A constraint that allows these tokens at every step; it may fail instead."""

    def __init__(self, tokens: Sequence[int], failure: str | None = None) -> None:
        self.tokens = list(tokens)
        self.failure = failure
        self.accepted: list[int] = []
        self.is_complete = False

    def allow(self, mask: npt.NDArray[np.int32]) -> None:
        if self.failure is not None:
            raise ConstraintFailed(self.failure)
        assert len(mask) == -(-VOCAB // 32)
        bits = np.zeros(32 * len(mask), np.uint8)
        bits[self.tokens] = 1
        bits[VOCAB:] = 1  # what is beyond the vocabulary means nothing
        mask[:] = np.packbits(bits, bitorder="little").view(np.int32)

    def accept(self, token: int) -> None:
        self.accepted.append(token)


def constrained(tokens: Sequence[int] = (), failure: str | None = None, **params: Any) -> Request:
    row = made(output=[5, 7, 7], **params)
    row.constraint = Allows(tokens, failure)
    return row


Draw = Callable[[Sampler, torch.Tensor, Sequence[Request]], list[SampledToken | SampleFailed]]


def on_host(sampler: Sampler, logits: torch.Tensor, rows: Sequence[Request]) -> list[SampledToken | SampleFailed]:
    return sampler.sample(logits, rows)


def as_on_a_device(
    sampler: Sampler, logits: torch.Tensor, rows: Sequence[Request]
) -> list[SampledToken | SampleFailed]:
    """The path of other devices, its kernels in Triton's interpreter."""
    pytest.importorskip("triton")
    return sampler._sample_on_device(logits, rows)


both = pytest.mark.parametrize("draw", [on_host, as_on_a_device])


def ids(results: Sequence[SampledToken | SampleFailed]) -> list[int]:
    assert all(isinstance(result, SampledToken) for result in results), results
    return [result.token_id for result in results if isinstance(result, SampledToken)]


@both
def test_only_what_is_allowed_is_drawn_as_if_there_were_nothing_else(draw: Draw) -> None:
    rng = np.random.default_rng(3)
    logits = random_logits(len(PARAMS), seed=4)
    for count in (1, 2, 30, 299):
        tokens = [sorted(rng.choice(VOCAB, count, replace=False).tolist()) for _ in PARAMS]
        rows = [constrained(t, seed=9, **params) for t, params in zip(tokens, PARAMS, strict=True)]
        drawn = ids(draw(Sampler(VOCAB), logits.clone(), rows))
        assert all(token in t for token, t in zip(drawn, tokens, strict=True))
        # The same as of logits without the other tokens.
        masked = torch.full_like(logits, -torch.inf)
        for row, t in enumerate(tokens):
            masked[row, t] = logits[row, t]
        free = [made(output=[5, 7, 7], seed=9, **params) for params in PARAMS]
        assert drawn == ids(draw(Sampler(VOCAB), masked, free))


@both
def test_log_probabilities_stay_those_of_the_model(draw: Draw) -> None:
    logits = random_logits(1, seed=5)
    (result,) = draw(Sampler(VOCAB), logits, [constrained([17], logprobs=3)])
    (free,) = draw(Sampler(VOCAB), logits, [made(temperature=0.0, logprobs=3)])
    assert isinstance(result, SampledToken)
    assert isinstance(free, SampledToken)
    assert result.logprobs is not None
    assert free.logprobs is not None
    assert result.logprobs.top == free.logprobs.top
    assert result.logprobs.sampled.token_id == 17
    expected = torch.log_softmax(logits[0].double(), 0)[17].item()
    assert result.logprobs.sampled.logprob == pytest.approx(expected, abs=1e-5)


@both
def test_the_rows_beside_are_as_without_them_to_the_bit(draw: Draw) -> None:
    logits = random_logits(2 * len(PARAMS), seed=6)
    free = [made(output=[5, 7, 7], seed=3, **params) for params in PARAMS]
    alone = draw(Sampler(VOCAB), logits[: len(PARAMS)].clone(), free)
    sampler = Sampler(VOCAB)
    for order in (1, -1):
        rows = [*free, *(constrained([1, 2, 50, 299], seed=3, **params) for params in PARAMS)]
        places = list(range(len(rows)))[::order]
        before = logits[places].clone()
        mixed = draw(sampler, before, [rows[i] for i in places])
        assert torch.equal(before, logits[places]), "the logits were changed"
        assert [mixed[places.index(i)] for i in range(len(PARAMS))] == alone


@both
def test_a_constraint_that_fails_ends_its_own_row_alone(draw: Draw) -> None:
    logits = random_logits(4, seed=7)
    rows = [
        constrained([3, 4], temperature=0.0),
        constrained(failure="too hard", temperature=0.0),
        made(temperature=0.0),
        constrained(failure="too hard", logprobs=2),
    ]
    first, failed, free, failed_too = draw(Sampler(VOCAB), logits, rows)
    assert failed == failed_too == SampleFailed("too hard", is_refusal=True)
    assert first == SampledToken(3 if logits[0, 3] >= logits[0, 4] else 4)
    assert free == SampledToken(int(logits[2].argmax()))


@both
def test_nothing_left_or_nothing_finite_is_said(draw: Draw) -> None:
    logits = random_logits(3, seed=8)
    logits[1, 9] = torch.nan
    logits[2, [4, 5]] = -torch.inf
    rows = [constrained([], temperature=0.0), constrained([9], temperature=1.0), constrained([4, 5], temperature=1.0)]
    results = draw(Sampler(VOCAB), logits, rows)
    assert all(isinstance(result, SampleFailed) for result in results)


@both
def test_more_rows_than_before_and_fewer_again(draw: Draw) -> None:
    sampler = Sampler(VOCAB)
    for count in (1, 40, 2):
        logits = random_logits(count, seed=count)
        rows = [constrained([i, i + 100, i + 200], temperature=0.0) for i in range(count)]
        best = [max((i, i + 100, i + 200), key=lambda t, i=i: float(logits[i, t])) for i in range(count)]  # type: ignore[misc]
        assert ids(draw(sampler, logits, rows)) == best


def test_more_edits_than_fit_on_the_device_come_to_the_host() -> None:
    pytest.importorskip("triton")
    from manylora.server.engine.device_sampler import DeviceSampler

    sampler = Sampler(VOCAB)
    sampler._on_device = {kind: DeviceSampler(VOCAB, "cpu", max_edits=1) for kind in (False, True)}
    logits = random_logits(2, seed=1)
    bias = {t: 1.0 for t in range(5)}
    rows = [constrained([2, 8], temperature=0.0, logit_bias=bias), constrained([1], temperature=0.0)]
    expected = 2 if logits[0, 2] + 1 >= logits[0, 8] else 8
    assert ids(sampler._sample_on_device(logits, rows)) == [expected, 1]


# --- with the engine around it ----------------------------------------------------------------------------------------


def text_vocabulary() -> GrammarVocabulary:
    """``FakeTokenizer``'s: ASCII characters by their code points; token 0 ends a sequence."""
    tokens = [bytes([i]) if 0 < i < 128 else b"" for i in range(VOCAB)]
    return GrammarVocabulary(tokens, special=[FakeTokenizer.eos_token_id], eos=[FakeTokenizer.eos_token_id])


COMPILER = GrammarCompiler(text_vocabulary().trie())
_SAMPLER = Sampler(VOCAB, eos_token_ids=[FakeTokenizer.eos_token_id])


def model(row: Request, tokens: Sequence[int]) -> SampledToken | SampleFailed:
    """Logits that depend on every token so far, and a real sampler."""
    seed = hash(tuple(tokens)) % 2**31
    (result,) = _SAMPLER.sample(random_logits(1, seed=seed), [row])
    return result


def asking(name: str, pattern: str | None, prompt: Sequence[int] = (1, 2, 3), **params: Any) -> Request:
    row = request(name, prompt, **{"max_tokens": 200, "seed": 4, **params})
    if pattern is not None:
        row.constraint = COMPILER.compile(GrammarSpec("regex", pattern)).start()
    return row


def test_an_output_ends_when_it_is_complete() -> None:
    async def main() -> None:
        async with running(Setup(model)) as setup:
            text, finish = await output(setup, asking("a", "[a-c]{3}-[0-9]{4}"))
            assert len(text) == 8
            assert (finish.reason, finish.stop_reason, finish.completion_tokens) == ("stop", None, 8)
            # Where it may go on, the end is a token like others, and not part of the text.
            text, finish = await output(setup, asking("b", "x[a-c]*", logit_bias={0: 5.0}))
            assert text[0] == "x"
            assert set(text[1:]) <= set("abc")
            assert (finish.reason, finish.stop_reason, finish.completion_tokens) == ("stop", None, len(text) + 1)
            # Complete and at max_tokens: complete.
            text, finish = await output(setup, asking("c", "abc", max_tokens=3))
            assert (text, finish.reason) == ("abc", "stop")
            text, finish = await output(setup, asking("d", "abc", max_tokens=2))
            assert (text, finish.reason) == ("ab", "length")

    go(main())


def test_stop_strings_and_stop_tokens_still_end_it() -> None:
    async def main() -> None:
        async with running(Setup(model)) as setup:
            text, finish = await output(setup, asking("a", "abc[x-z]d", stop=("bc",)))
            assert (text, finish.reason, finish.stop_reason) == ("a", "stop", "bc")
            text, finish = await output(setup, asking("b", "abcd", stop=("cd",)))
            assert (text, finish.reason, finish.stop_reason) == ("ab", "stop", "cd")
            text, finish = await output(setup, asking("c", "abcd", stop_token_ids=(ord("c"),)))
            assert (text, finish.reason, finish.stop_reason) == ("ab", "stop", ord("c"))

    go(main())


def test_a_preempted_output_goes_on_within_its_grammar() -> None:
    """Its tokens are computed again, not drawn again, so its state stays where it is."""
    pattern = "([a-f]{2}-){14}end"

    async def alone(name: str, prompt: Sequence[int]) -> str:
        async with running(Setup(model)) as setup:
            return (await output(setup, asking(name, pattern, prompt)))[0]

    async def main() -> None:
        expected = [await alone(f"r{i}", [i, 2, 3]) for i in range(4)]
        async with running(Setup(model, num_pages=26, max_rows=4, max_context=60)) as setup:
            rows = [asking(f"r{i}", pattern, [i, 2, 3], max_tokens=50) for i in range(4)]
            streams = [setup.submit(row) for row in rows]
            texts = [(await stream.result())[0].text for stream in streams]
            assert sum(row.num_preemptions for row in rows) > 0
        assert texts == expected
        assert all(text.endswith("end") and len(text) == 45 for text in texts)

    go(main())


def test_choices_of_one_grammar_are_apart() -> None:
    async def main() -> None:
        async with running(Setup(model)) as setup:
            streams = [setup.submit(asking(f"r{i}", "[a-z]{2}(0|1[0-9]{3})", seed=i)) for i in range(16)]
            texts = [(await stream.result())[0].text for stream in streams]
            assert len(set(texts)) > 8
            assert {len(text) for text in texts} == {3, 6}

    go(main())


class Breaks(Allows):
    """Allows "a" three times, then cannot follow."""

    def accept(self, token: int) -> None:
        super().accept(token)
        if len(self.accepted) == 3:
            raise ConstraintFailed("lost the thread")


@pytest.mark.parametrize("failing", ["allow", "accept"])
def test_a_grammar_that_fails_ends_its_request_with_the_reason(failing: str) -> None:
    async def main() -> None:
        async with running(Setup(model)) as setup:
            bad = asking("bad", None)
            bad.constraint = Breaks([97]) if failing == "accept" else Allows([97], "lost the thread")
            other = setup.submit(asking("good", "[a-c]{9}"))
            tokens, finish = await setup.submit(bad).result()
            assert finish.reason == "error"
            assert finish.error == "lost the thread"
            assert finish.is_refusal
            assert tokens.text == ("aa" if failing == "accept" else "")
            assert (await other.result())[1].reason == "stop"

    go(main())


class Broken(Allows):
    """Raises what nobody expects: at its mask, or at its second token."""

    def __init__(self, at: str) -> None:
        super().__init__([97])
        self.at = at

    def allow(self, mask: npt.NDArray[np.int32]) -> None:
        if self.at == "allow":
            raise IndexError("a bug")
        super().allow(mask)

    def accept(self, token: int) -> None:
        super().accept(token)
        if self.at == "accept" and len(self.accepted) == 2:
            raise IndexError("a bug")


@pytest.mark.parametrize("failing", ["allow", "accept", "detokenizer"])
def test_a_bug_met_in_one_request_ends_it_alone(
    failing: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Garbled(Detokenizer):
        def feed(self, token: int, *, check_stop: bool = True) -> str:
            if token == ord("!"):
                raise IndexError("a bug")
            return super().feed(token, check_stop=check_stop)

    monkeypatch.setattr(engine_module, "Detokenizer", Garbled)

    async def main() -> None:
        async with running(Setup(model)) as setup:
            bad = asking("bad", "!{3}" if failing == "detokenizer" else None)
            if failing != "detokenizer":
                bad.constraint = Broken(failing)
            others = [setup.submit(asking("good", "[a-c]{9}")), setup.submit(asking("free", None))]
            tokens, finish = await setup.submit(bad).result()
            assert (finish.reason, finish.error, finish.is_refusal) == ("error", STEP_FAILED, False)
            assert tokens.text == ("a" if failing == "accept" else "")
            assert [(await other.result())[1].reason for other in others] == ["stop", "length"]

    go(main())
    assert "IndexError: a bug" in caplog.text


def test_rows_without_a_grammar_have_no_work_from_those_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manylora.server.engine.grammar.token_masks.TokenMasks.fill", None)
    logits = random_logits(len(PARAMS), seed=2)
    rows = [made(seed=1, **params) for params in PARAMS]
    assert len(ids(Sampler(VOCAB).sample(logits, rows))) == len(PARAMS)


def _is_constraint(one: Constraint) -> Constraint:
    return one


_is_constraint(Allows([1]))  # for the type checker: the fake is what it stands for
