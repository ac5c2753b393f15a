"""The training examples: their decoding against a loop without a cache, their masks against plain passes, and runs."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from vllm_specplug.proposers.base import DraftBatch, ProposerContext, Verified
from vllm_specplug.proposers.jacobi import JacobiProposer
from vllm_specplug.proposers.windows import fill_token
from vllm_specplug.samplers.gumbel import gumbel_noise
from vllm_specplug.tiny_models import draft_path, target_path

EXAMPLES = Path(__file__).parents[1] / "examples"
VOCAB = 50


@pytest.fixture(autouse=True)
def _examples_on_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the examples be imported, and use one thread: more would only wait for each other in so small operations."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def consistency() -> ModuleType:
    return importlib.import_module("train_consistency")


@pytest.fixture
def distillation() -> ModuleType:
    return importlib.import_module("distil_draft")


def random_model(seed: int, scale: float = 0.2) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM  # late: it imports Triton, which other tests must do first

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True, initializer_range=scale,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def random_prompts(count: int, seed: int) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, VOCAB, size=generator.integers(1, 12)).tolist() for _ in range(count)]


@torch.no_grad()
def plainly_decoded(model: Any, prompt: list[int], count: int, seeds: Any = None) -> list[int]:
    """Output tokens from one whole pass for every token."""
    tokens = list(prompt)
    for nth in range(count):
        scores = model(torch.tensor([tokens])).logits[0, -1].double()
        if seeds is not None:
            scores += torch.from_numpy(gumbel_noise(seeds[nth], np.arange(VOCAB)))
        tokens.append(int(scores.argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("window", [1, 3, 8])
def test_jacobi_decoding_gives_the_greedy_tokens(consistency: ModuleType, window: int) -> None:
    model, prompts = random_model(window), random_prompts(6, window)
    run = consistency.jacobi_decode(model, prompts, 20, window)
    assert run.outputs(20) == [plainly_decoded(model, prompt, 20) for prompt in prompts]
    assert 1.0 <= run.emitted_per_forward <= window + 1
    # The first token comes from the prompt's own pass and belongs to no step.
    steps = (run.lengths >= 0).sum().item()
    assert run.emitted_per_forward == pytest.approx(19 * len(prompts) / steps)


def test_given_texts_decide_what_is_right(consistency: ModuleType) -> None:
    """Guesses of one model are compared with the text of another; with the model's own text nothing changes."""
    model, prompts = random_model(16), random_prompts(6, 17)
    own = consistency.jacobi_decode(model, prompts, 20, 4)
    again = consistency.jacobi_decode(model, prompts, 20, 4, own.token_ids)
    assert again.outputs(20) == own.outputs(20)
    assert torch.equal(again.drafts, own.drafts)
    assert torch.equal(again.lengths, own.lengths)
    texts = consistency.jacobi_decode(random_model(18), prompts, 20, 1)
    forced = consistency.jacobi_decode(model, prompts, 20, 4, texts.token_ids)
    assert forced.outputs(20) == texts.outputs(20) != own.outputs(20)
    for row in range(len(prompts)):
        for certain, draft, accepted in zip(
            forced.lengths[:, row].tolist(),
            forced.drafts[:, row].tolist(),
            forced.accepted[:, row].tolist(),
            strict=True,
        ):
            if certain < 0 or certain + accepted >= len(prompts[row]) + 20:
                continue
            expected = texts.token_ids[row, certain : certain + 4].tolist()
            assert draft[:accepted] == expected[:accepted]
            assert accepted == 4 or draft[accepted] != expected[accepted]


def test_consistency_loss_row_by_row(consistency: ModuleType) -> None:
    model, first, prompts = random_model(19), random_model(20), [[prompt[0]] * 4 for prompt in random_prompts(3, 21)]
    packed = consistency.pack(
        consistency.states_of(consistency.jacobi_decode(first, prompts, 16, 5), 20), 40, np.random.default_rng(22)
    )
    with torch.no_grad():
        teacher = first(packed.token_ids[:, :20]).logits
        student = model.lm_head(consistency.hidden_states(model, packed.token_ids, packed.positions, packed.mask))
        loss, right, divergence = consistency.consistency_loss(
            model, packed.token_ids, packed.positions, packed.mask, packed.depths, teacher, 2.0, 0.7
        )
    total = weight = same = count = 0.0
    for row in range(3):
        for column in range(40):
            depth = int(packed.depths[row, column])
            if depth < 0:
                continue
            goal = teacher[row, int(packed.positions[row, 20 + column])]
            logits = student[row, 20 + column]
            total += 0.7**depth * float(functional.cross_entropy(logits, torch.softmax(2 * goal, -1)))
            weight += 0.7**depth
            same += float(goal.argmax() == logits.argmax())
            count += 1
    assert float(loss) == pytest.approx(total / weight, rel=1e-4)
    assert float(right) == pytest.approx(same / count)
    expected = functional.kl_div(
        torch.log_softmax(student[:, :20], -1), torch.log_softmax(teacher, -1), reduction="none", log_target=True
    )
    assert float(divergence) == pytest.approx(float(expected.sum(-1).mean()), rel=1e-4)


