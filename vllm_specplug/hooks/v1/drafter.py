"""Our drafter on vLLM's V1 runner."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from vllm.distributed.parallel_state import get_tp_group
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from vllm_specplug.drafting.drafting import Drafting
from vllm_specplug.drafting.requests import TrackedRequest
from vllm_specplug.hooks.attached import at_end, attach, beside_native, log_start, proposer_context
from vllm_specplug.hooks.marks import is_ours
from vllm_specplug.hooks.metrics import publish_metrics
from vllm_specplug.hooks.v1 import forks as v1_forks
from vllm_specplug.hooks.v1.native import places_of, share_noise
from vllm_specplug.hooks.v1.step import Steps
from vllm_specplug.hooks.v1.verifier import CoupledVerifier, ObservedRejection
from vllm_specplug.proposers.base import TargetNoise, Verified
from vllm_specplug.proposers.comb import Places
from vllm_specplug.settings.model import Settings, settings_of


class Drafter:
    """Holds the plugin's state in a runner: the proposers, the verifier, and the step under way.

    vLLM's runner builds a ``Drafter`` for ``"method": "custom_class"``. Beside one of vLLM's own drafters the plugin
    builds it itself; then it verifies that drafter's drafts, and its proposers, if there are any, add their own.

    Args:
        vllm_config: vLLM's configuration; the plugin's settings are in its ``additional_config``.
    """

    def __init__(self, vllm_config: Any) -> None:
        settings = settings_of(vllm_config.additional_config)
        assert settings is not None  # put there when the configuration was built
        config = vllm_config.speculative_config
        takes_part = not is_ours(config) and (settings.host_proposers or settings.forks_native(config))
        self.settings: Settings = settings
        context = proposer_context(vllm_config, settings)
        self.drafting = Drafting(
            settings,
            context,
            native=config.method if takes_part else None,
            can_shorten=can_shorten(vllm_config),
        )
        self.num_speculative_tokens = context.num_speculative_tokens
        self.max_model_len = context.max_model_len
        self.steps = Steps()
        self.verifier: CoupledVerifier | ObservedRejection | None = None
        self.forks: v1_forks.ForkedRows | None = None
        self.plain_layout: SpecDecodeMetadata | None = None  # of the latest step without drafts
        self._runner: Any = None
        self._requests: dict[str, TrackedRequest] = {}

    def load_model(self, *_: Any, **__: Any) -> None:
        """Does nothing: vLLM's CPU runner asks every drafter to load its model, and this one has none."""

    def attach(self, runner: Any) -> None:
        """Give the runner its verifier, warm up, and log what is active. Called once the runner can serve."""
        if runner.drafter is self:
            # vLLM drops the drafts of all requests once one is within k tokens of max_model_len. propose() limits the
            # draft of each request, so that this rule is not needed.
            runner.effective_drafter_max_model_len = self.max_model_len + self.num_speculative_tokens + 1
        start = time.perf_counter()
        if self.settings.is_coupled:
            self.forks = v1_forks.attach(runner, self.steps)
            self.verifier = CoupledVerifier(runner, self.settings, self.steps, self.forks, self._observe, self._request)
            num_places = 1 if self.forks is None else self.settings.num_chains
            share_noise(runner.drafter, self.verifier, self.steps, num_places)
        else:
            self.verifier = ObservedRejection(
                runner, runner.rejection_sampler, self.steps, self._observe, self._request
            )
        runner.rejection_sampler = self.verifier
        attach(runner, self)
        self._runner = runner
        self.drafting.warm_up()
        at_end(self.drafting.close)
        if get_tp_group().rank_in_group == 0:
            publish_metrics(lambda: self.snapshot(is_fresh=False), runner.vllm_config)
        log_start("V1", self.settings, self._role(runner, time.perf_counter() - start))

    def _role(self, runner: Any, warm_up_s: float) -> str:
        """The end of the start-up line: which drafter is at work."""
        if runner.drafter is self:
            return (
                f", proposers: {self.drafting.describe()}; up to {self.num_speculative_tokens} draft tokens "
                f"(warm-up {warm_up_s:.1f} s)"
            )
        joined = f", joined by {self.drafting.describe()}" if self.settings.host_proposers else ""
        chains = f", up to {self.settings.num_chains} chains a request" if self.drafting.native and self.forks else ""
        return beside_native(runner.vllm_config.speculative_config) + joined + chains

    def _observe(self, verified: Verified) -> None:
        self.drafting.observe(verified)

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: np.ndarray[Any, Any],
        token_ids_cpu: np.ndarray[Any, Any],
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Drafts of all requests of the batch. vLLM calls it after each step with its own tables.

        Args:
            sampled_token_ids: tokens that each request emitted in this step, empty during prefill.
            num_tokens_no_spec: ``[max_num_reqs]`` tokens so far, the new ones included.
            token_ids_cpu: ``[max_num_reqs, max_model_len]`` token ids so far.
            slot_mappings: not used.
        """
        rows = [row for row, emitted in enumerate(sampled_token_ids) if emitted]
        drafts: list[list[int]] = [[] for _ in sampled_token_ids]
        for row, draft in zip(rows, self.draft(rows, num_tokens_no_spec, token_ids_cpu), strict=True):
            drafts[row] = draft
        return drafts

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
            rows: table rows of these requests.
            num_tokens: ``[max_num_reqs]`` tokens so far, the new ones included.
            token_ids: ``[max_num_reqs, max_model_len]`` token ids so far.
            native: ``[len(rows), num_speculative_tokens]`` drafts of vLLM's own drafter, padded with -1.
            places: runners-up of those drafts.
        """
        req_ids = self._runner.input_batch.req_ids
        requests = [self._request(req_ids[row]) for row in rows]
        index = np.array(rows, dtype=np.int64)
        verifier = self.verifier

        def noise(chosen: Sequence[int], width: int) -> TargetNoise:
            assert isinstance(verifier, CoupledVerifier)
            return verifier.target_noise([requests[i] for i in chosen], width)

        proposal = self.drafting.propose(
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
        self.steps.now.proposal = proposal
        return proposal.drafts

    def join(self, proposed: Any) -> Any:
        """Replace each draft of vLLM's drafter (its DraftTokenIds, or None) by ours if ours promises more."""
        if not self.drafting.has_proposers:
            return proposed
        input_batch = self._runner.input_batch
        k = self.num_speculative_tokens
        theirs = {} if proposed is None else dict(zip(proposed.req_ids, proposed.draft_token_ids, strict=True))
        step = self.steps.now
        emitting = () if step.verified is None or step.proposal is not None else step.verified.request_ids
        rows = [row for request_id in emitting if (row := input_batch.req_id_to_index.get(request_id)) is not None]
        native = np.full((len(rows), k), -1, dtype=np.int32)
        for index, row in enumerate(rows):
            draft = theirs.get(input_batch.req_ids[row], ())
            native[index, : len(draft)] = draft
        places = places_of(step, rows, k)
        drafts = self.draft(rows, input_batch.num_tokens_no_spec, input_batch.token_ids_cpu, native, places)
        for row, draft in zip(rows, drafts, strict=True):
            theirs[input_batch.req_ids[row]] = draft
        return DraftTokenIds(list(theirs), list(theirs.values()))

    def finish(self, request_id: str) -> None:
        """Drop all state of a request that the engine has dropped."""
        self.go_on(request_id)
        if isinstance(self.verifier, CoupledVerifier):
            self.verifier.finish(request_id)

    def go_on(self, request_id: str) -> None:
        """Drop what drafting holds of a streaming-input session that goes on: its outputs are part of a new prompt."""
        self._requests.pop(request_id, None)
        self.drafting.finish([request_id])

    def snapshot(self, is_fresh: bool = True) -> dict[str, Any]:
        """Counters of this worker and its number of live requests; ``is_fresh`` is that of ``Drafting.snapshot``."""
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


def can_shorten(vllm_config: Any) -> bool:
    """Whether drafts may be shortened to what pays: not under torchrun with several ranks per model.

    There each rank schedules by itself and drafts must be equally long, but the decision rests on measured times, which
    differ from rank to rank.
    """
    parallel_config = vllm_config.parallel_config
    ranks = int(parallel_config.tensor_parallel_size) * int(parallel_config.pipeline_parallel_size)
    return ranks == 1 or str(parallel_config.distributed_executor_backend) != "external_launcher"
