"""The Triton kernels compute what their slow forms compute, and the noise of vLLM's V2 sampler is vLLM's.

Without a CUDA device the kernels run under Triton's interpreter.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from vllm_specplug.samplers import reference
from vllm_specplug.samplers.base import REJECTED, RowLayout, accept_while_equal
from vllm_specplug.samplers.gumbel import murmur_gumbel_noise

HAS_CUDA = torch.cuda.is_available()
DEVICE = "cuda" if HAS_CUDA else "cpu"
NAME = "vllm_specplug.samplers.kernels"


@pytest.fixture(scope="module")
def kernels() -> Iterator[ModuleType]:
    """A copy of the module for these tests: kernels are interpreted or not from the moment they are defined.

    The environment variable is unset after these tests, since others start engines with this environment.
    """
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


class Batch:
    """Random rows of few different tokens, so that some drafts are right by chance; a share ``agreement`` is always."""

    def __init__(self, rng: np.random.Generator, num_drafts: list[int], agreement: float, dtype: torch.dtype) -> None:
        """``num_drafts``: draft tokens of every request, -1 for a request without rows."""
        num_rows = np.array(num_drafts) + 1
        self.width = int(max(num_rows.max(), 1) + rng.integers(0, 3))
        self.num_drafts = num_drafts
        bounds = np.concatenate([[0], np.cumsum(num_rows)])
        targets = rng.integers(0, 4, bounds[-1])
        inputs = rng.integers(0, 4, bounds[-1])
        follows = np.roll(targets, 1)
        kinds = rng.random(bounds[-1])
        inputs[kinds < agreement] = follows[kinds < agreement]
        inputs[kinds > 1 - 0.1 * (1 - agreement)] = -1
        self.targets = torch.from_numpy(targets).to(DEVICE)
        self.inputs = torch.from_numpy(inputs).to(DEVICE, dtype)
        self.bounds = torch.from_numpy(bounds).to(DEVICE, torch.int32)

    @property
    def arguments(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
        return self.targets, self.inputs, self.bounds, self.width


def assert_same(results: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    for one, other in zip(results, expected, strict=True):
        assert one.dtype == other.dtype
        assert one.tolist() == other.tolist()


def test_examples_of_the_docstrings(kernels: ModuleType) -> None:
    targets, inputs = torch.tensor([5, 7, 9], device=DEVICE), torch.tensor([3, 5, 8], device=DEVICE)
    token_ids, num_emitted = kernels.verify_drafts(targets, inputs, torch.tensor([0, 3], device=DEVICE), 3)
    assert token_ids.tolist() == [[5, 7, 9]]
    assert num_emitted.tolist() == [2]
    out = torch.empty(1, 5, dtype=torch.int32, device=DEVICE)
    total_len = torch.tensor([4], dtype=torch.int32, device=DEVICE)
    all_token_ids = torch.tensor([[1, 2, 5, 7]], dtype=torch.int32, device=DEVICE)
    kernels.pack_emitted(torch.tensor([0], device=DEVICE), num_emitted, total_len, all_token_ids, token_ids, out)
    assert out.tolist() == [[4, 2, 5, 7, 9]]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("agreement", [0.0, 0.5, 0.9, 1.0])
def test_verification_is_the_slow_form(
    kernels: ModuleType, rng: np.random.Generator, agreement: float, dtype: torch.dtype
) -> None:
    for _ in range(20):
        batch = Batch(rng, rng.integers(-1, 8, rng.integers(1, 6)).tolist(), agreement, dtype)
        results = kernels.verify_drafts(*batch.arguments)
        assert_same(results, reference.verify_drafts(*batch.arguments))
        if agreement == 1.0:
            assert results[1].tolist() == [num + 1 for num in batch.num_drafts]


@pytest.mark.parametrize(
    "num_drafts",
    [[0], [0, 0, 0], [-1], [-1, -1, 3, -1], [15], [128], [0, 20, 0, 1]],
    ids=["one empty draft", "empty drafts", "no rows", "most without rows", "one request", "longest", "ragged"],
)
def test_batches_of_any_shape_are_verified_as_by_the_slow_form(
    kernels: ModuleType, rng: np.random.Generator, num_drafts: list[int]
) -> None:
    for agreement in (0.0, 0.8, 1.0):
        batch = Batch(rng, num_drafts, agreement, torch.int32)
        assert_same(kernels.verify_drafts(*batch.arguments), reference.verify_drafts(*batch.arguments))


def test_all_rejected_and_placeholders(kernels: ModuleType) -> None:
    """A placeholder is rejected even if it equals the number in the target's row."""
    targets = torch.tensor([4, -1, 4, 4, 4], device=DEVICE)
    inputs = torch.tensor([4, 5, -1, -1, 4], device=DEVICE)
    bounds = torch.tensor([0, 3, 5], dtype=torch.int32, device=DEVICE)
    for width in (3, 4):
        token_ids, num_emitted = kernels.verify_drafts(targets, inputs, bounds, width)
        assert token_ids[:, :3].tolist() == [[4, -1, 4], [4, 4, REJECTED]]
        assert num_emitted.tolist() == [1, 2]
    assert kernels.verify_drafts(targets, inputs.clamp(max=-1), bounds, 3)[1].tolist() == [1, 1]
    assert kernels.verify_drafts(targets[1:2], inputs[1:2], bounds[:1], 3)[0].shape == (0, 3)


