"""The rest proposer on a GPU: the token store lives in device memory, and one program of a kernel drafts for a request.

Token ids so far go in as a tensor on the device and drafts come out as tensors on the device, so a step that drafts
this way waits for no host. The drafts are those of :class:`~.proposer.RestProposer` for greedy requests bit for bit,
confidences included. Requests that sample get the same: the token with the most votes, without the target's noise.
Requests cannot choose among stores, of which there is one.

- *Lookup.* Where a context belongs in the suffix array does not depend on how it is searched for. Each round compares
  ``PROBES`` evenly spaced entries at once, each over all tokens of the longest match, since a GPU waits as long for one
  load as for a thousand: 6 rounds for 80 million tokens, where halving takes 27. Three such searches find the longest
  match and both ends of its occurrences.
- *Vote.* The occurrences that vote are the lanes of a vector, in the order in which the host's loop meets them. Of
  tokens with equally many votes the host takes the one that had them first, and so does :func:`_most_voted`.
- *Confidence.* It decides where a draft ends, and the ``log`` and ``exp`` of a GPU are not those of a CPU. So the
  kernel reads :func:`~.confidence.vote_confidence` from a table that the host filled, and only multiplies, in float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_specplug.proposers.base import ProposerContext
from vllm_specplug.proposers.rest.confidence import vote_confidence
from vllm_specplug.proposers.rest.proposer import RestProposer

try:
    # not typed, and not there at all without CUDA
    import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
    import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]
except ImportError as error:
    raise ImportError(
        "vllm_specplug.proposers.rest.device needs the package triton, which comes with CUDA builds of torch; without "
        "it, vllm_specplug.proposers.rest.proposer drafts the same on the host"
    ) from error

LARGEST_MAX_MATCH = 256
"""Longest match that a program compares at once."""
LARGEST_MAX_VOTES = 128
"""A program compares every vote with every other at once: 128 * 128 pairs still fit the registers of its warps."""
PROBES = 32
"""Entries of the suffix array that a round of the search looks at."""
NUM_WARPS = 4
UPLOAD_BYTES = 64 * 2**20
"""What is copied to the device at one go: a store need not fit the host's memory beside its memory map."""


