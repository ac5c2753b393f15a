"""An engine in a process of its own, for commands, benchmarks and Ray replicas."""
