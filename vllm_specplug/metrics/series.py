"""The series: names, help texts, and how they are read from a snapshot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Snapshot = Mapping[str, Any]
"""Counters of a worker, from :meth:`vllm_specplug.drafting.drafting.Drafting.snapshot`."""


@dataclass(frozen=True)
class Series:
    """One Prometheus metric.

    Attributes:
        name: name on ``/metrics``, without the ``_total`` that counters get.
        kind: ``counter`` or ``gauge``.
        help: what the series counts, with its unit.
        key: key of its value in a snapshot.
    """

    name: str
    kind: str
    help: str
    key: str


ENGINE_SERIES = (
    Series("specplug_steps", "counter", "Steps in which some request emitted tokens.", "steps"),
    Series("specplug_emitted_tokens", "counter", "Tokens that requests returned, stop tokens included.", "emitted"),
    Series("specplug_request_steps", "counter", "Pairs of request and step that emitted tokens.", "request_steps"),
    Series("specplug_live_requests", "gauge", "Requests that hold state in proposers or verifier.", "live_requests"),
    Series(
        "specplug_verify_seconds", "counter", "Seconds of steps that verified drafts and took in no prompt.", "verify_s"
    ),
    Series("specplug_verify_steps", "counter", "Steps that verified drafts and took in no prompt.", "verify_steps"),
)


ENSEMBLE_SERIES = (
    Series("specplug_paused", "gauge", "1 while nothing is drafted because it does not pay.", "paused"),
    Series("specplug_resting_steps", "counter", "Steps in which no proposer was asked.", "resting_steps"),
    Series("specplug_withheld_tokens", "counter", "Draft tokens that were not worth verifying.", "withheld_tokens"),
    Series(
        "specplug_gain",
        "gauge",
        "Tokens of late in steps with drafts, over what the same time would have brought without.",
        "gain",
    ),
    Series(
        "specplug_forks", "counter", "Side chains (chains beyond the first of a request) that were verified.", "forks"
    ),
    Series(
        "specplug_fork_tokens",
        "counter",
        "Draft tokens of side chains, behind where they leave other chains.",
        "fork_tokens",
    ),
    Series(
        "specplug_fork_wins",
        "counter",
        "Requests and steps in which a side chain got further than the main chain.",
        "fork_wins",
    ),
    Series("specplug_fork_gain", "counter", "Draft tokens that were accepted because of side chains.", "fork_gain"),
    Series(
        "specplug_withheld_forks",
        "counter",
        "Steps in which there were side chains to choose from and none was worth verifying.",
        "withheld_forks",
    ),
)


PROPOSER_SERIES = (
    Series("specplug_proposer_drafted_tokens", "counter", "Draft tokens that were verified.", "drafted"),
    Series("specplug_proposer_accepted_tokens", "counter", "Draft tokens that were accepted.", "accepted"),
    Series("specplug_proposer_chosen_drafts", "counter", "Drafts that begin with a token of this proposer.", "chosen"),
    Series("specplug_proposer_errors", "counter", "Calls that raised, or answered nonsense or not in time.", "errors"),
    Series("specplug_proposer_late", "counter", "Calls that did not answer in time.", "late"),
    Series(
        "specplug_proposer_invalid_tokens", "counter", "Draft tokens outside of the vocabulary, cut.", "invalid_tokens"
    ),
    Series("specplug_proposer_seconds", "counter", "Seconds spent proposing.", "propose_s"),
    Series("specplug_proposer_memory_bytes", "gauge", "State kept about requests and history.", "memory_bytes"),
    Series("specplug_proposer_active", "gauge", "0 once the proposer was left out for an error.", "active"),
)


STORE_SERIES = (
    Series("specplug_store_tokens", "gauge", "Tokens in the store.", "tokens"),
    Series("specplug_store_bytes", "gauge", "Bytes of the store's file.", "bytes"),
    Series("specplug_store_lookups", "counter", "Drafts that were asked of the store.", "lookups"),
    Series("specplug_store_hits", "counter", "Lookups that found a draft.", "hits"),
)


ALL_SERIES = (*ENGINE_SERIES, *ENSEMBLE_SERIES, *PROPOSER_SERIES, *STORE_SERIES)


def rows(snapshot: Snapshot) -> Iterator[tuple[Series, dict[str, str], float]]:
    """(series, labels beside those of the engine, value) for every series of a snapshot."""
    for series in ENGINE_SERIES:
        yield series, {}, float(snapshot[series.key])
    for series in ENSEMBLE_SERIES:
        yield series, {}, float(snapshot["ensemble"][series.key])
    stores: set[str] = set()
    for name, proposer in snapshot["proposers"].items():
        for series in PROPOSER_SERIES:
            yield series, {"proposer": name}, float(proposer[series.key])
        for store, numbers in proposer["stores"].items():
            while store in stores:  # Prometheus refuses two values under the same labels
                store = f"{name}/{store}"
            stores.add(store)
            for series in STORE_SERIES:
                yield series, {"store": store}, float(numbers[series.key])


def reference() -> str:
    """All series as a Markdown table, for the documentation."""
    labels = {
        ENGINE_SERIES: "",
        ENSEMBLE_SERIES: "",
        PROPOSER_SERIES: ", `proposer`",
        STORE_SERIES: ", `store`",
    }
    lines = ["| series | kind | labels | what it counts |", "| --- | --- | --- | --- |"]
    for group, more in labels.items():
        for series in group:
            name = f"{series.name}_total" if series.kind == "counter" else series.name
            lines.append(f"| `{name}` | {series.kind} | `model_name`, `engine`{more} | {series.help} |")
    return "\n".join(lines)
