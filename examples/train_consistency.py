"""Fine-tune the tiny target so that Jacobi decoding gets several tokens out of a forward pass.

    python examples/train_consistency.py --out consistent               # at most 15 minutes on 2 CPU cores
    vllm serve consistent --speculative-config \\
        '{"method": "specplug", "proposers": ["jacobi"], "num_speculative_tokens": 8}'

The recipe of consistency LLMs (Kou et al., "CLLMs: Consistency Large Language Models", 2024). The model that is there
at the beginning continues pieces of its training text greedily. These texts are the fixed points: Jacobi iteration, as
the ``jacobi`` proposer does it in an engine, arrives at them from a window of guesses drawn from the context, of which
the beginning that is right is emitted while the rest moves on. At every intermediate state of these windows the model
in training learns to say what the first model says behind the right tokens (global consistency loss); behind the right
tokens themselves, and on real text, it learns to go on saying the same. The states are collected anew every minute or
so, from what it has become. The texts are not: a model that learns from its own latest texts soon writes one word over
and over, which is quickly decoded.

One pass serves a text and many states of its windows: the guesses stand behind the text, each window sees the text up
to its own beginning and itself, and positions are those that the tokens have in decoding.
"""

from __future__ import annotations

import argparse
import copy
import difflib
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from tokenizers import Tokenizer
from torch.nn import functional
from train_tiny_models import encode, held_out_loss, package_sources, save
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from vllm_specplug.measure import corpus
from vllm_specplug.tiny_models import target_path

CONTEXT = 512  # tokens of a row of real text, and of a window of the held-out loss, as in train_tiny_models.py
PROMPT_TOKENS = 256  # real text before what the model decodes for training
OUTPUT_TOKENS = 128
COLLECT_ROWS = 64  # texts decoded at a time
KEPT_BATCHES = 3  # of these
EVALUATED_WINDOWS = (8, 16)


def training_tokens(tokenizer: Tokenizer, max_tokens: int, stdlib_only: bool, seed: int) -> NDArray[np.uint16]:
    """Real text to train on, about ``max_tokens``: the standard library and files of installed packages at random.

    Held-out modules, their tests and copies of them are left out, licences are those of train_tiny_models.py.
    """
    files = corpus.standard_library_sources()
    if not stdlib_only:
        of_packages = [path for _, paths in package_sources() for path in paths]
        files += [of_packages[i] for i in np.random.default_rng(seed).permutation(len(of_packages))]
    texts, room = [], 3.4 * max_tokens  # characters a token
    for _, text in corpus.without_copies_of_held_out(files):
        texts.append(text)
        room -= len(text)
        if room < 0:
            break
    return encode(tokenizer, texts)


def random_pieces(tokens: NDArray[np.uint16], rows: int, length: int, generator: np.random.Generator) -> torch.Tensor:
    """``[rows, length]`` int64, pieces of ``tokens`` from anywhere."""
    starts = generator.integers(0, len(tokens) - length, size=rows)
    return torch.from_numpy(np.stack([tokens[start : start + length] for start in starts]).astype(np.int64))


