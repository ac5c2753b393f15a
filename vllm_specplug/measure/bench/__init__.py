"""Speculation configurations side by side on the same prompts, and what to choose: ``specplug bench`` and ``tune``."""
