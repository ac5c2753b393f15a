"""The audit inside the engine: draws many times from one step's logits, through whatever verifier is at work.

One real step of the engine is enough for any number of draws: the runner's own method that turns logits into tokens is
called again and again with the same logits and fresh randomness, and the tokens that it emits are counted by place.
Then the step goes on with tokens that the audit chooses, so that all requests stay alike and the next step's context is
known.

The draft tokens are fixed: the likeliest token, which is often accepted, or an unlikely one, which is not. But if the
drafter hands over the distribution that it draws from, as vLLM's rejection sampler needs it, they are drawn from it
anew for every draw. The logits of all rows stay as they are, so that every place has one known target distribution.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_specplug.hooks.audit_steps import AuditedStep, between, is_v2
from vllm_specplug.measure.audit.places import AFTER, NO_DRAFT, VERIFY, name_of

STEP_SECONDS = 10.0
"""Most seconds that one engine step is held up for draws."""


@dataclass
class Place:
    """Counts of one place.

    Attributes:
        counts: ``[vocab]`` how often every token was emitted.
        missing: how often no token was emitted although one had to be.
        accepted: how often the draft token was accepted.
        biased: ``[vocab]`` counts of an imagined wrong verifier, which accepts some of the rejected draft tokens.
        row: ``[vocab]`` target logits.
        accept_chance: probability that the draft token is accepted; None if the place has no draft token.
    """

    counts: NDArray[np.int64]
    biased: NDArray[np.int64]
    row: NDArray[np.float32]
    missing: int = 0
    accepted: int = 0
    accept_chance: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The place in plain types, counts as pairs of token and count."""

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
    """The course of all requests of one context.

    Attributes:
        draws: number of draws by the name of the stage.
        temperature: temperature of the requests.
        first: the token that is emitted after the prompt.
        drafts: ``[k]`` draft tokens of the next step; empty without speculation.
        unlikely: draft token that takes the place of the first one in every other draw.
        num_accepted: number of draft tokens that are emitted in that step.
        replacement: the token that is emitted behind them.
        bias: share of rejected draft tokens that the imagined wrong verifier accepts.
        seed: seed of the audit's own draws, another one for every wave of requests, lest draws repeat.
    """

    draws: dict[str, int]
    temperature: float
    first: int
    drafts: list[int]
    unlikely: int
    num_accepted: int
    replacement: int
    bias: float
    seed: int


@dataclass
class _Rows:
    """One request's rows in the logits of a step."""

    index: int
    stage: str
    start: int
    num_drafts: int
    is_unlikely: bool = False
    is_done: bool = False


class Auditor:
    """Takes the place of the runner's sampling while a context is audited.

    Args:
        runner: vLLM's model runner.
        plan: plan of the context.
        fixed: ``[vocab]`` target logits by stage and depth. The first step adds them, and all later draws use them.
    """

    def __init__(self, runner: Any, plan: Plan, fixed: dict[tuple[str, int], torch.Tensor]) -> None:
        self._plan = plan
        self._fixed = fixed
        self._num_emitted: dict[str, int] = {}
        self._random = np.random.default_rng(plan.seed)
        self._generator = torch.Generator().manual_seed(plan.seed)
        self.places: dict[str, Place] = {}
        self.drawn: dict[str, int] = {}
        self.is_redrawn = False
        self._turn = 0
        self._between = between(runner, self.on_step, self.drafts_of if plan.drafts else None, plan.seed)

    def stop(self) -> None:
        """Give the runner its own sampling back."""
        self._between.detach()

    def drafts_of(self, request_id: str) -> list[int]:
        """The draft of a request for the next step: the plan's, whatever the drafter proposed."""
        return self._plan.drafts if self._stage(request_id) == VERIFY else self._plan.drafts[:1]

    def on_step(self, step: AuditedStep) -> list[list[int]]:
        """Draw many times from a step's logits; returns the tokens that the plan emits for every request."""
        plan = self._plan
        rows, wanted, start = [], [], 0
        for index, request_id in enumerate(step.request_ids):
            count, stage = step.num_drafts[index], self._stage(request_id)
            if stage == VERIFY and plan.drafts and count == 0:
                stage = ""  # without its draft, the step is of no stage
            row = _Rows(index, stage, start, count)
            row.is_done = step.is_partial[index] or not stage
            rows.append(row)
            start += count + 1
            emitted = [plan.first]
            if stage == VERIFY and plan.drafts:
                emitted = [*plan.drafts[: plan.num_accepted], plan.replacement]
            wanted.append(emitted)
        self._draw(step, rows)
        for index, request_id in enumerate(step.request_ids):
            if not step.is_partial[index]:
                self._num_emitted[request_id] = self._num_emitted.get(request_id, 0) + len(wanted[index])
        return wanted

    def _stage(self, request_id: str) -> str:
        if not self._plan.drafts:
            return NO_DRAFT
        stages = {0: NO_DRAFT, 1: VERIFY, 1 + self._plan.num_accepted + 1: AFTER}
        return stages.get(self._num_emitted.get(request_id, 0), "")

    def _draw(self, step: AuditedStep, rows: Sequence[_Rows]) -> None:
        plan, deadline = self._plan, time.monotonic() + STEP_SECONDS
        logits = step.logits.clone()
        for row in rows:
            if row.stage and not row.is_done:
                for depth in range(row.num_drafts + 1):
                    at = row.start + depth
                    logits[at] = self._fixed.setdefault((row.stage, depth), logits[at].clone())
        probs = step.draft_probs
        self.is_redrawn |= probs is not None
        while time.monotonic() < deadline:
            active = [row for row in rows if not row.is_done and self.drawn.get(row.stage, 0) < plan.draws[row.stage]]
            if not active:
                break
            self._turn += 1
            for row in rows:
                row.is_unlikely = probs is None and row.stage == VERIFY and (row.index + self._turn) % 2 == 1
            drafts = self._drafts(rows, probs)
            tokens = step.emit(logits, drafts if any(step.num_drafts) else None)
            self._count(active, tokens, drafts, logits, probs)

    def _drafts(self, rows: Sequence[_Rows], probs: torch.Tensor | None) -> list[list[int]]:
        """Draft tokens of every request for the next draw."""
        if probs is not None:
            drawn = torch.multinomial(probs.cpu(), 1, generator=self._generator)[:, 0].tolist()
            # Every request has one row more than it has draft tokens: subtract one for every request before this one.
            return [drawn[row.start - row.index : row.start - row.index + row.num_drafts] for row in rows]
        plan, of_requests = self._plan, []
        for row in rows:
            drafts = plan.drafts[: row.num_drafts] + plan.drafts[-1:] * (row.num_drafts - len(plan.drafts))
            of_requests.append([plan.unlikely, *drafts[1:]] if row.is_unlikely else drafts)
        return of_requests

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
                # No verifier replaces a draft token by itself: a token that equals its draft was accepted.
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
        name = name_of(stage, is_unlikely, depth, depths)
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
                    draft = probs[row.start - row.index + depth].double().cpu()
                    place.accept_chance = float(torch.minimum(wanted, draft).sum())
            self.places[name] = place
        return place


