"""Errors of the adapter subsystem.

AdapterError
├── AdapterNotFound        no adapter is registered under that name            -> HTTP 404
├── AdapterExists          the name is taken and replacing was not asked for   -> HTTP 400
├── AdapterNameInvalid     the name is malformed or belongs to the base model  -> HTTP 400
├── AdapterSourceNotFound  the path, hub id or upload does not hold an adapter -> HTTP 404
├── AdapterSourceForbidden the path lies outside the allowed roots             -> HTTP 400
├── AdapterSourceChanged   the source no longer holds the version asked for    -> HTTP 400
├── AdapterUploadInvalid   an uploaded file is missing, unexpected or too big  -> HTTP 400
├── AdapterRefused         the adapter cannot be served in full; every reason  -> HTTP 400
├── SlotUploadFailed       copying the adapter to the device failed            -> HTTP 503
└── RegistryStateError     the file that remembers the adapters is unusable    -> HTTP 500
"""

from __future__ import annotations

from collections.abc import Sequence


class AdapterError(Exception):
    """Base of every error the adapter subsystem raises on purpose; ``str(e)`` is fit to be shown to a user."""


def without_frames(error: BaseException) -> BaseException:
    """``error``, to be kept for a while: its traceback, and those of what caused it, are let go of. Their frames hold
    all that was being worked on, such as the bytes of an adapter's file."""
    seen: BaseException | None = error
    while seen is not None:
        seen.__traceback__ = None
        seen = seen.__cause__ or seen.__context__
    return error


class AdapterNotFound(AdapterError):
    def __init__(self, name: str) -> None:
        super().__init__(f"No adapter named `{name}` is loaded.")
        self.name = name


class AdapterExists(AdapterError):
    def __init__(self, name: str) -> None:
        super().__init__(
            f"The adapter name `{name}` is already in use. Unload it first, or ask for it to be replaced "
            "(load_inplace=true, or PUT /v1/adapters/{name})."
        )
        self.name = name


class AdapterNameInvalid(AdapterError):
    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"`{name}` cannot be an adapter's name: {reason}")
        self.name = name


class AdapterSourceNotFound(AdapterError):
    """Nothing that looks like a PEFT adapter was found at the source; the message names it."""


class AdapterSourceForbidden(AdapterError):
    """The source lies outside the roots the server was started with; the message names both."""


class AdapterSourceChanged(AdapterError):
    """A version whose weights are not in memory cannot be read again: what its source holds now is another adapter.

    Other weights than those asked for are never served, so requests for this version end with this error.
    """

    def __init__(self, name: str, source: str, version: str, found: str) -> None:
        super().__init__(
            f"Adapter `{name}` is not in memory and can no longer be read: {source} held version {version[:12]} when "
            f"it was loaded, and holds version {found[:12]} now. Load it again to serve the new version, or put the "
            "old files back."
        )
        self.name = name


class AdapterUploadInvalid(AdapterError):
    """The uploaded files are not an adapter's; the message names the file and what was expected."""


class AdapterRefused(AdapterError):
    """The adapter was read but would not be applied in full, so it is refused: *refuse, never guess*.

    ``reasons`` holds every problem found, so that one attempt is enough to fix them all.
    """

    def __init__(self, what: str, reasons: Sequence[str]) -> None:
        self.what = what
        self.reasons = tuple(reasons)
        lines = "".join(f"\n  - {reason}" for reason in self.reasons)
        super().__init__(f"Adapter {what} is refused:{lines}")


class SlotUploadFailed(AdapterError):
    """An adapter version could not be copied to the device; ``__cause__`` is what went wrong."""

    def __init__(self, name: str, version: str, cause: BaseException) -> None:
        # An error of our own was written for users; of any other, its kind is half of what it says.
        why = str(cause) if isinstance(cause, AdapterError) else f"{type(cause).__name__}: {cause}"
        super().__init__(f"Adapter `{name}` (version {version[:12]}) could not be brought to the device: {why}")
        self.name = name
        self.version = version


class RegistryStateError(AdapterError):
    """The file that remembers the adapters across restarts cannot be read or written; the message says what to do."""
