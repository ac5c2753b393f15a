"""Several chains of one request in one forward pass on Model Runner V2: same tokens as stock V2, whoever wins.

No GPU is needed: the runner's kernels run under Triton's interpreter.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from compare import assert_close_logprobs, assert_same, tokens
from harness import Engine, Engines
from requests_matrix import requests_v2
from small_model import target_path

pytestmark = pytest.mark.engine

NUM_DRAFT = 3
UNGATED = {"name": "ensemble", "gate": False}  # drafts are verified whether they pay or not
CHAINS = {"method": "specplug", "num_speculative_tokens": NUM_DRAFT, "proposers": [], "num_chains": 4}
# Sizes with idle rows, since forks take no others.
SIZES = {"max_model_len": 384, "max_num_seqs": 96, "max_num_batched_tokens": 1024, "block_size": 32}
# A budget of reasoning tokens needs words that begin and end reasoning; any will do for a model that knows none.
ROOMY = {**SIZES, "reasoning_config": {"reasoning_start_str": "def", "reasoning_end_str": "\n"}}
# Small enough for preemption, prompts prefilled in pieces, cached prefixes of earlier requests in the way.
TIGHT = {**ROOMY, "num_gpu_blocks_override": 64, "max_num_batched_tokens": 192, "enable_chunked_prefill": True}

SENT = requests_v2(22, first_seed=500, longest=16)


@pytest.fixture(scope="module")
def stock(engines: Engines) -> list[dict[str, Any]]:
    with engines.borrowed(ROOMY, plugin=False, v2=True) as engine:
        return engine.generate(SENT)


@pytest.fixture(scope="module")
def sequences(stock: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("oracle") / "sequences.json"
    path.write_text(json.dumps([o["prompt_token_ids"] + each["token_ids"] for o in stock for each in o["outputs"]]))
    return str(path)


@pytest.fixture(scope="module")
def roomy() -> Iterator[Engine]:
    with Engine({**ROOMY, "speculative_config": {**CHAINS, "scratch_blocks": 150}}, v2=True) as engine:
        assert "150 of " in engine.tail(1_000_000)
        yield engine


@pytest.fixture(scope="module")
def tight() -> Iterator[Engine]:
    """With async scheduling, as on a GPU, and a cache so small that requests are preempted."""
    with Engine(
        {**TIGHT, "speculative_config": {**CHAINS, "scratch_blocks": 30}}, v2=True, asynchronous=True
    ) as engine:
        assert "async scheduling on" in engine.tail(1_000_000)
        yield engine


def several(kinds: list[str], sequences: str) -> dict[str, Any]:
    proposer = {"name": "in_child.SeveralChains", "kinds": kinds, "sequences": sequences}
    return {"num_speculative_tokens": NUM_DRAFT, "num_chains": len(kinds), "proposers": [proposer, UNGATED]}


@pytest.mark.parametrize("cache", ["roomy", "tight"])
@pytest.mark.parametrize("kinds", [["wrong", "oracle"], ["corrupted"] * 4])
def test_same_tokens_as_stock_v2(
    cache: str, kinds: list[str], stock: list[dict[str, Any]], sequences: str, request: pytest.FixtureRequest
) -> None:
    engine: Engine = request.getfixturevalue(cache)
    engine.send("set_drafting", several(kinds, sequences))
    ours = engine.generate(SENT, reset_prefix_cache=cache == "roomy")
    assert_same(ours, stock, f"{kinds}, {cache}", SENT)
    compared = 0
    for mine, theirs in zip(ours, stock, strict=True):
        for a, b in zip(mine["outputs"], theirs["outputs"], strict=True):
            compared += assert_close_logprobs(a["logprobs"], b["logprobs"])
    assert compared > 15
    stats = engine.send("stats")["ensemble"]
    assert stats["forks"] == engine.send("call", "counted_chains")["forks"] > 10
    assert stats["fork_wins"] > 5


@pytest.mark.parametrize("kinds", [["wrong", "oracle"], ["oracle", "wrong"]])
def test_every_true_token_is_accepted_whichever_chain_is_the_main_one(
    kinds: list[str], roomy: Engine, stock: list[dict[str, Any]], sequences: str
) -> None:
    """Requests with a grammar or a budget of reasoning tokens keep one chain and are left out."""
    alone = {"json_schema", "thinking_token_budget", "n"}
    sent = [index for index, r in enumerate(SENT) if not alone & r["params"].keys()]
    roomy.send("set_drafting", several(kinds, sequences))
    served = [SENT[index] for index in sent]
    assert_same(roomy.generate(served), [stock[index] for index in sent], "true tokens", served)
    counted = roomy.send("call", "counted_chains")
    assert counted["true"] == counted["accepted"] > 40
    assert counted["missed"] == 0
    assert counted["forks"] > 10


def test_the_logits_behind_every_token_are_those_without_forks(roomy: Engine, sequences: str) -> None:
    sent = [r for r in SENT if r["params"].get("n", 1) == 1 and "prompt_logprobs" not in r["params"]][:10]
    kept = []
    for kinds in (["oracle"], ["corrupted"] * 4):
        roomy.send("call", "keep_logits_v2")
        roomy.send("set_drafting", several(kinds, sequences))
        roomy.generate(sent, reset_prefix_cache=True)
        kept.append(roomy.send("call", "take_logits"))
    one, four = kept
    assert len(one.keys() & four.keys()) == len(one) > 50
    for key, logits in one.items():
        # Batches of other shapes sum products in another order.
        np.testing.assert_allclose(four[key], logits, atol=1e-4)


def test_a_control_that_must_fail(roomy: Engine, stock: list[dict[str, Any]], sequences: str) -> None:
    """Tokens differ if winners are not copied to their request."""
    roomy.send("set_drafting", several(["corrupted"] * 4, sequences))
    try:
        roomy.send("call", "break_forks", "stays away")
        broken = roomy.generate(SENT, reset_prefix_cache=True)
        assert sum(a != b for a, b in zip(tokens(broken), tokens(stock), strict=True)) > 2
    finally:
        roomy.send("call", "break_forks", "mend")


def test_requests_of_full_length_and_no_state_left(roomy: Engine, sequences: str) -> None:
    long = [
        {"prompt": [100 + (7 * at + number) % 400 for at in range(376 + number)], "params":
         {"temperature": 0.7, "seed": number, "max_tokens": 50, "ignore_eos": True}}
        for number in range(2)
    ]  # fmt: skip
    roomy.send("set_drafting", {"num_speculative_tokens": NUM_DRAFT, "proposers": []})
    alone = roomy.generate(long)
    settings = {**several(["corrupted"] * 3, sequences), "proposers": ["in_child.RandomChains", UNGATED]}
    roomy.send("set_drafting", settings)
    assert_same(roomy.generate(long, reset_prefix_cache=True), alone, "longest", long)
    assert roomy.send("stats")["ensemble"]["forks"] > 3
    assert roomy.send("call", "abort_half_way", [r["prompt"] for r in SENT[:6]], 50, 4) == 6
    roomy.generate([{"prompt": "x", "params": {"max_tokens": 1, "temperature": 0.0}}])
    assert roomy.send("stats")["live_requests"] <= 1
    assert roomy.send("call", "free_blocks") == roomy.send("call", "scheduler_blocks")


def test_a_model_with_sliding_windows(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Two groups of layers, with block tables of their own; drafts and windows cross the ends of blocks."""
    model = tmp_path_factory.mktemp("window")
    with Engine() as child:
        child.send("call", "save_tiny_window_model", str(model), str(target_path()))
    sent = [
        {"prompt": [50 + (11 * at * at + 7 * number) % 400 for at in range(30 + 9 * number)], "params":
         {"temperature": 0.9, "seed": number, "max_tokens": 14, "ignore_eos": True}}
        for number in range(5)
    ]  # fmt: skip
    arguments = {**SIZES, "model": str(model), "max_model_len": 256}
    with Engine(arguments, plugin=False, v2=True) as engine:
        expected = engine.generate(sent)
    path = model / "sequences.json"
    path.write_text(json.dumps([o["prompt_token_ids"] + o["outputs"][0]["token_ids"] for o in expected]))
    config = {**CHAINS, "scratch_blocks": 200}
    with Engine({**arguments, "speculative_config": config}, v2=True, asynchronous=True) as engine:
        assert "200 of " in engine.tail(1_000_000)
        engine.send("set_drafting", several(["corrupted"] * 4, str(path)))
        assert_same(engine.generate(sent), expected, "sliding windows", sent)
        stats = engine.send("stats")["ensemble"]
        assert stats["fork_wins"] > 3
        engine.send("call", "break_forks", "stays away")
        broken = engine.generate(sent, reset_prefix_cache=True)
        assert tokens(broken) != tokens(expected), "the model must heed its context"
