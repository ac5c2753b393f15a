"""Couplings that no engine runs: mathematics for comparison."""
