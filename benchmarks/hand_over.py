"""What it costs a step that a user's proposer works in a thread, or a process, of its own.

    python benchmarks/hand_over.py [--calls 1500]

Prints the median time of a ``propose`` call with the check of its answer, in microseconds, for a proposer that answers
empty drafts: called directly, in a thread, and in a process. In every call each request has one token more.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np

from vllm_specplug.drafting.answers import checked
from vllm_specplug.drafting.guests import Guest
from vllm_specplug.proposers import DraftBatch, Drafts, Proposer, ProposerContext

VOCAB, K, ROWS, LONGEST, FIRST = 4096, 8, 256, 4096, 1000


class Nothing(Proposer):
    """Answers empty drafts."""

    def propose(self, batch: DraftBatch) -> Drafts:
        return Drafts.empty(len(batch), K)


def median_us(propose: Callable[[DraftBatch], Drafts], num_requests: int, num_calls: int) -> float:
    table = np.random.default_rng(0).integers(0, VOCAB, (ROWS, LONGEST)).astype(np.int32)
    took = []
    for call in range(num_calls):
        batch = DraftBatch(
            tuple(map(str, range(num_requests))), table, np.arange(num_requests), np.full(num_requests, FIRST + call),
            np.full(num_requests, 100), np.full(num_requests, K), tuple({} for _ in range(num_requests)),
        )  # fmt: skip
        start = time.perf_counter()
        checked(propose(batch), batch, VOCAB)
        took.append(time.perf_counter() - start)
    return 1e6 * statistics.median(took)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--calls", type=int, default=1500)
    num_calls = parser.parse_args().calls
    context = ProposerContext(VOCAB, K, ROWS, LONGEST)
    print("| requests | direct | thread | process |\n| ---: | ---: | ---: | ---: |")
    for num_requests in (1, 16, 64, 256):
        times = [median_us(Nothing(context).propose, num_requests, num_calls)]
        for in_process in (False, True):
            guest = Guest("hand_over.Nothing", context, {}, {}, 60.0, in_process)
            guest.warm_up()
            times.append(median_us(guest.propose, num_requests, num_calls))
        print(f"| {num_requests} | {' | '.join(f'{each:.0f}' for each in times)} |", flush=True)


if __name__ == "__main__":
    main()
