"""Draws the pictures of the concepts page: ``python docs/pictures/draw.py`` writes the SVG files beside this one
(or into the folder that is given).

What a picture says is computed here (the sorted text, the races with noise, the curves), not put in by hand. Text and
lines have the colour of what is around them, so that a picture reads on light and on dark paper.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from vllm_specplug.samplers import theory
from vllm_specplug.samplers.gumbel import gumbel_noise

OUT = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
BLUE, ORANGE, GREEN, RED = "#4a86d8", "#dd8433", "#3a9d6a", "#d05555"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"
MONO = "ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace"
# Only for the file by itself: in a page of the site the colour is the page's.
STYLE = "<style>svg.picture{color:#24292f}@media (prefers-color-scheme:dark){svg.picture{color:#e6edf3}}</style>"


class Picture:
    """An SVG that is being drawn; coordinates and sizes in pixels."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self.parts: list[str] = []

    def text(  # noqa: PLR0913 - keywords of one SVG element
        self, x: float, y: float, text: str, size: float = 14, anchor: str = "start", mono: bool = False,
        color: str = "currentColor", bold: bool = False, faint: bool = False,
    ) -> None:  # fmt: skip
        style = f'font-family="{MONO if mono else FONT}" font-size="{size:g}" text-anchor="{anchor}" fill="{color}"'
        style += ' font-weight="600"' if bold else ""
        style += ' opacity="0.65"' if faint else ""
        self.parts.append(f'<text x="{x:g}" y="{y:g}" {style} xml:space="preserve">{escape(text)}</text>')

    def box(
        self, x: float, y: float, width: float, height: float, color: str = "currentColor", fill: float = 0.14,
        dashed: bool = False, radius: float = 5,
    ) -> None:  # fmt: skip
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}" fill="{color}" '
            f'fill-opacity="{fill:g}" stroke="{color}" stroke-width="1.3"{dash}/>'
        )

    def line(
        self, points: Sequence[tuple[float, float]], color: str = "currentColor", width: float = 1.5,
        arrow: bool = False, dashed: bool = False, opacity: float = 1.0,
    ) -> None:  # fmt: skip
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        more = ' stroke-dasharray="4 4"' if dashed else ""
        look = f'stroke="{color}" stroke-width="{width:g}" opacity="{opacity:g}"{more}'
        self.parts.append(f'<polyline points="{path}" fill="none" {look}/>')
        if arrow:
            (x0, y0), (x1, y1) = points[-2], points[-1]
            angle = math.atan2(y1 - y0, x1 - x0)
            head = [(x1 - 9 * math.cos(angle + turn), y1 - 9 * math.sin(angle + turn)) for turn in (0.45, -0.45)]
            corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in [(x1, y1), *head])
            self.parts.append(f'<polygon points="{corners}" fill="{color}" opacity="{opacity:g}"/>')

    def save(self, name: str) -> None:
        body = "\n".join(self.parts)
        (OUT / f"{name}.svg").write_text(
            f'<svg class="picture" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            f'role="img" aria-label="{escape(self.title)}">\n{STYLE}\n{body}\n</svg>\n'
        )


def tokens_in_boxes(
    picture: Picture, x: float, y: float, tokens: Sequence[str], colors: Sequence[str], fill: float = 0.14,
    dashed: bool = False,
) -> list[float]:  # fmt: skip
    """Boxes of one width side by side; returns the x of each middle."""
    middles = []
    for token, color in zip(tokens, colors, strict=True):
        if token:
            picture.box(x, y, 78, 30, color, fill, dashed)
            picture.text(x + 39, y + 20, token, 14, "middle", mono=True)
        middles.append(x + 39)
        x += 86
    return middles


def one_step() -> None:
    """A draft, what the target says of it, and what is emitted."""
    picture = Picture(780, 340, "One step: draft tokens, the target's own token at each place, and what is emitted")
    draft = ["os", ".", "listdir", "(", "path"]
    target = ["os", ".", "listdir", "(", "folder", "…"]
    kept = next(index for index, token in enumerate(draft) if token != target[index])
    left = 250
    picture.text(14, 54, "so far", 14, bold=True)
    picture.text(left - 16, 54, "for name in", 15, "end", mono=True)
    picture.text(14, 104, "1  drafted", 14, bold=True)
    picture.text(14, 122, "cheap guesses", 12, faint=True)
    middles = tokens_in_boxes(picture, left, 84, draft, [BLUE] * 5, dashed=True)
    picture.text(14, 184, "2  target's own", 14, bold=True)
    picture.text(14, 202, "one pass, all places", 12, faint=True)
    colors = [GREEN] * kept + [ORANGE] + ["currentColor"] * (len(target) - kept - 1)
    tokens_in_boxes(picture, left, 164, target, colors)
    for index, middle in enumerate(middles):
        same = draft[index] == target[index]
        picture.text(middle, 144, "=" if same else "≠", 18, "middle", color=GREEN if same else ORANGE, bold=True)
    picture.text(14, 264, "3  emitted", 14, bold=True)
    picture.text(14, 282, f"{kept} accepted + 1", 12, faint=True)
    tokens_in_boxes(picture, left, 244, target[: kept + 1], [GREEN] * kept + [ORANGE], fill=0.3)
    picture.line([(middles[kept], 196), (middles[kept], 242)], ORANGE, arrow=True)
    picture.text(
        left,
        312,
        f"{kept + 1} tokens from one pass of the model, and each of them is the target's own.",
        13,
        faint=True,
    )
    picture.save("step")


