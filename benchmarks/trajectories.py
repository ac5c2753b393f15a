"""What proposers that learn from the verified positions are worth: emitted tokens per step, without an engine.

    python benchmarks/trajectories.py [--proposers jacobi lookahead recycling] [--json FILE]

The tiny target decodes held-out prompts in float32, one batched forward pass a step, and draws every position with
noise of its own (greedy: none). Each proposer starts without history and drafts for all requests in turn. The script
asserts that the tokens are those of decoding without drafts.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import print_markdown, setting
from numba import njit
from numpy.typing import NDArray
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch.nn import functional

from vllm_specplug.measure.corpus import held_out_prompts, held_out_sources, read_text
from vllm_specplug.proposers.base import DraftBatch, Drafts, Proposer, ProposerContext, TargetNoise, Verified
from vllm_specplug.proposers.jacobi import JacobiProposer
from vllm_specplug.proposers.lookahead import LookaheadProposer
from vllm_specplug.proposers.ngram import NgramProposer
from vllm_specplug.proposers.recycling import RecyclingProposer
from vllm_specplug.samplers.noise import NO_NOISE, SPLITMIX, noise_of, splitmix_keys
from vllm_specplug.tiny_models import target_path

PROPOSERS: dict[str, type[Proposer]] = {
    "ngram": NgramProposer,
    "jacobi": JacobiProposer,
    "lookahead": LookaheadProposer,
    "recycling": RecyclingProposer,
}
PROMPT_CHARS = 800
MAX_MODEL_LEN = 768
HEADINGS = (
    "proposer",
    "temperature",
    "emitted/step",
    "accepted of drafted",
    "confidence - acceptance",
    "us/request-step",
)


class TinyTarget:
    """A Llama in a few lines, with a cache of keys and values for ``num_slots`` requests."""

    def __init__(self, folder: Path, num_slots: int) -> None:
        config = json.loads((folder / "config.json").read_text())
        self.weights = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
        self.vocab_size: int = config["vocab_size"]
        self.num_layers: int = config["num_hidden_layers"]
        self.num_heads: int = config["num_attention_heads"]
        self.num_kv_heads: int = config["num_key_value_heads"]
        self.head_dim: int = config["head_dim"]
        self.epsilon: float = config["rms_norm_eps"]
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.head_dim
        angles = torch.arange(MAX_MODEL_LEN)[:, None] / config["rope_parameters"]["rope_theta"] ** exponents
        self.cos, self.sin = (torch.cat((f(angles), f(angles)), dim=1) for f in (torch.cos, torch.sin))
        shape = (self.num_layers, 2, num_slots, MAX_MODEL_LEN, self.num_kv_heads, self.head_dim)
        self.cache = torch.zeros(shape)

    def _rotated(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
        return x * self.cos[positions][:, :, None] + turned * self.sin[positions][:, :, None]

    def _normed(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.rms_norm(x, x.shape[-1:], self.weights[name], self.epsilon)

    @torch.inference_mode()
    def logits(self, token_ids: torch.Tensor, starts: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """``[num_requests, num_rows, vocab]`` after tokens (``[num_requests, num_rows]``) from ``starts`` on."""
        weights = self.weights
        positions = starts[:, None] + torch.arange(token_ids.shape[1])  # [num_requests, num_rows]
        end = int(positions.max()) + 1
        visible = (torch.arange(end) <= positions[:, :, None])[:, None]  # [num_requests, 1, num_rows, end]
        x = weights["model.embed_tokens.weight"][token_ids]
        for layer in range(self.num_layers):
            of = f"model.layers.{layer}."
            h = self._normed(x, of + "input_layernorm.weight")
            q, k, v = (
                functional.linear(h, weights[f"{of}self_attn.{name}_proj.weight"]).unflatten(-1, (-1, self.head_dim))
                for name in "qkv"
            )
            keys, values = self.cache[layer]
            keys[slots[:, None], positions] = self._rotated(k, positions)
            values[slots[:, None], positions] = v
            mixed = functional.scaled_dot_product_attention(
                self._rotated(q, positions).transpose(1, 2),
                keys[slots, :end].transpose(1, 2),
                values[slots, :end].transpose(1, 2),
                attn_mask=visible,
                enable_gqa=True,
            )
            x = x + functional.linear(mixed.transpose(1, 2).flatten(2), weights[of + "self_attn.o_proj.weight"])
            h = self._normed(x, of + "post_attention_layernorm.weight")
            gate, up = (functional.linear(h, weights[f"{of}mlp.{name}_proj.weight"]) for name in ("gate", "up"))
            x = x + functional.linear(functional.silu(gate) * up, weights[of + "mlp.down_proj.weight"])
        return functional.linear(self._normed(x, "model.norm.weight"), weights["model.embed_tokens.weight"])


@njit(cache=True, nogil=True)
def draw(logits, kind, keys, temperature):  # type: ignore[no-untyped-def]
    """The target's tokens: argmax(logits / temperature + noise) of each row, of the logits where ``kind`` is 0."""
    out = np.empty(len(logits), dtype=np.int64)
    for row in range(len(logits)):
        best = -np.inf
        for token in range(logits.shape[1]):
            score = np.float64(logits[row, token])
            if kind != 0:
                score = score / temperature + noise_of(kind, keys[row], token)
            if score > best:
                best = score
                out[row] = token
    return out


