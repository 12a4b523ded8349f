"""How this server reads adapters, and which ones it begins with."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

from manylora.adapters.errors import AdapterError, AdapterRefused
from manylora.adapters.peft_loader import load_peft_adapter
from manylora.adapters.registry import AdapterRegistry
from manylora.adapters.source import resolve_source
from manylora.adapters.versions import AdapterInfo, LoadedAdapter
from manylora.adapters.watcher import FolderWatcher
from manylora.adapters.weights import AdapterWeights
from manylora.kernels.lora_pool import LoraPool
from manylora.server.config import ServeConfig
from manylora.server.engine.metrics import Metrics
from manylora.server.model.decoder import Decoder

logger = logging.getLogger(__name__)


class AdapterLoader:
    """Reads adapters for this base, and refuses what the pool could never hold. Called on loaders' threads."""

    def __init__(self, base: str, decoder: Decoder, pool: LoraPool, metrics: Metrics) -> None:
        self._base, self._decoder, self._pool, self._metrics = base, decoder, pool, metrics
        # Of hub ids, where they were last downloaded to: what is read again is that, whatever the hub has by now.
        self._downloaded: dict[str, Path] = {}

    def load(self, source: str) -> LoadedAdapter:
        """For the registry: read and check a source, and say what it warns of. Raises AdapterError."""
        start = time.monotonic()
        try:
            path = resolve_source(source)
            if path != Path(os.path.abspath(os.path.expanduser(source))):
                self._downloaded[source] = path
            loaded = self._read(source, path)
        except AdapterRefused:
            self._metrics.adapter_loaded(time.monotonic() - start, refused=True)
            raise
        self._metrics.adapter_loaded(time.monotonic() - start)
        for warning in loaded.report.warnings:
            logger.warning("adapter %s: %s", source, warning)
        return loaded

    def read(self, source: str) -> LoadedAdapter:
        """For the host tier: the same again, without a word."""
        downloaded = self._downloaded.get(source)
        if downloaded is None or not downloaded.is_dir():
            downloaded = resolve_source(source)
        return self._read(source, downloaded)

    def _read(self, source: str, path: Path) -> LoadedAdapter:
        weights: AdapterWeights = load_peft_adapter(path, self._pool.shapes, base=self._decoder, base_name=self._base)
        reason = self._pool.fits(weights.lora) or self._pool.overflows(weights.lora)
        if reason is not None:
            raise AdapterRefused(f"in {source}", [reason])
        return LoadedAdapter(
            version=weights.version,
            nbytes=weights.nbytes,
            report=weights.report,
            weights=weights,
            footprint=self._pool.pages_needed(weights.lora),
            not_composable=weights.not_composable,
            chat_template=weights.chat_template,
        )


def first_adapters(
    registry: AdapterRegistry, config: ServeConfig, watcher: FolderWatcher | None = None, *, restore: bool = True
) -> list[AdapterInfo]:
    """Bring back the adapters of the last run, if ``restore``, then load those that the configuration names.

    The configuration wins over what was remembered. Raises AdapterError for one that it names and that cannot be
    served: a server that was told to serve an adapter does not start without it. A remembered one that fails is logged,
    and so is a folder that is watched, as it may be right at the next look.
    """
    named = {spec.name: spec.source for spec in config.adapters}
    if config.adapter_dir is not None and watcher is None:
        for folder in sorted(Path(config.adapter_dir).iterdir()):
            if (folder / "adapter_config.json").is_file():
                named.setdefault(folder.name, str(folder))
    for name, error in registry.restore() if restore else ():
        if name not in named:
            logger.error("adapter %s, loaded before the restart, could not be brought back: %s", name, error)
    loaded = []
    for name, source in named.items():
        try:
            loaded.append(registry.load(name, source, replace=True))
        except AdapterError as error:
            error.add_note(f"(adapter `{name}`, from the command line)")
            raise
    if watcher is not None:
        watcher.poll(settled=True)
    return loaded
