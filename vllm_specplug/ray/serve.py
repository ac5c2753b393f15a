"""Replicas over Ray Serve that speak the OpenAI API: each is vLLM's own server without its socket.

A replica starts an ``AsyncLLM`` and builds the application that ``vllm serve`` would serve; Ray Serve hands every
request on to it as it came. Completions, chat, streams, ``n``, seeds, tool calls and ``vllm_xargs`` are therefore
vLLM's, and a seeded request gets the same tokens from every replica.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from vllm_specplug.errors import ConfigurationError
from vllm_specplug.ray import environment, stores
from vllm_specplug.ray.environment import Share

NAME = "specplug"
MAX_ONGOING_REQUESTS = 512
"""Most requests in flight of a replica; with Ray Serve's own default of a few, vLLM's batches would stay small."""
PROXYS_OWN = ("host", "port", "uds", "ssl-keyfile", "ssl-certfile", "ssl-ca-certs", "api-server-count", "headless")
"""Options of ``vllm serve`` about sockets and processes, which Ray Serve takes care of."""

_app: Any = None


@dataclass(frozen=True)
class Job:
    """Settings of the deployment, sent to every replica.

    Attributes:
        model: name of the model, or its folder, which every node must have.
        speculative_config: with absolute paths, see :func:`vllm_specplug.ray.stores.located`.
        engine_args: arguments of ``vllm serve``, by their names in Python.
        options: arguments of ``vllm serve``, as on its command line.
    """

    model: str
    speculative_config: Mapping[str, Any] | None
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    options: Sequence[str] = ()


def deployment(  # noqa: PLR0913 - public, and all but one are keywords
    model: str,
    *,
    speculative_config: Mapping[str, Any] | None = None,
    engine_args: Mapping[str, Any] | None = None,
    options: Sequence[str] = (),
    replicas: int = 1,
    cpus_per_replica: float | None = None,
    gpus_per_replica: float | None = None,
    env: Mapping[str, str] | None = None,
    may_grow: bool = False,
    **settings: Any,
) -> Any:
    """An application for ``ray.serve.run``; connects to Ray, or starts it, if this process has no connection.

    Args:
        model: name of the model, or its folder, which every node must have.
        speculative_config: as vLLM takes it; stores are brought to every node.
        engine_args: further arguments of ``vllm serve`` by their names in Python: ``{"max_model_len": 4096}``.
        options: arguments of ``vllm serve`` as on its command line.
        replicas: number of engines.
        cpus_per_replica: CPUs that Ray reserves for a replica, and its threads on CPUs; by default 1.
        gpus_per_replica: GPUs of a replica; by default those that its engine takes, 0 with vLLM's CPU wheel.
        env: environment variables of the replicas.
        may_grow: True if an autoscaler adds nodes: wait for them.
        settings: options of Ray Serve's deployment, such as ``autoscaling_config`` (then leave ``replicas`` out).

    Raises:
        ConfigurationError: settings are wrong, or the cluster cannot hold the replicas.
    """
    environment.require_ray("serve")
    share = environment.share(cpus_per_replica, gpus_per_replica, engine_args or {}, options)
    job = Job(
        stores.absolute(model), stores.located(speculative_config), dict(engine_args or {}), tuple(options)
    )  # fmt: skip
    _check_options(job)
    import ray
    from ray import serve

    if not ray.is_initialized():
        ray.init()
    environment.check_fits(replicas, share, ray.nodes(), may_grow)
    actor: dict[str, Any] = {"num_cpus": share.cpus, "num_gpus": share.gpus}
    if env:
        actor["runtime_env"] = {"env_vars": dict(env)}
    how: dict[str, Any] = {"max_ongoing_requests": MAX_ONGOING_REQUESTS, "ray_actor_options": actor, **settings}
    if "autoscaling_config" not in settings:
        how["num_replicas"] = replicas
    wrapped = serve.deployment(serve.ingress(_Door())(Server)).options(name=NAME, **how)
    source = stores.start_source(job.speculative_config, is_detached=True)
    return wrapped.bind(job, share, source)


def shutdown(speculative_config: Mapping[str, Any] | None = None) -> None:
    """End Ray Serve with all of its applications, and the actor that serves the stores of this configuration."""
    from ray import serve

    serve.shutdown()
    stores.stop_source(stores.detached_source(speculative_config))


def _check_options(job: Job) -> None:
    names = [each.lstrip("-").partition("=")[0].replace("_", "-") for each in job.options if each.startswith("-")]
    names += [key.replace("_", "-") for key in job.engine_args]
    for name in names:
        if name in PROXYS_OWN:
            raise ConfigurationError(
                f"{name!r} must be left out: Ray Serve has the socket and the processes. Host and port are those of "
                "its proxy (ray.serve.start(http_options=...), or --host and --port of specplug ray-serve)"
            )
        if name in ("model", "speculative-config", "sc"):
            raise ConfigurationError(f"{name!r} is given twice: it has an argument of its own")


class _Door:
    """ASGI application for Ray Serve that hands requests on to the application that the replica builds later."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await _app(scope, receive, send)


class Server:
    """One engine and its application in a replica of Ray Serve.

    Args:
        job: settings of the deployment.
        share: CPUs and GPUs of this replica.
        source: actor that this node fetches missing stores from, see :func:`vllm_specplug.ray.stores.start_source`.
    """

    async def __init__(self, job: Job, share: Share, source: Any) -> None:  # type: ignore[misc] # Ray Serve awaits it
        global _app
        environment.prepare_replica(share, job.engine_args, job.options)
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app
        from vllm.v1.engine.async_llm import AsyncLLM

        arguments = serve_arguments(job, stores.placed(job.speculative_config, source))
        self._engine = AsyncLLM.from_engine_args(
            AsyncEngineArgs.from_cli_args(arguments), stat_loggers=_stat_loggers(arguments)
        )
        tasks = await self._engine.get_supported_tasks()
        app = build_app(arguments, tasks, self._engine.model_config)
        await init_app_state(self._engine, app.state, arguments, tasks)
        _app = app

    async def check_health(self) -> None:
        """Raise if the engine died: Ray Serve calls this from time to time, and replaces such a replica."""
        await self._engine.check_health()

    def __del__(self) -> None:
        if engine := getattr(self, "_engine", None):
            engine.shutdown()


def serve_arguments(job: Job, speculative_config: Mapping[str, Any] | None) -> Any:
    """Arguments of a job, parsed as ``vllm serve`` does.

    Raises:
        ValueError: vLLM does not know an argument, or refuses its value.
    """
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):  # type: ignore[misc]
        def error(self, message: str) -> NoReturn:
            raise ValueError(message)

    arguments = make_arg_parser(Parser()).parse_args([job.model, *job.options])
    arguments.model = job.model
    for name, value in job.engine_args.items():
        if not hasattr(arguments, name):
            raise ValueError(f"vLLM's server has no argument {name!r}")
        setattr(arguments, name, value)
    if speculative_config is not None:
        arguments.speculative_config = dict(speculative_config)
    validate_parsed_serve_args(arguments)
    return arguments


def _stat_loggers(arguments: Any) -> list[Any]:
    """Loggers that put vLLM's own counters on Ray's exporter."""
    if arguments.disable_log_stats:
        return []
    from vllm.v1.metrics.ray_wrappers import RayPrometheusStatLogger

    return [RayPrometheusStatLogger]
