"""Three kinds of work for drafters, and a mix of all three, as endless prompts: no two runs share a prompt.

*code*: held-out modules of the standard library, and HumanEval's prompts if its file is named. *edit*: the prompt
holds an earlier version of a piece of a held-out module, then begins the present one. *text*: first turns of
Spec-Bench's questions, unlike anything in a store of code; needs the file of Spec-Bench.
"""

from __future__ import annotations

import gzip
import itertools
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

from vllm_specplug.measure import corpus

CODE, EDIT, TEXT, MIXED = "code", "edit", "text", "mixed"
PROMPT_CHARS = 800
EDITED_CHARS = 1300


def _pieces(num_chars: int, seed: int) -> Iterator[str]:
    """Pieces of held-out modules that begin at a line, from shuffled places, for ever."""
    texts = [text for path in corpus.held_out_sources() if (text := corpus.read_text(path)) and len(text) > 4000]
    chooser = random.Random(seed)
    while True:
        text = chooser.choice(texts)
        start = text.find("\n", chooser.randrange(len(text) - num_chars - 200)) + 1
        piece = text[start : start + num_chars]
        yield piece[: piece.rfind("\n") + 1] or piece


def _code(humaneval: Path | None) -> Iterator[str]:
    pieces = _pieces(PROMPT_CHARS, 1)
    if humaneval is None:
        yield from pieces
    else:
        with gzip.open(humaneval, "rt") as file:
            problems = [json.loads(line)["prompt"] for line in file]
        random.Random(2).shuffle(problems)
        for piece, problem in zip(pieces, itertools.cycle(problems), strict=False):
            yield piece
            yield problem


def earlier_version(piece: str, chooser: random.Random) -> str:
    """The piece before somebody worked on it: two names were others, one line was not there, another was twice."""
    names = sorted({name for name in re.findall(r"\b[a-z_]{5,}\b", piece) if not name.startswith("_")})
    for name in chooser.sample(names, min(2, len(names))):
        piece = re.sub(rf"\b{name}\b", f"{name[:3]}_old", piece)
    lines = piece.splitlines(keepends=True)
    del lines[chooser.randrange(len(lines))]
    doubled = chooser.randrange(len(lines))
    return "".join([*lines[:doubled], lines[doubled], *lines[doubled:]])


def _edit() -> Iterator[str]:
    chooser = random.Random(3)
    for piece in _pieces(EDITED_CHARS, 4):
        yield f"{earlier_version(piece, chooser)}\n# new version\n{piece[: len(piece) // 6]}"


def _text(questions: Path) -> Iterator[str]:
    turns = [json.loads(line)["turns"][0][: 2 * PROMPT_CHARS] for line in questions.read_text().splitlines()]
    random.Random(5).shuffle(turns)
    return itertools.cycle(turns)


def streams(humaneval: Path | None, questions: Path | None) -> dict[str, Iterator[str]]:
    """Prompts of each kind; without ``questions`` (Spec-Bench's question.jsonl) there is no text."""
    made = {CODE: _code(humaneval), EDIT: _edit()}
    if questions is not None:
        made[TEXT] = _text(questions)
    # A stream of its own: the mixed prompts are none of the others'.
    parts = {CODE: _pieces(PROMPT_CHARS, 11), EDIT: made[EDIT], **({TEXT: made[TEXT]} if TEXT in made else {})}
    made[MIXED] = (next(part) for part in itertools.cycle(parts.values()))
    return made
