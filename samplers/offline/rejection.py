"""Rejection sampling: accept a draft token with chance min(1, target / draft), else draw from the residual.

The residual is max(0, target - draft), normalised. This is an optimal coupling of each draft token with the target
(Leviathan, Kalman, Matias, "Fast Inference from Transformers via Speculative Decoding", 2023; Chen et al., 2023): no
rule that looks at one token at a time accepts more. Emitted tokens have the target's distribution, but the text of a
seed depends on the drafter.

*Block verification* (Sun et al., "Block Verification Accelerates Speculative Decoding", 2024) decides about the draft
as a whole: a token that would be rejected alone may be accepted because of likely tokens behind it. On average it never
accepts fewer tokens, with the same distribution and cost.

All draws come from uniforms that the caller passes: one for each draft token and one for the last token.
"""

from __future__ import annotations

import torch

from vllm_specplug.samplers.base import REJECTED, Verification


def _drawn(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Draw tokens ``[num_rows]`` by inversion from weights ``[num_rows, vocab]``, which need not sum to 1."""
    cumulative = weights.double().cumsum(dim=-1)
    at = uniform.double()[:, None] * cumulative[:, -1:]
    # Rounding must not lead behind the last token of positive weight.
    last = weights.shape[-1] - 1 - (weights > 0).flip(-1).to(torch.int8).argmax(dim=-1)
    return torch.minimum((cumulative <= at).sum(dim=-1), last)


def _emitted(
    draft_token_ids: torch.Tensor, num_accepted: torch.Tensor, weights: torch.Tensor, uniform: torch.Tensor
) -> Verification:
    num_requests, width = draft_token_ids.shape
    last = _drawn(weights, uniform)
    columns = torch.arange(width + 1, device=last.device)[None, :]
    padded = torch.cat([draft_token_ids, draft_token_ids.new_zeros(num_requests, 1)], dim=1)
    tokens = torch.where(columns < num_accepted[:, None], padded, REJECTED)
    tokens = torch.where(columns == num_accepted[:, None], last[:, None].to(tokens.dtype), tokens)
    return Verification(tokens, num_accepted + 1)


def _at_drafts(
    target_probs: torch.Tensor, draft_probs: torch.Tensor, draft_token_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Target's and draft's probability of every draft token, ``[num_requests, k]`` float64; any value for padding."""
    index = draft_token_ids[..., None].long().clamp(min=0)
    target = target_probs[:, :-1].double().gather(2, index)[..., 0]
    return target, draft_probs.double().gather(2, index)[..., 0]


def _draft_lengths(draft_token_ids: torch.Tensor, num_draft_tokens: torch.Tensor) -> torch.Tensor:
    """``[num_requests]`` draft tokens before the first negative id, at most ``num_draft_tokens``."""
    return torch.minimum(num_draft_tokens, (draft_token_ids >= 0).long().cumprod(dim=1).sum(dim=1))


def _row(probs: torch.Tensor, depth: torch.Tensor) -> torch.Tensor:
    return probs[torch.arange(len(probs), device=probs.device), depth].double()


def verify(
    target_probs: torch.Tensor,
    draft_probs: torch.Tensor,
    draft_token_ids: torch.Tensor,
    num_draft_tokens: torch.Tensor,
    uniforms: torch.Tensor,
) -> Verification:
    """Verify drafts token by token.

    Args:
        target_probs: ``[num_requests, k + 1, vocab]`` probabilities of the target.
        draft_probs: ``[num_requests, k, vocab]`` probabilities that draft tokens were drawn from; one-hot for drafts
            that were not drawn.
        draft_token_ids: ``[num_requests, k]``; a draft ends before a negative id, such as padding by -1.
        num_draft_tokens: ``[num_requests]``, at most ``k``; tokens behind are ignored.
        uniforms: ``[num_requests, k + 1]`` in [0, 1), independent of the drafts; the last is for the last token.
    """
    k = draft_token_ids.shape[1]
    num_draft_tokens = _draft_lengths(draft_token_ids, num_draft_tokens)
    target, draft = _at_drafts(target_probs, draft_probs, draft_token_ids)
    is_draft = torch.arange(k, device=target.device)[None, :] < num_draft_tokens[:, None]
    kept = (uniforms[:, :k].double() * draft < target) & is_draft
    num_accepted = kept.long().cumprod(dim=1).sum(dim=1)
    last_target = _row(target_probs, num_accepted)
    padded = torch.cat([draft_probs, torch.zeros_like(target_probs[:, :1])], dim=1)
    lacking = (last_target - _row(padded, num_accepted)).clamp(min=0.0)
    is_rejected = num_accepted < num_draft_tokens
    # Without a residual a rejection has chance 0, and only rounding can cause one.
    is_residual = is_rejected & (lacking.sum(dim=-1) > 0)
    return _emitted(
        draft_token_ids, num_accepted, torch.where(is_residual[:, None], lacking, last_target), uniforms[:, k]
    )


def verify_block(
    target_probs: torch.Tensor,
    draft_probs: torch.Tensor,
    draft_token_ids: torch.Tensor,
    num_draft_tokens: torch.Tensor,
    uniforms: torch.Tensor,
) -> Verification:
    """Verify drafts as a whole; arguments as in :func:`verify`.

    With ``m_i = min(1, m_(i-1) * target_i / draft_i)`` along the draft, its first ``i`` tokens are acceptable with
    chance ``r / (r + 1 - m_i)``, ``r`` being the sum of max(0, m_i * target - draft) over the next token, or ``m_i``
    for the whole draft. The longest acceptable beginning is emitted, then a token of weight
    max(0, m_i * target - draft).
    """
    num_requests, k = draft_token_ids.shape
    num_draft_tokens = _draft_lengths(draft_token_ids, num_draft_tokens)
    target, draft = _at_drafts(target_probs, draft_probs, draft_token_ids)
    mass = torch.ones(num_requests, dtype=torch.float64, device=target.device)
    masses = [mass]
    num_accepted = torch.zeros(num_requests, dtype=torch.int64, device=target.device)
    for depth in range(k):
        is_draft = depth < num_draft_tokens
        ratio = torch.where(draft[:, depth] > 0, target[:, depth] / draft[:, depth].clamp(min=1e-300), 0.0)
        mass = torch.where(is_draft, torch.clamp(mass * ratio, max=1.0), mass)
        masses.append(mass)
        chance = mass
        if depth + 1 < k:
            lacking = (mass[:, None] * target_probs[:, depth + 1].double() - draft_probs[:, depth + 1].double()).clamp(
                min=0.0
            )
            rest = lacking.sum(dim=-1)
            inner = torch.where(rest + 1.0 - mass > 0, rest / (rest + 1.0 - mass).clamp(min=1e-300), 1.0)
            chance = torch.where(depth + 1 < num_draft_tokens, inner, mass)
        is_kept = is_draft & (uniforms[:, depth].double() < chance)
        num_accepted = torch.where(is_kept, depth + 1, num_accepted)
    at = torch.stack(masses, dim=1).gather(1, num_accepted[:, None])
    last_target = _row(target_probs, num_accepted)
    padded = torch.cat([draft_probs, torch.zeros_like(target_probs[:, :1])], dim=1)
    lacking = (at * last_target - _row(padded, num_accepted)).clamp(min=0.0)
    is_residual = (num_accepted < num_draft_tokens) & (lacking.sum(dim=-1) > 0)
    return _emitted(
        draft_token_ids, num_accepted, torch.where(is_residual[:, None], lacking, last_target), uniforms[:, k]
    )
