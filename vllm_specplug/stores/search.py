"""Compiled search in suffix arrays."""

from __future__ import annotations

import numpy as np

from vllm_specplug.compiled import inlined, kernel


@inlined
def place_of(positions, index, first_token, num_slots):
    """Slot of the token that follows an entry of the suffix array, inside the store whatever the entry says.

    Whoever writes into a file changes what is mapped, and nothing that could be checked before stays true.
    """
    return min(first_token + np.int64(positions[index]), num_slots - 1)


@kernel
def match_length(tokens, position, context, limit, start):
    """Length of the common suffix of ``tokens[:position]`` and ``context``, at most ``limit``, known to be >= start."""
    end = len(context)
    length = start
    while length < limit and tokens[position - 1 - length] == context[end - 1 - length]:
        length += 1
    return length


@kernel
def usable_length(context, max_match, vocab_size):
    """Length of the longest suffix, at most ``max_match``, of ids that a store of ``vocab_size`` can hold."""
    end = len(context)
    limit = min(max_match, end)
    for length in range(limit):
        token = context[end - 1 - length]
        if token < 0 or token >= vocab_size:
            return length
    return limit


@kernel
def _widen(tokens, positions, first_token, start, stop, table, rows, num_tokens, longest, inside, outside, place):
    """Find both ends of the entries of one segment that match, for all contexts side by side.

    Strides out from an entry that matches until one does not, then closes in.

    Args:
        start, stop: the segment's range of positions.
        longest: ``[num_requests]`` tokens that must match; 0 skips a request.
        inside: ``[num_requests, 2]`` known matching entries nearest to the lower and to the upper end; replaced by the
            first and the last matching entry.
        outside: ``[num_requests, 2]``, filled with the entries just outside of those.
        place: ``[num_requests, 2]`` int64, scratch space.
    """
    num_requests = len(rows)
    stride = 1
    fetched = np.int64(0)
    for i in range(num_requests):
        outside[i, 0] = start - 1
        outside[i, 1] = stop
    is_striding = np.ones((num_requests, 2), dtype=np.bool_)
    num_open = 1
    while num_open:
        num_open = 0
        for i in range(num_requests):
            for side in range(2):
                place[i, side] = -1
                if longest[i] == 0 or abs(outside[i, side] - inside[i, side]) <= 1:
                    continue
                if is_striding[i, side]:
                    probe = inside[i, side] - stride if side == 0 else inside[i, side] + stride
                    if probe <= start - 1 or probe >= stop:
                        is_striding[i, side] = False
                        probe = (inside[i, side] + outside[i, side]) >> 1
                else:
                    probe = (inside[i, side] + outside[i, side]) >> 1
                place[i, side] = probe
                num_open += 1
        stride *= 2
        # Fetches all that this round compares before it compares the first.
        for i in range(num_requests):
            for side in range(2):
                if place[i, side] >= 0:
                    fetched ^= np.int64(positions[place[i, side]])
        for i in range(num_requests):
            for side in range(2):
                if place[i, side] >= 0:
                    fetched ^= np.int64(tokens[place_of(positions, place[i, side], first_token, len(tokens)) - 1])
        for i in range(num_requests):
            for side in range(2):
                if place[i, side] < 0:
                    continue
                probe = place[i, side]
                position = place_of(positions, probe, first_token, len(tokens))
                context = table[rows[i], : num_tokens[i]]
                if match_length(tokens, position, context, longest[i], 0) == longest[i]:
                    inside[i, side] = probe
                else:
                    outside[i, side] = probe
                    is_striding[i, side] = False
    return fetched  # or the compiler would drop the fetches as unused


