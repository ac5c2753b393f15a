"""Inside the engine: draw many times from one step's logits, through whatever verifier is at work.

One real step of the engine is enough for any number of draws: the runner's own method that turns logits into tokens is
called again and again with the same logits, fresh randomness each time, and what it emits is counted by place. Then the
step goes on with tokens that the audit chooses, so that all requests stay alike and the next step's context is known.

Draft tokens at a place are fixed (the likeliest token, which is often right, and an unlikely one, which is not), or,
where the drafter hands over the distribution that it drew from, drawn from it anew each time, as the classic rule
needs. The logits of all rows stay as they are, so that every place has one known target distribution.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

STEP_SECONDS = 10.0
"""Longest that one engine step is held up for draws."""
NO_DRAFT, VERIFY, AFTER = "no draft", "verify", "after a rejection"


@dataclass
class Place:
    """What was emitted at one place.

    Attributes:
        counts: ``[vocab]``.
        missing: times that nothing was emitted where something had to be.
        accepted: times that the draft token there was.
        biased: ``[vocab]`` the same as ``counts`` with some rejected draft tokens accepted: what a wrong verifier
            would have emitted.
        row: ``[vocab]`` target logits, of the first time.
        accept_chance: that of the draft token there; None where there is none.
    """

    counts: NDArray[np.int64]
    biased: NDArray[np.int64]
    row: NDArray[np.float32]
    missing: int = 0
    accepted: int = 0
    accept_chance: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain types, counts as pairs of token and count."""

        def pairs(counts: NDArray[np.int64]) -> list[list[int]]:
            seen = np.flatnonzero(counts)
            return np.stack([seen, counts[seen]], axis=1).tolist()  # type: ignore[no-any-return]

        return {
            "counts": pairs(self.counts),
            "biased": pairs(self.biased),
            "row": self.row.tolist(),
            "missing": self.missing,
            "accepted": self.accepted,
            "accept_chance": self.accept_chance,
        }


@dataclass
class Plan:
    """What requests of this context do, all of them the same.

    Attributes:
        draws: at each stage, by its name.
        temperature: of the requests.
        first: token emitted after the prompt.
        drafts: ``[k]`` draft tokens of the step behind it; empty without speculation.
        unlikely: draft token that stands in place of the first of them in every other draw.
        num_accepted: draft tokens that the audit lets through in that step.
        replacement: token emitted behind them.
        bias: share of rejected draft tokens that the imagined wrong verifier accepts.
    """

    draws: dict[str, int]
    temperature: float
    first: int
    drafts: list[int]
    unlikely: int
    num_accepted: int
    replacement: int
    bias: float


@dataclass
class _Rows:
    """One request's rows in the logits of a step."""

    index: int
    stage: str
    start: int
    num_drafts: int
    is_unlikely: bool = False
    is_done: bool = False
    drafts: list[int] = field(default_factory=list)


