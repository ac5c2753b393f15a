"""What a replica needs of its machine: a share that the cluster can give, and a process prepared for it.

On CPUs three defaults stand in the way of several engines on a machine: vLLM binds the threads of all engines to the
same cores, takes most of the memory for its KV cache, and a replica that asks for a GPU waits for ever. This module
changes each default unless the user sets a value.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_specplug.engines import lifeline
from vllm_specplug.engines.environment import intel_openmp, is_cpu_wheel
from vllm_specplug.errors import ConfigurationError
from vllm_specplug.log import logger

KV_CACHE_SHARE = 0.3
"""Part of a replica's share of the machine's memory that its KV cache gets on CPUs."""
_KV_CACHE_KEYS = ("kv_cache_memory_bytes", "gpu_memory_utilization")
_GIB = 2**30


def require_ray(part: str) -> None:
    """Refuse to go on without Ray.

    Args:
        part: library of Ray that is needed: "data" or "serve".

    Raises:
        ConfigurationError: a package that the library needs is not installed.
    """
    needed = {"data": ("ray", "pandas"), "serve": ("ray", "starlette", "aiohttp")}[part]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigurationError(
            f"Ray is not installed whole ({', '.join(missing)} missing): pip install 'vllm-specplug[ray]' on every node"
        )


@dataclass(frozen=True)
class Share:
    """CPUs and GPUs that Ray reserves for one replica.

    Attributes:
        cpus: number of CPUs; also the threads of an engine that computes on CPUs.
        gpus: number of GPUs; 0 if vLLM computes on CPUs.
    """

    cpus: float
    gpus: float

    def __str__(self) -> str:
        return f"{self.cpus:g} CPUs" + (f" and {self.gpus:g} GPUs" if self.gpus else "")


def share(cpus: float | None, gpus: float | None, engine_args: Mapping[str, Any], options: Sequence[str] = ()) -> Share:
    """The share of a replica.

    Args:
        cpus: number of CPUs; by default 1.
        gpus: number of GPUs; by default the devices that an engine of these arguments takes, 0 with vLLM's CPU wheel.
        engine_args, options: the engine's arguments, as a dictionary and as ``vllm serve`` takes them.

    Raises:
        ConfigurationError: there are no CPUs, or fewer than 0 GPUs.
    """
    if (cpus is not None and cpus <= 0) or (gpus is not None and gpus < 0):
        raise ConfigurationError(f"a replica needs CPUs, and no fewer than 0 GPUs; was given {cpus} and {gpus}")
    if gpus is None:
        gpus = 0 if is_cpu_wheel() else num_devices(engine_args, options)
    return Share(1 if cpus is None else cpus, gpus)


def num_devices(engine_args: Mapping[str, Any], options: Sequence[str] = ()) -> int:
    """GPUs that an engine of these arguments takes: tensor times pipeline parallel."""
    devices = 1
    for key, short in (("tensor_parallel_size", "-tp"), ("pipeline_parallel_size", "-pp")):
        devices *= int(engine_args.get(key) or option(options, f"--{key.replace('_', '-')}", short) or 1)
    return devices


def option(options: Sequence[str], *names: str) -> str | None:
    """Value of an option in arguments as ``vllm serve`` takes them; None if it is absent."""
    for index, argument in enumerate(options):
        name, separator, value = argument.partition("=")
        if name.replace("_", "-") in names:
            return value if separator else next(iter(options[index + 1 : index + 2]), "")
    return None


def check_fits(replicas: int, of: Share, nodes: Sequence[Mapping[str, Any]], may_grow: bool = False) -> None:
    """Refuse replicas that this cluster can never hold, for which Ray would wait for ever.

    Args:
        replicas: number of replicas.
        of: a replica's share.
        nodes: the answer of ``ray.nodes()``.
        may_grow: True if an autoscaler adds nodes: warn instead of refusing.

    Raises:
        ConfigurationError: the replicas do not fit; the message says what every node has, and what to do.
    """
    if replicas < 1:
        raise ConfigurationError(f"at least one replica is needed; was given {replicas}")
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    possible = sum(
        min(int(node.get(name, 0) / each) for name, each in (("CPU", of.cpus), ("GPU", of.gpus)) if each)
        for node in alive
    )
    if possible >= replicas:
        return
    have = "; ".join(f"{node.get('CPU', 0):g} CPUs, {node.get('GPU', 0):g} GPUs" for node in alive) or "none"
    message = (
        f"{replicas} replicas of {of} each were asked for, and this cluster can hold {possible} (its nodes: {have}). "
        "Ask for fewer replicas or for smaller shares (cpus_per_replica, gpus_per_replica), or add nodes."
    )
    if not may_grow:
        raise ConfigurationError(message)
    logger.warning("%s Waiting for the cluster to grow.", message)


def wanted(
    of: Share, machine_cpus: float, engine_args: Mapping[str, Any], options: Sequence[str] = ()
) -> dict[str, str]:
    """Environment variables that an engine should have, without those for settings that are among its arguments.

    Args:
        of: a replica's share.
        machine_cpus: CPUs of its node.
        engine_args, options: the engine's arguments, as a dictionary and as ``vllm serve`` takes them.
    """
    variables = {lifeline.VARIABLE: "1", "TOKENIZERS_PARALLELISM": "false", "VLLM_NO_USAGE_STATS": "1"}
    if of.gpus:
        return variables
    # In its actors Ray sets OMP_NUM_THREADS itself, to the CPUs of the share.
    variables |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(max(1, int(of.cpus)))}
    if not any(key in engine_args or option(options, f"--{key.replace('_', '-')}") for key in _KV_CACHE_KEYS):
        variables["VLLM_CPU_KVCACHE_SPACE"] = str(kv_cache_gib(of, machine_cpus))
    return variables


def prepare(of: Share, machine_cpus: float, engine_args: Mapping[str, Any], options: Sequence[str] = ()) -> None:
    """Set this process's environment for an engine, before vLLM is imported; variables that are set stay as they are.

    The arguments are those of :func:`wanted`.
    """
    if not of.gpus:
        os.environ.update(intel_openmp())
    for name, value in wanted(of, machine_cpus, engine_args, options).items():
        os.environ.setdefault(name, value)


def kv_cache_gib(of: Share, machine_cpus: float) -> int:
    """GiB for the KV cache of a replica on a machine whose CPUs all belong to such replicas, at least 1."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    part = min(1.0, of.cpus / max(machine_cpus, of.cpus))
    return max(1, int(KV_CACHE_SHARE * part * total / _GIB))


def prepare_replica(of: Share, engine_args: Mapping[str, Any], options: Sequence[str] = ()) -> None:
    """Call :func:`prepare` for the node of this Ray actor."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    resources: Mapping[str, float] = next((node["Resources"] for node in ray.nodes() if node["NodeID"] == here), {})
    prepare(of, resources.get("CPU", 1), engine_args, options)


def where_driver_is() -> Any:
    """Scheduling strategy for actors and tasks that must run on this node."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
