"""Makes the engine harness importable by name in every test, and lets two workers end at the same time."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "engine"))

# Files that take minutes, longest first: a worker that begins one of them last keeps the other one waiting.
LONGEST = (
    "test_v2.py",
    "test_identity.py",
    "test_audit.py",
    "test_ray.py",
    "test_v2_chains.py",
    "test_chains.py",
    "test_list.py",
    "test_minhash.py",
    "test_native_drafters.py",
    "test_example_training.py",
    "test_acceptance.py",
    "test_docs.py",
    "test_serve.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(LONGEST)))
