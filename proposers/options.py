"""Checks of proposers' options, with uniform errors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def check_option_names(options: Mapping[str, Any], known: Mapping[str, object], proposer: str) -> None:
    """Raise ValueError if ``options`` has a key that is not in ``known``."""
    for name in options:
        if name not in known:
            raise ValueError(f"proposer {proposer!r} has no option {name!r}; it knows {', '.join(sorted(known))}")


def with_defaults(proposer: str, defaults: Mapping[str, object], options: Mapping[str, Any]) -> dict[str, Any]:
    """``defaults`` updated with ``options``; ValueError if ``options`` has a key that is not in ``defaults``."""
    check_option_names(options, defaults, proposer)
    return {**defaults, **options}


def check_match_lengths(proposer: str, options: Mapping[str, Any]) -> None:
    """Raise ValueError if ``min_match`` of ``options`` is above ``max_match``."""
    if options["min_match"] > options["max_match"]:
        raise ValueError(
            f"proposer {proposer!r}: min_match {options['min_match']} is above max_match {options['max_match']}"
        )


def check_whole(proposer: str, name: str, value: object, least: int = 1) -> int:
    """``value`` if it is a whole number of at least ``least``, else ValueError."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"proposer {proposer!r}: {name} must be a whole number of at least {least}, not {value!r}")
    return value


def check_number(proposer: str, name: str, value: object) -> float:
    """``value`` if it is a finite number of at least 0, else ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"proposer {proposer!r}: {name} must be a number of at least 0, not {value!r}")
    return float(value)


def check_switch(proposer: str, name: str, value: object) -> bool:
    """``value`` if it is a bool, else ValueError."""
    if not isinstance(value, bool):
        raise ValueError(f"proposer {proposer!r}: {name} must be true or false, not {value!r}")
    return value


def check_probability(proposer: str, name: str, value: object) -> float:
    """``value`` if it lies in [0, 1], else ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f"proposer {proposer!r}: {name} must lie in [0, 1], not {value!r}")
    return float(value)
