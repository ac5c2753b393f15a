"""``specplug_...`` series for operators, beside vLLM's own on ``/metrics`` or on Ray's exporter.

Proposers work in vLLM's worker, and another process answers ``/metrics``. So the worker writes its counters to a small
file, at most once a second and only if they changed (:class:`Publisher`), and the process that answers reads the files
of all workers (:class:`Collector`). No step waits for any of this. This module imports no vLLM.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from vllm_specplug.log import logger
from vllm_specplug.metrics.on_ray import RaySeries
from vllm_specplug.metrics.series import Series, Snapshot, rows

FOLDER_VARIABLE = "SPECPLUG_METRICS_DIR"
"""Environment variable with the folder of the files; set by the process that reads the configuration, and inherited."""
OWNER_VARIABLE = "SPECPLUG_METRICS_OWNER"
"""Environment variable that names the process that started a worker, since several may share a folder; inherited."""
INTERVAL_S = 1.0
STALE_S = 60.0
"""Seconds without a touch after which a file counts as that of a killed worker."""


def open_folder() -> Path:
    """The folder that workers of this process write to: :data:`FOLDER_VARIABLE`, else a new one, removed at exit."""
    path = os.environ.get(FOLDER_VARIABLE)
    if path:
        folder = Path(path)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
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
    """Publishes a worker's counters from a thread of its own; no error ends the worker.

    If the file cannot be written (a full disk), that is logged once and tried again every second. If the folder was
    removed, as cleaners of temporary files do, it is made again. Any other error is logged and ends publishing.

    Args:
        snapshot: returns the counters.
        labels: labels of every series of this worker, such as the model's name.
        folder: folder of the file; None writes no file.
        ray: True publishes through ``ray.util.metrics`` from this process, for a worker that is an actor of Ray.
    """

    def __init__(
        self, snapshot: Callable[[], Snapshot], labels: Mapping[str, str], folder: Path | None, ray: bool = False
    ) -> None:
        self._snapshot = snapshot
        self._labels = dict(labels)
        self._path = None if folder is None else folder / f"{os.getpid()}-{uuid.uuid4().hex[:8]}.json"
        self._ray = RaySeries() if ray else None
        self._last: str | None = None
        self._is_warned = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="specplug-metrics", daemon=True)

    def start(self) -> None:
        """Publish now, and every second from a thread."""
        self._publish_or_warn()
        self._thread.start()

    def publish(self) -> None:
        """Publish the counters once, if they changed.

        Raises:
            OSError: the file cannot be written.
        """
        snapshot = self._snapshot()
        owner = "" if self._ray else os.environ.get(OWNER_VARIABLE, "")
        text = json.dumps({"labels": self._labels, "owner": owner, "snapshot": snapshot})
        if self._path is not None and not (text == self._last and _shows_life(self._path)):
            _write(self._path, text)
        if self._ray is not None and text != self._last:
            self._ray.set("", self._labels, snapshot)
        self._last = text

    def close(self) -> None:
        """Stop publishing and remove the file: an engine that has ended has no counters."""
        self._stop.set()
        if self._path is not None:
            with contextlib.suppress(OSError):
                self._path.unlink()

    def _run(self) -> None:
        while not self._stop.wait(INTERVAL_S):
            try:
                self._publish_or_warn()
            except RuntimeError:
                continue  # a dictionary changed while it was read; the next second will do
            except Exception:
                logger.exception("specplug's metrics are no longer published")
                return

    def _publish_or_warn(self) -> None:
        try:
            self.publish()
        except OSError as error:
            if not self._is_warned:
                logger.warning("specplug's metrics cannot be written, which is tried every second: %s", error)
            self._is_warned = True


def _shows_life(path: Path) -> bool:
    """Show readers of the file that its worker is alive, only idle; False if the file is gone."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def _write(path: Path, text: str) -> None:
    """Replace the file, for the eyes of this user alone; makes its folder if that is gone."""
    temporary = path.with_suffix(".tmp")
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary.unlink(missing_ok=True)
    with open(temporary, "x", opener=partial(os.open, mode=0o600)) as file:
        file.write(text)
    temporary.replace(path)


class Collector:
    """Collector for ``prometheus_client``'s registries: reads the files of all workers when Prometheus asks.

    Args:
        folder: folder of the files.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def collect(self) -> Iterable[Any]:
        """The metric families, all of them even before the first step."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        workers = sorted(_read_rows(self._folder), key=lambda each: sorted(each[0].items()))
        labels = sorted({name for worker, _ in workers for name in worker})
        families: dict[str, Any] = {}
        for worker, values in workers:
            for series, more, value in values:
                names = [*labels, *more]
                if series.name not in families:
                    make = CounterMetricFamily if series.kind == "counter" else GaugeMetricFamily
                    families[series.name] = make(series.name, series.help, labels=names)
                families[series.name].add_metric([*(worker.get(name, "") for name in labels), *more.values()], value)
        return families.values()

    def describe(self) -> Iterable[Any]:
        """Return no metrics, so that a registry does not collect when this collector is registered."""
        return []


def _read_rows(folder: Path) -> Iterator[tuple[dict[str, str], list[tuple[Series, dict[str, str], float]]]]:
    """(labels, series) of every worker whose counters can be read, since one that is not must not end the page."""
    for labels, snapshot in read(folder):
        try:
            readable = {str(name): str(value) for name, value in labels.items()}, [*rows(snapshot)]
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError):
            continue  # of another version of this package, or not ours
        yield readable


def read(folder: Path) -> Iterator[tuple[dict[str, str], Snapshot]]:
    """(labels, counters) of every worker that is alive."""
    for _, contents in read_files(folder):
        yield contents["labels"], contents["snapshot"]


def read_files(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, contents) of every file of a worker that is alive."""
    for path in sorted(folder.glob("*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # the file is gone, or not ours
            if time.time() - path.stat().st_mtime > STALE_S:
                continue
            contents = json.loads(path.read_text())
            if {"labels", "snapshot"} <= contents.keys():
                yield path.name, contents
