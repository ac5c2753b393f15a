"""Draws tokens from logits and seeds on V1."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler, apply_top_k_top_p

from vllm_specplug.samplers.couplings import Coupling
from vllm_specplug.samplers.gumbel import SeedStream
from vllm_specplug.samplers.keys import SeedKeys


class KeyedSampler(TopKTopPSampler):  # type: ignore[misc]
    """vLLM's top-k/top-p sampler with a draw that callers choose, in place of its per-request generators."""

    def __init__(self, logprobs_mode: str, use_fp64_gumbel: bool) -> None:
        super().__init__(logprobs_mode, use_fp64_gumbel)
        self._noise: list[Callable[[torch.Tensor], torch.Tensor]] = []
        self.forward = self._forward_keyed

    def draw_with(self, noise: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Let ``noise`` draw the tokens ``[num_rows]`` of the next call from its logits ``[num_rows, vocab]``."""
        self._noise[:] = [noise]  # ten times faster than setting an attribute of a torch module

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


def _race(logits: torch.Tensor, keys: SeedKeys) -> torch.Tensor:
    """vLLM's own draw on CPUs: argmax of logits ``[num_rows, vocab]`` plus the noise of seeds ``[num_rows]``."""
    return torch.ops._C.fused_gumbel_argmax(logits.to(torch.float32), keys.seeds)  # type: ignore[no-any-return]


class SeededNoise:
    """Draws by the coupling, with one seed per logits row. A request's generator makes its seeds ahead of time."""

    def __init__(self, coupling: Coupling) -> None:
        self._coupling = coupling
        self._streams: dict[str, SeedStream] = {}

    def stream(self, request_id: str, state: Any) -> SeedStream:
        stream = self._streams.get(request_id)
        if stream is None:
            stream = SeedStream(state.generator) if state.generator is not None else SeedStream.fresh()
            self._streams[request_id] = stream
        return stream

    def _keys(self, draws: Sequence[tuple[str, Any, int, int]]) -> SeedKeys:
        """Keys of logits rows that are laid out as runs: a run is the rows of consecutive tokens of one request.

        Args:
            draws: per run (request id, state, first, count). ``state`` is vLLM's state of the request, None if it draws
                nothing (any seed will do); ``first`` is the output token of the run's first row, counted from the
                request's next one; ``count`` is the number of rows.
        """
        seeds: list[int] = []
        for request_id, state, first, count in draws:
            seeds += [0] * count if state is None else self.stream(request_id, state).peek(first + count)[first:]
        return SeedKeys(torch.tensor(seeds, dtype=torch.int64))

    def rows(self, draws: Sequence[tuple[str, Any, int, int]]) -> Callable[[torch.Tensor], torch.Tensor]:
        """A function that draws tokens from the logits ``[num_rows, vocab]`` of these runs.

        Args:
            draws: see :meth:`_keys`.
        """
        keys = self._keys(draws)
        return lambda logits: self._coupling.draw(logits, keys, _race)

    def ranked(
        self, logits: torch.Tensor, draws: Sequence[tuple[str, Any, int, int]], num_places: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A drafter's best ``num_places`` tokens in each row of these runs, and scores: see ``Coupling.ranked``."""
        return self._coupling.ranked(logits, self._keys(draws), _race, num_places)

    def coming(self, seeds: NDArray[np.int64]) -> tuple[int, NDArray[np.uint64]]:
        """The noise that proposers get for draws with these seeds (any shape): see ``Sampler.noise``."""
        return self._coupling.noise(SeedKeys(torch.from_numpy(seeds)))

    def next_row(self, request_ids: Sequence[str], states: Sequence[Any]) -> Callable[[torch.Tensor], torch.Tensor]:
        """Like :meth:`rows`, for one row of each request: that of its next output token."""
        seeds = [
            0 if state is None else self.stream(request_id, state).peek(1)[0]
            for request_id, state in zip(request_ids, states, strict=True)
        ]
        keys = SeedKeys(torch.tensor(seeds, dtype=torch.int64))
        return lambda logits: self._coupling.draw(logits, keys, _race)

    def consume(self, request_id: str, count: int) -> None:
        if request_id in self._streams:
            self._streams[request_id].consume(count)

    def finish(self, request_id: str) -> None:
        self._streams.pop(request_id, None)

    def __len__(self) -> int:
        return len(self._streams)
