"""Fuzzes every file and text format of ours: what is read is either good, or refused with one short error.

    python benchmarks/fuzz.py [--minutes 60] [--seed 0] [--only store settings] [--json FILE]
    python benchmarks/fuzz.py --inputs 60     # the same inputs every time

A small valid example of a format is changed in its fields and bytes (:mod:`fuzz_formats`), and everything that a user
could do with it is done: open, look up, draft, check, merge. It must work, with well-formed answers, or raise one
SpecplugError of at most a screen, within ``--limit`` seconds. Anything else is a finding: another exception, a longer
text, a wait, a process that died. Each format runs in processes of its own, so that a crash is seen and the next
format goes on; with ``--minutes`` compiled kernels check the bounds of every array.

Prints what was tried, accepted and refused by format, and the smallest input of each finding. Exit status 1 if there
is one. Rounds of a seed are always the same: ``--seed`` of a finding brings it back.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import hypothesis
from common import print_markdown, progress, setting
from fuzz_formats import Format, formats

from vllm_specplug.errors import SpecplugError

SCREEN_CHARS, SCREEN_LINES = 2100, 24
MEMORY_BYTES = 6 << 30
"""Address space that a round may take beyond what its process has at the start."""
PATIENCE = 20
"""A round that takes longer than this many times ``--limit`` is ended."""
ROUND = 300
"""Inputs of a round with ``--minutes``."""
SHOWN_CHARS = 600


@dataclass
class Tally:
    """What came of one format's inputs; findings by where and what they are: (text, smallest input, seed)."""

    tried: int = 0
    accepted: int = 0
    refused: int = 0
    findings: dict[str, tuple[str, str, int]] = field(default_factory=dict)

    def add(self, other: Tally) -> None:
        self.tried += other.tried
        self.accepted += other.accepted
        self.refused += other.refused
        for what, finding in other.findings.items():
            self.findings.setdefault(what, finding)


class FindingError(Exception):
    """An input for which the promise does not hold."""


class TooLongError(BaseException):
    """Raised by the alarm; no reader catches it."""


