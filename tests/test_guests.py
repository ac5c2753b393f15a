"""Strangers' code: whatever a user's proposer raises, answers, writes to, claims or does not do costs only itself."""

from __future__ import annotations

import gc
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from strangers import BEHAVIOURS, entries, misjudged

from vllm_specplug.cli.top import parse, proposers_table, stores_table
from vllm_specplug.drafting.drafting import Drafting
from vllm_specplug.drafting.guests import Guest, GuestError
from vllm_specplug.drafting.requests import TrackedRequest
from vllm_specplug.errors import ConfigurationError
from vllm_specplug.metrics import files
from vllm_specplug.proposers import DraftBatch, Proposer, ProposerContext, Verified
from vllm_specplug.proposers.base import TargetNoise
from vllm_specplug.samplers.noise import SPLITMIX
from vllm_specplug.settings import registry
from vllm_specplug.settings.model import parse_settings

ROOT = Path(__file__).parents[1]
VOCAB, K, LONGEST = 100, 4, 64
CONTEXT = ProposerContext(VOCAB, K, max_num_requests=8, max_model_len=LONGEST)


def drafting_of(proposers: list[Any], **settings: Any) -> Drafting:
    everything = {"name": "ensemble", "gate": False}
    made = Drafting(parse_settings({"proposers": [*proposers, everything], **settings}), CONTEXT)
    made.warm_up()
    made.describe()
    return made


class Engine:
    """Three requests over rows of a table, as a runner holds them."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(0)
        self.options: list[dict[str, Any]] = [{"mine": [1, {"deep": 2}]} for _ in range(3)]
        self.requests = [
            TrackedRequest(str(index), 8, LONGEST, temperature=0.5, options=self.options[index]) for index in range(3)
        ]
        self.table = self.random.integers(0, VOCAB, (8, LONGEST)).astype(np.int32)
        self.rows = np.array([5, 0, 2])
        self.totals = np.array([8, 11, 9])

    def steps(self, drafting: Drafting, count: int) -> None:
        """Serve; nobody may change what is the engine's, and every draft can be verified."""
        for _ in range(count):
            keys = self.random.integers(0, 2**32, (3, K)).astype(np.uint64)
            noise = TargetNoise(SPLITMIX, keys.copy(), np.full(3, 0.5, dtype=np.float32))
            table, rows, totals = self.table.copy(), self.rows.copy(), self.totals.copy()
            proposal = drafting.propose(self.requests, self.table, self.rows, self.totals, K, lambda *_, of=noise: of)  # type: ignore[misc]
            assert (self.table == table).all()
            assert (self.rows == rows).all()
            assert (self.totals == totals).all()
            assert (noise.keys == keys).all()
            assert self.options == [{"mine": [1, {"deep": 2}]} for _ in range(3)]
            for draft in proposal.drafts:
                assert len(draft) <= K
                assert all(type(token) is int and 0 <= token < VOCAB for token in draft)
            verified = Verified(["0", "1", "2"], proposal.drafts, [[*draft[:1], 1] for draft in proposal.drafts], [])
            verified.num_emitted = [len(tokens) for tokens in verified.target_token_ids]
            expected = [list(draft) for draft in proposal.drafts]
            drafting.observe(verified)
            assert verified.draft_token_ids == expected
            for row, total, tokens in zip(self.rows, self.totals, verified.target_token_ids, strict=True):
                self.table[row, total : total + len(tokens)] = tokens
            self.totals = self.totals + np.array(verified.num_emitted)
        drafting.finish(["0", "1", "2"])


def series_of(drafting: Drafting, folder: Path) -> str:
    """The page of metrics, read as Prometheus reads it."""
    files.Publisher(drafting.snapshot, {"engine": "0", "model_name": "tiny"}, folder).publish()
    shown = CollectorRegistry()
    shown.register(files.Collector(folder))
    page = generate_latest(shown).decode()
    labels = [
        (sample.name, *sorted(sample.labels.items()))
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    ]
    assert len(labels) == len(set(labels)), "Prometheus refuses two values of one series"
    return page


