"""Train the tiny target and draft model that ship with vllm-specplug, on the Python sources of this machine.

    python examples/train_tiny_models.py --out my-models              # at most 15 minutes on 2 CPU cores
    python examples/train_tiny_models.py --out my-models --minutes 90  # closer to the shipped pair

Both are Llama models in Hugging Face format with one byte-level BPE tokenizer. They learn from the interpreter's own
standard library and from installed packages whose licence allows it; the modules of
``vllm_specplug.measure.corpus.HELD_OUT_MODULES``, their tests and copies of them are left out, and the held-out loss is
measured on them. Matrices are trained with Muon (Jordan et al., 2024), everything else with AdamW.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import math
import platform
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from vllm_specplug.measure import corpus

VOCAB_SIZE = 4096
END_OF_TEXT = "<|endoftext|>"
# One token for a line break with the next line's indentation: Python text then takes about a third fewer tokens.
PIECES = r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\r?\n[ \t]*|[ \t]+|\s+"
CHAT_TEMPLATE = (
    "{% for message in messages %}# {{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}# assistant:\n{% endif %}"
)
ALLOWED_LICENCE = re.compile(r"\b(MIT|BSD|Apache|PSF|Python Software Foundation|ISC)\b", re.IGNORECASE)
REFUSED_LICENCE = re.compile(r"GPL|Mozilla|MPL|proprietary", re.IGNORECASE)
MAX_PACKAGE_BYTES = 12_000_000  # no single package may dominate what the models know

SHAPES = {
    "tiny-target": {
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "tiny-draft": {
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
}
TIME_SHARE = {"tiny-target": 0.82, "tiny-draft": 0.18}
LONG = 4  # the models end up serving this many times the context that most of the training runs at
LEARNING_RATE = {"tiny-target": 4e-3, "tiny-draft": 6e-3}  # AdamW's; Muon's is ten times smaller per unit of RMS


def licence_of(distribution: importlib.metadata.Distribution) -> str:
    """One line of licence text from the metadata: expression, else classifiers, else the free-form field."""
    meta = distribution.metadata
    classifiers = [c.split(" :: ")[-1] for c in meta.get_all("Classifier") or [] if c.startswith("License ::")]
    text = meta.get("License-Expression") or ", ".join(classifiers) or (meta.get("License") or "").split("\n")[0]
    return text[:80]


def package_sources() -> Iterator[tuple[str, list[Path]]]:
    """``("name version (licence)", files)`` for every installed package whose licence allows training on it."""
    for distribution in sorted(importlib.metadata.distributions(), key=lambda d: (d.metadata["Name"] or "").lower()):
        licence = licence_of(distribution)
        itself = distribution.metadata["Name"] == "vllm-specplug"
        if itself or not ALLOWED_LICENCE.search(licence) or REFUSED_LICENCE.search(licence):
            continue
        files, size = [], 0
        entries = sorted(str(f) for f in distribution.files or [] if str(f).endswith(".py"))
        # A package over the cap gives an even spread of its files rather than the first ones of the alphabet.
        entries.sort(key=lambda name: hashlib.sha256(name.encode()).digest())
        for entry in entries:
            path = Path(str(distribution.locate_file(entry)))
            if path.is_file() and size + path.stat().st_size <= MAX_PACKAGE_BYTES:
                files.append(path)
                size += path.stat().st_size
        if files:
            yield f"{distribution.metadata['Name']} {distribution.version} ({licence})", files


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE of :data:`VOCAB_SIZE` entries."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """All texts as one uint16 row, an end-of-text token after each."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    parts: list[np.ndarray] = []
    for start in range(0, len(texts), 256):
        for encoding in tokenizer.encode_batch_fast(texts[start : start + 256], add_special_tokens=False):
            parts.append(np.array([*encoding.ids, end], dtype=np.uint16))  # noqa: PERF401 - clearer than a nested extend
    return np.concatenate(parts)


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, tokens: np.ndarray, context: int) -> float:
    """Mean negative log-likelihood in nats a token over held-out text, windows of ``context`` tokens."""
    rows = len(tokens) // context
    windows = torch.from_numpy(tokens[: rows * context].astype(np.int64)).view(rows, context)
    total = 0.0
    for row in windows.split(8):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(row).logits
        total += torch.nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), row[:, 1:].flatten(), reduction="sum"
        ).item()
    return total / (rows * (context - 1))


