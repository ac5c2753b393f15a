"""The interface of samplers, and the samplers of this package.

A :class:`Sampler` states properties that settings need; a :class:`Coupling` also draws tokens. Subclass
:class:`Coupling` for a sampler of your own. Nothing here knows vLLM, and torch is imported only to draw:
settings are also read without it.
"""

from __future__ import annotations

import abc
import copy
from typing import TYPE_CHECKING, ClassVar, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

    from vllm_specplug.samplers.keys import Keys, Race

Text: TypeAlias = Literal["stock", "own", "per num_chains", "per drafter"]
"""What the text of a seeded request depends on:

``stock``: the seed only; it is the text of vLLM without speculation. ``own``: the seed only; the text is the sampler's
own. ``per num_chains``: the seed and ``num_chains``. ``per drafter``: the seed and the drafter.
"""


class Sampler:
    """The properties of a sampler, for settings, the audit and batches.

    Args:
        num_chains: most chains of a request that a step verifies.

    Raises:
        ValueError: the sampler does not work with ``num_chains``; the message names what it works with.
    """

    text: ClassVar[Text]

    def __init__(self, num_chains: int = 1) -> None:
        self.num_chains = num_chains

    @property
    def is_coupled(self) -> bool:
        """Whether the sampler is a :class:`Coupling`: its tokens do not depend on the drafter."""
        return isinstance(self, Coupling)

    @property
    def num_noises(self) -> int:
        """Number of Gumbel noises of a token in the target's race, of which the largest counts; 0 without a race."""
        return 0

    def noise(self, keys: Keys) -> tuple[int, NDArray[np.uint64]]:
        """The noise of the target's race at ``keys``, in the form for compiled code: see :meth:`Keys.packed`.

        The kind is :data:`NO_NOISE` if the sampler does not draw by a race.
        """
        from vllm_specplug.samplers.noise import NO_NOISE

        kind, packed = keys.packed(max(self.num_noises, 1))
        return kind if self.num_noises else NO_NOISE, packed


class VllmRejection(Sampler):
    """vLLM's own verifier: lossless, but the text depends on the drafter."""

    text: ClassVar[Text] = "per drafter"


