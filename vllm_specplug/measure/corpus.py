"""Real text that every machine with Python already has: the standard library's own sources.

The demo, the tests and the benchmarks build their token stores from it and take their prompts from a fixed list of
modules that is held out everywhere: no store and no shipped model has seen them.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

HELD_OUT_MODULES = (
    "argparse", "calendar", "cmd", "configparser", "contextlib", "csv", "difflib", "fractions",
    "ftplib", "gettext", "heapq", "imaplib", "ipaddress", "mailbox", "optparse", "pprint",
    "shelve", "shlex", "smtplib", "statistics", "tarfile", "textwrap", "tokenize", "zipfile",
)  # fmt: skip
"""Standard-library modules that prompts come from. Neither stores nor training ever include them or their tests."""

MIN_FINGERPRINT_LINE_CHARS = 24
MAX_SHARED_LINES = 0.2


def standard_library_root() -> Path:
    """Folder of this interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"]).resolve()


def is_held_out(path: Path) -> bool:
    """True for a held-out module, any file of a held-out package, and their tests, in whichever folder."""
    names = {path.stem, *(parent.name for parent in path.parents)}
    return any(name in names or f"test_{name}" in names for name in HELD_OUT_MODULES)


def standard_library_sources() -> list[Path]:
    """Sorted ``.py`` files of the standard library, without third-party folders and held-out modules."""
    root = standard_library_root()
    skipped_folders = {"site-packages", "dist-packages", "__pycache__"}
    return [
        path
        for path in sorted(root.rglob("*.py"))
        if not skipped_folders.intersection(path.relative_to(root).parts) and not is_held_out(path.relative_to(root))
    ]


def held_out_sources() -> list[Path]:
    """The held-out modules' own files, in the order of :data:`HELD_OUT_MODULES` (those that this Python has)."""
    root = standard_library_root()
    candidates = ([root / f"{name}.py", root / name / "__init__.py"] for name in HELD_OUT_MODULES)
    return [next(path for path in paths if path.is_file()) for paths in candidates if any(p.is_file() for p in paths)]


def read_text(path: Path) -> str | None:
    """Text of the file; None if it is not UTF-8, as some of the library's test data."""
    try:
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return None


def _fingerprint(text: str) -> set[int]:
    lines = (line.strip() for line in text.splitlines())
    return {hash(line) for line in lines if len(line) >= MIN_FINGERPRINT_LINE_CHARS}


def without_copies_of_held_out(paths: Iterable[Path]) -> Iterator[tuple[Path, str]]:
    """``(path, text)`` of readable files that are not (vendored, edited) copies of a held-out module.

    A file counts as a copy when over :data:`MAX_SHARED_LINES` of its longer lines are also in a held-out module.
    """
    held_out: set[int] = set()
    for path in held_out_sources():
        held_out |= _fingerprint(read_text(path) or "")
    for path in paths:
        text = read_text(path)
        if not text or is_held_out(path):
            continue
        lines = _fingerprint(text)
        if len(lines & held_out) <= MAX_SHARED_LINES * max(len(lines), 1):
            yield path, text


def held_out_prompts(num_prompts: int, prompt_chars: int = 800) -> list[str]:
    """``num_prompts`` pieces of held-out source that start with a whole line, spread evenly over the modules.

    Args:
        num_prompts: number of prompts; they are the same at every call in one Python version.
        prompt_chars: most characters of a prompt, which ends with a complete line.
    """
    texts = [text for path in held_out_sources() if (text := read_text(path)) and len(text) > 2 * prompt_chars]
    if not texts:
        raise FileNotFoundError(
            f"no held-out standard-library source under {standard_library_root()}: this Python ships without .py files"
        )
    prompts: list[str] = []
    rounds = -(-num_prompts // len(texts))
    for nth in range(rounds):
        for text in texts:
            start = text.find("\n", (len(text) - prompt_chars) * (2 * nth + 1) // (2 * rounds)) + 1
            piece = text[start : start + prompt_chars]
            prompts.append(piece[: piece.rfind("\n") + 1] or piece)
    return prompts[:num_prompts]
