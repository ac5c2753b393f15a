"""Verifying drafts on a GPU: our sampling of every row, against vLLM's rejection sampler (V2 runner).

    python benchmarks/verify_kernel.py [--quick] [--batch 1 32] [--k 7] [--vocab 131072] [--dtype bf16]
    python benchmarks/verify_kernel.py --round-trip     # and what drafting on the host costs a step
    python benchmarks/verify_kernel.py --check          # a tiny case, on a CPU under Triton's interpreter; no timing

Three ways to verify the same drafts against the same target logits are compared: ours (vLLM's ``gumbel_sample`` over
all rows, then ``verify_drafts``), and vLLM's ``rejection_sample`` without and with the drafter's logits. In every row
of logits one token (the draft token, if the row has one) has probability 0.7, and the drafter is all but certain of its
drafts, so that all three ways accept alike; before a case is timed, all three must emit the same tokens at
temperature 0.

Times are medians of the device's own time. The three ways take turns; before each, the L2 cache is emptied by reading a
large buffer, for long enough that the host has queued all work that is measured. vLLM hands its samplers logits of the
model's type as long as no request asks for more than temperature 1, and float32 otherwise.

Bytes moved, of logits alone: ours reads num_rows * vocab once, with num_rows = batch * (k + 1). Without draft logits
vLLM reads as many (all rows but the last of each request, then one row of each again), and with them twice as many.
Ours needs no cache of draft logits, which has batch * k * vocab elements.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import print_markdown, progress, setting
from rich.console import Console
from rich.table import Table

EXIT_UNUSABLE = 2
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
OURS, ONE_HOT, CACHED = "ours", "vLLM, no draft logits", "vLLM, draft logits"
TARGET_PROBABILITY, DRAFT_PROBABILITY = 0.7, 0.999
SEED = 4321
WARM_UP_CALLS = 3
COPY_BYTES = 2**30
EVICT_BYTES = 2**28
MAX_REQUESTS, MAX_LEN = 1024, 32_768  # of the engine whose tables the round trip uses

VERIFY_COLUMNS = [
    "batch", "k", "vocab", "logits", "ours, us", "no draft logits, us", "draft logits, us",
    "vLLM/ours, no draft logits", "vLLM/ours, draft logits", "ours, GB/s", "of copy", "cache not kept, MiB",
    "host: ours / no / with, us",
]  # fmt: skip
ROUND_TRIP_COLUMNS = [
    "batch", "k", "bytes down", "bytes up", "host: pack, copy, wait, us", "host: upload, scatter, us", "host: both, us",
    "device: pack, copy, us", "device: upload, scatter, us",
]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One row of the first table."""

    batch: int
    k: int
    vocab: int
    dtype: str

    @property
    def num_rows(self) -> int:
        return self.batch * (self.k + 1)

    @property
    def logits_bytes(self) -> int:
        return self.num_rows * self.vocab * DTYPES[self.dtype].itemsize

    @property
    def cache_bytes(self) -> int:
        return self.batch * self.k * self.vocab * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Inputs:
    """What a V2 runner hands its rejection sampler; every request has ``k`` drafts."""

    k: int
    target_logits: torch.Tensor  # [num_rows, vocab]
    draft_logits: torch.Tensor  # [batch, k, vocab]
    draft_sampled: torch.Tensor  # [num_rows] int32, the input token of each row
    cu_num_logits: torch.Tensor  # [batch + 1] int32
    pos: torch.Tensor  # [num_rows] int64
    idx_mapping: torch.Tensor  # [batch] int64
    expanded_idx_mapping: torch.Tensor  # [num_rows] int64
    expanded_local_pos: torch.Tensor  # [num_rows] int32
    temperature: torch.Tensor  # [batch] float32
    seed: torch.Tensor  # [batch] int64

    @classmethod
    def of(cls, case: Case, device: torch.device) -> Inputs:
        generator = torch.Generator(device).manual_seed(SEED)
        batch, k, vocab = case.batch, case.k, case.vocab
        rows = torch.arange(case.num_rows, device=device)
        depth = rows % (k + 1)
        target_logits = torch.empty(case.num_rows, vocab, device=device, dtype=DTYPES[case.dtype])
        target_logits.normal_(generator=generator)
        draft_logits = torch.empty(batch, k, vocab, device=device, dtype=DTYPES[case.dtype])
        draft_logits.normal_(generator=generator)
        likely = torch.randint(0, vocab, (case.num_rows,), device=device, generator=generator)
        target_logits[rows, likely] = logit_of(TARGET_PROBABILITY, vocab)
        is_draft = depth < k
        draft_logits.view(-1, vocab)[torch.arange(batch * k, device=device), likely[is_draft]] = logit_of(
            DRAFT_PROBABILITY, vocab
        )
        return cls(
            k=k,
            target_logits=target_logits,
            draft_logits=draft_logits,
            draft_sampled=likely.roll(1).to(torch.int32),
            cu_num_logits=torch.arange(0, case.num_rows + 1, k + 1, device=device, dtype=torch.int32),
            pos=100 + depth,
            idx_mapping=torch.arange(batch, device=device),
            expanded_idx_mapping=rows // (k + 1),
            expanded_local_pos=depth.to(torch.int32),
            temperature=torch.ones(batch, device=device),
            seed=torch.randint(0, 2**62, (batch,), device=device, generator=generator),
        )


