"""Copies whole KV-cache blocks whose ids are known on the device only.

vLLM's own ``copy_kv_cache_blocks_inplace`` takes ids on the host. Here one kernel copies the blocks of all layers. A
block that is its own target costs next to nothing, so that lists of ids can have a fixed length.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import product

import torch
import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]

_PIECE = 2**16
"""Most bytes that one program copies; a block's part in one layer is a few such pieces."""
_BLOCK_SIZE = 1024
_WORDS = {8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.int8}

Run = tuple[int, int, int]
"""A run of bytes that every block has: address in block 0, length, and distance from block to block, in bytes."""


@triton.jit  # type: ignore[untyped-decorator]
def _copy_kernel(  # type: ignore[no-untyped-def]
    sources_ptr,  # [num_copies]
    targets_ptr,  # [num_copies]
    runs_ptr,  # [num_runs, 3]: address, and number of words and distance between blocks in words
    word: tl.constexpr,
    block_size: tl.constexpr,
):
    source = tl.load(sources_ptr + tl.program_id(0)).to(tl.int64)  # int64: the offsets below pass 2**31
    target = tl.load(targets_ptr + tl.program_id(0)).to(tl.int64)
    if source != target:
        run_ptr = runs_ptr + tl.program_id(1) * 3
        cache_ptr = tl.load(run_ptr).to(tl.pointer_type(word))
        length = tl.load(run_ptr + 1)
        distance = tl.load(run_ptr + 2)
        for start in tl.range(0, length, block_size):
            at = start + tl.arange(0, block_size)
            words = tl.load(cache_ptr + source * distance + at, mask=at < length)
            tl.store(cache_ptr + target * distance + at, words, mask=at < length)


class BlockCopies:
    """Copies blocks of a runner's KV cache.

    Args:
        caches: per layer ``[num_blocks * kernel blocks per block, ...]``, in any memory layout; layers may share memory
            and overlap.
        num_blocks: number of block ids.
    """

    def __init__(self, caches: Iterable[torch.Tensor], num_blocks: int) -> None:
        self._caches = list(caches)  # keeps the memory behind the addresses below alive
        runs = list(_pieces(_joined({run for cache in self._caches for run in _runs_of(cache, num_blocks)})))
        size = math.gcd(8, *(number for run in runs for number in run))
        self._word = _WORDS[size]
        device = self._caches[0].device
        self._runs = torch.tensor(
            [[address, length // size, distance // size] for address, length, distance in runs],
            dtype=torch.int64,
            device=device,
        )
        nothing = torch.zeros(1, dtype=torch.int64, device=device)
        self.copy(nothing, nothing)  # compiles the kernel

    def copy(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """Copy blocks, in no particular order.

        Args:
            sources, targets: ``[num_copies]`` int64 block ids. No block may be the target of one copy and the source of
                another, except that a block may be copied to itself.

        Raises:
            ValueError: the tensors differ in shape, are not contiguous, or are not int64.
        """
        for ids in (sources, targets):
            # The kernel would silently read the wrong memory.
            if ids.dtype != torch.int64 or ids.dim() != 1 or not ids.is_contiguous() or ids.shape != sources.shape:
                raise ValueError(
                    "block ids must be two contiguous torch.int64 tensors of one length; given: "
                    f"{sources.dtype} {list(sources.shape)} of strides {list(sources.stride())} and {targets.dtype} "
                    f"{list(targets.shape)} of strides {list(targets.stride())}"
                )
        if len(sources):
            grid = (len(sources), len(self._runs))
            _copy_kernel[grid](sources, targets, self._runs, word=self._word, block_size=_BLOCK_SIZE)


def _runs_of(cache: torch.Tensor, num_blocks: int) -> Iterator[Run]:
    """The runs of contiguous bytes in one layer's part of a block."""
    blocks = cache.view(num_blocks, -1, *cache.shape[1:])
    size = cache.element_size()
    length = size
    outer: list[range] = []
    for stride, count in sorted(zip(blocks.stride()[1:], blocks.shape[1:], strict=True)):
        if not outer and stride * size == length:
            length *= count
        elif count > 1:
            outer.append(range(0, stride * size * count, stride * size))
    for offsets in product(*outer):
        yield cache.data_ptr() + sum(offsets), length, blocks.stride(0) * size


def _joined(runs: Iterable[Run]) -> Iterator[Run]:
    """The same bytes in fewer runs without overlap: layers of a block are adjacent, and groups share memory."""
    joined: list[Run] = []
    for address, length, distance in sorted(runs, key=lambda run: (run[2], run[0])):
        if joined and joined[-1][2] == distance:
            begin, before, _ = joined[-1]
            end = max(begin + before, address + length)
            # A joined run must not reach into the next block.
            if address <= begin + before and end - begin <= distance:
                joined[-1] = (begin, end - begin, distance)
                continue
        joined.append((address, length, distance))
    yield from joined


def _pieces(runs: Iterable[Run]) -> Iterator[Run]:
    """Cut runs into pieces of at most ``_PIECE`` bytes."""
    for address, length, distance in runs:
        for start in range(0, length, _PIECE):
            yield address + start, min(_PIECE, length - start), distance
