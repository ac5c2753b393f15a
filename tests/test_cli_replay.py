"""``specplug replay``: counts worked out by hand and by a plain replay, what proposers are shown, and errors."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner, Result

from vllm_specplug.errors import SpecplugError
from vllm_specplug.measure.replay import choosers
from vllm_specplug.measure.replay import run as replay
from vllm_specplug.proposers.base import DraftBatch, Drafts, Proposer, ProposerContext, Verified
from vllm_specplug.proposers.ensemble.ensemble import Ensemble
from vllm_specplug.settings.model import ProposerSettings, parse_settings
from vllm_specplug.stores.format import tokenizer_fingerprint
from vllm_specplug.stores.writer import DatastoreWriter

# The package has a function of the same name, which an import statement would take.
cli = importlib.import_module("vllm_specplug.cli.replay")
WORDS = [f"w{index}" for index in range(40)]
NGRAM = '{"name": "ngram", "min_confidence": 0}'


@pytest.fixture(autouse=True, scope="module")
def _wide_terminal():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "200")
        patch.setenv("TERM", "dumb")
        yield


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    """A folder with a tokenizer of which every word is a token."""
    folder = tmp_path_factory.mktemp("tokenizer")
    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return str(folder)


@pytest.fixture
def rng() -> np.random.Generator:
    """Fresh inputs at every run; pytest shows the seed if a test fails."""
    seed = np.random.SeedSequence().entropy
    print(f"np.random.default_rng({seed})")
    return np.random.default_rng(seed)


def text_of(ids: Sequence[int]) -> str:
    return " ".join(WORDS[index] for index in ids)


def write(path: Path, ids: Sequence[int]) -> Path:
    path.write_text(text_of(ids))
    return path


def make_store(path: Path, tokenizer: str, documents: Sequence[Sequence[int]]) -> Path:
    loaded = cli.load_tokenizer(tokenizer)
    with DatastoreWriter(path, vocab_size=len(WORDS), fingerprint=tokenizer_fingerprint(loaded)) as writer:
        for document in documents:
            writer.add(document)
        writer.finish()
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(each) for each in arguments])


def replayed(tmp_path: Path, tokenizer: str, *arguments: object) -> dict[str, Any]:
    out = tmp_path / "out" / "result.json"
    result = run("--tokenizer", tokenizer, "--json", out, *arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return json.loads(out.read_text())


def counts_of(result: Mapping[str, Any], name: str) -> tuple[int, int, int, int]:
    each = result["proposers"][name]
    return each["request_steps"], each["emitted_tokens"], each["drafted_tokens"], each["accepted_tokens"]


def test_a_text_that_repeats_itself(tmp_path, tokenizer):
    # 8 tokens of prompt and 10 of output: twice four accepted draft tokens and one more.
    path = write(tmp_path / "a.txt", [1, 2, 3, 4] * 4 + [1, 2])
    result = replayed(tmp_path, tokenizer, "--proposers", f"[{NGRAM}]", "-k", 4, "--prompt-tokens", 8, path)
    assert counts_of(result, "ngram") == counts_of(result, "oracle") == (2, 10, 8, 8)
    assert result["proposers"]["ngram"]["emitted_per_step"] == 5.0
    assert result["proposers"]["ngram"]["acceptance"] == 1.0
    assert set(result["proposers"]) == {"ngram", "oracle"}
    assert result["inputs"]["requests"] == 1
    assert result["inputs"]["output_tokens"] == 10


def test_a_text_that_repeats_itself_in_part(tmp_path, tokenizer):
    # a b c a b | d a b c x, drafts of up to 2. "a b" drafts "c a", which is wrong at once: d is emitted. d is new and
    # has no draft: a is emitted. "a" drafts "b d": b is accepted, and c emitted. The last token gets no draft.
    path = write(tmp_path / "a.txt", [1, 2, 3, 1, 2, 4, 1, 2, 3, 5])
    result = replayed(tmp_path, tokenizer, "--proposers", f"[{NGRAM}]", "-k", 2, "--prompt-tokens", 5, path)
    assert counts_of(result, "ngram") == (4, 5, 4, 1)
    assert result["proposers"]["ngram"]["emitted_per_step"] == 1.25
    assert result["proposers"]["ngram"]["acceptance"] == 0.25


def test_a_text_that_never_repeats_itself(tmp_path, tokenizer):
    path = write(tmp_path / "a.txt", range(1, 30))
    result = replayed(tmp_path, tokenizer, "--proposers", "ngram", "--prompt-tokens", 4, path)
    assert counts_of(result, "ngram") == (25, 25, 0, 0)
    assert result["proposers"]["ngram"]["emitted_per_step"] == 1.0
    assert result["proposers"]["ngram"]["acceptance"] is None
    assert 12 < result["proposers"]["ngram"]["bytes_per_token"] <= 16  # of its index, which lacks the last token


def test_output_of_a_request_is_not_known_from_the_prompt_of_the_next(tmp_path, tokenizer):
    # The text has no repetition, so that only a later request of the same document could help to draft.
    path = write(tmp_path / "a.txt", range(1, 40))
    result = replayed(
        tmp_path, tokenizer, "--proposers", "suffix", "--prompt-tokens", 6, "--max-tokens", 12, "--batch", 8, path
    )
    assert result["inputs"]["requests"] == 6
    assert counts_of(result, "suffix") == (33, 33, 0, 0)


def test_warm_texts_are_history(tmp_path, tokenizer):
    path = write(tmp_path / "a.txt", range(1, 30))
    same = write(tmp_path / "b.txt", range(1, 30))
    arguments = ("--proposers", '[{"name": "suffix", "min_confidence": 0}]', "--prompt-tokens", 4, "-k", 4, path)
    cold = replayed(tmp_path, tokenizer, *arguments)
    warm = replayed(tmp_path, tokenizer, "--warm", same, *arguments)
    assert cold["proposers"]["suffix"]["emitted_per_step"] == 1.0
    assert counts_of(warm, "suffix") == (5, 25, 20, 20)
    assert warm["warm"] == {
        "files": 1, "skipped_files": 0, "records_without_text": 0, "wrong_records": 0, "documents": 1, "tokens": 29,
    }  # fmt: skip


def test_requests_cover_a_document():
    pieces = replay.requests_of(np.arange(10, dtype=np.int32), 2, 6)
    assert [piece.tolist() for piece in pieces] == [[0, 1, 2, 3, 4, 5], [4, 5, 6, 7, 8, 9]]
    assert replay.requests_of(np.arange(2, dtype=np.int32), 2, 6) == []
    assert [len(piece) for piece in replay.requests_of(np.arange(13, dtype=np.int32), 0, 6)] == [6, 6, 1]


def slow_replay(
    requests: Sequence[np.ndarray], proposers: Sequence[Proposer], rule: str, prompt: int, k: int
) -> tuple[int, int, int, int]:
    """Counts of a replay of one request after the other, with plain lists of tokens."""
    steps = emitted = drafted = accepted = 0
    ensemble = Ensemble([str(index) for index in range(len(proposers))], k, {"gate": False})
    for nth, request in enumerate(requests):
        known = prompt
        while known < len(request):
            limit = min(k, len(request) - known - 1)
            draft: list[int] = []
            if limit > 0:
                batch = DraftBatch.from_contexts([request[:known]], limit, [str(nth)])
                answers = [proposer.propose(batch) for proposer in proposers]
                drafts = [each.token_ids[0, : each.num_tokens[0]].tolist() for each in answers]
                matched = [int(each.match_length[0]) if each.match_length is not None else 0 for each in answers]
                right = [agreeing(each, request[known:]) for each in drafts]
                if rule == "oracle":
                    draft = drafts[right.index(max(right))]
                elif rule == "longest-match":
                    ranks = [length if each else -1 for length, each in zip(matched, drafts, strict=True)]
                    draft = drafts[ranks.index(max(ranks))]
                elif rule == "ensemble":
                    best, _ = ensemble.combine(batch, answers, 1)
                    draft = best.token_ids[0, : best.num_tokens[0]].tolist()
                else:
                    draft = drafts[int(rule)]
            count = agreeing(draft, request[known:])
            coming = np.array([request[known : known + count + 1]], dtype=np.int32)
            ensemble.observe([str(nth)], coming, np.array([count + 1]), np.array([len(draft)]))
            steps, emitted = steps + 1, emitted + count + 1
            drafted, accepted = drafted + len(draft), accepted + count
            known += count + 1
        ensemble.finish([str(nth)])
        for proposer in proposers:
            proposer.finish([str(nth)])
    return steps, emitted, drafted, accepted


def agreeing(draft: Sequence[int], truth: np.ndarray) -> int:
    count = 0
    while count < len(draft) and draft[count] == truth[count]:
        count += 1
    return count


@pytest.mark.parametrize("batch", [1, 7])
def test_as_a_slow_replay(tmp_path, tokenizer, rng, batch):
    phrases = [rng.integers(0, 40, size=5) for _ in range(6)]

    def document() -> list[int]:
        return np.concatenate([phrases[index] for index in rng.integers(0, 6, size=20)]).tolist()

    store = make_store(tmp_path / "s.specstore", tokenizer, [document() for _ in range(3)])
    files = [write(tmp_path / f"{index}.txt", document()) for index in range(4)]
    result = replayed(
        tmp_path, tokenizer, "--proposers", "ngram,rest,ensemble", "--datastore", store, "-k", 5, "--batch", batch,
        "--prompt-tokens", 10, "--max-tokens", 60, *files,
    )  # fmt: skip
    requests = [
        request
        for path in files
        for request in replay.requests_of(
            np.array([WORDS.index(word) for word in path.read_text().split()], dtype=np.int32), 10, 60
        )
    ]
    settings = parse_settings({"proposers": ["ngram", "rest"], "datastore": str(store)})
    makers = replay.Makers(settings, ProposerContext(len(WORDS), 5, 1, 65))
    ngram, rest = settings.drafting_proposers

    def expected(rule: str, *entries: ProposerSettings) -> tuple[int, int, int, int]:
        return slow_replay(requests, list(makers.several(entries).values()), rule, 10, 5)

    assert counts_of(result, "ngram") == expected("0", ngram)
    assert counts_of(result, "rest") == expected("0", rest)
    assert counts_of(result, "longest-match") == expected("longest-match", ngram, rest)
    assert counts_of(result, "oracle") == expected("oracle", ngram, rest)
    assert result["proposers"]["rest"]["accepted_tokens"] > 0
    assert counts_of(result, "ensemble")[1] == result["inputs"]["output_tokens"]
    if batch == 1:  # what the ensemble learns depends on which requests run side by side
        assert counts_of(result, "ensemble") == expected("ensemble", ngram, rest)
    rates = {name: each["emitted_per_step"] for name, each in result["proposers"].items()}
    assert result["ensemble_over_oracle"] == pytest.approx(rates["ensemble"] / rates["oracle"], abs=1e-4)
    assert result["ensemble_over_longest_match"] == pytest.approx(rates["ensemble"] / rates["longest-match"], abs=1e-4)
    store_tokens = result["datastores"]["s"]["tokens"]
    assert store_tokens == 300
    assert result["proposers"]["rest"]["bytes_per_token"] == pytest.approx(store.stat().st_size / 300, abs=1e-3)


class Recorder(Proposer):
    """Records what it is shown; drafts one wrong token, and reports a hundred bytes for every live request."""

    def __init__(self, context: ProposerContext) -> None:
        super().__init__(context)
        self.contexts: dict[str, list[list[int]]] = {}
        self.running: set[str] = set()
        self.finished: list[str] = []
        self.most_running = 0
        self.verified: list[Verified] = []

    def propose(self, batch: DraftBatch) -> list[list[int]]:
        for index, request_id in enumerate(batch.request_ids):
            assert request_id not in self.finished
            assert not batch.token_ids[batch.rows[index], batch.num_tokens[index] :].any()  # no coming tokens
            self.contexts.setdefault(request_id, []).append(batch.context(index).tolist())
            self.running.add(request_id)
        self.most_running = max(self.most_running, len(self.running))
        return [[0, 0, 0, 0, 0, 0] for _ in batch.request_ids]

    def observe(self, verified: Verified) -> None:
        self.verified.append(verified)

    def finish(self, request_ids: Sequence[str]) -> None:
        self.finished += request_ids
        self.running -= set(request_ids)

    def memory_bytes(self) -> int:
        return 100 * len(self.running)


def test_what_a_proposer_is_shown():
    recorder = Recorder(ProposerContext(40, 3))
    documents = [[np.arange(1, 8), np.arange(5, 10)], [np.arange(11, 15)], [np.arange(21, 30)]]
    decoder = replay.Replay({"recorder": recorder}, choosers.Chooser(), 3, 2, 40)
    decoder.remember([np.arange(31, 36)], lambda _: None)
    assert recorder.finished == ["warm-0"]
    counts = decoder.decode(documents, 3, lambda _: None)
    assert sorted(recorder.finished) == ["0", "1", "2", "3", "warm-0"]
    assert not recorder.running
    assert recorder.most_running == 2
    by_first = {contexts[0][0]: contexts for contexts in recorder.contexts.values()}
    # Every token of the output but the last is followed by a step that asks for a draft.
    assert by_first[1] == [list(range(1, end)) for end in range(4, 7)]
    assert by_first[5] == [list(range(5, end)) for end in range(8, 9)]
    assert 11 not in by_first  # one token of output gets no draft
    assert by_first[21] == [list(range(21, end)) for end in range(24, 29)]
    assert (counts.request_steps, counts.emitted, counts.accepted) == (13, 13, 0)
    assert counts.drafted == (3 + 2 + 1) + 1 + (3 + 3 + 3 + 2 + 1)  # no draft reaches the last token
    for verified in recorder.verified:
        assert [len(each) for each in verified.target_token_ids] == verified.num_emitted
    shown = [token for each in recorder.verified for row in each.target_token_ids for token in row]
    assert sorted(shown) == sorted([*range(4, 8), *range(8, 10), 14, *range(24, 30)])
    assert counts.fed == 5 + 4 * 3 + 13
    assert counts.kept_bytes == 200


def test_memory_is_of_the_tokens_fed_when_most_was_kept():
    counts = replay.Counts(request_steps=1)
    assert counts.bytes_per_token is None
    for fed, num_bytes in ((10, 500), (20, 800), (30, 800), (40, 100)):
        counts.fed = fed
        counts.keep(num_bytes)
    assert counts.bytes_per_token == 800 / 30
    counts.store_bytes, counts.store_tokens = 700, 70
    assert counts.bytes_per_token == 1500 / 100


def test_nonsense_from_a_proposer_is_told():
    batch = DraftBatch.from_contexts([[1], [2]], 3)
    with pytest.raises(SpecplugError, match="'mine' answered drafts of shape"):
        replay.well_formed("mine", Drafts.from_lists([[1]]), batch, 40)
    drafts = replay.well_formed("mine", [[1, 2, 3, 4, 5], [1]], batch, 40)
    assert drafts.num_tokens.tolist() == [3, 1]
    assert drafts.token_ids.shape == (2, 3)
    drafts = replay.well_formed("mine", [[1, 40, 3], [-1]], batch, 40)
    assert drafts.num_tokens.tolist() == [1, 0], "cut before ids outside the vocabulary, as in an engine"


def test_table_and_json_hold_every_replay(tmp_path, tokenizer):
    path = write(tmp_path / "a.txt", [1, 2, 3, 4] * 10)
    out = tmp_path / "new" / "r.json"
    result = run(
        "--tokenizer", tokenizer, "--proposers", "suffix,ngram,ensemble", "--prompt-tokens", 8, "--json", out, path
    )
    assert result.exit_code == 0, result.output
    for word in ("suffix", "ngram", "ensemble", "longest-match", "oracle", "emitted/step", "bytes/token"):
        assert word in result.stdout
    assert "of the oracle's" in result.stdout
    written = json.loads(out.read_text())
    assert set(written["versions"]) >= {"vllm-specplug", "python", "numpy", "numba"}
    assert list(written["proposers"]) == ["suffix", "ngram", "ensemble", "longest-match", "oracle"]
    for each in written["proposers"].values():
        assert {"emitted_per_step", "acceptance", "us_per_step", "bytes_per_token"} <= set(each)
        assert each["emitted_tokens"] == 32


def test_bad_input_is_one_clear_error_before_anything_runs(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(replay, "Replay", None)  # no replay may start
    path = write(tmp_path / "a.txt", [1, 2, 3])
    store = make_store(tmp_path / "s.specstore", tokenizer, [[1, 2, 3]])
    other = make_store(
        tmp_path / "other.specstore", str(cli.__file__).replace("cli/replay.py", "tiny_models/tiny-target"), [[1]]
    )
    (tmp_path / "binary").write_bytes(b"\0\1")

    def refused(message: str, *arguments: object) -> None:
        result = run("--tokenizer", tokenizer, *arguments)
        assert isinstance(result.exception, SpecplugError), result.output
        assert message in str(result.exception)

    refused("no proposer 'sufix'. Did you mean 'suffix'?", "--proposers", "sufix", path)
    refused("names nobody that drafts", "--proposers", "oracle,longest-match", path)
    refused("is not JSON", "--proposers", '["suffix"', path)
    refused("named twice: ngram", "--proposers", "ngram,ngram", path)
    refused("has no option 'max'", "--proposers", '[{"name": "ngram", "max": 3}]', path)
    too_large = json.dumps([{"name": "lookahead", "pool_tokens": 2**50}])
    refused("proposer 'lookahead': there is not enough memory", "--proposers", too_large, path)
    refused("gate cannot be true", "--proposers", '["ngram", {"name": "ensemble", "gate": true}]', path)
    refused("leave on_device", "--proposers", '[{"name": "rest", "on_device": true}]', "--datastore", store, path)
    refused("write to its history_file", "--proposers", '[{"name": "suffix", "history_file": "h"}]', path)
    refused("drafts from a token store", "--proposers", "rest", path)
    refused("none of ngram reads stores", "--proposers", "ngram", "--datastore", store, path)
    refused("cannot open the token store", "--proposers", "rest", "--datastore", tmp_path / "none", path)
    refused("is not a token store", "--proposers", "rest", "--datastore", path, path)
    refused("mean different text", "--proposers", "rest", "--datastore", other, path)
    refused("there is no file", tmp_path / "none")
    refused("there is no file", "--warm", tmp_path / "none", path)
    refused("cannot read", tmp_path / "binary")
    refused("none of 1 documents has more than 200 tokens", path)
    refused("must be above --prompt-tokens", "--max-tokens", 100, path)
    refused("cannot write results", "--json", tmp_path, path)
    refused("can be read once", "--warm", "-", "-")
    result = run("--tokenizer", tmp_path / "none", path)
    assert isinstance(result.exception, SpecplugError)
    assert "cannot load tokenizer" in str(result.exception)
    for k in (0, 129):
        result = run("--tokenizer", tokenizer, "-k", k, path)
        assert result.exit_code == 2
        assert "Invalid value for '-k' / '--k'" in result.stderr


def test_errors_exit_with_2(tmp_path, tokenizer, monkeypatch, capsys):
    main = importlib.import_module("vllm_specplug.cli").main
    monkeypatch.setattr(sys, "argv", ["specplug", "replay", "--tokenizer", tokenizer, str(tmp_path / "none")])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "there is no file" in said.err
