"""The promise on Model Runner V2, vLLM's default on GPUs: same tokens as stock V2, whoever drafts.

No GPU is needed: the runner's kernels, vLLM's and ours, run under Triton's interpreter.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import sessions
from compare import assert_close_logprobs, assert_same
from harness import Engine, EngineError, Engines
from requests_matrix import V2_FEATURES, noise_alone, requests, requests_v2
from small_model import VOCAB, draft_path, target_path

from vllm_specplug import tiny_models
from vllm_specplug.measure import corpus

pytestmark = pytest.mark.engine

NUM_DRAFT = 3
UNGATED = {"name": "ensemble", "gate": False}  # drafts are verified whether they pay or not
SPECPLUG = {"method": "specplug", "num_speculative_tokens": NUM_DRAFT, "proposers": []}
SIZES = {"max_model_len": 384, "max_num_seqs": 24, "max_num_batched_tokens": 1024}
# A budget of reasoning tokens needs words that begin and end reasoning; any will do for a model that knows none.
ROOMY = {**SIZES, "reasoning_config": {"reasoning_start_str": "def", "reasoning_end_str": "\n"}}
# Small enough for preemption, prompts prefilled in pieces, cached prefixes of earlier requests in the way.
TIGHT = {**ROOMY, "num_gpu_blocks_override": 6, "max_num_batched_tokens": 96, "enable_chunked_prefill": True}

SENT = requests_v2(22, first_seed=500)


# Two halves of the requests, each with every feature once, greedy or sampled.
HALVES = [
    [at for at in range(len(SENT)) if (at % len(V2_FEATURES) % 2 == at // len(V2_FEATURES)) == first]
    for first in (True, False)
]


@pytest.fixture(scope="module")
def stock(engines: Engines) -> list[dict[str, Any]]:
    with engines.borrowed(ROOMY, plugin=False, v2=True) as engine:
        return engine.generate(SENT)


@pytest.fixture(scope="module")
def files(stock: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Paths of the file that the oracle reads and of a token store."""
    from transformers import AutoTokenizer

    from vllm_specplug.stores.format import tokenizer_fingerprint
    from vllm_specplug.stores.writer import DatastoreWriter, Piece, add_texts

    folder = tmp_path_factory.mktemp("v2")
    sequences = [o["prompt_token_ids"] + sequence["token_ids"] for o in stock for sequence in o["outputs"]]
    (folder / "sequences.json").write_text(json.dumps(sequences))
    tokenizer = AutoTokenizer.from_pretrained(target_path())
    store = folder / "stdlib.specstore"
    texts = (corpus.read_text(path) for path in corpus.standard_library_sources()[:40])
    with DatastoreWriter(store, vocab_size=len(tokenizer), fingerprint=tokenizer_fingerprint(tokenizer)) as writer:
        add_texts(writer, tokenizer, (Piece(text, True) for text in texts if text))
        writer.finish()
    return {"sequences": str(folder / "sequences.json"), "store": str(store)}


def drafting(name: str, files: dict[str, str]) -> dict[str, Any]:
    settings: dict[str, Any] = {"num_speculative_tokens": NUM_DRAFT}
    if name == "none":
        return {**settings, "proposers": []}
    entries: dict[str, list[Any]] = {
        "random": ["in_child.RandomTokens"],
        "oracle": [{"name": "in_child.Oracle", "sequences": files["sequences"]}],
        "all together": ["rest", "ngram", "suffix", "jacobi", "lookahead", "recycling"],
    }
    return {**settings, "proposers": [*entries.get(name, [name]), UNGATED], "datastore": files["store"]}


@pytest.fixture(scope="module")
def roomy() -> Iterator[Engine]:
    with Engine({**ROOMY, "speculative_config": SPECPLUG}, v2=True) as engine:
        assert "runner V2, sampler gumbel (drafter-invariant)" in engine.tail(100_000)
        yield engine


@pytest.fixture(scope="module")
def tight() -> Iterator[Engine]:
    """With async scheduling, as on a GPU, a cache so small that requests are preempted, and verification in chunks."""
    with Engine({**TIGHT, "speculative_config": SPECPLUG}, v2=True, asynchronous=True) as engine:
        assert "async scheduling on" in engine.tail(100_000)
        engine.send("call", "verify_in_chunks_of", 7)
        yield engine


def check(
    ours: list[dict[str, Any]],
    stock: list[dict[str, Any]],
    what: str,
    sent: list[dict[str, Any]] | None = None,
    at_least: int = 15,
) -> None:
    assert_same(ours, stock, what, sent or SENT)
    compared = 0
    for mine, theirs in zip(ours, stock, strict=True):
        assert_close_logprobs(mine["prompt_logprobs"], theirs["prompt_logprobs"])
        for a, b in zip(mine["outputs"], theirs["outputs"], strict=True):
            compared += assert_close_logprobs(a["logprobs"], b["logprobs"])
    assert compared > at_least


