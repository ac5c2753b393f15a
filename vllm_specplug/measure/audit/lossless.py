"""The audit's first question: do emitted tokens follow the target's softmax?"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vllm_specplug.engines.engine import Engine
from vllm_specplug.engines.work import Work
from vllm_specplug.errors import SpecplugError
from vllm_specplug.measure.audit import places as named
from vllm_specplug.measure.audit import statistics
from vllm_specplug.measure.audit.asked import NEAR_TIE, NEAR_TIE_ELSEWHERE, Options, Progress, Row, num_in_flight
from vllm_specplug.measure.audit.contexts import Context

BIAS = 0.01
"""Share of rejected draft tokens that the imagined wrong verifier accepts, to show that it would be caught."""


def ask_lossless(
    engine: Engine,
    options: Options,
    contexts: Sequence[Context],
    about: Mapping[str, Any],
    tokenizer: Any,
    progress: Progress,
) -> dict[str, Any]:
    """Draw tokens at all contexts and test them.

    Args:
        engine: the audited engine.
        options: options of the audit.
        contexts: contexts to draw at.
        about: the answer of ``AuditExtension.audit_about``.
        tokenizer: tokenizer of the model.
        progress: called as the draws go on.

    Returns:
        Plain types: the verdict (None: the question cannot be asked, and why), tests and numbers of every place.

    Raises:
        SpecplugError: the engine does not verify the drafts that it gets.
    """
    if about["async_scheduling"] and about["runner"] == "V1":
        return {
            "passed": None,
            "why": "on the V1 runner drafts cannot be planted under async scheduling; add --no-async-scheduling",
        }
    bound = NEAR_TIE.get(about["dtype"], NEAR_TIE_ELSEWHERE)
    k = about["num_speculative_tokens"]
    at_once = num_in_flight(about)
    hypotheses: list[statistics.Hypothesis] = []
    imagined: list[statistics.Hypothesis] = []
    biased: list[str] = []
    shown, wrong_rows, unreached, redrawn = [], [], [], False

    def spell(token: int) -> str:
        return f"token {token} ({tokenizer.decode([token])!r})"

    for nth, context in enumerate(contexts):
        places, redrawn = _drawn(engine, options, context, k, at_once, nth, len(contexts), progress)
        unreached += [
            f"context {nth + 1}, {name}"
            for name in named.names_of(k, redrawn)
            if name not in places or not places[name]["counts"].sum()
        ]
        for name, record in places.items():
            where = f"context {nth + 1}, {name}"
            probs = statistics.softmax(record["row"], options.temperature)
            accepted = None if record["accept_chance"] is None else (record["accepted"], record["accept_chance"])
            tests = statistics.hypotheses_of(where, record["counts"], probs, accepted, spell)
            if record["missing"]:
                seen = f"{record['missing']:,} times no token was emitted where one had to be"
                tests.append(statistics.Hypothesis(where, "missing", 0.0, seen))
            hypotheses += tests
            if record["accept_chance"] is not None and record["counts"].sum():
                biased.append(where)
                imagined += statistics.hypotheses_of(where, record["biased"], probs)
            place = name.partition(",")[0]
            gap = _gap(record["row"], context.rows[place]) if place in context.rows else 0.0
            if gap > bound:
                wrong_rows.append(f"{where}: logits differ by {gap:.3g} from those of an ordinary step")
            draws = int(record["counts"].sum())
            if draws:
                measured, expected = statistics.deviation(record["counts"], probs)
                shown.append(_shown(where, record, probs, tests, measured, expected, gap))
    rejected = statistics.rejected(hypotheses)
    caught = statistics.rejected(imagined)
    return {
        "passed": not rejected and not wrong_rows,
        "why": "",
        "alpha": statistics.ALPHA,
        "num_hypotheses": len(hypotheses),
        "rejected": [vars(hypothesis) for hypothesis in rejected],
        "wrong_rows": wrong_rows,
        "unreached": unreached,
        "row_bound": bound,
        "is_redrawn": redrawn,
        "places": shown,
        "power": {"bias": BIAS, "at": sorted({hypothesis.place for hypothesis in caught}), "num_places": len(biased)}
        if k
        else None,
    }


def _gap(row: Row, plain: Row) -> float:
    """Largest difference of log-probabilities, over tokens of a probability of at least 1e-4."""
    mine, theirs = (logits - logits.max() - np.log(np.exp(logits - logits.max()).sum()) for logits in (row, plain))
    matters = theirs > math.log(1e-4)
    return float(np.abs(mine - theirs)[matters].max())


def _drawn(
    engine: Engine, options: Options, context: Context, k: int, at_once: int, nth: int, total: int, progress: Progress
) -> tuple[dict[str, dict[str, Any]], bool]:
    """Draw at one context, wave after wave of requests, until there are enough draws at every stage.

    Returns:
        The sums over all waves, by the name of the place, and whether drafts were drawn from a drafter's distribution.
    """
    stages = ["no draft", "verify", "after a rejection"] if k else ["no draft"]
    missing = dict.fromkeys(stages, options.draws)
    places: dict[str, dict[str, Any]] = {}
    is_new, is_redrawn = True, False
    for wave in itertools.count():
        if not any(count > 0 for count in missing.values()):
            break
        before = dict(missing)
        plan = {
            "draws": missing,
            "temperature": options.temperature,
            "first": context.first,
            "drafts": context.drafts,
            "unlikely": context.unlikely,
            "num_accepted": context.num_accepted,
            "replacement": context.replacement,
            "bias": BIAS,
            "seed": wave * total + nth,
        }
        done = engine.complete(
            Work(
                [context.prompt] * at_once,
                context.num_accepted + 3 if k else 1,
                options.temperature,
                seed=None,
                concurrency=at_once,
                before={"audit_begin": [plan, is_new]},
                after={"audit_take": []},
            )
        ).answers["audit_take"]
        is_new, is_redrawn = False, is_redrawn or done["is_redrawn"]
        for name, record in done["places"].items():
            row = np.array(record["row"], dtype=np.float64)
            place = places.setdefault(
                name,
                {
                    "counts": np.zeros(len(row), np.int64),
                    "biased": np.zeros(len(row), np.int64),
                    "row": row,
                    "missing": 0,
                    "accepted": 0,
                    "accept_chance": record["accept_chance"],
                },
            )
            for key in ("counts", "biased"):
                pairs = np.array(record[key], dtype=np.int64).reshape(-1, 2)
                place[key][pairs[:, 0]] += pairs[:, 1]
            place["missing"] += record["missing"]
            place["accepted"] += record["accepted"]
        missing = {stage: max(0, missing[stage] - done["drawn"].get(stage, 0)) for stage in stages}
        if missing == before:
            raise SpecplugError(
                f"context {nth + 1}: none of the stages still missing ({missing}) came about; the engine does not "
                "verify drafts that are given to it. Was something else meant by this speculative_config?"
            )
        share = 1.0 - sum(missing.values()) / (len(stages) * options.draws)
        progress("draws", (nth + share) / total, f"context {nth + 1} of {total}")
    return places, is_redrawn


def _shown(
    where: str,
    record: Mapping[str, Any],
    probs: Row,
    tests: Sequence[statistics.Hypothesis],
    measured: float,
    expected: float,
    gap: float,
) -> dict[str, Any]:
    """The numbers of one place for the report's tables and plots."""
    counts = record["counts"]
    draws = int(counts.sum())
    top = np.argsort(-np.maximum(probs, counts / draws))[:200]
    return {
        "place": where,
        "draws": draws,
        "accepted": record["accepted"] / draws if record["accept_chance"] is not None else None,
        "accept_chance": record["accept_chance"],
        "deviation": measured,
        "expected_deviation": expected,
        "row_gap": gap,
        "p_values": {hypothesis.test: hypothesis.p_value for hypothesis in tests},
        "tokens": top.tolist(),
        "expected": probs[top].tolist(),
        "emitted": (counts[top] / draws).tolist(),
    }