class Auditor:
    """Stands between the runner's logits and its tokens while a context is audited.

    Args:
        runner: vLLM's V1 model runner.
        plan: of the context.
        fixed: target logits by stage and depth, from the first step on that saw them: every later draw uses the same.
    """

    def __init__(self, runner: Any, plan: Plan, fixed: dict[tuple[str, int], torch.Tensor]) -> None:
        self._runner = runner
        self._plan = plan
        self._fixed = fixed
        self._sample = runner._sample
        self._take = runner.take_draft_token_ids
        self._random = np.random.default_rng(0)
        self._generator = torch.Generator().manual_seed(0)
        self.places: dict[str, Place] = {}
        self.drawn: dict[str, int] = {}
        self.is_redrawn = False
        self._turn = 0
        runner._sample = self.sample
        runner.take_draft_token_ids = self.take_draft_token_ids

    def stop(self) -> None:
        """Leave the runner as it was."""
        self._runner._sample = self._sample
        self._runner.take_draft_token_ids = self._take

    # What the runner calls

    def take_draft_token_ids(self) -> Any:
        """The drafts of the next step: the plan's, whatever the drafter proposed."""
        from vllm.v1.outputs import DraftTokenIds

        self._take()
        if not self._plan.drafts:
            return None
        ids = list(self._runner.input_batch.req_ids)
        drafts = []
        for request_id in ids:
            stage = self._stage(request_id)
            drafts.append(self._plan.drafts if stage == VERIFY else self._plan.drafts[:1])
        return DraftTokenIds(ids, drafts)

    def sample(self, logits: torch.Tensor, metadata: Any) -> Any:
        """The runner's tokens of a step: many draws first, then those that the plan wants."""
        runner = self._runner
        request_ids = runner.input_batch.req_ids
        prefilling = runner.discard_request_mask.np[: len(request_ids)]
        counts = [0] * len(request_ids) if metadata is None else list(metadata.num_draft_tokens)
        rows, start = [], 0
        for index, (request_id, count) in enumerate(zip(request_ids, counts, strict=True)):
            stage = self._stage(request_id)
            if stage == VERIFY and self._plan.drafts and count == 0:
                stage = ""  # whatever this step is, it does not verify
            row = _Rows(index, stage, start, count)
            row.is_done = bool(prefilling[index]) or not stage
            rows.append(row)
            start += count + 1
        self._draw(logits, metadata, rows)
        output = self._sample(logits, metadata)
        return replace(output, sampled_token_ids=self._wanted(output.sampled_token_ids, rows))

    # How it is done

    def _stage(self, request_id: str) -> str:
        num_outputs = len(self._runner.requests[request_id].output_token_ids)
        stages = {0: NO_DRAFT, 1: VERIFY, 1 + self._plan.num_accepted + 1: AFTER}
        if not self._plan.drafts:
            return NO_DRAFT
        return stages.get(num_outputs, "")

    def _wanted(self, sampled: torch.Tensor, rows: Sequence[_Rows]) -> torch.Tensor:
        plan = self._plan
        wanted = torch.full_like(sampled, -1)
        for row in rows:
            emitted = [plan.first]
            if row.stage == VERIFY and plan.drafts:
                emitted = [*plan.drafts[: plan.num_accepted], plan.replacement]
            wanted[row.index, : len(emitted)] = torch.tensor(emitted, dtype=sampled.dtype)
        return wanted

    def _draw(self, logits: torch.Tensor, metadata: Any, rows: Sequence[_Rows]) -> None:
        plan, deadline = self._plan, time.monotonic() + STEP_SECONDS
        logits = logits.clone()
        for row in rows:
            if row.stage and not row.is_done:
                for depth in range(row.num_drafts + 1):
                    at = row.start + depth
                    logits[at] = self._fixed.setdefault((row.stage, depth), logits[at].clone())
        probs = None
        if metadata is not None and metadata.max_spec_len:
            probs = self._runner._get_spec_decode_draft_probs(metadata)
            self.is_redrawn |= probs is not None
        attached = getattr(self._runner, "_specplug", None)
        observe = None if attached is None else attached.drafting.observe
        if attached is not None:
            attached.drafting.observe = lambda verified: None  # these draws are not what anybody should learn from
        try:
            while time.monotonic() < deadline:
                active = [
                    row for row in rows if not row.is_done and self.drawn.get(row.stage, 0) < plan.draws[row.stage]
                ]
                if not active:
                    break
                self._turn += 1
                for row in rows:
                    row.is_unlikely = probs is None and row.stage == VERIFY and (row.index + self._turn) % 2 == 1
                drafts, chosen = self._drafts(metadata, rows, probs)
                output = self._sample(logits.clone(), chosen)
                tokens = output.sampled_token_ids.cpu().numpy()
                self._count(active, tokens, drafts, logits, probs)
        finally:
            if attached is not None:
                attached.drafting.observe = observe

    def _drafts(self, metadata: Any, rows: Sequence[_Rows], probs: torch.Tensor | None) -> tuple[list[list[int]], Any]:
        """Draft tokens of each request, and metadata that hold them."""
        if metadata is None or not metadata.max_spec_len:
            return [[] for _ in rows], metadata
        if probs is not None:
            flat = torch.multinomial(probs.cpu(), 1, generator=self._generator)[:, 0]
        else:
            plan = self._plan
            made: list[int] = []
            for row in rows:
                drafts = plan.drafts[: row.num_drafts] + plan.drafts[-1:] * (row.num_drafts - len(plan.drafts))
                made += [plan.unlikely, *drafts[1:]] if row.is_unlikely else drafts
            flat = torch.tensor(made)
        given = metadata.draft_token_ids
        split, first = [], 0
        for row in rows:
            split.append(flat[first : first + row.num_drafts].tolist())
            first += row.num_drafts
        return split, replace(metadata, draft_token_ids=flat.to(given.device, given.dtype))

    def _count(
        self,
        active: Sequence[_Rows],
        tokens: NDArray[np.integer[Any]],
        drafts: Sequence[Sequence[int]],
        logits: torch.Tensor,
        probs: torch.Tensor | None,
    ) -> None:
        plan = self._plan
        by_group: dict[tuple[str, bool], list[_Rows]] = {}
        for row in active:
            by_group.setdefault((row.stage, row.is_unlikely), []).append(row)
        for (stage, is_unlikely), group in by_group.items():
            self.drawn[stage] = self.drawn.get(stage, 0) + len(group)
            depths = 1
            if stage == VERIFY and plan.drafts and not is_unlikely:
                depths = min(row.num_drafts for row in group) + 1
            emitted = tokens[[row.index for row in group]]
            drafted = np.array([list(drafts[row.index])[: depths + 1] for row in group]).reshape(len(group), -1)
            reached = np.ones(len(group), dtype=bool)
            for depth in range(depths):
                place = self._place(stage, is_unlikely, depth, depths, group[0], logits, drafts, probs)
                here = emitted[reached, depth]
                place.missing += int((here < 0).sum())
                np.add.at(place.counts, here[here >= 0], 1)
                if depth >= drafted.shape[1]:
                    np.add.at(place.biased, here[here >= 0], 1)
                    break
                mine = drafted[reached, depth]
                place.accepted += int((here == mine).sum())
                wrong = np.where(self._random.random(len(here)) < plan.bias, mine, here)
                np.add.at(place.biased, wrong[here >= 0], 1)
                # No verifier replaces a draft token by itself: what is equal was accepted.
                reached = reached & (emitted[:, depth] == drafted[:, depth])

    def _place(
        self,
        stage: str,
        is_unlikely: bool,
        depth: int,
        depths: int,
        row: _Rows,
        logits: torch.Tensor,
        drafts: Sequence[Sequence[int]],
        probs: torch.Tensor | None,
    ) -> Place:
        name = self.name_of(stage, is_unlikely, depth, depths)
        place = self.places.get(name)
        if place is None:
            target = logits[row.start + depth].float().cpu()
            vocab = len(target)
            place = Place(np.zeros(vocab, np.int64), np.zeros(vocab, np.int64), target.numpy().copy())
            if depth < row.num_drafts:
                wanted = torch.softmax(target.double() / self._plan.temperature, dim=-1)
                if probs is None:
                    place.accept_chance = float(wanted[drafts[row.index][depth]])
                else:
                    # Rows before this request hold as many drafts fewer as there are requests before it.
                    draft = probs[row.start - row.index + depth].double().cpu()
                    place.accept_chance = float(torch.minimum(wanted, draft).sum())
            self.places[name] = place
        return place

    @staticmethod
    def name_of(stage: str, is_unlikely: bool, depth: int, depths: int) -> str:
        """A place in words."""
        if stage != VERIFY or (depths == 1 and not is_unlikely):
            return stage
        if is_unlikely:
            return "draft 1, unlikely token"
        return "bonus" if depth == depths - 1 else f"draft {depth + 1}"


