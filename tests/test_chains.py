"""Several chains of one request in one forward pass on the V1 runner: same tokens as stock, whoever wins."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from compare import assert_close_logprobs, assert_same, tokens
from harness import Engine, EngineError, Engines
from hypothesis import given
from hypothesis import strategies as st
from requests_matrix import PLAIN_FEATURES, PROCESSOR_FEATURES, requests

from vllm_specplug.errors import ConfigurationError
from vllm_specplug.measure import corpus
from vllm_specplug.tiny_models import draft_path, target_path

NUM_DRAFT = 6
CHAINS = {
    "method": "specplug",
    "num_speculative_tokens": NUM_DRAFT,
    "proposers": [],
    "num_chains": 4,
}
UNGATED = {"name": "ensemble", "gate": False}  # drafts are verified whether they pay or not
# Small blocks, so that drafts often cross their ends, and idle rows, since forks take no others.
ROOMY = {"block_size": 32, "max_num_seqs": 128}
# Small enough for preemption, prompts prefilled in pieces, cached prefixes of earlier requests in the way.
TIGHT = {**ROOMY, "num_gpu_blocks_override": 110, "max_num_batched_tokens": 320, "enable_chunked_prefill": True}

PLAIN = requests(64, PLAIN_FEATURES)
MIXED = requests(50, [*PLAIN_FEATURES, *PROCESSOR_FEATURES], first_seed=1000)
# Requests that reach the longest length: at their end vLLM alone would drop all drafts of the batch.
LONGEST = [
    {"prompt": [300 + (7 * at + number) % 3000 for at in range(960 + number)], "params":
     {"temperature": 0.7, "seed": number, "max_tokens": 200, "ignore_eos": True}}
    for number in range(4)
]  # fmt: skip
SENT = {"plain": PLAIN, "mixed": MIXED, "longest": LONGEST}


@pytest.fixture(scope="module")
def stock(engines: Engines) -> dict[str, list[dict[str, Any]]]:
    with engines.borrowed({}, plugin=False) as engine:
        return {kind: engine.generate(sent) for kind, sent in SENT.items()}


@pytest.fixture(scope="module")
def sequences(
    stock: dict[str, list[dict[str, Any]]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, list[int]]:
    """The file that the oracle reads, and the indices of sequences with a grammar, which keep one chain."""
    path = tmp_path_factory.mktemp("oracle") / "sequences.json"
    known: list[list[int]] = []
    structured = []
    for kind, outputs in stock.items():
        for sent, output in zip(SENT[kind], outputs, strict=True):
            for sequence in output["outputs"]:
                if "json_schema" in sent["params"]:
                    structured.append(len(known))
                known.append(output["prompt_token_ids"] + sequence["token_ids"])
    path.write_text(json.dumps(known))
    return str(path), structured


@pytest.fixture(scope="module")
def roomy() -> Iterator[Engine]:
    with Engine({**ROOMY, "speculative_config": {**CHAINS, "scratch_blocks": 200}}) as engine:
        yield engine


@pytest.fixture(scope="module")
def tight() -> Iterator[Engine]:
    with Engine({**TIGHT, "speculative_config": {**CHAINS, "scratch_blocks": 60}}) as engine:
        yield engine


def several(kinds: list[str], sequences: tuple[str, list[int]], leave_out: bool = False) -> dict[str, Any]:
    """Settings with ``in_child.SeveralChains``: one chain of every kind."""
    proposer = {"name": "in_child.SeveralChains", "kinds": kinds, "sequences": sequences[0]}
    if leave_out:
        proposer["leave_out"] = sequences[1]
    return {"num_speculative_tokens": NUM_DRAFT, "num_chains": len(kinds), "proposers": [proposer, UNGATED]}


KINDS = {
    "wrong, oracle": ["wrong", "oracle"],
    "oracle, wrong": ["oracle", "wrong"],
    "corrupted": ["corrupted"] * 4,
    "all sorts": ["late", "short", "corrupted", "oracle"],
}


# The size of the cache and the winning chain do not depend on each other: a few pairs do for all.
@pytest.mark.engine
@pytest.mark.parametrize(
    ("cache", "kinds"),
    [("roomy", "wrong, oracle"), ("roomy", "oracle, wrong"), ("roomy", "all sorts"), ("tight", "corrupted"),
     ("tight", "all sorts")],
)  # fmt: skip
def test_same_tokens_as_stock(
    cache: str,
    kinds: str,
    stock: dict[str, list[dict[str, Any]]],
    sequences: tuple[str, list[int]],
    request: pytest.FixtureRequest,
) -> None:
    engine: Engine = request.getfixturevalue(cache)
    engine.send("set_drafting", several(KINDS[kinds], sequences))
    before = engine.send("metrics")
    for kind, sent in SENT.items():
        ours = engine.generate(sent, reset_prefix_cache=cache == "roomy")
        assert_same(ours, stock[kind], f"{kinds}, {cache}, {kind}", sent)
        for mine, theirs in zip(ours, stock[kind], strict=True):
            for a, b in zip(mine["outputs"], theirs["outputs"], strict=True):
                assert_close_logprobs(a["logprobs"], b["logprobs"])
    counted = engine.send("call", "counted_chains")
    assert counted["forks"] > (100 if cache == "roomy" else 60)
    stats = engine.send("stats")["ensemble"]
    assert stats["forks"] == counted["forks"]
    if kinds != "oracle, wrong":
        assert stats["fork_wins"] > 50
    if cache == "tight":
        assert engine.send("metrics")["vllm:num_preemptions"] > before["vllm:num_preemptions"]


@pytest.mark.engine
@pytest.mark.parametrize("kinds", [["wrong", "oracle"], ["oracle", "wrong"], ["corrupted"] * 3])
def test_every_true_token_is_accepted_whichever_chain_is_the_main_one(
    kinds: list[str],
    roomy: Engine,
    stock: dict[str, list[dict[str, Any]]],
    sequences: tuple[str, list[int]],
) -> None:
    """All true tokens of the best chain are accepted. Requests with a grammar keep one chain and get no drafts."""
    roomy.send("set_drafting", several(kinds, sequences, leave_out=True))
    # If a prompt has two outputs, the oracle cannot know which of them a request will have.
    sent = [index for index, r in enumerate(PLAIN) if r["params"].get("n", 1) == 1][:40]
    served = [PLAIN[index] for index in sent]
    assert_same(roomy.generate(served), [stock["plain"][index] for index in sent], "true tokens", served)
    counted = roomy.send("call", "counted_chains")
    assert counted["true"] == counted["accepted"] > 500
    assert counted["missed"] == 0
    assert counted["forks"] > 100


@pytest.mark.engine
def test_the_logits_behind_every_token_are_those_without_forks(
    roomy: Engine, stock: dict[str, list[dict[str, Any]]], sequences: tuple[str, list[int]]
) -> None:
    sent = [r for r in PLAIN if r["params"].get("n", 1) == 1][:24]
    roomy.send("call", "keep_logits")
    kept = []
    for kinds in (["oracle"], ["wrong", "oracle"], ["corrupted"] * 4):
        roomy.send("call", "keep_logits")
        roomy.send("set_drafting", several(kinds, sequences))
        roomy.generate(sent, reset_prefix_cache=True)
        kept.append(roomy.send("call", "take_logits"))
    one, two, four = kept
    compared = 0
    for several_chains in (two, four):
        for key in one.keys() & several_chains.keys():
            assert np.array_equal(one[key], several_chains[key])
            compared += 1
    assert compared > 800
    assert any(not np.array_equal(a, b) for a, b in zip(one.values(), list(one.values())[1:], strict=False))


@pytest.mark.engine
@pytest.mark.parametrize("how", ["stays away", "no head"])
def test_controls_that_must_fail(
    how: str, roomy: Engine, stock: dict[str, list[dict[str, Any]]], sequences: tuple[str, list[int]]
) -> None:
    """Tokens differ if winners are not copied to their request, or if forks lack the tokens that chains share."""
    roomy.send("set_drafting", several(["corrupted"] * 4, sequences))
    try:
        roomy.send("call", "break_forks", how)
        broken = roomy.generate(PLAIN, reset_prefix_cache=True)
        different = sum(a != b for a, b in zip(tokens(broken), tokens(stock["plain"]), strict=True))
        assert different > len(PLAIN) // 4
    finally:
        roomy.send("call", "break_forks", "mend")
    assert_same(roomy.generate(PLAIN, reset_prefix_cache=True), stock["plain"], "mended", PLAIN)


@pytest.mark.engine
def test_aborted_requests_leave_no_state(roomy: Engine, sequences: tuple[str, list[int]]) -> None:
    settings = {**several(["corrupted"] * 4, sequences), "proposers": ["suffix", "ngram", "lookahead", UNGATED]}
    roomy.send("set_drafting", settings)
    running = roomy.send("call", "abort_half_way", [r["prompt"] for r in PLAIN[:24]], 200, 12)
    assert running == 24
    roomy.generate([{"prompt": "x", "params": {"max_tokens": 1, "temperature": 0.0}}])
    assert roomy.send("stats")["live_requests"] <= 1


@pytest.mark.engine
@pytest.mark.parametrize(
    ("first", "more", "history"),
    [(1000, 2000, 1 << 20), pytest.param(4000, 6000, 4 << 20, marks=pytest.mark.long)],
    ids=["thousands", "ten thousand"],
)
def test_nothing_leaks_over_thousands_of_requests_with_preemption(
    first: int, more: int, history: int, tight: Engine
) -> None:
    bounded = {"name": "suffix", "max_history_bytes": history}
    tight.send(
        "set_drafting",
        {"num_speculative_tokens": NUM_DRAFT, "num_chains": 3, "proposers": [bounded, "lookahead", "ngram", UNGATED]},
    )
    prompts = corpus.held_out_prompts(250, 160)
    before = tight.send("metrics")

    def serve(begin: int, count: int) -> int:
        for start in range(begin, begin + count, 500):
            tight.generate(
                [
                    {"prompt": f"{number} {prompts[number % 250][:60]}", "params":
                     {"temperature": number % 2 * 0.8, "seed": number, "max_tokens": 4, "ignore_eos": True}}
                    for number in range(start, start + 500)
                ]
            )  # fmt: skip
        # These fill the cache, so that some are preempted.
        tight.generate([{**r, "params": {**r["params"], "max_tokens": 120, "ignore_eos": True}} for r in PLAIN[:16]])
        params = {"temperature": 0.0, "max_tokens": 3, "extra_args": {"specplug_speculate": False}}
        tight.generate([{"prompt": "last", "params": params}])
        assert tight.send("stats")["live_requests"] <= 1
        assert tight.send("call", "free_blocks") == tight.send("call", "scheduler_blocks")
        return tight.send("call", "held_bytes")  # type: ignore[no-any-return]

    held = serve(0, first)
    grown = serve(first, more) - held
    after = tight.send("metrics")
    assert after["vllm:num_preemptions"] > before["vllm:num_preemptions"]
    assert tight.send("stats")["ensemble"]["forks"] > more // 20
    assert grown < min(16_000, 6 * more), f"{grown / more:.1f} bytes a request"


@pytest.mark.engine
def test_start_up_says_what_is_set_aside(roomy: Engine, tight: Engine) -> None:
    for engine, blocks in ((roomy, 200), (tight, 60)):
        assert f"{blocks} of " in engine.tail(1_000_000)
        assert "KV-cache blocks" in engine.tail(1_000_000)
    assert tight.send("call", "scheduler_blocks") == 110 - 60 - 1  # block 0 belongs to no request


@pytest.mark.engine
def test_requests_with_a_grammar_keep_one_chain_by_name(roomy: Engine, sequences: tuple[str, list[int]]) -> None:
    roomy.send("set_drafting", several(["wrong", "oracle"], sequences))
    structured = [r for r in PLAIN if "json_schema" in r["params"]]
    assert structured
    roomy.generate(structured)
    assert "requests with structured outputs keep one chain" in roomy.tail(1_000_000)
    assert roomy.send("call", "counted_chains")["forks"] == 0


@pytest.mark.engine
@pytest.mark.parametrize(
    ("arguments", "config", "message"),
    [
        ({}, {"num_chains": 9}, "num_chains"),
        ({}, {"num_chains": 2, "sampler": "rejection"}, "needs a coupled sampler"),
        ({}, {"scratch_blocks": 4}, "is for chains beyond the first"),
        (ROOMY, {"num_chains": 2, "scratch_blocks": 1}, "a chain beyond the first takes 2 blocks"),
    ],
)
def test_wrong_settings_are_refused(arguments: dict[str, Any], config: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        Engine({**arguments, "speculative_config": {"method": "specplug", **config}})


@pytest.mark.engine
def test_a_small_cache_keeps_one_chain_and_says_so() -> None:
    """One request of full length needs all blocks, so that none is left for forks."""
    arguments = {"block_size": 32, "max_num_seqs": 8, "num_gpu_blocks_override": 33}
    with Engine({**arguments, "speculative_config": {**CHAINS, "proposers": ["suffix"]}}) as engine:
        assert "every request keeps one chain (num_chains is 4): the KV cache has no blocks to spare" in engine.tail(
            1_000_000
        )
        assert engine.generate(PLAIN[:4])


@pytest.mark.engine
def test_a_model_with_sliding_windows(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Two groups of layers, with block tables of their own; drafts and windows cross the ends of blocks."""
    model = tmp_path_factory.mktemp("window")
    with Engine() as child:
        child.send("call", "save_tiny_window_model", str(model), str(target_path()))
    sent = [
        {"prompt": [50 + (11 * at * at + 7 * number) % 3000 for at in range(30 + 9 * number)], "params":
         {"temperature": 0.9, "seed": number, "max_tokens": 14, "ignore_eos": True}}
        for number in range(5)
    ]  # fmt: skip
    arguments = {**ROOMY, "model": str(model), "max_model_len": 256}
    with Engine(arguments, plugin=False) as engine:
        expected = engine.generate(sent)
    path = model / "sequences.json"
    path.write_text(json.dumps([o["prompt_token_ids"] + o["outputs"][0]["token_ids"] for o in expected]))
    config = {**CHAINS, "scratch_blocks": 200}
    with Engine({**arguments, "speculative_config": config}) as engine:
        assert "200 of " in engine.tail(1_000_000)
        engine.send("set_drafting", several(["corrupted"] * 4, (str(path), [])))
        assert_same(engine.generate(sent), expected, "sliding windows", sent)
        stats = engine.send("stats")["ensemble"]
        assert stats["fork_wins"] > 3
        engine.send("call", "break_forks", "stays away")
        broken = engine.generate(sent, reset_prefix_cache=True)
        assert tokens(broken) != tokens(expected), "the model must heed its context"