# With preemption the runner is slow, so that only a few proposers run there.
@pytest.mark.parametrize(
    ("cache", "proposer", "places"),
    [
        ("roomy", "none", range(22)), ("roomy", "rest", HALVES[0]), ("roomy", "ngram", HALVES[1]),
        ("roomy", "suffix", HALVES[0]), ("roomy", "jacobi", HALVES[1]), ("roomy", "lookahead", HALVES[0]),
        ("roomy", "recycling", HALVES[1]), ("roomy", "random", range(22)), ("roomy", "oracle", range(22)),
        ("tight", "all together", range(22)), ("tight", "random", range(22)), ("tight", "oracle", range(22)),
    ],
    ids=lambda value: value if isinstance(value, str) else len(value),
)  # fmt: skip
def test_same_tokens_as_stock_v2(
    cache: str,
    proposer: str,
    places: Sequence[int],
    stock: list[dict[str, Any]],
    files: dict[str, str],
    request: pytest.FixtureRequest,
) -> None:
    engine: Engine = request.getfixturevalue(cache)
    engine.send("set_drafting", drafting(proposer, files))
    before = engine.send("metrics")
    sent, expected = [SENT[at] for at in places], [stock[at] for at in places]
    ours = engine.generate(sent, reset_prefix_cache=cache == "roomy")
    check(ours, expected, f"{proposer}, {cache}", sent, at_least=len(sent) // 2)
    after, stats = engine.send("metrics"), engine.send("stats")
    delta = {name: after[name] - before[name] for name in after if isinstance(after[name], int | float)}
    drafted = sum(p["drafted"] for p in stats["proposers"].values())
    accepted = sum(p["accepted"] for p in stats["proposers"].values())
    assert (drafted > 0) == (proposer != "none")
    if cache == "tight":
        # If drafts are accepted, requests may end before the cache is full.
        assert delta["vllm:num_preemptions"] > 0 or proposer == "all together", "the cache was meant to be too small"
        # Async scheduling counts k draft tokens for a request before it knows its draft.
        assert delta["vllm:spec_decode_num_draft_tokens"] > drafted
        assert engine.send("call", "num_chunked_verifications") > 0
    else:
        assert delta["vllm:spec_decode_num_draft_tokens"] == drafted
    if proposer == "oracle":
        # Every draft of the oracle is right: rejected tokens are behind the end of a request or of its grammar.
        assert accepted >= 0.85 * drafted
    if proposer == "random":
        assert accepted < 0.05 * drafted


@pytest.mark.parametrize("cache", ["roomy", "tight"])
def test_streaming_input_sessions(cache: str, engines: Engines, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Without and with async scheduling."""
    with engines.borrowed(ROOMY, plugin=False, v2=True) as engine:
        sent, free = sessions.made(engine, corpus.held_out_prompts(6, 60), 6)
        expected = engine.send("call", "sessions", sent)
    sessions.write_oracle(tmp_path / "sequences.json", sent, free, expected)
    engine = request.getfixturevalue(cache)
    oracle = {"name": "in_child.Oracle", "sequences": str(tmp_path / "sequences.json")}
    engine.send("set_drafting", {"num_speculative_tokens": NUM_DRAFT, "proposers": [oracle, UNGATED]})
    # V2 counts a turn that a repetition ends to the end of its step: tests/test_history.py has what is counted.
    sessions.check(engine, sent, expected, is_counted=False)


def test_every_oracle_token_is_accepted(roomy: Engine, stock: list[dict[str, Any]], files: dict[str, str]) -> None:
    """Requests end by their length alone, so that no draft reaches beyond an end."""
    roomy.send("set_drafting", drafting("oracle", files))
    plain = [
        index
        for index, (request, output) in enumerate(zip(SENT, stock, strict=True))
        if output["outputs"][0]["finish_reason"] == "length" and "json_schema" not in request["params"]
    ]
    assert len(plain) >= 8
    sent = [
        dict(SENT[index], params={**SENT[index]["params"], "n": 1})
        for index in plain
        if "n" not in SENT[index]["params"]
    ]
    roomy.generate(sent, reset_prefix_cache=True)
    (counters,) = roomy.send("stats")["proposers"].values()
    assert counters["drafted"] > 40
    assert counters["accepted"] == counters["drafted"]


def test_same_tokens_with_a_vocabulary_of_several_blocks() -> None:
    """Kernels take 1024 tokens at a time, more than the small vocabulary has."""
    arguments = {**SIZES, "model": str(tiny_models.target_path())}
    sent = requests(6, [{}, {"top_k": 20, "top_p": 0.9}, {"logprobs": 2}], first_seed=700, longest=6)
    with Engine(arguments, plugin=False, v2=True) as engine:
        expected = engine.generate(sent)
    config = {**SPECPLUG, "proposers": ["ngram", "in_child.RandomTokens", UNGATED]}
    with Engine({**arguments, "speculative_config": config}, v2=True) as engine:
        check(engine.generate(sent), expected, "several blocks", sent, at_least=5)
        assert sum(each["drafted"] for each in engine.send("stats")["proposers"].values()) > 20


@pytest.mark.parametrize("name", ["Raises", "OutsideVocabulary", "TooMany", "WritesTable"])
def test_a_broken_proposer_changes_nothing(name: str, tight: Engine, stock: list[dict[str, Any]]) -> None:
    tight.send("set_drafting", {"num_speculative_tokens": NUM_DRAFT, "proposers": [f"in_child.{name}", "ngram"]})
    assert_same(tight.generate(SENT[:6]), stock[:6], name, SENT[:6])
    stats = tight.send("stats")["proposers"]
    assert stats[f"in_child.{name}"]["active"] == (name not in ("Raises", "WritesTable"))
    assert stats["ngram"]["active"]


def test_proposers_see_what_was_verified(roomy: Engine, stock: list[dict[str, Any]]) -> None:
    """``observe()`` reports all emitted tokens in order, and the target's choices behind a rejected draft token."""
    roomy.send("set_drafting", {"num_speculative_tokens": NUM_DRAFT, "proposers": ["in_child.Recorder"]})
    sent = [r for r in SENT if not {"n", "json_schema", "stop"} & set(r["params"])][:6]
    outputs = roomy.generate(sent, reset_prefix_cache=True)
    records = roomy.send("call", "recorded")
    told = sorted(tuple(tokens) for tokens in records["emitted"].values())
    assert told == sorted(tuple(o["outputs"][0]["token_ids"]) for o in outputs)
    assert records["behind_a_rejected_draft"] > 10


def test_a_request_can_switch_speculation_off(roomy: Engine) -> None:
    roomy.send("set_drafting", {"num_speculative_tokens": NUM_DRAFT, "proposers": ["in_child.RandomTokens"]})
    params = {"temperature": 0.0, "max_tokens": 6, "ignore_eos": True}
    roomy.generate([{"prompt": "import", "params": {**params, "extra_args": {"specplug_speculate": False}}}])
    assert roomy.send("stats")["proposers"]["in_child.RandomTokens"]["chosen"] == 0
    roomy.generate([{"prompt": "import", "params": params}])
    assert roomy.send("stats")["proposers"]["in_child.RandomTokens"]["chosen"] > 0
    # A finished request is forgotten at the start of the step after its last one.
    assert roomy.send("stats")["live_requests"] <= 1


def test_logprobs_of_chosen_tokens_are_refused(roomy: Engine) -> None:
    """vLLM's V2 verification would leave them out in silence; the engine goes on after the error."""
    with pytest.raises(EngineError, match="logprob_token_ids cannot be served with speculation on Model Runner V2"):
        roomy.generate([{"prompt": "x", "params": {"max_tokens": 2, "logprob_token_ids": [3, 4]}}])
    assert roomy.generate([{"prompt": "x", "params": {"max_tokens": 2, "temperature": 0.0}}])


def test_drafting_on_the_device(roomy: Engine, stock: list[dict[str, Any]], files: dict[str, str]) -> None:
    """``rest`` on the device drafts as on the host; more tokens may be accepted, since padding may be right."""
    accepted = {}
    for place in ("host", "device"):
        if place == "host":
            # On the device drafts do not heed the target's noise.
            settings = {**drafting("rest", files), "proposers": [{"name": "rest", "sharpness": 0}, UNGATED]}
            roomy.send("set_drafting", settings)
        else:
            roomy.send("call", "draft_on_device", files["store"])
        before = roomy.send("metrics")["vllm:spec_decode_num_accepted_tokens"]
        try:
            check(roomy.generate(SENT[:11], reset_prefix_cache=True), stock[:11], place, SENT[:11], at_least=5)
        finally:
            roomy.send("call", "draft_on_device", None)
        accepted[place] = roomy.send("metrics")["vllm:spec_decode_num_accepted_tokens"] - before
    assert accepted["device"] >= accepted["host"] > 0


def test_proposers_are_given_the_noise_that_the_verifier_uses(roomy: Engine, tight: Engine) -> None:
    """If noise alone decides, a proposer that knows it is always right."""
    sent = noise_alone(4, 1 + 2 * (NUM_DRAFT + 1), VOCAB)
    for engine in (roomy, tight):
        engine.send(
            "set_drafting", {"num_speculative_tokens": NUM_DRAFT, "proposers": ["in_child.NoiseAlone", UNGATED]}
        )
        outputs = engine.generate(sent)
        counters = engine.send("stats")["proposers"]["in_child.NoiseAlone"]
        # Under async scheduling a request's last step is not counted.
        assert counters["drafted"] >= 4 * NUM_DRAFT
        assert counters["accepted"] == counters["drafted"]
        assert len({token for output in outputs for token in output["outputs"][0]["token_ids"]}) > 3


def test_vllms_own_drafter_joined_by_ours(stock: list[dict[str, Any]]) -> None:
    config: dict[str, Any] = {
        "num_speculative_tokens": NUM_DRAFT, "sampler": "gumbel", "method": "draft_model", "model": str(draft_path()),
        "draft_sample_method": "probabilistic", "proposers": ["ngram", UNGATED],
    }  # fmt: skip
    for asynchronous in (False, True):
        with Engine({**ROOMY, "speculative_config": config}, v2=True, asynchronous=asynchronous) as engine:
            assert "proposers: ngram" in engine.tail(100_000)
            assert "joining vLLM's draft_model" in engine.tail(100_000)
            check(engine.generate(SENT[:11]), stock[:11], "joined", SENT[:11], at_least=5)
            stats = engine.send("stats")["proposers"]
            assert stats["draft_model"]["drafted"] > 10
            assert stats["ngram"]["drafted"] > 3
            only = {"specplug_proposers": "draft_model"}
            engine.generate([dict(r, params={**r["params"], "extra_args": only}) for r in SENT[:3]])
            assert engine.send("stats")["proposers"]["ngram"]["drafted"] == stats["ngram"]["drafted"]


@pytest.mark.parametrize("draft", ["itself", "ngram"])
def test_vllms_own_drafters(draft: str, stock: list[dict[str, Any]]) -> None:
    config: dict[str, Any] = {"num_speculative_tokens": NUM_DRAFT, "sampler": "gumbel"}
    if draft == "ngram":
        config |= {"method": "ngram", "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    else:
        config |= {"method": "draft_model", "model": str(target_path()), "draft_sample_method": "probabilistic"}
    with Engine({**ROOMY, "speculative_config": config}, v2=True) as engine:
        assert f"verifies the drafts of vLLM's {config['method']}" in engine.tail(100_000)
        check(engine.generate(SENT[:11]), stock[:11], draft, SENT[:11], at_least=5)
        before = engine.send("metrics")
        # vLLM's drafters heed seed and temperature only; 1 + 4, 8 or 12 tokens, so that no draft reaches beyond the end
        # of a request.
        params = [{"temperature": t, "seed": s, "max_tokens": 1 + 4 * n, "ignore_eos": True}
                  for s, (t, n) in enumerate([(0.0, 1), (0.5, 2), (1.0, 3), (1.5, 2), (1.0, 1)])]  # fmt: skip
        engine.generate([{"prompt": r["prompt"], "params": p} for r, p in zip(SENT, params, strict=False)])
        after = engine.send("metrics")
        drafted, accepted = (
            after[name] - before[name]
            for name in ("vllm:spec_decode_num_draft_tokens", "vllm:spec_decode_num_accepted_tokens")
        )
        assert drafted > 20
        if draft == "itself":
            assert accepted == drafted, "draft and target share their noise: the same model draws the same tokens"


def test_rejection_sampler_keeps_greedy_text(stock: list[dict[str, Any]]) -> None:
    config = {**SPECPLUG, "sampler": "rejection", "proposers": ["ngram", "in_child.RandomTokens"]}
    greedy = [i for i, r in enumerate(SENT) if r["params"]["temperature"] == 0.0
              and not {"min_p", "logit_bias", "logprobs", "prompt_logprobs"} & set(r["params"])]  # fmt: skip
    with Engine({**ROOMY, "speculative_config": config}, v2=True, asynchronous=True) as engine:
        sent = [SENT[i] for i in greedy]
        assert len(sent) >= 3
        assert_same(engine.generate(sent), [stock[i] for i in greedy], "rejection", sent)
        with pytest.raises(EngineError, match="min_p and logit_bias"):
            engine.generate([{"prompt": "x", "params": {"min_p": 0.2, "max_tokens": 2}}])
        assert engine.generate([{"prompt": "x", "params": {"temperature": 1.0, "max_tokens": 3}}])
