"""The scheduler's limits."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SchedulerConfig:
    """Limits of a step and of the queue. Rules are those in the text of scheduler.py.

    ``max_rows``: requests in one step. ``max_batch_tokens``: tokens computed in one step, prefill and decode together.
    ``num_pages`` x ``page_size``: tokens that the KV cache holds. ``max_context``: prompt and output of one request.
    ``max_waiting``: requests, besides ``max_rows``, that the engine holds of one tenant before it refuses new ones.
    ``max_overtake``: see rule 5.

    ``guarded_tokens``: rule 8's tokens of prompts in a step; None for an eighth of ``max_batch_tokens``. The fewer, the
    sooner a request of another tenant is begun, and the less is gained by computing many tokens at once.
    ``drafts_up_to``: rule 10's tokens of a step; 0: no speculation. A step of few tokens takes hardly longer for some
    more, as long as it waits for the weights to be read; how many, depends on the device.
    ``reserved_rows``: rule 8's rows; None for one in 32. ``lately_s``: for how many seconds a tenant is expected back.

    ``prefix_cache``: rule 11. Off unless it is asked for: the server's own default is in ``server.config``.
    """

    max_rows: int = 32
    max_batch_tokens: int = 512
    num_pages: int = 2048
    page_size: int = 16
    max_context: int = 8192
    max_waiting: int = 1024
    max_overtake: int = 4
    guarded_tokens: int | None = None
    reserved_rows: int | None = None
    lately_s: float = 60.0
    prefix_cache: bool = False
    drafts_up_to: int = 0

    def __post_init__(self) -> None:
        for name in ("max_rows", "max_batch_tokens", "num_pages", "page_size", "max_context", "max_waiting"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_overtake < 0:
            raise ValueError(f"max_overtake must not be negative, got {self.max_overtake}")
        if self.drafts_up_to < 0:
            raise ValueError(f"drafts_up_to must not be negative, got {self.drafts_up_to}")
        if self.max_batch_tokens < self.max_rows:
            raise ValueError(
                f"max_batch_tokens ({self.max_batch_tokens}) must be at least max_rows ({self.max_rows}), so that "
                "every decoding row fits into every step"
            )
        if not 1 <= self.tokens_if_guarded <= self.max_batch_tokens:
            raise ValueError(
                f"guarded_tokens must be from 1 to max_batch_tokens ({self.max_batch_tokens}), "
                f"got {self.guarded_tokens}"
            )
        if not 1 <= self.rows_if_guarded <= self.max_rows:
            raise ValueError(
                f"reserved_rows must be from 0 to {self.max_rows - 1}, so that a row is left, got {self.reserved_rows}"
            )

    @property
    def max_request_tokens(self) -> int:
        """Prompt and output tokens of the largest request that can ever be served."""
        return min(self.max_context, self.num_pages * self.page_size)

    @property
    def tokens_if_guarded(self) -> int:
        return max(1, self.max_batch_tokens // 8) if self.guarded_tokens is None else self.guarded_tokens

    @property
    def rows_if_guarded(self) -> int:
        return self.max_rows - (self.max_rows // 32 if self.reserved_rows is None else self.reserved_rows)
