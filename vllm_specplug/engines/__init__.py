"""Engines in processes of their own, for commands, benchmarks and Ray replicas."""