class AuditExtension:
    """Mixed into vLLM's worker by ``worker_extension_cls``: methods for ``collective_rpc``."""

    model_runner: Any
    _auditor: Auditor | None = None
    _fixed: dict[tuple[str, int], torch.Tensor]
    _captured: dict[int, NDArray[np.float32]]
    _release: Callable[[], None]

    def audit_about(self) -> dict[str, Any]:
        """What kind of engine this is."""
        runner = self.model_runner
        config = runner.vllm_config
        settings = config.additional_config
        return {
            "runner": "V2" if "worker.gpu." in type(runner).__module__ else "V1",
            "device": str(runner.device.type),
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "vocab_size": int(config.model_config.get_vocab_size()),
            "max_model_len": int(config.model_config.max_model_len),
            "max_num_seqs": int(config.scheduler_config.max_num_seqs),
            "num_speculative_tokens": 0
            if config.speculative_config is None
            else int(config.speculative_config.num_speculative_tokens),
            "async_scheduling": bool(config.scheduler_config.async_scheduling),
            "settings": settings.get("specplug") if isinstance(settings, dict) else None,
        }

    def audit_begin(self, plan: dict[str, Any], is_new: bool) -> None:
        """From here on all requests are this plan's; ``is_new`` unless an earlier plan was of the same context."""
        if is_new:
            self._fixed = {}
        self._auditor = Auditor(self.model_runner, Plan(**plan), self._fixed)

    def audit_take(self) -> dict[str, Any]:
        """What was counted, and the end of it."""
        auditor = self._auditor
        assert auditor is not None
        auditor.stop()
        self._auditor = None
        return {
            "places": {name: place.to_dict() for name, place in auditor.places.items()},
            "drawn": auditor.drawn,
            "is_redrawn": auditor.is_redrawn,
        }

    def capture_begin(self) -> None:
        """Keep the target logits of each request's first token from here on, by the number that its id starts with."""
        runner = self.model_runner
        self._captured = {}
        captured = self._captured
        original: Callable[..., Any] = runner._sample

        def sample(logits: torch.Tensor, metadata: Any) -> Any:
            request_ids = runner.input_batch.req_ids
            prefilling = runner.discard_request_mask.np[: len(request_ids)]
            counts = [0] * len(request_ids) if metadata is None else metadata.num_draft_tokens
            end = 0
            for index, request_id in enumerate(request_ids):
                end += counts[index] + 1
                if not prefilling[index] and not runner.requests[request_id].output_token_ids:
                    number = int(request_id.partition("/")[2].partition("-")[0])
                    captured[number] = logits[end - 1].float().cpu().numpy().copy()
            return original(logits, metadata)

        runner._sample = sample
        self._release = lambda: setattr(runner, "_sample", original)

    def capture_scores(self, tokens: list[int], temperature: float) -> list[float]:
        """End of capturing: the chance of ``tokens[i]`` as first token of request ``i``."""
        self._release()
        chances = []
        for number, token in enumerate(tokens):
            row = torch.from_numpy(self._captured[number]).double() / temperature
            chances.append(float(torch.softmax(row, dim=-1)[token]))
        return chances

    def capture_rows(self) -> list[list[float]]:
        """End of capturing: the logits of each request's first token, ``[num_requests][vocab]``."""
        self._release()
        return [self._captured[number].tolist() for number in sorted(self._captured)]