class Coupling(Sampler, abc.ABC):
    """Draws the target's token of every logits row from the row's logits and key alone.

    A draft token is accepted if it equals the token that the target drew, so that emitted tokens do not depend on the
    drafter. An engine may build several objects and let them draw for one request in turn: all must draw the same.
    """

    text: ClassVar[Text] = "own"

    @abc.abstractmethod
    def draw(self, logits: torch.Tensor, keys: Keys, race: Race) -> torch.Tensor:
        """The token of each row, distributed as the softmax of the row's logits.

        The token must depend on the row's own logits and key only: a row may come alone or among others.

        Args:
            logits: ``[num_rows, vocab]``, divided by temperature; -inf for excluded tokens. On V2 there are rows of
                greedy requests too, whose tokens are replaced by the argmax afterwards.
            keys: keys of the rows.
            race: the runner's own draw.

        Returns:
            ``[num_rows]`` int64 on the logits' device.
        """

    def ranked(
        self, logits: torch.Tensor, keys: Keys, race: Race, num_places: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A drafter's candidates for each row: the token that :meth:`draw` draws, then its runners-up.

        The default returns the token of :meth:`draw` only, with a score of 0.

        Args:
            logits, keys, race: as in :meth:`draw`.
            num_places: most candidates that the caller uses.

        Returns:
            ``[num_rows, any]`` int64 tokens and float64 scores, descending.
        """
        tokens = self.draw(logits, keys, race)[:, None]
        return tokens, tokens.double().zero_()


class Gumbel(Coupling):
    """The runner's own race, with which vLLM draws in every step: see :mod:`vllm_specplug.samplers.gumbel`."""

    text: ClassVar[Text] = "stock"

    @property
    def num_noises(self) -> int:
        """One noise per token."""
        return 1

    def draw(self, logits: torch.Tensor, keys: Keys, race: Race) -> torch.Tensor:
        """The winner of the race."""
        return race(logits, keys)

    def ranked(
        self, logits: torch.Tensor, keys: Keys, race: Race, num_places: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens of the race with the highest scores."""
        from vllm_specplug.samplers import list_matching

        return list_matching.ranked(logits, keys, num_places, race)


class ListMatching(Coupling):
    """One race per chain, each with its own noise, and the best of their winners: see :mod:`.list_matching`."""

    text: ClassVar[Text] = "per num_chains"

    def __init__(self, num_chains: int = 1) -> None:
        super().__init__(num_chains)
        if num_chains == 1:
            raise ValueError(
                "sampler 'list' draws with the noise of several chains, and of one it would be 'gumbel'; give "
                'num_chains (2 to 8) too, or "sampler": "gumbel"'
            )

    @property
    def num_noises(self) -> int:
        """One noise per chain."""
        return self.num_chains

    def draw(self, logits: torch.Tensor, keys: Keys, race: Race) -> torch.Tensor:
        """The best of the winners of all races."""
        return self.ranked(logits, keys, race, 1)[0][:, 0]

    def ranked(
        self, logits: torch.Tensor, keys: Keys, race: Race, num_places: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The winners of all races, the best first; ``num_places`` is ignored."""
        from vllm_specplug.samplers import list_matching

        return list_matching.draw(logits, keys, self.num_chains, race)


class MinHash(Coupling):
    """The token of the first dart below the probabilities: see :mod:`vllm_specplug.samplers.minhash`."""

    def draw(self, logits: torch.Tensor, keys: Keys, race: Race) -> torch.Tensor:
        """Draw in compiled code on the CPU and in torch on other devices, with the same tokens."""
        import torch

        from vllm_specplug.samplers import minhash
        from vllm_specplug.samplers.base import probabilities

        probs, bits = probabilities(logits), keys.bits()
        if probs.device.type == "cpu":
            return torch.from_numpy(minhash.sample(probs.numpy(), bits.numpy().view(np.uint64)))
        return minhash.sample_torch(probs, bits)


class Apart(Coupling):
    """A user's coupling, kept apart from the engine: it draws from copies, and every answer is a token for each row.

    Args:
        coupling: the user's.
    """

    def __init__(self, coupling: Coupling) -> None:
        super().__init__(coupling.num_chains)
        self.coupling = coupling
        self.text = coupling.text  # type: ignore[misc]

    @property
    def num_noises(self) -> int:
        """That of the user's coupling."""
        return self.coupling.num_noises

    def noise(self, keys: Keys) -> tuple[int, NDArray[np.uint64]]:
        """That of the user's coupling."""
        return self.coupling.noise(keys)

    def draw(self, logits: torch.Tensor, keys: Keys, race: Race) -> torch.Tensor:
        """The user's draw, ids cut to the vocabulary.

        Raises:
            TypeError: the answer is no integer for each row.
        """
        return self._checked(self.coupling.draw(logits.clone(), copy.deepcopy(keys), race), logits, 1)

    def ranked(
        self, logits: torch.Tensor, keys: Keys, race: Race, num_places: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The user's candidates, ids cut to the vocabulary.

        Raises:
            TypeError: the answer holds no integers, or no scores, for each row.
        """
        tokens, scores = self.coupling.ranked(logits.clone(), copy.deepcopy(keys), race, num_places)
        tokens = self._checked(tokens, logits, 2)
        if getattr(scores, "shape", None) != tokens.shape:
            raise TypeError(f"sampler {type(self.coupling).__name__} answered no score for each of its candidates")
        return tokens, scores

    def _checked(self, tokens: torch.Tensor, logits: torch.Tensor, num_dimensions: int) -> torch.Tensor:
        import torch

        rows, vocab_size = logits.shape
        if not isinstance(tokens, torch.Tensor) or tokens.ndim != num_dimensions or len(tokens) != rows:
            answered = getattr(tokens, "shape", type(tokens).__name__)
            raise TypeError(
                f"sampler {type(self.coupling).__name__} answered {answered} for {rows} rows of logits; one token id a "
                "row is expected"
            )
        if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
            raise TypeError(f"sampler {type(self.coupling).__name__} answered tokens of {tokens.dtype}, not integers")
        return tokens.to(logits.device, torch.int64).clamp(0, vocab_size - 1)


SAMPLERS: dict[str, type[Sampler]] = {
    "gumbel": Gumbel,
    "minhash": MinHash,
    "list": ListMatching,
    "rejection": VllmRejection,
}
"""The samplers of this package by their names in settings."""

STOCK_TEXT = "gumbel"
"""Name of the default sampler, whose text is that of vLLM without speculation."""

VLLMS_OWN = "rejection"
"""Name of vLLM's own verifier."""
