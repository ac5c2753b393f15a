"""``specplug top``: a running server's speculation, live in the terminal."""

from __future__ import annotations

import http.client
import math
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import typer
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from vllm_specplug.errors import SpecplugError

app = typer.Typer(rich_markup_mode="markdown", add_completion=False)

TIMEOUT_S = 5.0
BARS = "▁▂▃▄▅▆▇█"
HISTORY = 60
"""Length of the curve of tokens/s, in intervals."""

Labels = frozenset[tuple[str, str]]


@dataclass(frozen=True)
class Sample:
    """The values of ``/metrics`` at one moment.

    Attributes:
        at: time in seconds, monotonic.
        values: value by name and labels; names from Ray's exporter are spelt as on vLLM's ``/metrics``.
    """

    at: float
    values: Mapping[tuple[str, Labels], float]

    def all(self, name: str, **labels: str) -> list[float]:
        """The values of all series with this name and these labels, one for each engine."""
        wanted = set(labels.items())
        return [value for (found, has), value in self.values.items() if found == name and wanted <= has]

    def sum(self, name: str, **labels: str) -> float:
        """Sum of all series with this name and these labels."""
        return sum(self.all(name, **labels))

    def highest(self, name: str) -> float:
        """Largest value of all series with this name; 0 if there is none."""
        return max(self.all(name), default=0.0)

    def names(self, label: str) -> list[str]:
        """All values that a label has in this plugin's series."""
        found = {
            value
            for name, labels in self.values
            if name.startswith("specplug_")
            for key, value in labels
            if key == label
        }
        return sorted(found)


