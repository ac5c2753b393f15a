"""The MinHash sampler in engines: whoever drafts, the same tokens, on both model runners."""

from __future__ import annotations

from typing import Any

import pytest
import small_model
from compare import assert_same, tokens
from harness import Engine, Engines
from requests_matrix import PLAIN_FEATURES, PROCESSOR_FEATURES, requests, requests_v2

from vllm_specplug.tiny_models import draft_path, target_path

pytestmark = pytest.mark.engine

PROPOSERS = ["ngram", "suffix", "in_child.RandomTokens"]
SENT = requests(84, [*PLAIN_FEATURES, *PROCESSOR_FEATURES], first_seed=3000)
SENT_V2 = requests_v2(11, first_seed=3500, longest=8)


def settings(proposers: list[Any]) -> dict[str, Any]:
    return {"method": "specplug", "sampler": "minhash", "num_speculative_tokens": 5, "proposers": proposers}


def all_verified(names: list[str]) -> dict[str, Any]:
    return {
        "num_speculative_tokens": 5,
        "proposers": [*names, *([{"name": "ensemble", "gate": False}] if names else [])],
    }


@pytest.mark.parametrize("v2", [False, True], ids=["V1", "V2"])
def test_tokens_do_not_depend_on_who_drafts(v2: bool, engines: Engines) -> None:
    sent = SENT_V2 if v2 else SENT
    # V2 has requests with a budget of reasoning tokens, which needs words that begin and end reasoning.
    more = {"reasoning_config": {"reasoning_start_str": "def", "reasoning_end_str": "\n"}} if v2 else {}
    with Engine({"speculative_config": settings(PROPOSERS), **more}, v2=v2) as engine:
        engine.send("set_drafting", all_verified([]))
        alone = engine.generate(sent)
        for names in (["ngram", "suffix"], ["in_child.RandomTokens"]):
            engine.send("set_drafting", all_verified(names))
            before = engine.send("metrics")["vllm:spec_decode_num_accepted_tokens"]
            assert_same(engine.generate(sent), alone, f"minhash, {names}", sent)
            if not v2 and "ngram" in names:
                assert engine.send("metrics")["vllm:spec_decode_num_accepted_tokens"] > before
    if v2:
        return
    with engines.borrowed({}, plugin=False) as engine:
        stock = engine.generate(sent)
    greedy = [index for index, request in enumerate(sent) if request["params"]["temperature"] == 0.0]
    sampled = [index for index in range(len(sent)) if index not in greedy]
    assert_same([alone[i] for i in greedy], [stock[i] for i in greedy], "minhash, greedy", [sent[i] for i in greedy])
    # Its draws are not stock's: the text has the same distribution, but is another.
    assert tokens([alone[i] for i in sampled]) != tokens([stock[i] for i in sampled])


@pytest.mark.parametrize("v2", [False, True], ids=["V1", "V2"])
def test_a_model_drafting_for_itself_throws_the_same_darts(v2: bool) -> None:
    """vLLM's own sampling drafter with a copy of the target: every draft token is the target's."""
    sent = [
        {"prompt": r["prompt"], "params": {"temperature": 1.0, "seed": i, "max_tokens": 13, "ignore_eos": True}}
        for i, r in enumerate(SENT[: 3 if v2 else 12])
    ]
    config = {
        "method": "draft_model",
        "model": str(small_model.target_path() if v2 else target_path()),
        "num_speculative_tokens": 3,
        "draft_sample_method": "probabilistic",
        "sampler": "minhash",
    }
    with Engine({"speculative_config": config}, v2=v2) as engine:
        before = engine.send("metrics")
        engine.generate(sent)
        after = engine.send("metrics")
    drafted, accepted = (
        after[f"vllm:spec_decode_num_{what}_tokens"] - before[f"vllm:spec_decode_num_{what}_tokens"]
        for what in ("draft", "accepted")
    )
    assert accepted >= 0.95 * drafted > 0


def test_a_smaller_model_drafts_as_well() -> None:
    config = {
        "method": "draft_model",
        "model": str(draft_path()),
        "num_speculative_tokens": 3,
        "draft_sample_method": "probabilistic",
        "sampler": "minhash",
    }
    sent = SENT[:42]
    with Engine({"speculative_config": config}) as engine:
        drafted = engine.generate(sent)
    with Engine({"speculative_config": settings([])}) as engine:
        assert_same(drafted, engine.generate(sent), "minhash, draft_model", sent)
