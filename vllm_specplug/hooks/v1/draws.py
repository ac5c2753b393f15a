"""How a token is drawn from target logits and seeds on V1."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler, apply_top_k_top_p

from vllm_specplug.samplers import list_matching, minhash
from vllm_specplug.samplers.base import probabilities
from vllm_specplug.samplers.gumbel import SeedStream
from vllm_specplug.settings.model import Settings


class KeyedSampler(TopKTopPSampler):  # type: ignore[misc]
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


def draw_of(settings: Settings) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """How the sampler makes tokens of logits and seeds, each row's of its own alone."""
    if settings.sampler == "list":
        num_chains = settings.num_chains
        return lambda logits, seeds: list_matching.draw(logits, seeds, num_chains, _race)[0][:, 0]
    return {"gumbel": _race, "minhash": _darts}[settings.sampler]


def places_of(
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


class SeededNoise:
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
