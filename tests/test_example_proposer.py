"""The README's fifteen-line proposer: alone, by its dotted name, and in the drafting of an engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from vllm_specplug.drafting.drafting import Drafting
from vllm_specplug.drafting.requests import TrackedRequest
from vllm_specplug.proposers import ProposerContext
from vllm_specplug.settings.model import parse_settings

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_my_proposer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    settings = parse_settings({"proposers": ["my_proposer.LastSuccessor"], "num_speculative_tokens": 4})
    drafting = Drafting(settings, ProposerContext(vocab_size=100, num_speculative_tokens=4))
    contexts = [[1, 2, 3, 1], [4, 5], [7, 7]]
    table = np.zeros((3, 50), dtype=np.int32)
    for row, tokens in zip(table, contexts, strict=True):
        row[: len(tokens)] = tokens
    lengths = np.array([len(tokens) for tokens in contexts])
    requests = [TrackedRequest(str(i), len(tokens), 50) for i, tokens in enumerate(contexts)]
    assert drafting.propose(requests, table, np.arange(3), lengths, limit=4).drafts == [[2, 3, 1, 2], [], [7, 7, 7, 7]]


def test_readme_shows_the_example_as_it_is() -> None:
    source = (EXAMPLES / "my_proposer.py").read_text()
    shown = source[source.index("from itertools") :]
    assert shown in (EXAMPLES.parent / "README.md").read_text()
    assert len([line for line in shown.splitlines() if line.strip()]) <= 15
