"""Chats become the prompts that vLLM's own server makes of them; tokenizers are loaded as the engine loads them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vllm_specplug.engines.environment import environment
from vllm_specplug.errors import DatastoreError
from vllm_specplug.stores.texts import load_tokenizer
from vllm_specplug.tiny_models import target_path

CALLS = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is none %}CALL {% else %}{{ m.content }}{% endif %}"
    "{% for t in m.tool_calls or [] %}{{ t.function.arguments | tojson }}{% endfor %}{% endfor %}"
    "{% if tools %}TOOLS {{ tools | length }}{% endif %}{% if add_generation_prompt %}<answer>{% endif %}"
)
PARTS = (  # as templates of models with pictures do
    "{% for m in messages %}<{{ m.role }}>{% for part in m.content %}[{{ part.text }}]{% endfor %}{% endfor %}"
)


def call(content: Any, arguments: Any) -> list[dict[str, Any]]:
    function = {"name": "f", "arguments": arguments}
    asked = {
        "role": "assistant",
        "content": content,
        "tool_calls": [{"id": "1", "type": "function", "function": function}],
    }
    return [{"role": "user", "content": "go"}, asked]


HI = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
ROWS: list[dict[str, Any]] = [
    {"messages": HI},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "text", "text": "you"}]}]},
    {"messages": call("", '{"a": 2}')},
    {"messages": call(None, json.dumps({"a": 2, "b": None}))},
    {"messages": call("", "{}")},
    {"messages": [{"role": "developer", "content": "be brief"}, *HI]},
    {"messages": [{"role": "user", "content": "hi", "name": None}]},
    {"messages": [{"role": "user"}]},
    {"messages": [{"role": "assistant", "content": "x", "reasoning_content": "y"}]},
    {"messages": call("", '{"a": ')},
    {"messages": [{"role": "user", "content": 7}]},
    {"messages": HI, "tools": [TOOL]},
    {"messages": []},
]
REQUESTS: list[dict[str, Any]] = [
    {"custom_id": "a", "body": {"messages": HI, "max_completion_tokens": 4, "seed": 11, "top_p": 0.5}},
    {"custom_id": "b", "body": {"messages": HI, "temperature": 0.0, "add_generation_prompt": False}},
    {"custom_id": "c", "body": {"messages": HI, "logprobs": True}},
]


def made(folder: Path, template: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the commands and the server make of chats with a template."""
    model = folder / "model"
    if not model.exists():
        shutil.copytree(target_path(), model)
    (model / "chat_template.jinja").write_text(template)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    program = Path(__file__).parent / "engine" / "chat_prompts.py"
    command = [sys.executable, str(program), str(model), str(folder / "rows.jsonl"), str(folder / "result.json")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


@pytest.mark.engine
def test_prompts_of_chats_are_those_of_vllms_server(tmp_path: Path) -> None:
    found = made(tmp_path, CALLS, ROWS)
    for row, ours, server in zip(ROWS, found["batch"], found["server"], strict=True):
        if "ids" in server:
            assert ours.get("ids") == server["ids"], row
        else:
            assert "error" in ours, row
    assert found["texts"][:6] == [
        "<user>hi<answer>",
        "<user>hi\nyou<answer>",
        '<user>go<assistant>{"a": 2}<answer>',
        '<user>go<assistant>{"a": 2, "b": null}<answer>',
        "<user>go<assistant>{}<answer>",
        "<system>be brief<user>hi<answer>",
    ]
    assert found["texts"][11] == "<user>hiTOOLS 1<answer>"
    assert found["stored"][:2] == ["<user>hi", "<user>hi\nyou"], "a whole chat, and no beginning of another answer"
    assert found["structured"] == "a+", "structured outputs of --sampling are no plain types for vLLM"
    assert found["other"], "the tokenizer that vLLM's options name"


@pytest.mark.engine
def test_requests_of_openais_batch_files(tmp_path: Path) -> None:
    found = made(tmp_path, PARTS, REQUESTS)
    assert [each.get("ids") for each in found["batch"][:2]] == [each["ids"] for each in found["server"][:2]]
    assert found["texts"][:2] == ["<user>[hi]"] * 2
    assert found["batch"][0]["sampling"] == [4, 0.5, 3, 0.5], "max_tokens, temperature, seed of the row, top_p"
    assert found["batch"][1]["sampling"] == [7, 0.0, 3, 1.0]
    assert "'logprobs', for which the output has no column" in found["batch"][2]["error"]


def test_tokenizers_with_code_of_their_own(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(target_path() / name, tmp_path)
    (tmp_path / "own_tokenizer.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n\n\nclass OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own_tokenizer.OwnTokenizer"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(DatastoreError, match="--trust-remote-code"):
        load_tokenizer(str(tmp_path))
    assert type(load_tokenizer(str(tmp_path), trust_remote_code=True)).__name__ == "OwnTokenizer"
