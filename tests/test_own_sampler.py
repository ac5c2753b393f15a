"""A user's own coupling, examples/my_sampler.py: found by name, exact, and drafter-invariant on both model runners."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compare import assert_same
from harness import Engine
from requests_matrix import PLAIN_FEATURES, PROCESSOR_FEATURES, V2_FEATURES, requests
from scipy.stats import chisquare

from vllm_specplug.errors import ConfigurationError
from vllm_specplug.samplers.couplings import SAMPLERS, Apart, Coupling, Sampler
from vllm_specplug.samplers.keys import Keys, PositionKeys, Race, SeedKeys
from vllm_specplug.samplers.noise import NO_NOISE
from vllm_specplug.settings import registry
from vllm_specplug.settings.model import parse_settings

ROOT = Path(__file__).parents[1]
NAME = "my_sampler.InverseCdf"
IN_CHILD = "in_child.InverseCdf"  # the same class in a module that engines can import
SENT = requests(42, [*PLAIN_FEATURES, *PROCESSOR_FEATURES], first_seed=6000)
SENT_V2 = requests(6, V2_FEATURES, first_seed=6500, longest=8)


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))


def no_race(logits: torch.Tensor, keys: Keys) -> torch.Tensor:
    raise AssertionError("this coupling does not race")


# Names


def test_the_page_shows_the_example_as_it_is() -> None:
    source = (ROOT / "examples" / "my_sampler.py").read_text()
    assert source[source.index("import torch") :] in (ROOT / "docs/how-to/own-sampler.md").read_text()


def test_a_dotted_name(examples: None) -> None:
    settings = parse_settings({"sampler": NAME, "proposers": []})
    assert isinstance(settings.coupling, Apart)
    assert isinstance(settings.coupling.coupling, registry.sampler_class(NAME))
    assert (settings.is_coupled, settings.num_noises, settings.coupling.text) == (True, 0, "own")
    keys = SeedKeys(torch.arange(3))
    assert settings.coupling.noise(keys)[0] == NO_NOISE
    assert settings == parse_settings(settings.to_dict())


def test_the_name_of_an_entry_point(examples: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = tmp_path / "mine-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text(
        "[vllm_specplug.samplers]\ninverse-cdf = my_sampler:InverseCdf\nbroken = my_sampler:Missing\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert registry.sampler_names() == ["gumbel", "minhash", "list", "rejection", "broken", "inverse-cdf"]
    assert registry.sampler_class("inverse-cdf") is registry.sampler_class(NAME)
    with pytest.raises(ConfigurationError, match=r"sampler 'broken' \(my_sampler:Missing\) failed to import"):
        registry.sampler_class("broken")
    with pytest.raises(ConfigurationError, match=r"no sampler 'inverse-cfd'\. Did you mean 'inverse-cdf'"):
        registry.sampler_class("inverse-cfd")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("my_sampler.Missing", ["sampler: cannot load 'my_sampler.Missing'", "PYTHONPATH", "minhash"]),
        ("my_sampler.probabilities", ["is <function", "not a subclass of vllm_specplug.samplers.couplings.Coupling"]),
        ("my_sampler.Coupling", ["cannot be made", "abstract"]),
    ],
)
def test_what_is_no_coupling_is_refused(name: str, parts: list[str], examples: None) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse_settings({"sampler": name, "proposers": []})
    for part in parts:
        assert part in str(caught.value)


def test_properties_of_the_built_in_samplers() -> None:
    samplers: dict[str, Sampler] = {name: each(3) for name, each in SAMPLERS.items()}
    assert {name: (each.text, each.is_coupled, each.num_noises) for name, each in samplers.items()} == {
        "gumbel": ("stock", True, 1),
        "minhash": ("own", True, 0),
        "list": ("per num_chains", True, 3),
        "rejection": ("per drafter", False, 0),
    }


# Draws


@pytest.mark.parametrize("runner", ["V1", "V2"])
def test_it_draws_from_the_softmax_by_the_keys_of_either_runner(runner: str, examples: None) -> None:
    coupling = registry.sampler_class(NAME)()
    assert isinstance(coupling, Coupling)
    draws = 40_000
    logits = torch.tensor([2.0, 0.5, float("-inf"), 1.0, -1.0])
    seeds = torch.arange(draws)
    keys = SeedKeys(seeds) if runner == "V1" else PositionKeys(seeds % 200, seeds // 200)
    tokens = coupling.draw(logits.expand(draws, -1), keys, no_race)
    expected = torch.softmax(logits.double(), 0).numpy() * draws
    counts = np.bincount(tokens.numpy(), minlength=5)
    assert counts[2] == 0
    assert chisquare(counts[expected > 0], expected[expected > 0]).pvalue > 1e-4
    places, scores = coupling.ranked(logits.expand(draws, -1), keys, no_race, 4)
    assert places[:, 0].tolist() == tokens.tolist()
    assert scores.shape == places.shape


@pytest.mark.parametrize("kind", [SeedKeys, PositionKeys])
def test_keys_of_one_token_are_those_of_a_row(kind: type[SeedKeys] | type[PositionKeys]) -> None:
    """A row has the same key alone and among others, and chains draw independently."""
    seeds, positions = torch.tensor([7, 8, 9]), torch.tensor([30, 31, 32])
    rows = SeedKeys(seeds) if kind is SeedKeys else PositionKeys(seeds, positions)
    one = SeedKeys(seeds[1:2]) if kind is SeedKeys else PositionKeys.of_token(8, 30, 2)
    assert rows.bits()[1] == one.bits()[0]
    assert rows.uniforms()[1] == one.uniforms()[0]
    assert rows.gumbel(torch.tensor([5, 5, 5]))[1] == one.gumbel(torch.tensor([[5]]))[0, 0]
    assert len({rows.chain(chain).bits()[1].item() for chain in range(8)}) == 8
    assert (rows.uniforms() > 0).all()
    assert (rows.uniforms() < 1).all()


class Bad(Coupling):
    """Writes over all that it gets, and answers what the test says."""

    answer: Any = None

    def draw(self, logits: torch.Tensor, keys: Keys, race: Race) -> Any:
        race(logits, keys)
        logits.fill_(float("nan"))
        for array in vars(keys).values():
            array.zero_()
        return self.answer


@pytest.mark.parametrize("keys", [SeedKeys(torch.arange(5, 8)), PositionKeys(torch.arange(3), torch.arange(7, 10))])
def test_a_coupling_cannot_write_to_what_is_the_engines(keys: Keys) -> None:
    logits, before = torch.randn(3, 6), keys.bits().clone()
    kept, bad = logits.clone(), Bad()
    bad.answer = torch.tensor([-5, 2**40, 3])
    for draw in (Apart(bad).draw, lambda *given: Apart(bad).ranked(*given, 2)[0][:, 0]):
        assert draw(logits, keys, lambda rows, _: rows.argmax(dim=1)).tolist() == [0, 5, 3]
        assert torch.equal(logits, kept)
        assert torch.equal(keys.bits(), before)


@pytest.mark.parametrize(
    "answer", [None, 5, [1, 2, 3], torch.zeros(2, dtype=torch.int64), torch.zeros(3), torch.zeros(3, 1).long()]
)
def test_an_answer_that_is_no_token_a_row_is_named(answer: Any) -> None:
    bad = Bad()
    bad.answer = answer
    with pytest.raises(TypeError, match="sampler Bad answered"):
        Apart(bad).draw(torch.randn(3, 6), SeedKeys(torch.arange(3)), lambda rows, _: rows.argmax(dim=1))


# Engines


def drafting(proposers: list[str]) -> dict[str, Any]:
    gate = [{"name": "ensemble", "gate": False}] if proposers else []
    return {"num_speculative_tokens": 5, "proposers": [*proposers, *gate]}


@pytest.mark.engine
@pytest.mark.parametrize("v2", [False, True], ids=["V1", "V2"])
def test_tokens_do_not_depend_on_who_drafts(v2: bool) -> None:
    sent = SENT_V2 if v2 else SENT
    greedy = {"prompt": sent[0]["prompt"], "params": {"temperature": 0.0, "max_tokens": 4, "logprobs": 1}}
    config = {"method": "specplug", "sampler": IN_CHILD, **drafting(["ngram", "in_child.RandomTokens"])}
    more = {"reasoning_config": {"reasoning_start_str": "def", "reasoning_end_str": "\n"}} if v2 else {}
    with Engine({"speculative_config": config, **more}, v2=v2) as engine:
        assert f"sampler {IN_CHILD} (drafter-invariant)" in engine.tail(100_000)
        engine.send("set_drafting", drafting([]))
        alone = engine.generate([*sent, greedy])
        for proposers in (["ngram"], ["in_child.RandomTokens"]):
            engine.send("set_drafting", drafting(proposers))
            before = engine.send("metrics")["vllm:spec_decode_num_draft_tokens"]
            assert_same(engine.generate([*sent, greedy]), alone, f"{IN_CHILD}, {proposers}", [*sent, greedy])
            assert engine.send("metrics")["vllm:spec_decode_num_draft_tokens"] > before
        # Another seed gives another text, and the same seed the same.
        other = {**sent[1], "params": {**sent[1]["params"], "temperature": 1.4, "seed": 1}}
        again = {**other, "params": {**other["params"], "seed": 2}}
        first, second, third = engine.generate([other, again, other])
        assert first == third != second
    (output,) = alone[-1]["outputs"]
    assert output["token_ids"] == [max(each, key=each.get) for each in output["logprobs"]]
