"""Replays texts through proposers without an engine."""
