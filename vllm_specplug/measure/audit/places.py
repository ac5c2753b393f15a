"""Names of the places at which an audit counts tokens."""

from __future__ import annotations

NO_DRAFT, VERIFY, AFTER = "no draft", "verify", "after a rejection"
"""Stages of a request: its first step, the step that verifies its draft, and the step after a rejection."""


def name_of(stage: str, is_unlikely: bool, depth: int, depths: int) -> str:
    """The name of a place.

    Args:
        stage: stage of the request.
        is_unlikely: an unlikely token stands in the place of the first draft token.
        depth: index of the draft token; that of the bonus token is the number of draft tokens.
        depths: number of places of the draft, the bonus token's included.
    """
    if stage != VERIFY or (depths == 1 and not is_unlikely):
        return stage
    if is_unlikely:
        return "draft 1, unlikely token"
    return "bonus" if depth == depths - 1 else f"draft {depth + 1}"


def names_of(k: int, is_redrawn: bool) -> list[str]:
    """The names of all places of a context with drafts of ``k`` tokens.

    Args:
        k: longest draft.
        is_redrawn: drafts are drawn from the drafter's distribution, so that no unlikely token takes the first place.
    """
    if not k:
        return [NO_DRAFT]
    drafted = [name_of(VERIFY, False, depth, k + 1) for depth in range(k + 1)]
    unlikely = [] if is_redrawn else [name_of(VERIFY, True, 0, 1)]
    return [NO_DRAFT, *unlikely, *drafted, AFTER]
