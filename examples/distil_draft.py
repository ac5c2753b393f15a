"""Distil the tiny draft model from the tiny target, so that more of what it drafts is accepted.

    python examples/distil_draft.py --out distilled                     # at most 15 minutes on 2 CPU cores
    vllm serve TARGET --speculative-config \\
        '{"method": "draft_model", "model": "distilled", "sampler": "gumbel", "num_speculative_tokens": 4}'

The draft learns the target's whole distribution (Hinton et al., 2015; for drafting: Zhou et al., "DistillSpec", 2024)
on real text and on text that the target writes itself. What counts is measured before and after, on held-out real text
and on the target's own continuations of held-out prompts: how often the favourites agree (greedy requests), how often
both draw the same token with the same noise (sampled ones, under the Gumbel coupling), and 1 - TV, the most that any
verifier can accept.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
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
from train_consistency import CONTEXT, Clock, Decoder, Workers, optimizers_of, random_pieces, training_tokens
from train_tiny_models import encode, held_out_loss, save
from transformers import LlamaForCausalLM

from vllm_specplug.measure import corpus
from vllm_specplug.samplers.gumbel import gumbel_noise
from vllm_specplug.tiny_models import draft_path, target_path

PROMPT_TOKENS = 128  # real text before what the target writes to train on; together CONTEXT tokens
SHOWN_DRAFT_TOKENS = (3, 8)  # drafts a step for which emitted tokens are computed


@torch.no_grad()
def write(
    model: LlamaForCausalLM, prompts: list[list[int]], num_tokens: int, noise: NDArray[np.int64] | None
) -> torch.Tensor:
    """``[rows, num_tokens]``: continuations, greedy or drawn at temperature 1.

    Args:
        model: in float32.
        prompts: token ids, one list a row.
        num_tokens: how many to write after each.
        noise: ``[rows, num_tokens]`` seed of each draw, as in vLLM's CPU sampler, or None for greedy.
    """
    decoder = Decoder(model, prompts, max(map(len, prompts)) + num_tokens + 1)
    starts = decoder.lengths.clone()
    vocab = np.arange(model.config.vocab_size)
    for nth in range(num_tokens):
        scores = decoder.logits(decoder.last(), decoder.lengths - 1)[:, 0].double()
        if noise is not None:
            scores += torch.from_numpy(gumbel_noise(noise[:, nth, None], vocab))
        decoder.append(scores.argmax(-1, keepdim=True), torch.ones_like(starts))
    return decoder.token_ids.gather(1, starts[:, None] + torch.arange(num_tokens))


@torch.no_grad()
def sampled_texts(model: LlamaForCausalLM, prompts: torch.Tensor, num_tokens: int, greedy_rows: int) -> torch.Tensor:
    """``[rows, prompt + num_tokens]``: prompts with the target's continuations, the first rows' greedy ones.

    The others are drawn at temperature 1, with noise of torch's: nothing has to repeat it.
    """
    decoder = Decoder(model, prompts.tolist(), prompts.shape[1] + num_tokens + 1)
    for _ in range(num_tokens):
        logits = decoder.logits(decoder.last(), decoder.lengths - 1)[:, 0].float()
        noise = -torch.empty_like(logits).exponential_().log()
        noise[:greedy_rows] = 0.0
        decoder.append((logits + noise).argmax(-1, keepdim=True), torch.ones_like(decoder.lengths))
    return decoder.token_ids[:, : prompts.shape[1] + num_tokens]


def emitted_per_step(agrees: NDArray[np.bool_], num_draft_tokens: int) -> float:
    """Tokens a step gives, mean over steps, when drafts are accepted up to the first disagreement.

    Exact, not an estimate: what is accepted is the target's text, so that the draft model sees the same context
    whatever was drafted. For example ``[[1, 1, 0, 0]]`` with one draft token a step: 2, 1 and 1 tokens.

    Args:
        agrees: ``[rows, num_tokens]``, where the draft model would have drafted the token that came.
        num_draft_tokens: drafts a step.
    """
    steps = 0
    for row in agrees:
        at = 0
        while at < len(row):
            window = row[at : at + num_draft_tokens]
            at += (len(window) if window.all() else int(window.argmin())) + 1
            steps += 1
    return float(agrees.size / steps)


@dataclass
class Texts:
    """What drafts are measured on: ``[rows, length]`` token ids, of which the last ``num_scored`` of each count."""

    token_ids: list[list[int]]
    num_scored: int


def continuations(
    target: LlamaForCausalLM, prompts: list[list[int]], num_tokens: int, seeds: NDArray[np.int64] | None
) -> Texts:
    """Prompts with what the target writes after them."""
    outputs = write(target, prompts, num_tokens, seeds).tolist()
    return Texts([prompt + output for prompt, output in zip(prompts, outputs, strict=True)], num_tokens)


@torch.no_grad()
def agreement(
    target: LlamaForCausalLM, draft: LlamaForCausalLM, texts: Texts, seeds: NDArray[np.int64]
) -> dict[str, NDArray[np.float64]]:
    """Position by position how draft and target agree, context right; each ``[rows, num_scored]``.

    Args:
        target, draft: in float32.
        texts: on which.
        seeds: ``[rows, num_scored]``, of the noise that both draw with at temperature 1.

    Returns:
        ``kl``: Kullback-Leibler divergence of the draft's distribution from the target's, nats; ``greedy``: favourites
        are the same; ``coupled``: the same token is drawn; ``bound``: 1 - TV; ``guaranteed``: (1 - TV) / (1 + TV).
    """
    vocab = np.arange(target.config.vocab_size)
    found: dict[str, list[NDArray[np.float64]]] = {}
    for row, token_ids in enumerate(texts.token_ids):
        inputs = torch.tensor([token_ids[:-1]])
        log_target, log_draft = (
            torch.log_softmax(model(inputs).logits[0, -texts.num_scored :].double(), -1) for model in (target, draft)
        )
        noise = torch.from_numpy(gumbel_noise(seeds[row, :, None], vocab))
        probs = log_target.exp()
        tv = 0.5 * (probs - log_draft.exp()).abs().sum(-1)
        figures = {
            "kl": (probs * (log_target - log_draft)).sum(-1),
            "greedy": log_target.argmax(-1) == log_draft.argmax(-1),
            "coupled": (log_target + noise).argmax(-1) == (log_draft + noise).argmax(-1),
            "bound": 1 - tv,
            "guaranteed": (1 - tv) / (1 + tv),
        }
        for name, values in figures.items():
            found.setdefault(name, []).append(values.double().numpy())
    return {name: np.stack(rows) for name, rows in found.items()}


@dataclass
class Exam:
    """The held-out text, and the target's own continuations, that a draft is examined on."""

    held_out: NDArray[np.uint16]
    real: Texts
    greedy: Texts
    sampled: Texts
    seeds: NDArray[np.int64]  # [rows, num_tokens]

    @classmethod
    def make(
        cls,
        target: LlamaForCausalLM,
        held_out: NDArray[np.uint16],
        prompts: list[list[int]],
        num_tokens: int,
        seed: int,
    ) -> Exam:
        """Have the target write ``num_tokens`` after each prompt, greedily and drawn."""
        generator = np.random.default_rng(seed)
        seeds = generator.integers(0, 2**31, size=(len(prompts), num_tokens))
        pieces = random_pieces(held_out, len(prompts), PROMPT_TOKENS + num_tokens, generator)
        return cls(
            held_out, Texts(pieces.tolist(), num_tokens), continuations(target, prompts, num_tokens, None),
            continuations(target, prompts, num_tokens, seeds), seeds,
        )  # fmt: skip

    def mark(self, target: LlamaForCausalLM, draft: LlamaForCausalLM) -> dict[str, float]:
        """All figures of one draft model, by name."""
        real = agreement(target, draft, self.real, self.seeds)
        greedy = agreement(target, draft, self.greedy, self.seeds)
        sampled = agreement(target, draft, self.sampled, self.seeds)
        figures = {
            "held-out loss, nats/token": held_out_loss(draft, self.held_out, CONTEXT),
            "real text: KL, nats/token": real["kl"].mean(),
            "real text: favourites agree": real["greedy"].mean(),
            "real text: same draw, T=1": real["coupled"].mean(),
            "real text: 1 - TV": real["bound"].mean(),
            "target's greedy text: favourites agree": greedy["greedy"].mean(),
            "target's sampled text: KL, nats/token": sampled["kl"].mean(),
            "target's sampled text: same draw, T=1": sampled["coupled"].mean(),
            "target's sampled text: (1 - TV) / (1 + TV)": sampled["guaranteed"].mean(),
            "target's sampled text: 1 - TV": sampled["bound"].mean(),
        }
        for count in SHOWN_DRAFT_TOKENS:
            figures[f"emitted per step, greedy, {count} drafts"] = emitted_per_step(greedy["greedy"] > 0, count)
            figures[f"emitted per step, T=1, {count} drafts"] = emitted_per_step(sampled["coupled"] > 0, count)
        return {name: float(value) for name, value in figures.items()}


