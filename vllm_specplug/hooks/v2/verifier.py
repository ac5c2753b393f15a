"""Verification on V2: draws the target's token of every logits row and accepts drafts while they equal it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

from vllm_specplug.errors import ConfigurationError
from vllm_specplug.hooks.v2.step import Steps
from vllm_specplug.samplers.kernels import verify_drafts


class CoupledVerifier(RejectionSampler):  # type: ignore[misc]
    """Draws the target's token of every logits row as an ordinary step of vLLM would, and accepts drafts that equal it.

    vLLM's noise is keyed by (request seed, position, token id), so that neither the draft nor its length can change a
    token. Draft logits are neither read nor kept.
    """

    draw = staticmethod(gumbel_sample)
    """Draws one token per logits row, with the arguments of vLLM's ``gumbel_sample``."""
    steps: Steps | None = None
    """Holds the step under way, whose ``targets`` are filled in; None if none of our proposers is active."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Verify a step as vLLM does; keep all drawn tokens, also those behind a rejected draft, for proposers."""
        output = super().__call__(*args, **kwargs)
        if self.steps is not None:
            self.steps.now.targets = output.sampled_token_ids
        return output

    def _verify(  # noqa: PLR0913 - vLLM's signature
        self,
        logits: torch.Tensor,  # [num_rows, vocab]
        draft_logits: torch.Tensor | None,
        draft_sampled: torch.Tensor,  # [num_rows] input tokens
        pos: torch.Tensor,  # [num_rows]
        cu_num_logits: torch.Tensor,  # [num_requests + 1]
        idx_mapping: torch.Tensor,
        idx_mapping_np: NDArray[np.intp],
        expanded_idx_mapping: torch.Tensor,  # [num_rows]
        expanded_local_pos: torch.Tensor,
        seq_lens_upper_bound_np: NDArray[np.int32],
        verify_draft_sampled: torch.Tensor,  # [num_rows] draft_sampled, -1 for drafts that must be rejected
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Verify a chunk of requests: processed logits, token ids, and number of emitted tokens per request."""
        sampler = self.sampler
        processed = sampler.apply_sampling_params(
            logits,
            expanded_idx_mapping,
            idx_mapping,
            idx_mapping_np,
            pos,
            draft_sampled,
            expanded_local_pos,
            seq_lens_upper_bound_np,
        )
        targets = self.draw(
            processed,
            expanded_idx_mapping,
            sampler.sampling_states.temperature.gpu,
            sampler.sampling_states.seeds.gpu,
            pos,
            apply_temperature=False,
            is_drafting=False,
            use_fp64=sampler.use_fp64_gumbel,
        )
        token_ids, num_emitted = verify_drafts(
            targets, verify_draft_sampled, cu_num_logits, self.num_speculative_steps + 1
        )
        return processed, token_ids, num_emitted


def check_verifier(runner: Any) -> None:
    """Raise ConfigurationError if the model brings its own sampler in place of our verifier."""
    if not isinstance(runner.rejection_sampler, CoupledVerifier):
        raise ConfigurationError(
            f"speculative_config: {type(runner.model).__name__} brings a sampler of its own "
            f"({type(runner.rejection_sampler).__name__}), which no coupling can replace. "
            'Give "sampler": "rejection".'
        )