@dataclass
class Request:
    """One prompt under way; ``token_ids`` are those of the prompt and what was emitted."""

    name: str
    token_ids: list[int]
    num_prompt_tokens: int
    keys: NDArray[np.uint64]  # of each coming output token


@dataclass
class Result:
    """What one run showed; ``drafted`` and ``accepted`` count draft tokens up to the first rejected one, ``chances``
    sums the confidence of those."""

    outputs: dict[str, list[int]] = field(default_factory=dict)
    steps: int = 0
    emitted: int = 0
    verified: int = 0
    reached: int = 0
    accepted: int = 0
    chances: float = 0.0
    proposer_s: float = 0.0


def decode(
    target: TinyTarget,
    prompts: list[list[int]],
    proposer: Proposer | None,
    temperature: float,
    k: int,
    batch_size: int,
    max_tokens: int,
    on_draft: Any = None,
) -> Result:
    """All prompts, ``batch_size`` in flight, the next one starting when one is done."""
    kind = SPLITMIX if temperature > 0 else NO_NOISE
    waiting = [
        Request(
            f"r{nth}",
            list(prompt),
            len(prompt),
            splitmix_keys(np.random.default_rng(nth).integers(0, 2**31, max_tokens + k + 2)),
        )
        for nth, prompt in enumerate(prompts)
    ][::-1]
    result = Result()
    running: dict[int, Request] = {}
    table = np.zeros((batch_size, MAX_MODEL_LEN), dtype=np.int32)
    while waiting or running:
        for slot in range(batch_size):
            if slot in running or not waiting:
                continue
            request = running[slot] = waiting.pop()
            where = torch.tensor([slot])
            logits = target.logits(torch.tensor([request.token_ids]), torch.tensor([0]), where)[0, -1:]
            first = int(draw(logits.numpy(), kind, request.keys[:1], temperature)[0])
            request.token_ids.append(first)
            if proposer is not None:
                proposer.observe(Verified([request.name], [[]], [[first]], [1]))
        slots = sorted(running)
        requests = [running[slot] for slot in slots]
        for slot, request in zip(slots, requests, strict=True):
            table[slot, : len(request.token_ids)] = request.token_ids
        drafts = Drafts.empty(len(slots), k)
        keys = np.zeros((len(slots), k + 1), dtype=np.uint64)
        for index, request in enumerate(requests):
            done = len(request.token_ids) - request.num_prompt_tokens
            keys[index] = request.keys[done : done + k + 1]
        if proposer is not None:
            batch = DraftBatch(
                [request.name for request in requests],
                table,
                np.array(slots, dtype=np.int64),
                np.array([len(request.token_ids) for request in requests], dtype=np.int64),
                np.array([request.num_prompt_tokens for request in requests], dtype=np.int64),
                np.full(len(slots), k, dtype=np.int64),
                [{} for _ in slots],
                TargetNoise(kind, keys[:, :k], np.full(len(slots), temperature, dtype=np.float32)),
            )
            began = time.perf_counter()
            answer = proposer.propose(batch)
            result.proposer_s += time.perf_counter() - began
            assert isinstance(answer, Drafts)
            drafts = answer
        inputs = np.zeros((len(slots), k + 1), dtype=np.int64)
        for index, request in enumerate(requests):
            inputs[index, 0] = request.token_ids[-1]
        # Always as many rows, so that rounding is the same with and without drafts.
        inputs[:, 1:] = drafts.token_ids
        starts = torch.tensor([len(request.token_ids) - 1 for request in requests])
        logits = target.logits(torch.from_numpy(inputs), starts, torch.tensor(slots))
        tokens = draw(logits.flatten(0, 1).numpy(), kind, keys.reshape(-1), temperature).reshape(len(slots), k + 1)
        verified = Verified([], [], [], [])
        over = []
        for index, (slot, request) in enumerate(zip(slots, requests, strict=True)):
            length = int(drafts.num_tokens[index])
            draft = drafts.token_ids[index, :length].tolist()
            accepted = 0
            while accepted < length and draft[accepted] == tokens[index, accepted]:
                accepted += 1
            left = max_tokens - (len(request.token_ids) - request.num_prompt_tokens)
            emitted = min(accepted + 1, left)
            reached = min(accepted + 1, length)
            result.steps += 1
            result.emitted += emitted
            result.verified += length
            result.reached += reached
            result.accepted += accepted
            result.chances += float(drafts.confidence[index, :reached].sum())
            if on_draft is not None:
                on_draft(index, request, draft, drafts, accepted)
            request.token_ids += tokens[index, :emitted].tolist()
            verified.request_ids.append(request.name)
            verified.draft_token_ids.append(draft)
            verified.target_token_ids.append(tokens[index, : length + 1].tolist())
            verified.num_emitted.append(accepted + 1)
            if emitted == left:
                over.append(slot)
        if proposer is not None:
            began = time.perf_counter()
            proposer.observe(verified)
            proposer.finish([running[slot].name for slot in over])
            result.proposer_s += time.perf_counter() - began
        for slot in over:
            request = running.pop(slot)
            result.outputs[request.name] = request.token_ids[request.num_prompt_tokens :]
    return result


