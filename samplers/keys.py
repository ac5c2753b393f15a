"""Keys of logits rows: all that a row's noise depends on, except the token id. Each of vLLM's runners has its own kind.

The key of an output token depends neither on the drafter nor on how often the token is drawn, which makes a coupling
drafter-invariant. :class:`SeedKeys` are the keys of the V1 runner, :class:`PositionKeys` those of V2.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_specplug.samplers.gumbel import SeedStream, gumbel_noise, murmur_gumbel_noise_torch, unmix64
from vllm_specplug.samplers.minhash import keys_at, keys_of
from vllm_specplug.samplers.noise import (
    CHAIN_POSITIONS,
    MURMUR,
    SPLITMIX,
    chain_noise,
    list_kind,
    murmur_keys,
    splitmix_keys,
)


class Keys(abc.ABC):
    """The keys of logits rows, ``[num_rows]``; for :meth:`packed` any shape."""

    @abc.abstractmethod
    def chain(self, chain: int) -> Keys:
        """Keys of independent noise for the same rows; those of chain 0 are ``self``."""

    @abc.abstractmethod
    def bits(self) -> torch.Tensor:
        """``[num_rows]`` int64 with all 64 bits mixed, on the rows' device, for couplings that draw without a race."""

    @abc.abstractmethod
    def gumbel(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Standard Gumbel noise of tokens in the runner's own race.

        Args:
            token_ids: ``[num_rows]`` or ``[num_rows, any]`` int64, on the rows' device.

        Returns:
            float64 of the shape of ``token_ids``. On V2 it equals the race's noise within float32 rounding (see
            :func:`vllm_specplug.samplers.gumbel.murmur_gumbel_noise`).
        """

    @abc.abstractmethod
    def packed(self, num_noises: int) -> tuple[int, NDArray[np.uint64]]:
        """The noise for compiled code: kind and keys for :func:`vllm_specplug.samplers.noise.noise_of`.

        Args:
            num_noises: number of chains of whose noises the largest is taken.
        """

    def uniforms(self) -> torch.Tensor:
        """``[num_rows]`` float64 between 0 and 1, both excluded, from :meth:`bits`."""
        return ((self.bits() >> 12 & (1 << 52) - 1).double() + 0.5) * 2.0**-52


Race: TypeAlias = Callable[[torch.Tensor, Any], torch.Tensor]
"""The runner's own draw: from logits ``[num_rows, vocab]`` and the :class:`Keys` of these rows to ``[num_rows]`` int64,
argmax(logits + Gumbel noise). With other keys, such as another chain's, the draw is independent."""


@dataclass(frozen=True)
class SeedKeys(Keys):
    """Keys on V1: a seed per draw, from the request's generator (:class:`vllm_specplug.samplers.gumbel.SeedStream`).

    Attributes:
        seeds: int64 on the CPU.
    """

    seeds: torch.Tensor

    @classmethod
    def of_token(cls, seed: int, num_prompt_tokens: int, position: int) -> SeedKeys:
        """The key of one row: that of output token ``position`` (from 0) of a request with this seed."""
        draws = SeedStream(torch.Generator().manual_seed(seed)).peek(position + 1)
        return cls(torch.tensor(draws[-1:]))

    def chain(self, chain: int) -> SeedKeys:
        """See :meth:`Keys.chain`."""
        if not chain:
            return self
        _, keys = chain_noise(list_kind(SPLITMIX, chain + 1), splitmix_keys(self.seeds.numpy()), chain)
        return SeedKeys(torch.from_numpy(unmix64(keys).view(np.int64)))

    def bits(self) -> torch.Tensor:
        """See :meth:`Keys.bits`."""
        return torch.from_numpy(keys_of(self.seeds.numpy()).view(np.int64))

    def gumbel(self, token_ids: torch.Tensor) -> torch.Tensor:
        """See :meth:`Keys.gumbel`."""
        seeds = self.seeds if token_ids.ndim == 1 else self.seeds[:, None]
        return torch.from_numpy(gumbel_noise(seeds.numpy(), token_ids.numpy()))

    def packed(self, num_noises: int) -> tuple[int, NDArray[np.uint64]]:
        """See :meth:`Keys.packed`."""
        return list_kind(SPLITMIX, num_noises), splitmix_keys(self.seeds.numpy())


@dataclass(frozen=True)
class PositionKeys(Keys):
    """Keys on V2: the request's seed, and the position of the input token whose logits are sampled.

    Attributes:
        seeds: int64, any device.
        positions: int32 or int64 of a shape that broadcasts with ``seeds``.
    """

    seeds: torch.Tensor
    positions: torch.Tensor

    @classmethod
    def of_token(cls, seed: int, num_prompt_tokens: int, position: int) -> PositionKeys:
        """The key of one row: that of output token ``position`` (from 0) of a request with this seed."""
        return cls(torch.tensor([seed]), torch.tensor([num_prompt_tokens + position - 1]))

    def chain(self, chain: int) -> PositionKeys:
        """See :meth:`Keys.chain`."""
        return PositionKeys(self.seeds, self.positions + chain * CHAIN_POSITIONS)

    def bits(self) -> torch.Tensor:
        """See :meth:`Keys.bits`."""
        return keys_at(self.seeds, self.positions)

    def gumbel(self, token_ids: torch.Tensor) -> torch.Tensor:
        """See :meth:`Keys.gumbel`."""
        keyed = self.seeds, self.positions.long()
        if token_ids.ndim > 1:
            keyed = keyed[0][:, None], keyed[1][:, None]
        return murmur_gumbel_noise_torch(*keyed, token_ids)

    def packed(self, num_noises: int) -> tuple[int, NDArray[np.uint64]]:
        """See :meth:`Keys.packed`."""
        return list_kind(MURMUR, num_noises), murmur_keys(self.seeds.numpy(), self.positions.numpy(), num_noises)
