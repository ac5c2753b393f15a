"""Couplings for comparison, which no engine runs."""
