"""The one logger of this package."""

from __future__ import annotations

import logging

logger = logging.getLogger("vllm.specplug")
"""Under vLLM's logger, so that its handlers and levels apply."""
