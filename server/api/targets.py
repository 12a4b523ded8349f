"""From the names in a request to the weights that answer it: the base, or immutable adapter versions with scales.

The versions are resolved once, when the request is admitted, by taking references to them; whatever happens to the
names afterwards, all of the request's choices run on those versions, and ``system_fingerprint`` says which ones they
were.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import TracebackType

from manylora.adapters.errors import AdapterNotFound
from manylora.adapters.versions import AdapterRef
from manylora.server.api.access.callers import ANYBODY, Caller
from manylora.server.api.errors import ApiError, bad_request, not_found
from manylora.server.api.schemas import ModelChoice
from manylora.server.api.state import MergesLike, RegistryLike, Serving
from manylora.server.engine.merges import MergedModel
from manylora.server.engine.request import AdapterUse, composition_of

_BASE_DIGITS = 8
_ADAPTER_DIGITS = 12


class Lease:
    """References to each adapter version of a request, one for each engine request to come. A context manager.

    The engine takes over one reference to each version when ``submit`` returns; until ``handed_over`` says that it did,
    they are this lease's, which gives back at its end what it still has. So each is released exactly once.
    """

    def __init__(self, registry: RegistryLike, count: int) -> None:
        self._registry = registry
        self._count = count
        self.uses: tuple[AdapterUse, ...] = ()
        """The versions and their scales; empty for the base."""
        self.merged: MergedModel | None = None
        """The merged weights that compute the requests, bound once for each of them; None if they are not merged."""

    def take(self, names: Sequence[str], scale: float) -> bool:
        """Add the version that the first of ``names`` to exist means now; whether there was one."""
        for name in names:
            refs = _acquire(self._registry, name, self._count)
            if refs is not None:
                self.uses += (AdapterUse(refs[0], scale),)
                return True
        return False

    def bind(self, merges: MergesLike) -> None:
        """Have the requests computed by merged weights, if they are for what is merged and for nothing else."""
        if len(self.uses) == 1:
            self.merged = merges.bind(self.uses[0].ref, self.uses[0].scale, self._count)

    def handed_over(self) -> None:
        """One reference to each version, and one binding, are the engine's now."""
        self._count -= 1

    def close(self) -> None:
        merged, self.merged = self.merged, None
        if merged is not None:
            for _ in range(self._count):
                merged.release()
        uses, self.uses = self.uses, ()
        for use in uses:
            _release(self._registry, [use.ref] * self._count)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class Wanted:
    """An adapter by the names it may have, in order, and the factor on its delta."""

    names: tuple[str, ...]
    scale: float = 1.0


@dataclass(frozen=True)
class Target:
    """What a request asked for."""

    model: str
    """Echoed in the response."""
    adapters: tuple[Wanted, ...]
    """Empty for the base."""
    param: str
    """The field that named them."""

    def lease(self, serving: Serving, count: int, caller: Caller = ANYBODY) -> Lease:
        """Take ``count`` references to each version that is asked for, or none at all.

        Raises ApiError: 403 for what the caller may not use, 404 for a name that does not exist, 400 for adapters that
        cannot be combined or rescaled.
        """
        lease = Lease(serving.registry, count)
        try:
            for wanted in self.permitted(caller).adapters:
                if not lease.take(wanted.names, wanted.scale):
                    raise self._missing(wanted)
            _check_composable(lease.uses)
            if serving.merges is not None:
                lease.bind(serving.merges)
        except BaseException:
            lease.close()
            raise
        return lease

    def permitted(self, caller: Caller) -> Target:
        """This target by the names that the caller may use alone: of two that an adapter may have, one may be another
        tenant's. Raises ApiError 403 for what is left without a name, whether it exists or not.

        Who may not use the base may not rescale either: an adapter at scale 0, or one and its alias at opposite
        scales, is the base.
        """
        if not self.adapters and not caller.may_use_base:
            raise ApiError(403, f"This key may not use `{self.model}`.", param=self.param)
        permitted = []
        for wanted in self.adapters:
            names = caller.permitted(wanted.names)
            if not names:
                raise ApiError(403, f"This key may not use `{wanted.names[0]}`.", param=self.param)
            if wanted.scale != 1.0 and not caller.may_use_base:
                raise ApiError(
                    403,
                    f"This key may not use the base, so it may use `{names[0]}` at scale 1 only.",
                    param=self.param,
                )
            permitted.append(Wanted(names, wanted.scale))
        return replace(self, adapters=tuple(permitted))

    def _missing(self, wanted: Wanted) -> ApiError:
        kind, name = ("model", self.model) if self.param == "model" else ("adapter", wanted.names[0])
        return not_found(f"The {kind} `{name}` does not exist.", self.param)


def target_of(serving: Serving, choice: ModelChoice) -> Target:
    """Read the fields that name weights. Raises ApiError if they contradict each other."""
    model = _model_target(serving, choice.model)
    if choice.lora_path is not None:
        named = Target(choice.model, (Wanted((choice.lora_path,)),), "lora_path")
    elif choice.adapters is not None:
        named = Target(choice.model, tuple(Wanted((one.name,), one.scale) for one in choice.adapters), "adapters")
    else:
        return model
    names = [name for wanted in named.adapters for name in wanted.names]
    if model.adapters and not set(names) & set(model.adapters[0].names):
        shown = ", ".join(f"`{name}`" for name in names)
        raise bad_request(
            f"`model` names `{choice.model}` and `{named.param}` names {shown}: give the base's name "
            f"(`{serving.base_name}`) as `model`, or {'the same adapter' if len(names) == 1 else 'one of them'}.",
            named.param,
        )
    return named


def _check_composable(uses: Sequence[AdapterUse]) -> None:
    """Raise ApiError 400 if an adapter whose outputs are not linear in its scale is combined or rescaled."""
    for use in uses:
        reason = use.ref.not_composable
        if reason is not None and (len(uses) > 1 or use.scale != 1.0):
            what = "combined with others" if len(uses) > 1 else f"rescaled (`scale` is {use.scale:g})"
            raise bad_request(
                f"`adapters`: `{use.ref.name}` cannot be {what}: {reason}. It is served alone, at scale 1.", "adapters"
            )


def _model_target(serving: Serving, model: str) -> Target:
    if model == serving.base_name:
        return Target(model, (), "model")
    # The whole name first: `:` is an ordinary character of names, adapters' and the base's alike.
    prefix = serving.base_name + ":"
    names = (model, model.removeprefix(prefix)) if model.startswith(prefix) else (model,)
    return Target(model, (Wanted(names),), "model")


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


def fingerprint(serving: Serving, lease: Lease) -> str:
    """``system_fingerprint``: the digest of the base, and what answers on it: "base", the digest of the one adapter
    version at scale 1, or else a digest over the versions and scales of the composition, in whatever order they came.

    Merged weights are others than base and adapter by their rounding, so they say that they are, and in which mode.
    """
    composition = composition_of(lease.uses)
    if not composition:
        adapters = "base"
    elif len(composition) == 1 and composition[0][1] == 1.0:
        adapters = composition[0][0]
    else:
        # repr: the shortest text that gives the same float again, so different scales give different digests.
        text = "+".join(f"{version}*{scale!r}" for version, scale in composition)
        adapters = hashlib.sha256(text.encode()).hexdigest()
    merged = "" if lease.merged is None else f"-{lease.merged.info.mode}"
    return f"fp_{serving.base_digest[:_BASE_DIGITS]}_{adapters[:_ADAPTER_DIGITS]}{merged}"
