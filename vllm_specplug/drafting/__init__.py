"""One step on the host: ask the proposers, choose among their drafts, learn from what was verified. Knows no vLLM."""
