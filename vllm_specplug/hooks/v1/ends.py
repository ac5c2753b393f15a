"""Where a request ends among the tokens of a step on V1."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from vllm.v1.core.sched.utils import check_sequence_repetition

from vllm_specplug.drafting.requests import TrackedRequest
from vllm_specplug.samplers.base import REJECTED


def end_at_stops(
    runner: Any,
    request: Callable[[str], TrackedRequest] | None,
    token_ids: torch.Tensor,
    targets: Sequence[Sequence[int]],
    num_emitted: list[int],
) -> None:
    """Emit nothing behind a token that ends its request: the user never gets it, and a session that goes on lacks it.

    Args:
        runner: vLLM's model runner.
        request: from a request id to the request; None: what ends a request is not known.
        token_ids: ``[num_requests, width]`` emitted tokens, padded with :data:`REJECTED`; changed in place.
        targets: per request, its emitted tokens, perhaps with others behind them.
        num_emitted: ``[num_requests]``, changed in place.
    """
    if request is None:
        return
    batch = runner.input_batch
    for index, count in enumerate(num_emitted):
        if count > 1:
            request_id, tokens = batch.req_ids[index], targets[index][:count]
            returned = request(request_id).num_returned(int(batch.num_tokens_no_spec[index]), tokens)
            returned = _until_repetition(runner.requests[request_id], tokens[:returned])
            if returned < count:
                token_ids[index, returned:] = REJECTED
                num_emitted[index] = returned


def _until_repetition(state: Any, emitted: Sequence[int]) -> int:
    """How many of a step's tokens come before vLLM sees a repetition that ends the request.

    Args:
        state: vLLM's state of the request.
        emitted: the step's tokens, at least one.
    """
    params = state.sampling_params
    if params.repetition_detection is not None:
        for count in range(max(1, params.min_tokens - len(state.output_token_ids)), len(emitted)):
            if check_sequence_repetition([*state.output_token_ids, *emitted[:count]], params.repetition_detection):
                return count
    return len(emitted)
