"""The only package that touches vLLM's internals. ``seam_list.py`` lists every name of vLLM that it uses."""