@pytest.mark.engine
def test_vllms_own_draft_model_among_the_chains(stock: dict[str, list[dict[str, Any]]]) -> None:
    """vLLM's drafter goes on from the winner's tokens, so that its drafts stay as good as without side chains."""
    accepted = []
    for num_chains in (1, 3):
        config = {
            "method": "draft_model", "model": str(draft_path()), "num_speculative_tokens": 4, "sampler": "gumbel",
            "draft_sample_method": "probabilistic", "proposers": ["suffix", "lookahead", UNGATED],
            "num_chains": num_chains,
        }  # fmt: skip
        with Engine({**ROOMY, "speculative_config": config}) as engine:
            sent = PLAIN[:32]
            assert_same(engine.generate(sent), stock["plain"][:32], f"draft_model, {num_chains} chains", sent)
            stats = engine.send("stats")
            emitted, steps = stats["emitted"], stats["request_steps"]
            accepted.append(emitted / steps)
            assert (stats["ensemble"]["forks"] > 50) == (num_chains > 1)
            if num_chains > 1:
                assert stats["ensemble"]["fork_wins"] > 10
    assert accepted[1] > accepted[0]


# -- Without an engine ------------------------------------------------------------------------------------------------


def cache_config(num_blocks: int, sizes: list[int]) -> Any:
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

    groups = [
        KVCacheGroupSpec(
            [f"layer {place}"], FullAttentionSpec(block_size=size, num_kv_heads=1, head_size=8, dtype=torch.float32)
        )
        for place, size in enumerate(sizes)
    ]
    return KVCacheConfig(num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=groups)


