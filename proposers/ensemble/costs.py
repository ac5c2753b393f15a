"""What a step costs by number of draft rows and side chains, measured online."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vllm_specplug.compiled import kernel


@kernel
def cut_to_what_pays(chances, lengths, rate, first_s, row_s):  # type: ignore[no-untyped-def]
    """Shorten drafts to the lengths that are worth their time.

    ``n`` draft rows make a step ``first_s + n * row_s`` longer, time in which the engine would emit ``rate`` tokens a
    second without drafts. They bring the sum of their chances of being accepted together with all rows before them.
    Those chances fall along a draft, so that the ``n`` likeliest rows are always beginnings of drafts.

    Args:
        chances: ``[num_requests, k]`` float64, chance of each token if all before it are accepted.
        lengths: ``[num_requests]`` int64, shortened in place.
        rate: tokens per second.
        first_s, row_s: seconds.

    Returns:
        The rows that remain, and their expected accepted tokens.
    """
    num_requests = len(lengths)
    total = 0
    for i in range(num_requests):
        total += lengths[i]
    values = np.empty(total)
    at = 0
    for i in range(num_requests):
        alive = 1.0
        for depth in range(lengths[i]):
            alive *= chances[i, depth]
            values[at] = alive
            at += 1
    ordered = np.sort(values)
    best_rows = 0
    most = 0.0
    accepted = 0.0
    expected = 0.0
    for rows in range(1, total + 1):
        accepted += ordered[total - rows]
        gain = accepted - rate * (first_s + rows * row_s)
        if gain > most:
            most = gain
            best_rows = rows
            expected = accepted
    threshold = ordered[total - best_rows] if best_rows else 2.0
    remaining = 0
    for i in range(num_requests):
        alive = 1.0
        kept = 0
        for depth in range(lengths[i]):
            alive *= chances[i, depth]
            if alive < threshold:
                break
            kept = depth + 1
        lengths[i] = kept
        remaining += kept
    return remaining, expected


class StepCosts:
    """What a step takes, measured in the running engine: without drafts, and more for each draft row and side chain.

    Costs are kept by batch size, in half octaves: the median of the latest steps without drafts; a regression on the
    number of draft rows of the time that steps with drafts took beyond that median, which forgets slowly; and the time
    that steps with side chains took beyond that, by number of side chains.
    Steps with drafts that took over four times as long as their rows explain (a prompt came in, the machine was busy
    elsewhere) are left out.
    """

    KEPT = 15
    """Latest steps without drafts that the median is of."""
    FORGET = 0.98
    """Decay of a regression per step that is entered into it."""
    FORGET_OTHERS = 0.998
    """Decay of the regression of side chains per step without them, and of the plain regression per step with them."""
    FORGET_AT_PROBE = 0.5
    """Decay of both when a probe is entered, which comes rarely."""
    FORGET_AT_GOOD_NEWS = 0.1
    """The same if the probe took less than half of the time that was expected."""

    def __init__(self) -> None:
        self._plain: dict[int, list[float]] = {}
        self._plain_s: dict[int, float] = {}
        # By bucket, weighted sums of 1, n, n*n, y, n*y over steps with n draft rows that took y seconds longer than a
        # plain one.
        self._sums: dict[int, NDArray[np.float64]] = {}
        self._since_plain: dict[int, int] = {}
        # The same over steps with f side chains, and sums of f, f*n, f*f and f*y; no such step is in _sums.
        self._fork_sums: dict[int, NDArray[np.float64]] = {}
        self._solved: dict[int, tuple[float, float, float]] = {}  # the regressions of the present sums

    @staticmethod
    def bucket(num_running: int) -> int:
        """Batch sizes that are measured together have the same one: 1, 2, 3, 4, 5-6, 7-8, 9-12, 13-16, 17-24, ..."""
        octave = max(num_running - 1, 0).bit_length()
        return 2 * octave - int(octave > 1 and num_running <= 3 << (octave - 2))

    @staticmethod
    def largest(bucket: int) -> int:
        """Largest batch size of a bucket."""
        return 3 << ((bucket + 1) // 2 - 2) if bucket % 2 else 1 << (bucket // 2)

    def add(
        self,
        num_running: int,
        draft_rows: int,
        seconds: float,
        is_probe: bool = False,
        forks: int = 0,
        is_fork_probe: bool = False,
    ) -> None:
        """One step of ``num_running`` requests, none of them in its prompt, took ``seconds``.

        Probes come so rarely that older measurements count for half after one, and for little if rows turn out to cost
        less: if that was chance, the next steps will correct it.

        Args:
            is_probe: True if the drafts were verified only to learn what rows cost by now.
            forks: side chains among the draft rows.
            is_fork_probe: True if a side chain was verified only to learn what it costs by now.
        """
        bucket = self.bucket(num_running)
        if draft_rows == 0:
            kept = self._plain.setdefault(bucket, [])
            kept.append(seconds)
            del kept[: -self.KEPT]
            self._plain_s[bucket] = sorted(kept)[len(kept) // 2]
            self._since_plain[bucket] = 0
            return
        self._since_plain[bucket] = self._since_plain.get(bucket, 0) + 1
        plain_s = self._plain_s.get(bucket)
        # A draft row costs at most about what a request's row in a plain step does.
        if plain_s is None or seconds > 4 * plain_s * (1 + draft_rows / num_running):
            return
        sums = self._sums.setdefault(bucket, np.zeros(5))
        more = seconds - plain_s
        new = (1.0, draft_rows, draft_rows * draft_rows, more, draft_rows * more)
        fork_sums = self._fork_sums.get(bucket)
        forget, forget_forks = self.FORGET, self.FORGET_OTHERS
        if is_probe or is_fork_probe:
            _, first_s, row_s = self.of(num_running)
            known = first_s + draft_rows * row_s + forks * self.fork_s(num_running)
            forget = forget_forks = self.FORGET_AT_GOOD_NEWS if more < 0.5 * known else self.FORGET_AT_PROBE
        if forks:
            if fork_sums is None:
                fork_sums = self._fork_sums[bucket] = np.zeros(9)
            sums *= self.FORGET_OTHERS
            fork_sums *= forget
            fork_sums += (*new, forks, forks * draft_rows, forks * forks, forks * more)
        else:
            sums *= forget
            sums += new
            if fork_sums is not None:
                fork_sums *= forget_forks
        self._solved.pop(bucket, None)

    def fork_s(self, num_running: int) -> float:
        """Seconds more for each side chain, its rows not counted; 0 while nothing is known."""
        bucket = self.bucket(num_running)
        near = min(self._fork_sums, key=lambda known: abs(known - bucket), default=None)
        return 0.0 if near is None else self._solve(near)[2]

    def _solve(self, bucket: int) -> tuple[float, float, float]:
        """Seconds for having any draft, for each draft row, and for each side chain, in a bucket that has sums."""
        if (solved := self._solved.get(bucket)) is None:
            solved = self._solved[bucket] = self._solve_anew(bucket)
        return solved

    def _solve_anew(self, bucket: int) -> tuple[float, float, float]:
        sums = self._sums[bucket].tolist()
        fork_sums = self._fork_sums.get(bucket)
        if fork_sums is None:
            return *self._line(*sums), 0.0
        *both, forks, with_rows, squares, product = fork_sums.tolist()
        if not sums[0]:  # all steps had side chains
            return *self._line(*both), 0.0
        # Every side chain brings rows, about as many each: steps with side chains alone do not tell which of the two
        # costs the time. So the cost of rows is taken from steps without them.
        first_s, row_s = self._line(*sums)
        return first_s, row_s, max((product - first_s * forks - row_s * with_rows) / max(squares, 1e-9), 0.0)

    @staticmethod
    def _line(count: float, rows: float, squares: float, more: float, product: float) -> tuple[float, float]:
        """Seconds for having any draft, and for each draft row, neither below 0."""
        # A weak prior for a slope of 0: without it few steps, or steps of equal numbers of rows, give absurd slopes.
        squares += 1e-3 * squares + 1e-9
        spread = count * squares - rows * rows
        slope = (count * product - rows * more) / spread if spread > 1e-6 * count * squares else more / max(rows, 1.0)
        slope = min(max(slope, 0.0), max(more / max(rows, 1.0), 0.0))
        return max((more - slope * rows) / max(count, 1e-9), 0.0), slope

    def knows_plain(self, num_running: int) -> bool:
        """True once a few steps without drafts were seen at this batch size."""
        return len(self._plain.get(self.bucket(num_running), ())) >= 3

    def steps_since_plain(self, num_running: int) -> int:
        """Steps with drafts since the last one without, at this batch size."""
        return self._since_plain.get(self.bucket(num_running), 0)

    def of(self, num_running: int) -> tuple[float, float, float]:
        """Seconds of a step without drafts, more seconds for having any draft, and for each draft row.

        All are 0 while nothing is known. If this batch size was not measured the nearest one that was stands in.
        """
        bucket = self.bucket(num_running)
        near = min(self._plain_s, key=lambda known: abs(known - bucket), default=None)
        if near is None:
            return 0.0, 0.0, 0.0
        plain_s = self._plain_s[near]
        near = min(self._sums, key=lambda known: abs(known - bucket), default=None)
        if near is None:
            return plain_s, 0.0, 0.0
        first_s, row_s, _ = self._solve(near)
        return plain_s, first_s, row_s

    def to_dict(self) -> dict[str, dict[str, float]]:
        """By largest batch size of a bucket: seconds of a plain step, of having drafts, a draft row, a side chain."""
        return {
            str(size): {
                **dict(zip(("plain_s", "first_s", "row_s"), self.of(size), strict=True)),
                "fork_s": self.fork_s(size),
            }
            for size in map(self.largest, sorted(self._plain_s))
        }
