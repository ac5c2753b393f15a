"""Publishes the metrics of workers and shows them on vLLM's ``/metrics``."""

from __future__ import annotations

import atexit
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_specplug.hooks import seam_list, seams
from vllm_specplug.log import logger
from vllm_specplug.metrics import bridge, files, series

_patches = seams.Patches()
_collector: files.Collector | None = None
_bridge: bridge.RayBridge | None = None


def show_metrics() -> None:
    """Show our series on ``/metrics`` of this process and of the processes that it starts. Errors are only logged."""
    global _bridge, _collector
    try:
        from prometheus_client import REGISTRY

        folder = files.open_folder()
        owner = f"{socket.gethostname()}/{os.getpid()}"
        os.environ[files.OWNER_VARIABLE] = owner
        if _bridge is None and _is_under_ray():
            started = bridge.RayBridge(folder, owner)
            started.start()
            _bridge = started
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            _patches.install(seam_list.METRICS_SEAMS, {"MultiProcessCollector.collect": _collect})
        if _collector is None:
            collector = files.Collector(folder)
            REGISTRY.register(collector)
            _collector = collector
    except Exception as error:
        logger.warning("specplug's metrics are not on /metrics: %s", error)


def hide_metrics() -> None:
    """Remove our series from ``/metrics`` again."""
    global _bridge, _collector
    if _bridge is not None:
        _bridge.close()
        _bridge = None
    if _collector is not None:
        from prometheus_client import REGISTRY

        REGISTRY.unregister(_collector)
        _collector = None
    _patches.undo()


def _collect(original: Callable[[Any], Any], collector: Any) -> list[Any]:
    """Add our series, since several API servers show nothing but the files of ``prometheus_client``."""
    return [*original(collector), *files.Collector(files.open_folder()).collect()]


def publish_metrics(snapshot: Callable[[], series.Snapshot], vllm_config: Any) -> None:
    """Publish this worker's counters from now until the process ends."""
    folder = os.environ.get(files.FOLDER_VARIABLE)
    name = vllm_config.model_config.served_model_name
    labels = {
        "model_name": str(name[0] if isinstance(name, list) else name),
        "engine": str(vllm_config.parallel_config.data_parallel_index),
    }
    try:
        publisher = files.Publisher(snapshot, labels, Path(folder) if folder else None, ray=_tells_ray())
        publisher.start()
    except Exception:
        logger.exception("specplug's metrics are not published")
        return
    atexit.register(publisher.close)


def _tells_ray() -> bool:
    """Whether this worker publishes to Ray itself: it is an actor, and no bridge of this process does it."""
    return _bridge is None and _is_under_ray()


def _is_under_ray() -> bool:
    try:
        import ray
    except ImportError:
        return False
    return bool(ray.is_initialized())
