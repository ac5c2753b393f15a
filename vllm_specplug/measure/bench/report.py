"""The report of ``specplug bench``, as a self-contained HTML page, light and dark, or as Markdown."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_specplug.measure.reports import counted, html_table, markdown_table, page

NOTES = (
    "Speed-up: tokens/s over the first configuration's in the same round, median over rounds. Emitted/step: tokens "
    "that a request gains in one engine step (1 without speculation). Acceptance: share of draft tokens that were "
    "kept, by vLLM's own counters. TTFT: from a request's start to its first token; TPOT: time between two tokens of "
    "a request. Identical: share of outputs that are token for token those of the first configuration."
)
HEADINGS = (
    "configuration", "tokens/s", "speed-up", "rounds", "emitted/step", "draft length", "acceptance",
    "TTFT ms, p50", "p95", "TPOT ms, p50", "p95", "identical",
)  # fmt: skip
_BARS = """<style>
.bar{display:grid;grid-template-columns:11rem 1fr 5rem;gap:.6rem;align-items:center;margin:.15rem 0}
.bar i{display:block;height:1rem;border-radius:3px;background:#2a7de1;min-width:1px}.bar .base{background:#8889}
.bar .less{background:#cf222e}.bar b{font-weight:500;text-align:right}
</style>"""


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _ms(percentiles: Mapping[str, float], key: str) -> str:
    return f"{1e3 * percentiles[key]:.2f}" if key in percentiles else "-"


def rows(result: Mapping[str, Any]) -> list[list[str]]:
    """The main table, its heading row first: one row for every configuration."""
    table = [list(HEADINGS)]
    for name, numbers in result["configs"].items():
        low, high = min(numbers["speed_up_rounds"]), max(numbers["speed_up_rounds"])
        table.append(
            [
                name,
                f"{numbers['tokens_per_s']:,.1f}",
                f"{numbers['speed_up']:.2f}x",
                f"{low:.2f}-{high:.2f}",
                f"{numbers['emitted_per_step']:.2f}",
                "-" if numbers["draft_length"] is None else f"{numbers['draft_length']:.1f}",
                _percent(numbers["acceptance"]),
                _ms(numbers["ttft_s"], "p50"),
                _ms(numbers["ttft_s"], "p95"),
                _ms(numbers["tpot_s"], "p50"),
                _ms(numbers["tpot_s"], "p95"),
                _percent(numbers["identical"]),
            ]
        )
    return table


def short_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """The main table with the columns that fit a terminal of 80 characters."""
    chosen = ("configuration", "tokens/s", "speed-up", "emitted/step", "acceptance", "TPOT ms, p50", "identical")
    table = rows(result)
    columns = [table[0].index(heading) for heading in chosen]
    return [[row[column] for column in columns] for row in table]


def category_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """Table of speed-ups and emitted tokens per step by category of prompts, its heading row first."""
    names = list(result["configs"])
    table = [
        ["category", "prompts", *(f"{name}: {what}" for name in names[1:] for what in ("speed-up", "emitted/step"))]
    ]
    first = result["configs"][names[0]]["categories"]
    for category, about in first.items():
        cells = [category, f"{about['num_prompts']}"]
        for name in names[1:]:
            numbers = result["configs"][name]["categories"][category]
            cells += [f"{numbers['speed_up']:.2f}x", f"{numbers['emitted_per_step']:.2f}"]
        table.append(cells)
    return table


def depth_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """Table of the share of drafts whose token is accepted, by position in the draft, its heading row first."""
    drafting = {name: numbers for name, numbers in result["configs"].items() if numbers["acceptance_by_depth"]}
    longest = max((len(numbers["acceptance_by_depth"]) for numbers in drafting.values()), default=0)
    table = [["configuration", *(str(depth + 1) for depth in range(longest))]]
    for name, numbers in drafting.items():
        cells = [_percent(share) for share in numbers["acceptance_by_depth"]]
        table.append([name, *cells, *[""] * (longest - len(cells))])
    return table


def facts(result: Mapping[str, Any]) -> list[list[str]]:
    """Table of what the numbers were measured with, its heading row first."""
    table = [
        ["what", "value"],
        ["command", result["command"]],
        ["model", result["model"]],
        *([f"configuration {name}", json.dumps(config)] for name, config in result["speculative_configs"].items()),
        [
            "prompts",
            f"{counted(result['num_prompts'], 'prompt')} of {result['prompts']}, at most {result['max_tokens']} output "
            f"tokens each, {result['concurrency']} in flight, temperature {result['temperature']:g}, seeds from "
            f"{result['seed']}",
        ],
        ["rounds", f"{result['repeats']}, each with a fresh engine for every configuration, in turn"],
        ["versions", result["versions"]],
        ["machine", result["machine"]],
        ["date", result["date"]],
        ["took", f"{result['seconds']:.0f} s"],
    ]
    table += [[f"failed: {name}", reason] for name, reason in result["failed"].items()]
    return table


def _bars(values: Mapping[str, float], base: str) -> str:
    most = max([*values.values(), 1.0])
    lines = []
    for name, value in values.items():
        kind = "base" if name == base else "less" if value < 1 else ""
        lines.append(
            f"<div class=bar><span>{html.escape(name)}</span><i class='{kind}' style='width:{value / most:.1%}'></i>"
            f"<b>{value:.2f}x</b></div>"
        )
    return "".join(lines)


def to_html(result: Mapping[str, Any]) -> str:
    """The whole report as an HTML page."""
    configs = result["configs"]
    base = next(iter(configs))
    parts = [
        _BARS,
        f"<h1>Speculation side by side: {html.escape(Path(result['model']).name)}</h1>",
        f"<h2>Speed-up over {html.escape(base)}</h2>",
        _bars({name: each["speed_up"] for name, each in configs.items()}, base),
        html_table(rows(result), "numbers"),
        f"<p>{html.escape(NOTES)}</p>",
    ]
    categories = configs[base]["categories"]
    if len(configs) > 1:
        parts += ["<h2>By category</h2>", html_table(category_rows(result), "numbers")]
        if len(categories) > 1:
            for category in categories:
                parts.append(f"<h3>{html.escape(category)}</h3>")
                parts.append(
                    _bars({name: each["categories"][category]["speed_up"] for name, each in configs.items()}, base)
                )
    depths = depth_rows(result)
    if len(depths) > 1:
        parts += [
            "<h2>Acceptance by depth</h2><p>Share of all drafts whose token at this position was accepted.</p>",
            html_table(depths, "numbers"),
        ]
    parts += ["<h2>Measured with</h2>", html_table(facts(result))]
    return page(f"specplug bench of {result['model']}", parts)


def to_markdown(result: Mapping[str, Any]) -> str:
    """The whole report as Markdown."""
    parts = [f"# Speculation side by side: {Path(result['model']).name}", markdown_table(rows(result)), NOTES]
    if len(result["configs"]) > 1:
        parts += ["## By category", markdown_table(category_rows(result))]
    depths = depth_rows(result)
    if len(depths) > 1:
        parts += [
            "## Acceptance by depth",
            "Share of all drafts whose token at this position was accepted.",
            markdown_table(depths),
        ]
    parts += ["## Measured with", markdown_table(facts(result))]
    return "\n\n".join(parts) + "\n"


def write(path: Path, result: Mapping[str, Any]) -> None:
    """Write the report to ``path``: Markdown if its name ends in ``.md``, else HTML."""
    path.write_text(to_markdown(result) if path.suffix == ".md" else to_html(result), encoding="utf-8")
