"""Drawing the next token of each row.

Property: a row's token depends on its own logits, parameters, tokens so far and ``(sampling_seed, position)`` alone.
Not on the rows beside it, nor on what was preempted. Therefore

- randomness is counter-based: ``uniform(seed, position)`` is a hash, there is no generator whose state could be shared;
- each row that is not plainly greedy is computed by itself, from buffers at a fixed place, so that every
  floating-point sum has the same order whichever rows are in the batch;
- equal logits are told apart by token id, never by the order in which an algorithm happened to meet them.

The order of operations is vLLM's: min_tokens and logit_bias, penalties, temperature, min_p, top_k, top_p. What a
request's constraint does not allow is gone before the temperature, whatever was added to it. The draw is the inverse of
the cumulative distribution over the tokens from the most to the least likely, of which only as long a beginning is
sorted as the draw needs.

On a CUDA device rows are drawn there, to the same effect (``kernels.cuda.sampling``); only rows that ask for
log-probabilities, or have more edits than fit, come to the host. Masks are computed on the host while the device
computes the step that their rows wait for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Final
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch

from manylora.kernels.cuda.sampling_buffers import GREEDY_BELOW, Row
from manylora.kernels.ops import Maxima
from manylora.server.engine.grammar.token_masks import TokenMasks
from manylora.server.engine.logit_edits import LogitEdits, has_edits
from manylora.server.engine.logprobs import DEPTHS, most_likely, not_finite, token_logprobs, total_weight
from manylora.server.engine.request import (
    Request,
    SampledToken,
    SampleFailed,
    SamplingParams,
)

if TYPE_CHECKING:
    from manylora.server.engine.device_sampler import DeviceSampler

_Floats = npt.NDArray[np.float32]
_Doubles = npt.NDArray[np.float64]
_Ints = npt.NDArray[np.int64]

_Choice = _Ints | SampleFailed
"""The tokens that a constraint leaves, ascending, or why it leaves none."""
_Wait = Callable[[], list[SampledToken | SampleFailed | None]]

_MASK: Final = 2**64 - 1


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1), determined by a 64-bit seed and a position, with 53 random bits.

    It is SplitMix64 (Steele, Lea and Flood 2014, figure 17), whose n-th output is a hash of ``state + n * gamma``; the
    state is the seed hashed once, so that the streams of neighbouring seeds have nothing in common.
    """
    gamma = 0x9E3779B97F4A7C15
    return (_mix(_mix(seed + gamma) + (position + 1) * gamma) >> 11) / 2**53


def _mix(z: int) -> int:
    z &= _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