def prompts_of(num_prompts: int, tuning: bool) -> list[list[int]]:
    """Token ids of held-out prompts: of every other module, or (to tune with) of those between."""
    tokenizer = Tokenizer.from_file(str(target_path() / "tokenizer.json"))
    num_modules = sum(len(read_text(path) or "") > 2 * PROMPT_CHARS for path in held_out_sources())
    pieces = held_out_prompts(2 * num_prompts + 2 * num_modules, PROMPT_CHARS)
    chosen = [piece for nth, piece in enumerate(pieces) if (nth % num_modules % 2 == 1) == tuning]
    return [tokenizer.encode(piece).ids for piece in chosen[:num_prompts]]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--proposers", nargs="+", default=list(PROPOSERS), choices=list(PROPOSERS))
    parser.add_argument("--options", type=json.loads, default={}, help="of the proposers, as JSON")
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=128, help="output tokens of each request")
    parser.add_argument("--batch", type=int, default=16, help="requests in flight")
    parser.add_argument("--k", type=int, default=8, help="draft tokens a step")
    parser.add_argument("--tuning", action="store_true", help="prompts of the modules that constants are fitted on")
    parser.add_argument("--json", type=Path, help="also write the results here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    prompts = prompts_of(arguments.prompts, arguments.tuning)
    target = TinyTarget(target_path(), arguments.batch)
    common = arguments.k, arguments.batch, arguments.max_tokens
    rows = []
    for temperature in arguments.temperature:
        plain = decode(target, prompts, None, temperature, *common)
        for name in arguments.proposers:
            context = ProposerContext(target.vocab_size, arguments.k, options=arguments.options)
            proposer = PROPOSERS[name](context)
            proposer.warm_up()
            result = decode(target, prompts, proposer, temperature, *common)
            assert result.outputs == plain.outputs, f"{name} changed what was decoded"
            rows.append(
                {
                    "proposer": name,
                    "temperature": temperature,
                    "emitted_per_step": result.emitted / result.steps,
                    "acceptance": result.accepted / max(result.verified, 1),
                    "confidence_error": (result.chances - result.accepted) / max(result.reached, 1),
                    "us_per_step": result.proposer_s / result.steps * 1e6,
                }
            )
            print(rows[-1], flush=True)
    about = setting()
    cells = [
        [
            row["proposer"],
            f"{row['temperature']:g}",
            f"{row['emitted_per_step']:.3f}",
            f"{row['acceptance']:.1%}",
            f"{row['confidence_error']:+.3f}",
            f"{row['us_per_step']:.1f}",
        ]
        for row in rows
    ]
    print_markdown(about, HEADINGS, cells)
    if arguments.json:
        arguments.json.write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
