"""What an audit found, as a page to look at (HTML, self-contained) or as Markdown."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vllm_specplug.audit.run import QUESTIONS

TITLES = {
    "lossless": "Lossless: emitted tokens have the target's distribution",
    "greedy_identical": "Greedy-identical: temperature 0 gives the tokens of vLLM without speculation",
    "drafter_invariant": "Drafter-invariant: a seed gives the same tokens whoever drafts",
}
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;background:#fff;color:#1b1f24}
table{border-collapse:collapse;font-size:13px;display:block;overflow-x:auto}
td,th{border:1px solid #8884;padding:.2rem .5rem;text-align:right}
td:first-child,th:first-child{text-align:left}code,pre{background:#8882;padding:.1rem .3rem;border-radius:3px}
pre{padding:.6rem;overflow-x:auto}.passed{color:#1a7f37}.failed{color:#cf222e}.none{color:#9a6700}
img{max-width:100%;background:#fff;border-radius:4px}
@media(prefers-color-scheme:dark){body{background:#0d1117;color:#e6edf3}
.passed{color:#3fb950}.failed{color:#f85149}.none{color:#d29922}}
"""


def word(answer: Mapping[str, Any]) -> str:
    """``passed``, ``failed`` or ``could not run``."""
    return {True: "passed", False: "failed", None: "could not run"}[answer["passed"]]