def hidden_states(
    model: LlamaForCausalLM,
    token_ids: torch.Tensor,
    positions: torch.Tensor,
    mask: torch.Tensor,
    cache: torch.Tensor | None = None,
) -> torch.Tensor:
    """The Llama without its head, with a mask, positions and a cache of the caller's.

    Args:
        model: its weights are used, its ``forward`` is not.
        token_ids, positions: ``[rows, length]`` int64.
        mask: ``[rows or 1, 1, length, keys]`` bool, what may be seen.
        cache: ``[layers, 2, rows, heads, max_length, head_dim]``; keys and values are put at their positions, and the
            first ``keys`` positions are what is attended to. Without it: ``token_ids`` themselves.

    Returns:
        ``[rows, length, hidden]``, after the last norm.
    """
    x = model.model.embed_tokens(token_ids)
    cos, sin = model.model.rotary_emb(x, positions)
    rows = torch.arange(len(token_ids))[:, None]
    shape = (*token_ids.shape, -1, model.config.head_dim)
    groups = model.config.num_attention_heads // model.config.num_key_value_heads
    for index, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        h = layer.input_layernorm(x)
        query = attention.q_proj(h).view(shape).transpose(1, 2)
        key = attention.k_proj(h).view(shape).transpose(1, 2)
        value = attention.v_proj(h).view(shape).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        if cache is not None:
            keys, values = cache[index]
            keys[rows, :, positions] = key.transpose(1, 2).to(cache.dtype)
            values[rows, :, positions] = value.transpose(1, 2).to(cache.dtype)
            key, value = keys[:, :, : mask.shape[-1]], values[:, :, : mask.shape[-1]]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        mixed = functional.scaled_dot_product_attention(
            query.to(value.dtype), key.to(value.dtype), value, attn_mask=mask
        )
        x = x + attention.o_proj(mixed.transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.model.norm(x)


class Decoder:
    """A batch of texts that grow by whole blocks of tokens, with what the model remembers of them.

    Args:
        model: in float32; under autocast what it remembers is in that type, too.
        prompts: one list of token ids a text, none empty.
        max_length: tokens of the longest text at the end, guesses included.
    """

    def __init__(self, model: LlamaForCausalLM, prompts: list[list[int]], max_length: int) -> None:
        config = model.config
        self.model = model
        self.token_ids = torch.zeros((len(prompts), max_length), dtype=torch.int64)
        self.lengths = torch.tensor([len(prompt) for prompt in prompts])  # [rows], tokens that are certain
        self.cache = torch.zeros(
            (config.num_hidden_layers, 2, len(prompts), config.num_key_value_heads, max_length, config.head_dim),
            dtype=torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32,
        )
        for row, prompt in enumerate(prompts):
            self.token_ids[row, : len(prompt)] = torch.tensor(prompt)
        # All but the last token, so that the first block begins with it; what stands behind a shorter prompt is junk
        # that is written over before anything sees it.
        self.logits(self.token_ids[:, : int(self.lengths.max())], torch.zeros_like(self.lengths), want_logits=False)

    @torch.no_grad()
    def logits(self, block: torch.Tensor, starts: torch.Tensor, want_logits: bool = True) -> torch.Tensor:
        """``[rows, length, vocab]`` float32 after ``block`` (``[rows, length]``) at ``starts`` (``[rows]``) and on."""
        positions = starts[:, None] + torch.arange(block.shape[1])
        mask = torch.arange(int(positions.max()) + 1) <= positions[:, None, :, None]
        x = hidden_states(self.model, block, positions, mask, self.cache)
        return self.model.lm_head(x) if want_logits else x

    def append(self, tokens: torch.Tensor, counts: torch.Tensor) -> None:
        """The first ``counts`` (``[rows]``) of ``tokens`` (``[rows, n]``) become certain."""
        columns = self.lengths[:, None] + torch.arange(tokens.shape[1])
        self.token_ids.scatter_(1, columns, tokens)
        self.lengths = self.lengths + counts

    def last(self) -> torch.Tensor:
        """``[rows, 1]``, the newest certain token."""
        return self.token_ids.gather(1, self.lengths[:, None] - 1)


def fills(token_ids: torch.Tensor, lengths: torch.Tensor, width: int) -> torch.Tensor:
    """``[rows, width]`` guesses behind ``lengths`` tokens: tokens of the context by a hash of the position.

    The same as the ``jacobi`` proposer's.
    """
    position = lengths.numpy().astype(np.uint64)[:, None] + np.arange(width, dtype=np.uint64)
    z = position * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    columns = (z >> np.uint64(33)) % lengths.numpy().astype(np.uint64)[:, None]
    return token_ids.gather(1, torch.from_numpy(columns.astype(np.int64)))


@dataclass
class Trajectories:
    """What Jacobi decoding of a batch of texts went through.

    Attributes:
        token_ids: ``[rows, max_length]``, the texts.
        num_prompt_tokens: ``[rows]``.
        lengths: ``[steps, rows]``, certain tokens before each step; -1 where the text was complete.
        drafts: ``[steps, rows, window]``, the window of the step.
        accepted: ``[steps, rows]``, how much of it was right.
        emitted_per_forward: tokens gained in a step of one text, mean over all.
    """

    token_ids: torch.Tensor
    num_prompt_tokens: torch.Tensor
    lengths: torch.Tensor
    drafts: torch.Tensor
    accepted: torch.Tensor
    emitted_per_forward: float

    def outputs(self, count: int) -> list[list[int]]:
        """The first ``count`` tokens after each prompt."""
        starts = self.num_prompt_tokens.tolist()
        return [self.token_ids[row, start : start + count].tolist() for row, start in enumerate(starts)]


def jacobi_decode(
    model: LlamaForCausalLM,
    prompts: list[list[int]],
    num_tokens: int,
    window: int,
    texts: torch.Tensor | None = None,
) -> Trajectories:
    """Greedy Jacobi decoding of all prompts at once.

    Args:
        model: makes the guesses, and decides what is right.
        prompts: token ids, one list a row.
        num_tokens: to decode after each.
        window: guesses a step.
        texts: ``[rows, at least the longest prompt + num_tokens]``; these decide what is right, instead.
    """
    decoder = Decoder(model, prompts, max(map(len, prompts)) + num_tokens + 2 * window + 2)
    prompt_lengths = decoder.lengths.clone()
    ends = prompt_lengths + num_tokens
    # The prompt's own pass gives the first token and has no guesses, as in an engine.
    first = decoder.logits(decoder.last(), decoder.lengths - 1).argmax(-1)
    decoder.append(
        first if texts is None else texts.gather(1, prompt_lengths[:, None]), torch.ones_like(prompt_lengths)
    )
    guesses = torch.zeros((len(prompts), window), dtype=torch.int64)
    known = torch.zeros_like(prompt_lengths)  # guesses that the model made; the rest is filled up
    depth = torch.arange(window)
    steps: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    num_steps = num_emitted = 0
    while bool((active := decoder.lengths < ends).any()):
        draft = torch.where(depth < known[:, None], guesses, fills(decoder.token_ids, decoder.lengths, window))
        block = torch.cat((decoder.last(), draft), dim=1)
        target = decoder.logits(block, decoder.lengths - 1).argmax(-1)  # [rows, window + 1]
        right = target
        if texts is not None:
            # Beyond the end of a text anything will do.
            columns = decoder.lengths[:, None] + torch.arange(window + 1)
            right = texts.gather(1, columns.clamp(max=texts.shape[1] - 1))
        accepted = (draft == right[:, :-1]).long().cumprod(1).sum(1)
        steps.append((torch.where(active, decoder.lengths, -1), draft, accepted))
        emitted = torch.where(active, accepted + 1, 0)
        num_steps += int(active.sum())
        num_emitted += int(torch.minimum(emitted, (ends - decoder.lengths).clamp(min=0)).sum())
        decoder.append(right, emitted)
        guesses = target.gather(1, (accepted[:, None] + 1 + depth).clamp(max=window))
        known = window - accepted
    lengths, drafts, all_accepted = (torch.stack(parts) for parts in zip(*steps, strict=True))
    return Trajectories(
        decoder.token_ids, prompt_lengths, lengths, drafts, all_accepted, num_emitted / max(num_steps, 1)
    )


@dataclass
class States:
    """A text and the windows that stood behind a wrong guess while it was decoded.

    Attributes:
        token_ids: ``[length]``, prompt and output.
        anchors: ``[num_windows]``, the last position of the text that the window sees.
        windows: guesses from ``anchors + 1`` on, the first of them wrong; none reaches beyond the text.
    """

    token_ids: torch.Tensor
    anchors: list[int]
    windows: list[torch.Tensor]


def states_of(trajectories: Trajectories, length: int) -> list[States]:
    """Per text its windows, without what was right at their beginning: there, window and text are one."""
    found = []
    for row, token_ids in enumerate(trajectories.token_ids[:, :length]):
        states = States(token_ids, [], [])
        for certain, draft, accepted in zip(
            trajectories.lengths[:, row].tolist(),
            trajectories.drafts[:, row],
            trajectories.accepted[:, row].tolist(),
            strict=True,
        ):
            anchor = certain - 1 + accepted
            rest = draft[accepted : accepted + max(length - 1 - anchor, 0)]
            if certain > 0 and len(rest):
                states.anchors.append(anchor)
                states.windows.append(rest)
        found.append(states)
    return found


@dataclass
class Packed:
    """Texts with windows behind them, as one batch.

    Attributes:
        token_ids, positions: ``[rows, length + room]``.
        mask: ``[rows, 1, length + room, length + room]`` bool.
        depths: ``[rows, room]``, place of a guess in its window behind the anchor, from 0; -1 where nothing stands.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    depths: torch.Tensor


def pack(batch: list[States], room: int, generator: np.random.Generator) -> Packed:
    """Behind each text as many of its windows, chosen at random, as ``room`` tokens hold."""
    length = len(batch[0].token_ids)
    guesses = np.zeros((len(batch), room), dtype=np.int64)
    positions, anchors, owners = np.zeros_like(guesses), np.zeros_like(guesses), np.full_like(guesses, -1)
    depths = np.full_like(guesses, -1)
    for row, states in enumerate(batch):
        at = 0
        for choice in generator.permutation(len(states.anchors)):
            window, anchor = states.windows[choice].numpy()[: room - at], states.anchors[choice]
            span = slice(at, at + len(window))
            guesses[row, span] = window
            depths[row, span] = np.arange(len(window))
            positions[row, span] = anchor + 1 + depths[row, span]
            anchors[row, span] = anchor
            owners[row, span] = choice
            at += len(window)
            if at == room:
                break
    mask = np.zeros((len(batch), 1, length + room, length + room), dtype=bool)
    mask[:, 0, :length, :length] = np.tri(length, dtype=bool)
    mask[:, 0, length:, :length] = np.arange(length) <= anchors[:, :, None]
    same = owners[:, :, None] == owners[:, None, :]
    mask[:, 0, length:, length:] = same & (positions[:, None, :] <= positions[:, :, None])
    texts = torch.stack([states.token_ids for states in batch])
    return Packed(
        torch.cat((texts, torch.from_numpy(guesses)), dim=1),
        torch.cat((torch.arange(length).expand(len(batch), -1), torch.from_numpy(positions)), dim=1),
        torch.from_numpy(mask),
        torch.from_numpy(depths),
    )


@torch.no_grad()
def logits_of(model: LlamaForCausalLM, token_ids: torch.Tensor) -> torch.Tensor:
    """``[rows, length, vocab]``, nothing to be learned from it."""
    logits: torch.Tensor = model(token_ids).logits
    return logits


def consistency_loss(
    model: LlamaForCausalLM,
    token_ids: torch.Tensor,
    positions: torch.Tensor,
    mask: torch.Tensor,
    depths: torch.Tensor,
    teacher: torch.Tensor,
    sharpness: float,
    decay: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Global consistency loss of packed windows, and how far the model went from its teacher on the texts themselves.

    Args:
        model: being trained.
        token_ids, positions, mask, depths: see :class:`Packed`.
        teacher: ``[rows, length, vocab]``, logits of the first model behind the right tokens.
        sharpness: the teacher's logits are multiplied by it for the windows: at 1 its distribution is the goal, above
            that more and more its favourite, which is what greedy decoding waits for.
        decay: weight of a guess's row over that of the row before it.

    Returns:
        Cross-entropy of the windows' rows to the teacher (nats a row), share of these with the teacher's favourite,
        Kullback-Leibler divergence of the texts' rows from the teacher's (nats a row).
    """
    room = depths.shape[1]
    x = hidden_states(model, token_ids, positions, mask)
    divergence = divergence_from(teacher, model.lm_head(x[:, :-room]))
    where = positions[:, -room:, None].expand(-1, -1, teacher.shape[-1])
    goal = teacher.gather(1, where).float()
    student = model.lm_head(x[:, -room:]).float()
    losses = -(torch.softmax(sharpness * goal, -1) * torch.log_softmax(student, -1)).sum(-1)  # [rows, room]
    weights = torch.where(depths >= 0, decay ** depths.clamp(min=0).float(), 0.0)
    right = (student.argmax(-1) == goal.argmax(-1)) & (depths >= 0)
    return (losses * weights).sum() / weights.sum(), right.sum() / (depths >= 0).sum(), divergence


def divergence_from(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """Kullback-Leibler divergence in nats between distributions given as logits (``[..., vocab]``), the mean."""
    log_teacher, log_student = torch.log_softmax(teacher.float(), -1), torch.log_softmax(student.float(), -1)
    return (log_teacher.exp() * (log_teacher - log_student)).sum(-1).mean()


def real_text_loss(
    model: LlamaForCausalLM, token_ids: torch.Tensor, teacher: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """On ``token_ids`` (``[rows, length]``): cross-entropy of the next token, and divergence from the teacher; nats."""
    logits = model(token_ids).logits.float()
    loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), token_ids[:, 1:].flatten())
    return loss, divergence_from(teacher, logits)


class Clock:
    """Seconds since it was made: of the wall, or what the process computed for over the number of cores it may use.

    The second says what a run would take on a machine of its own, when it shares one.
    """

    def __init__(self, cores: int | None = None) -> None:
        self._cores = cores
        self._start = self._now()

    def _now(self) -> float:
        return time.process_time() / self._cores if self._cores else time.monotonic()

    def seconds(self) -> float:
        """Since it was made."""
        return self._now() - self._start


class Workers:
    """Threads that share the work of a step by the rows of its batch, each with one core.

    They meet once a step. Threads inside of every operation, torch's way, meet thousands of times, and on a machine
    that others use as well each time waits for the slowest.
    """

    def __init__(self, count: int) -> None:
        torch.set_num_threads(1)
        self.count = count
        self._pool = ThreadPoolExecutor(count)
        self._is_warm = False

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Have one of them do it."""
        return self._pool.submit(function, *arguments)

    def map(self, function: Callable[[Any], Any], parts: Sequence[Any]) -> list[Any]:
        """``function`` of each part, in order."""
        return list(self._pool.map(function, parts))

    def backward(
        self, model: LlamaForCausalLM, loss_of: Callable[[Any], tuple[torch.Tensor, list[float]]], parts: Sequence[Any]
    ) -> NDArray[np.float64]:
        """Leave the gradients of the mean loss of all parts with the parameters; returns the mean of the figures.

        ``loss_of`` runs under autocast to bfloat16. The first time parts go one after the other: they get compiled.
        """
        parameters = list(model.parameters())

        def run(part: Any) -> tuple[Sequence[torch.Tensor], list[float]]:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss, figures = loss_of(part)
            return torch.autograd.grad(loss, parameters), figures

        results = self.map(run, parts) if self._is_warm else [run(part) for part in parts]
        self._is_warm = True
        gradients = zip(*(found for found, _ in results), strict=True)
        for parameter, of_parts in zip(parameters, gradients, strict=True):
            parameter.grad = torch.stack(of_parts).mean(0)
        return np.mean([figures for _, figures in results], axis=0)


def distinct_share(outputs: list[list[int]], n: int = 4) -> float:
    """Share of n-grams of an output that occur in it for the first time, mean over outputs; low where it repeats."""
    shares = []
    for tokens in outputs:
        grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
        shares.append(len(set(grams)) / max(len(grams), 1))
    return float(np.mean(shares))


@dataclass
class Evaluation:
    """What is measured before and after: tokens per forward pass by window, loss, and what the model writes."""

    per_forward: dict[int, float]
    held_out_loss: float
    outputs: list[list[int]]
    distinct: float


def evaluate(
    model: LlamaForCausalLM,
    prompts: list[list[int]],
    held_out: NDArray[np.uint16],
    num_tokens: int,
    workers: Workers,
) -> Evaluation:
    """Decode held-out prompts greedily with each of :data:`EVALUATED_WINDOWS`, and take the held-out loss."""
    loss_to_come = workers.submit(held_out_loss, model, held_out, CONTEXT)
    runs = workers.map(lambda window: jacobi_decode(model, prompts, num_tokens, window), EVALUATED_WINDOWS)
    outputs = runs[0].outputs(num_tokens)
    return Evaluation(
        {window: run.emitted_per_forward for window, run in zip(EVALUATED_WINDOWS, runs, strict=True)},
        loss_to_come.result(),
        outputs,
        distinct_share(outputs),
    )


@dataclass(frozen=True)
class Recipe:
    """How to train; rates are AdamW's, Muon's is scaled to match it."""

    window: int = 8
    learning_rate: float = 1e-3
    consistency_weight: float = 1.0
    anchor_weight: float = 1.0  # of staying with the first model
    language_weight: float = 0.5  # of the next token of real text
    sharpness: float = 2.0
    decay: float = 0.9
    rows: int = 4  # texts of the model's own a step
    room: int = 512  # guesses behind each
    real_rows: int = 4  # rows of real text a step
    refresh_s: float = 75.0
    compiled: bool = True


def optimizers_of(model: LlamaForCausalLM, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, AdamW for everything else, as in train_tiny_models.py."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def train(
    model: LlamaForCausalLM,
    tokens: NDArray[np.uint16],
    clock: Clock,
    seconds: float,
    recipe: Recipe,
    workers: Workers,
    seed: int,
) -> dict[str, float]:
    """Train ``model`` in place until ``clock`` shows ``seconds``, collecting included and one step at least.

    Returns what was counted.

    The learning rate rises for 2% of the time and falls linearly to a twentieth, by the clock.
    """
    generator = np.random.default_rng(seed)
    optimizers = optimizers_of(model, recipe.learning_rate)

    teacher = copy.deepcopy(model).requires_grad_(False)
    consistency, real, teach = consistency_loss, real_text_loss, logits_of
    if recipe.compiled and shutil.which("g++"):  # what torch.compile needs on a CPU
        consistency, real, teach = (torch.compile(f, dynamic=False) for f in (consistency, real, teach))

    def loss_of(part: tuple[Packed, torch.Tensor]) -> tuple[torch.Tensor, list[float]]:
        packed, text = part
        length = packed.token_ids.shape[1] - recipe.room
        arguments = packed.token_ids, packed.positions, packed.mask, packed.depths
        own, right, own_anchor = consistency(
            model, *arguments, teach(teacher, packed.token_ids[:, :length]), recipe.sharpness, recipe.decay
        )
        language, real_anchor = real(model, text, teach(teacher, text))
        anchor = own_anchor + real_anchor
        loss = recipe.consistency_weight * own + recipe.anchor_weight * anchor + recipe.language_weight * language
        return loss, [own.item(), right.item(), language.item(), own_anchor.item(), real_anchor.item()]

    def collect(prompts: list[list[int]]) -> Trajectories:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            texts = jacobi_decode(teacher, prompts, OUTPUT_TOKENS, 1).token_ids
            return jacobi_decode(model, prompts, OUTPUT_TOKENS, recipe.window, texts)

    pool: list[list[States]] = []
    step = decoded = 0
    collecting_s, collected_at, per_forward = 0.0, -np.inf, float("nan")
    smoothed: NDArray[np.float64] | None = None
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), TextColumn("{task.fields[info]}"))
    start, wall_start, cpu_start = clock.seconds(), time.monotonic(), time.process_time()
    seconds -= start
    with Progress(*columns) as progress:
        bar = progress.add_task("consistency", total=seconds, info="")
        while (elapsed := clock.seconds() - start) < seconds or not step:
            if elapsed - collected_at > recipe.refresh_s or not pool:
                for _ in range(1 if pool else KEPT_BATCHES):
                    prompts = random_pieces(tokens, COLLECT_ROWS, PROMPT_TOKENS, generator).tolist()
                    share = -(-COLLECT_ROWS // workers.count)
                    runs = workers.map(collect, [prompts[i : i + share] for i in range(0, COLLECT_ROWS, share)])
                    pool.append([states for run in runs for states in states_of(run, PROMPT_TOKENS + OUTPUT_TOKENS)])
                    per_forward = float(np.mean([run.emitted_per_forward for run in runs]))
                    decoded += COLLECT_ROWS * OUTPUT_TOKENS
                del pool[:-KEPT_BATCHES]
                now = clock.seconds() - start
                collecting_s += now - elapsed
                print(f"{now / 60:.1f} min: {per_forward:.3f} tokens per forward pass on training prompts", flush=True)
                elapsed = collected_at = now
            done = min(elapsed / max(seconds, 1e-9), 1.0)
            rate = recipe.learning_rate * min(done / 0.02 + 1e-3, 1.0) * (1 - 0.95 * done)
            texts = [states for batch in pool for states in batch]
            chosen = [texts[i] for i in generator.choice(len(texts), recipe.rows, replace=False)]
            own_rows, real_rows = recipe.rows // workers.count, recipe.real_rows // workers.count
            parts = [
                (
                    pack(chosen[nth * own_rows : (nth + 1) * own_rows], recipe.room, generator),
                    random_pieces(tokens, real_rows, CONTEXT, generator),
                )
                for nth in range(workers.count)
            ]
            figures = workers.backward(model, loss_of, parts)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            step += 1
            smoothed = figures if smoothed is None else 0.95 * smoothed + 0.05 * figures
            info = "step {}  consistency {:.3f}  right {:.1%}  language {:.3f}  apart {:.3f} {:.3f}".format(
                step, *smoothed
            )
            progress.update(bar, completed=clock.seconds() - start, info=info)
            if step % 25 == 0:
                print(f"{elapsed / 60:.1f} min: {info}", flush=True)
    return {
        "steps": step,
        "minutes": round((time.monotonic() - wall_start) / 60, 2),
        "cpu_minutes": round((time.process_time() - cpu_start) / 60, 2),
        "collecting_minutes": round(collecting_s / 60, 2),
        "own_tokens_decoded": decoded,
        "tokens_trained": step
        * (recipe.rows * (PROMPT_TOKENS + OUTPUT_TOKENS + recipe.room) + recipe.real_rows * CONTEXT),
    }


def compare(before: Evaluation, after: Evaluation) -> dict[str, Any]:
    """Both evaluations side by side, and how alike the greedy outputs are."""
    pairs = list(zip(before.outputs, after.outputs, strict=True))
    same_start = [
        next((i for i, (a, b) in enumerate(zip(*pair, strict=True)) if a != b), len(pair[0])) for pair in pairs
    ]
    alike = [difflib.SequenceMatcher(None, a, b, autojunk=False).ratio() for a, b in pairs]
    return {
        "tokens_per_forward": {
            str(window): {"before": before.per_forward[window], "after": after.per_forward[window],
                          "ratio": after.per_forward[window] / before.per_forward[window]}
            for window in before.per_forward
        },
        "held_out_loss": {"before": before.held_out_loss, "after": after.held_out_loss,
                          "ratio": after.held_out_loss / before.held_out_loss},
        "distinct_4gram_share": {"before": before.distinct, "after": after.distinct,
                                 "ratio": after.distinct / before.distinct},
        "outputs": {"tokens_before_first_difference": float(np.mean(same_start)), "similarity": float(np.mean(alike))},
    }  # fmt: skip


def show(report: dict[str, Any], console: Console) -> None:
    """The comparison as a table."""
    table = Table("held-out prompts, greedy", "before", "after", "after / before")
    rows = {f"tokens per forward, window {window}": row for window, row in report["tokens_per_forward"].items()}
    rows["held-out loss, nats/token"] = report["held_out_loss"]
    rows["distinct 4-grams of an output"] = report["distinct_4gram_share"]
    for name, row in rows.items():
        table.add_row(name, *(f"{row[key]:.3f}" for key in ("before", "after", "ratio")))
    console.print(table)
    console.print("outputs before and after: {tokens_before_first_difference:.1f} tokens the same until the first "
                  "difference, similarity {similarity:.2f}".format(**report["outputs"]))  # fmt: skip


def main() -> None:
    """Evaluate, train, evaluate, save."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder that gets the model")
    parser.add_argument("--model", type=Path, default=target_path(), help="where to start (default: the tiny target)")
    parser.add_argument("--minutes", type=float, default=15.0, help="for everything, evaluation included (default: 15)")
    parser.add_argument("--window", type=int, default=Recipe.window, help="guesses a step (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=Recipe.learning_rate)
    parser.add_argument("--consistency-weight", type=float, default=Recipe.consistency_weight)
    parser.add_argument(
        "--anchor-weight", type=float, default=Recipe.anchor_weight, help="of staying with the first model"
    )
    parser.add_argument(
        "--language-weight", type=float, default=Recipe.language_weight, help="of real text's next token"
    )
    parser.add_argument(
        "--sharpness", type=float, default=Recipe.sharpness, help="of the teacher (default: %(default)s)"
    )
    parser.add_argument("--decay", type=float, default=Recipe.decay, help="weight by depth (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=Recipe.rows, help="own texts a step (default: %(default)s)")
    parser.add_argument("--room", type=int, default=Recipe.room, help="guesses behind each (default: %(default)s)")
    parser.add_argument("--real-rows", type=int, default=Recipe.real_rows, help="rows of real text a step")
    parser.add_argument("--refresh-s", type=float, default=Recipe.refresh_s, help="seconds between collections")
    parser.add_argument("--tokens", type=int, default=16_000_000, help="real text to read (default: 16M tokens)")
    parser.add_argument("--stdlib-only", action="store_true", help="leave installed packages out")
    parser.add_argument("--prompts", type=int, default=64, help="held-out prompts to evaluate on (default: 64)")
    parser.add_argument("--max-tokens", type=int, default=128, help="output tokens of each (default: 128)")
    parser.add_argument("--held-out-tokens", type=int, help="evaluate the loss on the first so many only")
    parser.add_argument("--no-compile", action="store_true", help="train without torch.compile")
    parser.add_argument("--cpu-clock", action="store_true", help="count CPU time over --threads, for a shared machine")
    parser.add_argument("--threads", type=int, default=2, help="cores to use; must divide rows (default: 2)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.minutes <= 0 or arguments.window < 1:
        parser.error("--minutes must be positive and --window at least 1")
    if arguments.threads < 1 or arguments.rows % arguments.threads or arguments.real_rows % arguments.threads:
        parser.error("--threads must be positive and divide --rows and --real-rows")
    workers = Workers(arguments.threads)
    clock = Clock(arguments.threads if arguments.cpu_clock else None)
    torch.manual_seed(arguments.seed)
    console = Console()
    recipe = Recipe(
        arguments.window, arguments.learning_rate, arguments.consistency_weight, arguments.anchor_weight,
        arguments.language_weight, arguments.sharpness, arguments.decay, arguments.rows, arguments.room,
        arguments.real_rows, arguments.refresh_s, compiled=not arguments.no_compile,
    )  # fmt: skip

    tokenizer = Tokenizer.from_file(str(arguments.model / "tokenizer.json"))
    model = LlamaForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    tokens = training_tokens(tokenizer, arguments.tokens, arguments.stdlib_only, arguments.seed)
    held_out = encode(tokenizer, [text for path in corpus.held_out_sources() if (text := corpus.read_text(path))])
    held_out = held_out[: arguments.held_out_tokens]
    prompts = [tokenizer.encode(prompt).ids for prompt in corpus.held_out_prompts(arguments.prompts)]
    console.print(f"{len(tokens):,} training tokens, {len(held_out):,} held out, {len(prompts)} held-out prompts")

    evaluating = clock.seconds()
    before = evaluate(model, prompts, held_out, arguments.max_tokens, workers)
    evaluating = clock.seconds() - evaluating
    console.print(f"before: {before.per_forward} tokens per forward pass, held-out loss {before.held_out_loss:.4f}")
    # What the second evaluation and saving will take is set aside.
    seconds = arguments.minutes * 60 - 1.2 * evaluating
    figures = train(model, tokens, clock, seconds, recipe, workers, arguments.seed)
    console.print(str(figures))

    # What is saved is bfloat16: that is what gets evaluated.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).float()
    after = evaluate(model.eval(), prompts, held_out, arguments.max_tokens, workers)
    report = compare(before, after)
    show(report, console)
    for index in range(min(3, len(prompts))):
        for name, outputs in (("before", before.outputs), ("after", after.outputs)):
            console.rule(f"prompt {index}, {name}")
            console.print(tokenizer.decode(outputs[index]), markup=False, highlight=False)
    arguments.out.mkdir(parents=True, exist_ok=True)
    save(model, tokenizer, arguments.out, CONTEXT)
    command = "python examples/train_consistency.py " + " ".join(sys.argv[1:])
    total = (time.monotonic() - began) / 60
    record = {
        "command": command,
        "total_minutes": round(total, 1),
        "total_cpu_minutes": round(time.process_time() / 60, 1),
        "training": figures,
        **report,
    }
    (arguments.out / "consistency.json").write_text(json.dumps(record, indent=1) + "\n")
    console.print(f"saved to {arguments.out} after {total:.1f} minutes, {time.process_time() / 60:.1f} of CPU time")


if __name__ == "__main__":
    main()