@pytest.mark.parametrize("fates", [("out", "stays"), ("late",)], ids=["what they do", "what they do not do"])
def test_every_bad_behaviour_costs_only_itself(
    fates: tuple[str, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    deadline = {"proposer_deadline_s": 0.05} if fates == ("late",) else {}
    bad = entries(*fates)
    drafting = drafting_of([*bad, "ngram"], **deadline)
    Engine().steps(drafting, 5)
    page = series_of(drafting, tmp_path)
    proposers = drafting.snapshot()["proposers"]
    assert misjudged(proposers) == []
    assert proposers["ngram"]["active"]
    assert len(bad) == sum(fate in fates for fate in BEHAVIOURS.values())
    left_out = [record for record in caplog.records if "left out" in record.getMessage()]
    assert len(left_out) == sum(BEHAVIOURS[entry["name"].partition(".")[2]] != "stays" for entry in bad)
    assert all(len(record.getMessage()) < 5000 for record in left_out)
    sample = parse(page, 0.0)
    with open(os.devnull, "w") as nowhere:
        for table in (proposers_table(sample, None), stores_table(sample, None)):
            Console(file=nowhere).print(table)
    if "late" in fates:
        assert 'specplug_proposer_late_total{engine="0",model_name="tiny",proposer="strangers.spins"} 1.0' in page
        assert "has not answered within 0.05 seconds (in propose)" in caplog.text
        assert "has not answered within 0.6 seconds (in warm_up)" in caplog.text
        assert "proposer_deadline_s" in caplog.text
        spinning = [each for each in threading.enumerate() if each.name == "specplug proposer strangers.spins"]
        for thread in spinning:
            thread.join(30)
            assert not thread.is_alive(), "an endless loop must not take time for ever"
    drafting.close()


def test_there_are_some_hundred_behaviours() -> None:
    assert len(BEHAVIOURS) > 200


def test_threads_that_hang_do_not_keep_the_process() -> None:
    program = (
        "from test_guests import drafting_of, Engine\n"
        "drafting = drafting_of(['strangers.sleeps_in_propose', 'ngram'], proposer_deadline_s=0.05)\n"
        "Engine().steps(drafting, 2)\n"
        "print(drafting.stats.proposers['strangers.sleeps_in_propose'].late)"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "engine")])
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


class Waits(Proposer):
    """Its first answer waits for the test."""

    may_go = threading.Event()
    answers = ([[1]] * 3, [[2]] * 3)
    asked = 0

    def propose(self, batch: DraftBatch) -> Any:
        self.asked += 1
        if self.asked == 1:
            self.may_go.wait()
        return self.answers[self.asked - 1]


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> type[Waits]:
    monkeypatch.setattr(registry, "proposer_class", lambda name: Waits)
    monkeypatch.setattr(Waits, "may_go", threading.Event())
    return Waits


def test_ctrl_c_is_the_users(waits: type[Waits]) -> None:
    """It ends the wait, not the proposer; and a later call is not taken for answered by what was interrupted."""
    drafting = drafting_of(["waits"], proposer_deadline_s=600)
    engine = Engine()
    threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        engine.steps(drafting, 1)
    waits.may_go.set()
    proposal = drafting.propose(engine.requests, engine.table, engine.rows, engine.totals, K)
    assert proposal.drafts == [[2]] * 3
    assert drafting.stats.proposers["waits"].active


class Copies(Proposer):
    """Keeps what it was shown."""

    shown: tuple[dict[str, list[int]], dict[str, Any]] = ({}, {})

    def propose(self, batch: DraftBatch) -> Any:
        contexts = {name: batch.context(index).tolist() for index, name in enumerate(batch.request_ids)}
        Copies.shown = contexts, dict(zip(batch.request_ids, batch.options, strict=True))
        assert batch.token_ids.shape == (6, 40)
        return [[]] * len(batch)

    follow = propose


