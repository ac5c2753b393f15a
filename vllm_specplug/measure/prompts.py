"""Prompts to measure on, read from the usual benchmark files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_specplug.engines.environment import require_vllm
from vllm_specplug.errors import ConfigurationError
from vllm_specplug.measure import corpus
from vllm_specplug.stores.texts import READ_ERRORS, unpacked


@dataclass(frozen=True)
class Task:
    """One prompt of a file.

    Attributes:
        category: kind of task if the file names one, else the file's name.
        text: the prompt.
        is_chat: True for a user's message, which goes through the model's chat template.
    """

    category: str
    text: str
    is_chat: bool


def read_tasks(path: Path) -> list[Task]:
    """Prompts of a file: JSON lines, one JSON list, or one prompt in a line; compressed if named ``.gz`` or ``.zst``.

    JSON records hold ``turns`` (Spec-Bench), ``conversations`` (ShareGPT), ``messages``, ``prompt`` (HumanEval) or
    ``text``, and may hold a ``category``. The prompt of a conversation is the user's first message.

    Raises:
        ConfigurationError: the file cannot be read, or holds no prompt.
    """
    try:
        with path.open("rb") as raw, unpacked(raw, path) as stream:
            text = stream.read().decode()
    except READ_ERRORS as error:
        raise ConfigurationError(f"--prompts {path} cannot be read: {error}") from error
    name = path.name.partition(".")[0]
    tasks: list[Task] = []
    for place, record in _records(path, text):
        try:
            task = Task(name, record, False) if isinstance(record, str) else _task(record, name)
        except (KeyError, IndexError, AttributeError, TypeError, StopIteration):
            raise ConfigurationError(
                f"--prompts {path}, {place}: must be JSON with 'prompt', 'text', 'turns', 'conversations' or "
                "'messages', "
                'as in {"prompt": "def main():"}'
            ) from None
        if task.text.strip():
            tasks.append(task)
    if not tasks:
        raise ConfigurationError(f"--prompts {path} holds no prompt")
    return tasks


def read_prompts(path: Path) -> list[str]:
    """The texts of :func:`read_tasks`."""
    return [task.text for task in read_tasks(path)]


def _records(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """(position in words, record) of every record in a file's text; a plain line is a record of its own."""
    if ".json" not in "".join(path.suffixes):
        yield from ((f"line {number}", line) for number, line in enumerate(text.splitlines(), 1))
        return
    if text.lstrip().startswith("["):
        try:
            yield from ((f"record {number}", record) for number, record in enumerate(json.loads(text), 1))
        except ValueError as error:
            raise ConfigurationError(f"--prompts {path} is no JSON: {error}") from None
        return
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        yield f"line {number}", {} if isinstance(record, str) else record


def _task(record: Mapping[str, Any], name: str) -> Task:
    category = str(record.get("category") or name)
    if "turns" in record:
        return Task(category, _text(record["turns"][0]), True)
    for key, speaker, said in (("conversations", "from", "value"), ("messages", "role", "content")):
        if key in record:
            return Task(
                category, _text(next(each[said] for each in record[key] if each[speaker] in ("human", "user"))), True
            )
    return Task(category, _text(record.get("prompt") or record["text"]), False)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


MAX_PROMPT_TOKENS = 1024


def chosen(tasks: Sequence[Task], num_prompts: int) -> list[Task]:
    """The first ``num_prompts`` tasks when one is taken from every category in turn."""
    groups: dict[str, list[Task]] = {}
    for task in tasks:
        groups.setdefault(task.category, []).append(task)
    picked: list[Task] = []
    for nth in range(max(map(len, groups.values()))):
        picked += [group[nth] for group in groups.values() if nth < len(group)]
    return picked[:num_prompts]


def load_tasks(paths: Sequence[Path], num_prompts: int) -> tuple[list[Task], str]:
    """``num_prompts`` prompts of the files, or of Python's standard library without any; their source in words."""
    if not paths:
        texts = corpus.held_out_prompts(num_prompts, 600)
        return [Task("python", text, False) for text in texts], "Python's standard library"
    tasks = [task for path in paths for task in read_tasks(path)]
    return chosen(tasks, num_prompts), ", ".join(path.name for path in paths)


def tokenizer_of(model: str) -> Any:
    """The tokenizer of a model, by folder or name.

    Raises:
        ConfigurationError: the tokenizer cannot be loaded.
    """
    require_vllm()  # transformers comes with vLLM
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model)
    except Exception as error:  # damaged files raise no narrower exception
        first = str(error).strip().partition("\n")[0]
        raise ConfigurationError(f"the tokenizer of {model!r} cannot be loaded: {first}") from error


def encode(model: str, tasks: Sequence[Task], chat: bool | None) -> list[list[int]]:
    """Token ids of every task, the first :data:`MAX_PROMPT_TOKENS` at most.

    Args:
        chat: True puts all tasks through the chat template, False none, None the messages if there is a template.

    Raises:
        ConfigurationError: the tokenizer cannot be loaded, or ``chat`` is True and the model has no template.
    """
    tokenizer = tokenizer_of(model)
    if chat and not tokenizer.chat_template:
        raise ConfigurationError(f"--chat: {model} has no chat template; leave it out")
    token_ids = []
    for task in tasks:
        text = task.text
        if tokenizer.chat_template and (task.is_chat if chat is None else chat):
            messages = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        token_ids.append(tokenizer.encode(text)[:MAX_PROMPT_TOKENS])
    return token_ids
