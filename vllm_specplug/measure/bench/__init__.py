"""``specplug bench`` compares configurations on the same prompts, and ``specplug tune`` searches for the fastest."""