class AuditExtension:
    """Methods that ``worker_extension_cls`` mixes into vLLM's worker, for ``collective_rpc``."""

    model_runner: Any
    _auditor: Auditor | None = None
    _fixed: dict[tuple[str, int], torch.Tensor]
    _captured: dict[int, NDArray[np.float32]]
    _release: Callable[[], None]

    def audit_about(self) -> dict[str, Any]:
        """Properties of the engine that an audit depends on: runner, device, dtype, sizes, this plugin's settings."""
        runner = self.model_runner
        config = runner.vllm_config
        settings = config.additional_config
        return {
            "runner": "V2" if is_v2(runner) else "V1",
            "device": str(runner.device.type),
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "vocab_size": int(config.model_config.get_vocab_size()),
            "max_model_len": int(config.model_config.max_model_len),
            "max_num_seqs": int(config.scheduler_config.max_num_seqs),
            "max_num_batched_tokens": int(config.scheduler_config.max_num_batched_tokens),
            "num_speculative_tokens": 0
            if config.speculative_config is None
            else int(config.speculative_config.num_speculative_tokens),
            "async_scheduling": bool(config.scheduler_config.async_scheduling),
            "settings": settings.get("specplug") if isinstance(settings, dict) else None,
        }

    def audit_begin(self, plan: dict[str, Any], is_new: bool) -> None:
        """Follow ``plan`` with all requests from now on; ``is_new`` is False if the last plan had the same context."""
        if is_new:
            self._fixed = {}
        self._auditor = Auditor(self.model_runner, Plan(**plan), self._fixed)

    def audit_take(self) -> dict[str, Any]:
        """End the audit of the context; returns the counts since :meth:`audit_begin`."""
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
        """Keep the target logits of every request's first token from now on."""
        captured: dict[int, NDArray[np.float32]] = {}
        self._captured = captured

        def on_step(step: AuditedStep) -> None:
            end = 0
            for request_id, count, is_partial in zip(step.request_ids, step.num_drafts, step.is_partial, strict=True):
                end += count + 1
                number = int(request_id.partition("/")[2].partition("-")[0])
                if not is_partial and number not in captured:
                    captured[number] = step.logits[end - 1].float().cpu().numpy().copy()

        self._release = between(self.model_runner, on_step).detach

    def capture_scores(self, tokens: list[int], temperature: float) -> list[float]:
        """End capturing; returns the probability of ``tokens[i]`` as first token of request ``i``."""
        self._release()
        chances = []
        for number, token in enumerate(tokens):
            row = torch.from_numpy(self._captured[number]).double() / temperature
            chances.append(float(torch.softmax(row, dim=-1)[token]))
        return chances

    def capture_rows(self) -> list[list[float]]:
        """End capturing; returns the logits of every request's first token, ``[num_requests][vocab]``."""
        self._release()
        return [self._captured[number].tolist() for number in sorted(self._captured)]
