"""Lets the audit act between a runner's logits and its tokens, on V1 and on V2.

The audit sees each step as an :class:`AuditedStep`, whose tokens it can draw any number of times with the runner's own
sampler and verifier. The audit then decides what the step emits and which drafts the next step verifies.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_specplug.hooks import seam_list, seams
from vllm_specplug.hooks.attached import drafter_of

TokenIds = NDArray[np.integer[Any]]
Emit = Callable[[torch.Tensor, "Sequence[Sequence[int]] | None"], TokenIds]


@dataclass(frozen=True)
class AuditedStep:
    """A step whose logits are computed and whose tokens are not drawn yet.

    Attributes:
        request_ids: ``[num_requests]``.
        num_drafts: ``[num_requests]`` number of draft tokens that are verified.
        is_partial: ``[num_requests]`` True if the prompt is not read to its end, so that nothing is emitted.
        logits: ``[sum(num_drafts + 1), vocab]`` of the target model, not processed yet.
        draft_probs: ``[sum(num_drafts), vocab]`` probabilities that draft tokens were drawn from; None if they were not
            drawn, or the verifier does not know the probabilities.
        emit: draws the step's tokens once more. Takes logits and the drafts of every request (None: the step's own
            drafts); returns the emitted tokens ``[num_requests, width]``, padded with -1.
    """

    request_ids: list[str]
    num_drafts: list[int]
    is_partial: list[bool]
    logits: torch.Tensor
    draft_probs: torch.Tensor | None
    emit: Emit


OnStep = Callable[[AuditedStep], "Sequence[Sequence[int]] | None"]
"""Takes a step; returns the tokens that each request emits, or None to emit what the runner draws."""
DraftsOf = Callable[[str], Sequence[int]]
"""Takes a request id; returns that request's draft for the next step."""


class V1:
    """Replaces the sampling of vLLM's V1 model runner.

    Args:
        runner: the model runner.
        on_step: called with every step.
        drafts_of: the drafts that the next step verifies; None keeps the drafter's own.
    """

    def __init__(self, runner: Any, on_step: OnStep, drafts_of: DraftsOf | None = None) -> None:
        self._runner = runner
        self._on_step = on_step
        self._drafts_of = drafts_of
        self._sample = runner._sample
        self._take = runner.take_draft_token_ids
        runner._sample = self.sample
        if drafts_of is not None:
            runner.take_draft_token_ids = self.take_draft_token_ids

    def detach(self) -> None:
        """Put the runner's own methods back."""
        self._runner._sample = self._sample
        self._runner.take_draft_token_ids = self._take

    def take_draft_token_ids(self) -> Any:
        """Replaces the runner's method: the audit's drafts for the next step, whatever the drafter proposed."""
        from vllm.v1.outputs import DraftTokenIds

        assert self._drafts_of is not None
        self._take()
        ids = list(self._runner.input_batch.req_ids)
        return DraftTokenIds(ids, [list(self._drafts_of(each)) for each in ids])

    def sample(self, logits: torch.Tensor, metadata: Any) -> Any:
        """Replaces the runner's method: show the step to the audit, then emit what the audit wants."""
        runner = self._runner
        ids = list(runner.input_batch.req_ids)
        counts = [0] * len(ids) if metadata is None else list(metadata.num_draft_tokens)
        probs = None
        if metadata is not None and metadata.max_spec_len:
            probs = runner._get_spec_decode_draft_probs(metadata)

        def emit(rows: torch.Tensor, drafts: Sequence[Sequence[int]] | None) -> TokenIds:
            chosen = metadata
            if drafts is not None and metadata is not None:
                given = metadata.draft_token_ids
                flat = torch.tensor([token for each in drafts for token in each], dtype=given.dtype)
                chosen = replace(metadata, draft_token_ids=flat.to(given.device))
            return self._sample(rows.clone(), chosen).sampled_token_ids.cpu().numpy()  # type: ignore[no-any-return]

        partial = runner.discard_request_mask.np[: len(ids)].tolist()
        with self._unobserved():
            wanted = self._on_step(AuditedStep(ids, counts, partial, logits, probs, emit))
        output = self._sample(logits, metadata)
        if wanted is None:
            return output
        tokens = torch.full_like(output.sampled_token_ids, -1)
        for index, each in enumerate(wanted):
            tokens[index, : len(each)] = torch.tensor(each, dtype=tokens.dtype)
        return replace(output, sampled_token_ids=tokens)

    @contextlib.contextmanager
    def _unobserved(self) -> Iterator[None]:
        """Keep our proposers from learning from the audit's draws, and those draws from ending at a stop token."""
        attached = drafter_of(self._runner)
        if attached is None:
            yield
            return
        observe, request = attached.drafting.observe, attached.verifier.request
        attached.drafting.observe = lambda verified: None
        attached.verifier.request = None
        try:
            yield
        finally:
            attached.drafting.observe, attached.verifier.request = observe, request