@triton.jit  # type: ignore[untyped-decorator]
def _search(  # type: ignore[no-untyped-def]
    tokens, positions, first_token, low, high, suffix, limit,
    after: tl.constexpr, match_lanes: tl.constexpr, num_probes: tl.constexpr,
):  # fmt: skip
    """Where in ``positions[low:high]``, one segment's or a part of it, a suffix belongs.

    Args:
        tokens: ``[num_slots]``, the store's tokens.
        first_token: the segment's first token.
        suffix: ``[match_lanes]`` int32, the context read backwards; only its first ``limit`` tokens count.
        after: 0 to come out before all entries that match ``limit`` tokens, 1 to come out behind them.

    Returns:
        (index, length): the entry before which the suffix belongs, and the longest match that was met on the way. If
        the suffix belongs inside a segment, both neighbours of that place were met, and one of them matches longest.
    """
    probe = tl.arange(0, num_probes)
    back = tl.arange(0, match_lanes)[None, :]
    longest = 0
    while low < high:
        # One of high - low + 1 places is right. Probes cut them into num_probes + 1 pieces, the last ones maybe empty.
        step = (high - low) // (num_probes + 1) + 1
        index = low + (probe + 1) * step - 1
        inside = index < high
        following = first_token + tl.load(positions + index, mask=inside, other=0).to(tl.int64)
        slot = following[:, None] - 1 - back
        # A separator differs from any token of a context, so what lies before the first document is not missed.
        text = tl.load(tokens + slot, mask=inside[:, None] & (back < limit) & (slot >= 0), other=0).to(tl.int32)
        differs = (text != suffix[None, :]) & (back < limit)
        # [num_probes]: twice the length of the match, and odd where the suffix belongs before the entry.
        order = tl.where(differs, 2 * back + (text > suffix[None, :]).to(tl.int32), 2 * limit + 1 - after)
        order = tl.min(order, axis=1)
        longest = tl.maximum(longest, tl.max(tl.where(inside, order // 2, 0), axis=0))
        num_smaller = tl.sum((inside & (order % 2 == 0)).to(tl.int32), axis=0)
        high = tl.minimum(high, low + (num_smaller + 1) * step - 1)
        low += num_smaller * step
    return low, longest


@triton.jit  # type: ignore[untyped-decorator]
def _most_voted(token, voting, vote_lanes: tl.constexpr):  # type: ignore[no-untyped-def]
    """The token with the most votes, and how many: of several, the one that had so many votes first.

    Votes for 5, 7, 7, 5 elect 7: it had two votes before 5 had.

    Args:
        token: ``[vote_lanes]`` int32, -1 if not voting.
        voting: ``[vote_lanes]`` bool, at least one of them true.
    """
    vote = tl.arange(0, vote_lanes)
    earlier = (token[:, None] == token[None, :]) & (vote[:, None] >= vote[None, :])
    # Number of votes for the same token up to and with this one. The first to reach the highest count decides.
    nth = tl.sum(earlier.to(tl.int32), axis=1)
    best = tl.max(tl.where(voting, nth * vote_lanes + vote_lanes - 1 - vote, 0), axis=0)
    decider = vote_lanes - 1 - best % vote_lanes
    return tl.sum(tl.where(vote == decider, token, 0), axis=0), best // vote_lanes


@triton.jit(do_not_specialize=["row_stride"])  # type: ignore[untyped-decorator]
def _draft_kernel(  # type: ignore[no-untyped-def]
    tokens, positions, segments, confidences, min_confidence,
    token_ids, row_stride, total_len, rows, wanted, drafts, num_tokens, out_confidence,
    num_segments: tl.constexpr, vocab_size: tl.constexpr, max_match: tl.constexpr, min_match: tl.constexpr,
    max_votes: tl.constexpr, draft_width: tl.constexpr, segment_lanes: tl.constexpr, match_lanes: tl.constexpr,
    vote_lanes: tl.constexpr, draft_lanes: tl.constexpr, num_probes: tl.constexpr,
):  # fmt: skip
    """``draft_one`` of drafts.py, one program a request. The first five arguments are :class:`DeviceRest`'s tensors.

    ``*_lanes``: the number before it, rounded up to a power of two.
    """
    request = tl.program_id(0)
    row = tl.load(rows + request).to(tl.int64)
    num_context = tl.load(total_len + row)
    max_draft = tl.minimum(tl.load(wanted + request), draft_width)

    # The last tokens read backwards, up to the first that no store can hold: [match_lanes].
    back = tl.arange(0, match_lanes)
    suffix = tl.load(
        token_ids + row * row_stride + num_context - 1 - back,
        mask=(back < num_context) & (back < max_match),
        other=-1,
    )
    limit = tl.min(tl.where((suffix < 0) | (suffix >= vocab_size), back, match_lanes), axis=0)

    # The longest match of all segments, and its range of positions in each: [segment_lanes].
    num_searched = tl.where((max_draft > 0) & (limit >= min_match), num_segments, 0)
    lane = tl.arange(0, segment_lanes)
    begins = tl.zeros([segment_lanes], tl.int64)
    counts = tl.zeros([segment_lanes], tl.int64)
    longest = 0
    for segment in range(num_searched):
        first_token = tl.load(segments + 4 * segment)
        start = tl.load(segments + 4 * segment + 2)
        stop = tl.load(segments + 4 * segment + 3)
        place, length = _search(tokens, positions, first_token, start, stop, suffix, limit, 0, match_lanes, num_probes)
        if length >= tl.maximum(longest, min_match):
            begin, _ = _search(tokens, positions, first_token, start, place, suffix, length, 0, match_lanes, num_probes)
            end, _ = _search(tokens, positions, first_token, place, stop, suffix, length, 1, match_lanes, num_probes)
            counts = tl.where(length > longest, 0, counts)  # shorter matches have no vote
            begins = tl.where(lane == segment, begin, begins)
            counts = tl.where(lane == segment, end - begin, counts)
            longest = length

    # What follows the occurrences that vote, evenly spread over all of them, as slots of the store: [vote_lanes].
    total = tl.sum(counts, axis=0)
    num_votes = tl.minimum(total, max_votes)
    vote = tl.arange(0, vote_lanes)
    voting = vote < num_votes
    nth = vote * total // tl.maximum(num_votes, 1)
    following = tl.zeros([vote_lanes], tl.int64)
    passed = tl.zeros_like(total)
    for segment in range(num_searched):
        first_token = tl.load(segments + 4 * segment)
        begin = tl.sum(tl.where(lane == segment, begins, 0), axis=0)
        count = tl.sum(tl.where(lane == segment, counts, 0), axis=0)
        here = voting & (nth >= passed) & (nth < passed + count)
        position = tl.load(positions + begin + nth - passed, mask=here, other=0).to(tl.int64)
        following = tl.where(here, first_token + position, following)
        passed += count

    # The vote, token by token. Who was outvoted votes no more.
    least = tl.load(min_confidence)
    chance = tl.full([], 1.0, tl.float64)
    depth = 0
    drafting = (num_votes > 0) & (depth < max_draft)
    while drafting:
        token = tl.load(tokens + following + depth, mask=voting, other=0).to(tl.int32)
        token = tl.where(voting, token, -1)
        choice, num_agreeing = _most_voted(token, voting, vote_lanes)
        num_voting = tl.sum(voting.to(tl.int32), axis=0)
        confidence = tl.load(
            confidences + ((longest + depth - 1) * max_votes + num_voting - 1) * max_votes + num_agreeing - 1
        )
        chance *= confidence
        drafting = (choice != vocab_size) & (chance >= least)
        tl.store(drafts + request * draft_width + depth, choice.to(tl.int64), mask=drafting)
        tl.store(out_confidence + request * draft_width + depth, confidence.to(tl.float32), mask=drafting)
        voting = voting & (token == choice)
        depth += drafting.to(tl.int32)
        drafting = drafting & (depth < max_draft)
    tl.store(num_tokens + request, depth)
    column = tl.arange(0, draft_lanes)
    empty = (column >= depth) & (column < draft_width)
    tl.store(drafts + request * draft_width + column, tl.zeros([draft_lanes], tl.int64), mask=empty)
    tl.store(out_confidence + request * draft_width + column, tl.zeros([draft_lanes], tl.float32), mask=empty)


class DeviceRest:
    """What :class:`~.proposer.RestProposer` drafts, drafted on a device. Keeps no state about requests.

    Device memory: 6 or 8 bytes a token of the store (ids of 16 or 32 bits), and 8 bytes for each entry of the table of
    confidences, 1.5 MB with the default options and 16 draft tokens.

    Args:
        context: as for :class:`~.proposer.RestProposer`: ``datastores``, of which there must be one, ``options``,
            ``vocab_size`` and ``num_speculative_tokens`` count, the latter as the width of what :meth:`propose`
            returns.
        device: where the store and the drafts are to be; the current device of the process when it calls.

    Attributes:
        num_bytes: device memory held, in bytes.

    Raises:
        ValueError: what :class:`~.proposer.RestProposer` refuses; several stores; ``sharpness``, as no noise is known
            here; ``max_match`` above :data:`LARGEST_MAX_MATCH` or ``max_votes`` above :data:`LARGEST_MAX_VOTES`.
    """

    def __init__(self, context: ProposerContext, device: torch.device | str) -> None:
        host = RestProposer(context)
        if len(host.stores) > 1:
            raise ValueError(
                f"proposer 'rest' on a device drafts from one store, and there are {len(host.stores)}: "
                f"{', '.join(host.stores)}; give one, or leave on_device out"
            )
        if "sharpness" in context.options:
            raise ValueError(
                "proposer 'rest' on a device drafts the token with the most votes, without noise that sharpness could "
                "weigh it against; leave sharpness out, or on_device"
            )
        max_match, min_match, max_votes = (int(value) for value in host.settings)
        for name, value, largest in (
            ("max_match", max_match, LARGEST_MAX_MATCH),
            ("max_votes", max_votes, LARGEST_MAX_VOTES),
        ):
            if value > largest:
                raise ValueError(f"proposer 'rest' on a device: {name} may be up to {largest}, not {value}")
        self.num_draft_tokens = context.num_speculative_tokens
        (self.store,) = host.stores.values()
        self.device = torch.device(device)
        self._tokens = _upload(self.store.tokens, self.device)
        self._positions = _upload(self.store.positions, self.device)
        self._segments = _upload(self.store.segments, self.device)
        self._confidences = _upload(confidence_table(max_match + self.num_draft_tokens - 1, max_votes), self.device)
        # A tensor, since Triton passes plain floats in 32 bits.
        self._min_confidence = _upload(np.array([host.min_confidence]), self.device)
        num_segments = len(self.store.segments)
        self.constants = {
            "num_segments": num_segments,
            "vocab_size": self.store.header.vocab_size,
            "max_match": max_match,
            "min_match": min_match,
            "max_votes": max_votes,
            "draft_width": self.num_draft_tokens,
            "segment_lanes": triton.next_power_of_2(num_segments),
            "match_lanes": triton.next_power_of_2(max_match),
            "vote_lanes": triton.next_power_of_2(max_votes),
            "draft_lanes": triton.next_power_of_2(self.num_draft_tokens),
            "num_probes": PROBES,
        }
        """What the kernel is compiled for."""

    @property
    def num_bytes(self) -> int:
        held = self._tokens, self._positions, self._segments, self._confidences, self._min_confidence
        return sum(tensor.nbytes for tensor in held)

    def propose(
        self,
        token_ids: torch.Tensor,  # [max_requests, max_len]
        total_len: torch.Tensor,  # [max_requests]
        rows: torch.Tensor,  # [num_requests]
        wanted: torch.Tensor,  # [num_requests]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Draft for a batch. Queues one kernel and returns; the first call compiles it, whatever is ``wanted``.

        Args:
            token_ids: int32, the engine's table of token ids, any distance between its rows; what lies in a row behind
                its ``total_len`` is not read.
            total_len: int32, prompt and emitted tokens so far of each *row*.
            rows: int64 or int32, the row of each request; need be neither sorted nor distinct.
            wanted: int32, the longest draft that is of use to each request; 0 for none.

        Returns:
            (token_ids ``[num_requests, num_draft_tokens]`` int64, num_tokens ``[num_requests]`` int32, confidence
            ``[num_requests, num_draft_tokens]`` float32), new tensors on the device. Columns from ``num_tokens[i]`` on
            are 0. For confidence see :class:`~.base.Drafts`.

        Raises:
            ValueError: tokens of a row, or one of the other tensors, do not lie side by side in memory.
        """
        for name, tensor in (("token_ids", token_ids), ("total_len", total_len), ("rows", rows), ("wanted", wanted)):
            if tensor.stride(-1) != 1:
                raise ValueError(f"{name} has stride {tensor.stride(-1)} where the kernel reads neighbours")
        num_requests = len(rows)
        shape = num_requests, self.num_draft_tokens
        drafts = torch.empty(shape, dtype=torch.int64, device=self.device)
        num_tokens = torch.empty(num_requests, dtype=torch.int32, device=self.device)
        confidence = torch.empty(shape, dtype=torch.float32, device=self.device)
        if num_requests:
            _draft_kernel[(num_requests,)](
                self._tokens, self._positions, self._segments, self._confidences, self._min_confidence,
                token_ids, token_ids.stride(0), total_len, rows, wanted, drafts, num_tokens, confidence,
                **self.constants, num_warps=NUM_WARPS, enable_fp_fusion=False,
            )  # fmt: skip
        return drafts, num_tokens, confidence

    def describe(self) -> str:
        """A few words for the start-up line."""
        header = self.store.header
        return (
            f"{header.num_tokens:,} tokens of {header.num_documents:,} documents in {self.store.path}, "
            f"{self.num_bytes / 2**20:,.0f} MiB on {self.device}"
        )


def confidence_table(max_length: int, max_votes: int) -> NDArray[np.float64]:
    """The values of :func:`~.confidence.vote_confidence`, bit for bit.

    Returns:
        ``[max_length, max_votes, max_votes]`` float64, by length - 1, num_votes - 1 and num_agreeing - 1; 0 if more
        agree than vote.
    """
    table = np.zeros((max_length, max_votes, max_votes))
    for length in range(1, max_length + 1):
        for num_votes in range(1, max_votes + 1):
            # Entry by entry: a compiler that took several at once might round them otherwise than the proposer does.
            table[length - 1, num_votes - 1, :num_votes] = [
                vote_confidence(length, num_agreeing, num_votes) for num_agreeing in range(1, num_votes + 1)
            ]
    return table


def _upload(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """A copy on the device, of the same shape and width, unsigned integers included."""
    flat = array.reshape(-1)
    step = UPLOAD_BYTES // array.itemsize
    result: torch.Tensor | None = None
    for start in range(0, max(len(flat), 1), step):
        piece = torch.from_numpy(flat[start : start + step].copy())  # torch warns of arrays that cannot be written
        if result is None:
            result = torch.empty(len(flat), dtype=piece.dtype, device=device)
        result[start : start + len(piece)].copy_(piece)
    assert result is not None
    return result.view(array.shape)
