"""Marks on vLLM's configuration that say whether this plugin drafts or verifies."""

from __future__ import annotations

from typing import Any

# What vLLM's native spelling names: public aliases of the drafter that its runner builds.
COUPLED_DRAFTER = "vllm_specplug.Proposer"
REJECTION_DRAFTER = "vllm_specplug.ProposerWithRejection"
DRAFTERS = (COUPLED_DRAFTER, REJECTION_DRAFTER)

NATIVE_METHODS = ("ngram", "ngram_gpu", "suffix", "draft_model", "eagle", "eagle3", "mtp", "medusa")
"""vLLM's own drafters that our samplers verify: whatever of them the installed vLLM and model runner have."""

# On vLLM's SpeculativeConfig, which is all that a request's validation gets to see.
COUPLED_MARK = "_specplug_coupled"
V2_MARK = "_specplug_v2"
CHOICES_MARK = "_specplug_choices"


def is_ours(speculative_config: Any) -> bool:
    """True for a vLLM SpeculativeConfig that runs one of our drafters."""
    return getattr(speculative_config, "method", None) == "custom_class" and speculative_config.model in DRAFTERS


def is_coupled(speculative_config: Any) -> bool:
    """True when a coupled verifier is at work, which draws every row like an ordinary sampling step."""
    if is_ours(speculative_config):
        return bool(speculative_config.model == COUPLED_DRAFTER)
    return bool(getattr(speculative_config, COUPLED_MARK, False))