def summary(result: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """For each question: its name, the answer, whether it was promised, and the numbers in a sentence."""
    rows = []
    for key in QUESTIONS:
        answer = result["answers"][key]
        if answer["passed"] is None:
            said = answer["why"]
        elif key == "lossless":
            draws = sum(place["draws"] for place in answer["places"])
            said = (
                f"{draws:,} draws at {len(answer['places'])} places, {answer['num_hypotheses']} exact tests, "
                f"{len(answer['rejected'])} rejected (chance of a false alarm {answer['alpha']:g})"
            )
            if answer["wrong_rows"]:
                said += f"; {len(answer['wrong_rows'])} places with other logits than an ordinary step"
            if answer["power"] is not None:
                caught = "caught" if answer["power"]["caught"] else "NOT caught: take more draws"
                said += f"; a verifier with {answer['power']['bias']:.0%} bias would be {caught}"
        else:
            said = (
                f"{answer['num_identical']} of {answer['num_requests']} requests identical to {answer['reference']}, "
                f"{answer['num_near_ties']} near-ties (margin at most {answer['near_tie_bound']:g})"
            )
        rows.append((key.replace("_", "-"), word(answer), "" if result["promised"][key] else "not promised", said))
    return rows


def _plots(places: Sequence[Mapping[str, Any]]) -> str:
    """PNG of shares against probabilities for every place, base64."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(4, len(places))
    lines = -(-len(places) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(3.4 * columns, 3.2 * lines), squeeze=False)
    for axis in axes.flat[len(places) :]:
        axis.axis("off")
    for axis, place in zip(axes.flat, places, strict=False):
        expected, emitted = np.array(place["expected"]), np.array(place["emitted"])
        floor = 0.5 / place["draws"]
        line = np.geomspace(floor, 1, 100)
        spread = 4 * np.sqrt(line * (1 - line) / place["draws"])
        axis.fill_between(
            line, np.maximum(line - spread, floor), line + spread, color="#1f6fb4", alpha=0.2, linewidth=0
        )
        axis.plot(line, line, color="#1f6fb4", lw=0.8)
        outside = np.abs(emitted - expected) > 5 * np.sqrt(expected * (1 - expected) / place["draws"]) + 1e-12
        for chosen, colour in ((~outside, "#333333"), (outside, "#cf222e")):
            axis.scatter(
                np.maximum(expected, floor)[chosen], np.maximum(emitted, floor)[chosen], s=6, color=colour, linewidths=0
            )
        axis.set(xscale="log", yscale="log", xlim=(floor, 1.2), ylim=(floor, 1.2))
        axis.set_title(f"{place['place']}\n{place['draws']:,} draws", fontsize=8)
        axis.tick_params(labelsize=7)
    figure.supxlabel("target's probability of a token", fontsize=9)
    figure.supylabel("share of draws", fontsize=9)
    figure.tight_layout()
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    pyplot.close(figure)
    return base64.b64encode(out.getvalue()).decode()


def _place_rows(places: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    head = [
        "place", "draws", "draft accepted", "expected", "standard deviation", "expected", "logits off by",
        "p accepted", "p token", "p all tokens",
    ]  # fmt: skip
    rows = [head]
    for place in places:
        share = "-" if place["accepted"] is None else f"{place['accepted']:.5f}"
        chance = "-" if place["accept_chance"] is None else f"{place['accept_chance']:.5f}"
        p_values = (place["p_values"].get(test) for test in ("accepted", "token", "all tokens"))
        rows.append(
            [
                place["place"],
                f"{place['draws']:,}",
                share,
                chance,
                f"{place['deviation']:.2e}",
                f"{place['expected_deviation']:.2e}",
                f"{place['row_gap']:.1e}",
                *("-" if value is None else f"{value:.2g}" for value in p_values),
            ]
        )
    return rows


def _example_rows(examples: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    rows = [["request", "position", "reference", "audited", "margin there", "margin here", "what"]]
    for each in examples:
        margins = [
            "unknown" if each[key] is None else f"{each[key]:.3g}" for key in ("margin_reference", "margin_audited")
        ]
        what = "near-tie" if each["near_tie"] else "bug"
        rows.append([str(each["request"]), str(each["position"]), each["reference"], each["audited"], *margins, what])
    return rows


def _html_table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in body)
    return f"<table><tr>{cells}</tr>{lines}</table>"


def _markdown_table(rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    head, *body = rows
    return "\n".join([line(head), line(["---", *["---:"] * (len(head) - 1)]), *map(line, body)])


def _facts(result: Mapping[str, Any]) -> list[list[str]]:
    about = result["about"]
    config = json.dumps(result["speculative_config"]) if result["speculative_config"] else "none"
    return [
        ["what", "value"],
        ["command", result["command"]],
        ["model", str(result["model"])],
        ["speculative_config", config],
        [
            "engine",
            f"runner {about['runner']}, {about['device']}, {about['dtype']}, vocabulary {about['vocab_size']:,}",
        ],
        ["temperature", f"{result['temperature']:g}"],
        ["versions", result["versions"]],
        ["machine", result["machine"]],
        ["date", result["date"]],
    ]


def _lossless_notes(answer: Mapping[str, Any]) -> list[str]:
    notes = [
        f"{each['place']}, {each['test']}: p = {each['p_value']:.2g}; {each['says']}" for each in answer["rejected"]
    ]
    notes += answer["wrong_rows"]
    if (power := answer["power"]) is not None:
        at = power["at"][0]["place"] if power["at"] else "nowhere"
        notes.append(
            f"power: the same draws, with {power['bias']:.0%} of the rejected draft tokens accepted, are "
            f"{'caught' if power['caught'] else 'NOT caught'} ({at})"
        )
    if answer["is_redrawn"]:
        notes.append("the drafter hands over its distribution: draft tokens were drawn from it anew each time")
    return notes


def to_html(result: Mapping[str, Any]) -> str:
    """The whole page, plots included."""
    verdict = result["verdict"]
    kind = {"passed": "passed", "failed": "failed"}.get(verdict, "none")
    parts = [
        f"<h1>Audit: <span class={kind}>{verdict}</span></h1>",
        _html_table(_facts(result)),
        "<h2>Answers</h2>",
        _html_table([["question", "answer", "", "numbers"], *map(list, summary(result))]),
    ]
    for key in QUESTIONS:
        answer = result["answers"][key]
        parts.append(f"<h2>{TITLES[key]}</h2>")
        if answer["passed"] is None:
            parts.append(f"<p>{html.escape(answer['why'])}</p>")
        elif key == "lossless":
            parts += [f"<p>{html.escape(note)}</p>" for note in _lossless_notes(answer)]
            parts.append(
                f'<img alt="shares against probabilities" src="data:image/png;base64,{_plots(answer["places"])}">'
            )
            parts.append(
                "<p>Share of draws against the target's probability, a dot a token (the 200 most likely); the band is "
                "four standard deviations wide on either side, dots beyond five are red.</p>"
            )
            parts.append(_html_table(_place_rows(answer["places"])))
        elif answer["examples"]:
            parts.append(_html_table(_example_rows(answer["examples"])))
        else:
            parts.append(f"<p>All {answer['num_requests']} requests are identical, token for token.</p>")
    title = html.escape(f"specplug audit of {result['model']}")
    return (
        '<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">'
        f"<title>{title}</title><style>{_STYLE}</style>{''.join(parts)}</html>\n"
    )


def to_markdown(result: Mapping[str, Any]) -> str:
    """The same without plots."""
    parts = [
        f"# Audit: {result['verdict']}",
        _markdown_table(_facts(result)),
        _markdown_table([["question", "answer", "", "numbers"], *map(list, summary(result))]),
    ]
    for key in QUESTIONS:
        answer = result["answers"][key]
        parts.append(f"## {TITLES[key]}")
        if answer["passed"] is None:
            parts.append(answer["why"])
        elif key == "lossless":
            parts.append("\n".join(f"* {note}" for note in _lossless_notes(answer)))
            parts.append(_markdown_table(_place_rows(answer["places"])))
        elif answer["examples"]:
            parts.append(_markdown_table(_example_rows(answer["examples"])))
        else:
            parts.append(f"All {answer['num_requests']} requests are identical, token for token.")
    return "\n\n".join(part for part in parts if part) + "\n"


def write(path: Path, result: Mapping[str, Any]) -> None:
    """HTML, or Markdown where the name ends in ``.md``."""
    path.write_text(to_markdown(result) if path.suffix == ".md" else to_html(result))
