"""The ``specplug`` command, with one module for each subcommand.

This module imports nothing heavy: ``specplug --help`` must not wait for torch, vLLM or numba.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from vllm_specplug import __version__
from vllm_specplug.cli.errors import EXIT_BAD_INPUT, show_error
from vllm_specplug.cli.lazy import lazy_group
from vllm_specplug.errors import SpecplugError

COMMANDS = {
    "demo": (
        "vllm_specplug.cli.demo",
        "See what specplug does on this machine: three engines, the same prompts, one table. No network is used.",
    ),
    "serve": ("vllm_specplug.cli.serve", "Serve a model over HTTP: vllm serve, with all of its arguments."),
    "datastore": (
        "vllm_specplug.cli.datastore",
        "Build, inspect, check and try token stores: the text that drafts are looked up in.",
    ),
    "replay": (
        "vllm_specplug.cli.replay",
        "See how far the drafts of proposers get in text that is already written, without an engine.",
    ),
    "couple": (
        "vllm_specplug.cli.couple",
        "Measure how often target and draft agree under each coupling, against the distance of the two.",
    ),
    "bench": (
        "vllm_specplug.cli.bench",
        "Compare speculation configurations, this plugin's, vLLM's own or none, on the same prompts.",
    ),
    "tune": (
        "vllm_specplug.cli.tune",
        "Find the proposers, draft length and token store that serve your prompts best.",
    ),
    "top": ("vllm_specplug.cli.top", "Watch the speculation of a running server, live in the terminal."),
    "audit": (
        "vllm_specplug.cli.audit",
        "Audit a configuration of vLLM: lossless, greedy-identical, drafter-invariant?",
    ),
    "batch": (
        "vllm_specplug.cli.batch",
        "Complete files of prompts with replicas on Ray: Parquet out, and resumable.",
    ),
    "ray-serve": (
        "vllm_specplug.cli.ray_serve",
        "Serve a model with replicas on Ray Serve, behind one address that speaks the OpenAI API.",
    ),
}
"""Module and summary of each subcommand."""

app = typer.Typer(
    cls=lazy_group(COMMANDS),
    name="specplug",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="markdown",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"vllm-specplug {__version__}")
        raise typer.Exit


@app.callback()
def root(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Speculative decoding for vLLM: any drafter, and for a given seed the same tokens as without it.

    Try it on this machine with **specplug demo**; serve a model with **specplug serve** (or
    **vllm serve**); make a token store of your own text with **specplug datastore build**.
    """


def main() -> None:
    """Entry point of the ``specplug`` script: errors made on purpose become one line and exit status 2."""
    try:
        app()
    except SpecplugError as error:
        show_error(error)
        sys.exit(EXIT_BAD_INPUT)
