"""The only place that touches vLLM's internals. ``seam_list.py`` lists every name."""
