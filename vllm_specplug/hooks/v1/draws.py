"""How a token is drawn from target logits and seeds on V1."""

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


def _race(logits: torch.Tensor, keys: SeedKeys) -> torch.Tensor:
    """vLLM's own draw on CPUs: argmax of ``[num_rows, vocab]`` logits + noise of ``[num_rows]`` seeds."""
    return torch.ops._C.fused_gumbel_argmax(logits.to(torch.float32), keys.seeds)  # type: ignore[no-any-return]


class SeededNoise:
    """Draws rows by the coupling: one seed a row, each request's seeds drawn ahead from its generator."""

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
        """Keys of rows laid out one run of consecutive tokens after the other.

        Args:
            draws: for each run the request's id, its state (None: no draw, any seed will do), the output token, counted
                from the request's next one, that the first row is for, and the number of rows.
        """
        seeds: list[int] = []
        for request_id, state, first, count in draws:
            seeds += [0] * count if state is None else self.stream(request_id, state).peek(first + count)[first:]
        return SeedKeys(torch.tensor(seeds, dtype=torch.int64))

    def rows(self, draws: Sequence[tuple[str, Any, int, int]]) -> Callable[[torch.Tensor], torch.Tensor]:
        """A function that draws tokens from the ``[num_rows, vocab]`` logits of these runs of rows.

        Args:
            draws: see :meth:`_keys`.
        """
        keys = self._keys(draws)
        return lambda logits: self._coupling.draw(logits, keys, _race)

    def ranked(
        self, logits: torch.Tensor, draws: Sequence[tuple[str, Any, int, int]], num_places: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What a drafter drafts first, second and so on in these runs of rows, and scores: see ``Coupling.ranked``."""
        return self._coupling.ranked(logits, self._keys(draws), _race, num_places)

    def coming(self, seeds: NDArray[np.int64]) -> tuple[int, NDArray[np.uint64]]:
        """The noise of draws by these seeds (any shape), as proposers take it: see ``Sampler.noise``."""
        return self._coupling.noise(SeedKeys(torch.from_numpy(seeds)))

    def next_row(self, request_ids: Sequence[str], states: Sequence[Any]) -> Callable[[torch.Tensor], torch.Tensor]:
        """:meth:`rows` for one row of each request, its next output token."""
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
