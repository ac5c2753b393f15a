"""Keeps lines of vLLM's log away that a user would read as faults of a configuration that is as it should be."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator

CUSTOM_CLASS = ("vllm.config.speculative", "Using a custom class-based proposer backend")
"""The interface may change in any vLLM: signatures are checked at every start, so that a change is noticed."""
SCHEDULED_TOKENS = ("vllm.config.vllm", "max_num_scheduled_tokens is set to")
"""Drafts on the host take no slots from the budget, whose size is vLLM's default without speculation, too."""
ENDPOINT = ("vllm.plugins", "Found endpoint plugin(s)")
"""The endpoint that reloads stores is off unless it is named, which needs no warning at every start."""


@contextlib.contextmanager
def without(*lines: tuple[str, str]) -> Iterator[None]:
    """Drop these lines, each as logger and beginning, while the block runs."""
    filters = [(logging.getLogger(name), _all_but(beginning)) for name, beginning in lines]
    for logger, keeps in filters:
        logger.addFilter(keeps)
    try:
        yield
    finally:
        for logger, keeps in filters:
            logger.removeFilter(keeps)


def _all_but(beginning: str) -> Callable[[logging.LogRecord], bool]:
    return lambda record: not str(record.msg).startswith(beginning)


def _is_no_offer_of_ours(record: logging.LogRecord) -> bool:
    is_offer = str(record.msg).startswith(ENDPOINT[1])
    return not (is_offer and isinstance(record.args, tuple) and record.args == (["specplug_stores"],))


def offer_endpoint_quietly() -> None:
    """Drop the warning that our endpoint is off, from now on; another plugin's is kept."""
    logging.getLogger(ENDPOINT[0]).addFilter(_is_no_offer_of_ours)
