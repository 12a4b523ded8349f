"""Errors of the model subsystem; the command line turns them into exit code 2.

ModelError
├── ModelNotFound        no such path, or a hub id that cannot be had
├── UnsupportedModel     a family or a config feature that would not be computed in full; every reason
├── BadCheckpoint        files that are missing, truncated, corrupt or do not fit the config; every reason
├── NotEnoughDisk        the quantised checkpoint does not fit where it should be written
└── ChatTemplateError    the chat template is absent or failed on these messages (also a ValueError)  -> HTTP 400
"""

from __future__ import annotations

from collections.abc import Sequence


class ModelError(Exception):
    """Base of every error the model subsystem raises on purpose; ``str(e)`` is fit to be shown to a user."""


class ModelNotFound(ModelError):
    """There is no model at that path, or no hub repository of that name within reach."""


class _WithReasons(ModelError):
    """An error that lists everything found wrong, so that one attempt is enough to fix it all."""

    verb = "cannot be used"

    def __init__(self, what: str, reasons: Sequence[str] | str) -> None:
        self.what = what
        self.reasons = (reasons,) if isinstance(reasons, str) else tuple(reasons)
        if len(self.reasons) == 1:
            super().__init__(f"{what} {self.verb}: {self.reasons[0]}")
        else:
            super().__init__(f"{what} {self.verb}:" + "".join(f"\n  - {reason}" for reason in self.reasons))


class UnsupportedModel(_WithReasons):
    """The model's architecture or a feature of its config would not be computed in full: *refuse, never guess*."""

    verb = "is not supported"


class BadCheckpoint(_WithReasons):
    """The files are missing, truncated, corrupt, or hold other tensors than the config says."""


class NotEnoughDisk(ModelError):
    """The disk has less room than the quantised checkpoint takes; the message has both numbers."""


class ChatTemplateError(ModelError, ValueError):
    """The model has no chat template, or the template refused these messages; the message says which and why."""
