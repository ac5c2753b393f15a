"""The rest proposer on a device gives the drafts of the one on the host, bit for bit.

Without a GPU the kernel runs in Triton's interpreter, which takes about 50 ms for a request and segment.
"""

from __future__ import annotations

import importlib
import itertools
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_specplug.measure import corpus
from vllm_specplug.proposers import DraftBatch, ProposerContext
from vllm_specplug.proposers.rest.confidence import vote_confidence
from vllm_specplug.proposers.rest.proposer import RestProposer
from vllm_specplug.stores.format import HEADER_BYTES
from vllm_specplug.stores.writer import DatastoreWriter
from vllm_specplug.tiny_models import target_path

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
with pytest.MonkeyPatch.context() as patch:
    # Triton chooses between compiler and interpreter when its modules and the kernel's are imported. So all of them are
    # imported here, and the variable is unset again: some tests start engines with this process's environment.
    if DEVICE == "cpu":
        patch.setenv("TRITON_INTERPRET", "1")
        pytest.importorskip("triton", reason="Triton is not installed")
        importlib.import_module("triton.experimental.gluon")  # else Triton imports it later
    from vllm_specplug.proposers.rest import device
    from vllm_specplug.proposers.rest.device import DeviceRest, confidence_table

fresh_names = itertools.count()


@pytest.fixture(scope="module", autouse=True)
def kernels_run_here() -> None:
    compiled = isinstance(device.tl.sum, device.triton.JITFunction)
    assert compiled == (DEVICE == "cuda"), "Triton was imported before this module chose compiler or interpreter"


def write_store(
    folder: Path, documents: Sequence[Sequence[int]], vocab_size: int = 4, segment_tokens: int | None = None
) -> str:
    path = folder / f"{next(fresh_names)}.specstore"
    with DatastoreWriter(path, vocab_size=vocab_size, fingerprint="f", segment_tokens=segment_tokens) as writer:
        for document in documents:
            writer.add(document)
        writer.finish()
    return str(path)


def context_for(path: str, num_speculative_tokens: int = 6, **options: Any) -> ProposerContext:
    return ProposerContext(2**20, num_speculative_tokens, datastores={"store": path}, options=options)


def check_same(
    context: ProposerContext, contexts: Sequence[Sequence[int]], wanted: Sequence[int] | None = None, seed: int = 0
) -> list[list[int]]:
    """Draft for ``contexts`` on the host and on the device, compare every bit, and return the drafts.

    The table is like an engine's: requests are in any of its rows, other tokens everywhere else, and rows are further
    apart than they are wide.
    """
    max_draft = context.num_speculative_tokens
    wanted = [max_draft] * len(contexts) if wanted is None else wanted
    rng = np.random.default_rng(seed)
    width = max(map(len, contexts)) + 3
    apart = rng.integers(-2, 6, (len(contexts) + 2, width + 5), dtype=np.int32)
    table = apart[:, :width]
    total_len = rng.integers(0, width, len(table))
    rows = rng.permutation(len(table))[: len(contexts)]
    for row, tokens in zip(rows, contexts, strict=True):
        table[row, : len(tokens)] = tokens
        total_len[row] = len(tokens)

    names = [str(row) for row in rows]
    lengths = total_len[rows]
    on_host = RestProposer(context).propose(DraftBatch(names, table, rows, lengths, lengths, np.array(wanted)))
    token_ids, num_tokens, confidence = DeviceRest(context, DEVICE).propose(
        torch.from_numpy(apart).to(DEVICE)[:, :width],
        torch.from_numpy(total_len).to(DEVICE, torch.int32),
        torch.from_numpy(rows).to(DEVICE),
        torch.tensor(wanted, dtype=torch.int32, device=DEVICE),
    )

    assert (token_ids.dtype, num_tokens.dtype, confidence.dtype) == (torch.int64, torch.int32, torch.float32)
    assert token_ids.shape == confidence.shape == (len(contexts), max_draft)
    assert num_tokens.tolist() == on_host.num_tokens.tolist()
    narrow = on_host.token_ids.shape[1]  # the longest draft asked for; on the device it is always max_draft
    assert token_ids[:, :narrow].tolist() == on_host.token_ids.tolist()
    assert confidence[:, :narrow].cpu().numpy().tobytes() == on_host.confidence.tobytes()
    assert not token_ids[:, narrow:].any()
    assert not confidence[:, narrow:].any()
    return [row[:count] for row, count in zip(token_ids.tolist(), num_tokens.tolist(), strict=True)]


