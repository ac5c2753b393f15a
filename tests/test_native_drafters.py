"""vLLM's own drafters under our verifier on the V1 runner (V2: ``test_v2.py``): same tokens as without speculation.

EAGLE and Medusa heads have random weights: they draft nonsense, but run all of vLLM's code for them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compare import assert_same
from harness import Engine, EngineError, Engines
from requests_matrix import PLAIN_FEATURES, PROCESSOR_FEATURES, requests

from vllm_specplug.tiny_models import draft_path, target_path

pytestmark = pytest.mark.engine

NUM_DRAFT = 4
SENT = requests(63, [*PLAIN_FEATURES, *PROCESSOR_FEATURES], first_seed=2000)
# vLLM's sampling drafters heed seed and temperature only; the lengths are such that no draft goes beyond the end.
SAMPLED = [
    {"prompt": r["prompt"], "params": {"temperature": t, "seed": i, "max_tokens": 41, "ignore_eos": True}}
    for i, (r, t) in enumerate(zip(SENT[:32], [1.0, 0.7, 1.0, 0.0] * 8, strict=True))
]


@pytest.fixture(scope="module")
def stock(engines: Engines) -> dict[str, list[dict[str, Any]]]:
    with engines.borrowed({}, plugin=False) as engine:
        return {"mixed": engine.generate(SENT), "sampled": engine.generate(SAMPLED)}


def save_heads(folder: Path, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> str:
    """Save a checkpoint with random weights; returns its path."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=generator) * 0.05 for name, shape in shapes.items()}
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of an EAGLE and a Medusa checkpoint that fit the tiny target."""
    folder = tmp_path_factory.mktemp("heads")
    target = json.loads((target_path() / "config.json").read_text())
    hidden, vocab, middle = target["hidden_size"], target["vocab_size"], target["intermediate_size"]
    keys = target["num_key_value_heads"] * target["head_dim"]
    layer = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (keys, hidden), "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (middle, hidden), "mlp.up_proj": (middle, hidden),
        "mlp.down_proj": (hidden, middle), "post_attention_layernorm": (hidden,),
    }  # fmt: skip
    eagle = {f"layers.0.{name}.weight": shape for name, shape in layer.items()}
    return {
        "eagle": save_heads(
            folder / "eagle",
            {**target, "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1},
            {**eagle, "fc.weight": (hidden, 2 * hidden)},
        ),
        "medusa": save_heads(
            folder / "medusa",
            {"model_type": "medusa", "architectures": ["MedusaModel"], "hidden_size": hidden, "vocab_size": vocab,
             "num_heads": NUM_DRAFT, "num_hidden_layers": 1},
            {name: shape for head in range(NUM_DRAFT) for name, shape in (
                (f"blocks.{head}.layers.0.weight", (hidden, hidden)), (f"lm_heads.{head}.weight", (vocab, hidden)))},
        ),
    }  # fmt: skip


def start(config: dict[str, Any]) -> Engine:
    return Engine({"speculative_config": {"num_speculative_tokens": NUM_DRAFT, "sampler": "gumbel", **config}})


def counts(engine: Engine) -> tuple[int, int]:
    """Draft tokens verified and accepted so far."""
    metrics = engine.send("metrics")
    return metrics["vllm:spec_decode_num_draft_tokens"], metrics["vllm:spec_decode_num_accepted_tokens"]


@pytest.mark.parametrize("method", ["ngram", "eagle", "medusa"])
def test_same_tokens_as_stock(method: str, stock: dict[str, list[dict[str, Any]]], heads: dict[str, str]) -> None:
    config: dict[str, Any] = {"method": method}
    if method == "ngram":
        config |= {"prompt_lookup_min": 1, "prompt_lookup_max": 3}
    else:
        config["model"] = heads[method]
    with start(config) as engine:
        assert f"verifies the drafts of vLLM's {method} (greedy)" in engine.tail(100_000)
        assert_same(engine.generate(SENT), stock["mixed"], method, SENT)
        drafted, accepted = counts(engine)
        assert drafted > 500
        if method == "ngram":
            assert accepted > 50
        engine.generate([{"prompt": "x", "params": {"max_tokens": 1, "temperature": 0.0}}])
        assert engine.send("stats")["live_requests"] <= 1


def test_joined_by_proposers_of_ours(stock: dict[str, list[dict[str, Any]]]) -> None:
    config = {
        "method": "draft_model", "model": str(draft_path()), "draft_sample_method": "probabilistic",
        "proposers": ["ngram", "recycling", {"name": "ensemble", "gate": False}],
    }  # fmt: skip
    with start(config) as engine:
        assert "verifies the drafts of vLLM's draft_model (probabilistic), joined by ngram" in engine.tail(100_000)
        assert_same(engine.generate(SENT), stock["mixed"], "joined", SENT)
        stats = engine.send("stats")
        assert min(each["drafted"] for each in stats["proposers"].values()) > 20
        assert sum(each["drafted"] for each in stats["proposers"].values()) == counts(engine)[0]
        for name in ("draft_model", "ngram"):
            chosen = [dict(r, params={**r["params"], "extra_args": {"specplug_proposers": name}}) for r in SAMPLED[:8]]
            before = engine.send("stats")["proposers"]
            assert_same(engine.generate(chosen), stock["sampled"][:8], name, chosen)
            after = engine.send("stats")["proposers"]
            assert {each for each in after if after[each]["drafted"] > before[each]["drafted"]} == {name}
        with pytest.raises(EngineError, match="Did you mean 'ngram'"):
            engine.generate(
                [{"prompt": "x", "params": {"max_tokens": 2, "extra_args": {"specplug_proposers": "ngrm"}}}]
            )
        engine.generate([{"prompt": "x", "params": {"max_tokens": 1, "temperature": 0.0}}])
        assert engine.send("stats")["live_requests"] <= 1


def test_a_request_option_that_cannot_be_heeded_is_refused(heads: dict[str, str]) -> None:
    with start({"method": "medusa", "model": heads["medusa"]}) as engine:
        for extra_args, told in (
            ({"specplug_speculate": False}, "requests can choose with method 'specplug'"),
            ({"specplug_speculat": False}, "Did you mean 'specplug_speculate'"),
        ):
            with pytest.raises(EngineError, match=told):
                engine.generate([{"prompt": "x", "params": {"max_tokens": 2, "extra_args": extra_args}}])
        assert engine.generate([{"prompt": "x", "params": {"max_tokens": 2, "extra_args": {"mine": 1}}}])


def test_the_same_model_accepts_all_of_its_own_samples(stock: dict[str, list[dict[str, Any]]]) -> None:
    config = {"method": "draft_model", "model": str(target_path()), "draft_sample_method": "probabilistic"}
    with start(config) as engine:
        assert_same(engine.generate(SAMPLED), stock["sampled"], "draft model itself", SAMPLED)
        drafted, accepted = counts(engine)
        assert drafted >= 32 * NUM_DRAFT * 7
        # The last digit of a logit depends on the size of the batch: the two best tokens may change places.
        assert accepted >= 0.999 * drafted


@pytest.fixture(scope="module")
def probabilities() -> dict[str, Any]:
    """Both tiny models outside vLLM, by name."""
    from transformers import AutoModelForCausalLM

    return {
        name: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for name, path in (("target", target_path()), ("draft", draft_path()))
    }


def test_acceptance_of_another_model_is_within_the_bounds(
    stock: dict[str, list[dict[str, Any]]], probabilities: dict[str, Any]
) -> None:
    """At each verified position a shared draw is accepted with probability (1 - TV)/(1 + TV) at least, 1 - TV at most.

    TV is the total variation distance of draft and target there (Daliri, Musco, Suresh, 2024).
    """
    config = {"method": "draft_model", "model": str(draft_path()), "draft_sample_method": "probabilistic"}
    with start(config) as engine:
        assert_same(engine.generate(SENT), stock["mixed"], "tiny draft", SENT)
        engine.send("call", "record_verified")
        outputs = engine.generate(SAMPLED)
        assert_same(outputs, stock["sampled"], "tiny draft", SAMPLED)
        steps = engine.send("call", "recorded")["steps"]
    emitted: dict[str, list[int]] = {}
    places: dict[str, list[tuple[int, int, bool]]] = {}  # of each request: output position, depth, accepted
    for request_id, draft, targets, num_emitted in steps:
        before = emitted.setdefault(request_id, [])
        for depth in range(min(num_emitted, len(draft))):
            places.setdefault(request_id, []).append((len(before) + depth, depth, draft[depth] == targets[depth]))
        before += targets[:num_emitted]
    lower, upper, accepted = ([[] for _ in range(NUM_DRAFT)] for _ in range(3))
    by_output = {tuple(tokens[:41]): request_id for request_id, tokens in emitted.items()}
    for request, output in zip(SAMPLED, outputs, strict=True):
        temperature = request["params"]["temperature"]
        if temperature == 0.0:
            continue
        tokens = output["outputs"][0]["token_ids"]
        whole = torch.tensor([output["prompt_token_ids"] + tokens])
        with torch.inference_mode():
            p, q = (
                (model(whole).logits[0] / temperature).softmax(-1, dtype=torch.float64)
                for model in (probabilities["target"], probabilities["draft"])
            )
        first = len(output["prompt_token_ids"]) - 1
        for position, depth, was_accepted in places[by_output[tuple(tokens)]]:
            if position >= len(tokens):
                continue
            tv = float((p[first + position] - q[first + position]).abs().sum()) / 2
            lower[depth].append((1 - tv) / (1 + tv))
            upper[depth].append(1 - tv)
            accepted[depth].append(was_accepted)
    for depth in range(NUM_DRAFT):
        if depth < 2:
            assert len(accepted[depth]) > 50
        expected_low, expected_high = np.array(lower[depth]), np.array(upper[depth])
        count = sum(accepted[depth])
        # Independent draws: four standard deviations of chance on either side.
        assert count >= expected_low.sum() - 4 * np.sqrt((expected_low * (1 - expected_low)).sum() + 1)
        assert count <= expected_high.sum() + 4 * np.sqrt((expected_high * (1 - expected_high)).sum() + 1)
