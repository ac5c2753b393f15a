"""The kernel copies KV-cache blocks as plain indexing does, in every layout that vLLM gives its cache.

Without a CUDA device the kernel runs under Triton's interpreter.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

HAS_CUDA = torch.cuda.is_available()
DEVICE = "cuda" if HAS_CUDA else "cpu"
NAME = "vllm_specplug.hooks.v2.block_copies"
NUM_BLOCKS = 12
pytestmark = pytest.mark.filterwarnings(  # torch warns when vLLM's V2 runner is imported first
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"
)

LAYOUTS = ("LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC")
# Number of layers, heads, tokens of a block, bytes of a token's keys and values.
ONE_GROUP = [(3, 2, 8, 24)]
LIKE_GROUPS = [(2, 2, 8, 24), (2, 2, 8, 24)]
# The second group's first page ends behind all pages of the first, which begin at the same address.
UNLIKE_GROUPS = [(1, 1, 4, 16), (1, 2, 4, 40)]
ODD_BYTES = [(2, 1, 3, 5), (1, 3, 1, 7)]
# For pages of different sizes vLLM accepts only a layout with blocks outermost and all bytes of a page together.
CASES = {
    **{f"{layout}, one group": (layout, ONE_GROUP) for layout in LAYOUTS},
    **{f"{layout}, like groups": (layout, LIKE_GROUPS) for layout in LAYOUTS},
    **{f"{layout}, unlike groups": (layout, UNLIKE_GROUPS) for layout in ("BLHNC", "BLNHC")},
    **{f"{layout}, odd bytes": (layout, ODD_BYTES) for layout in ("BLHNC", "BLNHC")},
}


@pytest.fixture(scope="module")
def copies() -> Iterator[ModuleType]:
    """A copy of the module for these tests: kernels are interpreted or not from the moment they are defined."""
    pytest.importorskip("triton", reason="Triton is not installed")
    with pytest.MonkeyPatch.context() as patch:
        if not HAS_CUDA:
            patch.setenv("TRITON_INTERPRET", "1")
        spec = importlib.util.find_spec(NAME)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture
def rng() -> np.random.Generator:
    """Fresh inputs at every run; pytest shows the seed if a test fails."""
    seed = np.random.SeedSequence().entropy
    print(f"np.random.default_rng({seed})")
    return np.random.default_rng(seed)


def allocate(layout_name: str, groups: list[tuple[int, int, int, int]]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Groups of layers over one buffer, placed as ``vllm.v1.core.kv_cache_utils`` places them."""
    from vllm.v1.kv_cache_interface import (
        FullAttentionSpec,
        KVCacheTensor,
        compute_layout_strides,
        create_kv_cache_views,
    )
    from vllm.v1.kv_cache_layout import KVCacheLayout

    layout = KVCacheLayout[layout_name]
    of_a_block = max(layers * heads * tokens * size for layers, heads, tokens, size in groups)
    size = of_a_block * NUM_BLOCKS
    buffer = torch.zeros(size + 64, dtype=torch.int8, device=DEVICE)  # 64 bytes that belong to no block
    caches = []
    for number, (layers, heads, tokens, width) in enumerate(groups):
        # vLLM stores the keys and values of a head side by side.
        spec: Any = FullAttentionSpec(block_size=tokens, num_kv_heads=heads, head_size=1, dtype=torch.int8)
        spec = SpecOf(spec, width)
        fixed = of_a_block if layout.is_block_outermost and len(groups) > 1 else None
        layer_stride, block_stride, *_ = compute_layout_strides(
            spec, NUM_BLOCKS, layers, layout, fixed_strides=(None, fixed, None, None, None)
        )
        tensor = KVCacheTensor(
            size=size,
            layers=[f"{number}.{layer}" for layer in range(layers)],
            layer_stride=layer_stride,
            block_stride=block_stride,
        )
        caches += create_kv_cache_views(buffer[:size], spec, NUM_BLOCKS, layout, tensor)
    return buffer, caches


class SpecOf:
    """vLLM's description of a layer whose tokens take ``width`` bytes a head."""

    def __init__(self, spec: Any, width: int) -> None:
        self._spec, self.state_content_size_bytes = spec, width

    def __getattr__(self, name: str) -> Any:
        return getattr(self._spec, name)


def filled(buffer: torch.Tensor, rng: np.random.Generator) -> None:
    buffer.copy_(torch.from_numpy(rng.integers(-128, 128, len(buffer)).astype(np.int8)))


