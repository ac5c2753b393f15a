"""The one logger of this package."""

from __future__ import annotations

import logging

logger = logging.getLogger("vllm.specplug")
"""A child of vLLM's logger, so that vLLM's handlers and levels apply."""
