"""Counters where operators look: ``specplug_...`` series beside vLLM's own on ``/metrics``, or on Ray's exporter.

Proposers work in vLLM's worker, and another process answers ``/metrics``. So the worker leaves its counters in a small
file, at most once a second and only where they changed (:class:`Publisher`), and the process that is asked reads the
files of all workers (:class:`Collector`). Nothing of this is in the way of a step. Knows no vLLM.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import shutil
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_specplug.log import logger

FOLDER_VARIABLE = "SPECPLUG_METRICS_DIR"
"""Environment variable with the folder of the files: set by the process that reads the configuration, inherited."""
OWNER_VARIABLE = "SPECPLUG_METRICS_OWNER"
"""Environment variable that names the process whose workers these are, where several share a folder; inherited."""
INTERVAL_S = 1.0
STALE_S = 60.0
"""A file that was not touched for so long belongs to a worker that was killed."""

Snapshot = Mapping[str, Any]
"""What :meth:`vllm_specplug.drafting.Drafting.snapshot` returns."""


@dataclass(frozen=True)
class Series:
    """One Prometheus metric.

    Attributes:
        name: as on ``/metrics``, without the ``_total`` that counters get.
        kind: ``counter`` or ``gauge``.
        help: what it counts, with its unit.
        key: where its value is in a snapshot.
    """

    name: str
    kind: str
    help: str
    key: str


ENGINE_SERIES = (
    Series("specplug_steps", "counter", "Steps in which some request emitted tokens.", "steps"),
    Series("specplug_emitted_tokens", "counter", "Tokens emitted by all requests.", "emitted"),
    Series("specplug_request_steps", "counter", "Pairs of request and step that emitted tokens.", "request_steps"),
    Series("specplug_live_requests", "gauge", "Requests that hold state in proposers or verifier.", "live_requests"),
    Series(
        "specplug_verify_seconds", "counter", "Seconds of steps that verified drafts and took in no prompt.", "verify_s"
    ),
    Series("specplug_verify_steps", "counter", "Steps that verified drafts and took in no prompt.", "verify_steps"),
)
ENSEMBLE_SERIES = (
    Series("specplug_paused", "gauge", "1 while nothing is drafted because it does not pay.", "paused"),
    Series("specplug_resting_steps", "counter", "Steps in which no proposer was asked.", "resting_steps"),
    Series("specplug_withheld_tokens", "counter", "Draft tokens that were not worth verifying.", "withheld_tokens"),
    Series(
        "specplug_gain",
        "gauge",
        "Tokens of late in steps with drafts, over what the same time would have brought without.",
        "gain",
    ),
    Series("specplug_forks", "counter", "Chains beyond the first of a request that were verified.", "forks"),
    Series(
        "specplug_fork_tokens", "counter", "Draft tokens of them, behind where they leave other chains.", "fork_tokens"
    ),
    Series("specplug_fork_wins", "counter", "Requests and steps in which one got further than the first.", "fork_wins"),
    Series("specplug_fork_gain", "counter", "Draft tokens that were accepted because of them.", "fork_gain"),
    Series(
        "specplug_withheld_forks",
        "counter",
        "Steps in which there were some to choose from and none was worth verifying.",
        "withheld_forks",
    ),
)
PROPOSER_SERIES = (
    Series("specplug_proposer_drafted_tokens", "counter", "Draft tokens that were verified.", "drafted"),
    Series("specplug_proposer_accepted_tokens", "counter", "Draft tokens that were accepted.", "accepted"),
    Series("specplug_proposer_chosen_drafts", "counter", "Drafts that begin with a token of this proposer.", "chosen"),
    Series("specplug_proposer_errors", "counter", "Calls that raised or answered nonsense.", "errors"),
    Series(
        "specplug_proposer_invalid_tokens", "counter", "Draft tokens outside of the vocabulary, cut.", "invalid_tokens"
    ),
    Series("specplug_proposer_seconds", "counter", "Seconds spent proposing.", "propose_s"),
    Series("specplug_proposer_memory_bytes", "gauge", "State kept about requests and history.", "memory_bytes"),
    Series("specplug_proposer_active", "gauge", "0 once the proposer was left out for an error.", "active"),
)
STORE_SERIES = (
    Series("specplug_store_tokens", "gauge", "Tokens in the store.", "tokens"),
    Series("specplug_store_bytes", "gauge", "Bytes of the store's file.", "bytes"),
    Series("specplug_store_lookups", "counter", "Drafts that were asked of the store.", "lookups"),
    Series("specplug_store_hits", "counter", "Lookups that found a draft.", "hits"),
)
ALL_SERIES = (*ENGINE_SERIES, *ENSEMBLE_SERIES, *PROPOSER_SERIES, *STORE_SERIES)


def rows(snapshot: Snapshot) -> Iterator[tuple[Series, dict[str, str], float]]:
    """Every series of a snapshot: (series, labels beside those of the engine, value)."""
    for series in ENGINE_SERIES:
        yield series, {}, float(snapshot[series.key])
    for series in ENSEMBLE_SERIES:
        yield series, {}, float(snapshot["ensemble"][series.key])
    for name, proposer in snapshot["proposers"].items():
        for series in PROPOSER_SERIES:
            yield series, {"proposer": name}, float(proposer[series.key])
        for store, numbers in proposer["stores"].items():
            for series in STORE_SERIES:
                yield series, {"store": store}, float(numbers[series.key])


def open_folder() -> Path:
    """The folder that workers started by this process will write to; made, and removed at exit, unless it is given."""
    given = os.environ.get(FOLDER_VARIABLE)
    if given:
        folder = Path(given)
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    folder = Path(tempfile.mkdtemp(prefix="specplug-metrics-"))
    os.environ[FOLDER_VARIABLE] = str(folder)
    owner = os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # not in a forked child
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder


class Publisher:
    """Leaves a worker's counters where others find them, from a thread of its own.

    Args:
        snapshot: gives the counters.
        labels: of every series of this worker, such as the model's name.
        folder: for the file; None writes none.
        ray: True sets series of ``ray.util.metrics`` from here: nobody else does it.
    """

    def __init__(
        self, snapshot: Callable[[], Snapshot], labels: Mapping[str, str], folder: Path | None, ray: bool = False
    ) -> None:
        self._snapshot = snapshot
        self._labels = dict(labels)
        self._path = None if folder is None else folder / f"{os.getpid()}-{uuid.uuid4().hex[:8]}.json"
        self._ray = RaySeries() if ray else None
        self._last: str | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="specplug-metrics", daemon=True)

    def start(self) -> None:
        """Publish now and from here on."""
        self.publish()
        self._thread.start()

    def publish(self) -> None:
        """Write the counters where they changed. Trouble is told once in the log and ends publishing, no more."""
        snapshot = self._snapshot()
        owner = "" if self._ray else os.environ.get(OWNER_VARIABLE, "")
        text = json.dumps({"labels": self._labels, "owner": owner, "snapshot": snapshot})
        if text == self._last:
            if self._path is not None:
                self._path.touch()  # alive, only idle
            return
        if self._path is not None:
            temporary = self._path.with_suffix(".tmp")
            temporary.write_text(text)
            temporary.replace(self._path)
        if self._ray is not None:
            self._ray.set("", self._labels, snapshot)
        self._last = text

    def close(self) -> None:
        """Stop, and take the counters away: an engine that is gone has none."""
        self._stop.set()
        if self._path is not None:
            with contextlib.suppress(OSError):
                self._path.unlink()

    def _run(self) -> None:
        while not self._stop.wait(INTERVAL_S):
            try:
                self.publish()
            except RuntimeError:
                continue  # a dictionary changed while it was read; the next time will do
            except Exception:
                logger.exception("specplug's metrics are no longer published")
                return


class Collector:
    """Reads what workers left, whenever Prometheus asks; for ``prometheus_client``'s registries.

    Args:
        folder: of the files.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def collect(self) -> Iterable[Any]:
        """The metric families, all of them even before the first step."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        found = sorted(read(self._folder), key=lambda each: sorted(each[0].items()))
        labels = sorted({name for worker, _ in found for name in worker})
        families: dict[str, Any] = {}
        for worker, snapshot in found:
            for series, more, value in rows(snapshot):
                names = [*labels, *more]
                if series.name not in families:
                    make = CounterMetricFamily if series.kind == "counter" else GaugeMetricFamily
                    families[series.name] = make(series.name, series.help, labels=names)
                families[series.name].add_metric([*(worker.get(name, "") for name in labels), *more.values()], value)
        return families.values()

    def describe(self) -> Iterable[Any]:
        """Nothing: a registry need not collect to know that these names are new."""
        return []


def read(folder: Path) -> Iterator[tuple[dict[str, str], Snapshot]]:
    """(labels, counters) of every worker that is alive."""
    for _, found in _read_files(folder):
        yield found["labels"], found["snapshot"]


def _read_files(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, contents) of every file of a worker that is alive."""
    for path in sorted(folder.glob("*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # it went away, or is no file of ours
            if time.time() - path.stat().st_mtime > STALE_S:
                continue
            found = json.loads(path.read_text())
            if {"labels", "snapshot"} <= found.keys():
                yield path.name, found


def reference() -> str:
    """All series as a Markdown table, for the documentation."""
    labels = {
        ENGINE_SERIES: "",
        ENSEMBLE_SERIES: "",
        PROPOSER_SERIES: ", `proposer`",
        STORE_SERIES: ", `store`",
    }
    lines = ["| series | kind | labels | what it counts |", "| --- | --- | --- | --- |"]
    for group, more in labels.items():
        for series in group:
            name = f"{series.name}_total" if series.kind == "counter" else series.name
            lines.append(f"| `{name}` | {series.kind} | `model_name`, `engine`{more} | {series.help} |")
    return "\n".join(lines)


class RaySeries:
    """The same series through ``ray.util.metrics``, which the node's exporter shows with ``ray_`` in front.

    Ray's counters are told increments; what was told is kept here. They have one label more, the process that tells:
    Ray may add up what has the same labels, and replicas of one model would.
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
        """Tell Ray how far a worker's counters are.

        Args:
            worker: which one, of those whose counters this process tells.
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


class RayBridge:
    """Hands the counters of an engine's workers on to Ray, from the process that starts the engine.

    Workers are ordinary processes that know no Ray; the actor that starts them does.

    Args:
        folder: of the workers' files.
        owner: value of :data:`OWNER_VARIABLE` in the workers to tell about.
    """

    def __init__(self, folder: Path, owner: str) -> None:
        self._folder = folder
        self._owner = owner
        self._series = RaySeries()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="specplug-ray-metrics", daemon=True)

    def start(self) -> None:
        """From now on, once a second."""
        self._thread.start()

    def tell(self) -> None:
        """Once."""
        for worker, found in _read_files(self._folder):
            if found.get("owner") == self._owner:
                self._series.set(worker, found["labels"], found["snapshot"])

    def close(self) -> None:
        """No more."""
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.wait(INTERVAL_S):
            try:
                self.tell()
            except Exception:
                logger.exception("specplug's metrics are no longer on Ray's exporter")
                return
