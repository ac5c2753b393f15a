"""The report of an audit, as a self-contained HTML page or as Markdown."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vllm_specplug.measure.audit.asked import QUESTIONS
from vllm_specplug.measure.audit.statistics import two_sided
from vllm_specplug.measure.reports import counted, html_table, markdown_table, page

SURPRISING = 1e-6
"""Binomial p-value below which a token's dot in a plot is red, about that of five standard deviations."""

TITLES = {
    "lossless": "Lossless: emitted tokens have the target's distribution",
    "greedy_identical": "Greedy-identical: temperature 0 gives the tokens of vLLM without speculation",
    "drafter_invariant": "Drafter-invariant: a seed gives the same tokens whoever drafts",
}
COLUMNS = (
    "RMS deviation: root mean square, weighted by probability, of share of draws minus the target's probability, and "
    "what chance alone makes of it. Logits off by: largest difference to the log-probabilities of an ordinary step. p: "
    "p-values of the number of accepted draft tokens, of the most surprising token, and of all tokens together."
)


def word(answer: Mapping[str, Any]) -> str:
    """The answer to one question in a word: ``passed``, ``failed`` or ``could not run``."""
    return {True: "passed", False: "failed", None: "could not run"}[answer["passed"]]


def summary(result: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """For each question: its name, the answer, whether it was promised, and the numbers in a sentence."""
    rows = []
    for key in QUESTIONS:
        answer = result["answers"][key]
        if answer["passed"] is None:
            said = answer["why"]
        elif key == "lossless":
            said = _lossless_sentence(answer)
        else:
            said = (
                f"{answer['num_identical']} of {counted(answer['num_requests'], 'request')} identical to "
                f"{answer['reference']}, {counted(answer['num_near_ties'], 'near-tie')} (margins of at most "
                f"{answer['near_tie_bound']:g}), {counted(answer['num_unexplained'], 'unexplained difference')}"
            )
        promised = "promised" if result["promised"][key] else "not promised"
        rows.append((key.replace("_", "-"), word(answer), promised, said))
    return rows


def _lossless_sentence(answer: Mapping[str, Any]) -> str:
    places = answer["places"]
    said = (
        f"{counted(sum(place['draws'] for place in places), 'draw')} at {counted(len(places), 'place')}, "
        f"{counted(answer['num_hypotheses'], 'exact test')}, {len(answer['rejected'])} failed (chance that any fails "
        f"by accident: {answer['alpha']:g})"
    )
    if answer["wrong_rows"]:
        said += f"; {counted(len(answer['wrong_rows']), 'place')} with other logits than an ordinary step"
    if answer["unreached"]:
        said += f"; {counted(len(answer['unreached']), 'place')} never reached"
    if answer["passed"] and answer["power"] is not None:
        said += f"; {_power_sentence(answer['power'])}"
    return said


def _power_sentence(power: Mapping[str, Any]) -> str:
    what = f"a verifier that accepted {power['bias']:.0%} of the draft tokens it should reject would"
    if not power["at"]:
        return f"{what} NOT be caught: take more draws"
    return f"{what} be caught (at {len(power['at'])} of {counted(power['num_places'], 'place')} with drafts)"


def _plots(places: Sequence[Mapping[str, Any]]) -> str:
    """Base64 of a PNG with one plot for every place: share of draws against probability."""
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
        counts = np.rint(emitted * place["draws"]).astype(int).tolist()
        p_values = [two_sided(*each) for each in zip(counts, [place["draws"]] * len(counts), expected, strict=True)]
        outside = np.array(p_values) < SURPRISING
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
        "place", "draws", "draft accepted", "expected", "RMS deviation", "expected RMS", "logits off by",
        "p, accepted", "p, one token", "p, all tokens",
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


def _example_rows(answer: Mapping[str, Any], is_promised: bool) -> list[list[str]]:
    rows = [["request", "position", "reference", "audited", "margin in reference", "margin in audited", "what"]]
    for example in answer["examples"]:
        margins = [
            "unknown" if example[key] is None else f"{example[key]:.3g}"
            for key in ("margin_reference", "margin_audited")
        ]
        what = "near-tie" if example["near_tie"] else "bug" if is_promised else "differs (not promised)"
        rows.append([*(str(example[key]) for key in ("request", "position", "reference", "audited")), *margins, what])
    return rows


def _example_note(answer: Mapping[str, Any]) -> str:
    return (
        "Each request's first difference. Margins: how far the reference's token is ahead of the audited one, by the "
        "logits that each engine computes there (over temperature, noise included, where it samples). Ahead in both "
        "engines means that the logits agree, and that the verifier emitted another token all the same; within "
        f"{answer['near_tie_bound']:g} in both is a near-tie, which rounding can turn."
    )


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
        [
            "prompts",
            f"{counted(result['num_prompts'], 'prompt')}, {result['max_tokens']} output tokens each, "
            f"{result['batch']} in flight, seeds from {result['seed']}",
        ],
        ["draws", f"{result['draws']:,} at each stage of {counted(len(result['contexts']), 'context')}"],
        ["versions", result["versions"]],
        ["machine", result["machine"]],
        ["date", result["date"]],
        ["took", f"{result['seconds']:.0f} s"],
    ]