def test_slow_form_is_accept_while_equal(rng: np.random.Generator) -> None:
    for _ in range(200):
        num_drafts = rng.integers(0, 7, rng.integers(1, 6)).tolist()
        batch = Batch(rng, num_drafts, rng.random(), torch.int32)
        token_ids, num_emitted = reference.verify_drafts(*batch.arguments)
        is_draft = torch.ones(len(batch.inputs), dtype=torch.bool, device=DEVICE)
        is_draft[batch.bounds[:-1].long()] = False
        layout = RowLayout.of(num_drafts, DEVICE)
        # accept_while_equal knows no placeholders: a token that no target has stands in for them.
        drafts = batch.inputs[is_draft]
        expected = accept_while_equal(batch.targets, torch.where(drafts < 0, 99, drafts), layout)
        assert num_emitted.tolist() == expected.num_emitted.tolist()
        for row, emitted, same in zip(
            token_ids.tolist(), num_emitted.tolist(), expected.token_ids.tolist(), strict=True
        ):
            assert row[:emitted] == same[:emitted]


@pytest.mark.parametrize("with_verified", [True, False])
def test_packing_is_the_slow_form(kernels: ModuleType, rng: np.random.Generator, with_verified: bool) -> None:
    for _ in range(40):
        num_requests, width, max_len = int(rng.integers(1, 7)), int(rng.integers(1, 10)), int(rng.integers(10, 30))
        max_requests = num_requests + int(rng.integers(0, 4))
        # Rows are further apart than they are long, with other numbers in between.
        table = torch.from_numpy(rng.integers(0, 10**6, (max_requests, max_len + 5))).to(DEVICE, torch.int32)
        all_token_ids = table[:, :max_len]
        idx_mapping = torch.from_numpy(rng.permutation(max_requests)[:num_requests]).to(DEVICE)
        num_emitted = torch.from_numpy(rng.integers(0, width + 1, num_requests)).to(DEVICE, torch.int32)
        total_len = torch.from_numpy(rng.integers(10, max_len + 1, max_requests)).to(DEVICE, torch.int32)
        verified = None
        if with_verified:
            verified = torch.from_numpy(rng.integers(0, 10**6, (num_requests, width + 3))).to(DEVICE)
            verified = verified[:, : width + int(rng.integers(0, 3))]
        found, expected = (torch.full((num_requests, 4 + width), -7, device=DEVICE, dtype=torch.int32) for _ in "12")
        kernels.pack_emitted(idx_mapping, num_emitted, total_len, all_token_ids, verified, found[:, : 2 + width])
        reference.pack_emitted(idx_mapping, num_emitted, total_len, all_token_ids, verified, expected[:, : 2 + width])
        assert found.tolist() == expected.tolist()
        assert (found[:, 2 + width :] == -7).all()


