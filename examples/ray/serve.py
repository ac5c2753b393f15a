"""Two replicas on Ray Serve behind one address that speaks the OpenAI API; asks them, and ends.

    python examples/ray/serve.py

To keep them: specplug ray-serve MODEL --replicas 2, or `serve run` with an application made as here.
"""

from __future__ import annotations

import argparse

import openai
import ray
from ray import serve

from vllm_specplug.ray import deployment
from vllm_specplug.tiny_models import target_path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(target_path()), help="folder or name")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    ray.init(include_dashboard=False)
    application = deployment(
        options.model,
        speculative_config={"method": "specplug", "num_speculative_tokens": 8},
        engine_args={"max_model_len": 1024, "dtype": "float32", "enforce_eager": True},
        replicas=options.replicas,
    )
    serve.start(http_options={"host": "127.0.0.1", "port": options.port})
    serve.run(application)
    with openai.OpenAI(base_url=f"http://127.0.0.1:{options.port}/v1", api_key="none") as client:
        for _ in range(4):  # whichever replica answers
            answer = client.completions.create(
                model=options.model, prompt="def main(", max_tokens=24, temperature=0.8, seed=7
            )
            print(repr(answer.choices[0].text))
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
