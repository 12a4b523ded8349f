"""Log-probabilities of tokens: log_softmax of one row of the model's own logits, in a fixed order of summation.

The sampler asks for them token by token, ``prompt_logprobs`` for whole prompts; on the host both come through
``token_logprobs``, so that a token has the same bits whether it was drawn or read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from manylora.server.engine.request import SampleFailed, TokenLogprob, TokenLogprobs

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

DEPTHS: Final = (8.0, 20.0, math.inf)
"""How far below the maximum, in units of the temperature, tokens are looked at: at first, then, then all."""


def token_logprobs(logits: Floats, highest: float, token: int, count: int, scratch: Floats) -> TokenLogprobs:
    """``token`` and the ``count`` most likely tokens of a row ``[vocab]`` whose maximum, ``highest``, is finite.

    ``scratch``: as long as the row, overwritten.
    """
    normaliser = highest + math.log(total_weight(logits, highest, 1.0, scratch))
    top = most_likely(logits, highest, min(count, len(logits)), 1.0, ties=False) if count else ()
    value = logits[token]
    rank = int(np.count_nonzero(logits > value) + np.count_nonzero(logits[:token] == value))
    return TokenLogprobs(
        TokenLogprob(token, float(value) - normaliser, rank),
        tuple(TokenLogprob(int(t), float(logits[t]) - normaliser, rank) for rank, t in enumerate(top)),
    )


def total_weight(logits: Floats, highest: float, temperature: float, scratch: Floats) -> float:
    """Sum over all tokens of ``exp((logit - highest) / temperature)``. ``scratch``: as long, overwritten."""
    np.subtract(logits, np.float32(highest), out=scratch)
    if temperature != 1.0:
        np.multiply(scratch, np.float32(1.0 / temperature), out=scratch)
    np.exp(scratch, out=scratch)
    return float(scratch.sum())


def most_likely(logits: Floats, highest: float, count: int, scale: float, *, ties: bool) -> Ints:
    """The ``count`` most likely tokens, the most likely first and equal ones by id; with ``ties`` also those that equal
    the last. ``scale``: how far apart logits usually lie (the temperature); it changes the speed alone."""
    for depth in DEPTHS:
        tokens = np.flatnonzero(logits >= highest - depth * scale)
        if len(tokens) >= count:
            break
    values = logits[tokens]
    if len(tokens) > count:
        last = np.partition(values, len(values) - count)[len(values) - count]
        tokens = tokens[values >= last]
        values = logits[tokens]
    tokens = tokens[np.argsort(-values, kind="stable")]
    return tokens if ties else tokens[:count]


def not_finite(highest: float) -> SampleFailed:
    """For a row whose largest logit, ``highest``, is not finite (NaN if there is one)."""
    return SampleFailed(f"The model's output for this request is not finite (largest logit: {highest}).")


# --- many rows at once, where the logits are -------------------------------------------------------------------------


def score_on_host(
    logits: torch.Tensor, tokens: Sequence[int], counts: Sequence[int], scratch: Floats
) -> list[TokenLogprobs | SampleFailed]:
    """``token_logprobs`` of each row of ``logits``, fp32 ``[rows, vocab]`` on the CPU."""
    host: Floats = logits.detach().numpy()
    best = host.argmax(axis=1)  # a NaN if there is one
    found: list[TokenLogprobs | SampleFailed] = []
    for i, (token, count) in enumerate(zip(tokens, counts, strict=True)):
        highest = float(host[i, best[i]])
        if math.isfinite(highest):
            found.append(token_logprobs(host[i], highest, token, count, scratch))
        else:
            found.append(not_finite(highest))
    return found


def score_on_device(
    logits: torch.Tensor, tokens: Sequence[int], counts: Sequence[int], max_rows: int
) -> list[TokenLogprobs | SampleFailed]:
    """The same for logits on a device, from which only the answers come; sums in fp64.

    At most ``max_rows`` rows, which should be the same each time: a library's sum over a row may be cut up by the
    number of rows there are, so it is always taken over as many.
    """
    rows, vocab = logits.shape
    targets = torch.tensor(list(tokens), dtype=torch.int64, device=logits.device)[:, None]
    highest = logits.amax(-1, keepdim=True)
    weights = torch.zeros(max_rows, vocab, device=logits.device)
    torch.sub(logits, highest, out=weights[:rows])
    normaliser = highest.double() + weights.exp_().sum(-1, keepdim=True, dtype=torch.float64)[:rows].log()
    value = logits.gather(-1, targets)
    before = torch.arange(vocab, device=logits.device) < targets
    rank = (logits > value).sum(-1, keepdim=True) + ((logits == value) & before).sum(-1, keepdim=True)
    top = _most_likely_on_device(logits, min(max(counts), vocab))
    top_logprobs = logits.gather(-1, top).double() - normaliser
    columns = (highest, value.double() - normaliser, rank, top, top_logprobs)
    # One copy to the host; ids and ranks are exact in fp64.
    answers = torch.cat([column.double() for column in columns], dim=-1).tolist()
    found: list[TokenLogprobs | SampleFailed] = []
    for (peak, logprob, place, *tops), token, count in zip(answers, tokens, counts, strict=True):
        if not math.isfinite(peak):
            found.append(not_finite(peak))
            continue
        ids, logprobs = tops[: len(tops) // 2], tops[len(tops) // 2 :]
        pairs = zip(ids[:count], logprobs[:count], strict=True)
        top_tokens = tuple(TokenLogprob(int(t), lp, i) for i, (t, lp) in enumerate(pairs))
        found.append(TokenLogprobs(TokenLogprob(token, logprob, int(place)), top_tokens))
    return found


def _most_likely_on_device(logits: torch.Tensor, count: int) -> torch.Tensor:
    """As ``most_likely``, int64 ``[rows, count]``. ``torch.topk`` alone would not do: of equals it takes any."""
    bits = (logits + 0.0).view(torch.int32)  # 0.0 and -0.0 are equal, their bits are not
    # As signed integers, the bits of fp32 are in the order of the numbers if those of negative ones are flipped.
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    last = logits.shape[-1] - 1
    keys = (ordered << 32) + (last - torch.arange(last + 1, device=logits.device))
    return last - (keys.topk(count, dim=-1).values & 0xFFFFFFFF)