token_lists = st.lists(st.integers(0, 3), max_size=30)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    documents=st.lists(token_lists, min_size=1, max_size=6).filter(any),
    contexts=st.lists(st.lists(st.integers(-1, 5), max_size=12), min_size=1, max_size=3),
    max_match=st.integers(1, 8),
    min_match=st.integers(1, 3),
    max_votes=st.integers(1, 70),
    max_draft=st.integers(1, 6),
    min_confidence=st.sampled_from([0.0, 0.05, 0.3]),
    segment_tokens=st.one_of(st.none(), st.integers(40, 80)),
    seed=st.integers(0, 99),
)
def test_any_store_and_context(  # noqa: PLR0913 - what hypothesis varies
    tmp_path, documents, contexts, max_match, min_match, max_votes, max_draft, min_confidence, segment_tokens, seed
):
    context = context_for(
        write_store(tmp_path, documents, segment_tokens=segment_tokens), max_draft,
        max_match=max(max_match, min_match), min_match=min_match, max_votes=max_votes, min_confidence=min_confidence,
    )  # fmt: skip
    wanted = np.random.default_rng(seed).integers(0, max_draft + 1, len(contexts)).tolist()
    check_same(context, contexts, wanted, seed)


@pytest.mark.parametrize(
    ("segment_tokens", "options"),
    [
        (None, {}),
        (None, {"max_match": 5, "min_match": 2, "max_votes": 7, "min_confidence": 0.0}),
        (None, {"max_match": 1, "max_votes": 128, "min_confidence": 0.0}),
        (700, {"max_votes": 33, "min_confidence": 0.0}),
    ],
)
def test_many_occurrences_and_ties_give_the_drafts_of_the_host(tmp_path, segment_tokens, options):
    # Three token ids, so that there are many votes, and often ties; contexts have from no token to twice those of the
    # longest match, and most of them are in the store.
    rng = np.random.default_rng(1)
    documents = [rng.integers(0, 3, rng.integers(1, 400)) for _ in range(10)]
    context = context_for(write_store(tmp_path, documents, segment_tokens=segment_tokens), **options)
    contexts = [documents[index % 10][: length * 6] for index, length in enumerate(range(11))]
    drafts = check_same(context, [*contexts, [2], rng.integers(0, 3, 64)])
    assert sum(map(len, drafts)) > 20


@pytest.mark.parametrize("offset", [2**15, 2**16 - 9, 2**16, 2**19], ids=["signed", "16 bits", "17 bits", "20 bits"])
def test_large_token_ids_give_the_drafts_of_the_host(tmp_path, offset):
    rng = np.random.default_rng(2)
    documents = [offset + rng.integers(0, 4, 60) for _ in range(4)]
    context = context_for(write_store(tmp_path, documents, vocab_size=offset + 4), min_confidence=0.0)
    contexts = [documents[0][:20], documents[1][:5], [7, 8], documents[2][:3] - 2**16, [*documents[3][:4], offset + 4]]
    drafts = check_same(context, contexts)
    assert list(map(bool, drafts)) == [True, True, False, False, False]


