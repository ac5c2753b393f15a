"""What an engine asks of a sampler, and the samplers that come with this package.

A sampler is asked for what follows from it (:class:`Sampler`); one that couples also draws (:class:`Coupling`). A
sampler of your own is a subclass of :class:`Coupling`. Nothing here knows vLLM, and torch is imported only to draw:
settings are also read without it.
"""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, ClassVar, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

    from vllm_specplug.samplers.keys import Keys, Race

Text: TypeAlias = Literal["stock", "own", "per num_chains", "per drafter"]
"""What decides about the text that a seed gives:

``stock``: the seed; it is the text of vLLM without speculation. ``own``: the seed; the text is the sampler's own.
``per num_chains``: the seed and ``num_chains``. ``per drafter``: who drafts, too.
"""


class Sampler:
    """What settings, the audit and batches ask of a sampler.

    Args:
        num_chains: most drafts of a request that a step verifies.

    Raises:
        ValueError: the sampler cannot do with so many; the message says what it can.
    """

    text: ClassVar[Text]

    def __init__(self, num_chains: int = 1) -> None:
        self.num_chains = num_chains

    @property
    def is_coupled(self) -> bool:
        """True when the sampler is a :class:`Coupling`: its tokens do not depend on the drafter."""
        return isinstance(self, Coupling)

    @property
    def num_noises(self) -> int:
        """Gumbel noises that a token of the target races with, the largest counting; 0 when it is drawn otherwise."""
        return 0

    def noise(self, keys: Keys) -> tuple[int, NDArray[np.uint64]]:
        """The noise of the target's race at these keys, as compiled code takes it: see :meth:`Keys.packed`.

        The kind is :data:`NO_NOISE` when the sampler draws otherwise.
        """
        from vllm_specplug.samplers.noise import NO_NOISE

        kind, packed = keys.packed(max(self.num_noises, 1))
        return kind if self.num_noises else NO_NOISE, packed


class VllmRejection(Sampler):
    """vLLM's own verifier: exact for every draft, but another draft gives another text."""

    text: ClassVar[Text] = "per drafter"


class Coupling(Sampler, abc.ABC):
    """Draws the target's token of every row from the row's logits and key alone.

    A draft token is kept when it is the token that the target drew: what is emitted is then the target's own, whoever
    drafted. Several objects may be made for an engine and draw for one request in turn: they must draw alike.
    """

    text: ClassVar[Text] = "own"

    @abc.abstractmethod
    def draw(self, logits: torch.Tensor, keys: Keys, race: Race) -> torch.Tensor:
        """The token of each row, distributed as the softmax of its logits.

        It must depend on nothing but the row's own logits and key: a step may hold a row alone or among others.

        Args:
            logits: ``[num_rows, vocab]``, temperature applied, -inf where a token is excluded. On V2 the rows of greedy
                requests are among them; whatever is drawn for these is replaced by the argmax.
            keys: of the rows.
            race: the runner's own draw.

        Returns:
            ``[num_rows]`` int64 on the logits' device.
        """

    def ranked(
        self, logits: torch.Tensor, keys: Keys, race: Race, num_places: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What a drafter drafts first, second and so on for a row, the first as :meth:`draw` does.

        By default the first alone, with a score of 0.

        Args:
            logits, keys, race: as in :meth:`draw`.
            num_places: most that are of use.

        Returns:
            ``[num_rows, any]`` int64 tokens and float64 scores, descending.
        """
        tokens = self.draw(logits, keys, race)[:, None]
        return tokens, tokens.double().zero_()


class Gumbel(Coupling):
    """The runner's own race, which vLLM draws with in every step: see :mod:`vllm_specplug.samplers.gumbel`."""

    text: ClassVar[Text] = "stock"

    @property
    def num_noises(self) -> int:
        """One."""
        return 1

    def draw(self, logits: torch.Tensor, keys: Keys, race: Race) -> torch.Tensor:
        """The race's winner."""
        return race(logits, keys)

    def ranked(
        self, logits: torch.Tensor, keys: Keys, race: Race, num_places: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The first places of the one race."""
        from vllm_specplug.samplers import list_matching

        return list_matching.ranked(logits, keys, num_places, race)


class ListMatching(Coupling):
    """Races with noise of their own, one a chain, and the best of their winners: see :mod:`.list_matching`."""

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
        """One a chain."""
        return self.num_chains

    def draw(self, logits: torch.Tensor, keys: Keys, race: Race) -> torch.Tensor:
        """The winner of all races."""
        return self.ranked(logits, keys, race, 1)[0][:, 0]

    def ranked(
        self, logits: torch.Tensor, keys: Keys, race: Race, num_places: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The winner of each race, best first, however many are of use."""
        from vllm_specplug.samplers import list_matching

        return list_matching.draw(logits, keys, self.num_chains, race)


class MinHash(Coupling):
    """The first dart below the probabilities: see :mod:`vllm_specplug.samplers.minhash`."""

    def draw(self, logits: torch.Tensor, keys: Keys, race: Race) -> torch.Tensor:
        """Compiled on the CPU, in torch elsewhere: the same tokens."""
        import torch

        from vllm_specplug.samplers import minhash
        from vllm_specplug.samplers.base import probabilities

        probs, bits = probabilities(logits), keys.bits()
        if probs.device.type == "cpu":
            return torch.from_numpy(minhash.sample(probs.numpy(), bits.numpy().view(np.uint64)))
        return minhash.sample_torch(probs, bits)


SAMPLERS: dict[str, type[Sampler]] = {
    "gumbel": Gumbel,
    "minhash": MinHash,
    "list": ListMatching,
    "rejection": VllmRejection,
}
"""The samplers of this package by the names that settings give them."""

STOCK_TEXT = "gumbel"
"""The default, whose text is that of vLLM without speculation."""

VLLMS_OWN = "rejection"
"""vLLM's own verifier."""
