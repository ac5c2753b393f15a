"""A coupling of your own: how docs/how-to/own-sampler.md says, in the fewest lines that draw exactly.

    PYTHONPATH=examples specplug serve MODEL \
        --speculative-config '{"method": "specplug", "sampler": "my_sampler.InverseCdf"}'
"""

import torch

from vllm_specplug.samplers.base import probabilities
from vllm_specplug.samplers.couplings import Coupling
from vllm_specplug.samplers.keys import Keys, Race


class InverseCdf(Coupling):
    def draw(self, logits: torch.Tensor, keys: Keys, race: Race) -> torch.Tensor:
        heights = probabilities(logits).cumsum(dim=1)
        return torch.searchsorted(heights, keys.uniforms()[:, None] * heights[:, -1:], right=True).squeeze(1)
