"""vLLM's V2 model runner: our drafter in place of its own, our verifier in place of its rejection sampler.

Tokens flow: target logits of every verified row -> :class:`CoupledVerifier` (the target's own token of every row,
accepted while equal) -> vLLM's bookkeeping on the device -> one copy of what was emitted to the host ->
:class:`Speculator` (drafts of the next step) -> one copy back.

Under async scheduling the copy to the host starts when vLLM asks for drafts and is waited for only when the next step's
inputs are made: in between, the device verifies while scheduler and worker do their host work.
"""

from __future__ import annotations

import atexit
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.config.compilation import CUDAGraphMode
from vllm.distributed.parallel_state import get_tp_group
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator, DraftModelSpeculator

from vllm_specplug.drafting.drafting import Drafting
from vllm_specplug.drafting.history import TokenHistory
from vllm_specplug.drafting.requests import TrackedRequest
from vllm_specplug.errors import ConfigurationError
from vllm_specplug.hooks import seam_list, seams, v2_chains
from vllm_specplug.hooks.marks import is_coupled, is_ours
from vllm_specplug.hooks.metrics import publish_metrics
from vllm_specplug.log import logger
from vllm_specplug.proposers.base import ProposerContext, TargetNoise, Verified
from vllm_specplug.samplers import list_matching, minhash
from vllm_specplug.samplers.base import probabilities
from vllm_specplug.samplers.gumbel import murmur_gumbel_noise_torch
from vllm_specplug.samplers.kernels import pack_emitted, verify_drafts
from vllm_specplug.samplers.noise import MURMUR, list_kind, murmur_keys
from vllm_specplug.settings.model import Settings, settings_of

patches = seams.Patches()

_WARM_UP_REQUESTS = ("_warmup_", "_v2_mixed_warmup")
"""vLLM warms kernels up with made-up requests of these names: nothing to learn from, nothing to count."""


