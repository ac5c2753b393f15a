"""``specplug ray-serve``: replicas on Ray Serve behind one address."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vllm_specplug.cli.clusters import connect, released
from vllm_specplug.cli.options import json_object
from vllm_specplug.errors import SpecplugError
from vllm_specplug.ray.environment import require_ray

app = typer.Typer(rich_markup_mode="markdown", add_completion=False)

ENDING = (signal.SIGINT, signal.SIGTERM)


@app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def ray_serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder or name of the model.", metavar="MODEL", show_default=False)],
    speculative_config: Annotated[str | None, typer.Option(help="JSON, as vLLM takes it.", show_default=False)] = None,
    replicas: Annotated[int, typer.Option(help="Engines.", min=1)] = 1,
    cpus_per_replica: Annotated[
        float | None, typer.Option(help="CPUs that Ray sets aside for each. [default: 1]", show_default=False)
    ] = None,
    gpus_per_replica: Annotated[
        float | None, typer.Option(help="GPUs of each. [default: what the engine takes]", show_default=False)
    ] = None,
    host: Annotated[str, typer.Option(help="Address that is listened on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port that is listened on.", min=1, max=65535)] = 8000,
    address: Annotated[
        str | None,
        typer.Option(help="Of a running Ray cluster, or auto; without it one on this machine.", show_default=False),
    ] = None,
    temp_dir: Annotated[
        Path | None, typer.Option(help="For the files of a cluster that is started, its logs too.", show_default=False)
    ] = None,
    metrics_port: Annotated[
        int | None,
        typer.Option(
            help="Of Ray's Prometheus exporter, for a cluster that is started.", min=1, max=65535, show_default=False
        ),
    ] = None,
    may_grow: Annotated[
        bool, typer.Option("--may-grow", help="The cluster has an autoscaler: wait for nodes.")
    ] = False,
) -> None:
    """Serve a model with several engines: completions, chat and everything else of vLLM's server, on one address.

    All other options are those of vllm serve (--dtype, --max-model-len, --served-model-name, ...) and reach every
    replica. A seeded request gets the same tokens from each of them. A replica that dies is replaced; requests that it
    had fail and can be sent again. Ends with Ctrl-C or SIGTERM, the replicas too.

    Example: specplug ray-serve MODEL --replicas 2 --speculative-config '{"method": "specplug"}'
    """
    from vllm_specplug.ray.serve import NAME, deployment, shutdown

    console = Console(stderr=True)
    require_ray("serve")
    config = json_object("--speculative-config", speculative_config)
    with released():
        _end_on_signals()
        connect(address, temp_dir, metrics_port)
        _end_on_signals()  # again, since Ray sets a handler of its own, which aborts while replicas start
        from ray import serve

        try:
            application = deployment(
                model,
                speculative_config=config,
                options=context.args,
                replicas=replicas,
                cpus_per_replica=cpus_per_replica,
                gpus_per_replica=gpus_per_replica,
                may_grow=may_grow,
            )
            serve.start(http_options={"host": host, "port": port})
            serve.run(application, name=NAME, route_prefix="/")
            console.print(
                f"{replicas} replicas at http://{host}:{port}/v1", highlight=False, soft_wrap=True, markup=False
            )
            threading.Event().wait()
        except RuntimeError as error:  # what Ray raises for a deployment that does not start
            raise SpecplugError(f"the replicas did not start: {error}") from error
        except KeyboardInterrupt:
            for number in ENDING:
                signal.signal(number, signal.SIG_IGN)
            shutdown(config)


def _end_on_signals() -> None:
    """Let SIGINT and SIGTERM raise KeyboardInterrupt in the main thread."""
    for number in ENDING:
        signal.signal(number, signal.default_int_handler)