def train(
    name: str, tokens: np.ndarray, held_out: np.ndarray, context: int, batch_tokens: int, minutes: float, seed: int
) -> tuple[LlamaForCausalLM, dict[str, float]]:
    """Train one model for ``minutes`` and return it with what was measured.

    The learning rate rises for 2% of the time, then falls linearly to a twentieth: a schedule in wall-clock time, so
    that any budget ends in a finished model. The last eighth runs at four times the context length.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, max_position_embeddings=LONG * context, tie_word_embeddings=True, rms_norm_eps=1e-5,
        bos_token_id=0, eos_token_id=0, pad_token_id=0, use_cache=False, **SHAPES[name],
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    num_parameters = sum(p.numel() for p in model.parameters())
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    peak = LEARNING_RATE[name]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=peak, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=peak, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    generator = np.random.default_rng(seed)

    def loss_of(batch: torch.Tensor) -> torch.Tensor:  # [rows, length] -> scalar
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(batch).logits
            return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    if shutil.which("g++"):  # what torch.compile needs on a CPU; it makes a step about 1.4 times faster
        loss_of = torch.compile(loss_of, dynamic=False)
    step = seen = 0
    smoothed = math.nan
    start = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), TextColumn("{task.fields[info]}"))
    with Progress(*columns) as progress:
        bar = progress.add_task(f"{name} ({num_parameters / 1e6:.2f}M)", total=minutes * 60, info="")
        while (elapsed := time.monotonic() - start) < minutes * 60:
            done = elapsed / (minutes * 60)
            rate = peak * min(done / 0.02 + 1e-3, 1.0) * (1 - 0.95 * done)
            length = context if done < 0.875 else LONG * context
            starts = generator.integers(0, len(tokens) - length - 1, size=batch_tokens // length)
            batch = torch.from_numpy(np.stack([tokens[s : s + length] for s in starts]).astype(np.int64))
            loss = loss_of(batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            step += 1
            seen += batch.numel()
            smoothed = loss.item() if math.isnan(smoothed) else 0.98 * smoothed + 0.02 * loss.item()
            info = f"step {step}  loss {smoothed:.3f}  {seen / (time.monotonic() - start):,.0f} tokens/s"
            progress.update(bar, completed=elapsed, info=info)
            if step % 200 == 0:
                print(f"{name}: {elapsed / 60:.1f} min, {info}", flush=True)
    seconds = time.monotonic() - start
    model.eval()
    figures = {
        "parameters": num_parameters,
        "steps": step,
        "tokens": seen,
        "minutes": round(seconds / 60, 1),
        "tokens_per_s": round(seen / seconds),
        "held_out_loss": round(held_out_loss(model, held_out, context), 4),
    }
    print(f"{name}: {figures}", flush=True)
    return model, figures


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """Weights as bfloat16 safetensors, with tokenizer and chat template, loadable by vLLM and transformers."""
    model.config.use_cache = True
    model.to(torch.bfloat16).save_pretrained(folder)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT, model_max_length=LONG * context
    )
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder that gets tiny-target/ and tiny-draft/")
    parser.add_argument("--minutes", type=float, default=13.0, help="training time of both together (default: 13)")
    parser.add_argument("--context", type=int, default=512, help="tokens a training window (default: 512)")
    parser.add_argument("--batch-tokens", type=int, default=8192, help="tokens a step (default: 8192)")
    parser.add_argument("--only", choices=list(SHAPES), help="train just this one, with the tokenizer already in --out")
    parser.add_argument("--stdlib-only", action="store_true", help="leave installed packages out")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.minutes <= 0 or arguments.batch_tokens < LONG * arguments.context:
        parser.error(f"--minutes must be positive and --batch-tokens at least {LONG} times --context")
    known_tokenizers = sorted(arguments.out.glob("tiny-*/tokenizer.json"))
    if arguments.only and not known_tokenizers:
        parser.error(f"--only needs a pair trained before in {arguments.out}, whose tokenizer it keeps")
    arguments.out.mkdir(parents=True, exist_ok=True)

    sources = {f"CPython {platform.python_version()} standard library (PSF-2.0)": corpus.standard_library_sources()}
    if not arguments.stdlib_only:
        sources.update(package_sources())
    texts = {name: [t for _, t in corpus.without_copies_of_held_out(files)] for name, files in sources.items()}
    stdlib_texts = next(iter(texts.values()))
    all_texts = [text for group in texts.values() for text in group]
    held_out_texts = [text for path in corpus.held_out_sources() if (text := corpus.read_text(path))]
    print(
        f"{len(all_texts):,} files, {sum(map(len, all_texts)) / 1e6:.1f}M characters, {len(texts)} sources", flush=True
    )

    order = np.random.default_rng(arguments.seed).permutation(len(all_texts))
    if arguments.only:
        tokenizer = Tokenizer.from_file(str(known_tokenizers[0]))
    else:
        tokenizer = train_tokenizer(stdlib_texts + [all_texts[i] for i in order[: len(order) // 6]])
    tokens = encode(tokenizer, [all_texts[i] for i in order] + stdlib_texts)  # the standard library counts twice
    held_out = encode(tokenizer, held_out_texts)
    characters_per_token = sum(map(len, held_out_texts)) / len(held_out)
    print(f"{len(tokens):,} training tokens, {characters_per_token:.2f} held-out characters a token", flush=True)

    command = "python examples/train_tiny_models.py " + " ".join(sys.argv[1:])
    provenance = arguments.out / "provenance.json"
    earlier = json.loads(provenance.read_text()) if arguments.only and provenance.is_file() else {}
    report: dict[str, object] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "training_tokens_available": len(tokens),
        "held_out_modules": list(corpus.HELD_OUT_MODULES),
        "held_out_characters_per_token": round(characters_per_token, 3),
        "loss_unit": "nats per token",
        "sources": sorted({*sources, *earlier.get("sources", [])}),
    }
    measured: dict[str, object] = dict(earlier.get("models", {}))
    for name in [arguments.only] if arguments.only else SHAPES:
        model, figures = train(
            name, tokens, held_out, arguments.context, arguments.batch_tokens,
            arguments.minutes * (1.0 if arguments.only else TIME_SHARE[name]), arguments.seed,
        )  # fmt: skip
        save(model, tokenizer, arguments.out / name, arguments.context)
        measured[name] = {"command": command, **figures}
        provenance.write_text(json.dumps({**report, "models": measured}, indent=1) + "\n")
    print(f"saved to {arguments.out}", flush=True)


if __name__ == "__main__":
    main()