class CoupledVerifier(RejectionSampler):  # type: ignore[misc]
    """Draws the target's token of every row exactly as vLLM would in an ordinary step, and keeps drafts while equal.

    vLLM's noise is keyed by (request seed, position, token id), so that neither the draft nor its length can change a
    token. Draft logits are neither read nor kept.
    """

    draw = staticmethod(gumbel_sample)
    """Draws one token a row from (logits, row's request, temperature, seed, position)."""
    token_ids: torch.Tensor | None = None
    """``[num_requests, num_speculative_tokens + 1]``: the target's tokens at all positions of the last step."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM's own call; what was drawn behind a rejected draft is kept for proposers that learn from it."""
        output = super().__call__(*args, **kwargs)
        self.token_ids = output.sampled_token_ids
        return output

    def _verify(
        self,
        logits: torch.Tensor,  # [num_rows, vocab]
        draft_logits: torch.Tensor | None,
        draft_sampled: torch.Tensor,  # [num_rows] input token of each row
        pos: torch.Tensor,  # [num_rows]
        cu_num_logits: torch.Tensor,  # [num_requests + 1]
        idx_mapping: torch.Tensor,
        idx_mapping_np: NDArray[np.intp],
        expanded_idx_mapping: torch.Tensor,  # [num_rows]
        expanded_local_pos: torch.Tensor,
        seq_lens_upper_bound_np: NDArray[np.int32],
        verify_draft_sampled: torch.Tensor,  # [num_rows] the same, -1 where a draft must not be accepted
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """vLLM's one method for a chunk of rows; returns processed logits, tokens and how many of them are emitted."""
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


def _darts(
    logits: torch.Tensor,  # [num_rows, vocab]
    expanded_idx_mapping: torch.Tensor,  # [num_rows]
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    pos: torch.Tensor,  # [num_rows]
    apply_temperature: bool,
    **_: Any,
) -> torch.Tensor:
    """The MinHash draw, with the arguments of vLLM's ``gumbel_sample`` and its keys: request seed and position."""
    temperature = temperature[expanded_idx_mapping]
    is_greedy = temperature == 0.0
    scaled = logits.double()
    if apply_temperature:
        scaled = scaled / torch.where(is_greedy, 1.0, temperature)[:, None]
    keys = minhash.keys_at(seeds[expanded_idx_mapping], pos)
    drawn = minhash.sample_torch(probabilities(scaled), keys)
    return torch.where(is_greedy, logits.argmax(dim=-1), drawn)


def _several_races(
    num_chains: int,
    logits: torch.Tensor,  # [num_rows, vocab]
    expanded_idx_mapping: torch.Tensor,  # [num_rows]
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    pos: torch.Tensor,  # [num_rows]
    apply_temperature: bool,
    **options: Any,
) -> torch.Tensor:
    """The draw of list matching: vLLM's ``gumbel_sample`` once for each chain, and the best of all.

    The arguments are that function's. Nothing here waits for the device.
    """
    tokens, noise = [], []
    for chain in range(num_chains):
        positions = list_matching.chain_positions(pos, chain)
        tokens.append(
            gumbel_sample(logits, expanded_idx_mapping, temperature, seeds, positions, apply_temperature, **options)
        )
        noise.append(murmur_gumbel_noise_torch(seeds[expanded_idx_mapping], positions.long(), tokens[-1]))
    if apply_temperature:
        temperature = temperature[expanded_idx_mapping]
        logits = logits.float() / torch.where(temperature == 0.0, 1.0, temperature)[:, None]
    # Of a greedy request all chains have the same token.
    best, _ = list_matching.best_of(logits, torch.stack(tokens, dim=1), torch.stack(noise, dim=1))
    return best[:, 0].contiguous()


def _draw_of(settings: Settings | None) -> Callable[..., torch.Tensor]:
    """How the sampler draws, with the arguments of vLLM's ``gumbel_sample``."""
    if settings is not None and settings.sampler == "list":
        return functools.partial(_several_races, settings.num_chains)
    return _darts if settings is not None and settings.sampler == "minhash" else gumbel_sample


def _draw_by(runner: Any, draw: Callable[..., torch.Tensor]) -> None:
    """Draw in this way wherever this runner draws a token: while verifying, and in steps without drafts."""
    sampler = runner.sampler
    runner.rejection_sampler.draw = draw

    def sample(
        logits: torch.Tensor,
        expanded_idx_mapping: torch.Tensor,
        idx_mapping: torch.Tensor,
        idx_mapping_np: NDArray[np.intp],
        pos: torch.Tensor,
        *args: Any,
        return_logprobs: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        processed = sampler.apply_sampling_params(logits, expanded_idx_mapping, idx_mapping, idx_mapping_np, pos, *args)
        states = sampler.sampling_states
        drawn = draw(
            processed,
            expanded_idx_mapping,
            states.temperature.gpu,
            states.seeds.gpu,
            pos,
            apply_temperature=False,
            is_drafting=False,
        )
        return drawn, processed

    sampler.sample = sample


def check_verifier(runner: Any) -> None:
    """Raise ConfigurationError when the model brings a sampler of its own, so that our verifier is not in place."""
    if not isinstance(runner.rejection_sampler, CoupledVerifier):
        raise ConfigurationError(
            f"speculative_config: {type(runner.model).__name__} brings a sampler of its own "
            f"({type(runner.rejection_sampler).__name__}), which no coupling can replace. "
            'Give "sampler": "rejection".'
        )


@dataclass(frozen=True)
class _Step:
    """What a step emitted, on its way to the host."""

    request_ids: list[str]
    rows: NDArray[np.int64]  # [n]
    occupation: NDArray[np.int64]  # [n] of those rows then
    num_verified: NDArray[np.int64]  # [n] draft rows that were verified
    max_draft_tokens: int
    packed: torch.Tensor | None  # [n, 2 + width] on the host; None on ranks that only receive drafts
    arrived: Any
    native: torch.Tensor | None = None  # [n, k] on the host: drafts of vLLM's own drafter, where ours join it
    chains: dict[str, list[list[int]]] | None = None  # all chains of requests that had several
    winners: torch.Tensor | None = None  # [n] on the host: which of its chains got furthest


class DeviceDrafting:
    """``rest`` with ``on_device``: what it needs of the requests is on the device, and so are its drafts.

    Args:
        context: sizes, the store and the proposer's options.
        device: of the runner.
        req_states: the runner's per-request tensors.

    Raises:
        ConfigurationError: the proposer refuses its options there.
    """

    def __init__(self, context: ProposerContext, device: torch.device, req_states: Any) -> None:
        from vllm_specplug.proposers.rest.device import DeviceRest

        try:
            self.proposer = DeviceRest(context, device)
        except ValueError as error:
            raise ConfigurationError(f"speculative_config: {error}") from error
        self._req_states = req_states
        # Tokens (prompt + output) that each row's request can have; 0 where it wants no drafts.
        self._longest = torch.zeros(context.max_num_requests, dtype=torch.int32, device=device)

    def warm_up(self) -> None:
        """Compile the kernel."""
        row = torch.zeros(1, dtype=torch.int64, device=self._longest.device)
        states = self._req_states
        self.proposer.propose(states.all_token_ids.gpu, states.total_len.gpu, row, row.to(torch.int32))

    def add(self, rows: list[int], longest: list[int]) -> None:
        """These rows have new requests."""
        # Not torch.tensor(..., device=...): that would wait for the device, which is still busy with the step before.
        device = self._longest.device
        at = async_tensor_h2d(rows, device=device, dtype=torch.int64)
        self._longest[at] = async_tensor_h2d(longest, device=device, dtype=torch.int32)

    def propose(self, idx_mapping: torch.Tensor, num_sampled: torch.Tensor, limit: int, drafts: torch.Tensor) -> None:
        """Write drafts over ``drafts``, ``[num_requests, num_speculative_tokens]``, as far as each of them goes."""
        states = self._req_states
        # The step emits one token more than it accepts, and none may pass max_tokens or max_model_len.
        wanted = (self._longest[idx_mapping] - states.total_len.gpu[idx_mapping] - 1).clamp(0, limit)
        wanted = torch.where(num_sampled > 0, wanted, 0).to(torch.int32)
        token_ids, num_tokens, _ = self.proposer.propose(
            states.all_token_ids.gpu, states.total_len.gpu, idx_mapping, wanted
        )
        column = torch.arange(drafts.shape[1], device=drafts.device)
        drafts.copy_(torch.where(column[None, :] < num_tokens[:, None], token_ids, drafts))


class Speculator(BaseSpeculator):  # type: ignore[misc]
    """The drafter that vLLM's V2 runner builds for our configuration, or that joins one of vLLM's own.

    Args:
        vllm_config: vLLM's configuration; ours is in its ``additional_config``.
        device: of the runner.
        req_states: the runner's per-request tensors.
        native: vLLM's own drafter that ours join; None where ours draft alone.
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
        context = ProposerContext(
            vocab_size=vllm_config.model_config.get_vocab_size(),
            num_speculative_tokens=self.num_speculative_tokens,
            max_num_requests=max_num_requests,
            max_model_len=self.max_model_len,
            datastores=settings.datastore or {},
        )
        # Under async scheduling the scheduler reserves k rows a request before any draft is known: none can be saved.
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
        # A last step can emit a few tokens more than fit; there is room for them, so that nothing is written outside.
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
        self._pending: _Step | None = None
        self._in_place: dict[str, list[int]] = {}  # request id -> its draft that the next step verifies
        self.forks: v2_chains.ForkedRows | None = None
        self.verified_chains: tuple[dict[str, list[list[int]]], torch.Tensor] | None = None
        """Of the step just sampled: all chains of requests that had several, and which of each request's won."""
        self._on_host_winners = torch.empty(max_num_requests, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._verifier: RejectionSampler | None = None
        self._is_sharded = False
        self._has_pipeline = False
        self._tp_group: Any = None
        self.is_first_rank = True
        parallel_config = getattr(vllm_config, "parallel_config", None)
        # Under torchrun every rank schedules for itself, and only the first knows how long its drafts are.
        self._every_rank_schedules = getattr(parallel_config, "distributed_executor_backend", "") == "external_launcher"

    def attach(self, runner: Any) -> None:
        """The runner is complete: find the verifier, compile and map what must be quick later, say what is active.

        Raises:
            ConfigurationError: the model brings a sampler of its own, so that our verifier is not in place.
        """
        self._verifier = runner.rejection_sampler
        if self.settings.is_coupled:
            check_verifier(runner)
        self._is_sharded = runner.batch_sharder is not None
        self._has_pipeline = runner.use_pp
        if self.settings.num_noises and not runner.sampler.use_fp64_gumbel:  # which hashes in another way
            self._sampling_states = runner.sampler.sampling_states
        runner.draft_tokens_handler._specplug = self
        group = get_tp_group()
        if group.world_size > 1:
            self._tp_group, self.is_first_rank = group, group.rank_in_group == 0
        start = time.perf_counter()
        if self._on_device is not None:
            self._on_device.warm_up()
        if self.is_first_rank:
            self.drafting.warm_up()
            atexit.register(self.drafting.close)
            publish_metrics(lambda: self.snapshot(is_fresh=False), runner.vllm_config)
            logger.info(
                "specplug is active: runner V2, sampler %s (%s), proposers: %s%s; up to %d draft tokens, "
                "async scheduling %s (warm-up %.1f s)",
                self.settings.sampler,
                "drafter-invariant" if self.settings.is_coupled else "vLLM's own verifier",
                self._describe_proposers(),
                "" if self._native is None else f", joining vLLM's {self.drafting.native}",
                self.num_speculative_tokens,
                "on: drafts are padded to that length" if self.is_async else "off: drafts keep their own length",
                time.perf_counter() - start,
            )

    def attach_forks(self, runner: Any) -> None:
        """The runner has its KV cache: several chains of a request need blocks of it."""

        def take_further() -> dict[str, list[list[int]]]:
            self.put_in_place()
            return self.drafting.take_further()

        self.forks = v2_chains.attach(runner, take_further, lambda: self._in_place)

    @property
    def max_model_len(self) -> int:
        """Most tokens of a request; vLLM 0.33 may lower it after this drafter is built, to what fits the cache."""
        return int(self._model_config.max_model_len)

    def _describe_proposers(self) -> str:
        if self._on_device is not None:
            return f"rest ({self._on_device.proposer.describe()})"
        return self.drafting.describe()

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """Nothing of ours runs in a CUDA graph."""

    def capture(self) -> None:
        """Nothing of ours runs in a CUDA graph."""

    def add_requests(self, scheduler_output: Any) -> None:
        """New requests, and preempted ones that come back, have their rows."""
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
                self.history.add(row, request, new.prefill_token_ids if self.is_first_rank else ())
        if self._on_device is not None and rows:
            self._on_device.add(rows, lengths)

    def finish_requests(self, scheduler_output: Any) -> None:
        """These requests left their rows: for good, or preempted."""
        for request_id in (*scheduler_output.finished_req_ids, *(scheduler_output.preempted_req_ids or ())):
            self.history.remove(request_id)
            self._in_place.pop(request_id, None)
            if self.forks is not None:
                self.forks.kept_to_one.discard(request_id)
        self.drafting.finish(list(scheduler_output.finished_req_ids))

    @torch.inference_mode()
    def propose(
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
        """Called by vLLM after each step; ``[num_requests, num_speculative_tokens]`` draft tokens on the device.

        Places behind a draft, and all places of a request without one, hold its last token: any token is as good, since
        the verifier does not trust it.
        """
        drafts = self._drafts[: input_batch.num_reqs]
        if dummy_run:
            return drafts
        drafts.copy_(last_sampled[input_batch.idx_mapping].expand_as(drafts))
        return self._propose(input_batch, num_sampled, drafts, num_speculative_tokens)

    @torch.inference_mode()
    def join(self, propose: Callable[..., torch.Tensor], input_batch: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """vLLM's own drafter's ``propose``, its drafts joined by ours where ours promise more.

        Args:
            propose: that method.
            input_batch: like the rest, what vLLM calls it with.
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
        """Drafts over those that stand in ``drafts``: placeholders, or vLLM's own."""
        self.put_in_place()  # of an earlier step, when the one in between ran no model
        limit = self.num_speculative_tokens
        if num_speculative_tokens is not None:
            limit = min(limit, num_speculative_tokens)
        if self._on_device is not None:
            self._on_device.propose(input_batch.idx_mapping, num_sampled, limit, drafts)
            return drafts
        if self._tp_group is None and not self.drafting.has_proposers:
            self._in_place.clear()
            return drafts
        self._send_to_host(input_batch, num_sampled, limit, drafts)
        # Whoever reads the drafts before the next step's inputs are made must not see placeholders.
        if not self.is_async or self._has_pipeline or input_batch.has_structured_output_reqs:
            self.put_in_place(drafts)
        return drafts

    def put_in_place(self, out: torch.Tensor | None = None) -> None:
        """Draft for the step whose tokens are on their way, if there is one, and hand the drafts to the device.

        Args:
            out: ``[num_requests, num_speculative_tokens]`` of that step, to be filled; None writes to the runner's
                table, where the placeholders are by now.
        """
        step, self._pending = self._pending, None
        if step is None:
            return
        alive = self.history.occupation[step.rows] == step.occupation
        alive &= step.occupation > 0
        drafts: list[list[int]] = [[] for _ in step.request_ids]
        if step.packed is not None:
            start = time.perf_counter()
            if step.arrived is not None:
                step.arrived.synchronize()
            self.drafting.stats.wait_s += time.perf_counter() - start
            drafts = self._draft(step, step.packed.numpy(), alive)
        self._in_place.update(
            (request_id, draft)
            for request_id, draft, lives in zip(step.request_ids, drafts, alive, strict=True)
            if lives
        )
        if self._tp_group is not None:
            self._share(step, drafts, alive, out)
            return
        chosen = [index for index, draft in enumerate(drafts) if draft]
        if not chosen:
            return
        rows = chosen if out is not None else step.rows[chosen].tolist()
        self._write(self._req_states.draft_tokens if out is None else out, rows, [drafts[index] for index in chosen])

    def cut(self, proposed: DraftTokenIds | None) -> DraftTokenIds | None:
        """vLLM's answer to the scheduler (k tokens a request), with each draft as long as it really is.

        Under async scheduling the scheduler has reserved k already, and validates against a grammar what stands in all
        k places: nothing is cut. How long drafts made on the device are, only the device knows.
        """
        if proposed is None or self.is_async or self._on_device is not None:
            return proposed
        if self._every_rank_schedules and self._tp_group is not None:
            return proposed
        lengths = [len(self._in_place.get(request_id, ())) for request_id in proposed.req_ids]
        cut = [draft[:length] for draft, length in zip(proposed.draft_token_ids, lengths, strict=True)]
        return DraftTokenIds(proposed.req_ids, cut)

    def snapshot(self, is_fresh: bool = True) -> dict[str, Any]:
        """Counters of this worker, and how many requests hold state in it; ``is_fresh`` as in ``Drafting.snapshot``."""
        counters = self.drafting.snapshot(is_fresh)
        counters["live_requests"] = max(counters["live_requests"], len(self.history), len(self._in_place))
        return counters

    def take_in(
        self,
        request_ids: list[str],
        rows: NDArray[np.int64],
        num_verified: NDArray[np.int64],
        max_draft_tokens: int,
        packed: torch.Tensor | None,
        arrived: Any = None,
        native: torch.Tensor | None = None,
        chains: dict[str, list[list[int]]] | None = None,
        winners: torch.Tensor | None = None,
    ) -> None:
        """A step's tokens are on their way to the host; :meth:`put_in_place` will wait for them.

        Args:
            request_ids: of the step, ``[num_requests]``.
            rows: of each, in the runner's per-request tensors.
            num_verified: ``[num_requests]`` draft tokens of each that were verified.
            max_draft_tokens: longest draft of the next step.
            packed: ``[num_requests, 2 + num_speculative_tokens + 1]`` int32 on the host, as ``pack_emitted`` lays it
                out; None on ranks that only receive drafts.
            arrived: event after which ``packed`` and ``native`` can be read; None where they can be read at once.
            native: ``[num_requests, num_speculative_tokens]`` int64 on the host, drafts of vLLM's own drafter that ours
                join.
            chains: all chains of requests that had several; ``winners``, ``[num_requests]`` int64 on the host, which of
                its chains got furthest.
        """
        occupation = self.history.occupation[rows]
        self._pending = _Step(
            request_ids, rows, occupation, num_verified, max_draft_tokens, packed, arrived, native, chains, winners
        )

    def _send_to_host(self, input_batch: Any, num_sampled: torch.Tensor, limit: int, drafts: torch.Tensor) -> None:
        num_requests = input_batch.num_reqs
        verified = np.zeros(num_requests, dtype=np.int64)
        if input_batch.num_draft_tokens_per_req is not None:
            verified[:] = input_batch.num_draft_tokens_per_req[:num_requests]
        packed, arrived, native, winners = None, None, None, None
        chains, on_device_winners = self.verified_chains or (None, None)
        self.verified_chains = None
        if self.is_first_rank:
            on_device, packed = self._packed[:num_requests], self._on_host[:num_requests]
            targets = getattr(self._verifier, "token_ids", None)
            pack_emitted(
                input_batch.idx_mapping,
                num_sampled,
                self._req_states.total_len.gpu,
                self._req_states.all_token_ids.gpu,
                targets if input_batch.num_draft_tokens and not self._is_sharded else None,
                on_device,
            )
            is_cuda = self.device.type == "cuda"
            packed.copy_(on_device, non_blocking=is_cuda)
            if self._native is not None:
                native = self._on_host_native[:num_requests]
                native.copy_(drafts, non_blocking=is_cuda)
            if on_device_winners is not None:
                winners = self._on_host_winners[:num_requests]
                winners.copy_(on_device_winners, non_blocking=is_cuda)
            if is_cuda:
                # A blocking event: the thread that waits for it sleeps instead of polling the driver.
                arrived = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
                arrived.record()
        rows = np.asarray(input_batch.idx_mapping_np[:num_requests], dtype=np.int64)
        self.take_in(list(input_batch.req_ids), rows, verified, limit, packed, arrived, native, chains, winners)

    def _draft(self, step: _Step, packed: NDArray[np.int32], alive: NDArray[np.bool_]) -> list[list[int]]:
        """Take in what a step emitted and ask the proposers; one draft a request of the step, empty where none."""
        drafts: list[list[int]] = [[] for _ in step.request_ids]
        totals, counts = packed[:, 0].astype(np.int64), packed[:, 1].astype(np.int64)
        emitting = np.flatnonzero(alive & (counts > 0))
        if not len(emitting):
            return drafts
        rows = step.rows[emitting]
        self.history.append(rows, totals[emitting], counts[emitting], packed[emitting, 2:])
        self._observe(step, packed, emitting)
        requests = [request for row in rows.tolist() if (request := self.history.requests[row]) is not None]
        states = self._sampling_states

        def noise(chosen: Sequence[int], width: int) -> TargetNoise:
            temperature = np.array([requests[index].temperature for index in chosen], dtype=np.float32)
            # The token after position p is drawn with the noise of p: the next one's is the last token's.
            positions = (totals[emitting[chosen]] - 1)[:, None] + np.arange(width)
            num_noises = self.settings.num_noises
            keys = murmur_keys(states.seeds.np[rows[chosen]][:, None], positions, num_noises)
            return TargetNoise(list_kind(MURMUR, num_noises), keys, temperature)

        answers = self.drafting.propose(
            requests,
            self.history.token_ids,
            rows,
            totals[emitting],
            step.max_draft_tokens,
            None if states is None else noise,
            None if step.native is None else step.native.numpy()[emitting].astype(np.int32),
            0 if self.forks is None else self.forks.max_forks(len(step.request_ids)),
        )
        for index, draft in zip(emitting.tolist(), answers, strict=True):
            drafts[index] = draft
        return drafts

    def _observe(self, step: _Step, packed: NDArray[np.int32], emitting: NDArray[np.intp]) -> None:
        """Tell counters and proposers what was verified."""
        verified = Verified([], [], [], packed[emitting, 1].tolist(), len(step.request_ids) - len(emitting))
        for index in emitting.tolist():
            request_id = step.request_ids[index]
            verified.request_ids.append(request_id)
            draft = self._in_place.pop(request_id, [])[: step.num_verified[index]]
            others: list[list[int]] = []
            if step.chains is not None and step.winners is not None and request_id in step.chains:
                chains, winner = step.chains[request_id], int(step.winners[index])
                draft, others = chains[winner], chains[:winner] + chains[winner + 1 :]
            verified.draft_token_ids.append(draft)
            if step.chains is not None:
                verified.further.append(others)
        if self.drafting.has_proposers:  # counters do without the tokens
            verified.target_token_ids += (
                # -1: the verifier reported emitted tokens only
                [token for token in line[: max(num_emitted, len(draft) + 1)] if token != -1]
                for line, draft, num_emitted in zip(
                    packed[emitting, 2:].tolist(), verified.draft_token_ids, verified.num_emitted, strict=True
                )
            )
        self.drafting.observe(verified)

    def _share(self, step: _Step, drafts: list[list[int]], alive: NDArray[np.bool_], out: torch.Tensor | None) -> None:
        """Every rank of a tensor-parallel group must run the model on the same drafts: those of the first."""
        shared = self._drafts[: len(step.request_ids)]  # the placeholders, which are the same on all ranks
        chosen = [index for index, draft in enumerate(drafts) if draft]
        if chosen:
            self._write(shared, chosen, [drafts[index] for index in chosen])
        # vLLM's own NCCL communicator where there is one: torch's would be a second, made after memory was shared out.
        communicator = getattr(self._tp_group, "device_communicator", None)
        nccl = getattr(communicator, "pynccl_comm", None)
        if nccl is not None and not nccl.disabled:
            communicator.broadcast(shared, 0)  # type: ignore[union-attr]
        else:
            self._tp_group.broadcast(shared, src=0)
        if out is None:
            living = np.flatnonzero(alive)
            rows = async_tensor_h2d(step.rows[living], device=self.device)
            self._req_states.draft_tokens[rows] = shared[async_tensor_h2d(living, device=self.device)]

    def _write(self, target: torch.Tensor, rows: list[int], drafts: list[list[int]]) -> None:
        """One copy to the device; each row is its draft, its last token repeated to the end."""
        k = self.num_speculative_tokens
        # Reused each step: by now the device is past the copy of the step before, whose tokens have arrived since.
        table = self._on_host_drafts[: len(rows)]
        # Padded as lists and written at once: a fraction of the time of one numpy assignment a row.
        table.numpy()[:] = [
            [row, *draft, *draft[-1:] * (k - len(draft))] for row, draft in zip(rows, drafts, strict=True)
        ]
        on_device = table.to(self.device, non_blocking=self.device.type == "cuda").to(torch.int64)
        target[on_device[:, 0]] = on_device[:, 1:]


def _sample_with_the_targets_noise(
    draw: Callable[..., torch.Tensor],
    speculator: DraftModelSpeculator,
    hidden_states: torch.Tensor,
    sample_src_positions: torch.Tensor,
    idx_mapping: torch.Tensor,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    draft_step: torch.Tensor,
    draft_logits: torch.Tensor | None,
    spec_step_idx: int = 0,
    **_: Any,
) -> torch.Tensor:
    """vLLM's ``sample_draft`` with the noise that the verifier will use, and without keeping the draft's logits."""
    logits = speculator.compute_draft_logits(hidden_states, spec_step_idx)
    sampled = draw(
        logits,
        idx_mapping,
        temperature,
        seeds,
        sample_src_positions,
        apply_temperature=True,
        is_drafting=False,  # vLLM salts a draft's noise; with accept-if-equal the same noise is what makes tokens agree
        use_fp64=speculator.use_fp64_gumbel,
    )
    speculator._maybe_predict_acceptance(logits, idx_mapping, draft_step)
    return sampled


def install() -> None:
    """Wrap the runner's seams in this process, after checking their signatures. Idempotent."""
    seams.check(seam_list.V2_USED)
    patches.install(
        seam_list.V2_SEAMS,
        {
            "init_speculator": _init_speculator,
            "RejectionSampler": _rejection_sampler,
            "GPUModelRunner.load_model": _load_model,
            "GPUModelRunner.add_requests": _add_requests,
            "GPUModelRunner.finish_requests": _finish_requests,
            "GPUModelRunner.prepare_inputs": _prepare_inputs,
            "GPUModelRunner.initialize_kv_cache": _initialize_kv_cache,
            "GPUModelRunner.execute_model": v2_chains.execute_model,
            "GPUModelRunner.update_requests": v2_chains.update_requests,
            "GPUModelRunner.gather_batch_req_state": v2_chains.gather_batch_req_state,
            "GPUModelRunner.prepare_attn": v2_chains.prepare_attn,
            "GPUModelRunner.sample": v2_chains.sample,
            "DraftTokensHandler.get_draft_tokens": _get_draft_tokens,
        },
    )


def _speculator_of(runner: Any) -> Speculator | None:
    speculator = getattr(runner, "speculator", None)
    return speculator if isinstance(speculator, Speculator) else getattr(speculator, "_specplug", None)


def _init_speculator(original: Callable[..., Any], vllm_config: Any, device: torch.device, req_states: Any) -> Any:
    config = vllm_config.speculative_config
    if is_ours(config):
        return Speculator(vllm_config, device, req_states)
    native = _native_speculator(original, vllm_config, device, req_states)
    settings = settings_of(vllm_config.additional_config)
    if settings is not None and settings.host_proposers and is_coupled(config):
        joining = Speculator(vllm_config, device, req_states, native)
        native.propose = functools.partial(joining.join, native.propose)
        native._specplug = joining
    return native


def _native_speculator(original: Callable[..., Any], vllm_config: Any, device: torch.device, req_states: Any) -> Any:
    """vLLM's own drafter; one that samples draws with the target's noise under a coupled verifier."""
    config = vllm_config.speculative_config
    if not is_coupled(config) or config.draft_sample_method != "probabilistic":
        return original(vllm_config, device, req_states)
    # Built as a greedy drafter, it allocates no cache of draft logits (requests x k x vocabulary): none is read.
    config.draft_sample_method = "greedy"
    try:
        speculator = original(vllm_config, device, req_states)
    finally:
        config.draft_sample_method = "probabilistic"
    if isinstance(speculator, DraftModelSpeculator):
        draw = _draw_of(settings_of(vllm_config.additional_config))
        speculator.sample_draft = functools.partial(_sample_with_the_targets_noise, draw, speculator)
    return speculator


def _rejection_sampler(original: Callable[..., Any], sampler: Any, spec_config: Any, *args: Any, **kwargs: Any) -> Any:
    build = CoupledVerifier if is_coupled(spec_config) else original
    return build(sampler, spec_config, *args, **kwargs)


def _load_model(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    result = original(self, *args, **kwargs)
    settings = settings_of(self.vllm_config.additional_config)
    if is_coupled(self.vllm_config.speculative_config) and (draw := _draw_of(settings)) is not gumbel_sample:
        check_verifier(self)
        _draw_by(self, draw)
    speculator = _speculator_of(self)
    if speculator is not None:
        speculator.attach(self)
    elif self.speculator is not None and is_coupled(self.vllm_config.speculative_config):
        check_verifier(self)
        config = self.vllm_config.speculative_config
        logger.info(
            "specplug is active: runner V2, sampler %s (drafter-invariant) verifies the drafts of vLLM's %s (%s)",
            settings_of(self.vllm_config.additional_config).sampler,  # type: ignore[union-attr]
            config.method,
            config.draft_sample_method,
        )
    return result


def _add_requests(original: Callable[..., Any], self: Any, scheduler_output: Any) -> Any:
    result = original(self, scheduler_output)
    speculator = _speculator_of(self)
    if speculator is not None:
        speculator.add_requests(scheduler_output)
    return result


def _finish_requests(original: Callable[..., Any], self: Any, scheduler_output: Any) -> Any:
    speculator = _speculator_of(self)
    if speculator is not None:
        speculator.finish_requests(scheduler_output)
    return original(self, scheduler_output)


def _prepare_inputs(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    speculator = _speculator_of(self)
    if speculator is not None:
        speculator.put_in_place()
    input_batch = original(self, *args, **kwargs)
    if speculator is not None and speculator.forks is not None:
        speculator.forks.fill(input_batch)
    return input_batch


def _initialize_kv_cache(
    original: Callable[..., Any], self: Any, kv_cache_config: Any, is_profiling: bool = False, **kwargs: Any
) -> Any:
    result = original(self, kv_cache_config, is_profiling, **kwargs)
    speculator = _speculator_of(self)
    if speculator is not None and not is_profiling:
        speculator.attach_forks(self)
    return result


def _get_draft_tokens(original: Callable[..., Any], self: Any) -> Any:
    proposed = original(self)
    speculator: Speculator | None = getattr(self, "_specplug", None)
    return proposed if speculator is None else speculator.cut(proposed)


__all__ = ["CoupledVerifier", "Speculator", "install"]
