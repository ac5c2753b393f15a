"""Marks on vLLM's configuration that say whether this plugin drafts or verifies."""

from __future__ import annotations

from typing import Any

# Names for vLLM's native spelling (method "custom_class"): public aliases of the drafter that the runner builds.
COUPLED_DRAFTER = "vllm_specplug.Proposer"
REJECTION_DRAFTER = "vllm_specplug.ProposerWithRejection"
DRAFTERS = (COUPLED_DRAFTER, REJECTION_DRAFTER)

NATIVE_METHODS = ("ngram", "ngram_gpu", "suffix", "draft_model", "eagle", "eagle3", "mtp", "medusa")
"""vLLM's own drafters that our samplers verify, if the installed vLLM and its model runner have them."""

# Set on vLLM's SpeculativeConfig, the only configuration that the validation of requests sees.
COUPLED_MARK = "_specplug_coupled"
V2_MARK = "_specplug_v2"
CHOICES_MARK = "_specplug_choices"


def is_ours(speculative_config: Any) -> bool:
    """Whether a SpeculativeConfig of vLLM runs one of our drafters."""
    return getattr(speculative_config, "method", None) == "custom_class" and speculative_config.model in DRAFTERS


def is_coupled(speculative_config: Any) -> bool:
    """Whether a coupled verifier is at work, which draws from every logits row as an ordinary sampling step would."""
    if is_ours(speculative_config):
        return bool(speculative_config.model == COUPLED_DRAFTER)
    return bool(getattr(speculative_config, COUPLED_MARK, False))