def parse(text: str, at: float) -> Sample:
    """A sample from the text of ``/metrics``, vLLM's or Ray's."""
    values: dict[tuple[str, Labels], float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = sample.name.removeprefix("ray_")
            if name.startswith("vllm_"):
                name = "vllm:" + name.removeprefix("vllm_")
            if name.startswith(("specplug_", "vllm:")):
                values[name, frozenset(sample.labels.items())] = sample.value
    return Sample(at, values)


def fetch(url: str) -> Sample:
    """Fetch a sample from a server.

    Raises:
        SpecplugError: nothing answers at ``url``, or the answer is not Prometheus metrics.
    """
    try:
        with urllib.request.urlopen(f"{url}/metrics", timeout=TIMEOUT_S) as answer:
            text = answer.read().decode()
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise SpecplugError(f"{url}/metrics: {reason}. Is the server up, and is this its address?") from error
    try:
        return parse(text, time.monotonic())
    except ValueError as error:
        raise SpecplugError(f"{url}/metrics does not answer with Prometheus metrics: {error}") from error


def rate(now: Sample, before: Sample | None, name: str, **labels: str) -> float:
    """Increase of a counter a second; NaN for the first sample and after a restart of the server."""
    if before is None or now.at <= before.at:
        return math.nan
    grown = now.sum(name, **labels) - before.sum(name, **labels)
    return grown / (now.at - before.at) if grown >= 0 else math.nan


def curve(values: deque[float]) -> str:
    """Values as a line of bar characters; the largest value is as high as the line."""
    known = [value for value in values if not math.isnan(value)]
    most = max(known, default=0.0)
    if not most:
        return ""
    return "".join(" " if math.isnan(v) else BARS[min(len(BARS) - 1, int(v / most * len(BARS)))] for v in values)


def number(value: float, digits: int = 1) -> str:
    """A number with its thousands set apart; ``-`` if it is NaN."""
    return "-" if math.isnan(value) else f"{value:,.{digits}f}"


def share(part: float, whole: float) -> str:
    """``part`` of ``whole`` as a percentage; ``-`` if ``whole`` is 0."""
    return f"{part / whole:.1%}" if whole > 0 else "-"


def size(num_bytes: float) -> str:
    """A number of bytes as text with a unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024 or unit == "GiB":
            break
        num_bytes /= 1024
    return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"


def window(now: Sample, before: Sample | None, name: str, **labels: str) -> float:
    """Growth of a counter since ``before``, or since the start of the server if ``before`` is None."""
    if before is None:
        return now.sum(name, **labels)
    return max(0.0, now.sum(name, **labels) - before.sum(name, **labels))


def proposers_table(now: Sample, before: Sample | None) -> Table:
    """Table with one row for each proposer."""
    table = Table(box=None, padding=(0, 2), header_style="bold")
    table.add_column("proposer")
    for heading in ("drafted", "accepted", "rate", "chosen", "ms a step", "errors", "memory"):
        table.add_column(heading, justify="right")
    steps = window(now, before, "specplug_steps_total")
    chosen = window(now, before, "specplug_proposer_chosen_drafts_total")
    for name in now.names("proposer"):

        def of(series: str, name: str = name) -> float:
            return window(now, before, f"specplug_proposer_{series}_total", proposer=name)

        drafted, accepted = of("drafted_tokens"), of("accepted_tokens")
        is_active = min(now.all("specplug_proposer_active", proposer=name), default=1.0) > 0
        table.add_row(
            Text(name) if is_active else Text(f"{name} ({left_out(now, name)})", style="red"),
            f"{drafted:,.0f}",
            f"{accepted:,.0f}",
            share(accepted, drafted),
            share(of("chosen_drafts"), chosen),
            number(1e3 * of("seconds") / steps, 3) if steps else "-",
            f"{now.sum('specplug_proposer_errors_total', proposer=name):,.0f}",
            size(now.sum("specplug_proposer_memory_bytes", proposer=name)),
        )
    return table


def left_out(now: Sample, name: str) -> str:
    """Says that a proposer is left out, and why."""
    return "left out: no answer in time" if now.sum("specplug_proposer_late_total", proposer=name) else "left out"


def stores_table(now: Sample, before: Sample | None) -> Table:
    """Table with one row for each token store."""
    table = Table(box=None, padding=(0, 2), header_style="bold")
    table.add_column("store")
    for heading in ("tokens", "size", "lookups", "hits"):
        table.add_column(heading, justify="right")
    for name in now.names("store"):
        lookups = window(now, before, "specplug_store_lookups_total", store=name)
        hits = window(now, before, "specplug_store_hits_total", store=name)
        table.add_row(
            Text(name),
            f"{now.sum('specplug_store_tokens', store=name):,.0f}",
            size(now.sum("specplug_store_bytes", store=name)),
            f"{lookups:,.0f}",
            share(hits, lookups),
        )
    return table


def view(url: str, now: Sample, before: Sample | None, curve_of: deque[float], trouble: str = "") -> RenderableType:
    """The whole screen; if ``before`` is None, its figures count from the start of the server."""
    emitted = window(now, before, "specplug_emitted_tokens_total")
    request_steps = window(now, before, "specplug_request_steps_total")
    is_paused = now.highest("specplug_paused") > 0
    if trouble:
        state = Text(trouble, style="red")
    elif is_paused:
        state = Text("paused: drafts do not pay now", style="yellow")
    else:
        state = Text("drafting", style="green")
    facts = Table.grid(padding=(0, 3))
    facts.add_row(
        Text.assemble("speculation: ", state),
        f"running {now.sum('vllm:num_requests_running'):.0f}, waiting {now.sum('vllm:num_requests_waiting'):.0f}",
        f"KV cache {now.highest('vllm:kv_cache_usage_perc'):.0%}",
    )
    verify_steps = window(now, before, "specplug_verify_steps_total")
    verify = 1e3 * window(now, before, "specplug_verify_seconds_total") / verify_steps if verify_steps else math.nan
    facts.add_row(
        f"tokens/s {number(rate(now, before, 'specplug_emitted_tokens_total'))}",
        f"tokens a request and step {number(emitted / request_steps if request_steps else math.nan, 2)}",
        f"verifying step {number(verify, 2)} ms",
    )
    if now.sum("specplug_forks_total"):
        forks = window(now, before, "specplug_forks_total")
        facts.add_row(
            f"chains beyond the first {forks:,.0f}",
            f"got further {share(window(now, before, 'specplug_fork_wins_total'), forks)}",
            f"tokens through them {window(now, before, 'specplug_fork_gain_total'):,.0f}",
        )
    parts: list[RenderableType] = [facts]
    if line := curve(curve_of):
        parts.append(Text(line, style="cyan"))
    parts += [Text(), proposers_table(now, before)]
    if now.names("store"):
        parts += [Text(), stores_table(now, before)]
    since = "since the server started" if before is None else f"last {now.at - before.at:.1f} s"
    models = ", ".join(now.names("model_name"))
    return Panel(Group(*parts), title=Text(f"specplug top: {models} at {url}"), subtitle=since, title_align="left")


def check_plugin(url: str, sample: Sample) -> None:
    """Raise :class:`SpecplugError` if the server does not speculate with this plugin."""
    if not any(name.startswith("specplug_") for name, _ in sample.values):
        raise SpecplugError(
            f"{url}/metrics has no specplug_ series: start the server with "
            '--speculative-config \'{"method": "specplug"}\'.'
        )


@app.command()
def top(
    url: Annotated[str, typer.Argument(help="Address of the server, or of Ray's metrics exporter.")] = (
        "http://127.0.0.1:8000"
    ),
    interval: Annotated[float, typer.Option(min=0.1, max=3600.0, help="Seconds between two looks.")] = 2.0,
    once: Annotated[
        bool, typer.Option("--once", help="Print what happened since the server started, and end.")
    ] = False,
) -> None:
    """Watch the speculation of a running server: who drafts, what is accepted, what it costs. Ctrl-C ends it.

    Example: specplug top http://127.0.0.1:8000
    """
    url = url.rstrip("/").removesuffix("/metrics")
    if "://" not in url:
        url = f"http://{url}"
    if not url.startswith(("http://", "https://")):
        raise SpecplugError(f"{url!r} is no address of a server: http://HOST:PORT, by default http://127.0.0.1:8000")
    console = Console()
    tokens_per_s: deque[float] = deque(maxlen=HISTORY)
    now, before = fetch(url), None
    check_plugin(url, now)
    if once:
        console.print(view(url, now, None, tokens_per_s))
        return
    try:
        with Live(view(url, now, None, tokens_per_s), console=console, screen=console.is_terminal) as live:
            while True:
                time.sleep(interval)
                try:
                    before, now = now, fetch(url)
                except SpecplugError as error:
                    live.update(view(url, now, None, tokens_per_s, f"no answer ({error.__cause__})"), refresh=True)
                    continue
                tokens_per_s.append(rate(now, before, "specplug_emitted_tokens_total"))
                live.update(view(url, now, before, tokens_per_s), refresh=True)
    except KeyboardInterrupt:
        return
