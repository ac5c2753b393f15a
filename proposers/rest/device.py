"""The rest proposer on a GPU: the token store is in device memory, and one program of a kernel drafts for a request.

Token ids and drafts are tensors on the device, so that a step never waits for the host. Drafts and confidences are bit
for bit those of :class:`~.proposer.RestProposer` for greedy requests. Requests that sample get the same drafts: the
tokens with the most votes, without the target's noise. There is one store, so that requests cannot choose among stores.

- *Lookup.* The result does not depend on the method of the search. Each round compares the context with ``PROBES``
  evenly spaced entries of the suffix array at once, over all tokens of the longest match, since a GPU waits as long for
  one load as for a thousand: 6 rounds for 80 million tokens, compared with 27 of a binary search. Three such searches
  find the longest match and both ends of its occurrences.
- *Vote.* The occurrences that vote are the lanes of a vector, in the order of the host's loop. Of tokens with equally
  many votes the host takes the one that reached that number first, and so does :func:`_most_voted`.
- *Confidence.* It decides where a draft ends, and ``log`` and ``exp`` of a GPU differ from those of a CPU. So the
  kernel reads :func:`~.confidence.vote_confidence` from a table that the host fills, and only multiplies, in float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_specplug.errors import DatastoreError
from vllm_specplug.proposers.base import ProposerContext
from vllm_specplug.proposers.rest.confidence import vote_confidence
from vllm_specplug.proposers.rest.proposer import RestProposer

try:
    # untyped, and missing without CUDA
    import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
    import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]
except ImportError as error:
    raise ImportError(
        "vllm_specplug.proposers.rest.device needs the package triton, which comes with CUDA builds of torch; without "
        "it, vllm_specplug.proposers.rest.proposer drafts the same on the host"
    ) from error

LARGEST_MAX_MATCH = 256
"""Largest ``max_match``: a program compares a whole match at once."""
LARGEST_MAX_VOTES = 128
"""Largest ``max_votes``: a program compares all pairs of votes at once, and 128 * 128 still fit its registers."""
PROBES = 32
"""Entries of the suffix array that a round of the search compares."""
NUM_WARPS = 4
UPLOAD_BYTES = 64 * 2**20
"""Bytes per copy to the device; piecewise copies keep a store from filling the host's memory."""