def test_packing_what_was_verified(kernels: ModuleType, rng: np.random.Generator) -> None:
    """In a whole step, emitted tokens are in the request's own row, in the columns that verification chose."""
    num_drafts = [3, 0, 5, -1]
    batch = Batch(rng, num_drafts, 0.7, torch.int64)
    verified, num_emitted = kernels.verify_drafts(*batch.arguments)
    all_token_ids = torch.full((4, 40), 77, dtype=torch.int32, device=DEVICE)
    total_len = torch.tensor([20, 30, 9, 4], dtype=torch.int32, device=DEVICE) + num_emitted
    for request, (end, count) in enumerate(zip(total_len.tolist(), num_emitted.tolist(), strict=True)):
        all_token_ids[request, end - count : end] = verified[request, :count].int()
    out = torch.empty(4, 2 + batch.width, dtype=torch.int32, device=DEVICE)
    kernels.pack_emitted(torch.arange(4, device=DEVICE), num_emitted, total_len, all_token_ids, verified, out)
    assert out[:, 0].tolist() == total_len.tolist()
    assert out[:, 1].tolist() == num_emitted.tolist()
    assert out[:, 2:].tolist() == verified.tolist()


def test_what_a_kernel_would_misread_is_refused(kernels: ModuleType) -> None:
    targets, bounds = torch.arange(8, device=DEVICE), torch.tensor([0, 4], device=DEVICE)
    with pytest.raises(ValueError, match="target_token_ids must have 1 dimension"):
        kernels.verify_drafts(targets[::2], targets[:4], bounds, 4)
    with pytest.raises(ValueError, match=r"draft_token_ids must .* torch.int32 or torch.int64.*given.*float32"):
        kernels.verify_drafts(targets[:4], targets[:4].float(), bounds, 4)
    with pytest.raises(ValueError, match="3 rows of draft_token_ids for 4 target tokens"):
        kernels.verify_drafts(targets[:4], targets[:3], bounds, 4)
    ints = torch.ones(1, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="verified has 2 columns, out has room for 3"):
        kernels.pack_emitted(bounds[:1], ints, ints, ints.expand(1, 1), targets[None, :2], ints.new_empty(1, 5))


@pytest.mark.skipif(not HAS_CUDA, reason="needs 9 GiB of a CUDA device's memory")
def test_packing_from_a_table_of_more_than_two_billion_tokens(kernels: ModuleType) -> None:
    if torch.cuda.mem_get_info()[0] < 10 * 2**30:
        pytest.skip("needs 9 GiB of free memory on the device")
    all_token_ids = torch.zeros(70_000, 32_768, dtype=torch.int32, device=DEVICE)
    all_token_ids[69_999, 32_766:] = torch.tensor([5, 7], dtype=torch.int32)
    total_len = torch.full((70_000,), 32_768, dtype=torch.int32, device=DEVICE)
    out = torch.empty(1, 5, dtype=torch.int32, device=DEVICE)
    request, emitted = torch.tensor([69_999], device=DEVICE), torch.tensor([2], dtype=torch.int32, device=DEVICE)
    kernels.pack_emitted(request, emitted, total_len, all_token_ids, None, out)
    assert out.tolist() == [[32_768, 2, 5, 7, -1]]


def test_without_triton_the_import_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    with pytest.raises(ImportError, match=r"kernels needs the package triton.*accept_while_equal"):
        importlib.import_module(NAME)


