"""The README's fifteen-line proposer: alone, by its dotted name, and fed to the drafting that an engine runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_specplug.config import parse_settings
from vllm_specplug.drafting import Drafting
from vllm_specplug.proposers import DraftBatch, ProposerContext

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_my_proposer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    settings = parse_settings({"proposers": ["my_proposer.LastSuccessor"], "num_speculative_tokens": 4})
    drafting = Drafting(settings, ProposerContext(vocab_size=100, num_speculative_tokens=4))
    batch = DraftBatch.from_contexts([[1, 2, 3, 1], [4, 5], [7, 7]], max_draft_tokens=4)
    assert drafting.propose(batch) == [[2, 3, 1, 2], [], [7, 7, 7, 7]]


def test_readme_shows_the_example_as_it_is() -> None:
    source = (EXAMPLES / "my_proposer.py").read_text()
    shown = source[source.index("from itertools") :]
    assert shown in (EXAMPLES.parent / "README.md").read_text()
    assert len([line for line in shown.splitlines() if line.strip()]) <= 15
