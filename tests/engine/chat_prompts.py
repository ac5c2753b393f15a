"""What commands make of chats, and what vLLM's own render server makes of them, in a process without an engine.

Usage: chat_prompts.py MODEL ROWS RESULT. ROWS are JSON lines with chats; the result is JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from vllm_specplug.engines import chats
from vllm_specplug.engines.environment import answer_for_cpu_wheel
from vllm_specplug.measure.prompts import tokenizer_of
from vllm_specplug.ray import inputs
from vllm_specplug.ray.columns import PROMPT
from vllm_specplug.ray.replica import Job, Replica, sampling_arguments


def for_batch(path: Path, renderer: Any, model_config: Any) -> list[Any]:
    """Token ids of the prompts of a batch run, or errors, and the sampling of rows that bring it."""
    replica = Replica.__new__(Replica)
    replica._job = Job("m", None, sampling={"max_tokens": 7, "temperature": 0.5})
    replica._sampling = lambda seed: None
    replica._online = chats.online_renderer(model_config, renderer)
    with tempfile.TemporaryDirectory() as scratch:
        found = inputs.scan(inputs.find([str(path)]), None, Path(scratch))
        given = [
            json.loads(each) for part in found.parts(2) for each in inputs.read(part, found.shape)[PROMPT].to_pylist()
        ]

    async def prompt(each: Any) -> Any:
        try:
            made, params = await replica._request(each, 3)
        except Exception as error:
            return {"error": chats.reason(error)}
        sampling = params and [params.max_tokens, params.temperature, params.seed, params.top_p]
        return {"ids": made["prompt_token_ids"], "sampling": sampling}

    async def all_prompts() -> list[Any]:
        return [await prompt(each) for each in given]

    return asyncio.run(all_prompts())


async def by_server(rows: list[Any], config: Any, model: str) -> list[Any]:
    """Answers of ``vllm launch render``, asked over HTTP inside of this process."""
    import httpx
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.render.app_state import init_render_app_state
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    try:
        from vllm.entrypoints.launchers.cli_args import make_arg_parser  # vLLM 0.32
    except ImportError:
        from vllm.entrypoints.common.cli_args import make_arg_parser

    arguments = make_arg_parser(FlexibleArgumentParser()).parse_args(["--model", model])
    app = build_app(arguments, ("render",))
    await init_render_app_state(config, app.state, arguments)
    found = []
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
        for row in rows:
            body = {**(row.get("body") or row), **({"tool_choice": "none"} if "tools" in row else {})}
            answer = (await client.post("/v1/chat/completions/render", json={**body, "model": model})).json()
            found.append(
                {"ids": answer["token_ids"]} if "token_ids" in answer else {"error": answer["error"]["message"]}
            )
    return found


def main(model: str, path: Path, out: Path) -> None:
    answer_for_cpu_wheel()
    from vllm import SamplingParams
    from vllm.config import ModelConfig, VllmConfig
    from vllm.renderers import renderer_from_config

    config = VllmConfig(model_config=ModelConfig(model=model))
    renderer = renderer_from_config(config)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    batch = for_batch(path, renderer, config.model_config)
    server = asyncio.run(by_server(rows, config, model))
    stored = []
    for row in rows:
        try:
            stored.append(chats.ChatTemplate(model)((row.get("body") or row)["messages"]))
        except Exception as error:
            stored.append(f"error: {error}")
    tokenizer = renderer.get_tokenizer()
    other = tokenizer_of("/no/such/model", ["--tokenizer", model, "--trust-remote-code"])
    job = Job("m", None, sampling={"structured_outputs": {"regex": "a+"}})
    structured = SamplingParams(**sampling_arguments(job))
    result = {
        "batch": batch,
        "server": server,
        "texts": [tokenizer.decode(each["ids"]) if "ids" in each else None for each in batch],
        "stored": stored,
        "structured": structured.structured_outputs.regex,
        "other": other.encode("def f():") == tokenizer.encode("def f():"),
    }
    out.write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
