"""Hides torch: stores are built without it, and importing it takes four of six seconds that such a command takes."""

import os
import sys

sys.modules["torch"] = None  # type: ignore[assignment]
os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
