"""Several chains of one request in one forward pass on Model Runner V2: same tokens as stock V2, whoever wins.

No GPU is needed: the runner's kernels run under Triton's interpreter.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from compare import assert_close_logprobs, assert_same, tokens
from harness import ENGINE_ARGS, Engine
from requests_matrix import V2_FEATURES, requests

pytestmark = pytest.mark.engine

NUM_DRAFT = 3
UNGATED = {"name": "ensemble", "gate": False}  # drafts are verified whether they pay or not
CHAINS = {"method": "specplug", "num_speculative_tokens": NUM_DRAFT, "proposers": [], "num_chains": 4}
# Rows that are idle, since forks take no others.
SIZES = {"max_model_len": 384, "max_num_seqs": 96, "max_num_batched_tokens": 1024, "block_size": 16}
# A budget of reasoning tokens needs words that begin and end reasoning; any will do for a model that knows none.
ROOMY = {**SIZES, "reasoning_config": {"reasoning_start_str": "def", "reasoning_end_str": "\n"}}
# Small enough for preemption, prompts prefilled in pieces, cached prefixes of earlier requests in the way.
TIGHT = {**ROOMY, "num_gpu_blocks_override": 100, "max_num_batched_tokens": 96, "enable_chunked_prefill": True}

SENT = requests(22, V2_FEATURES, first_seed=500, longest=10)
for _request in SENT:
    if "prompt_logprobs" in _request["params"]:  # a row of work for every token of the prompt
        _request["prompt"] = _request["prompt"][:40]
    if 0.0 < _request["params"]["temperature"] != 0.9:  # 0.9: greedy requests that ask for two outputs
        _request["params"]["temperature"] = 1.0


@pytest.fixture(scope="module")
def stock() -> Iterator[list[dict[str, Any]]]:
    with Engine(ROOMY, plugin=False, v2=True) as engine:
        yield engine.generate(SENT)


@pytest.fixture(scope="module")
def sequences(stock: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("oracle") / "sequences.json"
    path.write_text(json.dumps([o["prompt_token_ids"] + each["token_ids"] for o in stock for each in o["outputs"]]))
    return str(path)


def start(arguments: dict[str, Any], *, asynchronous: bool) -> Engine:
    engine = Engine(v2=True)
    try:
        if asynchronous:
            engine.send("call", "keep_async_scheduling")
        engine.send("start", {**ENGINE_ARGS, **arguments})
    except BaseException:
        engine.close()
        raise
    return engine


@pytest.fixture(scope="module")
def roomy() -> Iterator[Engine]:
    with start({**ROOMY, "speculative_config": {**CHAINS, "scratch_blocks": 150}}, asynchronous=False) as engine:
        assert "150 of " in engine.tail(1_000_000)
        yield engine


@pytest.fixture(scope="module")
def tight() -> Iterator[Engine]:
    """As on a GPU: async scheduling. And what is small elsewhere: a cache with preemptions."""
    with start({**TIGHT, "speculative_config": {**CHAINS, "scratch_blocks": 40}}, asynchronous=True) as engine:
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
    assert stats["forks"] > 10
    assert stats["fork_wins"] > 5