def test_real_text_gives_the_drafts_of_the_host(tmp_path):
    tokenizer = tokenizers.Tokenizer.from_file(str(target_path() / "tokenizer.json"))

    def tokens_of(path: Path) -> list[int]:
        return tokenizer.encode(corpus.read_text(path), add_special_tokens=False).ids  # type: ignore[no-any-return]

    sources = [path for path in corpus.standard_library_sources() if path.parent.name in ("json", "email")]
    documents = [tokens_of(path) for path in sources]
    path = write_store(tmp_path, documents, tokenizer.get_vocab_size(), sum(map(len, documents)) // 2)
    rng = np.random.default_rng(3)
    contexts = []
    for tokens in map(tokens_of, corpus.held_out_sources()[:12]):
        start, length = rng.integers(0, len(tokens) - 40), rng.integers(1, 40)
        contexts.append(tokens[start : start + length])
    drafts = check_same(context_for(path, 8), contexts)
    assert sum(map(len, drafts)) > 10


def test_of_equally_many_votes_the_first_to_have_them_win(tmp_path):
    # Occurrences of "0 0" are sorted by the tokens before them, and vote 1, 2, 2, 1, 0: 2 is the first to have two.
    documents = [[0, 0, 0, 1], [1, 0, 0, 2], [2, 0, 0, 2], [3, 0, 0, 1]]
    context = context_for(write_store(tmp_path, documents), min_confidence=0.0)
    assert check_same(context, [[0, 0]]) == [[2]]


def test_a_context_starts_behind_ids_that_no_store_holds(tmp_path):
    # 4 is the store's separator: if it were looked up, "4 0" would match at the start of documents.
    path = write_store(tmp_path, [[0, 1], [2, 0, 3], [2, 0, 3]])
    contexts = [[4, 0], [-1, 0], [5, 2, 0], [2, 0, 4]]
    assert check_same(context_for(path, min_confidence=0.0), contexts) == [[3], [3], [3], []]


def test_drafts_do_not_cross_documents(tmp_path):
    path = write_store(tmp_path, [[0, 1], [2, 3], [0, 2]])
    assert check_same(context_for(path, min_confidence=0.0), [[2], [1], [1, 2], [3], []]) == [[3], [], [3], [], []]


def test_a_longer_match_in_a_later_segment_silences_the_earlier(tmp_path):
    filler = [3] * 50
    documents = [[1, 2, 0], filler, [0, 1, 2, 1], filler, [1, 2, 0], filler, [0, 1, 2, 1], filler, [2, 2, 2, 0]]
    context = context_for(write_store(tmp_path, documents, segment_tokens=50), min_confidence=0.0)
    assert len(DeviceRest(context, DEVICE).store.segments) > 5
    assert check_same(context, [[0, 1, 2], [2, 1, 2], [3, 2]])[0] == [1]


def test_store_without_any_match_to_offer(tmp_path):
    # In documents of one token no position has a token before it and one behind it.
    assert check_same(context_for(write_store(tmp_path, [[0], [1]])), [[0], [0, 1]]) == [[], []]


def test_drafts_keep_the_limit_of_their_request(tmp_path):
    context = context_for(write_store(tmp_path, [[0, 1, 2, 3] * 8]), 5, min_confidence=0.0)
    drafts = check_same(context, [[0, 1]] * 4, [0, 1, 3, 5])
    assert list(map(len, drafts)) == [0, 1, 3, 5]
    table = torch.tensor([[0, 1]], dtype=torch.int32, device=DEVICE)
    lengths = torch.tensor([2], dtype=torch.int32, device=DEVICE)
    rows = torch.zeros(2, dtype=torch.int64, device=DEVICE)  # two drafts for one row
    wanted = torch.tensor([99, -1], dtype=torch.int32, device=DEVICE)
    _, num_tokens, _ = DeviceRest(context, DEVICE).propose(table, lengths, rows, wanted)
    assert num_tokens.tolist() == [5, 0]


def test_drafts_of_one_step_outlive_the_next(tmp_path):
    proposer = DeviceRest(context_for(write_store(tmp_path, [[0, 1, 2, 3] * 8]), 2), DEVICE)
    table = torch.tensor([[0, 1], [1, 2]], dtype=torch.int32, device=DEVICE)
    lengths, wanted = torch.full((2, 2), 2, dtype=torch.int32, device=DEVICE)
    rows = torch.arange(2, device=DEVICE)
    first, _, _ = proposer.propose(table, lengths, rows[:1], wanted[:1])
    proposer.propose(table, lengths, rows[1:], wanted[1:])
    assert first.tolist() == [[2, 3]]
    nothing, num_tokens, _ = proposer.propose(table, lengths, rows[:0], wanted[:0])
    assert nothing.shape == (0, 2)
    assert len(num_tokens) == 0


def test_num_bytes_counts_all_arrays_on_the_device(tmp_path):
    narrow = DeviceRest(context_for(write_store(tmp_path, [[0, 1, 2]]), max_match=2, max_votes=3), DEVICE)
    wide = DeviceRest(context_for(write_store(tmp_path, [[0, 1, 2]], 2**16), max_match=2, max_votes=3), DEVICE)
    # 5 tokens, 2 positions, 1 segment, confidences for matches of 1 to 2 + 5 tokens, least confidence.
    assert narrow.num_bytes == 5 * 2 + 2 * 4 + 4 * 8 + 7 * 3 * 3 * 8 + 8
    assert wide.num_bytes == narrow.num_bytes + 5 * 2
    assert "3 tokens of 1 documents" in narrow.describe()


def test_pieces_of_an_upload_are_put_together(monkeypatch):
    monkeypatch.setattr(device, "UPLOAD_BYTES", 12)
    for array in (np.arange(100, dtype=np.uint32), np.arange(6, dtype=np.uint16), np.zeros(0, dtype=np.uint32)):
        assert np.array_equal(device._upload(array, torch.device(DEVICE)).cpu().numpy(), array)


def test_confidence_table_holds_what_the_host_computes():
    table = confidence_table(9, 5)
    for length, num_votes, num_agreeing in itertools.product(range(1, 10), range(1, 6), range(1, 6)):
        expected = vote_confidence(length, num_agreeing, num_votes) if num_agreeing <= num_votes else 0.0
        assert table[length - 1, num_votes - 1, num_agreeing - 1] == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_mach": 3}, "no option 'max_mach'; it knows .*max_match"),
        ({"max_votes": 129}, "on a device: max_votes may be up to 128, not 129"),
        ({"max_match": 1000}, "on a device: max_match may be up to 256, not 1000"),
        ({"sharpness": 1.0}, "on a device drafts the token with the most votes.*leave sharpness out, or on_device"),
    ],
)
def test_bad_options_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        DeviceRest(context_for(write_store(tmp_path, [[0, 1]]), **options), DEVICE)


