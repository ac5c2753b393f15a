"""Forks on vLLM's V2 model runner; :mod:`vllm_specplug.hooks.forks` says what forks are.

A fork is a batch row under a made-up request id, which stands for the state of its request. The row repeats the
request's last token and is as long as the request's own row, so that a uniform batch stays uniform and full CUDA graphs
replay. Under async scheduling only the device knows the length of a request: block ids, KV-cache slots and copies are
computed on the device, and the host never waits for them.

Order of a step: :meth:`ForkedRows.plan` (once the step's requests are in place), :meth:`ForkedRows.gather`,
:meth:`ForkedRows.fill`, :meth:`ForkedRows.attend`, the forward pass, :meth:`ForkedRows.choose`, which leaves a batch as
it would have been without forks.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.outputs import LogprobsTensors

from vllm_specplug.hooks.attached import drafter_of
from vllm_specplug.hooks.forks import plan_forks, warn_once
from vllm_specplug.hooks.scratch_blocks import Scratch, plan_scratch
from vllm_specplug.hooks.v2.block_copies import BlockCopies
from vllm_specplug.hooks.v2.step import ForkedBatch, Step

_FORK_ID = "specplug fork {} of {}"


class ForkedRows:
    """Adds forks to the batches of a model runner.

    Args:
        runner: vLLM's model runner, with its KV cache.
        scratch: the blocks that are set aside for forks.
    """

    def __init__(self, runner: Any, scratch: Scratch) -> None:
        self._runner = runner
        self._scratch = scratch
        self.kept_to_one: set[str] = set()  # requests that cannot fork
        device = runner.device
        by_row = [scratch.blocks_of(fork) for fork in range(scratch.num_rows)]
        self._blocks = [
            torch.tensor([list(blocks[group]) for blocks in by_row], dtype=torch.int64, device=device)
            for group in range(len(scratch.blocks_per_row))
        ]
        self._copies = BlockCopies(runner.kv_caches, int(runner.kv_cache_config.num_blocks))

    def max_forks(self, num_running: int) -> int:
        """Most forks of the next step if it has ``num_running`` requests; an estimate before it is scheduled."""
        idle = max(min(int(self._runner.max_num_reqs) - num_running, self._scratch.num_rows), 0)
        if not num_running or not self._runner.vllm_config.scheduler_config.async_scheduling:
            return idle  # drafts keep their own length
        length = int(self._runner.decode_query_len)
        return self._within_graph([length] * num_running, length, idle)

    def _within_graph(self, lengths: Sequence[int], fork_length: int, num_forks: int) -> int:
        """The largest number of forks with which the batch replays the same kind of CUDA graph as without forks.

        The largest captured batch is often smaller than the largest that can run, and without its graph a step takes
        several times as long.

        Args:
            lengths: number of tokens of each request's batch row.
            fork_length: most tokens of a fork's batch row.
            num_forks: upper bound of the result.
        """
        num_tokens, longest = sum(lengths), max(lengths)

        def mode(more: int) -> Any:
            rows, tokens = len(lengths) + more, num_tokens + more * fork_length
            uniform = longest if tokens == longest * rows else None
            return self._runner.cudagraph_manager.dispatch(rows, tokens, uniform, 0, max_query_len=longest).cg_mode

        alone = mode(0)
        if num_forks == 0 or mode(num_forks) == alone:
            return num_forks
        fits, too_many = 0, num_forks
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            fits, too_many = (middle, too_many) if mode(middle) == alone else (fits, middle)
        return fits

    # -- Before the forward pass -------------------------------------------------------------------------------------

    def plan(self, step: Step, scheduler_output: Any, in_place: Mapping[str, list[int]]) -> None:
        """Choose the forks of this step, and add them to the scheduler's output under made-up request ids.

        Args:
            step: the step; its ``forks`` are filled in.
            scheduler_output: a copy of vLLM's ``SchedulerOutput`` with copied dictionaries of scheduled tokens.
            in_place: the drafts that this step verifies, by request id.
        """
        side_chains = step.side_chains
        runner = self._runner
        scheduled = scheduler_output.num_scheduled_tokens
        if not side_chains or not scheduled or not self._is_decode(scheduled):
            return
        spec = scheduler_output.scheduled_spec_decode_tokens
        drafts = {}
        for request_id, placeholders in spec.items():
            draft = in_place.get(request_id)
            length = len(placeholders)
            if draft and request_id in side_chains and scheduled[request_id] == length + 1:
                if request_id in self.kept_to_one:
                    warn_once(
                        "requests with structured outputs or a budget of reasoning tokens keep one chain: what is "
                        "masked follows the first only"
                    )
                    continue
                drafts[request_id] = _padded(draft, length)
        longest = max((len(draft) for draft in drafts.values()), default=0)
        room = int(runner.max_num_tokens) - sum(scheduled.values())
        max_rows = 0
        if longest:
            idle = min(int(runner.max_num_reqs) - len(scheduled), self._scratch.num_rows, room // (longest + 1))
            max_rows = self._within_graph(list(scheduled.values()), longest + 1, max(idle, 0))
        padded = {
            request_id: [_padded(chain, len(draft)) for chain in side_chains[request_id]]
            for request_id, draft in drafts.items()
        }
        forks = plan_forks(drafts, padded, max_rows, room)
        if not forks:
            return
        step.forks = batch = ForkedBatch(forks)
        for fork in forks:
            chains = batch.chains.setdefault(fork.request_id, [drafts[fork.request_id]])
            name = _FORK_ID.format(len(chains), fork.request_id)
            chains.append(fork.tokens)
            batch.request_ids.append(name)
            scheduled[name] = len(fork.tokens) + 1
            spec[name] = list(spec[fork.request_id])
        scheduler_output.total_num_scheduled_tokens = sum(scheduled.values())

    def _is_decode(self, scheduled: Mapping[str, int]) -> bool:
        states = self._runner.req_states
        rows = [states.req_id_to_index[request_id] for request_id in scheduled]
        return bool((states.num_computed_prefill_tokens[rows] >= states.prefill_len.np[rows]).all())

    @contextlib.contextmanager
    def aliases(self, forks: ForkedBatch) -> Iterator[None]:
        """Within this context, the forks' made-up ids refer to the state of their requests."""
        index = self._runner.req_states.req_id_to_index
        for fork, name in zip(forks.forks, forks.request_ids, strict=True):
            index[name] = index[fork.request_id]
        try:
            yield
        finally:
            for name in forks.request_ids:
                del index[name]

    def gather(self, batch: ForkedBatch, batch_state: Any) -> Any:
        """Reorder vLLM's state of the batch, so that the forks' rows follow those of all requests."""
        place = {name: row for row, name in enumerate(batch_state.req_ids)}
        forks = [place[name] for name in batch.request_ids]
        are_forks = set(forks)
        order = [row for row in range(len(place)) if row not in are_forks] + forks
        batch.num_requests = len(order) - len(forks)
        changes: dict[str, Any] = {"req_ids": [batch_state.req_ids[row] for row in order]}
        for name, values in batch_state._asdict().items():
            if isinstance(values, np.ndarray):
                changes[name] = values[order]
        row_of = {request_id: row for row, request_id in enumerate(changes["req_ids"])}
        batch.parents_np = np.array([row_of[fork.request_id] for fork in batch.forks], dtype=np.int64)
        counts: dict[str, int] = {}
        ranks = []
        for fork in batch.forks:
            counts[fork.request_id] = counts.get(fork.request_id, 0) + 1
            ranks.append(counts[fork.request_id])
        device = self._runner.device
        batch.parents = async_tensor_h2d(batch.parents_np, device=device, dtype=torch.int64)
        batch.ranks = async_tensor_h2d(np.array([0] * batch.num_requests + ranks), device=device, dtype=torch.int64)
        return batch_state._replace(**changes)

    def fill(self, forks: ForkedBatch, input_batch: Any) -> None:
        """Write each fork's tokens into its batch row, which vLLM filled with the request's main chain."""
        starts = input_batch.query_start_loc_np[forks.num_requests :]
        places = [
            int(starts[number]) + 1 + at for number, fork in enumerate(forks.forks) for at in range(len(fork.tokens))
        ]
        tokens = [token for fork in forks.forks for token in fork.tokens]
        device = self._runner.device
        input_batch.input_ids[async_tensor_h2d(places, device=device, dtype=torch.int64)] = async_tensor_h2d(
            tokens, device=device, dtype=torch.int32
        )

    def attend(
        self,
        forks: ForkedBatch,
        input_batch: Any,
        block_tables: tuple[torch.Tensor, ...],
        slot_mappings: torch.Tensor,
    ) -> None:
        """Give the forks' batch rows scratch blocks, and copy the requests' partly filled blocks into these.

        Tables are changed in place, since CUDA graphs read them.
        """
        num_forks, first_row = len(forks.forks), forks.num_requests
        # Position of the last token before the drafts.
        last = self._runner.req_states.num_computed_tokens.gpu[input_batch.idx_mapping[first_row:]].to(torch.int64)
        first_token, stop = (int(input_batch.query_start_loc_np[row]) for row in (first_row, first_row + num_forks))
        lengths = np.diff(input_batch.query_start_loc_np[first_row : first_row + num_forks + 1])
        fork_of_token = async_tensor_h2d(
            np.repeat(np.arange(num_forks), lengths), device=last.device, dtype=torch.int64
        )
        positions = input_batch.positions[first_token:stop].to(torch.int64)
        forks.first_blocks = []
        sources, targets = [], []
        for group, size in enumerate(self._runner.block_tables.block_sizes):
            scratch = self._blocks[group][:num_forks]
            begin = last // size
            forks.first_blocks.append(begin)
            table = block_tables[group]
            rows = torch.arange(first_row, first_row + num_forks, device=last.device)
            sources.append(table[rows, begin].to(torch.int64))
            targets.append(scratch[:, 0])
            columns = begin[:, None] + torch.arange(scratch.shape[1], device=last.device)
            fits = columns < table.shape[1]
            # Blocks behind the table's end are never used: the last column is just written twice.
            columns = columns.clamp(max=table.shape[1] - 1)
            at_end = (table.shape[1] - 1 - begin).clamp(max=scratch.shape[1] - 1)[:, None].expand_as(scratch)
            table[rows[:, None], columns] = torch.where(fits, scratch, scratch.gather(1, at_end)).to(table.dtype)
            offset = positions // size - begin[fork_of_token]
            slot_mappings[group, first_token:stop] = scratch[fork_of_token, offset] * size + positions % size
        self._copies.copy(torch.cat(sources), torch.cat(targets))

    # -- After the forward pass ----------------------------------------------------------------------------------------

    def choose(self, forks: ForkedBatch, input_batch: Any, output: Any) -> tuple[Any, torch.Tensor]:
        """Keep the winning row of each request, copy its keys and values home, and remove the forks from the batch.

        Args:
            forks: forks of the step.
            input_batch: batch of the step; changed in place to the batch without forks.
            output: vLLM's sampler output for all batch rows.

        Returns:
            The output for the requests only, and ``[num_requests]`` the index of each request's winning chain.
        """
        assert forks.parents is not None
        assert forks.ranks is not None
        num_rows, num_requests = forks.num_requests + len(forks.forks), forks.num_requests
        device = output.num_sampled.device
        rows = torch.arange(num_rows, device=device)
        # The row with the most emitted tokens wins; of equals the request's own row, then the earlier fork.
        score = output.num_sampled.to(torch.int64) * num_rows + (num_rows - 1 - rows)
        best = score[:num_requests].clone()
        best.scatter_reduce_(0, forks.parents, score[num_requests:], "amax")
        winner = num_rows - 1 - best % num_rows  # [num_requests] batch row
        num_sampled = output.num_sampled[winner]
        self._copy_home(forks, input_batch, winner, num_sampled)
        cu_rows = input_batch.cu_num_logits_np
        logprobs = output.logprobs_tensors
        if logprobs is not None:
            first = input_batch.cu_num_logits.to(torch.int64)
            own = torch.arange(int(cu_rows[num_requests]), device=device)
            counts = np.diff(cu_rows[: num_requests + 1])
            request = async_tensor_h2d(np.repeat(np.arange(num_requests), counts), device=device, dtype=torch.int64)
            taken = own - first[request] + first[winner[request]]
            fields = [None if values is None else values[taken] for values in logprobs[:3]]
            logprobs = LogprobsTensors(*fields, cu_num_generated_tokens=cu_rows[: num_requests + 1].tolist())
        kept = replace(
            output,
            sampled_token_ids=output.sampled_token_ids[winner],
            logprobs_tensors=logprobs,
            num_nans=None if output.num_nans is None else output.num_nans[winner],
            num_sampled=num_sampled,
            num_rejected=output.num_rejected[winner],
        )
        _take_forks_out(input_batch, num_requests)
        return kept, forks.ranks[winner]

    def _copy_home(self, forks: ForkedBatch, input_batch: Any, winner: torch.Tensor, num_sampled: torch.Tensor) -> None:
        assert forks.parents is not None
        num_forks, first_row = len(forks.forks), forks.num_requests
        device = winner.device
        last = self._runner.req_states.num_computed_tokens.gpu[input_batch.idx_mapping[first_row:]].to(torch.int64)
        end = last + num_sampled[forks.parents] - 1  # position of the last token whose keys and values are right
        won = winner[forks.parents] == torch.arange(first_row, first_row + num_forks, device=device)
        sources, targets = [], []
        for group, size in enumerate(self._runner.block_tables.block_sizes):
            scratch, begin = self._blocks[group][:num_forks], forks.first_blocks[group]
            table = self._runner.block_tables.input_block_tables[group]
            blocks = begin[:, None] + torch.arange(scratch.shape[1], device=device)
            is_used = won[:, None] & (blocks >= (last // size)[:, None]) & (blocks <= (end // size)[:, None])
            own = table[forks.parents[:, None], blocks.clamp(max=table.shape[1] - 1)].to(torch.int64)
            sources.append(scratch.reshape(-1))
            targets.append(torch.where(is_used, own, scratch).reshape(-1))
        # A block that is its own target stays as it is.
        self._copies.copy(torch.cat(sources), torch.cat(targets))


def _padded(tokens: list[int], length: int) -> list[int]:
    """``tokens`` cut to ``length``, or padded with the last token."""
    return (tokens + tokens[-1:] * (length - len(tokens)))[:length]


def _take_forks_out(input_batch: Any, num_requests: int) -> None:
    """Cut a batch down to its first ``num_requests`` rows, in place."""
    num_rows = int(input_batch.cu_num_logits_np[num_requests])
    num_tokens = int(input_batch.query_start_loc_np[num_requests])
    for name in (
        "req_ids", "idx_mapping", "idx_mapping_np", "num_scheduled_tokens", "num_draft_tokens_per_req", "seq_lens",
        "seq_lens_cpu_upper_bound", "num_computed_tokens_np", "prefill_len_np", "num_computed_prefill_tokens_np",
        "is_prefilling_np", "prefill_runs_as_decode_np", "max_seq_len_np", "prompt_lens",
    ):  # fmt: skip
        if (values := getattr(input_batch, name)) is not None:
            setattr(input_batch, name, values[:num_requests])
    for name in ("query_start_loc", "query_start_loc_np", "cu_num_logits", "cu_num_logits_np"):
        setattr(input_batch, name, getattr(input_batch, name)[: num_requests + 1])
    for name in ("expanded_idx_mapping", "expanded_local_pos", "logits_indices"):
        setattr(input_batch, name, getattr(input_batch, name)[:num_rows])
    for name in ("input_ids", "positions", "is_padding"):
        setattr(input_batch, name, getattr(input_batch, name)[:num_tokens])
    input_batch.num_reqs = input_batch.num_reqs_after_padding = num_requests
    input_batch.num_tokens = input_batch.num_tokens_after_padding = num_tokens
    input_batch.num_draft_tokens = int(input_batch.num_draft_tokens_per_req.sum())


def attach(runner: Any) -> ForkedRows | None:
    """Prepare ``runner`` for forks; None if its requests cannot have side chains.

    Args:
        runner: vLLM's model runner, with its KV cache.
    """
    scratch = plan_scratch(runner.vllm_config, runner.kv_cache_config)
    return None if scratch is None else ForkedRows(runner, scratch)


def execute_model(original: Callable[..., Any], self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
    """Wraps ``GPUModelRunner.execute_model``: copies the scheduler's output, so that forks can be added to it."""
    drafter = drafter_of(self)
    if drafter is not None and drafter.forks is not None:
        scheduler_output = copy.copy(scheduler_output)
        scheduler_output.num_scheduled_tokens = dict(scheduler_output.num_scheduled_tokens)
        scheduler_output.scheduled_spec_decode_tokens = dict(scheduler_output.scheduled_spec_decode_tokens)
    return original(self, scheduler_output, *args, **kwargs)


def update_requests(original: Callable[..., Any], self: Any, scheduler_output: Any) -> Any:
    """Wraps ``GPUModelRunner.update_requests``: plans forks once all requests of the step have their blocks."""
    result = original(self, scheduler_output)
    drafter = drafter_of(self)
    if drafter is not None and drafter.forks is not None:
        drafter.forks.plan(drafter.begin_step(), scheduler_output, drafter.in_place)
    return result


def gather_batch_req_state(original: Callable[..., Any], self: Any, scheduler_output: Any, dummy_run: bool) -> Any:
    """Wraps ``GPUModelRunner.gather_batch_req_state``: puts forks behind the requests, with their requests' state."""
    drafter = drafter_of(self)
    forks = None if drafter is None or dummy_run else drafter.steps.now.forks_in_batch
    if forks is None:
        return original(self, scheduler_output, dummy_run)
    with drafter.forks.aliases(forks):
        batch_state, uniform = original(self, scheduler_output, dummy_run)
    return None if batch_state is None else drafter.forks.gather(forks, batch_state), uniform


def prepare_attn(original: Callable[..., Any], self: Any, input_batch: Any) -> Any:
    """Wraps ``GPUModelRunner.prepare_attn``: gives forks their own blocks."""
    block_tables, slot_mappings = original(self, input_batch)
    drafter = drafter_of(self)
    forks = None if drafter is None else drafter.steps.now.forks_in_batch
    if forks is not None:
        drafter.forks.attend(forks, input_batch, block_tables, slot_mappings)
    return block_tables, slot_mappings


def sample(
    original: Callable[..., Any], self: Any, hidden_states: torch.Tensor, input_batch: Any, grammar_output: Any
) -> Any:
    """Wraps ``GPUModelRunner.sample``: chooses the winning chains and removes the forks from batch and output."""
    result = original(self, hidden_states, input_batch, grammar_output)
    drafter = drafter_of(self)
    step = None if drafter is None else drafter.steps.now
    if step is None or step.forks_in_batch is None:
        return result
    output, step.winners = drafter.forks.choose(step.forks, input_batch, result[0])
    step.targets = output.sampled_token_ids
    return output, output.num_sampled, output.num_rejected
