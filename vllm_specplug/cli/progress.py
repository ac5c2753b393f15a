"""Progress bars and an orderly end, for commands that take minutes."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from vllm_specplug.cli.errors import EXIT_SIGNAL

LINE_INTERVAL_S = 15.0


class Shown:
    """Shows progress: bars on a terminal, a line from time to time elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(
            TextColumn("{task.description:<28}", markup=False), BarColumn(),
            TextColumn("{task.fields[status]}", markup=False), TimeElapsedColumn(),
            console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self._tasks: dict[str, Any] = {}
        self._last_line = -LINE_INTERVAL_S
        self._last_name = ""

    def __enter__(self) -> Shown:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def __call__(self, name: str, share: float, status: str) -> None:
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(name, total=1.0, status=status)
        self._bars.update(self._tasks[name], completed=share, status=status)
        now = time.monotonic()
        is_due = name != self._last_name or share >= 1.0 or now - self._last_line > LINE_INTERVAL_S
        if is_due and not self._console.is_terminal:
            self._last_line, self._last_name = now, name
            self._console.print(f"{name}: {share:.0%}, {status}", highlight=False, soft_wrap=True, markup=False)


class _Ended(KeyboardInterrupt):
    """Raised on a signal that ends the command as Ctrl-C does."""

    def __init__(self, number: int) -> None:
        self.number = number


@contextlib.contextmanager
def ended_by_signals(console: Console | None = None, consequence: str | None = None) -> Iterator[None]:
    """Let SIGTERM and SIGHUP end a command as Ctrl-C does: engines stop, temporary files are removed.

    Args:
        console: console that ``consequence`` is printed to.
        consequence: what the end means for the command's result; None prints nothing.
    """

    def end(number: int, _: object) -> None:
        raise _Ended(number)

    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, end) for number in numbers]
    try:
        yield
    except KeyboardInterrupt as stop:
        number = stop.number if isinstance(stop, _Ended) else signal.SIGINT
        if console is not None and consequence is not None:
            what = "interrupted" if number == signal.SIGINT else "terminated"
            console.print(f"[red]{what}:[/red] {escape(consequence)}", soft_wrap=True, highlight=False)
        # click would exit with 1, which means "failed" for an audit.
        raise SystemExit(EXIT_SIGNAL + number) from None
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