@pytest.mark.parametrize("case", CASES)
def test_every_byte_of_a_block_and_no_other(copies: ModuleType, rng: np.random.Generator, case: str) -> None:
    layout, groups = CASES[case]
    buffer, caches = allocate(layout, groups)
    block_copies = copies.BlockCopies(caches, NUM_BLOCKS)
    for _ in range(5):
        filled(buffer, rng)
        ids = rng.permutation(NUM_BLOCKS)
        num = int(rng.integers(1, 5))
        sources, targets = ids[:num].tolist(), ids[num : 2 * num].tolist()
        stays = ids[2 * num :].tolist()
        before = [cache.clone() for cache in caches]
        expected = buffer.clone()
        for cache, old in zip(caches, before, strict=True):
            # The same view of another buffer.
            view = torch.as_strided(expected, cache.shape, cache.stride(), cache.storage_offset())
            view[targets] = old[sources]
        block_copies.copy(
            torch.tensor([*stays, *sources], device=DEVICE), torch.tensor([*stays, *targets], device=DEVICE)
        )
        for cache, old in zip(caches, before, strict=True):
            assert torch.equal(cache[targets], old[sources])
        assert torch.equal(buffer, expected)


@pytest.mark.parametrize("layout", ["LBNHC", "BLNHC"])
def test_agrees_with_vllms_copy(copies: ModuleType, rng: np.random.Generator, layout: str) -> None:
    from vllm.v1.worker.utils import copy_kv_cache_blocks_inplace

    buffer, caches = allocate(layout, LIKE_GROUPS)
    block_copies = copies.BlockCopies(caches, NUM_BLOCKS)
    filled(buffer, rng)
    begun = buffer.clone()
    pairs = [(1, 7), (1, 8), (5, 3)]
    copy_kv_cache_blocks_inplace(caches, NUM_BLOCKS, pairs)
    theirs = buffer.clone()
    assert not torch.equal(theirs, begun)
    buffer.copy_(begun)
    sources, targets = torch.tensor(pairs, device=DEVICE).T.contiguous()
    block_copies.copy(sources, targets)
    assert torch.equal(buffer, theirs)


def test_blocks_of_several_kernel_blocks(copies: ModuleType, rng: np.random.Generator) -> None:
    """Attention kernels may count smaller blocks than the scheduler: four of its blocks are one here."""
    cache = torch.from_numpy(rng.normal(size=(4 * NUM_BLOCKS, 2, 4, 6))).to(DEVICE, torch.float32)
    before = cache.clone()
    copies.BlockCopies([cache], NUM_BLOCKS).copy(torch.tensor([2], device=DEVICE), torch.tensor([9], device=DEVICE))
    assert torch.equal(cache[36:40], before[8:12])
    before[36:40] = before[8:12]
    assert torch.equal(cache, before)


@pytest.mark.parametrize("num_words", [1, 1023, 1025, 8192, 8193, 20_000])
def test_pages_longer_than_a_program_copies(copies: ModuleType, rng: np.random.Generator, num_words: int) -> None:
    cache = torch.from_numpy(rng.integers(0, 2**40, (3, num_words))).to(DEVICE)
    before = cache.clone()
    copies.BlockCopies([cache], 3).copy(torch.tensor([0, 1], device=DEVICE), torch.tensor([2, 1], device=DEVICE))
    assert torch.equal(cache[2], before[0])
    assert torch.equal(cache[:2], before[:2])


def test_ids_that_the_kernel_would_misread_are_refused(copies: ModuleType) -> None:
    block_copies = copies.BlockCopies(allocate("LBNHC", ONE_GROUP)[1], NUM_BLOCKS)
    ids = torch.arange(4, device=DEVICE)
    for sources, targets in ((ids[::2], ids[:2]), (ids[:2], ids[::2]), (ids, ids[:3]), (ids.int(), ids.int())):
        with pytest.raises(ValueError, match=r"two contiguous torch\.int64 tensors of one length"):
            block_copies.copy(sources, targets)


