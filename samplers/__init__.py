"""Samplers: couplings of target and draft that decide which draft tokens are kept. None of them knows vLLM."""
