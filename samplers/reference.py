"""Slow, obvious forms of what the kernels compute: PyTorch and Python loops, on any device. The tests compare the two.

Same names, arguments and results as in :mod:`vllm_specplug.samplers.kernels`, where they are described.
"""

from __future__ import annotations

import torch

from vllm_specplug.samplers.base import REJECTED


def verify_drafts(
    target_token_ids: torch.Tensor, draft_token_ids: torch.Tensor, cu_num_rows: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`vllm_specplug.samplers.kernels.verify_drafts`."""
    bounds = cu_num_rows.tolist()
    num_requests = len(bounds) - 1
    token_ids = target_token_ids.new_full((num_requests, width), REJECTED)
    num_emitted = target_token_ids.new_zeros(num_requests, dtype=torch.int32)
    for request in range(num_requests):
        start, end = bounds[request], bounds[request + 1]
        token_ids[request, : end - start] = target_token_ids[start:end]
        targets, inputs = target_token_ids[start:end].tolist(), draft_token_ids[start:end].tolist()
        for depth, target in enumerate(targets):
            num_emitted[request] = depth + 1
            if depth + 1 == len(inputs) or inputs[depth + 1] < 0 or inputs[depth + 1] != target:
                break
    return token_ids, num_emitted


def pack_emitted(
    idx_mapping: torch.Tensor,
    num_emitted: torch.Tensor,
    total_len: torch.Tensor,
    all_token_ids: torch.Tensor,
    verified: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """See :func:`vllm_specplug.samplers.kernels.pack_emitted`."""
    width = out.shape[1] - 2
    for row, (request, count) in enumerate(zip(idx_mapping.tolist(), num_emitted.tolist(), strict=True)):
        total = int(total_len[request])
        out[row, 0], out[row, 1] = total, count
        out[row, 2:] = REJECTED if verified is None else verified[row, :width].to(torch.int32)
        out[row, 2 : 2 + count] = all_token_ids[request, total - count : total]
