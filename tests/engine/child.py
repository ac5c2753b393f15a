"""The child process of ``harness.Engine``: one in-process vLLM engine that runs pickled commands."""

from __future__ import annotations

import os
import pickle
import socket
import traceback
from typing import Any


def build_params(request: dict[str, Any]) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RepetitionDetectionParams, StructuredOutputsParams

    keywords = dict(request["params"])
    if "json_schema" in keywords:
        keywords["structured_outputs"] = StructuredOutputsParams(json=keywords.pop("json_schema"))
    if "repetition_detection" in keywords:
        keywords["repetition_detection"] = RepetitionDetectionParams(**keywords["repetition_detection"])
    if keywords.pop("hot", False):
        # Samplers can work with this temperature, but vLLM refuses it, and checks every copy of the parameters again.
        keywords["temperature"] = 1e6
        SamplingParams._verify_args = lambda self: None
    return SamplingParams(**keywords)


def plain_logprobs(positions: Any) -> Any:
    if positions is None:
        return None
    return [None if p is None else {token: entry.logprob for token, entry in p.items()} for p in positions]


class Child:
    def __init__(self) -> None:
        self.llm: Any = None

    def start(self, engine_args: dict[str, Any]) -> None:
        from vllm import LLM

        if os.environ.get("TRITON_INTERPRET"):
            # vLLM's own Triton kernel for top-k and top-p does not run under the interpreter; its PyTorch form does.
            from vllm.v1.sample.ops import topk_topp_sampler

            topk_topp_sampler.apply_top_k_top_p_triton = topk_topp_sampler.apply_top_k_top_p_pytorch
        self.llm = LLM(**engine_args)

    @property
    def runner(self) -> Any:
        return self.llm.llm_engine.model_executor.driver_worker.worker.model_runner

    def generate(self, requests: list[dict[str, Any]], options: dict[str, Any]) -> list[dict[str, Any]]:
        from vllm.lora.request import LoRARequest

        self.llm.reset_prefix_cache() if options.get("reset_prefix_cache") else None
        prompts = [
            {"prompt_token_ids": r["prompt"]} if isinstance(r["prompt"], list) else r["prompt"] for r in requests
        ]
        loras = [LoRARequest("adapter", 1, r["lora"]) if r.get("lora") else None for r in requests]
        outputs = self.llm.generate(
            prompts, [build_params(r) for r in requests], use_tqdm=False, lora_request=loras if any(loras) else None
        )
        return [
            {
                "prompt_token_ids": list(output.prompt_token_ids),
                "prompt_logprobs": plain_logprobs(output.prompt_logprobs),
                "outputs": [
                    {
                        "token_ids": list(sequence.token_ids),
                        "text": sequence.text,
                        "finish_reason": sequence.finish_reason,
                        "logprobs": plain_logprobs(sequence.logprobs),
                    }
                    for sequence in output.outputs
                ],
            }
            for output in outputs
        ]

    def set_drafting(self, settings: dict[str, Any]) -> None:
        """Replace the proposers of the running engine, so that one start-up serves many configurations."""
        from vllm_specplug.drafting.drafting import Drafting
        from vllm_specplug.settings.model import parse_settings

        drafter = self.drafter
        before = drafter.drafting
        drafter.drafting = Drafting(parse_settings(settings), before.context, before.native, before.can_shorten)
        drafter.drafting.warm_up()
        drafter.drafting.describe()  # as at a start

    @property
    def drafter(self) -> Any:
        """The plugin's drafter on the model runner, V1 or V2."""
        from vllm_specplug.hooks.attached import drafter_of

        return drafter_of(self.runner)

    def stats(self) -> Any:
        return self.drafter.snapshot()

    def metrics(self) -> dict[str, Any]:
        return {metric.name: getattr(metric, "value", None) for metric in self.llm.get_metrics()}

    def call(self, function: str, *args: Any) -> Any:
        """Run ``function`` of the module ``in_child`` in this process, with this child as first argument."""
        import in_child

        return getattr(in_child, function)(self, *args)


def serve(channel: socket.socket) -> None:
    """Run the commands that arrive through ``channel`` until its other end is closed."""
    child = Child()
    with channel.makefile("rb") as commands, channel.makefile("wb") as answers:
        while True:
            try:
                name, args = pickle.load(commands)
            except EOFError:
                return
            try:
                answer = ("ok", getattr(child, name)(*args))
            except BaseException as error:
                traceback.print_exc()
                answer = ("error", f"{type(error).__name__}: {error}")
            pickle.dump(answer, answers)
            answers.flush()
