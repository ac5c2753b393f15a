"""Lets vLLM's own sampling drafters on V1 draw with the target's noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import _SAMPLING_EPS

from vllm_specplug.hooks.v1.step import Step, Steps
from vllm_specplug.hooks.v1.verifier import CoupledVerifier
from vllm_specplug.proposers.comb import Places


class SharedNoise:
    """Makes a sampling drafter of vLLM's draw each token with the noise that the verifier uses for the same token.

    vLLM draws drafts with independent noise, as rejection sampling requires. When drafts are accepted if they equal the
    target's token, shared noise makes draft and target agree more often. The emitted tokens do not depend on it.

    Args:
        drafter: one of vLLM's model drafters with ``draft_sample_method: probabilistic``.
        verifier: knows the seeds of the coming tokens.
        steps: holds the step under way, whose ``runners_up`` are filled in.
        num_places: number of candidates to keep at each depth: the drafted token and its runners-up.
    """

    def __init__(self, drafter: Any, verifier: CoupledVerifier, steps: Steps, num_places: int) -> None:
        self._verifier = verifier
        self._steps = steps
        self._propose = drafter.propose
        self._num_places = num_places
        self._depth = 0
        drafter.propose = self.propose
        drafter._sample_from_logits = self.sample

    def propose(self, *args: Any, **kwargs: Any) -> Any:
        """Replaces the drafter's method: begin a new draft at the request's next output token."""
        self._depth = 0
        self._steps.now.runners_up = []
        return self._propose(*args, **kwargs)

    def sample(self, logits: torch.Tensor, sampling_metadata: SamplingMetadata) -> tuple[torch.Tensor, None]:
        """Draft tokens ``[num_rows]`` from the drafter's logits ``[num_rows, vocab]``, and None for probabilities.

        A call has one row per request, for one depth. With parallel drafting it has the rows of all depths of a request
        one after the other.
        """
        greedy = logits.argmax(dim=-1)
        temperature = sampling_metadata.temperature
        if sampling_metadata.all_greedy or temperature is None:
            if self._num_places > 1:
                self._keep(*self._favourites(logits))
            return greedy, None
        depths = len(logits) // len(temperature)
        temperature = temperature.repeat_interleave(depths)
        is_greedy = temperature < _SAMPLING_EPS
        scaled = logits.to(torch.float32) / torch.where(is_greedy, 1.0, temperature)[:, None]
        if self._num_places > 1:
            tokens, scores = self._verifier.rank_ahead(scaled, depths, self._depth, self._num_places)
            if is_greedy.any() and tokens.shape[1] > 1:
                favourites, logits_of = self._favourites(logits)
                tokens = torch.where(is_greedy[:, None], favourites, tokens)
                scores = torch.where(is_greedy[:, None], logits_of, scores)
            self._keep(tokens, scores)
            sampled = tokens[:, 0]
        else:
            sampled = self._verifier.draw_ahead(scaled, depths, self._depth)
        self._depth += depths
        return torch.where(is_greedy, greedy, sampled), None

    def _favourites(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens of the highest logits, and these logits: the candidates of greedy requests."""
        scores, tokens = logits.topk(self._num_places, dim=-1)
        return tokens, scores.double()

    def _keep(self, tokens: torch.Tensor, scores: torch.Tensor) -> None:
        num_requests = self._verifier.num_running
        shape = num_requests, len(tokens) // num_requests, tokens.shape[1]
        self._steps.now.runners_up.append((tokens.view(shape), scores.view(shape)))


def places_of(step: Step, rows: Sequence[int], num_draft: int) -> Places | None:
    """Runners-up of vLLM's drafts for the requests in these batch rows; None if vLLM's drafter left none.

    Args:
        step: the step in which vLLM's drafter drafted.
        rows: batch rows of that step.
        num_draft: depths of the result; depths that were not drafted hold -1.
    """
    if not step.runners_up:
        return None
    tokens, scores = (torch.cat(each, dim=1)[list(rows), :num_draft] for each in zip(*step.runners_up, strict=True))
    missing = num_draft - tokens.shape[1]
    tokens = torch.nn.functional.pad(tokens, (0, 0, 0, missing), value=-1)
    scores = torch.nn.functional.pad(scores, (0, 0, 0, missing))
    return Places.of_scores(tokens.numpy(), scores.numpy())


def share_noise(drafter: Any, verifier: CoupledVerifier, steps: Steps, num_places: int) -> None:
    """Let vLLM's drafter draw with the target's noise, if that drafter samples."""
    if getattr(drafter, "_enable_probabilistic_draft_probs", False):
        SharedNoise(drafter, verifier, steps, num_places)