def test_windows_are_those_of_the_proposer(consistency: ModuleType) -> None:
    model, prompts, window = random_model(3), random_prompts(5, 4), 6
    run = consistency.jacobi_decode(model, prompts, 24, window)
    names = [f"r{row}" for row in range(len(prompts))]
    proposer = JacobiProposer(ProposerContext(VOCAB, window))
    texts = run.token_ids.tolist()
    proposer.observe(
        Verified(names, [[] for _ in names], [[text[len(p)]] for text, p in zip(texts, prompts, strict=True)], [1] * 5)
    )
    for lengths, drafts, accepted in zip(run.lengths.tolist(), run.drafts.tolist(), run.accepted.tolist(), strict=True):
        for row, name in enumerate(names):
            if lengths[row] < 0:
                continue
            context = texts[row][: lengths[row]]
            batch = DraftBatch.from_contexts([context], max_draft_tokens=window, request_ids=[name])
            assert proposer.propose(batch).token_ids[0].tolist() == drafts[row]
            with torch.no_grad():
                logits = model(torch.tensor([context + drafts[row]])).logits[0, -window - 1 :]
            target = logits.argmax(-1).tolist()
            proposer.observe(Verified([name], [drafts[row]], [target], [accepted[row] + 1]))


def test_fills_are_those_of_the_proposer(consistency: ModuleType) -> None:
    generator = np.random.default_rng(5)
    token_ids = torch.from_numpy(generator.integers(0, VOCAB, size=(40, 60)))
    lengths = torch.from_numpy(generator.integers(1, 60, size=40))
    filled = consistency.fills(token_ids, lengths, 9)
    for row, length in enumerate(lengths.tolist()):
        context = token_ids[row, :length].numpy().astype(np.int32)
        assert filled[row].tolist() == [fill_token(context, length + depth, False) for depth in range(9)]


def test_a_packed_window_sees_its_text_and_itself(consistency: ModuleType) -> None:
    model, prompts = random_model(6), [prompt[:1] * 4 for prompt in random_prompts(3, 6)]
    run = consistency.jacobi_decode(model, prompts, 16, 5)
    states = consistency.states_of(run, 20)
    assert all(states_of_text.windows for states_of_text in states)
    packed = consistency.pack(states, 33, np.random.default_rng(7))
    with torch.no_grad():
        found = model.lm_head(consistency.hidden_states(model, packed.token_ids, packed.positions, packed.mask))
        num_checked = 0
        for row, text in enumerate(packed.token_ids[:, :20].tolist()):
            torch.testing.assert_close(found[row, :20], model(torch.tensor([text])).logits[0], atol=1e-4, rtol=1e-4)
            for column in range(33):
                depth = int(packed.depths[row, column])
                if depth < 0:
                    continue
                window = packed.token_ids[row, 20 + column - depth : 21 + column].tolist()
                anchor = int(packed.positions[row, 20 + column]) - depth - 1
                # The first token of a window was a wrong guess.
                assert window[0] != text[anchor + 1]
                plain = model(torch.tensor([text[: anchor + 1] + window])).logits[0, -1]
                torch.testing.assert_close(found[row, 20 + column], plain, atol=1e-4, rtol=1e-4)
                num_checked += 1
        assert num_checked > 50


def test_no_window_learns_from_beyond_the_text(consistency: ModuleType) -> None:
    run = consistency.jacobi_decode(random_model(8), random_prompts(4, 8), 12, 7)
    for states, length in zip(consistency.states_of(run, 10), [10] * 4, strict=True):
        for anchor, window in zip(states.anchors, states.windows, strict=True):
            assert 0 <= anchor < anchor + len(window) <= length - 1


def test_shared_gradients_are_those_of_the_whole(consistency: ModuleType) -> None:
    model = random_model(9)
    text = torch.randint(0, VOCAB, (4, 12))

    def loss_of(part: torch.Tensor) -> tuple[torch.Tensor, list[float]]:
        loss, _ = consistency.real_text_loss(model, part, torch.zeros(*part.shape, VOCAB))
        return loss, [loss.item()]

    workers = consistency.Workers(2)
    for _ in range(2):  # one part after the other, then both at once
        figures = workers.backward(model, loss_of, text.chunk(2))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            whole, _ = consistency.real_text_loss(model, text, torch.zeros(4, 12, VOCAB))
        expected = torch.autograd.grad(whole, list(model.parameters()))
        assert figures[0] == pytest.approx(whole.item(), abs=1e-2)
        for parameter, gradient in zip(model.parameters(), expected, strict=True):
            # bfloat16 keeps 8 bits, and the two halves are rounded before they are added.
            torch.testing.assert_close(parameter.grad, gradient, atol=0.05 * float(gradient.abs().max()), rtol=0.05)


