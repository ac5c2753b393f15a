"""Settings: a mistake gives one error before a model loads, with the key, its value and the possible values."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import ENGINE_ARGS, Engine

from vllm_specplug.errors import SCREEN_CHARS, ConfigurationError, SpecplugError, UnsupportedVersionError
from vllm_specplug.hooks.seams import check_version
from vllm_specplug.settings.model import parse_settings, settings_of
from vllm_specplug.settings.requests import RequestChoices, parse_request_options
from vllm_specplug.tiny_models import draft_path

MODEL = {key: ENGINE_ARGS[key] for key in ("model", "max_model_len", "enforce_eager")}


def test_what_is_not_set_has_its_default() -> None:
    settings = parse_settings({})
    assert settings.num_speculative_tokens == 8
    assert settings.sampler == "gumbel"
    assert [entry.name for entry in settings.proposers] == ["suffix", "ngram", "lookahead"]
    assert [entry.name for entry in parse_settings({"datastore": "x"}).proposers] == [
        "suffix",
        "ngram",
        "lookahead",
        "rest",
    ]
    assert parse_settings({"proposers": []}).proposers == ()


def test_settings_survive_their_journey() -> None:
    settings = parse_settings({"proposers": [{"name": "ngram", "min_match": 3}], "num_speculative_tokens": 5})
    assert settings_of({"specplug": settings.to_dict()}) == settings
    assert settings.proposers[0].options == {"min_match": 3}
    assert settings_of({}) is None
    assert settings_of(None) is None


@pytest.mark.parametrize(
    ("given", "paths"),
    [
        ("stores/code.specstore", {"code": "stores/code.specstore"}),
        (Path("/a/code.v2.specstore"), {"code.v2": "/a/code.v2.specstore"}),
        ("a, b", {"a, b": "a, b"}),
        (["/b/tickets.specstore", Path("code")], {"tickets": "/b/tickets.specstore", "code": "code"}),
        ({"mine": "/a/code", "theirs": Path("/b/code")}, {"mine": "/a/code", "theirs": "/b/code"}),
        (None, None),
    ],
)
def test_stores_have_names(given: Any, paths: dict[str, str] | None) -> None:
    settings = parse_settings({"proposers": ["ngram"], "datastore": given})
    assert settings.datastore == paths
    assert list(settings.datastore or ()) == list(paths or ())  # the order given
    travelled = settings_of({"specplug": json.loads(json.dumps(settings.to_dict()))})
    assert travelled == settings
    assert list(travelled.datastore or ()) == list(paths or ())


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"num_speculative_token": 4}, ["'num_speculative_token'", "4", "Did you mean 'num_speculative_tokens'"]),
        ({"drafter": "x"}, ["unknown key 'drafter'", "Known keys: method, num_speculative_tokens, proposers"]),
        ({"num_speculative_tokens": 0}, ["num_speculative_tokens", "greater than or equal to 1", "0"]),
        ({"num_speculative_tokens": 129}, ["num_speculative_tokens", "less than or equal to 128", "129"]),
        ({"num_speculative_tokens": "8"}, ["num_speculative_tokens", "valid integer", "'8'"]),
        ({"num_speculative_tokens": 2.5}, ["num_speculative_tokens", "2.5"]),
        ({"sampler": "gumble"}, ["sampler", "'gumble'", "Did you mean 'gumbel'", "gumbel, minhash, list, rejection"]),
        ({"sampler": "list"}, ["sampler 'list'", "of one it would be 'gumbel'", "num_chains (2 to 8)"]),
        ({"sampler": "rejection", "num_chains": 2}, ["num_chains 2 needs a coupled sampler"]),
        ({"proposers": ["ngrma"]}, ["no proposer 'ngrma'", "Did you mean 'ngram'", "ngram, recycling, rest"]),
        ({"proposers": "ngram"}, ["proposers", "must be a list of names", "'ngram'"]),
        ({"proposers": [{"min_match": 3}]}, ["proposers.0.name", "Field required"]),
        ({"proposers": ["ngram", "ngram"]}, ["named twice: ngram"]),
        ({"proposers": ["no.such.Module"]}, ["cannot load 'no.such.Module'", "PYTHONPATH"]),
        ({"proposers": ["pathlib.Path"]}, ["not a subclass of vllm_specplug.proposers.Proposer"]),
        ({"datastore": 5}, ["datastore", "valid string", "5"]),
        ({"datastore": ["a", 5]}, ["datastore", "a path must be a valid string, not 5"]),
        ({"datastore": {"a": 5}}, ["datastore.a", "valid string", "5"]),
        ({"datastore": {5: "a"}}, ["datastore.5", "valid string", "5"]),
        ({"datastore": []}, ["datastore: names no store; leave it out"]),
        ({"datastore": {}}, ["datastore: names no store; leave it out"]),
        ({"datastore": ""}, ["datastore", "a name and a path that are not empty"]),
        ({"datastore": {"a": ""}}, ["datastore", "a name and a path that are not empty"]),
        ({"datastore": ["/a/code", "/b/code.specstore"]}, ["two stores would be named 'code'", '{"NAME": "PATH"']),
        ({"datastore": {"a": "x", "b,c": "y"}}, ["datastore", "no comma and no space around it, as 'b,c' has"]),
        (
            {"proposers": [{"name": "rest", "on_device": True}], "datastore": ["a", "b"]},
            ["'rest' with on_device drafts from one store, and datastore names a, b; give one"],
        ),
        ({"proposers": [{"name": "ngram", "min_match": object()}]}, ["options must be plain JSON values"]),
        ({"proposers": ["."]}, ["cannot load '.'"]),
        ({"proposers": [{"name": "ngram", "on_device": True}]}, ["'ngram' cannot draft on the device; rest can"]),
        ({"proposers": [{"name": "rest", "on_device": 1}], "datastore": "x"}, ["on_device of 'rest' must be true"]),
        (
            {"proposers": [{"name": "rest", "on_device": True}, "ngram"], "datastore": "x"},
            ["name it alone, or leave on_device out"],
        ),
    ],
)
def test_mistakes_are_named(given: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse_settings(given)
    for part in parts:
        assert part in str(caught.value)


def test_request_options_are_parsed_and_others_ignored() -> None:
    assert parse_request_options(None) == {}
    options = {
        "specplug_speculate": 0,  # vLLM's HTTP types turn a JSON false into 0
        "specplug_proposers": "rest, suffix",
        "specplug_datastore": ["code"],
        "specplug_max_draft_tokens": 0,
        "specplug_tenant": "acme",
        "somebody_elses": 3,
    }
    choices = RequestChoices(proposers=("suffix", "rest"), stores=("code", "tickets"), max_draft_tokens=8)
    assert parse_request_options(options, choices) == {
        "specplug_speculate": False,
        "specplug_proposers": ("rest", "suffix"),
        "specplug_datastore": ("code",),
        "specplug_max_draft_tokens": 0,
        "specplug_tenant": "acme",
    }


@pytest.mark.parametrize(
    ("name", "value", "parts"),
    [
        ("specplug_off", True, ["unknown request option 'specplug_off'"]),
        ("specplug_speculat", True, ["Did you mean 'specplug_speculate'"]),
        ("specplug_speculate", "no", ["true or false", "'no'"]),
        ("specplug_speculate", 2, ["true or false", "2"]),
        ("specplug_proposers", [], ["names of configured proposers", "[]"]),
        ("specplug_proposers", 3, ["names of configured proposers", "3"]),
        ("specplug_proposers", "sufix", ["'sufix'", "Did you mean 'suffix'", "Configured: suffix, rest"]),
        ("specplug_proposers", ["rest", ""], ["there is no ''"]),
        ("specplug_datastore", "tikets", ["Did you mean 'tickets'", "Configured: code, tickets"]),
        ("specplug_max_draft_tokens", 9, ["at most 8", "9"]),
        ("specplug_max_draft_tokens", -1, ["whole number", "-1"]),
        ("specplug_max_draft_tokens", True, ["whole number", "True"]),
        ("specplug_max_draft_tokens", 2.0, ["whole number", "2.0"]),
        ("specplug_tenant", "", ["1 to 256 characters"]),
        ("specplug_tenant", "x" * 300, ["1 to 256 characters"]),
        ("specplug_tenant", 7, ["1 to 256 characters"]),
        ("specplug_tenant", "half \ud800", ["UTF-8"]),
        ("specplug_datastore", "code," * 10**6, ["each once", "4,096", "5,000,000"]),
        ("specplug_proposers", ["suffix"] * 5000, ["each once", "5,000"]),
    ],
)
def test_wrong_request_options_say_what_is_possible(name: str, value: Any, parts: list[str]) -> None:
    choices = RequestChoices(proposers=("suffix", "rest"), stores=("code", "tickets"), max_draft_tokens=8)
    with pytest.raises(ConfigurationError) as caught:
        parse_request_options({name: value}, choices)
    for part in (name, *parts):
        assert part in str(caught.value)


def test_a_store_named_many_times_is_named_once() -> None:
    choices = RequestChoices(proposers=("suffix", "rest"), stores=("code", "tickets"))
    given = {"specplug_datastore": "tickets, code," * 100 + "code", "specplug_proposers": ["rest"] * 100}
    assert parse_request_options(given, choices) == {
        "specplug_datastore": ("tickets", "code"),
        "specplug_proposers": ("rest",),
    }


@pytest.mark.parametrize(
    "given",
    [
        {"specplug_" + "x" * 10**6: 1},
        {"specplug_speculate": "x" * 10**6},
        {"specplug_max_draft_tokens": 10**5000},
        {"specplug_max_draft_tokens": "x" * 10**6},
        {"specplug_tenant": "x" * 10**6},
        {"specplug_tenant": "\ud800" * 200},
        {"specplug_datastore": "x" * 4000},
        {"specplug_proposers": ["x" * 10**6]},
        {"specplug_proposers": {"x" * 10**6: 1}},
    ],
    ids=lambda given: next(iter(given))[:20],
)
def test_an_answer_to_a_mistake_fits_a_screen(given: dict[str, Any]) -> None:
    """However long what was given is, and whichever setting or option it is in."""
    choices = RequestChoices(proposers=("suffix", "rest"), stores=("code", "tickets"), max_draft_tokens=8)
    with pytest.raises(ConfigurationError) as caught:
        parse_request_options(given, choices)
    assert len(str(caught.value)) <= SCREEN_CHARS
    for key, value in given.items():
        for settings in ({key: value}, {"proposers": value}, {"proposers": ["x" * 10**6]}, {"sampler": "x" * 10**6}):
            with pytest.raises(ConfigurationError) as caught:
                parse_settings(settings)
            assert len(str(caught.value)) <= SCREEN_CHARS


def test_a_long_message_keeps_its_beginning_and_its_end() -> None:
    told = str(SpecplugError("begins " + "x" * 10**6 + " ends"))
    assert len(told) <= SCREEN_CHARS
    assert told.startswith("begins xxx")
    assert told.endswith("xxx ends")
    assert "(998,062 characters left out)" in told


def test_request_options_are_refused_if_vllms_own_drafter_is_alone() -> None:
    choices = RequestChoices(own_drafter="eagle")
    assert parse_request_options({"somebody_elses": 1}, choices) == {}
    with pytest.raises(ConfigurationError, match=r"requests can choose with method 'specplug', or with"):
        parse_request_options({"specplug_speculate": False}, choices)


def test_an_ensemble_of_nobody_named_is_one_of_the_default_proposers() -> None:
    settings = parse_settings({"proposers": [{"name": "ensemble", "gate": False}], "datastore": "a/code.specstore"})
    assert [entry.name for entry in settings.host_proposers] == ["suffix", "ngram", "lookahead", "rest"]
    assert settings.ensemble_options == {"gate": False}
    assert parse_settings(settings.to_dict()) == settings
    assert parse_settings({"proposers": ["ensemble", "ngram"]}).host_proposers[0].name == "ngram"
    for wrong, told in (({"gate": 1}, "gate must be true or false"), ({"gat": True}, "no option 'gat'"),
                        ({"learning_rate": 3}, "learning_rate must lie in")):  # fmt: skip
        with pytest.raises(ConfigurationError, match=told):
            parse_settings({"proposers": [{"name": "ensemble", **wrong}]})


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1+cpu", "0.33.0.post1"])
def test_supported_versions(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "1.0", "0.34.0rc1+cpu", "unknown"])
def test_unsupported_versions(version: str) -> None:
    with pytest.raises(UnsupportedVersionError, match=r"supports vllm>=0\.32,<0\.34") as caught:
        check_version(version)
    assert version in str(caught.value)


def test_importing_the_package_is_cheap() -> None:
    program = "import sys, vllm_specplug; sys.exit(any(m in sys.modules for m in ('torch', 'vllm', 'numba')))"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.fixture(scope="module")
def process() -> Iterator[Engine]:
    """A process that has loaded vLLM and the plugin, but has no engine."""
    with Engine() as child:
        yield child


@pytest.fixture(scope="module")
def foreign_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from vllm_specplug.stores.writer import DatastoreWriter

    path = tmp_path_factory.mktemp("stores") / "foreign.specstore"
    with DatastoreWriter(path, vocab_size=4096, fingerprint="somebody else's", tokenizer="other") as writer:
        writer.add([1, 2, 3])
        writer.finish()
    return path


NATIVE = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}


@pytest.mark.engine
@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"method": "specplug", "num_speculative_tokens": 0}, ["num_speculative_tokens", "0"]),
        ({"method": "specplug", "num_speculative_tokens": 200}, ["num_speculative_tokens", "128", "200"]),
        ({"method": "specplug", "model": "x"}, ["unknown key 'model'", "known keys: method"]),
        ({"method": "specplug", "propsers": []}, ["Did you mean 'proposers'"]),
        ({"method": "specplug", "proposers": ["rest"]}, ["'rest' needs the key 'datastore'", "datastore build"]),
        ({"method": "specplug", "datastore": "/no/such/store"}, ["datastore", "/no/such/store"]),
        ({"method": "ngram", "num_speculative_tokens": 3, "proposers": ["ngram"]}, ["one of ours of that name"]),
        ({"method": "ngram", "num_speculative_tokens": 3, "sampler": "gumbl"}, ["no sampler 'gumbl'", "gumbel"]),
        ({"method": "ngram", "num_speculative_tokens": 3, "samplr": "gumbel"}, ["'samplr'", "mean 'sampler'"]),
        ({"method": "ngramm", "num_speculative_tokens": 3, "sampler": "gumbel"}, ["'ngramm'", "ngram, ngram_gpu"]),
        ({"method": "mlp_speculator", "model": "x", "sampler": "gumbel"}, ["'mlp_speculator'", "leave 'sampler' out"]),
        ({"method": "specplugg"}, ["no method 'specplugg'", "mean 'specplug'"]),
        ({"num_speculative_tokens": 3, "sampler": "gumbel"}, ["without 'method'", "Give 'specplug'"]),
        ({"method": "specplug", "draft_sample_method": "probabilistic"}, ["is for vLLM's own drafters", "sampler"]),
        ({"method": "custom_class", "model": "vllm_specplug.Proposer", "sampler": "x"}, ["there is no sampler 'x'"]),
        (
            {"method": "specplug", "proposers": [{"name": "ngram", "min_mach": 2}]},
            ["no option 'min_mach'", "min_match"],
        ),
        ({"method": "specplug", "proposers": [{"name": "ngram", "min_match": 10**30}]}, ["proposer 'ngram'"]),
        ({"method": "specplug", "datastore": "nul\0byte"}, ["datastore"]),
        ({"method": "eagle", "model": "vllm_specplug.Proposer"}, ["needs method 'specplug' or 'custom_class'"]),
        (
            {"method": "specplug", "num_speculative_tokens": 3, "num-speculative-tokens": 4},
            ["'num_speculative_tokens' (3)", "'num-speculative-tokens' (4)", "give it once"],
        ),
        (
            {**NATIVE, "num-speculative-tokens": 4, "sampler": "gumbel"},
            ["'num_speculative_tokens' (3)", "'num-speculative-tokens' (4)", "give it once"],
        ),
        (
            {"model": "vllm_specplug.ProposerWithRejection", "num_speculative_tokens": 3, "sampler": "minhash"},
            ["verifies by rejection", "sampler 'minhash'"],
        ),
        (
            {
                **NATIVE,
                "sampler": "gumbel",
                "rejection_sample_method": "synthetic",
                "synthetic_acceptance_rates": [0.5] * 3,
            },
            ["rejection_sample_method 'synthetic'"],
        ),
    ],
)
def test_vllm_raises_before_the_model_loads(process: Engine, given: dict[str, Any], parts: list[str]) -> None:
    message = process.send("call", "config_error", given, MODEL)
    assert message.startswith("ConfigurationError: speculative_config")
    for part in parts:
        assert part in message


@pytest.mark.engine
def test_another_tokenizers_store_is_refused(process: Engine, foreign_store: Path) -> None:
    message = process.send("call", "config_error", {"method": "specplug", "datastore": str(foreign_store)}, MODEL)
    assert message.startswith("ConfigurationError: speculative_config: datastore 'foreign': ")
    assert "tokenizer" in message


@pytest.mark.engine
def test_each_store_is_opened_and_checked(process: Engine, foreign_store: Path, tmp_path: Path) -> None:
    for stores, blamed in (
        ({"mine": str(foreign_store), "theirs": str(tmp_path / "missing")}, "mine"),
        ({"theirs": str(tmp_path / "missing"), "mine": str(foreign_store)}, "theirs"),
    ):
        config = {"method": "specplug", "proposers": ["rest"], "datastore": stores}
        message = process.send("call", "config_error", config, MODEL)
        assert message.startswith(f"ConfigurationError: speculative_config: datastore {blamed!r}: ")


@pytest.mark.engine
@pytest.mark.parametrize(
    ("arguments", "drafter", "num_tokens", "sampler"),
    [
        ({"speculative_config": {"method": "specplug"}}, "Proposer", 8, "gumbel"),
        ({"speculative_config": {"method": "specplug", "num-speculative-tokens": 3}}, "Proposer", 3, "gumbel"),
        ({"spec_method": "specplug", "spec_tokens": 5}, "Proposer", 5, "gumbel"),
        (
            {"speculative_config": {"method": "specplug", "sampler": "rejection"}},
            "ProposerWithRejection", 8, "rejection",
        ),
        (
            {"speculative_config": {
                "method": "custom_class", "model": "vllm_specplug.Proposer", "num_speculative_tokens": 4}},
            "Proposer", 4, "gumbel",
        ),
        (
            {
                "speculative_config": {"model": "vllm_specplug.Proposer", "num_speculative_tokens": 4},
                "additional_config": {"specplug": {"sampler": "rejection"}},
            },
            "ProposerWithRejection", 4, "rejection",
        ),
    ],
)  # fmt: skip
def test_every_spelling_of_a_configuration_is_understood(
    process: Engine, arguments: dict[str, Any], drafter: str, num_tokens: int, sampler: str
) -> None:
    settings, model, k = process.send("call", "accepted_config", {**MODEL, **arguments})
    assert model == f"vllm_specplug.{drafter}"
    assert (k, settings["num_speculative_tokens"], settings["sampler"]) == (num_tokens, num_tokens, sampler)


@pytest.mark.engine
def test_a_sampler_beside_vllms_own_drafter(process: Engine) -> None:
    settings, _, k = process.send(
        "call", "accepted_config", {**MODEL, "speculative_config": {**NATIVE, "sampler": "gumbel"}}
    )
    assert (settings["sampler"], settings["proposers"], settings["num_speculative_tokens"], k) == ("gumbel", [], 3, 3)
    elsewhere = {**MODEL, "speculative_config": NATIVE, "additional_config": {"specplug": {"sampler": "gumbel"}}}
    assert process.send("call", "accepted_config", elsewhere)[0] == settings
    elsewhere["additional_config"] = {"specplug": {"sampler": "gumbel", "proposers": ["ngram"]}}
    message = process.send("call", "config_error", elsewhere.pop("speculative_config"), elsewhere)
    assert message.startswith("ConfigurationError: speculative_config: method 'ngram' is vLLM's own drafter")


@pytest.mark.engine
@pytest.mark.parametrize("sampler", ["gumbel", "minhash", "rejection"])
def test_requests_beside_vllms_own_drafter_are_checked(process: Engine, sampler: str) -> None:
    arguments = {**MODEL, "speculative_config": {**NATIVE, "sampler": sampler}}
    assert process.send("call", "request_error", arguments, {"somebody_elses": 1}) == ""
    for options in {"specplug_speculate": False}, {"specplug_max_draft_tokens": "four"}:
        message = process.send("call", "request_error", arguments, options)
        assert message.startswith("VLLMValidationError: ")
        assert next(iter(options)) in message
    assert len(process.send("call", "request_error", arguments, {"specplug_tenant": "x" * 10**6})) < SCREEN_CHARS


@pytest.mark.engine
@pytest.mark.parametrize("config", [{"method": "specplug"}, {**NATIVE, "sampler": "rejection"}, NATIVE])
def test_a_model_with_a_recurrent_state_is_refused(process: Engine, config: dict[str, Any], tmp_path: Path) -> None:
    """Its state is not taken back when a draft is rejected: other tokens, in silence. vLLM alone is left alone."""
    model = {"architectures": ["Mamba2ForCausalLM"], "model_type": "mamba2", "vocab_size": 4096, "num_hidden_layers": 2}
    model |= {"hidden_size": 128, "state_size": 32, "num_heads": 8, "head_dim": 32, "n_groups": 1, "expand": 2}
    (tmp_path / "config.json").write_text(json.dumps(model))
    arguments = {"model": str(tmp_path), "max_model_len": 256, "enforce_eager": True, "skip_tokenizer_init": True}
    message = process.send("call", "config_error", config, arguments)
    if config is NATIVE:
        assert message == ""
    else:
        assert message.startswith("ConfigurationError: speculative_config: Mamba2ForCausalLM keeps a recurrent state")


@pytest.mark.engine
@pytest.mark.parametrize(
    ("config", "additional", "told"),
    [
        ({**NATIVE, "sampler": "gumbel"}, "specplug", "must be a dictionary, in which this plugin's settings travel"),
        ({"method": "specplug"}, "specplug", "was given 'specplug'"),
        (NATIVE, {"specplug": None}, "must be a dictionary, such as {'sampler': 'gumbel'}, was given None"),
        ({}, {"specplug": {"sampler": "gumbel"}}, "is given without a speculative_config"),
        ({**NATIVE, "sampler": "gumbel"}, {"specplug": {"sampler": "rejection"}}, "sampler is 'gumbel' in"),
        (
            {"method": "custom_class", "model": "vllm_specplug.Proposer", "num_speculative_tokens": 8},
            {"specplug": {"num_speculative_tokens": 3}},
            "num_speculative_tokens is 8 in speculative_config and 3 in additional_config",
        ),
    ],
)
def test_additional_config_is_checked_too(process: Engine, config: dict[str, Any], additional: Any, told: str) -> None:
    message = process.send("call", "config_error", config, {**MODEL, "additional_config": additional})
    assert message.startswith("ConfigurationError: ")
    assert told in message


@pytest.mark.engine
def test_somebody_elses_additional_config_is_none_of_our_business(process: Engine) -> None:
    """vLLM takes any object with a ``compute_hash`` there; without our keys, the plugin leaves it alone."""
    for config in ({}, NATIVE):
        assert process.send("call", "error_with_hashable_config", config, MODEL) == ""


@pytest.mark.engine
def test_every_seam_is_wrapped_once_and_restored(process_v2: Engine) -> None:
    total, wrapped, left = process_v2.send("call", "undone_seams")
    assert (wrapped, left) == (total, 0)


@pytest.mark.engine
@pytest.mark.parametrize(
    ("kind", "told"), [("version", "vLLM 0.99.0 is installed"), ("signature", "takes (self, another)")]
)
def test_an_unsupported_vllm_works_without_us(process: Engine, kind: str, told: str) -> None:
    wanted = [{"method": "specplug"}, {**NATIVE, "sampler": "gumbel"},
              {"method": "custom_class", "model": "vllm_specplug.Proposer", "num_speculative_tokens": 2}]  # fmt: skip
    unwanted: list[dict[str, Any]] = [{}, NATIVE]
    result = process.send("call", "unsupported", kind, [(config, MODEL) for config in (*wanted, *unwanted)])
    for error in result["errors"][: len(wanted)]:
        assert error.startswith("UnsupportedVersionError")
        assert told in error
        assert "supports vllm>=0.32,<0.34" in error
    assert result["errors"][len(wanted) :] == ["", ""]
    # One function refuses our settings; all others are vLLM's own.
    assert result["changed"] == ["vllm.engine.arg_utils.EngineArgs.create_speculative_config"]


@pytest.fixture(scope="module")
def process_v2() -> Iterator[Engine]:
    """Such a process in which vLLM chooses its V2 runner."""
    with Engine(v2=True) as child:
        yield child


@pytest.mark.engine
@pytest.mark.parametrize(
    ("engine_args", "parts"),
    [
        ({"spec": {"rejection_sample_method": "block"}}, ["rejection_sample_method 'block'"]),
        ({"enable_trace_replay": True}, ["trace replay"]),
        ({"pipeline_parallel_size": 2}, ["pipeline parallelism", "async scheduling"]),
    ],
)
def test_what_v2_cannot_couple_is_refused_by_name(
    process_v2: Engine, engine_args: dict[str, Any], parts: list[str]
) -> None:
    given = dict(engine_args)
    config = {**NATIVE, **given.pop("spec", {}), "sampler": "gumbel"}
    message = process_v2.send("call", "config_error", config, {**MODEL, **given})
    assert message.startswith("ConfigurationError: speculative_config: sampler 'gumbel'")
    for part in (*parts, '"sampler": "rejection"'):
        assert part in message
    config["sampler"] = "rejection"
    assert process_v2.send("call", "config_error", config, {**MODEL, **given}) == ""


@pytest.mark.engine
def test_v2_is_kept_with_our_drafter(process_v2: Engine) -> None:
    assert process_v2.send("call", "chosen_runner", {**MODEL, "speculative_config": {"method": "specplug"}}) == (
        [], True, True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("given", "num_noises"),
    [
        ({}, 1),
        ({"num_chains": 4}, 1),
        ({"sampler": "list", "num_chains": 4}, 4),
        ({"sampler": "minhash"}, 0),
        ({"sampler": "rejection"}, 0),
    ],
)
def test_a_sampler_has_the_number_of_noises_of_its_kind(given: dict[str, Any], num_noises: int) -> None:
    assert parse_settings(given).num_noises == num_noises


@pytest.mark.engine
@pytest.mark.parametrize("more", [{"proposers": ["ngram"]}, {"sampler": "list", "num_chains": 2}])
def test_what_joins_a_draft_model_of_v1_needs_synchronous_scheduling(process: Engine, more: dict[str, Any]) -> None:
    config = {
        "method": "draft_model", "model": str(draft_path()), "num_speculative_tokens": 3,
        "draft_sample_method": "probabilistic", **more,
    }  # fmt: skip
    message = process.send("call", "config_error", {"method": "specplug"}, {**MODEL, "async_scheduling": True})
    assert "method 'specplug' and async scheduling need Model Runner V2" in message
    message = process.send("call", "config_error", config, {**MODEL, "async_scheduling": True})
    assert "proposers or num_chains beside method 'draft_model' and async scheduling need Model Runner V2" in message
    assert process.send("call", "config_error", config, MODEL) == ""


@pytest.mark.engine
def test_a_list_needs_noise_that_its_races_can_be_compared_with(process_v2: Engine) -> None:
    config = {**NATIVE, "sampler": "list", "num_chains": 2}
    message = process_v2.send("call", "config_error", config, {**MODEL, "use_fp64_gumbel": True})
    assert "sampler 'list' draws every token from vLLM's own seeds; use_fp64_gumbel hashes its noise" in message
    assert process_v2.send("call", "config_error", config, MODEL) == ""
    assert (
        process_v2.send("call", "config_error", {**config, "sampler": "gumbel"}, {**MODEL, "use_fp64_gumbel": True})
        == ""
    )
