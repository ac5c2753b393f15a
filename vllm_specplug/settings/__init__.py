"""The user's settings and request options, read and checked."""