class Sampler:
    """Draws tokens for batches of rows. For one thread (the step loop's).

    Args:
        vocab_size: columns of the logits.
        device: where the logits are, and, unless it is the CPU, where tokens are drawn.
        eos_token_ids: with the request's ``stop_token_ids``, what ``min_tokens`` bans until then.
    """

    def __init__(
        self, vocab_size: int, device: torch.device | str = "cpu", *, eos_token_ids: Collection[int] = ()
    ) -> None:
        self.vocab_size = vocab_size
        self._device = torch.device(device)
        self._eos = frozenset(eos_token_ids)
        self._edits: WeakKeyDictionary[Request, LogitEdits] = WeakKeyDictionary()
        self._edited: _Floats = np.empty(vocab_size, np.float32)
        self._scratch: _Floats = np.empty(vocab_size, np.float32)
        self._plain_rows: list[Request] = []
        self._masks = TokenMasks(vocab_size, self._device)
        self._on_device: dict[bool, DeviceSampler] = {}
        """By whether its rows are constrained: those are drawn from a masked copy of their logits."""
        if self._device.type != "cpu":
            self._device_sampler(constrained=False)

    def sample(
        self, logits: torch.Tensor, rows: Sequence[Request], maxima: Maxima | None = None
    ) -> list[SampledToken | SampleFailed]:
        """The next token of each row, or why there is none. ``logits``: fp32 ``[len(rows), vocab_size]``, unchanged;
        ``maxima``: theirs, if they are known.

        ValueError if the shape or the dtype is another.
        """
        if maxima is not None and self._are_plain(rows) and all(map(math.isfinite, maxima.highest.tolist())):
            return [SampledToken(token) for token in maxima.places.tolist()]
        if logits.shape != (len(rows), self.vocab_size) or logits.dtype != torch.float32:
            raise ValueError(
                f"logits must be float32 [{len(rows)}, {self.vocab_size}], got {logits.dtype} {list(logits.shape)}"
            )
        if not rows:
            return []
        if self._device.type == "cpu":
            host: _Floats = logits.detach().numpy()
            if maxima is None:
                best = host.argmax(axis=1)  # the first of equals; a NaN if there is one
                highest = host[np.arange(len(rows)), best]
            else:
                best, highest = maxima.places, maxima.highest
            constrained = [i for i, row in enumerate(rows) if row.constraint is not None]
            choices = self._choices(rows, constrained) if constrained else {}
            found = zip(best.tolist(), highest.tolist(), rows, strict=True)
            return [self._row(host[i], *one, choices.get(i)) for i, one in enumerate(found)]
        return self._sample_on_device(logits, rows)

    def _are_plain(self, rows: Sequence[Request]) -> bool:
        """Whether all are plainly greedy; of rows that were, in the step before, it is known."""
        if rows == self._plain_rows:
            return True
        if not all(row.constraint is None and _is_plain(row.params) for row in rows):
            return False
        if all(row.merged is None for row in rows):  # else merged weights would be kept with them
            self._plain_rows = list(rows)
        return True

    def _choices(self, rows: Sequence[Request], constrained: Sequence[int]) -> dict[int, _Choice]:
        """By row, what its constraint leaves of the tokens."""
        problems = self._masks.fill([c for i in constrained if (c := rows[i].constraint) is not None])
        return {
            i: self._masks.allowed(place) if problem is None else problem
            for place, (i, problem) in enumerate(zip(constrained, problems, strict=True))
        }

    def _sample_on_device(self, logits: torch.Tensor, rows: Sequence[Request]) -> list[SampledToken | SampleFailed]:
        """Tokens are drawn on the device; the logits of the rows that need more come to the host."""
        drawn = self._device_rows(rows)
        results: dict[int, SampledToken | SampleFailed] = {}
        waits: list[tuple[Sequence[int], _Wait]] = []
        free = [row if request.constraint is None else None for row, request in zip(drawn, rows, strict=True)]
        if any(row is not None for row in free):
            waits.append((range(len(rows)), self._launch(logits, free, constrained=False)))
        choices: dict[int, _Choice] = {}
        constrained = [i for i, request in enumerate(rows) if request.constraint is not None]
        if constrained:
            choices = self._choices(rows, constrained)
            results = {i: choice for i, choice in choices.items() if isinstance(choice, SampleFailed)}
            masked = [i for i in constrained if drawn[i] is not None and i not in results]
            if masked:
                copies = logits[masked]
                self._masks.apply(copies, [constrained.index(i) for i in masked])
                waits.append(
                    (masked, self._launch(copies, [_within(drawn[i], choices[i]) for i in masked], constrained=True))
                )
        needed = [i for i, row in enumerate(drawn) if row is None and i not in results]
        if needed:
            host: _Floats = logits[needed].cpu().numpy()
            for i, copy in zip(needed, host, strict=True):
                best = int(copy.argmax())
                results[i] = self._row(copy, best, float(copy[best]), rows[i], choices.get(i))
        for places, wait in waits:
            results |= {i: result for i, result in zip(places, wait(), strict=True) if result is not None}
        return [results[i] for i in range(len(rows))]

    def _launch(self, logits: torch.Tensor, rows: Sequence[Row | None], *, constrained: bool) -> _Wait:
        """Start the draws; the answer waits for them."""
        sampler = self._device_sampler(constrained=constrained)
        sampler.start(logits, rows)

        def wait() -> list[SampledToken | SampleFailed | None]:
            return [
                None if row is None else SampledToken(token) if status == 0 else _failure(highest)
                for row, (token, status, highest) in zip(rows, sampler.finish(len(rows)), strict=True)
            ]

        return wait

    def _device_rows(self, rows: Sequence[Request]) -> list[Row | None]:
        """Those that can be drawn there."""
        room = self._device_sampler(constrained=False).max_edits
        drawn: list[Row | None] = []
        for request in rows:
            row = self._device_row(request) if request.params.logprobs is None else None
            n_edits = len(row.edits.token) if row is not None and row.edits is not None else 0
            drawn.append(row if n_edits <= room else None)
            room -= n_edits if n_edits <= room else 0
        return drawn

    def _device_sampler(self, *, constrained: bool) -> DeviceSampler:
        if constrained not in self._on_device:
            from manylora.server.engine.device_sampler import DeviceSampler  # triton, which a CPU need not have

            self._on_device[constrained] = DeviceSampler(self.vocab_size, self._device)
        return self._on_device[constrained]

    def _device_row(self, request: Request) -> Row:
        params = request.params
        edits = self._edits_of(request).entries(request) if has_edits(params) else None
        if params.temperature < GREEDY_BELOW:
            return Row(temperature=0.0, edits=edits)
        point = uniform(request.sampling_seed, len(request.output_token_ids))
        return Row(params.temperature, params.top_k, params.top_p, params.min_p, point, edits)

    def _row(
        self, logits: _Floats, best: int, highest: float, request: Request, choice: _Choice | None
    ) -> SampledToken | SampleFailed:
        """One row, given its first maximum; ``logits`` is looked at only if the row is not plainly greedy."""
        params = request.params
        if not math.isfinite(highest):
            return _failure(highest)
        if isinstance(choice, SampleFailed):
            return choice
        if choice is None and _is_plain(params):
            return SampledToken(best)
        edited = logits
        if has_edits(params):
            edited = self._edit(logits, request)
        if choice is not None:
            edited = edited[choice]  # whatever was added to the others
        if choice is not None or edited is not logits:
            best = int(edited.argmax()) if len(edited) else -1
            if best < 0 or not math.isfinite(edited[best]):
                return _failure(highest)
        token = best if params.temperature < GREEDY_BELOW else self._draw(edited, float(edited[best]), request)
        if choice is not None:
            token = int(choice[token])
        if params.logprobs is None:
            return SampledToken(token)
        # Of the model's own distribution: of the logits as they came.
        return SampledToken(token, token_logprobs(logits, highest, token, params.logprobs, self._scratch))

    def _edit(self, logits: _Floats, request: Request) -> _Floats:
        """A copy with bans, biases and penalties applied."""
        np.copyto(self._edited, logits)
        self._edits_of(request).apply(self._edited, request)
        return self._edited

    def _edits_of(self, request: Request) -> LogitEdits:
        edits = self._edits.get(request)
        if edits is None:
            edits = self._edits[request] = LogitEdits(request, self._eos, self.vocab_size)
        return edits

    def _draw(self, logits: _Floats, highest: float, request: Request) -> int:
        """Inverse of the cumulative distribution at ``uniform(seed, position)``."""
        params = request.params
        point = uniform(request.sampling_seed, len(request.output_token_ids))
        temperature = params.temperature
        if 0 < params.top_k < len(logits):
            tokens = most_likely(logits, highest, params.top_k, temperature, ties=True)
        elif params.min_p > 0:
            # A little deeper than min_p, because this comparison is made in fp32; _cumulated applies it exactly.
            tokens = _descending(logits, highest, temperature * (0.001 - math.log(params.min_p)))
        else:
            total = total_weight(logits, highest, temperature, self._scratch[: len(logits)])
            for depth in DEPTHS[:-1]:
                tokens = _descending(logits, highest, depth * temperature)
                cumulated = _cumulated(logits[tokens], highest, params)
                # Enough of them if they hold the nucleus or, without one, the point itself.
                if cumulated[-1] > (params.top_p if params.top_p < 1 else point) * total:
                    return _pick(tokens, cumulated, total, params.top_p, point)
            tokens = _descending(logits, highest, math.inf)
        cumulated = _cumulated(logits[tokens], highest, params)
        return _pick(tokens, cumulated, float(cumulated[-1]), params.top_p, point)


