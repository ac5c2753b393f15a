"""vLLM's V1 model runner: our drafter in place of its own, our verifier in place of its rejection sampler.

Tokens flow: target logits of every verified row -> :class:`CoupledVerifier` (the target's own token of every row,
accepted while equal) -> vLLM's bookkeeping -> :class:`Proposer` or one of vLLM's own drafters (the next drafts).
"""

from __future__ import annotations

import atexit
import copy
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from vllm.distributed.parallel_state import get_tp_group
from vllm.v1.outputs import DraftTokenIds, LogprobsTensors, SamplerOutput
from vllm.v1.sample.logits_processor.builtin import (
    LogitBiasLogitsProcessor,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler, apply_top_k_top_p
from vllm.v1.sample.sampler import _SAMPLING_EPS, Sampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from vllm_specplug.drafting.drafting import Drafting
from vllm_specplug.drafting.requests import TrackedRequest
from vllm_specplug.hooks import seam_list, seams, v1_chains
from vllm_specplug.hooks.forks import walk
from vllm_specplug.hooks.marks import is_coupled
from vllm_specplug.hooks.metrics import publish_metrics
from vllm_specplug.log import logger
from vllm_specplug.proposers.base import ProposerContext, TargetNoise, Verified
from vllm_specplug.proposers.comb import Places
from vllm_specplug.samplers import list_matching, minhash
from vllm_specplug.samplers.base import REJECTED, RowLayout, accept_while_equal, probabilities
from vllm_specplug.samplers.gumbel import SeedStream
from vllm_specplug.samplers.noise import SPLITMIX, list_kind, splitmix_keys
from vllm_specplug.settings.model import Settings, settings_of

patches = seams.Patches()


class Attachment:
    """What this plugin keeps in a runner: its verifier, its proposers, and a hand in the noise of sampling drafters.

    Args:
        settings: ours, from ``additional_config``.
        drafting: the proposers; none where one of vLLM's own drafters is at work alone.
        num_speculative_tokens: longest draft.
        max_model_len: most tokens of a request.
    """

    def __init__(self, settings: Settings, drafting: Drafting, num_speculative_tokens: int, max_model_len: int) -> None:
        self.settings = settings
        self.drafting = drafting
        self.num_speculative_tokens = num_speculative_tokens
        self.max_model_len = max_model_len
        self.verifier: CoupledVerifier | ObservedRejection | None = None
        self.forks: v1_chains.ForkedRows | None = None
        self._shared: _SharedNoise | None = None
        self.plain_layout: SpecDecodeMetadata | None = None  # of the latest step without drafts
        self._runner: Any = None
        self._requests: dict[str, TrackedRequest] = {}

    def attach(self, runner: Any) -> None:
        """Put the verifier in place and warm up. Called once the runner can serve."""
        if self.settings.is_coupled:
            self.verifier = CoupledVerifier(runner, self)
            self.forks = v1_chains.attach(runner, lambda: self.drafting.take_further())
            num_places = 1 if self.forks is None else self.settings.num_chains
            self._shared = _share_noise(runner.drafter, self.verifier, num_places)
        else:
            self.verifier = ObservedRejection(runner, self, runner.rejection_sampler)
        runner.rejection_sampler = self.verifier
        runner._specplug = self
        self._runner = runner
        self.drafting.warm_up()
        atexit.register(self.drafting.close)
        if get_tp_group().rank_in_group == 0:
            publish_metrics(lambda: self.snapshot(is_fresh=False), runner.vllm_config)

    def describe_sampler(self) -> str:
        """The sampler in the words of the start-up line."""
        kind = "drafter-invariant" if self.settings.is_coupled else "vLLM's own verifier"
        return f"runner V1, sampler {self.settings.sampler} ({kind})"

    def draft(
        self,
        rows: Sequence[int],
        num_tokens: Any,
        token_ids: Any,
        native: np.ndarray[Any, Any] | None = None,
        places: Places | None = None,
    ) -> list[list[int]]:
        """Drafts for the requests of the batch that have just emitted tokens; ``[len(rows)]``.

        Args:
            rows: their rows in vLLM's tables.
            num_tokens: ``[max_num_reqs]`` tokens so far, the new ones included.
            token_ids: ``[max_num_reqs, max_model_len]``.
            native: ``[len(rows), num_speculative_tokens]`` drafts of vLLM's own drafter, -1 behind their ends.
            places: what else it could have drafted at each depth, of these requests.
        """
        req_ids = self._runner.input_batch.req_ids
        requests = [self._request(req_ids[row]) for row in rows]
        index = np.array(rows, dtype=np.int64)
        verifier = self.verifier

        def noise(chosen: Sequence[int], width: int) -> TargetNoise:
            assert isinstance(verifier, CoupledVerifier)
            return verifier.target_noise([requests[i] for i in chosen], width)

        return self.drafting.propose(
            requests,
            token_ids,
            index,
            num_tokens[index].astype(np.int64),
            self.num_speculative_tokens,
            noise if self.settings.num_noises else None,
            native,
            0 if self.forks is None else self.forks.max_forks,
            places,
        )

    def join(self, proposed: Any) -> Any:
        """The drafts of vLLM's own drafter (its DraftTokenIds, or None), joined by ours where ours promise more."""
        if not self.drafting.has_proposers:
            return proposed
        input_batch = self._runner.input_batch
        k = self.num_speculative_tokens
        theirs = {} if proposed is None else dict(zip(proposed.req_ids, proposed.draft_token_ids, strict=True))
        rows = [
            row
            for request_id in self.drafting.take_settled()
            if (row := input_batch.req_id_to_index.get(request_id)) is not None
        ]
        native = np.full((len(rows), k), -1, dtype=np.int32)
        for index, row in enumerate(rows):
            draft = theirs.get(input_batch.req_ids[row], ())
            native[index, : len(draft)] = draft
        places = None if self._shared is None else self._shared.places(rows, k)
        drafts = self.draft(rows, input_batch.num_tokens_no_spec, input_batch.token_ids_cpu, native, places)
        for row, draft in zip(rows, drafts, strict=True):
            theirs[input_batch.req_ids[row]] = draft
        return DraftTokenIds(list(theirs), list(theirs.values()))

    def finish(self, request_id: str) -> None:
        """The engine forgot this request: so do we."""
        self._requests.pop(request_id, None)
        if isinstance(self.verifier, CoupledVerifier):
            self.verifier.finish(request_id)
        self.drafting.finish([request_id])

    def snapshot(self, is_fresh: bool = True) -> dict[str, Any]:
        """Counters of this worker, and how many requests hold state in it; ``is_fresh`` as in ``Drafting.snapshot``."""
        counters = self.drafting.snapshot(is_fresh)
        counters["live_requests"] = max(counters["live_requests"], len(self._requests))
        if isinstance(self.verifier, CoupledVerifier):
            counters["live_requests"] = max(counters["live_requests"], self.verifier.num_streams)
        return counters

    def _request(self, request_id: str) -> TrackedRequest:
        known = self._requests.get(request_id)
        if known is None:
            state = self._runner.requests[request_id]
            known = TrackedRequest.of(request_id, state.sampling_params, state.num_prompt_tokens, self.max_model_len)
            self._requests[request_id] = known
        return known


class Proposer(Attachment):
    """The drafter that vLLM's runner builds for ``"method": "custom_class"``, under a coupled verifier.

    Args:
        vllm_config: vLLM's configuration; ours is in its ``additional_config``.
    """

    def __init__(self, vllm_config: Any) -> None:
        settings = settings_of(vllm_config.additional_config)
        assert settings is not None  # taken in when the configuration was made, in either spelling
        context = _context(vllm_config, settings)
        drafting = Drafting(settings, context, can_shorten=_can_shorten(vllm_config))
        super().__init__(settings, drafting, context.num_speculative_tokens, context.max_model_len)

    def load_model(self, *_: Any, **__: Any) -> None:
        """vLLM's CPU runner asks every drafter to load its model; there is none."""

    def attach(self, runner: Any) -> None:
        """Put the verifier in place, warm up, and say what is active."""
        # vLLM drops everyone's drafts once one request is within k tokens of max_model_len; propose() limits each
        # request by itself, so that rule has nothing left to protect.
        runner.effective_drafter_max_model_len = self.max_model_len + self.num_speculative_tokens + 1
        start = time.perf_counter()
        super().attach(runner)
        logger.info(
            "specplug is active: %s, proposers: %s; up to %d draft tokens (warm-up %.1f s)",
            self.describe_sampler(),
            self.drafting.describe(),
            self.num_speculative_tokens,
            time.perf_counter() - start,
        )

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: np.ndarray[Any, Any],
        token_ids_cpu: np.ndarray[Any, Any],
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Called by vLLM after each step; arrays are its own, one row a request of the batch.

        Args:
            sampled_token_ids: tokens just emitted, empty for a request still in prefill.
            num_tokens_no_spec: ``[max_num_reqs]`` tokens so far, the new ones included.
            token_ids_cpu: ``[max_num_reqs, max_model_len]``.
            slot_mappings: not used.
        """
        rows = [row for row, emitted in enumerate(sampled_token_ids) if emitted]
        drafts: list[list[int]] = [[] for _ in sampled_token_ids]
        for row, draft in zip(rows, self.draft(rows, num_tokens_no_spec, token_ids_cpu), strict=True):
            drafts[row] = draft
        return drafts


class ProposerWithRejection(Proposer):
    """The same drafter in front of vLLM's own rejection sampler (``"sampler": "rejection"``)."""


def _context(vllm_config: Any, settings: Settings) -> ProposerContext:
    return ProposerContext(
        vocab_size=vllm_config.model_config.get_vocab_size(),
        num_speculative_tokens=int(vllm_config.speculative_config.num_speculative_tokens),
        max_num_requests=vllm_config.scheduler_config.max_num_seqs,
        max_model_len=int(vllm_config.model_config.max_model_len),
        datastores=settings.datastore or {},
    )


def _can_shorten(vllm_config: Any) -> bool:
    """False under torchrun with several ranks a model: each schedules its own drafts, and all must be equally long.

    What pays is decided by measured times, which differ from rank to rank.
    """
    parallel_config = vllm_config.parallel_config
    ranks = int(parallel_config.tensor_parallel_size) * int(parallel_config.pipeline_parallel_size)
    return ranks == 1 or str(parallel_config.distributed_executor_backend) != "external_launcher"


class _KeyedSampler(TopKTopPSampler):  # type: ignore[misc]
    """vLLM's top-k/top-p sampler, with the noise of each row handed in instead of drawn from per-request generators."""

    def __init__(self, logprobs_mode: str, use_fp64_gumbel: bool) -> None:
        super().__init__(logprobs_mode, use_fp64_gumbel)
        self._noise: list[Callable[[torch.Tensor], torch.Tensor]] = []
        self.forward = self._forward_keyed

    def draw_with(self, noise: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Make the next call draw ``[num_rows]`` tokens from ``[num_rows, vocab]`` logits in this way."""
        self._noise[:] = [noise]  # to set an attribute of a torch module takes ten times as long

    def _forward_keyed(
        self,
        logits: torch.Tensor,  # [num_rows, vocab]
        generators: Any,
        k: torch.Tensor | None,
        p: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        logits = apply_top_k_top_p(logits, k, p)
        returned = None
        if self.logprobs_mode == "processed_logits":
            returned = logits
        elif self.logprobs_mode == "processed_logprobs":
            returned = logits.log_softmax(dim=-1, dtype=torch.float32)
        return self._noise[0](logits), returned


def _race(logits: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
    """vLLM's own draw on CPUs: argmax of ``[num_rows, vocab]`` logits + noise of ``[num_rows]`` seeds."""
    return torch.ops._C.fused_gumbel_argmax(logits.to(torch.float32), seeds)  # type: ignore[no-any-return]


def _darts(logits: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
    """The MinHash draw from the same seeds."""
    return torch.from_numpy(minhash.sample(probabilities(logits).numpy(), minhash.keys_of(seeds.numpy())))


def _draw_of(settings: Settings) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """How the sampler makes tokens of logits and seeds, each row's of its own alone."""
    if settings.sampler == "list":
        num_chains = settings.num_chains
        return lambda logits, seeds: list_matching.draw(logits, seeds, num_chains, _race)[0][:, 0]
    return {"gumbel": _race, "minhash": _darts}[settings.sampler]


def _places_of(
    settings: Settings, num_places: int
) -> Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """What a drafter drafts first, second and so on, ``[num_rows, num_places]``, and scores; the first as it is drawn.

    ``list``: the winners of all its races. ``gumbel``: the first places of the one. ``minhash``: the first dart alone.
    """
    if settings.sampler == "list":
        return lambda logits, seeds: list_matching.draw(logits, seeds, settings.num_chains, _race)
    if settings.sampler == "gumbel":
        return lambda logits, seeds: list_matching.ranked(logits, seeds, num_places, _race)

    def dart(logits: torch.Tensor, seeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = _darts(logits, seeds)[:, None]
        return tokens, torch.zeros(tokens.shape, dtype=torch.float64)

    return dart


class _SeededNoise:
    """What rows are drawn with: one seed a row, each request's seeds drawn ahead from its generator.

    Args:
        draw: makes tokens of logits and seeds, each row's of its own alone.
    """

    def __init__(self, draw: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        self._draw = draw
        self._streams: dict[str, SeedStream] = {}

    def stream(self, request_id: str, state: Any) -> SeedStream:
        stream = self._streams.get(request_id)
        if stream is None:
            stream = SeedStream(state.generator) if state.generator is not None else SeedStream.fresh()
            self._streams[request_id] = stream
        return stream

    def seeds(self, draws: Sequence[tuple[str, Any, int, int]]) -> torch.Tensor:
        """Seeds of rows laid out one run of consecutive tokens after the other, int64.

        Args:
            draws: for each run the request's id, its state (None: no draw, any seed will do), the output token, counted
                from the request's next one, that the first row is for, and the number of rows.
        """
        seeds: list[int] = []
        for request_id, state, first, count in draws:
            seeds += [0] * count if state is None else self.stream(request_id, state).peek(first + count)[first:]
        return torch.tensor(seeds, dtype=torch.int64)

    def rows(self, draws: Sequence[tuple[str, Any, int, int]]) -> Callable[[torch.Tensor], torch.Tensor]:
        """A drawing function for the rows of :meth:`seeds`."""
        keyed = self.seeds(draws)
        return lambda logits: self._draw(logits, keyed)

    def next_row(self, request_ids: Sequence[str], states: Sequence[Any]) -> Callable[[torch.Tensor], torch.Tensor]:
        """:meth:`rows` for one row of each request, its next output token."""
        seeds = [
            0 if state is None else self.stream(request_id, state).peek(1)[0]
            for request_id, state in zip(request_ids, states, strict=True)
        ]
        keyed = torch.tensor(seeds, dtype=torch.int64)
        return lambda logits: self._draw(logits, keyed)

    def consume(self, request_id: str, count: int) -> None:
        if request_id in self._streams:
            self._streams[request_id].consume(count)

    def finish(self, request_id: str) -> None:
        self._streams.pop(request_id, None)

    def __len__(self) -> int:
        return len(self._streams)


class CoupledVerifier:
    """Draws the target's token of every row as vLLM would in an ordinary step, and keeps drafts while they are equal.

    Two ways give the same tokens. *At once*: every row is one row of a single sampling step, its parameters repeated
    from its request. *Step by step*, when logits processors are active (min_p, logit_bias, min_tokens and custom ones
    keep state by batch index): depth after depth, the whole batch goes through vLLM's sampler as it would have without
    speculation, until every request has met its first rejected draft.
    """

    def __init__(self, runner: Any, attachment: Attachment) -> None:
        self._runner = runner
        self._attachment = attachment
        stock: Sampler = runner.sampler
        self._stock = runner.rejection_sampler
        self._noise = _SeededNoise(_draw_of(attachment.settings))
        self._keyed = _KeyedSampler(stock.logprobs_mode, stock.use_fp64_gumbel)
        self._sampler = copy.copy(stock)  # shares everything but the final draw
        self._sampler._modules = {**stock._modules, "topk_topp_sampler": self._keyed}

    @property
    def num_streams(self) -> int:
        """Requests that hold a stream of seeds."""
        return len(self._noise)

    @property
    def num_running(self) -> int:
        """Requests of the batch."""
        return int(self._runner.input_batch.num_reqs)

    def finish(self, request_id: str) -> None:
        """Drop the request's stream of seeds."""
        self._noise.finish(request_id)

    def target_noise(self, requests: Sequence[TrackedRequest], width: int) -> TargetNoise:
        """The Gumbel noise of the next ``width`` tokens of each request, without consuming any."""
        runner = self._runner
        temperature = np.array([request.temperature for request in requests], dtype=np.float32)
        temperature[temperature < _SAMPLING_EPS] = 0.0  # vLLM calls these greedy
        seeds: np.ndarray[Any, np.dtype[np.int64]] = np.zeros((len(requests), width), dtype=np.int64)
        for index in np.flatnonzero(temperature).tolist():
            request_id = requests[index].request_id
            seeds[index] = self._noise.stream(request_id, runner.requests[request_id]).peek(width)
        kind = list_kind(SPLITMIX, self._attachment.settings.num_noises)
        return TargetNoise(kind, splitmix_keys(seeds), temperature)

    def draw_ahead(self, logits: torch.Tensor, num_rows: int, depth: int) -> torch.Tensor:
        """What the noise of coming tokens makes of other logits: a drafter's.

        Args:
            logits: ``[num_requests * num_rows, vocab]`` of all requests of the batch, temperature applied.
            num_rows: consecutive tokens of each request.
            depth: the first of them, counted from the request's next output token.
        """
        return self._noise.rows(self._coming(len(logits) // num_rows, num_rows, depth))(logits)

    def rank_ahead(
        self, logits: torch.Tensor, num_rows: int, depth: int, num_places: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """:meth:`draw_ahead`, with the tokens that came close: see :func:`_places_of`."""
        draws = self._coming(len(logits) // num_rows, num_rows, depth)
        return _places_of(self._attachment.settings, num_places)(logits, self._noise.seeds(draws))

    def _coming(self, num_requests: int, num_rows: int, depth: int) -> list[tuple[str, Any, int, int]]:
        """Runs of rows for :class:`_SeededNoise`. An incomplete prompt reads its first seeds ahead, and keeps them."""
        runner = self._runner
        greedy, requests = runner.input_batch.greedy_reqs, runner.requests
        return [
            (request_id, None if request_id in greedy else requests[request_id], depth, num_rows)
            for request_id in runner.input_batch.req_ids[:num_requests]
        ]

    def __call__(
        self,
        metadata: Any,  # vLLM's SpecDecodeMetadata
        draft_probs: torch.Tensor | None,
        logits: torch.Tensor,  # [num_rows, vocab]
        sampling_metadata: SamplingMetadata,
    ) -> SamplerOutput:
        """vLLM's call of its rejection sampler; returns ``[num_requests, max_draft_tokens + 1]`` token ids."""
        runner = self._runner
        counts: list[int] = metadata.num_draft_tokens
        if len(counts) > len(runner.input_batch.req_ids):  # vLLM's warm-up with made-up rows
            return self._stock(metadata, draft_probs, logits, sampling_metadata)
        request_ids = runner.input_batch.req_ids[: len(counts)]
        prefilling = runner.discard_request_mask.np[: len(counts)].tolist()
        if sampling_metadata.all_greedy:
            states: list[Any] = [None] * len(counts)
        else:
            greedy, requests = runner.input_batch.greedy_reqs, runner.requests
            states = [
                # Greedy requests draw nothing, nor do requests whose prompt is not complete yet.
                None if skip or request_id in greedy else requests[request_id]
                for request_id, skip in zip(request_ids, prefilling, strict=True)
            ]
        drafts: list[list[int]]
        further: list[list[list[int]]] = []
        if metadata.max_spec_len == 0:
            output = self._no_drafts(logits, sampling_metadata, request_ids, states)
            token_ids, logprobs = output.sampled_token_ids, output.logprobs_tensors
            drafts, targets, emitted = [[]] * len(counts), token_ids.tolist(), [1] * len(counts)
        else:
            step_by_step = any(_is_active(p) for p in sampling_metadata.logitsprocs.all) or _budgets(sampling_metadata)
            verify = self._step_by_step if step_by_step else self._at_once
            forks = self._attachment.forks
            step = None if forks is None else forks.take_step()
            token_ids, targets, emitted, logprobs, winners = verify(metadata, logits, sampling_metadata, states, step)
            drafts = _real_drafts(metadata)
            if forks is not None and step is not None:
                further = [[] for _ in drafts]
                for index, chain in winners.items():
                    tokens = step.chains[index].tokens
                    drafts[index] = tokens[chain]
                    further[index] = tokens[:chain] + tokens[chain + 1 :]
                forks.copy_home(step, {index: (chain, emitted[index] - 1) for index, chain in winners.items()})
        for request_id, state, count in zip(request_ids, states, emitted, strict=True):
            if state is not None:
                self._noise.consume(request_id, count)
        verified = Verified(request_ids, drafts, targets, emitted, further=further)
        if any(prefilling):
            settled = [index for index, skip in enumerate(prefilling) if not skip]
            verified = Verified(
                [request_ids[index] for index in settled],
                [drafts[index] for index in settled],
                [targets[index] for index in settled],
                [emitted[index] for index in settled],
                num_unsettled=len(prefilling) - len(settled),
                further=[further[index] for index in settled] if further else [],
            )
        self._attachment.drafting.observe(verified)
        return SamplerOutput(sampled_token_ids=token_ids.to(torch.int32), logprobs_tensors=logprobs)

    def _draw(self, runs: Sequence[tuple[int, Any, int, int]]) -> None:
        """Key the sampler's next call by runs of rows: request's row, state, first output token, number of rows."""
        request_ids = self._runner.input_batch.req_ids
        self._keyed.draw_with(
            self._noise.rows([(request_ids[index], state, first, count) for index, state, first, count in runs])
        )

    def _no_drafts(
        self, logits: torch.Tensor, sampling_metadata: SamplingMetadata, request_ids: list[str], states: list[Any]
    ) -> SamplerOutput:
        """An ordinary sampling step; quick, since a step without drafts must cost no more than it does elsewhere."""
        if not sampling_metadata.all_greedy:
            self._keyed.draw_with(self._noise.next_row(request_ids, states))
        return self._sampler(logits=logits, sampling_metadata=sampling_metadata)

    def _at_once(
        self,
        metadata: Any,
        logits: torch.Tensor,
        sampling_metadata: SamplingMetadata,
        states: list[Any],
        step: v1_chains.ForkedStep | None,
    ) -> tuple[torch.Tensor, list[list[int]], list[int], LogprobsTensors | None, dict[int, int]]:
        """Every row of every request, forks' rows behind, in one call of the sampler.

        Returns:
            Emitted tokens, ``[num_requests, max_draft_tokens + 1]``; the target's token at each row of the chain that
            got furthest; how many are emitted; logprobs; and which chain that was, where there were several.
        """
        layout = RowLayout.of(metadata.num_draft_tokens, logits.device)
        runs = [
            (index, state, 0, count + 1)
            for index, (state, count) in enumerate(zip(states, layout.num_draft_tokens, strict=True))
        ]
        drafts = _by_request(metadata.draft_token_ids, layout.num_draft_tokens)
        of_row, prefixes = layout.request_of_row, [(index, draft, 0) for index, draft in enumerate(drafts)]
        if step is not None:
            for index, fork in zip(step.requests, step.forks, strict=True):
                runs.append((index, states[index], fork.head + 1, len(fork.tokens) - fork.head))
                prefixes.append((index, fork.tokens, fork.head + 1))
            of_forks = torch.tensor(step.requests).repeat_interleave(torch.tensor(step.lengths))
            of_row = torch.cat([of_row, of_forks.to(of_row.device)])
        self._draw(runs)
        output = self._sampler(logits=logits, sampling_metadata=_repeat_by_row(sampling_metadata, of_row, prefixes))
        tokens = output.sampled_token_ids.view(-1).to(torch.int64)
        num_rows = len(layout.request_of_row)
        verification = accept_while_equal(tokens[:num_rows], metadata.draft_token_ids, layout)
        token_ids, emitted = verification.token_ids, verification.num_emitted.tolist()
        targets = _by_request(tokens[:num_rows], [count + 1 for count in layout.num_draft_tokens])
        rows = layout.padded_rows
        winners: dict[int, int] = {}
        if step is not None:
            values = tokens.tolist()
            for index, chains in step.chains.items():
                winner, out = walk(chains.tokens, lambda chain, depth, of=chains: values[of.logits_rows[chain][depth]])  # type: ignore[misc]
                winners[index] = winner
                if winner:
                    token_ids[index] = REJECTED
                    token_ids[index, : len(out)] = torch.tensor(out, dtype=token_ids.dtype)
                    emitted[index] = len(out)
                    targets[index] = [values[row] for row in chains.logits_rows[winner]]
                    rows[index, : len(out)] = torch.tensor(chains.logits_rows[winner][: len(out)])
        logprobs = output.logprobs_tensors
        if logprobs is not None:
            logprobs = LogprobsTensors(*(field[rows.view(-1)] for field in logprobs[:3]))
        return token_ids, targets, emitted, logprobs, winners

    def _step_by_step(
        self,
        metadata: Any,
        logits: torch.Tensor,
        sampling_metadata: SamplingMetadata,
        states: list[Any],
        step: v1_chains.ForkedStep | None,
    ) -> tuple[torch.Tensor, list[list[int]], list[int], LogprobsTensors | None, dict[int, int]]:
        """One call of the sampler a depth, whole batch in each, until every request met its first rejected draft.

        Several chains are walked like one: at each depth only the target's own path has a row to look at.
        """
        runner = self._runner
        layout = RowLayout.of(metadata.num_draft_tokens, logits.device)
        chains = [
            v1_chains.RequestChains([draft], [rows])
            for draft, rows in zip(
                _by_request(metadata.draft_token_ids, layout.num_draft_tokens), layout.padded_rows.tolist(), strict=True
            )
        ]
        if step is not None:
            for index, several in step.chains.items():
                chains[index] = several
        # vLLM's processors and penalties hold references to these very lists: what was accepted is appended for the
        # depths behind, as an ordinary step would have, and taken off at the end (bookkeeping appends it for good).
        request_ids = runner.input_batch.req_ids[: len(states)]
        outputs = [runner.requests[request_id].output_token_ids for request_id in request_ids]
        lengths = [len(output_ids) for output_ids in outputs]
        targets: list[list[int]] = [[] for _ in states]
        # Chains that begin with what was emitted so far, by request; of a request that is done, the one that led.
        leading = [list(range(len(each.tokens))) for each in chains]
        alive = set(range(len(states)))
        logprobs: list[LogprobsTensors] = []
        try:
            for depth in range(layout.max_draft_tokens + 1):
                if depth:
                    for processor in sampling_metadata.logitsprocs.all:
                        processor.update_state(None)
                self._draw([(index, state if index in alive else None, depth, 1) for index, state in enumerate(states)])
                rows = []
                for each, leaders in zip(chains, leading, strict=True):
                    own = each.logits_rows[leaders[0]]
                    rows.append(own[min(depth, len(own) - 1)])
                output = self._sampler(logits=logits[torch.tensor(rows)], sampling_metadata=sampling_metadata)
                if output.logprobs_tensors is not None:
                    logprobs.append(output.logprobs_tensors)
                tokens = output.sampled_token_ids.view(-1).tolist()
                for index in sorted(alive):
                    token = tokens[index]
                    targets[index].append(token)
                    all_tokens = chains[index].tokens
                    left = [
                        chain
                        for chain in leading[index]
                        if depth < len(all_tokens[chain]) and all_tokens[chain][depth] == token
                    ]
                    if left:
                        leading[index] = left
                        outputs[index].append(token)
                    else:
                        alive.discard(index)
                if not alive:
                    break
        finally:
            for output_ids, length in zip(outputs, lengths, strict=True):
                del output_ids[length:]
        width = layout.max_draft_tokens + 1
        padded = torch.tensor([row + [REJECTED] * (width - len(row)) for row in targets], device=logits.device)
        emitted = [len(row) for row in targets]
        winners = {} if step is None else {index: leading[index][0] for index in step.chains}
        if not logprobs:
            return padded, targets, emitted, None, winners
        logprobs += [logprobs[-1]] * (width - len(logprobs))  # rows behind the last emitted token are filtered out
        fields = zip(*(tensors[:3] for tensors in logprobs), strict=True)
        stacked = LogprobsTensors(*(torch.stack(field, dim=1).flatten(0, 1) for field in fields))
        return padded, targets, emitted, stacked, winners


class ObservedRejection:
    """vLLM's own rejection sampler, with what it accepted reported to the proposers."""

    def __init__(self, runner: Any, attachment: Attachment, stock: Any) -> None:
        self._runner = runner
        self._attachment = attachment
        self._stock = stock

    def __call__(self, metadata: Any, draft_probs: Any, logits: torch.Tensor, sampling_metadata: Any) -> SamplerOutput:
        """Same arguments and result as the stock sampler."""
        runner = self._runner
        if len(metadata.num_draft_tokens) > len(runner.input_batch.req_ids):  # vLLM's warm-up with made-up rows
            return self._stock(metadata, draft_probs, logits, sampling_metadata)
        # Half-prefilled requests must not draw: a CPU generator cannot be rewound afterwards.
        prefilling = runner.discard_request_mask.np[: len(metadata.num_draft_tokens)]
        drawing = {i: g for i, g in sampling_metadata.generators.items() if not prefilling[i]}
        sampling_metadata = replace(sampling_metadata, generators=drawing)
        if metadata.max_spec_len:
            output = self._stock(metadata, draft_probs, logits, sampling_metadata)
        else:
            # An ordinary step. vLLM's verifier fails without any draft where some request has a top_k.
            output = runner.sampler(logits=logits, sampling_metadata=sampling_metadata)
        kept = [[token for token in row if token != REJECTED] for row in output.sampled_token_ids.tolist()]
        drafts = _real_drafts(metadata)
        settled = [index for index, skip in enumerate(prefilling) if not skip]
        self._attachment.drafting.observe(
            Verified(
                [runner.input_batch.req_ids[index] for index in settled],
                [drafts[index] for index in settled],
                [kept[index] for index in settled],
                [len(kept[index]) for index in settled],
                num_unsettled=len(prefilling) - len(settled),
            )
        )
        return output


class _SharedNoise:
    """Makes a sampling drafter of vLLM's choose each token with the noise that the verifier will use there.

    vLLM draws the draft's noise afresh, which the classic rule needs; under accept-if-equal the same noise is what
    makes draft and target agree, and the tokens that come out are the target's alone either way.

    Args:
        drafter: one of vLLM's model drafters with ``draft_sample_method: probabilistic``.
        verifier: knows the seeds of the coming tokens.
        num_places: tokens that are of use at each depth: what several chains can be made of.
    """

    def __init__(self, drafter: Any, verifier: CoupledVerifier, num_places: int) -> None:
        self._verifier = verifier
        self._propose = drafter.propose
        self._num_places = num_places
        self._depth = 0
        # Of the latest draft: tokens and scores, [num_requests, depths, places] each.
        self._places: list[tuple[torch.Tensor, torch.Tensor]] = []
        drafter.propose = self.propose
        drafter._sample_from_logits = self.sample

    def propose(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM's own; a new draft begins with the next output token."""
        self._depth = 0
        self._places = []
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
        self._places.append((tokens.view(shape), scores.view(shape)))

    def places(self, rows: Sequence[int], num_draft: int) -> Places | None:
        """What the latest draft could have been else, of the requests in these rows; None where that is not known.

        Args:
            rows: of the batch, which is still the one that was drafted for.
            num_draft: longest draft; depths that were not drafted hold -1.
        """
        if not self._places:
            return None
        tokens, scores = (torch.cat(each, dim=1)[list(rows), :num_draft] for each in zip(*self._places, strict=True))
        missing = num_draft - tokens.shape[1]
        tokens = torch.nn.functional.pad(tokens, (0, 0, 0, missing), value=-1)
        scores = torch.nn.functional.pad(scores, (0, 0, 0, missing))
        return Places.of_scores(tokens.numpy(), scores.numpy())


def _share_noise(drafter: Any, verifier: CoupledVerifier, num_places: int) -> _SharedNoise | None:
    if not getattr(drafter, "_enable_probabilistic_draft_probs", False):
        return None
    return _SharedNoise(drafter, verifier, num_places)


def _is_active(processor: Any) -> bool:
    """True when a logits processor would change some row now; one that we do not know always may."""
    if type(processor) is MinPLogitsProcessor:
        return bool(processor.min_p_count)
    if type(processor) is LogitBiasLogitsProcessor:
        return bool(processor.biases)
    if type(processor) is MinTokensLogitsProcessor:
        return bool(processor.min_toks)
    return True


def _budgets(sampling_metadata: SamplingMetadata) -> bool:
    holder = sampling_metadata.thinking_budget_state_holder
    return holder is not None and bool(holder.has_tracked_requests())


def _real_drafts(metadata: Any) -> list[list[int]]:
    """Each request's verified draft; the placeholders (-1) that vLLM's scheduler pads with count as none."""
    drafts = _by_request(metadata.draft_token_ids, metadata.num_draft_tokens)
    return [draft if draft and draft[0] >= 0 else [] for draft in drafts]


def _by_request(flat: torch.Tensor, counts: Sequence[int]) -> list[list[int]]:
    """``[sum(counts)]`` values as one list a request."""
    values, split, first = flat.tolist(), [], 0
    for count in counts:
        split.append(values[first : first + count])
        first += count
    return split


def _repeat_by_row(
    metadata: SamplingMetadata, of_row: torch.Tensor, prefixes: Sequence[tuple[int, list[int], int]]
) -> SamplingMetadata:
    """The sampling parameters of each request repeated for each of its rows, drafts counted as output before them.

    Args:
        metadata: vLLM's, one entry a request.
        of_row: ``[num_rows]`` request of each row.
        prefixes: the same rows, run by run: request, draft, and how many tokens of it precede the run's first row; the
            run ends with the row behind the whole draft.
    """
    take = functools.partial(_optional_rows, rows=of_row)
    requests = of_row.tolist()
    outputs: list[list[int]] = []
    if metadata.output_token_ids:
        for request, draft, first in prefixes:
            so_far = metadata.output_token_ids[request]
            outputs += [[*so_far, *draft[:depth]] for depth in range(first, len(draft) + 1)]
    by_row = {
        row: metadata.bad_words_token_ids[r] for row, r in enumerate(requests) if r in metadata.bad_words_token_ids
    }
    specific = metadata.logprob_token_ids
    return replace(
        metadata,
        temperature=take(metadata.temperature),
        top_p=take(metadata.top_p),
        top_k=take(metadata.top_k),
        generators={},
        prompt_token_ids=take(metadata.prompt_token_ids),
        frequency_penalties=take(metadata.frequency_penalties),
        presence_penalties=take(metadata.presence_penalties),
        repetition_penalties=take(metadata.repetition_penalties),
        output_token_ids=outputs,
        allowed_token_ids_mask=take(metadata.allowed_token_ids_mask),
        bad_words_token_ids=by_row,
        logprob_token_ids={row: specific[r] for row, r in enumerate(requests) if r in specific}
        if specific
        else specific,
        spec_token_ids=None,
    )


def _optional_rows(values: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor | None:
    return None if values is None else values[rows]


def install() -> None:
    """Wrap the runner's seams in this process, after checking their signatures. Idempotent."""
    seams.check(seam_list.V1_USED)
    patches.install(
        seam_list.V1_SEAMS,
        {
            "GPUModelRunner.initialize_kv_cache": _initialize_kv_cache,
            "GPUModelRunner._bookkeeping_sync": _bookkeeping_sync,
            "GPUModelRunner._on_request_state_removed": _on_request_state_removed,
            "GPUModelRunner.take_draft_token_ids": _take_draft_token_ids,
            "GPUModelRunner._calc_spec_decode_metadata": _calc_spec_decode_metadata,
            "GPUModelRunner._prepare_inputs": v1_chains.prepare_inputs,
            "GPUModelRunner._determine_batch_execution_and_padding": v1_chains.determine_batch,
            "GPUModelRunner._get_slot_mappings": v1_chains.slot_mappings,
            "GPUModelRunner._build_attention_metadata": v1_chains.build_attention_metadata,
            "GPUModelRunner._preprocess": v1_chains.preprocess,
            "GPUModelRunner._prepare_padding_mask": v1_chains.padding_mask,
            "build_logitsprocs": _build_logitsprocs,
            "expand_batch_to_tokens": _expand_batch_to_tokens,
        },
    )


def _attachment_of(runner: Any) -> Attachment | None:
    return getattr(runner, "_specplug", None)


def _initialize_kv_cache(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    result = original(self, *args, **kwargs)
    drafter = getattr(self, "drafter", None)
    if drafter is None or _attachment_of(self) is not None:
        return result
    if isinstance(drafter, Proposer):
        drafter.attach(self)
    elif (settings := settings_of(self.vllm_config.additional_config)) and (
        settings.is_coupled or self.device.type == "cpu"  # elsewhere vLLM's own verifier needs no repair of ours
    ):
        config = self.vllm_config.speculative_config
        context = _context(self.vllm_config, settings)
        drafting = Drafting(
            settings,
            context,
            native=config.method if settings.host_proposers or settings.forks_native(config) else None,
            can_shorten=_can_shorten(self.vllm_config),
        )
        attachment = Attachment(settings, drafting, context.num_speculative_tokens, context.max_model_len)
        attachment.attach(self)
        logger.info(
            "specplug is active: %s verifies the drafts of vLLM's %s (%s)%s",
            attachment.describe_sampler(),
            config.method,
            config.draft_sample_method,
            (f", joined by {drafting.describe()}" if settings.host_proposers else "")
            + (f", up to {settings.num_chains} chains a request" if drafting.native and attachment.forks else ""),
        )
    return result


def _bookkeeping_sync(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    if _attachment_of(self) is None:
        return original(self, *args, **kwargs)
    # Bookkeeping would take back the draw of half-prefilled requests. Our verifiers never draw for them.
    generators = self.input_batch.generators
    self.input_batch.generators = {}
    try:
        return original(self, *args, **kwargs)
    finally:
        self.input_batch.generators = generators


def _on_request_state_removed(original: Callable[..., Any], self: Any, req_id: str, req_state: Any) -> Any:
    attachment = _attachment_of(self)
    if attachment is not None:
        attachment.finish(req_id)
    return original(self, req_id, req_state)


def _take_draft_token_ids(original: Callable[..., Any], self: Any) -> Any:
    proposed = original(self)
    attachment = _attachment_of(self)
    # Our own drafter's drafts are what it gave; only beside one of vLLM's there is something to join.
    if attachment is None or isinstance(attachment, Proposer):
        return proposed
    return attachment.join(proposed)


def _calc_spec_decode_metadata(
    original: Callable[..., Any],
    self: Any,
    num_draft_tokens: np.ndarray[Any, Any],  # [num_requests]
    cu_num_scheduled_tokens: np.ndarray[Any, Any],  # [num_requests]
) -> Any:
    attachment = _attachment_of(self)
    if attachment is None or self.device.type != "cpu" or num_draft_tokens.any():
        return original(self, num_draft_tokens, cu_num_scheduled_tokens)
    num_requests = len(num_draft_tokens)
    plain = attachment.plain_layout
    if plain is None or len(plain.num_draft_tokens) != num_requests:
        request = torch.arange(num_requests, dtype=torch.int32)
        plain = attachment.plain_layout = SpecDecodeMetadata(
            draft_token_ids=request[:0],
            num_draft_tokens=[0] * num_requests,
            cu_num_draft_tokens=torch.zeros_like(request),
            cu_num_sampled_tokens=request + 1,
            target_logits_indices=request[:0],
            bonus_logits_indices=request,
            logits_indices=request,
        )
    if cu_num_scheduled_tokens[-1] == num_requests:
        return plain  # a token each
    return replace(plain, logits_indices=torch.from_numpy(cu_num_scheduled_tokens - 1))


def _build_logitsprocs(original: Callable[..., Any], vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
    if is_coupled(vllm_config.speculative_config):
        # A shallow copy that looks like an engine without speculation: to a coupled verifier every row is such a step.
        vllm_config = copy.copy(vllm_config)
        vllm_config.speculative_config = None
    return original(vllm_config, *args, **kwargs)


def _expand_batch_to_tokens(
    original: Callable[..., Any],
    x: torch.Tensor,  # [batch_size]
    cu_num_tokens: torch.Tensor,  # [batch_size]
    num_tokens: int,
    replace_from: int = 0,
    replace_to: int = 0,
) -> torch.Tensor:
    if x.device.type != "cpu":
        return original(x, cu_num_tokens, num_tokens, replace_from, replace_to)  # type: ignore[no-any-return]
    values = torch.where(x == replace_from, torch.full_like(x, replace_to), x)
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    return torch.repeat_interleave(values, counts, output_size=num_tokens)


__all__ = ["CoupledVerifier", "Proposer", "ProposerWithRejection", "install"]
