"""Complete prompts with two replicas on Ray Data; run it again, and nothing is done twice.

    python examples/ray/batch.py --out done
    python examples/ray/batch.py --out done        # there already

The same on the command line: specplug batch PROMPTS --out done --model MODEL --replicas 2
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import pyarrow.parquet as pq

from vllm_specplug.measure.corpus import held_out_prompts
from vllm_specplug.ray import generate
from vllm_specplug.tiny_models import target_path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="batch-out", help="folder of the result")
    parser.add_argument("--model", default=str(target_path()), help="folder or name")
    parser.add_argument("--replicas", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.jsonl"
        prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in held_out_prompts(64, 400)))
        result = generate(
            [prompts],
            options.out,
            options.model,
            speculative_config={"method": "specplug", "num_speculative_tokens": 8},
            engine_args={"max_model_len": 1024, "dtype": "float32", "enforce_eager": True},
            sampling={"max_tokens": 64, "temperature": 0.8},
            replicas=options.replicas,
            on_progress=lambda done, total, rows_per_s, _: print(f"{done}/{total} rows, {rows_per_s:.1f} rows/s"),
        )
    print(result)
    print(pq.read_table(options.out, columns=["row_id", "seed", "finish_reason", "output_text"]).to_pylist()[0])


if __name__ == "__main__":
    main()
