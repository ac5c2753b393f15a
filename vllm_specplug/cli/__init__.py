"""The ``specplug`` command, one file a subcommand.

This module imports nothing heavy, and each subcommand imports what it needs when it runs: ``specplug --help`` must
not wait for torch, vLLM or numba.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from vllm_specplug import __version__
from vllm_specplug.cli import demo, serve
from vllm_specplug.errors import SpecplugError

EXIT_BAD_INPUT = 2

app = typer.Typer(
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


app.command(name="demo")(demo.demo)
app.command(name="serve", context_settings=serve.CONTEXT_SETTINGS)(serve.serve)


@app.command(
    name="datastore",
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
def datastore(
    arguments: Annotated[list[str] | None, typer.Argument(metavar="COMMAND [ARGS]...")] = None,
) -> None:
    """Build, inspect, check and try token stores: the text that drafts are looked up in.

    Example: specplug datastore build code.specstore src/ --glob '*.py' --tokenizer MODEL
    """
    # A typer app of its own, behind a command that hands everything on: add_typer would have to import it (and with
    # it numba) for every other subcommand.
    from vllm_specplug.cli.datastore import app as datastore_app

    datastore_app(args=arguments or [], prog_name="specplug datastore")


@app.command(
    name="replay",
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
def replay(
    arguments: Annotated[list[str] | None, typer.Argument(metavar="[OPTIONS] FILES...")] = None,
) -> None:
    """See how far the drafts of proposers get in text that is already written, without an engine.

    Example: specplug replay --tokenizer MODEL --proposers suffix,rest,ensemble --datastore code.specstore src/
    """
    from vllm_specplug.cli.replay import app as replay_app  # imports numba, as datastore does

    replay_app(args=arguments or [], prog_name="specplug replay")


@app.command(
    name="couple",
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
def couple(arguments: Annotated[list[str] | None, typer.Argument(metavar="[OPTIONS]...")] = None) -> None:
    """Measure how often target and draft agree under each coupling, against the distance of the two.

    Example: specplug couple --csv couple.csv --png couple.png
    """
    from vllm_specplug.cli.couple import app as couple_app

    couple_app(args=arguments or [], prog_name="specplug couple")


@app.command(
    name="bench",
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
def bench(arguments: Annotated[list[str] | None, typer.Argument(metavar="MODEL [OPTIONS]...")] = None) -> None:
    """Compare speculation configurations, this plugin's, vLLM's own or none, on the same prompts.

    Example: specplug bench MODEL --datastore code.specstore --report bench.html
    """
    from vllm_specplug.cli.bench import app as bench_app

    bench_app(args=arguments or [], prog_name="specplug bench")


@app.command(
    name="tune",
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
def tune(arguments: Annotated[list[str] | None, typer.Argument(metavar="MODEL [OPTIONS]...")] = None) -> None:
    """Find the proposers, draft length and token store that serve your prompts best.

    Example: specplug tune MODEL --prompts mine.jsonl --concurrency 8 --datastore code.specstore
    """
    from vllm_specplug.cli.tune import app as tune_app

    tune_app(args=arguments or [], prog_name="specplug tune")


@app.command(
    name="top",
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
def top(arguments: Annotated[list[str] | None, typer.Argument(metavar="[URL] [OPTIONS]...")] = None) -> None:
    """Watch the speculation of a running server, live in the terminal.

    Example: specplug top http://127.0.0.1:8000
    """
    from vllm_specplug.cli.top import app as top_app

    top_app(args=arguments or [], prog_name="specplug top")


@app.command(
    name="audit",
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
def audit(arguments: Annotated[list[str] | None, typer.Argument(metavar="MODEL [OPTIONS]...")] = None) -> None:
    """Audit a configuration of vLLM: lossless, greedy-identical, drafter-invariant?

    Example: specplug audit MODEL --speculative-config '{"method": "specplug"}' --report audit.html
    """
    from vllm_specplug.cli.audit import app as audit_app

    audit_app(args=arguments or [], prog_name="specplug audit")


@app.command(
    name="batch",
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
def batch(
    arguments: Annotated[list[str] | None, typer.Argument(metavar="INPUTS... --out DIR --model MODEL")] = None,
) -> None:
    """Complete files of prompts with replicas on Ray: Parquet out, and resumable.

    Example: specplug batch prompts.jsonl --out done --model MODEL --replicas 2 --max-tokens 256
    """
    from vllm_specplug.cli.batch import app as batch_app

    batch_app(args=arguments or [], prog_name="specplug batch")


@app.command(
    name="ray-serve",
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
def ray_serve(arguments: Annotated[list[str] | None, typer.Argument(metavar="MODEL [OPTIONS]...")] = None) -> None:
    """Serve a model with replicas on Ray Serve, behind one address that speaks the OpenAI API.

    Example: specplug ray-serve MODEL --replicas 2 --speculative-config '{"method": "specplug"}'
    """
    from vllm_specplug.cli.ray_serve import app as ray_serve_app

    ray_serve_app(args=arguments or [], prog_name="specplug ray-serve")


def main() -> None:
    """Entry point of the ``specplug`` script: errors made on purpose become one line and exit status 2."""
    try:
        app()
    except SpecplugError as error:
        Console(stderr=True).print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True, highlight=False)
        sys.exit(EXIT_BAD_INPUT)
