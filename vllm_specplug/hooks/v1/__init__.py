"""Hooks of vLLM's V1 model runner. The files have the same names as those of :mod:`vllm_specplug.hooks.v2`."""