# vLLM's sampler needs a process of its own: the interpreter must be chosen before vLLM and Triton are imported, and a
# CPU build of vLLM takes Triton for missing unless there is a backend named "cpu".
VLLM_SAMPLES = """
import sys
import numpy as np, torch, triton.backends
if not torch.cuda.is_available():
    driver = type("Driver", (), {"is_active": staticmethod(lambda: True)})
    triton.backends.backends["cpu"] = type("Backend", (), {"driver": driver, "compiler": None})()
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample
given = np.load(sys.argv[1])
device = "cuda" if torch.cuda.is_available() else "cpu"
logits, requests, seeds, positions = (
    torch.from_numpy(given[name]).to(device) for name in ("logits", "requests", "seeds", "positions"))
tokens = gumbel_sample(logits, requests, torch.ones(len(seeds), device=device), seeds, positions,
                       apply_temperature=False, is_drafting=False)
np.save(sys.argv[2], tokens.cpu().numpy())
"""


def test_murmur_noise_gives_the_tokens_of_vllms_v2_sampler(tmp_path: Path, rng: np.random.Generator) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    num_rows, vocab, num_requests = 60, 2100, 7  # three blocks of vLLM's kernel, the last one not full
    scale = rng.choice([0.5, 2.0, 6.0], (num_rows, 1))
    logits = (rng.normal(size=(num_rows, vocab)) * scale).astype(np.float32)
    logits[rng.random(logits.shape) < 0.05] = -np.inf
    requests = rng.integers(0, num_requests, num_rows)
    seeds = rng.integers(-(2**63), 2**63, num_requests)
    seeds[:2] = 0, 1234
    positions = rng.integers(0, 2**18, num_rows)
    positions[:2] = 0, 2**32 + 5
    np.savez(tmp_path / "given.npz", logits=logits, requests=requests, seeds=seeds, positions=positions)
    environment = os.environ if HAS_CUDA else {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", VLLM_SAMPLES, str(tmp_path / "given.npz"), str(tmp_path / "tokens.npy")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    tokens = np.load(tmp_path / "tokens.npy")

    noise = murmur_gumbel_noise(seeds[requests][:, None], positions[:, None], np.arange(vocab)[None, :])
    perturbed = logits + noise
    best_two = np.sort(perturbed, axis=1)[:, -2:]
    # float32 noise is off by up to 3e-6, and sums of size 20 by 1e-6: rows with a smaller lead may go either way.
    clear = best_two[:, 1] - best_two[:, 0] > 1e-4
    assert clear.sum() > num_rows - 5
    assert (tokens[clear] == perturbed.argmax(axis=1)[clear]).all()


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from vllm_specplug.samplers.kernels import NUM_HEADER_COLUMNS, _pack_kernel, _verify_kernel

constants = {"block_size": 16}
verify = dict(
    target_ptr="*i64", draft_ptr="*i32", cu_num_rows_ptr="*i32", token_ids_ptr="*i64", num_emitted_ptr="*i32",
    width="i32",
)
pack = dict(
    idx_mapping_ptr="*i64", num_emitted_ptr="*i32", total_len_ptr="*i32", all_token_ids_ptr="*i32",
    all_token_ids_stride="i64", verified_ptr="*i64", verified_stride="i64", out_ptr="*i32", out_stride="i64",
    width="i32",
)
for capability in (80, 90):
    for kernel, signature, more in (
        (_verify_kernel, verify, {}), (_pack_kernel, pack, {"num_header_columns": NUM_HEADER_COLUMNS})
    ):
        given = {**constants, **more}
        source = ASTSource(kernel, {**signature, **dict.fromkeys(given, "constexpr")}, given)
        compiled = compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 1})
        assert ".visible .entry" in compiled.asm["ptx"]
"""


def test_kernels_compile_for_gpus(tmp_path: Path) -> None:
    """The compiler is stricter about types than the interpreter; it needs no GPU, but a process that compiles."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    subprocess.run([sys.executable, "-c", COMPILE], env=environment, check=True)
