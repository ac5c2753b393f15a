"""Proposers, logits processors and functions that tests run inside the engine's process."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vllm_specplug.proposers import DraftBatch, Drafts, Proposer, ProposerContext, Verified
from vllm_specplug.samplers.noise import noise_of


class RandomTokens(Proposer):
    """Drafts uniformly random tokens of random length, which are nearly always wrong."""

    def __init__(self, context: ProposerContext) -> None:
        super().__init__(context)
        self._random = np.random.default_rng(1)

    def propose(self, batch: DraftBatch) -> list[list[int]]:
        return [
            self._random.integers(0, self.context.vocab_size, self._random.integers(0, limit + 1)).tolist()
            for limit in batch.max_draft_tokens
        ]


class Oracle(Proposer):
    """Drafts the true continuation. Option ``sequences``: JSON file with lists of prompt and output token ids."""

    def __init__(self, context: ProposerContext) -> None:
        super().__init__(context)
        with open(context.options["sequences"]) as file:
            self._sequences: list[list[int]] = json.load(file)
        self._matching: dict[str, list[list[int]]] = {}

    def propose(self, batch: DraftBatch) -> list[list[int]]:
        drafts = []
        for index, request_id in enumerate(batch.request_ids):
            context = batch.context(index).tolist()
            candidates = self._matching.get(request_id, self._sequences)
            length = len(context)
            candidates = [s for s in candidates if s[:length] == context]
            self._matching[request_id] = candidates
            drafts.append(candidates[0][length : length + batch.max_draft_tokens[index]] if candidates else [])
        return drafts

    def finish(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self._matching.pop(request_id, None)


class SeveralChains(Oracle):
    """Drafts several chains, of the kinds in option ``kinds``.

    ``oracle``: the true continuation. ``wrong``: one token repeated. ``corrupted``: the true continuation with one
    random token changed. ``late``: the true continuation with its last token but one changed. ``short``: its first
    half.

    Option ``leave_out``: indices of sequences that get no drafts. ``counted`` has sums over steps: ``true`` tokens at
    the beginning of the best chain, how many of these were ``accepted``, steps that ``missed`` some of them, and side
    chains that were verified (``forks``).
    """

    def __init__(self, context: ProposerContext) -> None:
        super().__init__(context)
        self._random = np.random.default_rng(3)
        self._best: dict[str, int] = {}
        self._left_out = {tuple(self._sequences[place]) for place in context.options.get("leave_out", ())}
        self.counted = {"true": 0, "accepted": 0, "missed": 0, "forks": 0}
        # Some true token was not accepted: missed if the request goes on, which shows one proposal later.
        self._short: set[str] = set()
        self._short_before: set[str] = set()

    def propose(self, batch: DraftBatch) -> Drafts:
        self.counted["missed"] += len(self._short_before.intersection(batch.request_ids))
        self._short_before, self._short = self._short, set()
        true = super().propose(batch)
        for index, request_id in enumerate(batch.request_ids):
            if any(tuple(each) in self._left_out for each in self._matching[request_id]):
                true[index] = []
        answers = []
        self._best.clear()
        for kind in self.context.options["kinds"][: batch.num_chains]:
            rows = [
                self._make(kind, each, int(limit)) for each, limit in zip(true, batch.max_draft_tokens, strict=True)
            ]
            for request_id, row, each in zip(batch.request_ids, rows, true, strict=True):
                right = next((at for at, (a, b) in enumerate(zip(row, each, strict=False)) if a != b), len(each))
                self._best[request_id] = max(min(right, len(row)), self._best.get(request_id, 0))
            answers.append(Drafts.from_lists(rows))
        answers[0].others = tuple(answers[1:])
        return answers[0]

    def _make(self, kind: str, true: list[int], limit: int) -> list[int]:
        if not true:
            return []
        full = (true + [5] * limit)[:limit]
        if kind == "wrong":
            return [5] * limit
        if kind == "short":
            return full[: max(limit // 2, 1)]
        at = limit - 2 if kind == "late" else int(self._random.integers(0, limit + 1))
        if kind in ("corrupted", "late") and 0 <= at < limit:
            full[at] = (full[at] + 1) % self.context.vocab_size
        return full

    def observe(self, verified: Verified) -> None:
        for index, request_id in enumerate(verified.request_ids):
            if verified.draft_token_ids[index] and request_id in self._best:
                best = self._best.pop(request_id)
                accepted = verified.num_emitted[index] - 1
                if accepted < best:  # the draft token that ends a request is the last one emitted
                    best = accepted = verified.num_emitted[index]
                    self._short.add(request_id)
                self.counted["true"] += best
                self.counted["accepted"] += min(accepted, best)
                self.counted["forks"] += len(verified.further[index]) if verified.further else 0


class RandomChains(RandomTokens):
    """Drafts several chains of uniformly random tokens."""

    def propose(self, batch: DraftBatch) -> Drafts:  # type: ignore[override]
        answers = [Drafts.from_lists(super(RandomChains, self).propose(batch)) for _ in range(batch.num_chains)]
        answers[0].others = tuple(answers[1:])
        return answers[0]


class NoiseAlone(Proposer):
    """Drafts the token with the largest noise among those in the request's option ``allowed``."""

    def propose(self, batch: DraftBatch) -> list[list[int]]:
        noise = batch.noise
        assert noise is not None
        return [
            [
                max(batch.options[index]["allowed"], key=lambda token: noise_of(noise.kind, key, token))
                for key in noise.keys[index, :limit]
            ]
            for index, limit in enumerate(batch.max_draft_tokens.tolist())
        ]


