"""Our drafter on vLLM's V2 runner."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.config.compilation import CUDAGraphMode
from vllm.distributed.parallel_state import get_tp_group
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator

from vllm_specplug.drafting.drafting import Drafting, Proposal
from vllm_specplug.drafting.history import TokenHistory
from vllm_specplug.drafting.requests import TrackedRequest
from vllm_specplug.hooks.attached import at_end, attach, log_start, proposer_context
from vllm_specplug.hooks.metrics import publish_metrics
from vllm_specplug.hooks.v2 import forks as v2_forks
from vllm_specplug.hooks.v2.on_device import DeviceDrafting
from vllm_specplug.hooks.v2.step import Step, Steps
from vllm_specplug.hooks.v2.transfer import Transfer
from vllm_specplug.hooks.v2.verifier import check_verifier
from vllm_specplug.proposers.base import TargetNoise, Verified
from vllm_specplug.samplers.kernels import pack_emitted
from vllm_specplug.samplers.keys import PositionKeys
from vllm_specplug.settings.model import Settings, settings_of

_WARM_UP_REQUESTS = ("_warmup_", "_v2_mixed_warmup")
"""vLLM warms kernels up with made-up requests whose ids begin like this; they are not tracked."""


class Drafter(BaseSpeculator):  # type: ignore[misc]
    """Holds the plugin's state in a V2 runner: as the runner's drafter, or joined to one of vLLM's own drafters.

    Args:
        vllm_config: vLLM's configuration; the plugin's settings are in its ``additional_config``.
        device: device of the runner.
        req_states: the runner's per-request tensors.
        native: vLLM's own drafter, which our proposers join; None if they draft alone.
    """

    supports_mm_inputs = False
    draft_logits = None

    def __init__(self, vllm_config: Any, device: torch.device, req_states: Any, native: Any = None) -> None:
        settings = settings_of(vllm_config.additional_config)
        assert settings is not None
        self._native = native
        self.settings: Settings = settings
        self.device = device
        self.num_speculative_tokens = int(vllm_config.speculative_config.num_speculative_tokens)
        self._model_config = vllm_config.model_config
        max_num_requests = int(vllm_config.scheduler_config.max_num_seqs)
        self.is_async = bool(vllm_config.scheduler_config.async_scheduling)
        self._req_states = req_states
        self._width = self.num_speculative_tokens + 1
        context = proposer_context(vllm_config, settings)
        # Under async scheduling the scheduler reserves k draft tokens per request anyway: short drafts save nothing.
        self.drafting = Drafting(
            settings,
            context,
            native=None if native is None else vllm_config.speculative_config.method,
            can_shorten=not self.is_async,
        )
        self._on_device: DeviceDrafting | None = None
        if settings.device_proposer is not None:
            options = settings.device_proposer.options
            self._on_device = DeviceDrafting(replace(context, options=options), device, req_states)
        # The last step of a request can emit a few tokens beyond max_model_len: the history has room for them.
        self.history = TokenHistory(max_num_requests, self.max_model_len + self._width)
        self._drafts = torch.zeros((max_num_requests, self.num_speculative_tokens), dtype=torch.int64, device=device)
        self._packed = torch.empty((max_num_requests, 2 + self._width), dtype=torch.int32, device=device)
        self._on_host = torch.empty(self._packed.shape, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._on_host_drafts = torch.empty(
            (max_num_requests, 1 + self.num_speculative_tokens), dtype=torch.int32, pin_memory=device.type == "cuda"
        )
        self._on_host_native = torch.empty(
            self._drafts.shape if native is not None else (0, 0), dtype=torch.int64, pin_memory=device.type == "cuda"
        )
        self._sampling_states: Any = None
        self.steps = Steps()
        self.in_place: dict[str, list[int]] = {}  # request id -> the draft that the next step verifies
        self.forks: v2_forks.ForkedRows | None = None
        self._on_host_winners = torch.empty(max_num_requests, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._is_sharded = False
        self._has_pipeline = False
        self._tp_group: Any = None
        self.is_first_rank = True
        parallel_config = getattr(vllm_config, "parallel_config", None)
        # Under torchrun every rank schedules by itself, and only the first rank knows the lengths of drafts.
        self._every_rank_schedules = getattr(parallel_config, "distributed_executor_backend", "") == "external_launcher"

    def attach(self, runner: Any) -> None:
        """Connect with the runner's verifier, warm up, and log what is active. Called once the model is loaded.

        Raises:
            ConfigurationError: the model brings its own sampler in place of our verifier.
        """
        if self.settings.is_coupled:
            check_verifier(runner)
            runner.rejection_sampler.steps = self.steps
        self._is_sharded = runner.batch_sharder is not None
        self._has_pipeline = runner.use_pp
        if self.settings.num_noises and not runner.sampler.use_fp64_gumbel:  # float64 hashes its noise in another way
            self._sampling_states = runner.sampler.sampling_states
        attach(runner, self)
        attach(runner.draft_tokens_handler, self)
        group = get_tp_group()
        if group.world_size > 1:
            self._tp_group, self.is_first_rank = group, group.rank_in_group == 0
        start = time.perf_counter()
        if self._on_device is not None:
            self._on_device.warm_up()
        if self.is_first_rank:
            self.drafting.warm_up()
            at_end(self.drafting.close)
            publish_metrics(lambda: self.snapshot(is_fresh=False), runner.vllm_config)
            log_start("V2", self.settings, self._role(time.perf_counter() - start))

    def attach_forks(self, runner: Any) -> None:
        """Prepare for forks, which need KV-cache blocks. Called once the runner has its KV cache."""
        self.forks = v2_forks.attach(runner)

    def begin_step(self) -> Step:
        """Put the drafts of the last step in place and begin a new one. Called before the step's inputs are made."""
        self.put_in_place()
        return self.steps.begin()

    @property
    def max_model_len(self) -> int:
        """Most tokens of a request; vLLM 0.33 may lower it to what fits the KV cache after this drafter is built."""
        return int(self._model_config.max_model_len)

    def _role(self, warm_up_s: float) -> str:
        """The end of the start-up line: which drafter is at work."""
        proposers = self.drafting.describe()
        if self._on_device is not None:
            proposers = f"rest ({self._on_device.proposer.describe()})"
        joining = "" if self._native is None else f", joining vLLM's {self.drafting.native}"
        length = "on: drafts are padded to that length" if self.is_async else "off: drafts keep their own length"
        return (
            f", proposers: {proposers}{joining}; up to {self.num_speculative_tokens} draft tokens, async scheduling "
            f"{length} (warm-up {warm_up_s:.1f} s)"
        )

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """Nothing of ours runs in a CUDA graph."""

    def capture(self) -> None:
        """Nothing of ours runs in a CUDA graph."""

    def add_requests(self, scheduler_output: Any) -> None:
        """Track new and resumed requests. Called once they have their table rows."""
        rows: list[int] = []
        lengths: list[int] = []
        for new in scheduler_output.scheduled_new_reqs:
            params = new.sampling_params
            if params is None or new.req_id.startswith(_WARM_UP_REQUESTS):
                continue
            request = TrackedRequest.of(new.req_id, params, new.prompt_len, self.max_model_len)
            row = self._req_states.req_id_to_index[new.req_id]
            if self._on_device is not None:
                rows.append(row)
                lengths.append(request.max_total_tokens if request.speculate else 0)
            else:
                if self.forks is not None and (
                    params.structured_outputs is not None or params.thinking_token_budget is not None
                ):
                    self.forks.kept_to_one.add(new.req_id)
                if new.req_id in self.history:  # a streaming-input session goes on, with another prompt
                    self.in_place.pop(new.req_id, None)
                    self.drafting.finish([new.req_id])
                self.history.add(row, request, new.prefill_token_ids if self.is_first_rank else ())
        if self._on_device is not None and rows:
            self._on_device.add(rows, lengths)

    def finish_requests(self, scheduler_output: Any) -> None:
        """Drop the state of finished and preempted requests, which leave their table rows."""
        for request_id in (*scheduler_output.finished_req_ids, *(scheduler_output.preempted_req_ids or ())):
            self.history.remove(request_id)
            self.in_place.pop(request_id, None)
            if self.forks is not None:
                self.forks.kept_to_one.discard(request_id)
        self.drafting.finish(list(scheduler_output.finished_req_ids))

    @torch.inference_mode()
    def propose(  # noqa: PLR0913 - vLLM's signature
        self,
        input_batch: Any,
        attn_metadata: Any,
        slot_mappings: Any,
        last_hidden_states: torch.Tensor,
        aux_hidden_states: list[torch.Tensor] | None,
        num_sampled: torch.Tensor,  # [num_requests]
        num_rejected: torch.Tensor,
        last_sampled: torch.Tensor,  # [max_num_requests, 1]
        next_prefill_tokens: torch.Tensor,
        temperature: torch.Tensor,
        seeds: torch.Tensor,
        dp_sync_state: Any = None,
        dummy_run: bool = False,
        skip_attn_for_dummy_run: bool = False,
        mm_inputs: Any = None,
        is_profile: bool = False,
        num_speculative_tokens: int | None = None,
    ) -> torch.Tensor:
        """Draft tokens ``[num_requests, num_speculative_tokens]`` on the device. vLLM calls it after each step.

        Columns behind the end of a draft are filled with some token: the verifier checks them like any other.
        """
        drafts = self._drafts[: input_batch.num_reqs]
        if dummy_run:
            return drafts
        drafts.copy_(last_sampled[input_batch.idx_mapping].expand_as(drafts))
        return self._propose(input_batch, num_sampled, drafts, num_speculative_tokens)

    @torch.inference_mode()
    def join(self, propose: Callable[..., torch.Tensor], input_batch: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Let vLLM's own drafter propose, then replace each draft by ours if ours promises more.

        Args:
            propose: the ``propose`` method of vLLM's drafter.
            input_batch: first of the arguments with which vLLM calls ``propose``.
        """
        theirs = propose(input_batch, *args, **kwargs)
        if kwargs.get("dummy_run"):
            return theirs
        drafts = self._drafts[: input_batch.num_reqs]
        drafts.copy_(theirs)
        return self._propose(input_batch, args[4], drafts, kwargs.get("num_speculative_tokens"))

    def _propose(
        self, input_batch: Any, num_sampled: torch.Tensor, drafts: torch.Tensor, num_speculative_tokens: int | None
    ) -> torch.Tensor:
        """Draft for a step; ``drafts`` holds placeholders or vLLM's own drafts, and ours are written over them."""
        if self.steps.now.transfer is not None:  # of an earlier step, if the last one ran no model
            self.begin_step()
        limit = self.num_speculative_tokens
        if num_speculative_tokens is not None:
            limit = min(limit, num_speculative_tokens)
        if self._on_device is not None:
            self._on_device.propose(input_batch.idx_mapping, num_sampled, limit, drafts)
            return drafts
        if self._tp_group is None and not self.drafting.has_proposers:
            self.in_place.clear()
            return drafts
        self._send_to_host(input_batch, num_sampled, limit, drafts)
        # In these cases vLLM reads the drafts before the next step begins: it must not see placeholders.
        if not self.is_async or self._has_pipeline or input_batch.has_structured_output_reqs:
            self.put_in_place(drafts)
        return drafts

    def put_in_place(self, out: torch.Tensor | None = None) -> None:
        """Draft from the tokens of the step under way, if they are on their way, and write the drafts to the device.

        Args:
            out: ``[num_requests, num_speculative_tokens]`` to fill, by batch row; None writes to the runner's table,
                into which vLLM has copied the placeholders.
        """
        step = self.steps.now
        transfer = step.transfer
        if transfer is None or step.proposal is not None:
            return
        alive = self.history.occupation[transfer.rows] == transfer.occupation
        alive &= transfer.occupation > 0
        step.proposal = Proposal([[] for _ in transfer.request_ids])
        if transfer.packed is not None:
            start = time.perf_counter()
            if transfer.arrived is not None:
                transfer.arrived.synchronize()
            self.drafting.stats.wait_s += time.perf_counter() - start
            self._draft(step, transfer, transfer.packed.numpy(), alive, step.proposal)
        drafts = step.proposal.drafts
        self.in_place.update(
            (request_id, draft)
            for request_id, draft, lives in zip(transfer.request_ids, drafts, alive, strict=True)
            if lives
        )
        if self._tp_group is not None:
            self._share(transfer, drafts, alive, out)
            return
        chosen = [index for index, draft in enumerate(drafts) if draft]
        if not chosen:
            return
        rows = chosen if out is not None else transfer.rows[chosen].tolist()
        self._write(self._req_states.draft_tokens if out is None else out, rows, [drafts[index] for index in chosen])

    def cut(self, proposed: DraftTokenIds | None) -> DraftTokenIds | None:
        """Cut the drafts that vLLM reports to the scheduler, k tokens per request, to their real lengths.

        Nothing is cut under async scheduling: the scheduler has reserved k tokens already, and validates all k against
        a grammar. Nothing is cut if proposers draft on the device either: the host does not know the lengths.
        """
        if proposed is None or self.is_async or self._on_device is not None:
            return proposed
        if self._every_rank_schedules and self._tp_group is not None:
            return proposed
        lengths = [len(self.in_place.get(request_id, ())) for request_id in proposed.req_ids]
        cut = [draft[:length] for draft, length in zip(proposed.draft_token_ids, lengths, strict=True)]
        return DraftTokenIds(proposed.req_ids, cut)

    def snapshot(self, is_fresh: bool = True) -> dict[str, Any]:
        """Counters of this worker and its number of live requests; ``is_fresh`` is that of ``Drafting.snapshot``."""
        counters = self.drafting.snapshot(is_fresh)
        counters["live_requests"] = max(counters["live_requests"], len(self.history), len(self.in_place))
        return counters

    def _send_to_host(self, input_batch: Any, num_sampled: torch.Tensor, limit: int, drafts: torch.Tensor) -> None:
        num_requests = input_batch.num_reqs
        verified = np.zeros(num_requests, dtype=np.int64)
        if input_batch.num_draft_tokens_per_req is not None:
            verified[:] = input_batch.num_draft_tokens_per_req[:num_requests]
        step = self.steps.now
        packed, arrived, native, winners = None, None, None, None
        if self.is_first_rank:
            on_device, packed = self._packed[:num_requests], self._on_host[:num_requests]
            pack_emitted(
                input_batch.idx_mapping,
                num_sampled,
                self._req_states.total_len.gpu,
                self._req_states.all_token_ids.gpu,
                step.targets if input_batch.num_draft_tokens and not self._is_sharded else None,
                on_device,
            )
            is_cuda = self.device.type == "cuda"
            packed.copy_(on_device, non_blocking=is_cuda)
            if self._native is not None:
                native = self._on_host_native[:num_requests]
                native.copy_(drafts, non_blocking=is_cuda)
            if step.winners is not None:
                winners = self._on_host_winners[:num_requests]
                winners.copy_(step.winners, non_blocking=is_cuda)
            if is_cuda:
                # A blocking event: the thread that waits for it sleeps instead of polling the driver.
                arrived = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
                arrived.record()
        rows = np.asarray(input_batch.idx_mapping_np[:num_requests], dtype=np.int64)
        step.transfer = Transfer(
            list(input_batch.req_ids),
            rows,
            self.history.occupation[rows],
            verified,
            limit,
            packed,
            arrived,
            native,
            winners,
        )

    def _draft(
        self,
        step: Step,
        transfer: Transfer,
        packed: NDArray[np.int32],
        alive: NDArray[np.bool_],
        out: Proposal,
    ) -> None:
        """Add a step's emitted tokens to the history, report them to the proposers, and draft for the next step.

        Args:
            step: the step that was verified.
            transfer: the step's transfer, which has arrived.
            packed: the step's emitted tokens, as in ``transfer``.
            alive: ``[num_requests]`` False for requests that have left their table rows since.
            out: holds one empty draft per request of the step; filled in.
        """
        totals, counts = packed[:, 0].astype(np.int64), packed[:, 1].astype(np.int64)
        emitting = np.flatnonzero(alive & (counts > 0))
        if not len(emitting):
            return
        rows = transfer.rows[emitting]
        self.history.append(rows, totals[emitting], counts[emitting], packed[emitting, 2:])
        self._observe(step, transfer, packed, emitting)
        requests = [request for row in rows.tolist() if (request := self.history.requests[row]) is not None]
        states, coupling = self._sampling_states, self.settings.coupling

        def noise(chosen: Sequence[int], width: int) -> TargetNoise:
            temperature = np.array([requests[index].temperature for index in chosen], dtype=np.float32)
            # The token after position p is drawn with the noise of p: the next token takes that of the last position.
            positions = (totals[emitting[chosen]] - 1)[:, None] + np.arange(width)
            seeds = torch.from_numpy(states.seeds.np[rows[chosen]][:, None])
            return TargetNoise(*coupling.noise(PositionKeys(seeds, torch.from_numpy(positions))), temperature)

        proposal = self.drafting.propose(
            requests,
            self.history.token_ids,
            rows,
            totals[emitting],
            transfer.max_draft_tokens,
            None if states is None else noise,
            None if transfer.native is None else transfer.native.numpy()[emitting].astype(np.int32),
            0 if self.forks is None else self.forks.max_forks(len(transfer.request_ids)),
        )
        out.side_chains = proposal.side_chains
        for index, draft in zip(emitting.tolist(), proposal.drafts, strict=True):
            out.drafts[index] = draft

    def _observe(self, step: Step, transfer: Transfer, packed: NDArray[np.int32], emitting: NDArray[np.intp]) -> None:
        """Report the step's verification to counters and proposers."""
        several = None if step.forks is None else step.forks.chains
        num_emitted = self._num_returned(transfer.rows[emitting], packed[emitting])
        verified = Verified([], [], [], num_emitted, len(transfer.request_ids) - len(emitting))
        for index in emitting.tolist():
            request_id = transfer.request_ids[index]
            verified.request_ids.append(request_id)
            draft = self.in_place.pop(request_id, [])[: transfer.num_verified[index]]
            others: list[list[int]] = []
            if several is not None and transfer.winners is not None and request_id in several:
                chains, winner = several[request_id], int(transfer.winners[index])
                draft, others = chains[winner], chains[:winner] + chains[winner + 1 :]
            verified.draft_token_ids.append(draft)
            if several is not None:
                verified.further.append(others)
        if self.drafting.has_proposers:  # counters do not need the tokens
            verified.target_token_ids += (
                # -1: the verifier reported emitted tokens only
                [token for token in line[: max(num_emitted, len(draft) + 1)] if token != -1]
                for line, draft, num_emitted in zip(
                    packed[emitting, 2:].tolist(), verified.draft_token_ids, verified.num_emitted, strict=True
                )
            )
        self.drafting.observe(verified)

    def _num_returned(self, rows: NDArray[np.int64], packed: NDArray[np.int32]) -> list[int]:
        """How many of a step's tokens the user gets, by table row; ``packed`` holds these rows of the transfer."""
        counts: list[int] = packed[:, 1].tolist()
        for index, (row, count) in enumerate(zip(rows.tolist(), counts, strict=True)):
            request = self.history.requests[row]
            if count > 1 and request is not None:
                total, *tokens = packed[index, [0, *range(2, 2 + count)]].tolist()
                counts[index] = request.num_returned(total - count, tokens)
        return counts

    def _share(
        self, transfer: Transfer, drafts: list[list[int]], alive: NDArray[np.bool_], out: torch.Tensor | None
    ) -> None:
        """Send the first rank's drafts to all ranks of the tensor-parallel group, which must run on the same drafts."""
        shared = self._drafts[: len(transfer.request_ids)]  # the placeholders, which are the same on all ranks
        chosen = [index for index, draft in enumerate(drafts) if draft]
        if chosen:
            self._write(shared, chosen, [drafts[index] for index in chosen])
        # Prefer vLLM's NCCL communicator: torch would make a second one, after GPU memory has been divided up.
        communicator = getattr(self._tp_group, "device_communicator", None)
        nccl = getattr(communicator, "pynccl_comm", None)
        if nccl is not None and not nccl.disabled:
            communicator.broadcast(shared, 0)  # type: ignore[union-attr]
        else:
            self._tp_group.broadcast(shared, src=0)
        if out is None:
            living = np.flatnonzero(alive)
            rows = async_tensor_h2d(transfer.rows[living], device=self.device)
            self._req_states.draft_tokens[rows] = shared[async_tensor_h2d(living, device=self.device)]

    def _write(self, target: torch.Tensor, rows: list[int], drafts: list[list[int]]) -> None:
        """Write drafts to rows of ``target`` with one copy to the device; the last token of a draft fills its row."""
        k = self.num_speculative_tokens
        # Safe to reuse: the tokens of the last step have arrived, so that the copy before them is done.
        table = self._on_host_drafts[: len(rows)]
        # Padding lists and writing them at once takes a fraction of the time of one numpy assignment per row.
        table.numpy()[:] = [
            [row, *draft, *draft[-1:] * (k - len(draft))] for row, draft in zip(rows, drafts, strict=True)
        ]
        on_device = table.to(self.device, non_blocking=self.device.type == "cuda").to(torch.int64)
        target[on_device[:, 0]] = on_device[:, 1:]
