"""The tiny models cut to 512 tokens and two layers: under Triton's interpreter, time grows with the vocabulary.

Byte-pair tokens are numbered in the order of their merges, so that the first 512 form a tokenizer, which goes with the
first 512 rows of the embedding. The cut models write worse text than the tiny models.
"""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from pathlib import Path

from vllm_specplug import tiny_models

VOCAB = 512
NUM_LAYERS = 2


_folder = tempfile.TemporaryDirectory(prefix="specplug-small-models-")


@functools.cache
def target_path() -> Path:
    """Folder of the cut tiny target model."""
    return cut(tiny_models.target_path(), Path(_folder.name) / "target")


@functools.cache
def draft_path() -> Path:
    """Folder of the cut tiny draft model."""
    return cut(tiny_models.draft_path(), Path(_folder.name) / "draft")


def cut(model: Path, out: Path) -> Path:
    """Cut the model in folder ``model`` and write it to the folder ``out``; returns ``out``."""
    from safetensors.torch import load_file, save_file

    out.mkdir(parents=True)
    config = json.loads((model / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "vocab_size": VOCAB, "num_hidden_layers": NUM_LAYERS}))
    weights = load_file(model / "model.safetensors")
    dropped = [f"model.layers.{layer}." for layer in range(NUM_LAYERS, config["num_hidden_layers"])]
    kept = {name: each for name, each in weights.items() if not name.startswith(tuple(dropped))}
    kept["model.embed_tokens.weight"] = kept["model.embed_tokens.weight"][:VOCAB].clone()
    save_file(kept, out / "model.safetensors")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    of = tokenizer["model"]
    of["vocab"] = {token: number for token, number in of["vocab"].items() if number < VOCAB}
    of["merges"] = [pair for pair in of["merges"] if "".join(pair) in of["vocab"]]
    (out / "tokenizer.json").write_text(json.dumps(tokenizer))
    for name in ("tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(model / name, out)
    return out
