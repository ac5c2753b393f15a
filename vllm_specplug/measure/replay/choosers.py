"""How a replay chooses between the drafts of several proposers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_specplug.proposers.base import DraftBatch, Drafts, Verified
from vllm_specplug.proposers.ensemble.ensemble import Ensemble

Ids = NDArray[np.int32]


Lengths = NDArray[np.int64]


class Chooser:
    """Chooses one draft for every request among those of the proposers; this class takes the only proposer's."""

    def choose(self, batch: DraftBatch, answers: Sequence[Drafts], truth: Ids) -> tuple[Ids, Lengths]:
        """Draft tokens ``[num_requests, max_tokens]`` and the number of valid ones in every row, ``[num_requests]``.

        Args:
            batch: the requests.
            answers: the drafts of every proposer, ``[num_requests, max_tokens]``.
            truth: ``[num_requests, k]`` the target's coming tokens, for choosers that know in hindsight.
        """
        (drafts,) = answers
        return drafts.token_ids, drafts.num_tokens

    def learn(self, verified: Verified, emitted: Ids) -> None:
        """Learn from a verified step; ``emitted``: ``[num_requests, k + 1]`` token ids."""

    def finish(self, request_ids: Sequence[str]) -> None:
        """Forget requests that are over."""

    def warm_up(self) -> None:
        """Compile kernels before time is measured."""


class LongestMatch(Chooser):
    """Takes the draft with the longest match, among equals the first proposer's; an empty draft comes last."""

    def choose(self, batch: DraftBatch, answers: Sequence[Drafts], truth: Ids) -> tuple[Ids, Lengths]:
        matches = [
            np.where(answer.num_tokens > 0, 0 if answer.match_length is None else answer.match_length, -1)
            for answer in answers
        ]
        return _picked(answers, np.argmax(np.stack(matches), axis=0))


class Furthest(Chooser):
    """Takes, in hindsight, the draft with most accepted tokens, among equals the first proposer's."""

    def choose(self, batch: DraftBatch, answers: Sequence[Drafts], truth: Ids) -> tuple[Ids, Lengths]:
        accepted = [num_accepted(answer.token_ids, answer.num_tokens, truth) for answer in answers]
        return _picked(answers, np.argmax(np.stack(accepted), axis=0))


class Learned(Chooser):
    """The ensemble as it runs in an engine, except that drafts are never shortened for what they cost."""

    def __init__(self, names: Sequence[str], k: int, options: Mapping[str, Any]) -> None:
        self.ensemble = Ensemble(names, k, {**options, "gate": False})

    def choose(self, batch: DraftBatch, answers: Sequence[Drafts], truth: Ids) -> tuple[Ids, Lengths]:
        best, _ = self.ensemble.combine(batch, answers, len(batch))
        return best.token_ids, best.num_tokens

    def learn(self, verified: Verified, emitted: Ids) -> None:
        num_verified = np.array([len(draft) for draft in verified.draft_token_ids], dtype=np.int64)
        num_emitted = np.array(verified.num_emitted, dtype=np.int64)
        self.ensemble.observe(verified.request_ids, emitted, num_emitted, num_verified)

    def finish(self, request_ids: Sequence[str]) -> None:
        self.ensemble.finish(request_ids)

    def warm_up(self) -> None:
        self.ensemble.warm_up()


def _picked(answers: Sequence[Drafts], places: NDArray[np.intp]) -> tuple[Ids, Lengths]:
    """The draft of the proposer ``places[i]`` for every request ``i``."""
    width = max(answer.token_ids.shape[1] for answer in answers)
    tokens: Ids = np.zeros((len(places), width), dtype=np.int32)
    lengths: Lengths = np.zeros(len(places), dtype=np.int64)
    for place, answer in enumerate(answers):
        mine = places == place
        tokens[mine, : answer.token_ids.shape[1]] = answer.token_ids[mine]
        lengths[mine] = answer.num_tokens[mine]
    return tokens, lengths


def num_accepted(tokens: Ids, lengths: Lengths, truth: Ids) -> Lengths:
    """Number of draft tokens before the first one that differs from ``truth``, ``[num_requests]``."""
    width = tokens.shape[1]
    is_right = (tokens == truth[:, :width]) & (np.arange(width) < lengths[:, None])
    return np.asarray(np.cumprod(is_right, axis=1, dtype=np.int64).sum(axis=1), dtype=np.int64)
