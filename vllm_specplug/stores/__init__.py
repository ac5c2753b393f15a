"""Token stores: memory-mapped files of tokens with a suffix array."""
