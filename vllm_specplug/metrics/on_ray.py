"""Series published through Ray's metrics."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import Any

from vllm_specplug.metrics.series import ENGINE_SERIES, ENSEMBLE_SERIES, PROPOSER_SERIES, STORE_SERIES, Snapshot, rows


class RaySeries:
    """Publishes all series through ``ray.util.metrics``; the node's exporter shows them with ``ray_`` in front.

    Ray's counters take increments, so the published totals are stored here. A further label names this process, since
    Ray may add up series with equal labels, and replicas of one model would have these.
    """

    LABELS = ("model_name", "engine", "process")

    def __init__(self) -> None:
        from ray.util import metrics as ray_metrics

        self._process = f"{socket.gethostname()}/{os.getpid()}"
        self._told: dict[tuple[str, str, tuple[str, ...]], float] = {}
        self._metrics: dict[str, Any] = {}
        for group, more in (
            ((*ENGINE_SERIES, *ENSEMBLE_SERIES), ()), (PROPOSER_SERIES, ("proposer",)), (STORE_SERIES, ("store",)),
        ):  # fmt: skip
            for series in group:
                make = ray_metrics.Counter if series.kind == "counter" else ray_metrics.Gauge
                name = f"{series.name}_total" if series.kind == "counter" else series.name
                self._metrics[series.name] = make(name, description=series.help, tag_keys=(*self.LABELS, *more))

    def set(self, worker: str, labels: Mapping[str, str], snapshot: Snapshot) -> None:
        """Publish a worker's counters.

        Args:
            worker: name of the worker among those that this process publishes for.
        """
        for series, more, value in rows(snapshot):
            tags = {**labels, "process": self._process, **more}
            metric = self._metrics[series.name]
            if series.kind == "gauge":
                metric.set(value, tags=tags)
                continue
            key = (worker, series.name, tuple(more.values()))
            if value > self._told.get(key, 0.0):
                metric.inc(value - self._told.get(key, 0.0), tags=tags)
                self._told[key] = value
