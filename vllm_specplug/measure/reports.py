"""Pieces of the reports that commands write: self-contained HTML for light and dark screens, and Markdown."""

from __future__ import annotations

import html
from collections.abc import Sequence

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;background:#fff;color:#1b1f24}
table{border-collapse:collapse;font-size:13px;display:block;overflow-x:auto}
td,th{border:1px solid #8884;padding:.2rem .5rem;text-align:left}
.numbers td,.numbers th{text-align:right}.numbers td:first-child,.numbers th:first-child{text-align:left}
code,pre{background:#8882;padding:.1rem .3rem;border-radius:3px}
pre{padding:.6rem;overflow-x:auto}.passed{color:#1a7f37}.failed{color:#cf222e}.none{color:#9a6700}
img{max-width:100%;background:#fff;border-radius:4px}
@media(prefers-color-scheme:dark){body{background:#0d1117;color:#e6edf3}
.passed{color:#3fb950}.failed{color:#f85149}.none{color:#d29922}}
"""


def counted(number: int, noun: str) -> str:
    """A number and its noun, which is singular if the number is 1."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def html_table(rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """HTML table of texts with the first row as heading; ``kind`` is its CSS class (``numbers`` aligns right)."""
    head, *body = rows
    cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in body)
    opening = f"<table class={kind}>" if kind else "<table>"
    return f"{opening}<tr>{cells}</tr>{lines}</table>"


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Markdown table of texts with the first row as heading."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    head, *body = rows
    return "\n".join([line(head), line(["---"] * len(head)), *map(line, body)])


def page(title: str, parts: Sequence[str]) -> str:
    """A complete HTML page with ``parts`` as its body."""
    return (
        '<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style>{''.join(parts)}</html>\n"
    )