def test_a_guest_sees_the_tokens_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests grow, move to other rows, pause, end, are cut and go on with other tokens, and take others' names."""
    monkeypatch.setattr(registry, "proposer_class", lambda name: Copies)
    guest = Guest("copies", ProposerContext(VOCAB, K, 6, 40), {}, {}, 60.0)
    guest.warm_up()
    random = np.random.default_rng(1)
    table, lengths, names = np.zeros((6, 40), dtype=np.int32), np.zeros(6, dtype=np.int64), [""] * 6
    tokens = iter(range(10**6))  # no two alike
    for step in range(600):
        for row in range(6):
            if not names[row] or lengths[row] > 33 or random.random() < 0.05:
                names[row] = f"{random.integers(0, 10**6) if random.random() < 0.9 else row}"
                lengths[row] = 0
            elif random.random() < 0.1:  # its last tokens are taken back, and others follow
                lengths[row] = max(0, lengths[row] - random.integers(1, 4))
            for _ in range(random.integers(1, 5)):
                table[row, lengths[row]] = next(tokens)
                lengths[row] += 1
        if len(set(names)) < 6:
            names = [f"again {step} {row}" for row in range(6)]
        chosen = np.flatnonzero(random.random(6) < 0.7)
        if not len(chosen):
            continue
        batch = DraftBatch(
            [names[row] for row in chosen], table, chosen, lengths[chosen], np.ones(len(chosen), dtype=np.int64),
            np.full(len(chosen), 3), [{"row": int(row)} for row in chosen],
        )  # fmt: skip
        (guest.propose if step % 3 else guest.follow)(batch)
        contexts, options = Copies.shown
        assert contexts == {names[row]: table[row, : lengths[row]].tolist() for row in chosen}
        assert {*options} == {names[row] for row in chosen}
        if random.random() < 0.3:
            a, b = random.choice(6, 2, replace=False)  # vLLM moves requests into free rows
            for array in (table, lengths):
                array[[a, b]] = array[[b, a]]
            names[a], names[b] = names[b], names[a]
        ended = [name for name in names if random.random() < 0.05]
        guest.finish(ended)
        names = ["" if name in ended else name for name in names]


@pytest.mark.parametrize("error", [ValueError("window must be at least 1"), TypeError("no window"), OSError("no file")])
def test_a_constructor_refuses_its_options_in_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    class Refuses(Copies):
        def __init__(self, context: ProposerContext) -> None:
            raise error

    monkeypatch.setattr(registry, "proposer_class", lambda name: Refuses)
    with pytest.raises(ConfigurationError, match=f"^proposer 'mine': {error}$"):
        Guest("mine", CONTEXT, {}, {}, 60.0)


