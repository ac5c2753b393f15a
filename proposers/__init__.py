"""Proposers: algorithms that guess the next tokens. Usable alone; none of them knows vLLM."""

import os
import tempfile
from pathlib import Path

if "NUMBA_CACHE_DIR" not in os.environ and not any(
    os.access(folder, os.W_OK) for folder in (Path(__file__).parent, Path.home(), Path.home() / ".cache")
):
    # A read-only installation under a user without a home: numba would find no place for compiled code and give up.
    os.environ["NUMBA_CACHE_DIR"] = str(Path(tempfile.gettempdir()) / f"specplug-numba-{os.getuid()}")

from vllm_specplug.proposers.base import DraftBatch, Drafts, Proposer, ProposerContext, TargetNoise, Verified

__all__ = ["DraftBatch", "Drafts", "Proposer", "ProposerContext", "TargetNoise", "Verified"]
