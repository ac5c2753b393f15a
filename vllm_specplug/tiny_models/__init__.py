"""Two Llama models small enough to ship, a target and a draft, with one tokenizer of 4096 tokens.

Both know Python source code and nothing else, up to 2048 tokens of it. They were never trained on the modules in
``vllm_specplug.measure.corpus.HELD_OUT_MODULES``.
"""

from __future__ import annotations

from pathlib import Path

TARGET = Path(__file__).parent / "tiny-target"
"""About 4 million parameters: the model that is served in the demo, the tests and the benchmarks."""

DRAFT = Path(__file__).parent / "tiny-draft"
"""About 0.9 million parameters: a draft model for :data:`TARGET`."""

_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def target_path() -> Path:
    """Folder of the target model.

    Raises:
        FileNotFoundError: this installation lacks its files.
    """
    return _complete(TARGET)


def draft_path() -> Path:
    """Folder of the draft model.

    Raises:
        FileNotFoundError: this installation lacks its files.
    """
    return _complete(DRAFT)


def _complete(folder: Path) -> Path:
    missing = [name for name in _FILES if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"the tiny model {folder.name} is not installed: {', '.join(missing)} missing from {folder}. "
            "Reinstall vllm-specplug, or train the models with examples/train_tiny_models.py."
        )
    return folder
