"""What commands that keep engines busy for minutes share: bars, an orderly end, and what a number was measured with."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

LINE_INTERVAL_S = 15.0


class Shown:
    """Progress: bars on a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(
            TextColumn("{task.description:<28}"), BarColumn(), TextColumn("{task.fields[status]}"), TimeElapsedColumn(),
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
            self._console.print(f"{name}: {share:.0%}, {status}", highlight=False, soft_wrap=True)


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end a command as Ctrl-C does: engines stop, temporary files go."""

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, end) for number in numbers]
    try:
        yield
    except KeyboardInterrupt:
        # click would end with 1, which an audit means something by.
        raise SystemExit(128 + signal.SIGINT) from None
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