def engine_config(num_chains: int = 3, scratch_blocks: int | None = None, longest: int = 100, **more: Any) -> Any:
    settings = {
        "num_speculative_tokens": 8,
        "num_chains": num_chains,
        "scratch_blocks": scratch_blocks,
        "proposers": [],
    }
    model = {"max_model_len": longest, "is_encoder_decoder": False, "is_multimodal_model": False, "uses_mrope": False}
    return SimpleNamespace(
        additional_config={"specplug": settings},
        speculative_config=SimpleNamespace(num_speculative_tokens=8, method="custom_class"),
        scheduler_config=SimpleNamespace(max_num_seqs=4),
        model_config=SimpleNamespace(**model, enable_prompt_embeds=False),
        parallel_config=SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1, data_parallel_size=1),
        use_v2_model_runner=False,
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=False),
        lora_config=more.get("lora"),
        kv_transfer_config=None,
    )


@given(
    num_blocks=st.integers(1, 3000),
    sizes=st.lists(st.sampled_from([4, 16, 32]), min_size=1, max_size=3),
    num_chains=st.integers(2, 8),
    scratch_blocks=st.none() | st.integers(12, 400),
)
def test_scratch_stays_within_its_bounds(
    num_blocks: int, sizes: list[int], num_chains: int, scratch_blocks: int | None
) -> None:
    from vllm_specplug.hooks.scratch_blocks import plan_scratch

    scratch = plan_scratch(engine_config(num_chains, scratch_blocks), cache_config(num_blocks, sizes))
    longest = sum(-(-100 // size) for size in sizes)
    if scratch is None:
        per_row = sum(1 + -(-8 // size) for size in sizes)
        assert num_blocks - 1 - longest < per_row
        return
    assert scratch.num_rows <= 3
    assert scratch.num_blocks <= (scratch_blocks or max(num_blocks // 20, sum(scratch.blocks_per_row)))
    assert scratch.first_block + scratch.num_blocks == num_blocks
    assert scratch.first_block > longest
    ids = [block for fork in range(scratch.num_rows) for group in scratch.blocks_of(fork) for block in group]
    assert sorted(ids) == list(range(scratch.first_block, num_blocks))


def test_scratch_of_less_than_a_fork_is_refused_and_one_chain_needs_none() -> None:
    from vllm_specplug.hooks.scratch_blocks import describe_scratch, plan_scratch

    with pytest.raises(ConfigurationError, match="takes 3 blocks of the KV cache"):
        plan_scratch(engine_config(2, 2), cache_config(1000, [4]))
    assert plan_scratch(engine_config(1), cache_config(1000, [4])) is None
    assert describe_scratch(engine_config(1), cache_config(1000, [4]), None) == ""
    config = engine_config(2, lora=object())
    assert plan_scratch(config, cache_config(1000, [4])) is None
    config.scheduler_config.max_num_seqs = 1
    assert "max_num_seqs is 1" in describe_scratch(config, cache_config(1000, [4]), None)
    config.scheduler_config.max_num_seqs = 4
    assert "LoRA adapters are enabled" in describe_scratch(config, cache_config(1000, [4]), None)


def test_what_a_winning_fork_would_falsify_keeps_one_chain() -> None:
    """Such are layers of another kind in a wrapper, and drafters and outputs that read the rows of the main chain."""
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec, RSWASpec, UniformTypeKVCacheSpecs

    from vllm_specplug.hooks.scratch_blocks import why_single

    sizes = {"block_size": 4, "num_kv_heads": 1, "dtype": torch.float32}
    known = {f"layer {size}": FullAttentionSpec(head_size=size, **sizes) for size in (8, 16)}
    odd = {"recurrent": MambaSpec(block_size=4, shapes=((2,),), dtypes=(torch.float32,))}
    wide = {"layer 8": known["layer 8"], "wide": RSWASpec(head_size=8, rswa_window=8, **sizes)}
    for layers, reason in ((known, ""), (odd, "layers of MambaSpec hold more"), (wide, "layers of RSWASpec hold more")):
        cache = cache_config(1000, [4])
        cache.kv_cache_groups[0].kv_cache_spec = UniformTypeKVCacheSpecs(block_size=4, kv_cache_specs=layers)
        found = why_single(engine_config(2), cache)
        assert found.startswith(reason) if reason else found == ""
    config = engine_config(2)
    for method in ("eagle3", "dflash", "dspark", "mlp_speculator"):
        config.speculative_config.method = method
        assert why_single(config, cache_config(1000, [4])) == f"vLLM's {method} drafts from hidden states"
    config = engine_config(2)
    config.aux_output_config = SimpleNamespace(enabled=True)
    assert why_single(config, cache_config(1000, [4])) == "routed experts are returned"
    config.aux_output_config.enabled = False
    assert why_single(config, cache_config(1000, [4])) == ""


chain = st.lists(st.integers(0, 2), min_size=1, max_size=6)


@given(main=chain, further=st.lists(chain, max_size=5), max_rows=st.integers(0, 5), max_tokens=st.integers(0, 12))
def test_forks_say_something_new_and_fit(
    main: list[int], further: list[list[int]], max_rows: int, max_tokens: int
) -> None:
    from vllm_specplug.hooks.forks import plan_forks, shared_head

    forks = plan_forks({"a": main}, {"a": further, "b": [[1]]}, max_rows, max_tokens)
    assert len(forks) <= max_rows
    assert sum(len(fork.tokens) - fork.head for fork in forks) <= max_tokens
    paths = [main]
    for fork in forks:
        assert fork.request_id == "a"
        assert len(fork.tokens) <= len(main)
        assert fork.main_head == shared_head(fork.tokens, main)
        assert fork.head == max(shared_head(fork.tokens, path) for path in paths) < len(fork.tokens)
        assert fork.head == shared_head(fork.tokens, paths[fork.parent])
        paths.append(fork.tokens)
    everything = [main] + [fork.tokens for fork in plan_forks({"a": main}, {"a": further}, 5, 36)]
    for path in further:
        assert any(each[: len(path[: len(main)])] == path[: len(main)] for each in everything)


@given(chains=st.lists(chain, min_size=1, max_size=5), target=st.lists(st.integers(0, 2), min_size=7, max_size=7))
def test_the_walk_finds_the_chain_that_gets_furthest(chains: list[list[int]], target: list[int]) -> None:
    """Compared with trying every chain by itself; the target's token depends only on the tokens before it."""
    from vllm_specplug.hooks.forks import shared_head, walk

    winner, emitted = walk(chains, lambda leader, depth: target[depth])
    accepted = [shared_head(each, target) for each in chains]
    assert accepted[winner] == max(accepted)
    assert winner == accepted.index(max(accepted))
    assert emitted == target[: max(accepted) + 1]