def test_errors_of_a_guest_have_its_own_traceback(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(registry, "proposer_class", lambda name: Waits)
    monkeypatch.setattr(Waits, "answers", ())
    Waits.may_go.set()
    caplog.set_level(logging.ERROR)
    drafting = drafting_of(["waits"])
    Engine().steps(drafting, 1)
    assert "IndexError" in caplog.text
    assert "return self.answers[self.asked - 1]" in caplog.text


class Stores(Proposer):
    """Has a token store of its own."""

    version = "1"
    opens: Any = staticmethod(lambda: {"own": Stores})
    taken: Any = None

    def propose(self, batch: DraftBatch) -> Any:
        return [[]] * len(batch)

    def held_stores(self) -> Any:
        return {"own": self.taken or Stores}

    def open_stores(self) -> Any:
        return self.opens()

    def take_stores(self, stores: Any) -> None:
        self.taken = stores["own"]


def opened(drafting: Drafting) -> dict[str, Any]:
    drafting.stores.open("reload")
    end = time.monotonic() + 60
    while not (state := drafting.stores.look("reload"))["is_ready"]:
        assert time.monotonic() < end
        time.sleep(0.01)
    return state


def refuse() -> Any:
    raise ValueError("torn file")


def leave() -> Any:
    raise SystemExit


@pytest.mark.parametrize(
    ("opens", "error", "is_active"), [(None, "", True), (refuse, "torn file", True), (leave, "", False)]
)
def test_stores_of_a_guest_are_replaced(
    monkeypatch: pytest.MonkeyPatch, opens: Any, error: str, is_active: bool
) -> None:
    monkeypatch.setattr(registry, "proposer_class", lambda name: Stores)
    if opens is not None:
        monkeypatch.setattr(Stores, "opens", staticmethod(opens))
    drafting = drafting_of(["stores"])
    state = opened(drafting)
    assert error in state["error"]
    assert bool(state["error"]) == bool(error)
    assert drafting.stats.proposers["stores"].active == is_active
    if not error:
        assert drafting.stores.take("reload", state["versions"]) == (["own"] if is_active else [])
        assert drafting.stats.proposers["stores"].active == is_active


def test_after_a_fault_a_guest_says_what_it_was(waits: type[Waits]) -> None:
    guest = Guest("waits", CONTEXT, {}, {}, 0.05)
    batch = DraftBatch.from_contexts([[1, 2]] * 3, 2)
    guest.warm_up()
    with pytest.raises(GuestError, match=r"has not answered within 0\.05 seconds") as caught:
        guest.propose(batch)
    assert caught.value.is_late
    waits.may_go.set()


@pytest.mark.parametrize("what", ["drafts", "crashes", "exits", "hangs", "raises"])
def test_a_guest_in_a_process_of_its_own(what: str, caplog: pytest.LogCaptureFixture) -> None:
    entry = {"name": "strangers.Commanded", "in_process": True, "what": what}
    drafting = drafting_of([entry], proposer_deadline_s=3 if what == "hangs" else 60)
    (guest,) = drafting._proposers.values()
    pid, _ = guest.counted()  # type: ignore[attr-defined]
    assert pid != os.getpid()
    engine = Engine()
    last = engine.table[engine.rows, engine.totals - 1].tolist()
    proposal = drafting.propose(engine.requests, engine.table, engine.rows, engine.totals, K)
    stats = drafting.snapshot()["proposers"]["strangers.Commanded"]
    if what == "drafts":
        assert proposal.drafts == [[token + 1] if token + 1 < VOCAB else [] for token in last]
        engine.steps(drafting, 5)
        assert stats["active"]
    else:
        assert (stats["active"], stats["errors"], stats["late"]) == (False, 1, what == "hangs")
        words = {"crashes": "status -11", "exits": "status 7", "hangs": "within 3 seconds", "raises": "SystemExit"}
        assert words[what] in caplog.text
    del guest, drafting
    gc.collect()
    end = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < end, "nobody needs the process any more"
        time.sleep(0.01)


def test_only_proposers_of_users_get_a_process() -> None:
    with pytest.raises(ConfigurationError, match="in_process is for proposers of your own; 'ngram' is of this package"):
        parse_settings({"proposers": [{"name": "ngram", "in_process": True}]})
    with pytest.raises(ConfigurationError, match="in_process of 'ngram' must be true or false, not 'yes'"):
        parse_settings({"proposers": [{"name": "ngram", "in_process": "yes"}]})


@pytest.mark.parametrize("deadline", [0, -1, float("nan"), float("inf"), 1e9, "5", True])
def test_a_deadline_is_a_number_of_seconds(deadline: Any) -> None:
    with pytest.raises(ConfigurationError, match="proposer_deadline_s"):
        parse_settings({"proposer_deadline_s": deadline})
    assert parse_settings({"proposer_deadline_s": 2}).proposer_deadline_s == 2.0


def test_a_module_that_exits_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "exits_at_once.py").write_text("import sys\nsys.exit('usage: ...')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigurationError, match=r"cannot load 'exits_at_once\.Mine': SystemExit\('usage: \.\.\.'\)"):
        parse_settings({"proposers": ["exits_at_once.Mine"]})
