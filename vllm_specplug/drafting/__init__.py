"""Drafting on the host: ask proposers, choose among their drafts, learn from verified drafts. Knows no vLLM."""