class V2:
    """Replaces the sampling of Model Runner V2. Its noise follows from seed and position: every draw gets fresh seeds.

    Args:
        runner: the model runner.
        on_step: called with every step.
        drafts_of: the drafts that the next step verifies; None keeps the drafter's own.
        seed: seed of the generator that makes the fresh seeds.
    """

    def __init__(self, runner: Any, on_step: OnStep, drafts_of: DraftsOf | None = None, seed: int = 0) -> None:
        self._runner = runner
        self._on_step = on_step
        self._drafts_of = drafts_of
        self._sample = runner.sample
        self._take = runner.take_draft_token_ids
        self._set = runner.draft_tokens_handler.set_draft_tokens
        self._generator = torch.Generator().manual_seed(seed)
        runner.sample = self.sample
        if drafts_of is not None:
            runner.draft_tokens_handler.set_draft_tokens = self.set_draft_tokens
            runner.take_draft_token_ids = self.take_draft_token_ids

    def detach(self) -> None:
        """Put the runner's own methods back."""
        self._runner.sample = self._sample
        self._runner.take_draft_token_ids = self._take
        self._runner.draft_tokens_handler.set_draft_tokens = self._set

    def take_draft_token_ids(self) -> Any:
        """Replaces the runner's method: the audit's drafts, for a scheduler that waits for them."""
        from vllm.v1.outputs import DraftTokenIds

        assert self._drafts_of is not None
        taken = self._take()
        if taken is None:
            return None
        return DraftTokenIds(taken.req_ids, [list(self._drafts_of(each)) for each in taken.req_ids])

    def set_draft_tokens(self, input_batch: Any, draft_tokens: torch.Tensor) -> None:
        """Put the audit's drafts into the table from which the runner reads those of the next step."""
        assert self._drafts_of is not None
        drafts = [list(self._drafts_of(each)) for each in input_batch.req_ids]
        planted = torch.full(draft_tokens.shape, -1, dtype=draft_tokens.dtype)
        for index, each in enumerate(drafts):
            planted[index, : len(each)] = torch.tensor(each[: planted.shape[1]], dtype=planted.dtype)
        planted = planted.to(draft_tokens.device)
        self._runner.req_states.draft_tokens[input_batch.idx_mapping, : planted.shape[1]] = planted
        self._set(input_batch, planted)

    def sample(self, hidden_states: torch.Tensor, input_batch: Any, grammar_output: Any) -> Any:
        """Replaces the runner's method: show the step to the audit, then emit what the audit wants."""
        runner = self._runner
        logits = runner.model.compute_logits(hidden_states[input_batch.logits_indices])
        bounds = input_batch.cu_num_logits.tolist()
        ids = list(input_batch.req_ids)
        counts = [end - start - 1 for start, end in itertools.pairwise(bounds)]
        _, num_sampled, _ = self._sample(hidden_states, input_batch, grammar_output)

        def emit(rows: torch.Tensor, drafts: Sequence[Sequence[int]] | None) -> TokenIds:
            with self._given(rows, input_batch, counts, drafts):
                output, num, _ = self._sample(hidden_states, input_batch, grammar_output)
            tokens = output.sampled_token_ids.cpu().numpy().copy()
            tokens[np.arange(tokens.shape[1])[None, :] >= num.cpu().numpy()[:, None]] = -1
            return tokens  # type: ignore[no-any-return]

        partial = (num_sampled == 0).tolist()
        wanted = self._on_step(AuditedStep(ids, counts, partial, logits, self._draft_probs(input_batch, counts), emit))
        output, num_sampled, num_rejected = self._sample(hidden_states, input_batch, grammar_output)
        if wanted is None:
            return output, num_sampled, num_rejected
        tokens = output.sampled_token_ids.clone()
        num = [0 if is_partial else len(each) for each, is_partial in zip(wanted, partial, strict=True)]
        for index, each in enumerate(wanted):
            tokens[index, : len(each)] = torch.tensor(each, dtype=tokens.dtype)
        rejected = [
            0 if is_partial else count + 1 - n for count, n, is_partial in zip(counts, num, partial, strict=True)
        ]
        num_sampled, num_rejected = (
            torch.tensor(each, dtype=like.dtype, device=like.device)
            for each, like in ((num, num_sampled), (rejected, num_rejected))
        )
        output = replace(output, sampled_token_ids=tokens, num_sampled=num_sampled, num_rejected=num_rejected)
        return output, num_sampled, num_rejected

    def _draft_probs(self, input_batch: Any, counts: Sequence[int]) -> torch.Tensor | None:
        runner = self._runner
        draft_logits = getattr(runner.speculator, "draft_logits", None)
        if draft_logits is None or not any(counts):
            return None
        # vLLM keeps the draft model's logits before temperature.
        temperature = runner.sampler.sampling_states.temperature.gpu
        rows = []
        for index, count in zip(input_batch.idx_mapping.tolist(), counts, strict=True):
            rows.append(torch.softmax(draft_logits[index, :count].double() / temperature[index], dim=-1))
        return torch.cat(rows)

    @contextlib.contextmanager
    def _given(
        self,
        rows: torch.Tensor,
        input_batch: Any,
        counts: Sequence[int],
        drafts: Sequence[Sequence[int]] | None,
    ) -> Iterator[None]:
        """Let the runner's sampling use these logits, these drafts and fresh seeds for one draw."""
        model, input_ids = self._runner.model, input_batch.input_ids
        seeds = self._runner.sampler.sampling_states.seeds.gpu
        kept_ids, kept_seeds = input_ids.clone(), seeds.clone()
        model.compute_logits = lambda *_, **__: rows.clone()
        fresh = torch.randint(0, 2**62, seeds.shape, generator=self._generator, dtype=torch.int64)
        seeds.copy_(fresh)
        if drafts is not None and any(counts):
            is_draft = torch.tensor([depth > 0 for count in counts for depth in range(count + 1)])
            at = input_batch.logits_indices[: len(is_draft)][is_draft.to(input_batch.logits_indices.device)]
            flat = torch.tensor([token for each in drafts for token in each], dtype=input_ids.dtype)
            input_ids[at] = flat.to(input_ids.device)
        try:
            yield
        finally:
            del model.compute_logits
            input_ids.copy_(kept_ids)
            seeds.copy_(kept_seeds)


def is_v2(runner: Any) -> bool:
    """Whether ``runner`` is Model Runner V2."""
    return any("worker.gpu." in each.__module__ for each in type(runner).__mro__)  # also of its subclass for CPUs


def between(runner: Any, on_step: OnStep, drafts_of: DraftsOf | None = None, seed: int = 0) -> V1 | V2:
    """Attach the audit to ``runner``, V1 or V2. Only V2 uses ``seed``: V1 draws from its own random generators."""
    seams.check(seam_list.AUDIT_V2_USED if is_v2(runner) else seam_list.AUDIT_V1_USED)
    return V2(runner, on_step, drafts_of, seed) if is_v2(runner) else V1(runner, on_step, drafts_of)