def test_sampled_writing_repeats_with_its_seeds(distillation: ModuleType) -> None:
    model, prompts = random_model(10, 0.1), random_prompts(4, 11)
    seeds = np.random.default_rng(12).integers(0, 2**31, size=(4, 15))
    written = distillation.write(model, prompts, 15, seeds).tolist()
    assert written == [plainly_decoded(model, p, 15, seeds[row]) for row, p in enumerate(prompts)]
    assert distillation.write(model, prompts, 15, None).tolist() == [plainly_decoded(model, p, 15) for p in prompts]


@pytest.mark.parametrize("num_draft_tokens", [1, 3, 8])
def test_emitted_per_step_equals_counting_steps(distillation: ModuleType, num_draft_tokens: int) -> None:
    agrees = np.random.default_rng(num_draft_tokens).random((7, 40)) < 0.6
    steps = 0
    for row in agrees.tolist():
        left = list(row)
        while left:
            draft = left[:num_draft_tokens]
            accepted = draft.index(False) if False in draft else len(draft)
            left = left[accepted + 1 :]
            steps += 1
    assert distillation.emitted_per_step(agrees, num_draft_tokens) == pytest.approx(agrees.size / steps)
    assert distillation.emitted_per_step(np.array([[True, True, False, False]]), 1) == pytest.approx(4 / 3)


def test_agreement_lies_between_its_bounds(distillation: ModuleType) -> None:
    target, other = random_model(13), random_model(14)
    texts = distillation.Texts([[int(t) for t in row] for row in torch.randint(0, VOCAB, (20, 40))], 30)
    seeds = np.random.default_rng(15).integers(0, 2**31, size=(20, 30))
    same = distillation.agreement(target, target, texts, seeds)
    assert all(float(values.mean()) == pytest.approx(float(name != "kl"), abs=1e-9) for name, values in same.items())
    apart = distillation.agreement(target, other, texts, seeds)
    assert apart["kl"].min() > 0
    # 600 draws: three standard errors are 0.06.
    assert apart["guaranteed"].mean() - 0.06 < apart["coupled"].mean() < apart["bound"].mean() + 0.06
    with torch.no_grad():
        row = torch.tensor([texts.token_ids[3][:-1]])
        probs = [torch.softmax(model(row).logits[0, -30:].double(), -1) for model in (target, other)]
    np.testing.assert_allclose(apart["bound"][3], torch.minimum(*probs).sum(-1).numpy(), atol=1e-6)


def run_program(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """Run the program's ``main`` on little text."""
    common = ["--tokens", "20000", "--stdlib-only", "--held-out-tokens", "1100", "--no-compile", "--cpu-clock"]
    monkeypatch.setattr(sys, "argv", [str(module.__file__), *arguments, *common])
    module.main()


def check_saved(folder: Path, like: Path) -> None:
    """Check that weights have the names, shapes and types of the shipped ones, and other values."""
    saved, shipped = load_file(folder / "model.safetensors"), load_file(like / "model.safetensors")
    assert {n: (t.shape, t.dtype) for n, t in saved.items()} == {n: (t.shape, t.dtype) for n, t in shipped.items()}
    assert any(not torch.equal(tensor, shipped[name]) for name, tensor in saved.items())
    assert json.loads((folder / "config.json").read_text()) == json.loads((like / "config.json").read_text())
    assert (folder / "tokenizer.json").read_bytes() == (like / "tokenizer.json").read_bytes()


def test_consistency_training_runs(
    consistency: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"PROMPT_TOKENS": 12, "OUTPUT_TOKENS": 8, "COLLECT_ROWS": 4, "CONTEXT": 64}.items():
        monkeypatch.setattr(consistency, name, value)
    small = ["--prompts", "2", "--max-tokens", "6", "--room", "16", "--rows", "2", "--real-rows", "2"]
    run_program(consistency, monkeypatch, "--out", str(tmp_path), "--minutes", "0.001", *small)
    check_saved(tmp_path, target_path())
    report = json.loads((tmp_path / "consistency.json").read_text())
    assert report["training"]["steps"] == 1
    assert set(report["tokens_per_forward"]) == {"8", "16"}
    assert report["held_out_loss"]["after"] != report["held_out_loss"]["before"]
    assert "tokens per forward, window 8" in capsys.readouterr().out


def test_distillation_runs(
    distillation: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"PROMPT_TOKENS": 50, "CONTEXT": 64}.items():
        monkeypatch.setattr(distillation, name, value)
    small = ["--prompts", "2", "--max-tokens", "6", "--rows", "4", "--written-rows", "6"]
    run_program(distillation, monkeypatch, "--out", str(tmp_path), "--minutes", "0.001", *small)
    check_saved(tmp_path, draft_path())
    report = json.loads((tmp_path / "distillation.json").read_text())
    assert report["training"]["steps"] == 1
    assert report["training"]["tokens_written"] >= 6 * 14
    assert report["after"]["held-out loss, nats/token"] != report["before"]["held-out loss, nats/token"]
    assert "favourites agree" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--minutes", "0"], ["--threads", "3"]])
@pytest.mark.parametrize("name", ["train_consistency", "distil_draft"])
def test_refused_arguments(
    name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--out", "nowhere", *arguments])
    with pytest.raises(SystemExit):
        importlib.import_module(name).main()
    assert arguments[0] in capsys.readouterr().err
