"""Seeded requests that together use every sampling parameter that the verifier must support."""

from __future__ import annotations

import random
from typing import Any

from vllm_specplug.measure import corpus

JSON_SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "count": {"type": "integer"}},
    "required": ["name", "count"],
    "additionalProperties": False,
}

# PLAIN_FEATURES can be sampled for all logits rows in one call.
# PROCESSOR_FEATURES need vLLM's stateful logits processors.
PLAIN_FEATURES: list[dict[str, Any]] = [
    {},
    {"top_k": 20},
    {"top_p": 0.9},
    {"top_k": 50, "top_p": 0.8},
    {"presence_penalty": 0.7},
    {"frequency_penalty": 0.6, "repetition_penalty": 1.2},
    {"bad_words": ["self", " return", "import os"]},
    {"allowed_token_ids": list(range(0, 4096, 2))},
    {"stop": ["\n\n", "def "]},
    {"logprobs": 3},
    {"logprobs": 0, "top_k": 5},
    {"prompt_logprobs": 2},
    {"n": 2},
    {"json_schema": JSON_SCHEMA},
    {"ignore_eos": True},
    {"skip_special_tokens": False, "stop_token_ids": [199]},
]
PROCESSOR_FEATURES: list[dict[str, Any]] = [
    {"min_p": 0.1},
    {"logit_bias": {199: 3.0, 300: -100.0, 45: 1.5}},
    {"min_tokens": 12, "stop_token_ids": [199, 220, 221]},
    {"min_p": 0.05, "logprobs": 2, "frequency_penalty": 0.3},
    {"logit_bias": {10: 4.0}, "top_p": 0.9, "bad_words": ["self"]},
]
# Features for the V2 runner, whose kernels are slow on a CPU: several per request, for few requests and 512 token ids.
V2_FEATURES: list[dict[str, Any]] = [
    {},
    {"top_k": 20, "top_p": 0.9},
    {"min_p": 0.1, "logprobs": 2},
    {"presence_penalty": 0.7, "frequency_penalty": 0.6, "repetition_penalty": 1.2},
    {"logit_bias": {199: 3.0, 300: -100.0, 45: 1.5}, "bad_words": ["self", " return"]},
    {"allowed_token_ids": list(range(0, 512, 5)), "logprobs": 0},
    {"min_tokens": 5, "stop_token_ids": [199, 220, 221]},
    {"n": 2, "top_p": 0.9},
    {"json_schema": JSON_SCHEMA},
    {"thinking_token_budget": 3},
    {"prompt_logprobs": 1, "stop": ["def "]},
]
TEMPERATURES = [0.0, 0.6, 0.8, 1.0, 1.4]


def requests(
    count: int, features: list[dict[str, Any]], first_seed: int = 0, longest: int = 44, longest_prompt: int = 900
) -> list[dict[str, Any]]:
    """``count`` requests with all features at all temperatures in turn.

    Prompts have 120 to ``longest_prompt`` characters, outputs ``max(6, longest - 28)`` to ``longest`` tokens.
    """
    chooser = random.Random(first_seed)
    prompts = corpus.held_out_prompts(48, longest_prompt)
    sent = []
    for index in range(count):
        params = dict(features[index % len(features)])
        params["temperature"] = TEMPERATURES[(index // len(features)) % len(TEMPERATURES)]
        if params["temperature"] == 0.0 and "n" in params:
            params["temperature"] = 0.9  # vLLM refuses n > 1 for greedy requests
        params["seed"] = first_seed + index
        params["max_tokens"] = chooser.randint(max(6, longest - 28), longest)
        params.setdefault("ignore_eos", chooser.random() < 0.5)
        prompt = prompts[index % len(prompts)]
        sent.append({"prompt": prompt[: chooser.randint(120, len(prompt))], "params": params})
    return sent


def requests_v2(count: int, first_seed: int, longest: int = 10) -> list[dict[str, Any]]:
    """Requests for the V2 runner, with prompts of 50 to 200 tokens of the small vocabulary."""
    sent = requests(count, V2_FEATURES, first_seed, longest, longest_prompt=450)
    for request in sent:
        if "prompt_logprobs" in request["params"]:  # costs a logits row per prompt token
            request["prompt"] = request["prompt"][:20]
        if 0.0 < request["params"]["temperature"] != 0.9:  # 0.9 is for requests that ask for two outputs
            request["params"]["temperature"] = 1.0
    return sent


def noise_alone(num_requests: int, max_tokens: int, vocab_size: int = 4096) -> list[dict[str, Any]]:
    """Requests of so high a temperature that noise alone chooses among the tokens that they allow."""
    allowed = [50, 51, 77, 300, 301, vocab_size // 4, vocab_size - 96]
    return [
        {
            "prompt": prompt[:80],
            "params": {
                "hot": True, "seed": 3 * index - 5, "max_tokens": max_tokens, "ignore_eos": True,
                "allowed_token_ids": allowed, "extra_args": {"allowed": allowed},
            },
        }
        for index, prompt in enumerate(corpus.held_out_prompts(num_requests, 900))
    ]  # fmt: skip
