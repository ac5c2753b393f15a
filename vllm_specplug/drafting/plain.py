"""Plain copies of what a user's proposer answers and says of itself.

Whatever the proposer gives, the result is made of exact numpy arrays, integers and printable text that nobody else
holds: no subclass, no property, no array that somebody writes to later. Its size is bounded by what was asked for.
These functions run code of the user's (``__array__``, ``__iter__``, ``__str__``), so they run where the proposer does.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from dataclasses import fields
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_specplug.drafting.answers import from_lists
from vllm_specplug.proposers.base import Drafts, StoreStats

LONGEST_LINE = 200
"""Most characters of a description or a name."""
LONGEST_TRACEBACK = 4000
"""Most characters of a traceback, counted from its end, where the error stands."""
MOST_STORES = 100
_LARGEST = 2**63 - 1


def plain_drafts(answer: Any, num_requests: int, width: int, num_others: int) -> Drafts:
    """A private copy of an answer of ``Proposer.propose``; ids and lengths are as answered, valid or not.

    Args:
        answer: what the proposer answered.
        num_requests: requests of the batch.
        width: longest draft of the batch; tokens behind it are cut off.
        num_others: most side chains; further ones are cut off.

    Raises:
        Exception: the answer does not hold one draft for each request, or code of the proposer's raises.
    """
    if not isinstance(answer, Drafts):
        rows = [list(islice(row, width)) for row in islice(answer, num_requests + 1)]
        if len(rows) != num_requests:
            raise ValueError(f"answered another number of drafts than {num_requests}, one for each request")
        return from_lists(rows)
    if not isinstance(answer.others, (tuple, list, type(None))):
        raise ValueError(f"answered others of type {type(answer.others).__name__}; a tuple of Drafts is expected")
    main = _plain_chain(answer, num_requests, width)
    others = list(islice(answer.others or (), num_others))
    if wrong := [each for each in others if not isinstance(each, Drafts) or each.others]:
        kind = type(wrong[0]).__name__
        raise ValueError(f"answered {kind} among others; Drafts without others are expected there")
    main.others = tuple(_plain_chain(each, num_requests, width) for each in others)
    return main


def _plain_chain(drafts: Any, num_requests: int, width: int) -> Drafts:
    token_ids = _plain_array("token_ids", drafts.token_ids, (num_requests, width))
    if token_ids.dtype != np.int32:
        token_ids = token_ids.astype(np.int64) if token_ids.dtype.kind in "iu" else token_ids
    match_length, votes = drafts.match_length, drafts.votes
    return Drafts(
        token_ids,
        _plain_array("num_tokens", drafts.num_tokens, (num_requests,)).astype(np.int64),
        _plain_array("confidence", drafts.confidence, (num_requests, width)).astype(np.float32),
        None if match_length is None else _plain_array("match_length", match_length, (num_requests,)),
        None if votes is None else _plain_array("votes", votes, (num_requests, width)),
    )


def _plain_array(name: str, values: Any, most: tuple[int, ...]) -> NDArray[Any]:
    """A copy of ``values`` with as many dimensions and rows as ``most``, and at most as many columns."""
    array = np.asarray(values)
    if array.ndim != len(most) or len(array) != most[0] or array.dtype.kind not in "biuf":
        raise ValueError(
            f"answered {name} of {printable(repr(array.dtype), LONGEST_LINE)}, {array.shape}; "
            f"numbers of {len(most)} dimensions for {most[0]} requests are expected"
        )
    return np.array(array if len(most) == 1 else array[:, : most[1]], order="C")


def plain_count(name: str, value: Any) -> int:
    """``value`` as a count.

    Raises:
        Exception: it is no number from 0 to 2**63 - 1, or code of the proposer's raises.
    """
    count = int(value)
    if not 0 <= count <= _LARGEST:
        raise ValueError(f"{name} is no number from 0 to 2**63 - 1")
    return count


def plain_stores(stores: Any) -> dict[str, StoreStats]:
    """Counters of token stores under printable names.

    Raises:
        Exception: one of them is no :class:`StoreStats` with counts in it, or code of the proposer's raises.
    """
    plain: dict[str, StoreStats] = {}
    pairs = stores.items() if isinstance(stores, Mapping) else dict(stores).items()
    for name, each in islice(pairs, MOST_STORES):
        counts = {field.name: plain_count(field.name, getattr(each, field.name)) for field in fields(StoreStats)}
        plain[one_line(name)] = StoreStats(**counts)
    return plain


def one_line(value: Any) -> str:
    """``value`` as printable text in one line."""
    return printable(" ".join(str.split(str(value))), LONGEST_LINE)


def printable(text: str, most: int) -> str:
    """The last ``most`` characters of ``text``; what is neither printable nor the end of a line is replaced."""
    return "".join(each if each.isprintable() or each == "\n" else "\N{REPLACEMENT CHARACTER}" for each in text[-most:])


def told(error: BaseException) -> tuple[str, str]:
    """The traceback of ``error``, and its own words in one line."""
    try:
        return printable("".join(traceback.format_exception(error)), LONGEST_TRACEBACK), one_line(error)
    except BaseException:  # its __str__ raises
        return "an error that cannot be shown", "an error that cannot be shown"
