"""Hooks of vLLM's V2 model runner. The files have the same names as those of :mod:`vllm_specplug.hooks.v1`."""