def distillation_loss(
    draft: LlamaForCausalLM, token_ids: torch.Tensor, target_logits: torch.Tensor, temperature: float, tv_weight: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is minimised, and the total variation distance, both means over ``token_ids`` (``[rows, length]``).

    Args:
        draft: being trained.
        token_ids: text.
        target_logits: ``[rows, length, vocab]``.
        temperature: of both distributions in the divergence, which is scaled by its square.
        tv_weight: weight of the distance itself (at temperature 1) beside the divergence.
    """
    logits = draft(token_ids).logits.float()
    target_logits = target_logits.float()
    log_draft = torch.log_softmax(logits / temperature, -1)
    log_target = torch.log_softmax(target_logits / temperature, -1)
    divergence = (log_target.exp() * (log_target - log_draft)).sum(-1).mean() * temperature**2
    distance = 0.5 * (torch.softmax(target_logits, -1) - torch.softmax(logits, -1)).abs().sum(-1).mean()
    return divergence + tv_weight * distance, distance


@dataclass(frozen=True)
class Recipe:
    """How to distil; the learning rate is AdamW's, Muon's is scaled to match it."""

    learning_rate: float = 4e-3
    temperature: float = 1.0
    tv_weight: float = 1.0
    rows: int = 16  # of CONTEXT tokens, a step
    own_share: float = 0.25  # of these, written by the target
    writing_share: float = 0.15  # of the time
    written_rows: int = 96  # texts the target writes at a time, a sixth of them greedily
    kept_rows: int = 768
    compiled: bool = True


def train(
    target: LlamaForCausalLM,
    draft: LlamaForCausalLM,
    tokens: NDArray[np.uint16],
    clock: Clock,
    seconds: float,
    recipe: Recipe,
    workers: Workers,
    seed: int,
) -> dict[str, float]:
    """Train ``draft`` in place until ``clock`` shows ``seconds``, writing included, one step at least; returns what was
    counted.

    The learning rate rises for 2% of the time and falls linearly to a twentieth, by the clock.
    """
    generator = np.random.default_rng(seed)
    optimizers = optimizers_of(draft, recipe.learning_rate)

    @torch.no_grad()
    def target_logits_of(token_ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = target(token_ids).logits
        return logits

    distillation = distillation_loss
    if recipe.compiled and shutil.which("g++"):  # what torch.compile needs on a CPU
        distillation = torch.compile(distillation, dynamic=False)
        target_logits_of = torch.compile(target_logits_of, dynamic=False)

    def loss_of(token_ids: torch.Tensor) -> tuple[torch.Tensor, list[float]]:
        loss, distance = distillation(
            draft, token_ids, target_logits_of(token_ids), recipe.temperature, recipe.tv_weight
        )
        return loss, [loss.item(), distance.item()]

    def write_after(prompts: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return sampled_texts(target, prompts, CONTEXT - PROMPT_TOKENS, len(prompts) // 6)

    own = torch.zeros((0, CONTEXT), dtype=torch.int64)
    num_own_rows = round(recipe.own_share * recipe.rows)
    step = written = 0
    writing_s = 0.0
    smoothed: NDArray[np.float64] | None = None
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), TextColumn("{task.fields[info]}"))
    start, wall_start, cpu_start = clock.seconds(), time.monotonic(), time.process_time()
    seconds -= start
    with Progress(*columns) as progress:
        bar = progress.add_task("distilling", total=seconds, info="")
        while (elapsed := clock.seconds() - start) < seconds or not step:
            if num_own_rows and (writing_s <= recipe.writing_share * elapsed):
                prompts = random_pieces(tokens, recipe.written_rows, PROMPT_TOKENS, generator)
                texts = torch.cat(workers.map(write_after, prompts.chunk(workers.count)))
                own = torch.cat((own, texts))[-recipe.kept_rows :]
                written += recipe.written_rows * (CONTEXT - PROMPT_TOKENS)
                now = clock.seconds() - start
                writing_s += now - elapsed
                elapsed = now
            done = min(elapsed / max(seconds, 1e-9), 1.0)
            rate = recipe.learning_rate * min(done / 0.02 + 1e-3, 1.0) * (1 - 0.95 * done)
            batch = random_pieces(tokens, recipe.rows - num_own_rows, CONTEXT, generator)
            if num_own_rows:
                batch = torch.cat((batch, own[generator.integers(0, len(own), size=num_own_rows)]))
            figures = workers.backward(draft, loss_of, batch.chunk(workers.count))
            torch.nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            step += 1
            smoothed = figures if smoothed is None else 0.95 * smoothed + 0.05 * figures
            info = f"step {step}  loss {smoothed[0]:.3f}  1 - TV {1 - smoothed[1]:.3f}"
            progress.update(bar, completed=clock.seconds() - start, info=info)
            if step % 50 == 0:
                print(f"{elapsed / 60:.1f} min: {info}", flush=True)
    return {
        "steps": step,
        "minutes": round((time.monotonic() - wall_start) / 60, 2),
        "cpu_minutes": round((time.process_time() - cpu_start) / 60, 2),
        "writing_minutes": round(writing_s / 60, 2),
        "tokens_written": written,
        "tokens_trained": step * recipe.rows * CONTEXT,
    }


def show(before: dict[str, float], after: dict[str, float], console: Console) -> None:
    """Both exams as a table."""
    table = Table("draft model on held-out text", "before", "after", "after / before")
    for name in before:
        table.add_row(name, f"{before[name]:.3f}", f"{after[name]:.3f}", f"{after[name] / before[name]:.2f}")
    console.print(table)


def main() -> None:
    """Examine, distil, examine, save."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder that gets the model")
    parser.add_argument("--target", type=Path, default=target_path(), help="teacher (default: the tiny target)")
    parser.add_argument("--draft", type=Path, default=draft_path(), help="where to start (default: the tiny draft)")
    parser.add_argument("--minutes", type=float, default=15.0, help="for everything, exams included (default: 15)")
    parser.add_argument("--learning-rate", type=float, default=Recipe.learning_rate)
    parser.add_argument(
        "--temperature", type=float, default=Recipe.temperature, help="of the KL (default: %(default)s)"
    )
    parser.add_argument(
        "--tv-weight", type=float, default=Recipe.tv_weight, help="of TV beside it (default: %(default)s)"
    )
    parser.add_argument(
        "--rows", type=int, default=Recipe.rows, help=f"of {CONTEXT} tokens a step (default: %(default)s)"
    )
    parser.add_argument("--own-share", type=float, default=Recipe.own_share, help="of text written by the target")
    parser.add_argument("--written-rows", type=int, default=Recipe.written_rows, help="texts it writes at a time")
    parser.add_argument("--tokens", type=int, default=16_000_000, help="real text to read (default: 16M tokens)")
    parser.add_argument("--stdlib-only", action="store_true", help="leave installed packages out")
    parser.add_argument("--prompts", type=int, default=64, help="held-out prompts of the exam (default: 64)")
    parser.add_argument("--max-tokens", type=int, default=128, help="output tokens of each (default: 128)")
    parser.add_argument("--held-out-tokens", type=int, help="take the held-out loss of the first so many only")
    parser.add_argument("--no-compile", action="store_true", help="train without torch.compile")
    parser.add_argument("--cpu-clock", action="store_true", help="count CPU time over --threads, for a shared machine")
    parser.add_argument("--threads", type=int, default=2, help="cores to use; must divide rows (default: 2)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.minutes <= 0 or arguments.temperature <= 0 or not 0 <= arguments.own_share <= 1:
        parser.error("--minutes and --temperature must be positive, --own-share between 0 and 1")
    workers = Workers(arguments.threads)
    clock = Clock(arguments.threads if arguments.cpu_clock else None)
    if arguments.threads < 1 or arguments.rows % arguments.threads:
        parser.error("--threads must be positive and divide --rows")
    torch.manual_seed(arguments.seed)
    console = Console()
    recipe = Recipe(
        arguments.learning_rate, arguments.temperature, arguments.tv_weight, arguments.rows, arguments.own_share,
        written_rows=arguments.written_rows, compiled=not arguments.no_compile,
    )  # fmt: skip

    tokenizer = Tokenizer.from_file(str(arguments.target / "tokenizer.json"))
    target = LlamaForCausalLM.from_pretrained(arguments.target, dtype=torch.float32)
    draft = LlamaForCausalLM.from_pretrained(arguments.draft, dtype=torch.float32)
    tokens = training_tokens(tokenizer, arguments.tokens, arguments.stdlib_only, arguments.seed)
    held_out = encode(tokenizer, [text for path in corpus.held_out_sources() if (text := corpus.read_text(path))])
    held_out = held_out[: arguments.held_out_tokens]
    prompts = [tokenizer.encode(prompt).ids for prompt in corpus.held_out_prompts(arguments.prompts)]
    console.print(f"{len(tokens):,} training tokens, {len(held_out):,} held out, {len(prompts)} held-out prompts")

    exam = Exam.make(target, held_out, prompts, arguments.max_tokens, arguments.seed)
    examining = clock.seconds()
    before = exam.mark(target, draft)
    examining = clock.seconds() - examining
    # What the second exam and saving will take is set aside.
    seconds = arguments.minutes * 60 - 1.2 * examining
    figures = train(target, draft, tokens, clock, seconds, recipe, workers, arguments.seed)
    console.print(str(figures))

    # What is saved is bfloat16: that is what gets examined.
    for parameter in draft.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).float()
    after = exam.mark(target, draft.eval())
    show(before, after, console)
    arguments.out.mkdir(parents=True, exist_ok=True)
    save(draft, tokenizer, arguments.out, CONTEXT)
    command = "python examples/distil_draft.py " + " ".join(sys.argv[1:])
    total = (time.monotonic() - began) / 60
    record: dict[str, Any] = {
        "command": command,
        "total_minutes": round(total, 1),
        "total_cpu_minutes": round(time.process_time() / 60, 1),
        "training": figures,
        "before": before,
        "after": after,
    }
    (arguments.out / "distillation.json").write_text(json.dumps(record, indent=1) + "\n")
    console.print(f"saved to {arguments.out} after {total:.1f} minutes, {time.process_time() / 60:.1f} of CPU time")


if __name__ == "__main__":
    main()
