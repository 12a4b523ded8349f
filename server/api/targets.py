"""From the names in a request to the weights that answer it: the base, or one immutable adapter version.

The version is resolved once, when the request is admitted, by taking references to it; whatever happens to the name
afterwards, all of the request's choices run on that version, and ``system_fingerprint`` says which one it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType

from manylora.adapters.errors import AdapterNotFound
from manylora.adapters.versions import AdapterRef
from manylora.server.api.errors import ApiError, bad_request, not_found
from manylora.server.api.schemas import ModelChoice
from manylora.server.api.state import RegistryLike, Serving

_BASE_DIGITS = 8
_ADAPTER_DIGITS = 12


class Lease:
    """References to one adapter version, one for each engine request to come. A context manager.

    The engine takes over a reference when ``submit`` returns; until ``handed_over`` says that it did, the reference
    is this lease's, which gives back at its end what it still has. So each is released exactly once.
    """

    def __init__(self, registry: RegistryLike, refs: list[AdapterRef]) -> None:
        self._registry = registry
        self._refs = refs
        self.ref = refs[0] if refs else None
        """The version; None for the base."""

    def handed_over(self) -> None:
        """One reference is the engine's now."""
        if self._refs:
            self._refs.pop()

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        while self._refs:
            self._registry.release(self._refs.pop())


@dataclass(frozen=True)
class Target:
    """What a request asked for: an adapter by the names it may have, or the base; and the factor on its delta."""

    model: str
    """Echoed in the response."""
    names: tuple[str, ...]
    """The adapter's possible names, in order; empty for the base."""
    param: str
    """The field that named it."""
    scale: float = 1.0

    def lease(self, serving: Serving, count: int) -> Lease:
        """Take ``count`` references to what is asked for. Raises ApiError 404."""
        for name in self.names:
            refs = _acquire(serving.registry, name, count)
            if refs is not None:
                return Lease(serving.registry, refs)
        if self.names:
            raise self.missing()
        return Lease(serving.registry, [])

    def missing(self) -> ApiError:
        kind, name = ("model", self.model) if self.param == "model" else ("adapter", self.names[0])
        return not_found(f"The {kind} `{name}` does not exist.", self.param)


def target_of(serving: Serving, choice: ModelChoice) -> Target:
    """Read the fields that name weights. Raises ApiError if they contradict each other."""
    model = _model_target(serving, choice.model)
    if choice.lora_path is not None:
        named = Target(choice.model, (choice.lora_path,), "lora_path")
    elif choice.adapters is not None:
        use = choice.adapters[0]
        named = Target(choice.model, (use.name,), "adapters", use.scale)
    else:
        return model
    if model.names and named.names[0] not in model.names:
        raise bad_request(
            f"`model` names `{choice.model}` and `{named.param}` names `{named.names[0]}`: give the base's name "
            f"(`{serving.base_name}`) as `model`, or the same adapter.",
            named.param,
        )
    return named


def _model_target(serving: Serving, model: str) -> Target:
    if model == serving.base_name:
        return Target(model, (), "model")
    # The whole name first: `:` is an ordinary character of names, adapters' and the base's alike.
    prefix = serving.base_name + ":"
    names = (model, model.removeprefix(prefix)) if model.startswith(prefix) else (model,)
    return Target(model, names, "model")


def _acquire(registry: RegistryLike, name: str, count: int) -> list[AdapterRef] | None:
    """``count`` references to one and the same version; None if there is no such name."""
    while True:
        refs: list[AdapterRef] = []
        try:
            for _ in range(count):
                refs.append(registry.acquire(name))
        except AdapterNotFound:
            # Never there, or unloaded in between: either way it is gone now.
            _release(registry, refs)
            return None
        if len({ref.version for ref in refs}) <= 1:
            return refs
        # Replaced in between by a load on another thread: take the new version for all.
        _release(registry, refs)


def _release(registry: RegistryLike, refs: list[AdapterRef]) -> None:
    for ref in refs:
        registry.release(ref)


def fingerprint(serving: Serving, ref: AdapterRef | None) -> str:
    """``system_fingerprint``: the digests of the base and of the adapter version that answer."""
    adapter = "base" if ref is None else ref.version[:_ADAPTER_DIGITS]
    return f"fp_{serving.base_digest[:_BASE_DIGITS]}_{adapter}"
