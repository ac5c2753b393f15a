"""Ready settings for Ray's own LLM libraries, ``ray.data.llm`` and ``ray.serve.llm``, with this plugin inside.

Both run vLLM engines by themselves. Without these settings they wait on CPUs for a GPU for ever, pin all replicas to
the same cores and reserve all memory twice.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_specplug.engines.environment import intel_openmp
from vllm_specplug.ray import environment, stores

STAGE_CPUS = 0.01
"""CPUs of a stage around the engine. By default a stage takes a whole CPU, and waits for ever if engines hold all."""


def data_llm(
    model: str,
    *,
    speculative_config: Mapping[str, Any] | None = None,
    engine_args: Mapping[str, Any] | None = None,
    replicas: int = 1,
    cpus_per_replica: float | None = None,
    gpus_per_replica: float | None = None,
    env: Mapping[str, str] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Keyword arguments of ``ray.data.llm.vLLMEngineProcessorConfig``.

    On CPUs give ``build_processor`` the arguments ``preprocess_map_kwargs={"num_cpus": STAGE_CPUS}`` and
    ``postprocess_map_kwargs`` likewise: that class does not set them, and their stages wait for a whole CPU too.

    Args:
        model, speculative_config: as vLLM takes them; every node needs folders and stores at the same paths.
        engine_args: further arguments of vLLM's engine.
        replicas: number of engines.
        cpus_per_replica, gpus_per_replica: see :func:`vllm_specplug.ray.batch.generate`.
        env: environment variables of the engines.
        settings: further arguments of that class; they take precedence.
    """
    share = environment.share(cpus_per_replica, gpus_per_replica, engine_args or {})
    config: dict[str, Any] = {
        "model_source": stores.absolute(model),
        "engine_kwargs": _engine_args(speculative_config, engine_args),
        "concurrency": replicas,
        "runtime_env": {"env_vars": _variables(share, engine_args or {}, env)},
    }
    if not share.gpus:
        config["accelerator_type"] = None
        config |= {f"{stage}_stage": {"num_cpus": STAGE_CPUS} for stage in ("chat_template", "tokenize", "detokenize")}
        config["placement_group_config"] = {"bundles": [{"CPU": share.cpus}]}
        config["engine_kwargs"].setdefault("distributed_executor_backend", "mp")
    return {**config, **settings}


def serve_llm(
    model: str,
    *,
    model_id: str | None = None,
    speculative_config: Mapping[str, Any] | None = None,
    engine_args: Mapping[str, Any] | None = None,
    replicas: int = 1,
    cpus_per_replica: float | None = None,
    gpus_per_replica: float | None = None,
    env: Mapping[str, str] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Keyword arguments of ``ray.serve.llm.LLMConfig``; for all arguments but ``model_id`` see :func:`data_llm`.

    On CPUs give ``build_openai_app`` ``{"ingress_deployment_config": {"ray_actor_options": {"num_cpus": STAGE_CPUS}}}``
    beside the configurations: the ingress takes a whole CPU by default, and waits for ever if engines hold all.

    Args:
        model_id: name that clients ask for; by default the last part of ``model``.
    """
    share = environment.share(cpus_per_replica, gpus_per_replica, engine_args or {})
    config: dict[str, Any] = {
        "model_loading_config": {"model_id": model_id or Path(model).name, "model_source": stores.absolute(model)},
        "engine_kwargs": _engine_args(speculative_config, engine_args),
        "deployment_config": {"num_replicas": replicas},
        "runtime_env": {"env_vars": _variables(share, engine_args or {}, env)},
    }
    if not share.gpus:
        config["accelerator_config"] = {"kind": "cpu"}
        config["deployment_config"]["ray_actor_options"] = {"num_cpus": 0}  # Ray adds the CPUs of the bundle
        config["placement_group_config"] = {"bundles": [{"CPU": share.cpus}]}
        config["engine_kwargs"].setdefault("distributed_executor_backend", "mp")
    return {**config, **settings}


def _engine_args(speculative_config: Mapping[str, Any] | None, engine_args: Mapping[str, Any] | None) -> dict[str, Any]:
    arguments = dict(engine_args or {})
    if config := stores.located(speculative_config):
        arguments["speculative_config"] = config
    return arguments


def _variables(
    share: environment.Share, engine_args: Mapping[str, Any], env: Mapping[str, str] | None
) -> dict[str, str]:
    """Environment variables of an engine: ``env``, then those of this process, then defaults for its share."""
    wanted = environment.wanted(share, float(os.cpu_count() or 1), engine_args)
    variables = {name: os.environ.get(name, value) for name, value in wanted.items()}
    return {**variables, **({} if share.gpus else intel_openmp()), **(env or {})}
