"""Prompts to measure on, read from the usual benchmark files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_specplug.engines.arguments import parsed
from vllm_specplug.engines.chats import ChatTemplate
from vllm_specplug.engines.environment import require_vllm
from vllm_specplug.errors import ConfigurationError, InputError
from vllm_specplug.log import logger
from vllm_specplug.measure import corpus
from vllm_specplug.reading.chats import first_question, text_of
from vllm_specplug.reading.files import READ_ERRORS, is_pipe, kind_of, named, opened
from vllm_specplug.reading.records import Record, parquet_records, stream_records

_NO_PROMPT = (
    "must be JSON with 'prompt', 'text', 'turns', 'conversations' or 'messages', as in {\"prompt\": \"def main():\"}"
)
_TOKENIZER_OPTIONS = ("tok", "rev", "trust", "config")
"""Parts of the names of options that decide which tokenizer an engine loads, in any spelling."""


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
    """Prompts of a file: JSON lines, a JSON list, CSV, Parquet, or one prompt a line; compressed as its name says.

    Records hold ``turns`` (Spec-Bench), ``conversations`` (ShareGPT), ``messages``, ``prompt`` (HumanEval) or ``text``,
    and may hold a ``category``. The prompt of a conversation is the user's first message; one that is empty or begins
    with an answer is passed over, and so is a record that is wrong. Both are counted in a warning.

    Raises:
        ConfigurationError: the file cannot be read, or holds no prompt.
    """
    try:
        return _tasks(path)
    except READ_ERRORS as error:
        raise ConfigurationError(f"--prompts {path} cannot be read: {error}") from error
    except InputError as error:
        raise ConfigurationError(f"--prompts {named(error, path)}") from error


def _tasks(path: Path) -> list[Task]:
    name = path.name.partition(".")[0]
    tasks: list[Task] = []
    num_passed_over, wrong = 0, []
    for place, record, problem in _records(path, kind_of(path)):
        try:
            task = None if problem else _task(record, name)
        except (KeyError, IndexError, AttributeError, TypeError, ValueError):
            task, problem = None, _NO_PROMPT
        if problem:
            wrong.append(f"{place} {problem}")
        elif task is None:
            num_passed_over += 1
        elif task.text.strip():
            tasks.append(task)
    if not tasks:
        raise ConfigurationError(f"--prompts {path} holds no prompt{': ' * bool(wrong)}{''.join(wrong[:1])}")
    if wrong:
        logger.warning("--prompts %s: passed over %d wrong records, the first: %s", path, len(wrong), wrong[0])
    if num_passed_over:
        logger.warning("--prompts %s: passed over %d chats without a first question", path, num_passed_over)
    return tasks


def _records(path: Path, kind: str) -> Iterator[Record]:
    if kind == "parquet":
        yield from parquet_records(path)
        return
    with opened(path) as stream:
        if is_pipe(path) and stream.peek(1).lstrip()[:1] in (b"[", b"{"):
            kind = "json"  # a pipe has no name that says so
        yield from stream_records(stream, kind)


def read_prompts(path: Path) -> list[str]:
    """The texts of :func:`read_tasks`."""
    return [task.text for task in read_tasks(path)]


def _task(record: Any, name: str) -> Task | None:
    """The task of a record; None if it is a chat without a first question."""
    if isinstance(record, str):
        return Task(name, record, False)
    category = str(record.get("category") or name)
    if "turns" in record:
        return Task(category, text_of(record["turns"][0]), True)
    for key in ("conversations", "messages"):
        if key in record:
            question = first_question(record[key])
            return None if question is None else Task(category, question, True)
    return Task(category, text_of(record.get("prompt") or record["text"]), False)


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


def tokenizer_of(model: str, engine_cli: Sequence[str] = ()) -> Any:
    """The tokenizer of a model, by folder or name, as an engine with these options loads it.

    Args:
        engine_cli: options of ``vllm serve``.

    Raises:
        ConfigurationError: the tokenizer cannot be loaded.
    """
    require_vllm()  # transformers comes with vLLM
    try:
        if not any(part in each for each in engine_cli for part in _TOKENIZER_OPTIONS):
            from transformers import AutoTokenizer  # importing vLLM takes seconds

            return AutoTokenizer.from_pretrained(model)
        from vllm.tokenizers import get_tokenizer

        given, _ = parsed(["--model", model, *engine_cli])
        return get_tokenizer(
            given.tokenizer or model,
            tokenizer_mode=given.tokenizer_mode,
            revision=given.tokenizer_revision or given.revision,
            trust_remote_code=given.trust_remote_code,
        )
    except Exception as error:  # damaged files raise no narrower exception
        first = str(error).strip().partition("\n")[0]
        raise ConfigurationError(f"the tokenizer of {model!r} cannot be loaded: {first}") from error


def encode(model: str, tasks: Sequence[Task], chat: bool | None, engine_cli: Sequence[str] = ()) -> list[list[int]]:
    """Token ids of every task, at most :data:`MAX_PROMPT_TOKENS` each.

    Args:
        engine_cli: see :func:`tokenizer_of`.
        chat: True puts all tasks through the chat template, False none, None messages if the model has a template.

    Raises:
        ConfigurationError: the tokenizer cannot be loaded, or ``chat`` is True and the model has no template.
    """
    tokenizer = tokenizer_of(model, engine_cli)
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if chat and not has_template:
        raise ConfigurationError(f"--chat: {model} has no chat template; leave it out")
    template = ChatTemplate(model, options=tuple(engine_cli))
    found = []
    for task in tasks:
        if has_template and (task.is_chat if chat is None else chat):
            text = template([{"role": "user", "content": task.text}], begins_answer=True)
            ids = tokenizer.encode(text, add_special_tokens=False)  # the template has written them
        else:
            ids = tokenizer.encode(task.text)
        found.append(ids[:MAX_PROMPT_TOKENS])
    return found