@triton.jit  # type: ignore[untyped-decorator]
def _search(  # type: ignore[no-untyped-def]
    tokens, positions, first_token, low, high, suffix, limit,
    num_slots, after: tl.constexpr, match_lanes: tl.constexpr, num_probes: tl.constexpr,
):  # fmt: skip
    """Search ``positions[low:high]``, all or part of one segment, for the position at which a suffix belongs.

    Args:
        tokens: ``[num_slots]``, the store's tokens. Entries of a damaged store point to the last one at most.
        first_token: slot of the segment's first token.
        suffix: ``[match_lanes]`` int32, the context read backwards; only its first ``limit`` tokens count.
        after: 0 for the position before all entries that match ``limit`` tokens, 1 for the position behind them.

    Returns:
        (index, length): the entry before which the suffix belongs, and the longest match among all compared entries.
        Inside a segment both neighbours of that position are compared, and one of them has the longest match.
    """
    probe = tl.arange(0, num_probes)
    back = tl.arange(0, match_lanes)[None, :]
    longest = 0
    while low < high:
        # The result is one of high - low + 1 positions. Probes cut these into num_probes + 1 pieces, maybe empty.
        step = (high - low) // (num_probes + 1) + 1
        index = low + (probe + 1) * step - 1
        inside = index < high
        following = first_token + tl.load(positions + index, mask=inside, other=0).to(tl.int64)
        following = tl.minimum(following, num_slots - 1)
        slot = following[:, None] - 1 - back
        # A separator differs from any token of a context: no match reaches slots before the first document.
        text = tl.load(tokens + slot, mask=inside[:, None] & (back < limit) & (slot >= 0), other=0).to(tl.int32)
        differs = (text != suffix[None, :]) & (back < limit)
        # [num_probes]: twice the length of the match, plus 1 if the suffix belongs before the entry.
        order = tl.where(differs, 2 * back + (text > suffix[None, :]).to(tl.int32), 2 * limit + 1 - after)
        order = tl.min(order, axis=1)
        longest = tl.maximum(longest, tl.max(tl.where(inside, order // 2, 0), axis=0))
        num_smaller = tl.sum((inside & (order % 2 == 0)).to(tl.int32), axis=0)
        high = tl.minimum(high, low + (num_smaller + 1) * step - 1)
        low += num_smaller * step
    return low, longest


@triton.jit  # type: ignore[untyped-decorator]
def _most_voted(token, voting, vote_lanes: tl.constexpr):  # type: ignore[no-untyped-def]
    """The token with the most votes, and its number of votes. Of equals, the token that reached that number first.

    Votes for 5, 7, 7, 5 elect 7: it has two votes before 5 has.

    Args:
        token: ``[vote_lanes]`` int32, -1 in lanes that do not vote.
        voting: ``[vote_lanes]`` bool, true in at least one lane.
    """
    vote = tl.arange(0, vote_lanes)
    earlier = (token[:, None] == token[None, :]) & (vote[:, None] >= vote[None, :])
    # Number of votes for the same token, up to and including this one. The first to reach the highest count decides.
    nth = tl.sum(earlier.to(tl.int32), axis=1)
    best = tl.max(tl.where(voting, nth * vote_lanes + vote_lanes - 1 - vote, 0), axis=0)
    decider = vote_lanes - 1 - best % vote_lanes
    return tl.sum(tl.where(vote == decider, token, 0), axis=0), best // vote_lanes


@triton.jit(do_not_specialize=["row_stride", "num_slots"])  # type: ignore[untyped-decorator]
def _draft_kernel(  # type: ignore[no-untyped-def]
    tokens, positions, segments, confidences, min_confidence,
    token_ids, row_stride, num_slots, total_len, rows, wanted, drafts, num_tokens, out_confidence,
    num_segments: tl.constexpr, vocab_size: tl.constexpr, max_match: tl.constexpr, min_match: tl.constexpr,
    max_votes: tl.constexpr, draft_width: tl.constexpr, segment_lanes: tl.constexpr, match_lanes: tl.constexpr,
    vote_lanes: tl.constexpr, draft_lanes: tl.constexpr, num_probes: tl.constexpr,
):  # fmt: skip
    """``draft_one`` of drafts.py, one program per request. The first five arguments are :class:`DeviceRest`'s tensors.

    ``*_lanes``: a number such as ``max_match``, rounded up to a power of two.
    """
    request = tl.program_id(0)
    row = tl.load(rows + request).to(tl.int64)
    num_context = tl.load(total_len + row)
    max_draft = tl.minimum(tl.load(wanted + request), draft_width)

    # The last tokens of the request, read backwards, up to the first that cannot be in a store: [match_lanes].
    back = tl.arange(0, match_lanes)
    suffix = tl.load(
        token_ids + row * row_stride + num_context - 1 - back,
        mask=(back < num_context) & (back < max_match),
        other=-1,
    )
    limit = tl.min(tl.where((suffix < 0) | (suffix >= vocab_size), back, match_lanes), axis=0)

    # The longest match over all segments, and its range of positions in each segment: [segment_lanes].
    num_searched = tl.where((max_draft > 0) & (limit >= min_match), num_segments, 0)
    lane = tl.arange(0, segment_lanes)
    begins = tl.zeros([segment_lanes], tl.int64)
    counts = tl.zeros([segment_lanes], tl.int64)
    longest = 0
    for segment in range(num_searched):
        first_token = tl.load(segments + 4 * segment)
        start = tl.load(segments + 4 * segment + 2)
        stop = tl.load(segments + 4 * segment + 3)
        place, length = _search(
            tokens, positions, first_token, start, stop, suffix, limit, num_slots, 0, match_lanes, num_probes
        )
        if length >= tl.maximum(longest, min_match):
            begin, _ = _search(
                tokens, positions, first_token, start, place, suffix, length, num_slots, 0, match_lanes, num_probes
            )
            end, _ = _search(
                tokens, positions, first_token, place, stop, suffix, length, num_slots, 1, match_lanes, num_probes
            )
            counts = tl.where(length > longest, 0, counts)  # shorter matches do not vote
            begins = tl.where(lane == segment, begin, begins)
            counts = tl.where(lane == segment, end - begin, counts)
            longest = length

    # Slots of the tokens behind the occurrences that vote, which are evenly spread over all: [vote_lanes].
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

    # The vote, token by token. An outvoted occurrence does not vote again.
    least = tl.load(min_confidence)
    chance = tl.full([], 1.0, tl.float64)
    depth = 0
    drafting = (num_votes > 0) & (depth < max_draft)
    while drafting:
        slot = tl.minimum(following + depth, num_slots - 1)
        token = tl.load(tokens + slot, mask=voting, other=0).to(tl.int64)
        # What is no token, in a damaged store, ends the draft as a separator does.
        token = tl.where(voting, tl.minimum(token, vocab_size).to(tl.int32), -1)
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
    """Drafts like :class:`~.proposer.RestProposer`, but on a device. Keeps no state about requests.

    Device memory: 6 or 8 bytes per token of the store (ids of 16 or 32 bits), and 8 bytes per entry of the table of
    confidences, 1.5 MB with the default options and 16 draft tokens.

    Args:
        context: context of :class:`~.proposer.RestProposer`. Used are ``datastores``, which must hold one store,
            ``options``, ``vocab_size``, and ``num_speculative_tokens`` as the width of :meth:`propose`'s results.
        device: device of store and drafts; must be the process's current device in all calls.

    Attributes:
        num_bytes: device memory in use, in bytes.

    Raises:
        ValueError: :class:`~.proposer.RestProposer` refuses the context; there are several stores; ``sharpness`` is
            set, which has no use without noise; ``max_match`` is above :data:`LARGEST_MAX_MATCH` or ``max_votes`` above
            :data:`LARGEST_MAX_VOTES`.
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
        if self.store.is_lost:
            raise DatastoreError(f"the token store {self.store.path} was cut while it was copied to {self.device}")
        # A tensor, since Triton passes plain floats as float32.
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
        """The kernel's compile-time constants."""

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
        """Draft for a batch. Queues one kernel and returns; the first call compiles it, even if ``wanted`` is 0.

        Args:
            token_ids: int32, the engine's table of token ids, with any row stride; columns from ``total_len`` on are
                not read.
            total_len: int32, prompt and emitted tokens so far, by *table row*.
            rows: int64 or int32, table row of each request; need be neither sorted nor distinct.
            wanted: int32, longest draft that can help each request; 0 for none.

        Returns:
            (token_ids ``[num_requests, num_draft_tokens]`` int64, num_tokens ``[num_requests]`` int32, confidence
            ``[num_requests, num_draft_tokens]`` float32), new tensors on the device. Columns from ``num_tokens[i]`` on
            are 0. For confidence see :class:`~.base.Drafts`.

        Raises:
            ValueError: rows of ``token_ids``, or one of the other tensors, are not contiguous in memory.
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
                token_ids, token_ids.stride(0), len(self._tokens), total_len, rows, wanted,
                drafts, num_tokens, confidence,
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
    """A table of :func:`~.confidence.vote_confidence`, bit for bit.

    Returns:
        ``[max_length, max_votes, max_votes]`` float64, by length - 1, num_votes - 1 and num_agreeing - 1; 0 if
        num_agreeing is above num_votes.
    """
    table = np.zeros((max_length, max_votes, max_votes))
    for length in range(1, max_length + 1):
        for num_votes in range(1, max_votes + 1):
            # Entry by entry: vectorised code might round otherwise than the proposer does.
            table[length - 1, num_votes - 1, :num_votes] = [
                vote_confidence(length, num_agreeing, num_votes) for num_agreeing in range(1, num_votes + 1)
            ]
    return table


def _upload(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """Copy an array to the device, with the same shape and item size."""
    flat = array.reshape(-1)
    step = UPLOAD_BYTES // array.itemsize
    result: torch.Tensor | None = None
    for start in range(0, max(len(flat), 1), step):
        piece = torch.from_numpy(flat[start : start + step].copy())  # torch warns about read-only arrays
        if result is None:
            result = torch.empty(len(flat), dtype=piece.dtype, device=device)
        result[start : start + len(piece)].copy_(piece)
    assert result is not None
    return result.view(array.shape)
