"""What ``specplug batch`` and ``specplug ray-serve`` share: a connection to Ray, and JSON on the command line."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_specplug.errors import ConfigurationError
from vllm_specplug.ray.environment import require_ray


@contextlib.contextmanager
def connected(part: str, address: str | None, temp_dir: Path | None) -> Iterator[None]:
    """A cluster that is there, or one of this machine that ends with this process.

    Args:
        part: of Ray, that is needed.
        address: of a running cluster; None starts one.
        temp_dir: for the files of a cluster that is started.
    """
    require_ray(part)
    import ray

    try:
        if address is not None:
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
        else:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            where = {} if temp_dir is None else {"_temp_dir": str(temp_dir.resolve())}
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING, **where)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        raise ConfigurationError(f"no Ray cluster: {error}") from error
    for name in ("ray.data", "ray.serve"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        yield
    finally:
        ray.shutdown()


def json_object(option: str, text: str | None) -> dict[str, Any] | None:
    """What an option says in JSON, None where it is absent or null.

    Raises:
        ConfigurationError: no JSON, or no object.
    """
    if text is None:
        return None
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ConfigurationError(f"{option}: no JSON ({error}): {text!r}") from error
    if found is not None and not isinstance(found, dict):
        raise ConfigurationError(f"{option} must be a JSON object, not {text!r}")
    return found
