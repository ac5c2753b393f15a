"""List matching in engines: whoever drafts, the same tokens for the same number of chains, on both model runners."""

from __future__ import annotations

from typing import Any

import pytest
import small_model
from compare import assert_same, tokens
from harness import Engine, EngineError, Engines
from requests_matrix import PLAIN_FEATURES, PROCESSOR_FEATURES, noise_alone, requests, requests_v2

from vllm_specplug.tiny_models import draft_path, target_path

pytestmark = pytest.mark.engine

UNGATED = {"name": "ensemble", "gate": False}
NOBODY_ELSE = {"name": "ngram", "min_match": 1000, "max_match": 1000}  # drafts nothing
PROPOSERS = ["ngram", "suffix", "in_child.RandomTokens"]
SENT = requests(84, [*PLAIN_FEATURES, *PROCESSOR_FEATURES], first_seed=4000)
SENT_V2 = requests_v2(11, first_seed=4500, longest=8)
# Small blocks and idle rows, so that there are forks.
ROOMY = {"block_size": 32, "max_num_seqs": 128}


def settings(proposers: list[Any], num_chains: int = 3) -> dict[str, Any]:
    return {
        "method": "specplug", "sampler": "list", "num_chains": num_chains, "num_speculative_tokens": 5,
        "proposers": proposers,
    }  # fmt: skip


def drafting(names: list[str], num_chains: int = 3) -> dict[str, Any]:
    return {
        "num_speculative_tokens": 5,
        "num_chains": num_chains,
        "proposers": [*names, *([UNGATED] if names else [])],
    }


def native(model: Any, sampler: str, num_chains: int, **more: Any) -> dict[str, Any]:
    return {
        "method": "draft_model", "model": str(model), "num_speculative_tokens": 3,
        "draft_sample_method": "probabilistic", "sampler": sampler, "num_chains": num_chains,
        "proposers": [NOBODY_ELSE, UNGATED],
        **more,
    }  # fmt: skip


@pytest.mark.parametrize("v2", [False, True], ids=["V1", "V2"])
def test_tokens_do_not_depend_on_who_drafts(v2: bool, engines: Engines) -> None:
    sent = SENT_V2 if v2 else SENT
    # V2 has requests with a budget of reasoning tokens, which needs words that begin and end reasoning.
    more = {"reasoning_config": {"reasoning_start_str": "def", "reasoning_end_str": "\n"}} if v2 else ROOMY
    with Engine({"speculative_config": settings(PROPOSERS), **more}, v2=v2) as engine:
        engine.send("set_drafting", drafting([]))
        alone = engine.generate(sent)
        for names, num_chains in ((["ngram", "suffix"], 3), (["in_child.RandomTokens"], 1)):
            engine.send("set_drafting", drafting(names, num_chains))
            before = engine.send("metrics")["vllm:spec_decode_num_accepted_tokens"]
            assert_same(engine.generate(sent), alone, f"list, {names}", sent)
            if not v2 and "ngram" in names:
                assert engine.send("metrics")["vllm:spec_decode_num_accepted_tokens"] > before
                assert engine.send("stats")["ensemble"]["forks"] > 20
        if v2:
            # Other seeds give other outputs: the compared tokens were drawn.
            moved = [{**r, "params": {**r["params"], "seed": r["params"]["seed"] + 1}} for r in sent]
            assert tokens(engine.generate(moved)) != tokens(alone)
            return
    with engines.borrowed({}, plugin=False) as engine:
        stock = engine.generate(sent)
    greedy = [index for index, request in enumerate(sent) if request["params"]["temperature"] == 0.0]
    sampled = [index for index in range(len(sent)) if index not in greedy]
    assert_same([alone[i] for i in greedy], [stock[i] for i in greedy], "list, greedy", [sent[i] for i in greedy])
    # Its noise is not stock's: the text has the same distribution, but is another.
    assert tokens([alone[i] for i in sampled]) != tokens([stock[i] for i in sampled])