@contextlib.contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raise TooLongError in the block after ``seconds``."""

    def ring(*_: Any) -> None:
        raise TooLongError

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def judged(each: Format, folder: Path, example: Any, limit: float) -> bool:
    """True if an input is accepted, False if it is refused.

    Raises:
        FindingError: neither; the first line of its text names the finding.
    """
    try:
        with alarm(limit):
            each.attempt(folder, example)
    except SpecplugError as error:
        text = str(error)
        if len(text) > SCREEN_CHARS or len(text.splitlines()) > SCREEN_LINES:
            raise FindingError(
                f"an error of more than a screen from {place_of(error)}\n{len(text):,} characters: {text[:200]!r}"
            ) from None
        if not text.replace("\n", "").isprintable():
            raise FindingError(f"control characters in an error from {place_of(error)}\n{text[:200]!r}") from None
        return False
    except TooLongError as error:
        raise FindingError(f"took longer than {limit:g} s\n{place_of(error)}") from None
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        name = type(error).__name__
        raise FindingError(f"{name} in {place_of(error)}\n{name}: {error}"[:SHOWN_CHARS]) from None
    return True


def place_of(error: BaseException) -> str:
    """Where our code was when it raised: file, line and function."""
    frames = traceback.extract_tb(error.__traceback__)
    here = str(Path(__file__).parent)
    ours = [each for each in frames if "specplug" in each.filename or "/proposers/" in each.filename]
    last = ([each for each in ours if not each.filename.startswith(here)] or frames)[-1]
    return f"{'/'.join(Path(last.filename).parts[-2:])}:{last.lineno} {last.name}"


def one_round(each: Format, seed: int, num_inputs: int, limit: float, folder: Path) -> Tally:
    """Fuzz a format; a kind of finding is shrunk to its smallest input and then passed over."""
    tally = Tally()
    smallest: dict[str, tuple[str, str, int]] = {}

    def check(example: Any) -> None:
        (folder / "input").write_text(repr(example)[:100_000])
        for left in ("unpacked", "x.npz"):
            shutil.rmtree(folder / left, ignore_errors=True)
        tally.tried += 1
        try:
            accepted = judged(each, folder, example, limit)
        except FindingError as error:
            what = str(error).partition("\n")[0]
            if what not in tally.findings:
                smallest[what] = (str(error), repr(example), seed)
                raise
            return
        tally.accepted += accepted
        tally.refused += not accepted

    quiet = hypothesis.settings(
        max_examples=num_inputs, database=None, deadline=None, print_blob=False, report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck), verbosity=hypothesis.Verbosity.quiet,
        phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
    )  # fmt: skip
    while tally.tried < num_inputs:
        before = tally.tried
        test = hypothesis.seed(seed)(quiet(hypothesis.given(each.changed)(check)))
        try:
            test()
        except (FindingError, hypothesis.errors.Flaky):
            tally.findings |= smallest
            continue
        if tally.tried - before < num_inputs:
            break  # there are no more inputs
    return tally


def in_child(each: Format, seed: int, num_inputs: int, limit: float) -> Tally:
    """:func:`one_round` in a process of its own; its death, or a wait that no alarm ends, is a finding."""

    def work(sender: Connection, folder: Path) -> None:
        os.chdir(folder)
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY_BYTES,) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        logging.disable()
        warnings.simplefilter("ignore")
        sender.send(one_round(each, seed, num_inputs, limit, folder))
        os._exit(0)

    receiver, sender = multiprocessing.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="specplug-fuzz-") as name:
        process = multiprocessing.get_context("fork").Process(target=work, args=(sender, Path(name)))
        process.start()
        sender.close()
        end = time.monotonic() + PATIENCE * limit + num_inputs
        try:
            if receiver.poll(end - time.monotonic()):
                return receiver.recv()  # type: ignore[no-any-return]
            what = "does not end"
        except EOFError:
            process.join()
            what = f"the process died with status {process.exitcode}"
        finally:
            process.kill()
            process.join()
        last = (Path(name) / "input").read_text() if (Path(name) / "input").exists() else "no input"
        return Tally(tried=1, findings={what: (what, last, seed)})


def fuzz(arguments: argparse.Namespace) -> dict[str, Tally]:
    """All formats, round by round."""
    tallies: dict[str, Tally] = {}
    with tempfile.TemporaryDirectory(prefix="specplug-fuzz-examples-") as name:
        chosen = [
            each
            for each in formats(Path(name))
            if not arguments.only or any(each.name.startswith(only) for only in arguments.only)
        ]
        scratch = Path(name) / "scratch"
        scratch.mkdir()
        for each in chosen:
            each.attempt(scratch, each.example)  # a valid input that is refused would make all of this worthless
        began = time.monotonic()
        for number in range(10**9):
            for each in chosen:
                if number and time.monotonic() - began > arguments.minutes * 60:
                    return tallies
                done = in_child(each, arguments.seed + number, arguments.inputs or ROUND, arguments.limit)
                tallies.setdefault(each.name, Tally()).add(done)
                if not number:
                    progress.print(f"{time.monotonic() - began:.0f} s: {each.name}: {len(done.findings)} findings")
            tried, found = (
                sum(each.tried for each in tallies.values()),
                sum(len(t.findings) for t in tallies.values()),
            )
            progress.print(f"{time.monotonic() - began:.0f} s: {tried:,} inputs, {found} findings")
            if arguments.inputs:
                break
    return tallies


def report(tallies: dict[str, Tally], arguments: argparse.Namespace) -> int:
    """Print the table and the findings; the exit status."""
    headings = ("format", "inputs", "accepted", "refused", "findings")
    together = Tally()
    rows = []
    for name, tally in tallies.items():
        together.add(Tally(tally.tried, tally.accepted, tally.refused))
        rows.append((name, f"{tally.tried:,}", f"{tally.accepted:,}", f"{tally.refused:,}", str(len(tally.findings))))
    found = [(name, *finding) for name, tally in tallies.items() for finding in tally.findings.values()]
    rows.append(("together", f"{together.tried:,}", f"{together.accepted:,}", f"{together.refused:,}", str(len(found))))
    print_markdown({**setting(), "seed": str(arguments.seed)}, headings, rows)
    for name, text, smallest, seed in found:
        print(f"\n{name}, seed {seed}: {text}\n  input: {shown(smallest)}")
    if arguments.json:
        rows_of = [{"format": a, "what": b, "input": c, "seed": d} for a, b, c, d in found]
        arguments.json.write_text(json.dumps({"table": rows, "findings": rows_of}, indent=1))
    return int(bool(found))


def shown(example: str) -> str:
    """An input, its runs of zeros cut short."""
    return re.sub(r"(?:\\x00){20,}", lambda run: f" ... {len(run.group()) // 4} zeros ... ", example)[:SHOWN_CHARS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--inputs", type=int, help="of each format, once, instead of --minutes; no bounds are checked")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=1.0, help="seconds that one input may take")
    parser.add_argument("--only", nargs="+", help="formats whose names begin so")
    parser.add_argument("--json", type=Path, help="also write the results here")
    arguments = parser.parse_args()
    if not arguments.inputs and "NUMBA_BOUNDSCHECK" not in os.environ:
        # Read by numba when it is imported; machine code with checks is kept apart from that without.
        cache = Path(tempfile.gettempdir()) / f"specplug-fuzz-kernels-{os.getuid()}"
        checked = {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(cache)}
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **checked})
    sys.exit(report(fuzz(arguments), arguments))


if __name__ == "__main__":
    main()
