"""Proposers: algorithms that guess the next tokens. Usable alone; none of them knows vLLM."""

from .base import DraftBatch, Drafts, Proposer, ProposerContext, Verified

__all__ = ["DraftBatch", "Drafts", "Proposer", "ProposerContext", "Verified"]
