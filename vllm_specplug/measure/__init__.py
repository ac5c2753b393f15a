"""Libraries behind the measuring commands: audit, bench, replay, couple."""
