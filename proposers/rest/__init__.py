"""Retrieval-based speculative decoding (REST; He et al., 2024): drafts from token stores."""
