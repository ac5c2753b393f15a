"""Drafting from a token store on the device, without the host."""

from __future__ import annotations

from typing import Any

import torch
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_specplug.errors import ConfigurationError
from vllm_specplug.proposers.base import ProposerContext


class DeviceDrafting:
    """Drafts with ``rest`` and ``on_device``: reads the requests' tokens and writes drafts on the device.

    Args:
        context: sizes, the store and the proposer's options.
        device: device of the runner.
        req_states: the runner's per-request tensors.

    Raises:
        ConfigurationError: the proposer refuses its options on this device.
    """

    def __init__(self, context: ProposerContext, device: torch.device, req_states: Any) -> None:
        from vllm_specplug.proposers.rest.device import DeviceRest

        try:
            self.proposer = DeviceRest(context, device)
        except ValueError as error:
            raise ConfigurationError(f"speculative_config: {error}") from error
        self._req_states = req_states
        # By table row: most tokens (prompt + output) of its request; 0 if that request wants no drafts.
        self._longest = torch.zeros(context.max_num_requests, dtype=torch.int32, device=device)

    def warm_up(self) -> None:
        """Compile the kernel."""
        row = torch.zeros(1, dtype=torch.int64, device=self._longest.device)
        states = self._req_states
        self.proposer.propose(states.all_token_ids.gpu, states.total_len.gpu, row, row.to(torch.int32))

    def add(self, rows: list[int], longest: list[int]) -> None:
        """Set the most tokens, ``longest``, of the new requests in table rows ``rows``."""
        # torch.tensor(..., device=...) would wait for the device, which is still busy with the step before.
        device = self._longest.device
        at = async_tensor_h2d(rows, device=device, dtype=torch.int64)
        self._longest[at] = async_tensor_h2d(longest, device=device, dtype=torch.int32)

    def propose(self, idx_mapping: torch.Tensor, num_sampled: torch.Tensor, limit: int, drafts: torch.Tensor) -> None:
        """Write drafts over ``drafts``, ``[num_requests, num_speculative_tokens]``; columns behind a draft stay."""
        states = self._req_states
        # The step emits one token more than it accepts, and none may pass max_tokens or max_model_len.
        wanted = (self._longest[idx_mapping] - states.total_len.gpu[idx_mapping] - 1).clamp(0, limit)
        wanted = torch.where(num_sampled > 0, wanted, 0).to(torch.int32)
        token_ids, num_tokens, _ = self.proposer.propose(
            states.all_token_ids.gpu, states.total_len.gpu, idx_mapping, wanted
        )
        column = torch.arange(drafts.shape[1], device=drafts.device)
        drafts.copy_(torch.where(column[None, :] < num_tokens[:, None], token_ids, drafts))
