"""This plugin in ``ray.serve.llm``, Ray's own OpenAI API: the settings that it needs, on CPUs and on GPUs.

python examples/ray/serve_llm.py
"""

from __future__ import annotations

import argparse

import openai
import ray
from ray import serve
from ray.serve.llm import LLMConfig, build_openai_app

from vllm_specplug.ray import serve_llm
from vllm_specplug.ray.settings import STAGE_CPUS
from vllm_specplug.tiny_models import target_path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(target_path()), help="folder or name")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    ray.init(include_dashboard=False)
    settings = serve_llm(
        options.model,
        model_id="tiny",
        speculative_config={"method": "specplug", "num_speculative_tokens": 8},
        engine_args={"max_model_len": 1024, "dtype": "float32", "enforce_eager": True},
        replicas=options.replicas,
    )
    serve.start(http_options={"host": "127.0.0.1", "port": options.port})
    # The engines may have all CPUs of a small machine.
    ingress = {"ray_actor_options": {"num_cpus": STAGE_CPUS}}
    serve.run(build_openai_app({"llm_configs": [LLMConfig(**settings)], "ingress_deployment_config": ingress}))
    with openai.OpenAI(base_url=f"http://127.0.0.1:{options.port}/v1", api_key="none") as client:
        answer = client.completions.create(model="tiny", prompt="def main(", max_tokens=24, temperature=0.8, seed=7)
        print(repr(answer.choices[0].text))
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