def _context_rows(result: Mapping[str, Any]) -> list[list[str]]:
    rows = [["context", "the prompt ends with", "then", "draft tokens", "let through", "replaced by", "unlikely token"]]
    for nth, context in enumerate(result["contexts"], 1):
        length = f"{nth} ({counted(context['num_tokens'], 'token')})"
        drafts = " ".join(map(repr, context["drafts"])) or "-"
        replaced = [
            "-" if context[key] is None else repr(context[key]) if key != "num_accepted" else str(context[key])
            for key in ("num_accepted", "replacement", "unlikely")
        ]
        rows.append([length, repr(context["ends_with"]), repr(context["first"]), drafts, *replaced])
    return rows


def _lossless_notes(answer: Mapping[str, Any]) -> list[str]:
    notes = [
        f"Failed: {hypothesis['place']}, {hypothesis['test']}: p = {hypothesis['p_value']:.2g}; {hypothesis['says']}"
        for hypothesis in answer["rejected"]
    ]
    notes += answer["wrong_rows"]
    if answer["unreached"]:
        notes.append("never reached, since drafts are not accepted so far: " + "; ".join(answer["unreached"]))
    if answer["power"] is not None and answer["passed"]:
        notes.append(f"Power: {_power_sentence(answer['power'])}.")
    if answer["is_redrawn"]:
        notes.append("The verifier reads the drafter's distribution: draft tokens were drawn from it anew each time.")
    return notes


def to_html(result: Mapping[str, Any]) -> str:
    """The whole report as an HTML page, with plots."""
    verdict = result["verdict"]
    kind = {"passed": "passed", "failed": "failed"}.get(verdict, "none")
    parts = [
        f"<h1>Audit: <span class={kind}>{verdict}</span></h1>",
        html_table(_facts(result)),
        "<h2>Answers</h2>",
        html_table([["question", "answer", "promised?", "numbers"], *map(list, summary(result))]),
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
                "<p>Share of draws against the target's probability: a black dot for each token (the 200 most likely), "
                "red where its exact binomial p-value is below 1e-6. The line is where they should lie, the band four "
                "standard deviations of chance on either side; tokens that were never drawn lie on the lower edge.</p>"
            )
            parts.append(html_table(_place_rows(answer["places"]), "numbers"))
            parts.append(f"<p>{COLUMNS}</p><h3>Contexts</h3>{html_table(_context_rows(result))}")
        elif answer["examples"]:
            parts.append(f"<p>{html.escape(_example_note(answer))}</p>")
            parts.append(html_table(_example_rows(answer, result["promised"][key])))
        else:
            parts.append(f"<p>All {answer['num_requests']} requests are identical, token for token.</p>")
    return page(f"specplug audit of {result['model']}", parts)


def to_markdown(result: Mapping[str, Any]) -> str:
    """The whole report as Markdown, without plots."""
    parts = [
        f"# Audit: {result['verdict']}",
        markdown_table(_facts(result)),
        markdown_table([["question", "answer", "promised?", "numbers"], *map(list, summary(result))]),
    ]
    for key in QUESTIONS:
        answer = result["answers"][key]
        parts.append(f"## {TITLES[key]}")
        if answer["passed"] is None:
            parts.append(answer["why"])
        elif key == "lossless":
            parts.append("\n".join(f"* {note}" for note in _lossless_notes(answer)))
            parts.append(markdown_table(_place_rows(answer["places"])))
            parts += [COLUMNS, "### Contexts", markdown_table(_context_rows(result))]
        elif answer["examples"]:
            parts += [_example_note(answer), markdown_table(_example_rows(answer, result["promised"][key]))]
        else:
            parts.append(f"All {answer['num_requests']} requests are identical, token for token.")
    return "\n\n".join(part for part in parts if part) + "\n"


def write(path: Path, result: Mapping[str, Any]) -> None:
    """Write the report to ``path``: Markdown if its name ends in ``.md``, else HTML."""
    path.write_text(to_markdown(result) if path.suffix == ".md" else to_html(result), encoding="utf-8")