class Raises(RandomTokens):
    """Drafts twice, then raises."""

    calls = 0

    def propose(self, batch: DraftBatch) -> list[list[int]]:
        self.calls += 1
        if self.calls > 2:
            raise RuntimeError("broken on purpose")
        return super().propose(batch)


class OutsideVocabulary(Proposer):
    def propose(self, batch: DraftBatch) -> list[list[int]]:
        return [[5, self.context.vocab_size + 7, -3, 2**31 - 1] for _ in batch.request_ids]


class TooMany(Proposer):
    def propose(self, batch: DraftBatch) -> list[list[int]]:
        return [[7] * 500 for _ in batch.request_ids]


class WrongShape(Proposer):
    def propose(self, batch: DraftBatch) -> Drafts:
        return Drafts.from_lists([[1, 2]] * (len(batch) + 3))


class Floats(Proposer):
    def propose(self, batch: DraftBatch) -> Drafts:
        drafts = Drafts.from_lists([[1, 2]] * len(batch))
        drafts.token_ids = drafts.token_ids.astype(np.float32)  # type: ignore[assignment]
        return drafts


class WritesTable(Proposer):
    """Tries to write to the engine's table of token ids."""

    def propose(self, batch: DraftBatch) -> list[list[int]]:
        batch.context(0)[:] = 7
        return [[7] for _ in batch.request_ids]


class Sleeps(RandomTokens):
    def propose(self, batch: DraftBatch) -> list[list[int]]:
        time.sleep(0.02)
        return super().propose(batch)


