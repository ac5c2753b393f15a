"""This plugin in ``ray.data.llm``, Ray's own batch inference: the settings that it needs, on CPUs and on GPUs.

python examples/ray/data_llm.py
"""

from __future__ import annotations

import argparse

import ray
from ray.data.llm import build_processor, vLLMEngineProcessorConfig

from vllm_specplug.measure.corpus import held_out_prompts
from vllm_specplug.ray import data_llm
from vllm_specplug.ray.replica import row_seed
from vllm_specplug.ray.settings import STAGE_CPUS
from vllm_specplug.tiny_models import target_path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(target_path()), help="folder or name")
    parser.add_argument("--replicas", type=int, default=1)
    options = parser.parse_args()
    ray.init(include_dashboard=False)
    settings = data_llm(
        options.model,
        speculative_config={"method": "specplug", "num_speculative_tokens": 8},
        engine_args={"max_model_len": 1024, "dtype": "float32", "enforce_eager": True},
        replicas=options.replicas,
        batch_size=8,
        chat_template_stage=False,
    )
    process = build_processor(
        vLLMEngineProcessorConfig(**settings),
        preprocess=lambda row: {
            "prompt": row["prompt"],
            "sampling_params": {"max_tokens": 24, "temperature": 0.8, "seed": row_seed(0, row["id"])},
        },
        postprocess=lambda row: {"id": row["id"], "text": row["generated_text"]},
        # The engines may have all CPUs of a small machine.
        preprocess_map_kwargs={"num_cpus": STAGE_CPUS},
        postprocess_map_kwargs={"num_cpus": STAGE_CPUS},
    )
    rows = [{"id": i, "prompt": text} for i, text in enumerate(held_out_prompts(24, 400))]
    for row in sorted(process(ray.data.from_items(rows)).take_all(), key=lambda row: int(row["id"]))[:4]:
        print(row)
    ray.shutdown()


if __name__ == "__main__":
    main()
