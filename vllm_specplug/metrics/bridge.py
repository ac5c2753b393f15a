"""Publishes a replica's series to Ray every second."""

from __future__ import annotations

import threading
from pathlib import Path

from vllm_specplug.log import logger
from vllm_specplug.metrics.files import INTERVAL_S, read_files
from vllm_specplug.metrics.on_ray import RaySeries


class RayBridge:
    """Hands the counters of an engine's workers on to Ray, from the process that starts the engine.

    Workers are ordinary processes that know no Ray; the actor that starts them does.

    Args:
        folder: folder of the workers' files.
        owner: value of :data:`OWNER_VARIABLE` in the workers whose counters are published.
    """

    def __init__(self, folder: Path, owner: str) -> None:
        self._folder = folder
        self._owner = owner
        self._series = RaySeries()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="specplug-ray-metrics", daemon=True)

    def start(self) -> None:
        """Start publishing to Ray every second."""
        self._thread.start()

    def tell(self) -> None:
        """Publish the counters to Ray once."""
        for worker, contents in read_files(self._folder):
            if contents.get("owner") == self._owner:
                self._series.set(worker, contents["labels"], contents["snapshot"])

    def close(self) -> None:
        """Stop publishing."""
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.wait(INTERVAL_S):
            try:
                self.tell()
            except Exception:
                logger.exception("specplug's metrics are no longer on Ray's exporter")
                return