def logit_of(probability: float, vocab: int) -> float:
    """The logit that gives one token about this probability among standard normal ones."""
    return math.log(probability / (1 - probability)) + math.log(vocab) + 0.5


Verifier = Callable[[Inputs], tuple[torch.Tensor, torch.Tensor]]


def verifiers() -> dict[str, Verifier]:
    """The three, by name. Only arguments that vLLM 0.32 and 0.33 both have."""
    from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample
    from vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils import rejection_sample

    from vllm_specplug.samplers.kernels import verify_drafts

    def ours(given: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        token_ids = gumbel_sample(
            given.target_logits,
            given.expanded_idx_mapping,
            given.temperature,
            given.seed,
            given.pos,
            apply_temperature=False,
            is_drafting=False,
        )
        return verify_drafts(token_ids, given.draft_sampled, given.cu_num_logits, given.k + 1)

    def theirs(given: Inputs, draft_logits: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        token_ids, num_emitted = rejection_sample(
            target_logits=given.target_logits,
            draft_logits=draft_logits,
            draft_sampled=given.draft_sampled,
            cu_num_logits=given.cu_num_logits,
            pos=given.pos,
            idx_mapping=given.idx_mapping,
            expanded_idx_mapping=given.expanded_idx_mapping,
            expanded_local_pos=given.expanded_local_pos,
            temperature=given.temperature,
            seed=given.seed,
            num_speculative_steps=given.k,
        )
        return token_ids, num_emitted

    return {
        OURS: ours,
        ONE_HOT: lambda given: theirs(given, None),
        CACHED: lambda given: theirs(given, given.draft_logits),
    }


def emitted(verify: Verifier, given: Inputs) -> list[list[int]]:
    """The tokens that each request emits."""
    token_ids, num_emitted = verify(given)
    return [row[:count] for row, count in zip(token_ids.tolist(), num_emitted.tolist(), strict=True)]


def require_same_greedy_tokens(named: Mapping[str, Verifier], given: Inputs) -> None:
    """All three must emit the same at temperature 0, where some drafts are wrong.

    Raises:
        SystemExit: they do not.
    """
    wrong = torch.rand(given.draft_sampled.shape, device=given.pos.device) < 0.3
    vocab = given.target_logits.shape[1]
    drafts = torch.where(wrong, (given.draft_sampled + 1) % vocab, given.draft_sampled)
    greedy = Inputs(**{**vars(given), "draft_sampled": drafts, "temperature": torch.zeros_like(given.temperature)})
    tokens = {name: emitted(verify, greedy) for name, verify in named.items()}
    for name in (ONE_HOT, CACHED):
        if tokens[name] != tokens[OURS]:
            raise SystemExit(f"{name} and ours emit different tokens at temperature 0: nothing here can be trusted")


@dataclass(frozen=True)
class Timing:
    """Of one call, in microseconds, one value a repeat.

    Attributes:
        device_us: from the first kernel's start to the last one's end.
        host_us: to queue it all.
    """

    device_us: list[float]
    host_us: list[float]

    @property
    def median_us(self) -> float:
        return statistics.median(self.device_us)

    @property
    def median_host_us(self) -> float:
        return statistics.median(self.host_us)


class Stopwatch:
    """Times calls on a CUDA device."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self._repeats = repeats
        properties = torch.cuda.get_device_properties(device)
        num_bytes = max(EVICT_BYTES, 4 * properties.L2_cache_size)
        self._evicting = torch.zeros(num_bytes // 4, device=device)
        self._sum = torch.zeros((), device=device)

    def _evict(self, times: int = 1) -> None:
        # Read, not written: cache lines waiting to be written back would slow down what is measured.
        for _ in range(times):
            torch.sum(self._evicting, dim=0, out=self._sum)

    def _once(self, call: Callable[[], object], num_evictions: int) -> tuple[torch.cuda.Event, torch.cuda.Event, float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        self._evict(num_evictions)
        start.record()
        began = time.perf_counter()
        call()
        host_us = (time.perf_counter() - began) * 1e6
        end.record()
        return start, end, host_us

    def interleaved(self, calls: Mapping[str, Callable[[], object]]) -> dict[str, Timing]:
        """``repeats`` turns of each call, in rotating order, after a few that do not count."""
        for call in calls.values():
            for _ in range(WARM_UP_CALLS):
                call()
        torch.cuda.synchronize()
        queueing_us = max(statistics.median(self._once(call, 1)[2] for _ in range(5)) for call in calls.values())
        torch.cuda.synchronize()
        start, end, _ = self._once(self._evict, 1)
        torch.cuda.synchronize()
        num_evictions = max(1, math.ceil(2 * queueing_us / (start.elapsed_time(end) * 1e3)))
        names = list(calls)
        turns: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event, float]]] = {name: [] for name in names}
        for repeat in range(self._repeats):
            shift = repeat % len(names)
            for name in names[shift:] + names[:shift]:
                turns[name].append(self._once(calls[name], num_evictions))
            torch.cuda.synchronize()
        return {
            name: Timing([start.elapsed_time(end) * 1e3 for start, end, _ in of], [host for _, _, host in of])
            for name, of in turns.items()
        }

    def copy_bytes_per_s(self) -> float:
        """What a plain large copy on the device moves, reading and writing counted."""
        source = torch.zeros(COPY_BYTES // 4, device=self._sum.device)
        target = torch.empty_like(source)
        timing = self.interleaved({"copy": lambda: target.copy_(source)})["copy"]
        return 2 * COPY_BYTES / (timing.median_us * 1e-6)


def median_ratio(theirs: Timing, ours: Timing) -> float:
    """Median over the repeats of their time over ours, each pair measured next to each other."""
    return statistics.median(a / b for a, b in zip(theirs.device_us, ours.device_us, strict=True))


def cases_of(arguments: argparse.Namespace) -> Iterator[Case]:
    """All combinations, vocabulary and type outermost."""
    for dtype in arguments.dtype:
        for vocab in arguments.vocab:
            for k in arguments.k:
                for batch in arguments.batch:
                    yield Case(batch, k, vocab, dtype)


def measure_verification(
    cases: Sequence[Case], device: torch.device, stopwatch: Stopwatch | None, copy_bytes_per_s: float
) -> list[list[str]]:
    """Rows of the first table; without a stopwatch nothing is timed."""
    named = verifiers()
    rows = []
    for case in cases:
        head = [str(case.batch), str(case.k), f"{case.vocab:,}", case.dtype]
        tail = [f"{case.cache_bytes / 2**20:,.1f}"]
        try:
            given = Inputs.of(case, device)
            require_same_greedy_tokens(named, given)
            lengths = {
                name: sum(map(len, emitted(verify, given))) / case.batch
                for name, verify in named.items()
                # Triton's interpreter knows no log1p, which vLLM needs to draw anew after a rejection.
                if device.type == "cuda" or name != CACHED
            }
            progress.print(f"{case}: emitted a request: " + "; ".join(f"{name} {n:.2f}" for name, n in lengths.items()))
            if stopwatch is None:
                rows.append([*head, *["-"] * 7, *tail, "-"])
                continue
            timings = stopwatch.interleaved({name: bound(verify, given) for name, verify in named.items()})
        except torch.OutOfMemoryError:
            needed_gib = (case.logits_bytes + case.cache_bytes) / 2**30
            progress.print(f"{case}: skipped, its logits take {needed_gib:.1f} GiB, more than this device has free")
            rows.append([*head, "does not fit", *["-"] * 6, *tail, "-"])
            continue
        finally:
            given = None  # type: ignore[assignment]  # gone before the next case is allocated
            if device.type == "cuda":
                torch.cuda.empty_cache()
        ours = timings[OURS]
        bytes_per_s = case.logits_bytes / (ours.median_us * 1e-6)
        rows.append(
            [
                *head,
                *(f"{timings[name].median_us:.1f}" for name in (OURS, ONE_HOT, CACHED)),
                *(f"{median_ratio(timings[name], ours):.2f}" for name in (ONE_HOT, CACHED)),
                f"{bytes_per_s / 1e9:.0f}",
                f"{bytes_per_s / copy_bytes_per_s:.0%}",
                *tail,
                " / ".join(f"{timings[name].median_host_us:.0f}" for name in (OURS, ONE_HOT, CACHED)),
            ]
        )
    return rows


def bound(verify: Verifier, given: Inputs) -> Callable[[], object]:
    """A call without arguments."""
    return lambda: verify(given)


def token_table(device: torch.device) -> tuple[torch.Tensor, object]:
    """Prompts and outputs where vLLM keeps them by default, in host memory that the device reads; and its owner."""
    if device.type != "cuda":
        return torch.zeros(8, 64, dtype=torch.int32), None
    from vllm.v1.worker.gpu.buffer_utils import UvaBuffer

    buffer = UvaBuffer((MAX_REQUESTS, MAX_LEN), torch.int32)
    return buffer.uva(), buffer


class RoundTrip:
    """What a step pays for drafting on the host, the drafting itself left out: results down, drafts up.

    Args:
        all_token_ids: ``[max_requests, max_len]`` int32.
    """

    def __init__(self, batch: int, k: int, all_token_ids: torch.Tensor, device: torch.device) -> None:
        from vllm_specplug.samplers.kernels import NUM_HEADER_COLUMNS, pack_emitted

        self._pack = pack_emitted
        self._all_token_ids = all_token_ids
        pinned = device.type == "cuda"
        width = k + 1
        max_requests, max_len = self._all_token_ids.shape
        generator = torch.Generator().manual_seed(SEED)
        self._idx_mapping = torch.randperm(max_requests, generator=generator)[:batch].to(device)
        self._num_emitted = torch.randint(1, width + 1, (batch,), generator=generator).to(device, torch.int32)
        self._total_len = torch.randint(width, max_len, (max_requests,), generator=generator).to(device, torch.int32)
        self._verified = torch.zeros(batch, width, device=device, dtype=torch.int64)
        self._packed = torch.empty(batch, NUM_HEADER_COLUMNS + width, device=device, dtype=torch.int32)
        self.results = torch.empty(self._packed.shape, dtype=torch.int32, pin_memory=pinned)
        self.drafts = torch.randint(0, 1000, (batch, k), generator=generator, dtype=torch.int32)
        if pinned:
            self.drafts = self.drafts.pin_memory()
        self._uploaded = torch.empty(batch, k, device=device, dtype=torch.int32)
        self._table = torch.zeros(max_requests, k, device=device, dtype=torch.int64)
        self._arrived = torch.cuda.Event() if pinned else None  # type: ignore[no-untyped-call]

    def send_down(self) -> None:
        """Queue packing and the copy to the host."""
        self._pack(
            self._idx_mapping, self._num_emitted, self._total_len, self._all_token_ids, self._verified, self._packed
        )
        self.results.copy_(self._packed, non_blocking=True)

    def wait(self) -> None:
        """Until what was sent down has arrived."""
        if self._arrived is not None:
            self._arrived.record()
            self._arrived.synchronize()

    def send_up(self) -> None:
        """Queue the copy of the drafts to the device and their place in the engine's table."""
        self._uploaded.copy_(self.drafts, non_blocking=True)
        self._table.index_copy_(0, self._idx_mapping, self._uploaded.to(torch.int64))

    def host_us(self) -> tuple[float, float]:
        """Of one step on an idle device: until the results are there, and to queue what goes up."""
        began = time.perf_counter()
        self.send_down()
        self.wait()
        arrived = time.perf_counter()
        self.send_up()
        return (arrived - began) * 1e6, (time.perf_counter() - arrived) * 1e6

    def require_right(self) -> None:
        """Results and drafts must arrive.

        Raises:
            SystemExit: they do not.
        """
        self.host_us()
        requests = self._idx_mapping.cpu()
        headers = torch.stack([self._total_len.cpu()[requests], self._num_emitted.cpu()], dim=1)
        if not (
            torch.equal(self.results[:, :2], headers) and torch.equal(self._table.cpu()[requests], self.drafts.long())
        ):
            raise SystemExit("the round trip delivers other numbers than were sent: nothing here can be trusted")


def measure_round_trip(
    arguments: argparse.Namespace, device: torch.device, stopwatch: Stopwatch | None
) -> list[list[str]]:
    """Rows of the second table; without a stopwatch nothing is timed."""
    all_token_ids, _owner = token_table(device)
    rows = []
    for k in arguments.k:
        for batch in arguments.batch:
            trip = RoundTrip(batch, k, all_token_ids, device)
            trip.require_right()
            sizes = [f"{tensor.nbytes:,}" for tensor in (trip.results, trip.drafts)]
            if stopwatch is None:
                rows.append([str(batch), str(k), *sizes, *["-"] * 5])
                continue
            host_us = []
            for _ in range(WARM_UP_CALLS + 4 * arguments.repeats):
                torch.cuda.synchronize()
                host_us.append(trip.host_us())
            down_us, up_us, both_us = (
                statistics.median(of) for of in zip(*((a, b, a + b) for a, b in host_us[WARM_UP_CALLS:]), strict=True)
            )
            timings = stopwatch.interleaved({"down": trip.send_down, "up": trip.send_up})
            times = down_us, up_us, both_us, timings["down"].median_us, timings["up"].median_us
            rows.append([str(batch), str(k), *sizes, *(f"{us:.1f}" for us in times)])
    return rows


def about(device: torch.device, stopwatch: Stopwatch | None, copy_bytes_per_s: float) -> dict[str, str]:
    """Setting of the measurement, the device's included."""
    import triton

    found = setting()
    found["versions"] += f", triton {triton.__version__}"
    if device.type == "cuda":
        found["device"] = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    if stopwatch is None:
        found["times"] = "none: this only shows that the program works"
    else:
        found["copy"] = f"{copy_bytes_per_s / 1e9:.0f} GB/s, reading and writing counted ({COPY_BYTES >> 20} MiB)"
    return found


def print_tables(tables: Mapping[str, tuple[Sequence[str], Sequence[Sequence[str]]]], info: Mapping[str, str]) -> None:
    """For the terminal; wide enough where there is none."""
    console = Console(width=None if sys.stdout.isatty() else 180, highlight=False)
    for name, value in info.items():
        console.print(f"{name}: {value}", markup=False)
    for title, (columns, rows) in tables.items():
        table = Table(title=title)
        for column in columns:
            table.add_column(column, justify="right")
        for row in rows:
            table.add_row(*row)
        console.print(table)


def interpret_on_the_cpu() -> None:
    """Run under Triton's interpreter, in a fresh process if it is too late for that in this one."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "TRITON_INTERPRET": "1"})
    import triton.backends

    # A CPU build of vLLM takes Triton for missing unless there is a backend of this name.
    driver = type("Driver", (), {"is_active": staticmethod(lambda: True)})
    triton.backends.backends["cpu"] = type("Backend", (), {"driver": driver, "compiler": None})()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", help="requests (default: 1 8 32 64 256)")
    parser.add_argument("--k", type=int, nargs="+", help="draft tokens of each request (default: 1 3 7 15)")
    parser.add_argument("--vocab", type=int, nargs="+", help="default: 32768 131072 262144")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", help="of the logits (default: both)")
    parser.add_argument("--repeats", type=int, help="turns of each verifier in each case (default: 50)")
    parser.add_argument("--quick", action="store_true", help="fewer of everything that is not given")
    parser.add_argument("--round-trip", action="store_true", help="also time what drafting on the host costs a step")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the tables here")
    parser.add_argument("--check", action="store_true", help="one tiny case of everything, without timing")
    arguments = parser.parse_args()
    full: dict[str, Any] = {
        "batch": [1, 8, 32, 64, 256], "k": [1, 3, 7, 15], "vocab": [32_768, 131_072, 262_144],
        "dtype": ["bf16", "fp32"], "repeats": 50,
    }  # fmt: skip
    quick: dict[str, Any] = {"batch": [1, 32], "k": [3, 7], "vocab": [131_072], "dtype": ["bf16"], "repeats": 20}
    tiny: dict[str, Any] = {"batch": [3], "k": [2], "vocab": [1500], "dtype": ["bf16", "fp32"], "repeats": 1}
    for name, value in (tiny if arguments.check else quick if arguments.quick else full).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    arguments.round_trip |= arguments.check
    return arguments


def main() -> None:
    arguments = parse_arguments()
    if not torch.cuda.is_available():
        if not arguments.check:
            print("verify_kernel.py needs a CUDA device; --check shows on a CPU that it works", file=sys.stderr)
            raise SystemExit(EXIT_UNUSABLE)
        interpret_on_the_cpu()
    try:
        import vllm  # noqa: F401  # asked for before anything is measured
    except ImportError as error:
        print(
            f"verify_kernel.py compares with vLLM's own kernels and needs vllm 0.32 or 0.33: {error}", file=sys.stderr
        )
        raise SystemExit(EXIT_UNUSABLE) from error
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stopwatch = None if arguments.check else Stopwatch(device, arguments.repeats)
    copy_bytes_per_s = stopwatch.copy_bytes_per_s() if stopwatch else math.nan
    tables = {
        "Verification of one batch": (
            VERIFY_COLUMNS,
            measure_verification(list(cases_of(arguments)), device, stopwatch, copy_bytes_per_s),
        )
    }
    if arguments.round_trip:
        tables["Round trip of drafting on the host, a step"] = (
            ROUND_TRIP_COLUMNS,
            measure_round_trip(arguments, device, stopwatch),
        )
    info = about(device, stopwatch, copy_bytes_per_s)
    print_tables(tables, info)
    if arguments.markdown:
        with arguments.markdown.open("w") as file, contextlib.redirect_stdout(file):
            for title, (columns, rows) in tables.items():
                print(f"### {title}\n")
                print_markdown(info, columns, rows)
                print()


if __name__ == "__main__":
    main()
