"""Samplers: couplings of target and draft that decide which draft tokens are accepted. None of them knows vLLM."""
