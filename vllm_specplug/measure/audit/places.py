"""Names of the places at which an audit counts tokens."""

from __future__ import annotations

NO_DRAFT, VERIFY, AFTER = "no draft", "verify", "after a rejection"
"""Stages of a request: its first step, the step that verifies drafts, and the one behind a rejection."""


def name_of(stage: str, is_unlikely: bool, depth: int, depths: int) -> str:
    """A place in words.

    Args:
        stage: of the request.
        is_unlikely: an unlikely token stands in for the first draft token.
        depth: draft token, from 0; behind the last one comes the bonus token.
        depths: how many places the draft has, the bonus token among them.
    """
    if stage != VERIFY or (depths == 1 and not is_unlikely):
        return stage
    if is_unlikely:
        return "draft 1, unlikely token"
    return "bonus" if depth == depths - 1 else f"draft {depth + 1}"


def names_of(k: int, is_redrawn: bool) -> list[str]:
    """All places of a context with drafts of ``k`` tokens.

    Args:
        k: longest draft.
        is_redrawn: drafts are drawn from the drafter's distribution, so that no unlikely one stands in for the first.
    """
    if not k:
        return [NO_DRAFT]
    drafted = [name_of(VERIFY, False, depth, k + 1) for depth in range(k + 1)]
    unlikely = [] if is_redrawn else [name_of(VERIFY, True, 0, 1)]
    return [NO_DRAFT, *unlikely, *drafted, AFTER]
