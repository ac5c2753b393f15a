"""Drafts from the history of this and earlier requests, in suffix automata."""
