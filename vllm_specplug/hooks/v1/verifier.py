"""Verification on V1: draws the target's token of every logits row and accepts drafts while they equal it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.logits_processor.builtin import (
    LogitBiasLogitsProcessor,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import _SAMPLING_EPS, Sampler

from vllm_specplug.drafting.requests import TrackedRequest
from vllm_specplug.hooks.forks import walk
from vllm_specplug.hooks.v1.draws import KeyedSampler, SeededNoise
from vllm_specplug.hooks.v1.ends import end_at_stops
from vllm_specplug.hooks.v1.forks import ForkedRows
from vllm_specplug.hooks.v1.step import ForkedBatch, RequestChains, Steps
from vllm_specplug.hooks.v1.step_by_step import Walk, stacked
from vllm_specplug.proposers.base import TargetNoise, Verified
from vllm_specplug.samplers.base import REJECTED, RowLayout, accept_while_equal
from vllm_specplug.samplers.couplings import Coupling
from vllm_specplug.settings.model import Settings


class Drawn(NamedTuple):
    """The target's own tokens of one step.

    Attributes:
        token_ids: ``[num_requests, max_draft_tokens + 1]`` emitted tokens, padded with :data:`REJECTED`.
        targets: per request, the target's tokens at the logits rows of the winning chain.
        num_emitted: ``[num_requests]`` number of emitted tokens.
        logprobs: vLLM's logprobs of all emitted tokens; None if no request asks for them.
        winners: index of the winning chain by batch row, for requests with side chains.
    """

    token_ids: torch.Tensor
    targets: list[list[int]]
    num_emitted: list[int]
    logprobs: LogprobsTensors | None
    winners: dict[int, int]


class CoupledVerifier:
    """Draws the target's token of every logits row as an ordinary step of vLLM would, and accepts drafts that equal it.

    Two ways give the same tokens. *At once*: all logits rows are rows of a single sampling step, with the parameters of
    their requests. *Step by step*, if logits processors are active (min_p, logit_bias, min_tokens and custom ones keep
    state by batch index): the whole batch goes through vLLM's sampler once per depth, as it would without speculation,
    until every request has met its first rejected draft.

    Args:
        runner: vLLM's model runner.
        settings: the plugin's settings.
        steps: holds the step under way.
        forks: the runner's forks; None if it has none.
        observe: called with the result of each step.
        request: from a request id to the request, for the tokens that end it; None emits also what is behind them.
    """

    def __init__(
        self,
        runner: Any,
        settings: Settings,
        steps: Steps,
        forks: ForkedRows | None,
        observe: Callable[[Verified], None],
        request: Callable[[str], TrackedRequest] | None = None,
    ) -> None:
        self._runner = runner
        self._settings = settings
        self._steps = steps
        self._forks = forks
        self._observe = observe
        self.request = request
        stock: Sampler = runner.sampler
        self._stock = runner.rejection_sampler
        coupling = settings.coupling
        assert isinstance(coupling, Coupling)
        self._noise = SeededNoise(coupling)
        self._keyed = KeyedSampler(stock.logprobs_mode, stock.use_fp64_gumbel)
        self._sampler = copy.copy(stock)  # shares everything but the final draw
        self._sampler._modules = {**stock._modules, "topk_topp_sampler": self._keyed}

    @property
    def num_streams(self) -> int:
        """Number of requests that have a stream of seeds."""
        return len(self._noise)

    @property
    def num_running(self) -> int:
        """Number of requests of the batch."""
        return int(self._runner.input_batch.num_reqs)

    def finish(self, request_id: str) -> None:
        """Drop the request's stream of seeds."""
        self._noise.finish(request_id)

    def target_noise(self, requests: Sequence[TrackedRequest], width: int) -> TargetNoise:
        """The noise of the next ``width`` tokens of each request; no seed is consumed."""
        runner = self._runner
        temperature = np.array([request.temperature for request in requests], dtype=np.float32)
        temperature[temperature < _SAMPLING_EPS] = 0.0  # vLLM calls these greedy
        seeds: np.ndarray[Any, np.dtype[np.int64]] = np.zeros((len(requests), width), dtype=np.int64)
        for index in np.flatnonzero(temperature).tolist():
            request_id = requests[index].request_id
            seeds[index] = self._noise.stream(request_id, runner.requests[request_id]).peek(width)
        return TargetNoise(*self._noise.coming(seeds), temperature)

    def draw_ahead(self, logits: torch.Tensor, num_rows: int, depth: int) -> torch.Tensor:
        """Draw from a drafter's logits with the noise of the coming tokens.

        Args:
            logits: ``[num_requests * num_rows, vocab]`` of all requests of the batch, divided by temperature.
            num_rows: number of consecutive tokens of each request.
            depth: depth of the first of these tokens; 0 is the request's next output token.
        """
        return self._noise.rows(self._coming(len(logits) // num_rows, num_rows, depth))(logits)

    def rank_ahead(
        self, logits: torch.Tensor, num_rows: int, depth: int, num_places: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Like :meth:`draw_ahead`, with the runners-up and scores: see ``Coupling.ranked``."""
        return self._noise.ranked(logits, self._coming(len(logits) // num_rows, num_rows, depth), num_places)

    def _coming(self, num_requests: int, num_rows: int, depth: int) -> list[tuple[str, Any, int, int]]:
        """Runs of rows for :class:`SeededNoise`. A request in prefill reads its first seeds without consuming them."""
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
        """Verify a step, in place of vLLM's rejection sampler: token ids ``[num_requests, max_draft_tokens + 1]``."""
        runner = self._runner
        counts: list[int] = metadata.num_draft_tokens
        if len(counts) > len(runner.input_batch.req_ids):  # vLLM's warm-up with made-up rows
            return self._stock(metadata, draft_probs, logits, sampling_metadata)
        step = self._steps.now
        request_ids = runner.input_batch.req_ids[: len(counts)]
        prefilling = runner.discard_request_mask.np[: len(counts)].tolist()
        states = self._states(request_ids, prefilling, sampling_metadata.all_greedy)
        if metadata.max_spec_len == 0:
            drawn = self._no_drafts(logits, sampling_metadata, request_ids, states)
            drafts: list[list[int]] = [[]] * len(counts)
            side_chains: list[list[list[int]]] = []
        else:
            step_by_step = any(_is_active(p) for p in sampling_metadata.logitsprocs.all) or _budgets(sampling_metadata)
            verify = self._step_by_step if step_by_step else self._at_once
            drawn = verify(metadata, logits, sampling_metadata, states, step.forks)
            drafts = _real_drafts(metadata)
            side_chains = self._take_winners(step.forks, drawn, drafts)
            end_at_stops(runner, self.request, drawn.token_ids, drawn.targets, drawn.num_emitted)
        for request_id, state, count in zip(request_ids, states, drawn.num_emitted, strict=True):
            if state is not None:
                self._noise.consume(request_id, count)
        verified = Verified(request_ids, drafts, drawn.targets, drawn.num_emitted, further=side_chains)
        step.verified = _settled(verified, prefilling) if any(prefilling) else verified
        self._observe(step.verified)
        return SamplerOutput(sampled_token_ids=drawn.token_ids.to(torch.int32), logprobs_tensors=drawn.logprobs)

    def _states(self, request_ids: list[str], prefilling: list[bool], all_greedy: bool) -> list[Any]:
        """vLLM's state of each request; None if it draws nothing: it is greedy, or its prompt is not complete."""
        if all_greedy:
            return [None] * len(request_ids)
        greedy, requests = self._runner.input_batch.greedy_reqs, self._runner.requests
        return [
            None if skip or request_id in greedy else requests[request_id]
            for request_id, skip in zip(request_ids, prefilling, strict=True)
        ]

    def _take_winners(self, forks: ForkedBatch | None, drawn: Drawn, drafts: list[list[int]]) -> list[list[list[int]]]:
        """Make each winning chain its request's draft (changed in ``drafts``), and copy its keys and values home.

        Returns:
            The other chains of each request; empty if the step has no forks.
        """
        if forks is None or self._forks is None:
            return []
        side_chains: list[list[list[int]]] = [[] for _ in drafts]
        for index, chain in drawn.winners.items():
            tokens = forks.chains[index].tokens
            drafts[index] = tokens[chain]
            side_chains[index] = tokens[:chain] + tokens[chain + 1 :]
        winners = {index: (chain, drawn.num_emitted[index] - 1) for index, chain in drawn.winners.items()}
        self._forks.copy_home(forks, winners)
        return side_chains

    def _draw(self, runs: Sequence[tuple[int, Any, int, int]]) -> None:
        """Set keys of the sampler's next call, as runs of (batch row, state, first output token, number of rows)."""
        request_ids = self._runner.input_batch.req_ids
        self._keyed.draw_with(
            self._noise.rows([(request_ids[index], state, first, count) for index, state, first, count in runs])
        )

    def _no_drafts(
        self, logits: torch.Tensor, sampling_metadata: SamplingMetadata, request_ids: list[str], states: list[Any]
    ) -> Drawn:
        """An ordinary sampling step, on a short path: without drafts a step must cost no more than in plain vLLM."""
        if not sampling_metadata.all_greedy:
            self._keyed.draw_with(self._noise.next_row(request_ids, states))
        output = self._sampler(logits=logits, sampling_metadata=sampling_metadata)
        token_ids = output.sampled_token_ids
        return Drawn(token_ids, token_ids.tolist(), [1] * len(request_ids), output.logprobs_tensors, {})

    def _at_once(
        self,
        metadata: Any,
        logits: torch.Tensor,
        sampling_metadata: SamplingMetadata,
        states: list[Any],
        forks: ForkedBatch | None,
    ) -> Drawn:
        """Draw all logits rows in one call of the sampler; the forks' rows come last."""
        layout = RowLayout.of(metadata.num_draft_tokens, logits.device)
        runs = [
            (index, state, 0, count + 1)
            for index, (state, count) in enumerate(zip(states, layout.num_draft_tokens, strict=True))
        ]
        drafts = _by_request(metadata.draft_token_ids, layout.num_draft_tokens)
        of_row, prefixes = layout.request_of_row, [(index, draft, 0) for index, draft in enumerate(drafts)]
        if forks is not None:
            for index, fork in zip(forks.requests, forks.forks, strict=True):
                runs.append((index, states[index], fork.head + 1, len(fork.tokens) - fork.head))
                prefixes.append((index, fork.tokens, fork.head + 1))
            of_forks = torch.tensor(forks.requests).repeat_interleave(torch.tensor(forks.lengths))
            of_row = torch.cat([of_row, of_forks.to(of_row.device)])
        self._draw(runs)
        output = self._sampler(logits=logits, sampling_metadata=_repeat_by_row(sampling_metadata, of_row, prefixes))
        tokens = output.sampled_token_ids.view(-1).to(torch.int64)
        num_rows = len(layout.request_of_row)
        accepted = accept_while_equal(tokens[:num_rows], metadata.draft_token_ids, layout)
        targets = _by_request(tokens[:num_rows], [count + 1 for count in layout.num_draft_tokens])
        drawn = Drawn(accepted.token_ids, targets, accepted.num_emitted.tolist(), None, {})
        rows = layout.padded_rows
        if forks is not None:
            _walk_chains(forks, tokens.tolist(), drawn, rows)
        if output.logprobs_tensors is None:
            return drawn
        return drawn._replace(logprobs=LogprobsTensors(*(f[rows.view(-1)] for f in output.logprobs_tensors[:3])))

    def _step_by_step(
        self,
        metadata: Any,
        logits: torch.Tensor,
        sampling_metadata: SamplingMetadata,
        states: list[Any],
        forks: ForkedBatch | None,
    ) -> Drawn:
        """Call the sampler once per depth for the whole batch, until every request has met its first rejected draft."""
        runner = self._runner
        layout = RowLayout.of(metadata.num_draft_tokens, logits.device)
        drafts = _by_request(metadata.draft_token_ids, layout.num_draft_tokens)
        chains = [
            RequestChains([draft], [rows]) for draft, rows in zip(drafts, layout.padded_rows.tolist(), strict=True)
        ]
        if forks is not None:
            for index, several in forks.chains.items():
                chains[index] = several
        request_ids = runner.input_batch.req_ids[: len(states)]
        walk = Walk(chains, [runner.requests[request_id].output_token_ids for request_id in request_ids])
        logprobs: list[LogprobsTensors] = []
        width = layout.max_draft_tokens + 1
        try:
            for depth in range(width):
                if depth:
                    for processor in sampling_metadata.logitsprocs.all:
                        processor.update_state(None)
                self._draw(
                    [(index, state if index in walk.alive else None, depth, 1) for index, state in enumerate(states)]
                )
                rows = torch.tensor(walk.logits_rows(depth))
                output = self._sampler(logits=logits[rows], sampling_metadata=sampling_metadata)
                if output.logprobs_tensors is not None:
                    logprobs.append(output.logprobs_tensors)
                walk.advance(depth, output.sampled_token_ids.view(-1).tolist())
                if not walk.alive:
                    break
        finally:
            walk.restore()
        winners = {} if forks is None else {index: walk.winner(index) for index in forks.chains}
        emitted = [len(row) for row in walk.targets]
        return Drawn(walk.padded(width, logits.device), walk.targets, emitted, stacked(logprobs, width), winners)


class ObservedRejection:
    """vLLM's own rejection sampler; also reports to the proposers which drafts it accepted.

    Args:
        runner, steps, observe, request: as of :class:`CoupledVerifier`.
        stock: vLLM's rejection sampler.
    """

    def __init__(
        self,
        runner: Any,
        stock: Any,
        steps: Steps,
        observe: Callable[[Verified], None],
        request: Callable[[str], TrackedRequest] | None = None,
    ) -> None:
        self._runner = runner
        self._stock = stock
        self._steps = steps
        self._observe = observe
        self.request = request

    def __call__(self, metadata: Any, draft_probs: Any, logits: torch.Tensor, sampling_metadata: Any) -> SamplerOutput:
        """Verify a step; arguments and result are those of vLLM's rejection sampler."""
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
            # An ordinary step. vLLM's verifier fails if there is no draft and some request has a top_k.
            output = runner.sampler(logits=logits, sampling_metadata=sampling_metadata)
        kept = [[token for token in row if token != REJECTED] for row in output.sampled_token_ids.tolist()]
        emitted = [len(tokens) for tokens in kept]
        end_at_stops(runner, self.request, output.sampled_token_ids, kept, emitted)
        verified = Verified(runner.input_batch.req_ids[: len(kept)], _real_drafts(metadata), kept, emitted)
        self._steps.now.verified = verified = _settled(verified, prefilling.tolist())
        self._observe(verified)
        return output


def _walk_chains(forks: ForkedBatch, targets: list[int], drawn: Drawn, rows: torch.Tensor) -> None:
    """Replace the main chain's tokens by the winning chain's, for each request with side chains.

    Args:
        forks: forks of the step.
        targets: the target's token of every logits row.
        drawn: the tokens of main chains; changed in place.
        rows: ``[num_requests, max_draft_tokens + 1]`` logits row of each emitted token; changed in place.
    """
    for index, chains in forks.chains.items():
        logits_rows = chains.logits_rows
        winner, emitted = walk(chains.tokens, lambda chain, depth, of=logits_rows: targets[of[chain][depth]])  # type: ignore[misc]
        drawn.winners[index] = winner
        if winner:
            drawn.token_ids[index] = REJECTED
            drawn.token_ids[index, : len(emitted)] = torch.tensor(emitted, dtype=drawn.token_ids.dtype)
            drawn.num_emitted[index] = len(emitted)
            drawn.targets[index] = [targets[row] for row in logits_rows[winner]]
            rows[index, : len(emitted)] = torch.tensor(logits_rows[winner][: len(emitted)])


def _settled(verified: Verified, prefilling: Sequence[bool]) -> Verified:
    """``verified`` without the requests whose prompts are not complete, which emit nothing."""
    settled = [index for index, skip in enumerate(prefilling) if not skip]
    return Verified(
        [verified.request_ids[index] for index in settled],
        [verified.draft_token_ids[index] for index in settled],
        [verified.target_token_ids[index] for index in settled],
        [verified.num_emitted[index] for index in settled],
        num_unsettled=len(prefilling) - len(settled),
        further=[verified.further[index] for index in settled] if verified.further else [],
    )


def _is_active(processor: Any) -> bool:
    """Whether a logits processor may change some logits row now; a custom one always may."""
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
    """Each request's verified draft; placeholders (-1) of vLLM's scheduler are no draft."""
    drafts = _by_request(metadata.draft_token_ids, metadata.num_draft_tokens)
    return [draft if draft and draft[0] >= 0 else [] for draft in drafts]


def _by_request(flat: torch.Tensor, counts: Sequence[int]) -> list[list[int]]:
    """Split values ``[sum(counts)]`` into one list per request."""
    values, split, first = flat.tolist(), [], 0
    for count in counts:
        split.append(values[first : first + count])
        first += count
    return split


def _repeat_by_row(
    metadata: SamplingMetadata, of_row: torch.Tensor, prefixes: Sequence[tuple[int, list[int], int]]
) -> SamplingMetadata:
    """Repeat the sampling parameters of requests for their logits rows; draft tokens before a row count as output.

    Args:
        metadata: vLLM's sampling metadata, with one entry per request.
        of_row: ``[num_rows]`` batch row of each logits row's request.
        prefixes: the same rows as runs of (request, draft, first): ``first`` draft tokens precede the run's first row,
            and all of the draft precedes its last.
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
