"""Every proposer stands many short requests in changing batches: paused, resumed, replaced and ended."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomllib

from vllm_specplug.proposers import DraftBatch, ProposerContext, TargetNoise, Verified
from vllm_specplug.samplers.noise import MURMUR, NO_NOISE, SPLITMIX
from vllm_specplug.settings import registry
from vllm_specplug.stores.writer import DatastoreWriter

VOCAB = 300
ROWS, LONGEST, K = 12, 96, 16
OPTIONS: dict[str, dict[str, Any]] = {"suffix": {"max_history_bytes": 1 << 20}}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("store") / "text.specstore"
    random = np.random.default_rng(0)
    with DatastoreWriter(path, vocab_size=VOCAB, fingerprint="0" * 64) as writer:
        for _ in range(50):
            writer.add(random.integers(0, VOCAB, 200).astype(np.int32))
        writer.finish()
    return str(path)


class Stream:
    """Requests that come and go over rows of a table, their tokens drawn from short repeated phrases."""

    def __init__(self, random: np.random.Generator) -> None:
        self.random = random
        self.table = np.zeros((ROWS, LONGEST), dtype=np.int32)
        self.lengths = np.zeros(ROWS, dtype=np.int64)
        self.names: list[str | None] = [None] * ROWS
        self.phrases = [random.integers(0, VOCAB, random.integers(2, 9)) for _ in range(40)]
        self.count = 0

    def start(self, row: int) -> None:
        prompt = np.concatenate([self.phrases[i] for i in self.random.integers(0, 40, self.random.integers(1, 5))])
        self.table[row, : len(prompt)] = prompt
        self.lengths[row] = len(prompt)
        # Now and then the name of a request that has ended.
        self.names[row] = f"r{self.count if self.random.random() < 0.95 else self.random.integers(0, 10**6)}"
        self.count += 1

    def emit(self, row: int, tokens: np.ndarray[Any, Any]) -> None:
        self.table[row, self.lengths[row] : self.lengths[row] + len(tokens)] = tokens
        self.lengths[row] += len(tokens)


@pytest.mark.parametrize("name", sorted(registry.PROPOSERS))
def test_streams_of_short_requests(name: str, store: str) -> None:
    random = np.random.default_rng()
    context = ProposerContext(VOCAB, K, ROWS, LONGEST, {"text": store}, OPTIONS.get(name, {}))
    proposer = registry.proposer_class(name)(context)
    proposer.warm_up()
    stream = Stream(random)
    drafted = 0
    held: list[int] = []
    drafts: dict[str, list[int]] = {}
    for step in range(2500):
        verified = Verified([], [], [], [])
        for row in range(ROWS):
            if stream.names[row] is None:
                stream.start(row)
            request_id = stream.names[row]
            assert request_id is not None
            targets = stream.phrases[int(random.integers(0, 40))][:4].astype(int).tolist()
            emitted = int(random.integers(1, len(targets) + 1))
            stream.emit(row, np.array(targets[:emitted]))
            verified.request_ids.append(request_id)
            verified.draft_token_ids.append(drafts.get(request_id, [])[: len(targets) - 1])
            verified.target_token_ids.append(targets)
            verified.num_emitted.append(emitted)
        proposer.observe(verified)
        chosen = np.flatnonzero(random.random(ROWS) < random.choice([0.2, 0.9, 1.0]))
        width = int(random.integers(1, K + 1))
        kind = int(random.choice([NO_NOISE, SPLITMIX, MURMUR]))
        keys = random.integers(0, 2**32, (len(chosen), width)).astype(np.uint64)
        batch = DraftBatch(
            request_ids=[str(stream.names[row]) for row in chosen],
            token_ids=stream.table,
            rows=chosen,
            num_tokens=stream.lengths[chosen],
            num_prompt_tokens=np.minimum(stream.lengths[chosen], 4),
            max_draft_tokens=random.integers(1, width + 1, len(chosen)),
            options=[{"specplug_tenant": f"t{row % 2}"} for row in chosen],
            noise=TargetNoise(kind, keys, random.choice([0, 0.5, 1.3], len(chosen)).astype(np.float32))
            if kind
            else None,
        )
        if random.random() < 0.1:
            proposer.follow(batch)
        else:
            answer = proposer.propose(batch)
            token_ids, counts = answer.token_ids, answer.num_tokens  # type: ignore[union-attr]
            assert (counts <= np.minimum(batch.max_draft_tokens, token_ids.shape[1])).all()
            for row, count, request_id in zip(token_ids, counts, batch.request_ids, strict=True):
                assert ((row[:count] >= 0) & (row[:count] < VOCAB)).all()
                drafts[request_id] = row[:count].tolist()
            confidence = answer.confidence  # type: ignore[union-attr]
            assert ((confidence >= 0) & (confidence <= 1)).all()
            drafted += int(counts.sum())
        for row in range(ROWS):
            if random.random() < 0.02:  # other tokens under the same name
                stream.table[row, : stream.lengths[row]] = random.integers(0, VOCAB, stream.lengths[row])
        ended = [row for row in range(ROWS) if stream.lengths[row] > LONGEST - 8 or random.random() < 0.1]
        proposer.finish([str(stream.names[row]) for row in ended] + ["never seen"])
        for row in ended:
            drafts.pop(str(stream.names[row]), None)
            stream.names[row] = None
        if step % 100 == 99:
            held.append(proposer.memory_bytes())
    assert drafted > 500
    if name == "suffix":
        assert max(held) <= 1 << 20
    elif name == "ngram":  # 16 bytes for each token of live requests, whose number of tokens goes up and down
        assert max(held) <= 16 * ROWS * LONGEST
        proposer.finish([request_id for request_id in stream.names if request_id is not None])
        assert proposer.memory_bytes() == 0
    else:
        assert max(held[10:]) <= 1.05 * max(held[:10])


def test_whatever_has_no_annotations_is_a_compiled_kernel():
    # In files with kernels mypy accepts functions without annotations, since numba infers their types.
    root = Path(__file__).parents[1]
    overrides = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["mypy"]["overrides"]
    (modules,) = [each["module"] for each in overrides if each.get("disallow_untyped_defs") is False]
    num_kernels = 0
    for module in modules:
        path = root / module.replace(".", "/")
        for file in path.parent.glob("*.py") if path.name == "*" else [path.with_suffix(".py")]:
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.FunctionDef) and node.args.args and node.returns is None:
                    decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
                    is_typed = any(argument.annotation for argument in node.args.args)
                    assert is_typed or any(
                        mark in name for name in decorators for mark in ("kernel", "inlined", "jit")
                    ), (file, node.name)
                    num_kernels += not is_typed
    assert num_kernels > 50
