"""Makes the engine harness importable by name in every test."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "engine"))