def race() -> None:
    """The target's race with noise, and a drafter's with the same noise."""
    tokens = ["os", "sys", "names", "range", "items"]
    target = np.array([0.34, 0.10, 0.30, 0.16, 0.10])
    draft = np.array([0.30, 0.26, 0.20, 0.14, 0.10])
    seed = next(
        seed
        for seed in range(1000)
        if (winner := int((np.log(target) + (noise := gumbel_noise(np.array(seed), np.arange(5)))).argmax()))
        not in (0, 2)
        and int((np.log(draft) + noise).argmax()) == winner
        and noise.min() > -0.9
    )
    noise = gumbel_noise(np.array(seed), np.arange(5))
    picture = Picture(780, 362, "The target's race and the drafter's, with the same noise")
    base, unit = 262, 30.0
    for start, name, weights, color in ((40, "target", target, GREEN), (430, "drafter", draft, BLUE)):
        score = np.log(weights) + noise
        winner = int(score.argmax())
        picture.text(start, 26, f"{name}: log probability + noise", 14, bold=True)
        lift = -np.log(weights).min() + 3.2  # so that every bar stands on the ground
        for index, token in enumerate(tokens):
            x = start + index * 64
            level = (np.log(weights[index]) + lift) * unit
            height = noise[index] * unit
            picture.box(x, base - level, 44, level, color, 0.18, radius=2)
            top = base - level - max(height, 0)
            picture.box(x, top, 44, abs(height), ORANGE, 0.35 if height > 0 else 0.6, radius=2)
            picture.text(x + 22, base + 20, token, 13, "middle", mono=True, bold=index == winner)
            picture.text(x + 22, base + 38, f"{weights[index]:.0%}", 11, "middle", faint=True)
            if index == winner:
                end = base - level - height
                picture.line([(x - 8, end), (x + 52, end)], RED, 2)
                picture.text(x + 22, end - 8, "drawn", 12, "middle", color=RED, bold=True)
    picture.line([(30, base), (364, base)])
    picture.line([(420, base), (754, base)])
    picture.box(40, 320, 12, 12, ORANGE, 0.35, radius=2)
    chance = theory.gumbel(target, draft)
    distance = theory.total_variation(target, draft)
    picture.text(
        58,
        331,
        "noise: the same on both sides, from the seed, the position and the token id; darker where it takes away.",
        12,
        faint=True,
    )
    agree = (
        f"These two agree in {chance:.0%} of draws; no way of drawing makes them agree in more than {1 - distance:.0%}."
    )
    picture.text(58, 350, agree, 12, faint=True)
    picture.save("race")


def suffix_array() -> None:
    """A tiny store: its places in the order of the text read backwards, and a search in it."""
    lines = "for name in os . listdir : for line in file : print line , for name in os . environ , for name in sorted "
    text = (lines + "names if key in os . environ").split()
    context = ["while", "for", "name", "in"]
    length = 3
    places = sorted(range(1, len(text)), key=lambda end: text[:end][::-1])
    matched = {end for end in places if text[max(0, end - length) : end] == context[-length:]}
    rows = [index for index, end in enumerate(places) if end in matched]
    shown = places[rows[0] - 3 : rows[-1] + 4]
    votes = Counter(text[end] for end in shown if end in matched)
    picture = Picture(
        780, 96 + 27 * len(shown) + 66, "A token store with its places sorted by the text before them, read backwards"
    )
    picture.text(430, 26, "context of a request:  … " + " ".join(context), 14, "end", mono=True, bold=True)
    picture.text(430, 62, "text before the place, sorted from its end", 12, "end", faint=True)
    picture.text(452, 62, "what followed", 12, faint=True)
    y = 88.0
    for end in shown:
        hit = end in matched
        if hit:
            picture.box(120, y - 18, 322, 25, GREEN, 0.16, radius=3)
            picture.box(448, y - 18, 96, 25, BLUE, 0.2, radius=3)
        before = " ".join(text[max(0, end - 5) : end])
        picture.text(434, y, ("… " if end > 5 else "") + before, 13.5, "end", mono=True, faint=not hit)
        picture.text(456, y, text[end], 13.5, mono=True, faint=not hit)
        y += 27
    first = 88 + 27 * (rows[0] - (rows[0] - 3))
    middle = first + 27 * (len(rows) - 1) / 2 - 5
    picture.line([(548, middle), (600, middle)], BLUE, arrow=True)
    picture.text(608, middle - 14, "they vote:", 13, bold=True)
    for index, (token, count) in enumerate(votes.most_common()):
        picture.text(608, middle + 8 + 20 * index, f"{token}  {count}", 14, mono=True, color=BLUE, bold=index == 0)
    picture.text(14, middle + 4, "one binary", 12, faint=True)
    picture.text(14, middle + 20, "search", 12, faint=True)
    picture.line([(82, middle), (114, middle)], GREEN, arrow=True)
    found = f"Longest match: {length} tokens (“{' '.join(context[-length:])}”). All places with it lie side by side:"
    picture.text(14, y + 14, found, 12.5, faint=True)
    more = "they are sorted by what stands before them. The winner goes on to vote for the next draft token."
    picture.text(14, y + 32, more, 12.5, faint=True)
    picture.save("suffix-array")


