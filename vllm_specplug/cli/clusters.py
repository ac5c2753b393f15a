"""The connection to Ray of ``specplug batch``, ``ray-serve`` and ``datastore``."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_specplug.errors import ConfigurationError

CONNECT_TIMEOUT_S = 10.0


def connect(address: str | None, temp_dir: Path | None, metrics_port: int | None = None) -> None:
    """Connect to a running cluster, or start one on this machine that ends with this process.

    Args:
        address: address of a running cluster; None starts one.
        temp_dir: folder for the files of a cluster that is started.
        metrics_port: port of Ray's exporter on a cluster that is started.

    Raises:
        ConfigurationError: no cluster answers at this address, or none can be started.
    """
    _check_reachable(address)
    import ray
    import ray.data

    # Ray Data reports errors at length; the command shows one line, and Ray's logs have the rest.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    how: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address is not None:
            ray.init(address=address, **how)
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        if temp_dir is not None:
            how["_temp_dir"] = str(temp_dir.resolve())
        ray.init(include_dashboard=False, _metrics_export_port=metrics_port, **how)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        raise ConfigurationError(f"no Ray cluster: {error}") from error


def _check_reachable(address: str | None) -> None:
    """Fail early if nothing listens at ``address``: Ray itself would try for minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isascii() and port.isdecimal():
        try:
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S).close()
        except OSError as error:
            raise ConfigurationError(
                f"no Ray cluster answers at {address} ({error}): give the address that `ray start --head` printed"
            ) from error


@contextlib.contextmanager
def released() -> Iterator[None]:
    """Disconnect at the end from a cluster that the block connected to; a cluster that it started ends."""
    try:
        yield
    finally:
        if "ray" in sys.modules:
            sys.modules["ray"].shutdown()