@kernel
def search_batch(
    tokens, positions, segments, vocab_size, table, rows, num_tokens, wanted, max_match, min_match, longest, ranges
):
    """Occurrences of the longest suffix of each context, in all segments.

    All contexts take a step of the binary search before one takes the next: the reads of a step are anywhere in the
    store, and the processor fetches them for many contexts at once instead of waiting for each of them.

    Args:
        wanted: ``[num_requests]``, 0 skips a request.
        longest: ``[num_requests]`` int64, filled with the length of each match, 0 if there is none.
        ranges: ``[num_requests, num_segments, 2]`` int64, filled with begin and end of the match's occurrences in each
            segment: the tokens that follow them are at ``first_token + positions[begin:end]``.
    """
    num_requests = len(rows)
    limits = np.zeros(num_requests, dtype=np.int64)
    for i in range(num_requests):
        longest[i] = 0
        if wanted[i] > 0:
            # Below the number of slots: an index before the first slot, which damaged contents can lead to, counts from
            # the last one, and so stays inside.
            longest_possible = min(max_match, len(tokens) - 1)
            limit = usable_length(table[rows[i], : num_tokens[i]], longest_possible, vocab_size)
            limits[i] = limit if limit >= min_match else 0
    low = np.empty(num_requests, dtype=np.int64)
    high = np.empty(num_requests, dtype=np.int64)
    low_length = np.empty(num_requests, dtype=np.int64)
    high_length = np.empty(num_requests, dtype=np.int64)
    place = np.empty(num_requests, dtype=np.int64)
    read = np.empty(num_requests, dtype=tokens.dtype)
    found = np.empty(num_requests, dtype=np.int64)
    inside = np.empty((num_requests, 2), dtype=np.int64)
    outside = np.empty((num_requests, 2), dtype=np.int64)
    probes = np.empty((num_requests, 2), dtype=np.int64)
    for segment in range(len(segments)):
        first_token, _, start, stop = segments[segment]
        num_open = 0
        for i in range(num_requests):
            low[i] = start
            high[i] = stop if limits[i] > 0 else start
            low_length[i] = 0
            high_length[i] = 0
            ranges[i, segment] = 0
            num_open += low[i] < high[i]
        while num_open:
            for i in range(num_requests):
                # A search that has ended reads some entry of its segment again.
                middle = min((low[i] + high[i]) >> 1, stop - 1)
                place[i] = place_of(positions, middle, first_token, len(tokens))
            for i in range(num_requests):
                read[i] = tokens[place[i] - 1]
            num_open = 0
            for i in range(num_requests):
                if low[i] == high[i]:
                    continue
                middle = (low[i] + high[i]) >> 1
                end = num_tokens[i]
                context = table[rows[i], :end]
                length = min(low_length[i], high_length[i])
                if length > 0 or read[i] == context[end - 1]:
                    length = match_length(tokens, place[i], context, limits[i], max(length, 1))
                # If the whole limit matches, the search goes on before this entry, to the first such entry.
                if length < limits[i] and tokens[place[i] - 1 - length] < context[end - 1 - length]:
                    low[i] = middle + 1
                    low_length[i] = length
                else:
                    high[i] = middle
                    high_length[i] = length
                num_open += low[i] < high[i]
        for i in range(num_requests):
            length = max(low_length[i], high_length[i])
            found[i] = length if length >= max(longest[i], min_match) else 0
            # The entries that match over that length surround ``low``: at least one of its neighbours does.
            inside[i, 0] = low[i] - 1 if low_length[i] == length else low[i]
            inside[i, 1] = low[i] if high_length[i] == length else low[i] - 1
        _widen(tokens, positions, first_token, start, stop, table, rows, num_tokens, found, inside, outside, probes)
        for i in range(num_requests):
            if found[i] == 0:
                continue
            if found[i] > longest[i]:
                longest[i] = found[i]
                ranges[i, :segment] = 0  # the matches of earlier segments were shorter and do not count
            ranges[i, segment, 0] = inside[i, 0]
            ranges[i, segment, 1] = inside[i, 1] + 1


@kernel
def spread_candidates(positions, segments, ranges, num_slots, candidates):
    """Positions of the tokens that follow some of the occurrences in ``ranges``, evenly spread over all of them.

    Args:
        ranges: ``[num_segments, 2]``.
        num_slots: tokens and separators of the store.
        candidates: int64, filled from its start.

    Returns:
        (number of candidates, number of occurrences).
    """
    total = 0
    for index in range(len(ranges)):
        total += ranges[index, 1] - ranges[index, 0]
    num_candidates = min(total, len(candidates))
    nth = 0
    passed = 0
    for index in range(len(segments) if total else 0):
        first_token = segments[index, 0]
        begin, end = ranges[index]
        while nth < num_candidates:
            at = begin + nth * total // num_candidates - passed
            if at >= end:
                break
            candidates[nth] = place_of(positions, at, first_token, num_slots)
            nth += 1
        passed += end - begin
    return num_candidates, total