def _failure(highest: float) -> SampleFailed:
    """Why there is no token: the largest raw logit is not finite or, if it is, the edits left none."""
    if not math.isfinite(highest):
        return not_finite(highest)
    return SampleFailed(
        "logit_bias, the penalties, min_tokens and what the output must match together leave no token to choose.",
        is_refusal=True,
    )


def _is_plain(params: SamplingParams) -> bool:
    """Whether the token is the argmax of the logits as they are, and nothing else is asked."""
    return params.temperature < GREEDY_BELOW and params.logprobs is None and not has_edits(params)


def _within(row: Row | None, choice: _Choice) -> Row | None:
    """The row, without a ``top_k`` that all of its tokens are among: the device would look for the others at -inf."""
    if row is None or isinstance(choice, SampleFailed) or row.top_k < len(choice):
        return row
    return row._replace(top_k=0)


def _descending(logits: _Floats, highest: float, depth: float) -> _Ints:
    """Tokens at most ``depth`` below the highest, the most likely first, equal ones by id."""
    tokens = np.flatnonzero(logits >= highest - depth)
    return tokens[np.argsort(-logits[tokens], kind="stable")]


def _cumulated(values: _Floats, highest: float, params: SamplingParams) -> _Doubles:
    """Cumulated weights, relative to the highest, of the descending logits ``values`` that min_p leaves."""
    weights = np.exp((values.astype(np.float64) - highest) / params.temperature)
    if params.min_p > 0:
        weights = weights[: max(1, int(np.count_nonzero(weights >= params.min_p)))]
    cumulated: _Doubles = np.cumsum(weights)  # one after the other: ``sum`` would choose an order of its own
    return cumulated


def _pick(tokens: _Ints, cumulated: _Doubles, total: float, top_p: float, point: float) -> int:
    """The token at ``point`` of what ``top_p`` leaves of a distribution whose weights add up to ``total``; ``tokens``
    are its most likely ones, at least the nucleus."""
    if top_p < 1:
        # The smallest beginning with at least this share; it never has fewer than one token.
        n_kept = int(np.searchsorted(cumulated, top_p * total, side="left")) + 1
        cumulated = cumulated[:n_kept]
        total = float(cumulated[-1])
    # The first whose cumulated weight exceeds the point. Rounding may put the point on the very end: then the last one
    # that weighs anything.
    index = np.searchsorted(cumulated, point * total, side="right")
    return int(tokens[min(index, np.searchsorted(cumulated, cumulated[-1], side="left"))])