@pytest.mark.parametrize("v2", [False, True], ids=["V1", "V2"])
def test_proposers_are_given_the_noise_that_the_verifier_uses(v2: bool) -> None:
    """If noise alone decides, a proposer that knows the noise of all chains is always right."""
    num_draft = 3
    sent = noise_alone(4, 1 + 2 * (num_draft + 1), small_model.VOCAB if v2 else 4096)
    config = {**settings([]), "num_speculative_tokens": num_draft}
    with Engine({"speculative_config": config, **({} if v2 else ROOMY)}, v2=v2) as engine:
        engine.send(
            "set_drafting", {"num_speculative_tokens": num_draft, "proposers": ["in_child.NoiseAlone", UNGATED]}
        )
        outputs = engine.generate(sent)
        counters = engine.send("stats")["proposers"]["in_child.NoiseAlone"]
        assert counters["drafted"] >= 4 * num_draft
        assert counters["accepted"] == counters["drafted"]
        assert len({token for output in outputs for token in output["outputs"][0]["token_ids"]}) > 3


@pytest.mark.parametrize("v2", [False, True], ids=["V1", "V2"])
def test_a_model_drafting_for_itself_wins_the_same_races(v2: bool) -> None:
    """vLLM's own sampling drafter with a copy of the target: every draft token is the target's."""
    sent = [
        {"prompt": r["prompt"], "params": {"temperature": 1.0, "seed": i, "max_tokens": 13, "ignore_eos": True}}
        for i, r in enumerate(SENT[: 3 if v2 else 12])
    ]
    model = small_model.target_path() if v2 else target_path()
    config = native(model, "list", 3, proposers=[])
    with Engine({"speculative_config": config, **({} if v2 else ROOMY)}, v2=v2) as engine:
        before = engine.send("metrics")
        engine.generate(sent)
        after = engine.send("metrics")
    drafted, accepted = (
        after[f"vllm:spec_decode_num_{what}_tokens"] - before[f"vllm:spec_decode_num_{what}_tokens"]
        for what in ("draft", "accepted")
    )
    # Tokens behind the end of a request are not accepted, and the copy rounds otherwise in batches of other sizes.
    assert accepted >= 0.95 * drafted > 0


@pytest.mark.parametrize("sampler", ["list", "gumbel"])
def test_a_smaller_model_drafts_several_chains(sampler: str) -> None:
    sent = SENT[:42]
    kept = {}
    with Engine({"speculative_config": native(draft_path(), sampler, 4), **ROOMY}) as engine:
        assert "up to 4 chains a request" in engine.tail(100_000)
        drafted = engine.generate(sent)
        stats = engine.send("stats")
        assert stats["ensemble"]["forks"] > 300
        assert stats["ensemble"]["fork_wins"] > 60
        kept["several"] = stats["emitted"] / stats["request_steps"]
        assert stats["live_requests"] <= 1
        engine.send("set_drafting", {"num_speculative_tokens": 3, "num_chains": 1, "proposers": [NOBODY_ELSE, UNGATED]})
        assert_same(engine.generate(sent), drafted, f"{sampler}, one chain of draft_model", sent)
        stats = engine.send("stats")
        assert stats["ensemble"]["forks"] == 0
        kept["one"] = stats["emitted"] / stats["request_steps"]
    alone = {**settings([], 4), "sampler": sampler}
    with Engine({"speculative_config": alone, **ROOMY}) as engine:
        assert_same(drafted, engine.generate(sent), f"{sampler}, draft_model", sent)
    assert kept["several"] > kept["one"] + 0.1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"sampler": "list"}, "sampler 'list' draws with the noise of several chains, and of one it would be 'gumbel'"),
        ({"sampler": "list", "num_chains": 9}, "num_chains"),
    ],
)
def test_one_chain_is_no_list(config: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        Engine({"speculative_config": {"method": "specplug", **config}})
