"""Forks on vLLM's V1 model runner; :mod:`vllm_specplug.hooks.forks` says what forks are.

The batch row of a fork holds only the tokens behind the head that it shares with its parent. Keys and values of that
head are computed once, in the parent's row, and written a second time into the fork's own blocks.

Order of a step: :meth:`ForkedRows.append` (after vLLM prepared its inputs), the forward pass, and in the verifier
:meth:`ForkedRows.copy_home`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl
from vllm.v1.worker.utils import copy_kv_cache_blocks_inplace

from vllm_specplug.hooks.attached import drafter_of
from vllm_specplug.hooks.forks import Fork, plan_forks, warn_once
from vllm_specplug.hooks.scratch_blocks import Scratch, plan_scratch
from vllm_specplug.hooks.v1.step import ForkedBatch, RequestChains, Step, Steps


class ForkedRows:
    """Adds forks to the batches of a model runner.

    Args:
        runner: vLLM's model runner, with its KV cache.
        scratch: the blocks that are set aside for forks.
        steps: holds the step under way and its forks.
    """

    def __init__(self, runner: Any, scratch: Scratch, steps: Steps) -> None:
        self._runner = runner
        self._scratch = scratch
        self._steps = steps
        self._write_twice()

    @property
    def max_forks(self) -> int:
        """Most forks of the next step, from the rows that are free now."""
        runner = self._runner
        return min(int(runner.max_num_reqs) - int(runner.input_batch.num_reqs), self._scratch.num_rows)

    def _write_twice(self) -> None:
        """Let every layer write keys and values of shared heads into the forks' blocks too."""
        runner = self._runner
        layers = runner.compilation_config.static_forward_context
        for group, each in enumerate(runner.kv_cache_config.kv_cache_groups):
            for name in each.layer_names:
                impl = layers[name].impl
                impl.do_kv_cache_update = functools.partial(self._update, impl.do_kv_cache_update, group)

    def _update(
        self, original: Callable[..., None], group: int, layer: Any, key: Any, value: Any, kv_cache: Any, slots: Any
    ) -> None:
        original(layer, key, value, kv_cache, slots)
        if (forks := self._steps.now.forks_in_batch) is not None:
            tokens, again = forks.repeated[group]
            if len(tokens):
                original(layer, key[tokens], value[tokens], kv_cache, again)

    def append(
        self, step: Step, scheduler_output: Any, num_scheduled: np.ndarray[Any, Any], num_drafts: list[int]
    ) -> torch.Tensor | None:
        """Put the side chains of this step behind the batch rows that vLLM prepared, as many as fit.

        Args:
            step: the step; its ``forks`` are filled in.
            scheduler_output: vLLM's ``SchedulerOutput``.
            num_scheduled: ``[num_requests]`` scheduled tokens.
            num_drafts: ``[num_requests]`` draft tokens among the scheduled tokens.

        Returns:
            Batch indices of the forks' tokens, all of which need logits; None if there are no forks.
        """
        side_chains = step.side_chains
        if not side_chains:
            return None
        runner = self._runner
        input_batch = runner.input_batch
        num_requests, num_tokens = int(input_batch.num_reqs), int(scheduler_output.total_num_scheduled_tokens)
        drafts = {
            request_id: draft
            for request_id, draft in scheduler_output.scheduled_spec_decode_tokens.items()
            if request_id in side_chains and self._can_fork(request_id, draft, num_scheduled)
        }
        max_rows = min(int(runner.max_num_reqs) - num_requests, self._scratch.num_rows)
        forks = plan_forks(drafts, side_chains, max_rows, int(runner.max_num_tokens) - num_tokens)
        if not forks:
            return None
        step.forks = self._lay_out(forks, drafts, num_drafts, num_tokens)
        return torch.arange(num_tokens, num_tokens + step.forks.num_more_tokens)

    def _can_fork(self, request_id: str, draft: list[int], num_scheduled: np.ndarray[Any, Any]) -> bool:
        runner = self._runner
        if runner.requests[request_id].sampling_params.structured_outputs is not None:
            warn_once("requests with structured outputs keep one chain: a grammar's mask covers the first only")
            return False
        row = runner.input_batch.req_id_to_index[request_id]
        return bool(draft) and min(draft) >= 0 and int(num_scheduled[row]) == len(draft) + 1

    def _lay_out(
        self,
        forks: list[Fork],
        drafts: dict[str, list[int]],
        num_drafts: list[int],
        num_tokens: int,
    ) -> ForkedBatch:
        """Fill batch rows, tokens, KV-cache slots and lengths of the forks; fill the beginning of their scratch blocks.

        The batch rows are free, and a request that gets such a row later overwrites everything in it.
        """
        runner = self._runner
        num_requests = len(num_drafts)
        input_batch = runner.input_batch
        tables = input_batch.block_table.block_tables
        first_logits = np.concatenate([[0], np.cumsum(np.array(num_drafts, dtype=np.int64) + 1)])
        chains: dict[int, RequestChains] = {}
        batch_rows: dict[int, list[list[int]]] = {}  # by request: per chain, batch indices of its tokens
        copies: list[tuple[int, int]] = []
        repeated: list[tuple[list[int], list[int]]] = [([], []) for _ in tables]
        requests, lengths = [], []
        next_token, next_logits = num_tokens, int(first_logits[num_requests])
        for number, fork in enumerate(forks):
            request = input_batch.req_id_to_index[fork.request_id]
            requests.append(request)
            start = int(runner.query_start_loc.np[request])
            draft = drafts[fork.request_id]
            if request not in chains:
                rows = range(int(first_logits[request]), int(first_logits[request + 1]))
                chains[request] = RequestChains([list(draft)], [list(rows)])
                batch_rows[request] = [list(range(start, start + len(draft) + 1))]
            mine = chains[request]
            last = int(input_batch.num_computed_tokens_cpu[request])  # position of the last token before the drafts
            first = last + 1 + fork.head
            end = last + len(fork.tokens)
            new = fork.tokens[fork.head :]
            row = num_requests + number
            shared = batch_rows[request][fork.parent][: fork.head + 1]
            parent_row = request if fork.parent == 0 else num_requests + mine.forks[fork.parent - 1]
            positions = np.arange(first, end + 1)
            stop = next_token + len(new)
            for group, (table, blocks) in enumerate(zip(tables, self._scratch.blocks_of(number), strict=True)):
                size = table.block_size
                begin = first // size
                own = table.block_table.np[row]
                own[:begin] = table.block_table.np[parent_row, :begin]
                scratch: np.ndarray[Any, np.dtype[np.int64]] = np.array(blocks[: end // size - begin + 1])
                own[begin : begin + len(scratch)] = scratch
                table.block_table.gpu[row] = table.block_table.cpu[row]
                slots = scratch[positions // size - begin] * size + positions % size
                table.slot_mapping.gpu[next_token:stop] = torch.from_numpy(slots)
                again = range(max(last, begin * size), first)
                repeated[group][0].extend(shared[position - last] for position in again)
                repeated[group][1].extend(int(scratch[0]) * size + position % size for position in again)
                if begin * size < last:
                    copies.append((int(table.block_table.np[request, begin]), int(scratch[0])))
            runner.input_ids.gpu[next_token:stop] = torch.tensor(new, dtype=runner.input_ids.gpu.dtype)
            runner.positions[next_token:stop] = torch.from_numpy(positions)
            runner.query_start_loc.np[row + 1] = stop
            runner.seq_lens[row] = end + 1
            runner.optimistic_seq_lens_cpu[row] = end + 1
            input_batch.num_computed_tokens_cpu[row] = first
            input_batch.num_prompt_tokens[row] = 0  # so that no token counts as prompt
            mine.tokens.append(fork.tokens)
            mine.logits_rows.append(
                mine.logits_rows[fork.parent][: fork.head + 1] + list(range(next_logits, next_logits + len(new)))
            )
            mine.forks.append(number)
            batch_rows[request].append(shared + list(range(next_token, stop)))
            lengths.append(len(new))
            next_token, next_logits = stop, next_logits + len(new)
        runner.query_start_loc.np[num_requests + len(forks) + 1 :].fill(next_token)
        runner.query_start_loc.copy_to_gpu()
        copy_kv_cache_blocks_inplace(runner.kv_caches, runner.kv_cache_config.num_blocks, copies)
        twice = [(torch.tensor(tokens), torch.tensor(slots, dtype=torch.int64)) for tokens, slots in repeated]
        return ForkedBatch(forks, requests, num_requests, num_tokens, lengths, chains, twice)

    def copy_home(self, forks: ForkedBatch, winners: dict[int, tuple[int, int]]) -> None:
        """Copy the winning chains' keys and values into the blocks of their requests.

        Args:
            forks: forks of the step.
            winners: by batch row of the request: index of the winning chain, and number of its accepted tokens.
        """
        runner = self._runner
        input_batch = runner.input_batch
        copies: list[tuple[int, int]] = []
        for request, (chain, num_accepted) in winners.items():
            if chain == 0:
                continue
            number = forks.chains[request].forks[chain - 1]
            last = int(input_batch.num_computed_tokens_cpu[request])
            for table in input_batch.block_table.block_tables:
                size, blocks = table.block_size, table.block_table.np
                begin = (last + 1 + forks.forks[number].main_head) // size
                end = (last + num_accepted) // size + 1
                copied, own = blocks[forks.num_requests + number, begin:end], blocks[request, begin:end]
                copies += zip(copied.tolist(), own.tolist(), strict=True)
            # vLLM's own drafter continues from the tokens in the request's batch row.
            start = int(runner.query_start_loc.np[request]) + 1
            won = forks.chains[request].tokens[chain]
            runner.input_ids.gpu[start : start + len(won)] = torch.tensor(won, dtype=runner.input_ids.gpu.dtype)
        copy_kv_cache_blocks_inplace(runner.kv_caches, runner.kv_cache_config.num_blocks, copies)


def attach(runner: Any, steps: Steps) -> ForkedRows | None:
    """Prepare ``runner`` for forks; None if its requests cannot have side chains, for a reason that is logged.

    Args:
        runner: vLLM's model runner, with its KV cache.
        steps: see :class:`ForkedRows`.
    """
    config = runner.kv_cache_config
    scratch = plan_scratch(runner.vllm_config, config)
    if scratch is None:
        return None
    layers = runner.compilation_config.static_forward_context
    kinds = {type(layers[name].impl) for group in config.kv_cache_groups for name in group.layer_names}
    sizes = {table.block_size for table in runner.input_batch.block_table.block_tables}
    if kinds != {CPUAttentionBackendImpl}:
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        warn_once(f"every request keeps one chain: attention by {names} is not known to write a token's values twice")
        return None
    if sizes != {group.kv_cache_spec.block_size for group in config.kv_cache_groups}:
        warn_once("every request keeps one chain: attention works on blocks of another size than the KV cache has")
        return None
    return ForkedRows(runner, scratch, steps)


def _forks_in_batch(runner: Any) -> ForkedBatch | None:
    drafter = drafter_of(runner)
    return None if drafter is None else drafter.steps.now.forks_in_batch


def prepare_inputs(original: Callable[..., Any], self: Any, scheduler_output: Any, num_scheduled: Any) -> Any:
    """Wraps ``GPUModelRunner._prepare_inputs``: begins a step and puts forks behind the requests' batch rows."""
    logits_indices, metadata, max_num_sampled = original(self, scheduler_output, num_scheduled)
    drafter = drafter_of(self)
    if drafter is None:
        return logits_indices, metadata, max_num_sampled
    step = drafter.steps.begin()
    if drafter.forks is not None and metadata is not None:
        more = drafter.forks.append(step, scheduler_output, num_scheduled, metadata.num_draft_tokens)
        if more is not None:
            logits_indices = torch.cat([logits_indices, more.to(logits_indices.dtype)])
    return logits_indices, metadata, max_num_sampled


def determine_batch(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """Wraps ``_determine_batch_execution_and_padding``: counts rows and tokens of forks too."""
    forks = _forks_in_batch(self)
    if forks is not None:
        kwargs["num_tokens"] += forks.num_more_tokens
        kwargs["num_reqs"] += len(forks.forks)
        lengths: np.ndarray[Any, np.dtype[np.int32]] = np.array(forks.lengths, dtype=np.int32)
        kwargs["num_scheduled_tokens_np"] = np.concatenate([kwargs["num_scheduled_tokens_np"], lengths])
    return original(self, *args, **kwargs)


def slot_mappings(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """Wraps ``_get_slot_mappings``: keeps the KV-cache slots of forks, which vLLM would take for padding."""
    forks = _forks_in_batch(self)
    if forks is not None:
        kwargs["num_tokens_unpadded"] += forks.num_more_tokens
        kwargs["num_tokens_padded"] = max(kwargs["num_tokens_padded"], kwargs["num_tokens_unpadded"])
        kwargs["num_reqs_padded"] = max(kwargs["num_reqs_padded"], forks.num_requests + len(forks.forks))
    return original(self, *args, **kwargs)


def build_attention_metadata(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """Wraps ``_build_attention_metadata``: shows the forks to attention, but not to vLLM's own drafter."""
    forks = _forks_in_batch(self)
    if forks is None:
        return original(self, *args, **kwargs)
    kwargs["num_tokens"] += forks.num_more_tokens
    kwargs["num_reqs"] += len(forks.forks)
    metadata, common = original(self, *args, **kwargs)
    return metadata, None if common is None else common.unpadded(forks.num_tokens, forks.num_requests)


def preprocess(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """Wraps ``_preprocess``: keeps the positions of forks, which vLLM would zero as padding."""
    forks = _forks_in_batch(self)
    if forks is None:
        return original(self, *args, **kwargs)
    positions = self.positions[forks.num_tokens : forks.num_tokens + forks.num_more_tokens]
    kept = positions.clone()
    result = original(self, *args, **kwargs)
    positions.copy_(kept)
    return result


def padding_mask(original: Callable[..., Any], self: Any, num_tokens: int, num_tokens_padded: int) -> Any:
    """Wraps ``_prepare_padding_mask``: tokens of forks are not padding."""
    forks = _forks_in_batch(self)
    return original(self, num_tokens + (0 if forks is None else forks.num_more_tokens), num_tokens_padded)
