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
    """Makes a sampling drafter of vLLM's choose each token with the noise that the verifier will use there.

    vLLM draws the draft's noise afresh, which the classic rule needs; under accept-if-equal the same noise is what
    makes draft and target agree, and the tokens that come out are the target's alone either way.

    Args:
        drafter: one of vLLM's model drafters with ``draft_sample_method: probabilistic``.
        verifier: knows the seeds of the coming tokens.
        steps: the step under way; its ``runners_up`` are filled in.
        num_places: tokens that are of use at each depth: what several chains can be made of.
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
        """vLLM's own; a new draft begins with the next output token."""
        self._depth = 0
        self._steps.now.runners_up = []
        return self._propose(*args, **kwargs)

    def sample(self, logits: torch.Tensor, sampling_metadata: SamplingMetadata) -> tuple[torch.Tensor, None]:
        """Draft tokens ``[num_rows]`` for draft logits ``[num_rows, vocab]``; no probabilities are kept.

        One row a request for each depth in turn, or, with parallel drafting, all depths of a request in a row.
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
        """What greedy requests have in place of a race's places."""
        scores, tokens = logits.topk(self._num_places, dim=-1)
        return tokens, scores.double()

    def _keep(self, tokens: torch.Tensor, scores: torch.Tensor) -> None:
        num_requests = self._verifier.num_running
        shape = num_requests, len(tokens) // num_requests, tokens.shape[1]
        self._steps.now.runners_up.append((tokens.view(shape), scores.view(shape)))


def places_of(step: Step, rows: Sequence[int], num_draft: int) -> Places | None:
    """Runners-up of vLLM's draft, of the requests in these batch rows; None if they are not known.

    Args:
        step: in which vLLM's drafter drafted.
        rows: of its batch.
        num_draft: longest draft; depths that were not drafted hold -1.
    """
    if not step.runners_up:
        return None
    tokens, scores = (torch.cat(each, dim=1)[list(rows), :num_draft] for each in zip(*step.runners_up, strict=True))
    missing = num_draft - tokens.shape[1]
    tokens = torch.nn.functional.pad(tokens, (0, 0, 0, missing), value=-1)
    scores = torch.nn.functional.pad(scores, (0, 0, 0, missing))
    return Places.of_scores(tokens.numpy(), scores.numpy())


def share_noise(drafter: Any, verifier: CoupledVerifier, steps: Steps, num_places: int) -> None:
    """Let vLLM's drafter draw with the target's noise, if it is one that samples."""
    if getattr(drafter, "_enable_probabilistic_draft_probs", False):
        SharedNoise(drafter, verifier, steps, num_places)