def flow() -> None:
    """Who hands what to whom in a step."""
    picture = Picture(780, 330, "Proposers, ensemble, the model and the verifier in one step")
    names = ["suffix", "ngram", "lookahead", "rest", "yours"]
    for index, name in enumerate(names):
        y = 34 + index * 46
        picture.box(14, y, 120, 34, BLUE, 0.14, dashed=name == "yours")
        picture.text(74, y + 22, name, 14, "middle", mono=True)
        picture.line([(136, y + 17), (206, 142)], BLUE, arrow=index == 2, opacity=0.75)
    picture.box(210, 92, 150, 100, ORANGE)
    picture.text(285, 118, "ensemble", 15, "middle", bold=True)
    for index, word in enumerate(("whose draft?", "how far?", "at all?")):
        picture.text(285, 142 + 18 * index, word, 13, "middle", faint=True)
    picture.line([(362, 142), (428, 142)], arrow=True)
    picture.text(395, 132, "drafts", 12, "middle", faint=True)
    picture.box(432, 104, 130, 76)
    picture.text(497, 138, "the model", 15, "middle", bold=True)
    picture.text(497, 158, "one pass, batched", 12, "middle", faint=True)
    picture.line([(564, 142), (622, 142)], arrow=True)
    picture.text(593, 132, "logits", 12, "middle", faint=True)
    picture.box(626, 92, 140, 100, GREEN)
    picture.text(696, 118, "verifier", 15, "middle", bold=True)
    picture.text(696, 142, "draws the target's", 12.5, "middle", faint=True)
    picture.text(696, 158, "token at each place,", 12.5, "middle", faint=True)
    picture.text(696, 174, "keeps equal drafts", 12.5, "middle", faint=True)
    picture.line([(696, 90), (696, 44), (756, 44)], GREEN, arrow=True)
    picture.text(690, 36, "emitted tokens", 13, "end", bold=True)
    picture.line([(696, 194), (696, 290), (74, 290), (74, 256)], GREEN, arrow=True)
    picture.line([(285, 290), (285, 196)], GREEN, arrow=True)
    picture.text(497, 282, "what was accepted, what the target said instead", 12.5, "middle", faint=True)
    picture.text(
        497, 312, "Nothing on the left can change what comes out on the right, only how soon.", 13, "middle", bold=True
    )
    picture.save("flow")


def pays() -> None:
    """Speed over draft length for a few acceptances, where rows of a step are cheap and where they are not."""
    picture = Picture(780, 356, "Speed against draft length, for cheap and for dear draft tokens")
    lengths = np.arange(0, 13)
    width, height, bottom = 300, 220, 290
    for left, cost, name in (
        (60, 0.02, "a draft token costs 2% of a step"),
        (440, 0.30, "a draft token costs 30% of a step"),
    ):

        def at(k: float, speed: float, left: int = left) -> tuple[float, float]:
            return left + width * k / 12, bottom - height * speed / 4.5

        picture.text(left, 36, name, 14, bold=True)
        for level in range(5):
            picture.line([at(0, level), at(12, level)], opacity=0.6 if level == 1 else 0.15, width=1, dashed=level == 1)
            picture.text(left - 8, at(0, level)[1] + 4, f"{level}x" if level else "0", 11, "end", faint=True)
        for k in range(0, 13, 4):
            picture.text(at(k, 0)[0], bottom + 18, str(k), 11, "middle", faint=True)
        picture.text(left + width / 2, bottom + 38, "draft tokens a step", 12, "middle", faint=True)
        for chance, color in ((0.8, GREEN), (0.5, BLUE), (0.2, RED)):
            emitted = np.array([theory.emitted_per_step(chance, int(k)) for k in lengths])
            speeds = emitted / (1 + cost * lengths)
            points = [at(float(k), float(speed)) for k, speed in zip(lengths, speeds, strict=True)]
            picture.line(points, color, 2.2)
            best = int(speeds.argmax())
            x, y = points[best]
            picture.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{color}"/>')
            if cost < 0.1:
                picture.text(points[-1][0] + 6, points[-1][1] + 4, f"{chance:.0%}", 12, color=color, bold=True)
            else:
                dy = {0.8: -10, 0.5: -8, 0.2: 18}[chance]
                picture.text(points[4][0], points[4][1] + dy, f"{chance:.0%}", 12, "middle", color=color, bold=True)
    picture.text(60, 350, "percentages: chance that a draft token is accepted. Dots: the best length.", 12, faint=True)
    picture.save("pays")


if __name__ == "__main__":
    one_step()
    race()
    suffix_array()
    flow()
    pays()