def test_layers_of_one_block_are_copied_by_few_programs(copies: ModuleType) -> None:
    """Shared layers and groups that share memory are copied once."""
    for layout, groups, expected in (
        ("LBNHC", ONE_GROUP, 3),
        ("LHBNC", ONE_GROUP, 6),
        ("BLNHC", ONE_GROUP, 1),
        ("BLNHC", UNLIKE_GROUPS, 1),
        ("LBNHC", LIKE_GROUPS, 2),
    ):
        caches = allocate(layout, groups)[1]
        assert len(copies.BlockCopies([*caches, caches[0]], NUM_BLOCKS)._runs) == expected, layout


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from vllm_specplug.hooks.v2.block_copies import _BLOCK_SIZE, _WORDS, _copy_kernel

pointers = dict(sources_ptr="*i64", targets_ptr="*i64", runs_ptr="*i64")
for capability in (80, 90):
    for word in _WORDS.values():
        given = {"word": word, "block_size": _BLOCK_SIZE}
        source = ASTSource(_copy_kernel, {**pointers, **dict.fromkeys(given, "constexpr")}, given)
        compiled = compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})
        assert ".visible .entry" in compiled.asm["ptx"]
"""


def test_the_kernel_compiles_for_gpus(tmp_path: Path) -> None:
    """The compiler is stricter about types than the interpreter; it needs no GPU, but a process that compiles."""
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    subprocess.run([sys.executable, "-c", COMPILE], env=environment, check=True)


def graphs(sizes: list[int], query_len: int, max_num_reqs: int = 64) -> Any:
    """vLLM's table of CUDA graphs to capture, none captured: full graphs for decoding, piecewise ones for all else."""
    from vllm.config.compilation import CUDAGraphMode
    from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

    manager = CudaGraphManager.__new__(CudaGraphManager)
    manager.vllm_config = SimpleNamespace(
        speculative_config=None, cache_config=SimpleNamespace(use_kda_recoverssm=False)
    )
    manager.compilation_config = SimpleNamespace(cudagraph_capture_sizes=sizes, max_cudagraph_capture_size=max(sizes))
    manager.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    manager.max_num_reqs, manager.decode_query_len, manager.varlen_decode = max_num_reqs, query_len, False
    manager.lora_capture_cases, manager._lora_dispatch_map, manager._max_lora_case = [0], {}, 0
    manager.ubatch_runner, manager._candidates, manager._capture_descs = None, {}, {}
    manager._init_candidates()
    manager._graphs_captured = True
    return manager


@pytest.mark.parametrize(
    ("num_requests", "room", "expected"),
    [(2, 5, 5), (2, 40, 8), (9, 40, 1), (10, 40, 0), (12, 40, 40), (2, 0, 0)],
    ids=["fits", "cut", "one", "none is left", "no graph anyway", "no room"],
)
def test_forks_do_not_cost_a_batch_its_graph(num_requests: int, room: int, expected: int) -> None:
    """Rows of 5 tokens, batches of up to 52 tokens captured: ten rows have a full graph (50 tokens), eleven none."""
    from vllm_specplug.hooks.v2.forks import ForkedRows

    forks: Any = ForkedRows.__new__(ForkedRows)
    forks._runner = SimpleNamespace(cudagraph_manager=graphs([1, 2, 4, 8, 16, 24, 32, 40, 48, 50, 52], 5))
    assert forks._within_graph([5] * num_requests, 5, room) == expected


def test_rows_of_unlike_length_stay_within_what_is_captured_in_pieces() -> None:
    from vllm_specplug.hooks.v2.forks import ForkedRows

    forks: Any = ForkedRows.__new__(ForkedRows)
    forks._runner = SimpleNamespace(cudagraph_manager=graphs([8, 16, 32], 5))
    assert forks._within_graph([5, 2, 3], 5, 20) == 4  # 10 + 4 * 5 of 32 tokens


def test_every_tensor_of_a_batch_is_cut_when_the_forks_leave() -> None:
    """The test fails if a later vLLM adds a field, since a tensor of all rows would keep the forks' rows."""
    import dataclasses
    import inspect

    from vllm.v1.worker.gpu.input_batch import InputBatch

    from vllm_specplug.hooks.v2 import forks as v2_chains

    cut = inspect.getsource(v2_chains._take_forks_out)
    without_rows = {"has_prefill", "decode_graph_eligible", "has_structured_output_reqs", "max_query_len"}
    # Context parallelism and fast prefill keep one chain: see why_single.
    excluded = {"dcp_local_seq_lens", "dcp_local_seq_lens_cpu_upper_bound", "fast_prefill"}
    for each in dataclasses.fields(InputBatch):
        assert f'"{each.name}"' in cut or f".{each.name} =" in cut or each.name in without_rows | excluded, each.name