def save_tiny_window_model(child: Any, folder: str, tokenizer: str) -> None:
    """Save a model of layers with and without sliding windows, with random weights so large that context matters."""
    import shutil

    from transformers import Gemma2Config, Gemma2ForCausalLM

    vocab_size = json.loads((Path(tokenizer) / "config.json").read_text())["vocab_size"]
    config = Gemma2Config(
        vocab_size=vocab_size, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, sliding_window=24, max_position_embeddings=512, query_pre_attn_scalar=32,
        attn_logit_softcapping=None, final_logit_softcapping=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "proj" in name:
                weight.mul_(12.0)
    model.save_pretrained(folder)
    for path in Path(tokenizer).glob("tokenizer*"):
        shutil.copy(path, folder)


def make_no_repeat_processor() -> Any:
    """A custom logits processor for vLLM that forbids a request's last output token to come again."""
    from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

    class NoRepeat(AdapterLogitsProcessor):  # type: ignore[misc]
        def is_argmax_invariant(self) -> bool:
            return False

        def new_req_logits_processor(self, params: Any) -> Any:
            if not (params.extra_args or {}).get("no_repeat"):
                return None

            def forbid_last(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
                if output_ids:
                    logits[output_ids[-1]] = float("-inf")
                return logits

            return forbid_last

    return NoRepeat


def __getattr__(name: str) -> Any:
    if name == "NoRepeat":
        return make_no_repeat_processor()
    if name == "InverseCdf":
        sys.path.append(str(Path(__file__).parents[2] / "examples"))
        from my_sampler import InverseCdf

        return InverseCdf
    raise AttributeError(name)


def command(child: Any, arguments: list[str]) -> tuple[int, str]:
    """Run a ``specplug`` command, at most once per process; returns its exit status and its output to stderr."""
    from vllm_specplug.cli import main

    sys.argv = ["specplug", *arguments]
    written = io.StringIO()
    with contextlib.redirect_stderr(written), contextlib.redirect_stdout(sys.stderr):
        try:
            main()
        except SystemExit as ended:
            return int(ended.code or 0), written.getvalue()
    return 0, written.getvalue()


def config_error(child: Any, speculative_config: dict[str, Any], engine_args: dict[str, Any]) -> str:
    """Type and message of the error when vLLM builds a configuration; "" if there is none.

    Args:
        child: the child.
        speculative_config: that of the engine; empty: no speculation.
        engine_args: all other arguments of the engine.
    """
    from vllm.engine.arg_utils import EngineArgs

    try:
        EngineArgs(speculative_config=speculative_config or None, **engine_args).create_engine_config()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def error_with_hashable_config(child: Any, speculative_config: dict[str, Any], engine_args: dict[str, Any]) -> str:
    """:func:`config_error` with an ``additional_config`` that is not a dictionary."""

    class Hashable:
        def compute_hash(self) -> str:
            return "0"

    return config_error(child, speculative_config, {**engine_args, "additional_config": Hashable()})


def accepted_config(child: Any, engine_args: dict[str, Any]) -> tuple[dict[str, Any], str, int]:
    """The plugin's settings, the drafter and the draft length in the configuration that vLLM builds."""
    from vllm.engine.arg_utils import EngineArgs

    config = EngineArgs(**engine_args).create_engine_config()
    speculative = config.speculative_config
    return config.additional_config["specplug"], speculative.model, speculative.num_speculative_tokens


def request_error(child: Any, engine_args: dict[str, Any], extra_args: dict[str, Any]) -> str:
    """Type and message of the error for a request to an engine of this configuration; "" if there is none."""
    from vllm import SamplingParams
    from vllm.engine.arg_utils import EngineArgs

    config = EngineArgs(**engine_args).create_engine_config().speculative_config
    try:
        SamplingParams(extra_args=extra_args)._validate_spec_decode(config)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def chosen_runner(child: Any, engine_args: dict[str, Any]) -> tuple[list[str], bool, bool]:
    """Features of a configuration that V2 lacks, whether vLLM chooses V2 by itself, and whether it schedules async."""
    from vllm.engine.arg_utils import EngineArgs

    keep_async_scheduling(child)
    os.environ.pop("VLLM_USE_V2_MODEL_RUNNER", None)
    config = EngineArgs(**engine_args).create_engine_config()
    return (
        config._get_v2_model_runner_unsupported_features(),
        config.use_v2_model_runner,
        config.scheduler_config.async_scheduling,
    )


def _seam_targets() -> dict[str, Any]:
    """The current object of every seam, by module and name."""
    import importlib
    import inspect

    from vllm_specplug.hooks import seam_list

    targets = {}
    for seam in (*seam_list.PROCESS_SEAMS, *seam_list.V1_SEAMS, *seam_list.V2_SEAMS):
        owner: Any = importlib.import_module(seam.module)
        *path, attribute = seam.name.split(".")
        for part in path:
            owner = getattr(owner, part)
        targets[f"{seam.module}.{seam.name}"] = inspect.getattr_static(owner, attribute)
    return targets


def undone_seams(child: Any) -> tuple[int, int, int]:
    """Numbers of seams, of seams that registration wraps, and of seams that are not restored afterwards."""
    from vllm_specplug import plugin
    from vllm_specplug.hooks.v1 import wrappers
    from vllm_specplug.hooks.v2 import wrappers as v2

    plugin.unregister()
    before = _seam_targets()
    for _ in range(2):
        plugin.register()
        wrappers.install()
        v2.install()
    during = _seam_targets()
    plugin.unregister()
    after = _seam_targets()
    plugin.register()
    return (
        len(before),
        sum(during[name] is not original for name, original in before.items()),
        sum(after[name] is not original for name, original in before.items()),
    )


def unsupported(child: Any, kind: str, requests: list[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    """Register the plugin with a vLLM that it does not support, then build a configuration for every pair of arguments.

    Args:
        child: the child.
        kind: ``version`` (an unknown version number) or ``signature`` (a wrapped function has other parameters).
        requests: pairs of ``speculative_config`` and engine arguments.
    """
    import vllm
    from vllm.sampling_params import SamplingParams

    from vllm_specplug import plugin

    plugin.unregister()
    version, original = vllm.__version__, SamplingParams._validate_spec_decode
    if kind == "version":
        vllm.__version__ = "0.99.0"
    else:
        SamplingParams._validate_spec_decode = lambda self, another: None
    before = _seam_targets()
    try:
        plugin.register()
        plugin.register()
        changed = [name for name, was in before.items() if _seam_targets()[name] is not was]
        return {"changed": changed, "errors": [config_error(child, *request) for request in requests]}
    finally:
        plugin.unregister()
        vllm.__version__, SamplingParams._validate_spec_decode = version, original
        plugin.register()


def target_logits(child: Any, prompt: str) -> np.ndarray[Any, Any]:
    """The engine's target logits ``[vocab]`` after ``prompt``."""
    from vllm import SamplingParams

    output = child.llm.generate([prompt], SamplingParams(max_tokens=1, temperature=0.0, logprobs=4096), use_tqdm=False)
    entries = output[0].outputs[0].logprobs[0]
    logits = np.full(4096, -np.inf, dtype=np.float32)
    for token, entry in entries.items():
        logits[token] = entry.logprob
    return logits


def first_tokens(
    child: Any, verifier: str, logits: np.ndarray[Any, Any], draft: int, draws: int, temperature: float
) -> np.ndarray[Any, Any]:
    """``[vocab]`` counts of first emitted tokens over ``draws`` unseeded requests, all with the draft ``[draft]``.

    Args:
        child: the child.
        verifier: ``gumbel``, ``minhash``, ``list`` (ours; ``list`` with three chains), ``rejection`` (vLLM's, with our
            repair) or ``stock`` (vLLM's without the plugin).
        logits: ``[vocab]`` target logits of every logits row.
        draft: the draft token.
        draws: number of requests.
        temperature: temperature of every request.
    """
    from types import SimpleNamespace

    from vllm.v1.sample import rejection_sampler as stock_module
    from vllm.v1.sample.logits_processor import LogitsProcessors
    from vllm.v1.sample.metadata import SamplingMetadata
    from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

    from vllm_specplug.hooks.v1 import wrappers
    from vllm_specplug.hooks.v1.step import Steps
    from vllm_specplug.hooks.v1.verifier import CoupledVerifier, ObservedRejection
    from vllm_specplug.settings.model import parse_settings

    runner = child.runner
    batch = 500
    counts = np.zeros(len(logits), dtype=np.int64)
    request_ids = [f"virtual-{i}" for i in range(batch)]
    # Verifier, sampler and kernels are real; only the runner's bookkeeping of requests is replaced.
    stand_in = SimpleNamespace(
        device=runner.device,
        sampler=runner.sampler,
        rejection_sampler=None,
        input_batch=SimpleNamespace(req_ids=request_ids, num_reqs=batch, greedy_reqs=set()),
        requests={i: SimpleNamespace(generator=None, output_token_ids=[]) for i in request_ids},
        discard_request_mask=SimpleNamespace(np=np.zeros(batch, dtype=bool)),
    )
    steps, observe = Steps(), lambda verified: None
    plain = stock_module.RejectionSampler(runner.sampler)
    verify: Any
    if verifier == "stock":
        verify = plain
        wrappers.patches.undo()
    else:
        several = {"num_chains": 3} if verifier == "list" else {}
        settings = parse_settings({"sampler": verifier, "proposers": [], **several})
        if settings.is_coupled:
            verify = CoupledVerifier(stand_in, settings, steps, None, observe)  # type: ignore[arg-type]
        else:
            verify = ObservedRejection(stand_in, plain, steps, observe)
    rows = torch.from_numpy(logits).repeat(2 * batch, 1)
    params = SamplingMetadata(
        temperature=torch.full((batch,), temperature),
        all_greedy=False, all_random=True, top_p=None, top_k=None, generators={}, max_num_logprobs=None,
        no_penalties=True, prompt_token_ids=None,
        frequency_penalties=torch.zeros(batch), presence_penalties=torch.zeros(batch),
        repetition_penalties=torch.ones(batch), output_token_ids=[], allowed_token_ids_mask=None,
        bad_words_token_ids={}, logitsprocs=LogitsProcessors(), spec_token_ids=[[draft]] * batch,
    )  # fmt: skip
    metadata = SpecDecodeMetadata.make_dummy([[draft]] * batch, torch.device("cpu"))
    first = torch.arange(0, 2 * batch, 2, dtype=torch.int32)
    metadata.target_logits_indices, metadata.bonus_logits_indices = first, first + 1
    try:
        for _ in range(draws // batch):
            output = verify(metadata, None, rows.clone(), params)
            counts += np.bincount(output.sampled_token_ids[:, 0].numpy(), minlength=len(logits))
    finally:
        wrappers.install()
    return counts


def keep_async_scheduling(child: Any) -> None:
    """Keep async scheduling, which vLLM's CPU platform switches off, for engines that start in this process."""
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.check_and_update_config.__func__

    def without_that(cls: Any, config: Any) -> None:
        chosen = config.scheduler_config.async_scheduling
        original(cls, config)
        config.scheduler_config.async_scheduling = chosen

    CpuPlatform.check_and_update_config = classmethod(without_that)


class Recorder(RandomTokens):
    """Drafts at random and records all reported verifications."""

    def __init__(self, context: ProposerContext) -> None:
        super().__init__(context)
        self.emitted: dict[str, list[int]] = {}
        self.steps: list[tuple[str, list[int], list[int], int]] = []
        self.behind_a_rejected_draft = 0

    def observe(self, verified: Verified) -> None:
        for request_id, draft, targets, emitted in zip(
            verified.request_ids, verified.draft_token_ids, verified.target_token_ids, verified.num_emitted, strict=True
        ):
            self.emitted.setdefault(request_id, []).extend(targets[:emitted])
            self.steps.append((request_id, list(draft), list(targets), emitted))
            assert emitted <= len(targets) <= len(draft) + 1
            assert draft[: emitted - 1] == targets[: emitted - 1]
            self.behind_a_rejected_draft += len(targets) - emitted


def record_verified(child: Any) -> None:
    """Record all verifications from now on, without drafting: for vLLM's own drafters."""
    drafting = child.drafter.drafting
    observe = drafting.observe
    child.recorder = Recorder(drafting.context)

    def observe_and_record(verified: Verified) -> None:
        child.recorder.observe(verified)
        observe(verified)

    drafting.observe = observe_and_record


def metrics_page(child: Any) -> str:
    """What the process answers on ``/metrics``, of vLLM's and ours."""
    from prometheus_client import REGISTRY, generate_latest

    return generate_latest(REGISTRY).decode()


def proposer_of(child: Any, name: str) -> Any:
    """The proposer of ours in the running engine, when it has seen all steps."""
    guest = child.drafter.drafting._proposers[name]
    guest.counted()  # carries out what waits
    return guest.room.proposer


def recorded(child: Any) -> dict[str, Any]:
    """The records of the running engine's :class:`Recorder`."""
    recorder = getattr(child, "recorder", None) or proposer_of(child, "in_child.Recorder")
    return {
        "emitted": recorder.emitted,
        "steps": recorder.steps,
        "behind_a_rejected_draft": recorder.behind_a_rejected_draft,
    }


def verify_in_chunks_of(child: Any, num_rows: int) -> None:
    """Let vLLM verify only ``num_rows`` logits rows at a time, as with a very large vocabulary, and count the calls."""
    from vllm.v1.worker.gpu.spec_decode import rejection_sampler

    original = rejection_sampler._iter_request_chunks
    child.num_chunked = 0

    def counting(*args: Any) -> Any:
        child.num_chunked += 1
        return original(*args)

    rejection_sampler.get_max_chunk_logits = lambda vocab_size: num_rows
    rejection_sampler._iter_request_chunks = counting


def num_chunked_verifications(child: Any) -> int:
    return int(child.num_chunked)


def draft_on_device(child: Any, store: str | None) -> None:
    """Let ``rest`` draft on the device of the running V2 engine from now on; with None, draft on the host again."""
    from vllm_specplug.hooks.v2.on_device import DeviceDrafting

    speculator = child.drafter
    speculator._on_device = None
    if store is not None:
        context = replace(speculator.drafting.context, datastores={"store": store}, options={})
        speculator._on_device = DeviceDrafting(context, speculator.device, speculator._req_states)
        speculator._on_device.warm_up()


def held_bytes(child: Any) -> int:
    """Bytes of all objects of this project that can be reached from the plugin's drafter on the runner.

    The size of the process would tell nothing: vLLM and the allocator make it vary by tens of megabytes.
    """
    from collections import deque
    from collections.abc import Mapping

    drafter = child.drafter
    waiting: list[Any] = [drafter.drafting, drafter._requests, drafter.verifier._noise]
    seen: set[int] = set()
    total = 0
    while waiting:
        item = waiting.pop()
        if id(item) in seen or type(item).__name__ == "Automaton":  # another test checks the bound of the history
            continue
        seen.add(id(item))
        total += item.nbytes if isinstance(item, np.ndarray) else sys.getsizeof(item)
        if isinstance(item, Mapping):
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple | set | frozenset | deque):
            waiting += item
        elif type(item).__module__.startswith(("vllm_specplug", "in_child")):
            waiting += [getattr(item, name) for name in getattr(type(item), "__slots__", ()) if hasattr(item, name)]
            waiting += vars(item).values() if hasattr(item, "__dict__") else []
    return total


def abort_half_way(child: Any, prompts: list[str], max_tokens: int, steps: int) -> int:
    """Start requests, run ``steps`` steps, abort all requests; returns how many were still running."""
    from vllm import SamplingParams

    engine = child.llm.llm_engine
    ids = [f"to be aborted {index}" for index in range(len(prompts))]
    for request_id, prompt in zip(ids, prompts, strict=True):
        params = SamplingParams(temperature=0.8, seed=1, max_tokens=max_tokens, ignore_eos=True)
        engine.add_request(request_id, prompt, params)
    for _ in range(steps):
        engine.step()
    running = engine.get_num_unfinished_requests()
    engine.abort_request(ids)
    while engine.has_unfinished_requests():
        engine.step()
    return int(running)


def sessions(child: Any, sent: list[dict[str, Any]]) -> list[list[list[list[int]]]]:
    """Streaming-input sessions side by side: what each emitted, by turn and step.

    Args:
        child: the child.
        sent: per session ``turns``, token ids of each turn's prompt, and ``params`` of all its turns.
    """
    from child import build_params

    engine = child.llm.llm_engine
    for number, session in enumerate(sent):
        for turn in [*session["turns"], None]:  # None: there is no more input
            engine.engine_core.add_request(
                engine.input_processor.process_inputs(
                    f"session {number}",
                    {"prompt_token_ids": turn or [0]},
                    build_params(session),
                    engine.get_supported_tasks(),
                    resumable=turn is not None,
                )
            )
    emitted: list[list[list[list[int]]]] = [[[]] for _ in sent]
    while any(len(turns) <= len(session["turns"]) for turns, session in zip(emitted, sent, strict=True)):
        for output in engine.engine_core.get_output().outputs:
            turns = emitted[int(output.request_id.split()[1])]
            turns[-1].append(list(output.new_token_ids))
            if output.finish_reason is not None:
                turns.append([])
    return [turns[:-1] for turns in emitted]


def counted_chains(child: Any) -> dict[str, int]:
    """``counted`` of the proposer :class:`SeveralChains`."""
    return dict(proposer_of(child, "in_child.SeveralChains").counted)


def keep_logits(child: Any) -> None:
    """From now on, keep the target logits of every token that the V1 verifier draws in one call for all rows."""
    verifier = child.runner.rejection_sampler
    child.kept_logits = kept = {}
    original = getattr(verifier, "_original_at_once", verifier._at_once)
    verifier._original_at_once = original

    def keeping(metadata: Any, logits: torch.Tensor, sampling: Any, states: Any, step: Any) -> Any:
        before = logits.clone()  # the sampler works in place
        result = original(metadata, logits, sampling, states, step)
        first = 0
        for index, request_id in enumerate(child.runner.input_batch.req_ids[: len(states)]):
            rows = list(range(first, first + metadata.num_draft_tokens[index] + 1))
            first += len(rows)
            if step is not None and index in step.chains:
                rows = step.chains[index].logits_rows[result[4][index]]
            request = child.runner.requests[request_id]
            key = (tuple(request.prompt_token_ids), request.sampling_params.seed)
            for depth in range(result[2][index]):
                kept[(*key, len(request.output_token_ids) + depth)] = before[rows[depth]].numpy().copy()
        return result

    verifier._at_once = keeping


def take_logits(child: Any) -> dict[Any, np.ndarray[Any, Any]]:
    """The logits of :func:`keep_logits`: ``[vocab]`` float32 by prompt, seed and output position."""
    return child.kept_logits  # type: ignore[no-any-return]


def keep_logits_v2(child: Any) -> None:
    """:func:`keep_logits` for the V2 runner and any sampler."""
    runner = child.runner
    child.kept_logits = kept = {}
    if "sample" in runner.__dict__:
        del runner.sample, runner.model.compute_logits
    sample, compute = runner.sample, runner.model.compute_logits
    latest: list[torch.Tensor] = []

    def computing(hidden_states: torch.Tensor) -> torch.Tensor:
        logits = compute(hidden_states)
        latest[:] = [logits.clone()]
        return logits

    def keeping(hidden_states: Any, input_batch: Any, grammar_output: Any) -> Any:
        first, ids = input_batch.cu_num_logits_np.copy(), list(input_batch.req_ids)
        result = sample(hidden_states, input_batch, grammar_output)
        step = child.drafter.steps.now
        chains, winners = {} if step.forks is None else step.forks.chains, step.winners
        states, seeds = runner.req_states, runner.sampler.sampling_states.seeds.np
        for row, request_id in enumerate(input_batch.req_ids):
            index, source = int(input_batch.idx_mapping_np[row]), row
            if request_id in chains and int(winners[row]):
                source = ids.index(f"specplug fork {int(winners[row])} of {request_id}")
            prompt = states.all_token_ids.gpu[index, : int(states.prompt_len.np[index])].tolist()
            for depth in range(int(result[1][row])):
                at = int(states.total_len.gpu[index]) - len(prompt) + depth
                kept[(tuple(prompt), int(seeds[index]), at)] = latest[0][int(first[source]) + depth].float().numpy()
        return result

    runner.sample, runner.model.compute_logits = keeping, computing


def break_forks(child: Any, how: str) -> None:
    """Break forks, for tests that must then fail, or mend them.

    ``stays away``: winners are not copied to their request. ``no head``: forks lack the tokens that chains share. Any
    other ``how`` mends them.
    """
    forks = child.drafter.forks
    for name in ("copy_home", "_copy_home", "_lay_out"):
        forks.__dict__.pop(name, None)
    if how == "stays away":
        forks.copy_home = forks._copy_home = lambda *_: None
    elif how == "no head":
        lay_out = forks._lay_out

        def without(*args: Any) -> Any:
            step = lay_out(*args)
            step.repeated = [(tokens[:0], slots[:0]) for tokens, slots in step.repeated]
            return step

        forks._lay_out = without


def free_blocks(child: Any) -> int:
    """Number of KV-cache blocks that no request holds."""
    child.llm.reset_prefix_cache()
    return int(_block_pool(child).get_num_free_blocks())


def scheduler_blocks(child: Any) -> int:
    """Number of KV-cache blocks of the scheduler, without block 0, which holds no request."""
    return int(_block_pool(child).num_gpu_blocks) - 1


def _block_pool(child: Any) -> Any:
    return child.llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