def test_several_stores_are_refused(tmp_path):
    paths = {name: write_store(tmp_path, [[0, 1]]) for name in ("code", "tickets")}
    with pytest.raises(ValueError, match="on a device drafts from one store, and there are 2: code, tickets; give one"):
        DeviceRest(ProposerContext(2**20, 8, datastores=paths), DEVICE)


@pytest.mark.parametrize("vocab_size", [4, 70_000])
def test_a_damaged_store_drafts_inside_its_vocabulary(tmp_path, vocab_size):
    """Entries that point behind the store, ids that are none, and no separators: reads stay inside, drafts too."""
    rng = np.random.default_rng(0)
    path = Path(write_store(tmp_path, [[0, 1, 2, 3] * 20] * 3, vocab_size, 100))
    path.chmod(0o644)
    size = path.stat().st_size - HEADER_BYTES
    random = rng.integers(0, 4, size // 4, dtype=np.uint32).tobytes()
    for data in (b"\xff" * size, random, rng.integers(0, 256, size, dtype=np.uint8).tobytes()):
        with path.open("r+b") as file:
            file.seek(HEADER_BYTES)
            file.write(data)
        proposer = DeviceRest(context_for(str(path), min_confidence=0.0), DEVICE)
        table = torch.tensor([[1, 2, 3, 0], [0, 0, 0, 0]], dtype=torch.int32, device=DEVICE)
        four = torch.tensor([4, 4], dtype=torch.int32, device=DEVICE)
        token_ids, num_tokens, _ = proposer.propose(table, four, torch.arange(2, device=DEVICE), four)
        assert 0 <= int(num_tokens.min()) <= int(num_tokens.max()) <= 4
        assert 0 <= int(token_ids.min()) <= int(token_ids.max()) < vocab_size


def test_bad_strides_are_refused(tmp_path):
    proposer = DeviceRest(context_for(write_store(tmp_path, [[0, 1]])), DEVICE)
    table = torch.zeros((2, 4), dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="wanted has stride 2"):
        proposer.propose(table, table[0], torch.arange(2, device=DEVICE), table[0, ::2])


COMPILE = """
import sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from vllm_specplug.proposers import ProposerContext
from vllm_specplug.proposers.rest.device import NUM_WARPS, DeviceRest, _draft_kernel

pointers = dict(
    tokens="*u16", positions="*u32", segments="*i64", confidences="*fp64", min_confidence="*fp64", token_ids="*i32",
    total_len="*i32", rows="*i64", wanted="*i32", drafts="*i64", num_tokens="*i32", out_confidence="*fp32",
)
for vocabulary, path in zip(("*u16", "*u32"), sys.argv[1:], strict=True):
    proposer = DeviceRest(ProposerContext(2**20, 8, datastores={"store": path}), "cpu")
    signature = {**pointers, "tokens": vocabulary, "row_stride": "i64", "num_slots": "i64"}
    signature |= dict.fromkeys(proposer.constants, "constexpr")
    source = ASTSource(_draft_kernel, signature, proposer.constants)
    options = {"num_warps": NUM_WARPS, "enable_fp_fusion": False}
    for capability in (80, 90):
        compiled = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert ".f64" in compiled.asm["ptx"]
"""


def test_compiles_for_a_gpu(tmp_path):
    # The compiler is stricter about types than the interpreter; it needs no GPU, but a process that compiles.
    documents = [[0, 1, 2, 3] * 5] * 5
    paths = [write_store(tmp_path, documents, 4, 60), write_store(tmp_path, documents, 2**16)]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    environment.pop("TRITON_INTERPRET", None)
    subprocess.run([sys.executable, "-c", COMPILE, *paths], env=environment, check=True)
