"""The only place that touches vLLM's internals. ``seams.py`` lists every name."""
