"""Searches the proposers, the draft length and the stores that are fastest on one's own prompts.

The search makes one choice at a time, by :data:`STAGE_ROUNDS` rounds of a bench: the draft length first, then the
stores, then the proposers. In the final the best few configurations of all stages run against each other and against no
speculation, for several rounds. Speed-ups that differ by less than :data:`NOTHING_BETWEEN` count as equal: then the
configuration with fewer stores wins, and among these the one that was tried first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from vllm_specplug.measure.bench.run import Options, Progress, bench

OFF = "off"
NOTHING_BETWEEN = 0.02
"""Relative difference below which two speed-ups count as equal."""

DRAFT_LENGTHS = (3, 6, 12)
NUM_FINALISTS = 3
STAGE_ROUNDS = 2
"""Rounds of every stage before the final: other work on the machine can halve the speed of one round."""

Config = Mapping[str, Any]
Trial = Callable[[str, Mapping[str, Config | None], int], dict[str, Any]]
"""Function of (name of the stage, configurations by name, number of rounds) that returns a result of ``bench``."""


def config_of(k: int, stores: Sequence[str], proposers: Sequence[str] | None = None) -> dict[str, Any]:
    """A ``speculative_config``; ``proposers`` None: the default ones."""
    config: dict[str, Any] = {"method": "specplug", "num_speculative_tokens": k}
    if proposers is not None:
        config["proposers"] = list(proposers)
    if stores and (proposers is None or "rest" in proposers):
        config["datastore"] = stores[0] if len(stores) == 1 else list(stores)
    return config


def lengths(stores: Sequence[str], draft_lengths: Sequence[int]) -> dict[str, Config]:
    """Configurations by name: the default proposers with every draft length."""
    return {f"k={k}": config_of(k, stores) for k in draft_lengths}


def store_choices(k: int, stores: Sequence[str]) -> dict[str, Config]:
    """Configurations by name: every store alone, and no store. All stores together are in the stage before."""
    alone = {f"store {path}": config_of(k, [path]) for path in stores} if len(stores) > 1 else {}
    return {**alone, "no store": config_of(k, [])} if stores else {}


def proposer_choices(k: int, stores: Sequence[str]) -> dict[str, Config]:
    """Configurations by name: sets of proposers other than the default."""
    sets = [["suffix"], ["ngram"], ["suffix", "ngram"], ["suffix", "ngram", "lookahead", "recycling"]]
    if stores:
        sets = [["suffix"], ["rest"], ["suffix", "rest"], ["suffix", "ngram", "rest"]]
        sets.append(["suffix", "ngram", "lookahead", "recycling", "rest"])
    return {"+".join(names): config_of(k, stores, names) for names in sets}


def stores_of(config: Config | None) -> list[str]:
    """Paths of the token stores in a configuration."""
    stores = (config or {}).get("datastore")
    return [stores] if isinstance(stores, str) else list(stores or ())


def best(speed_ups: Mapping[str, float], configs: Mapping[str, Config | None]) -> str:
    """Name of the fastest; of equally fast ones, that with the fewest stores, and of these the first."""
    most = max(speed_ups.values())
    good = [name for name, value in speed_ups.items() if value >= most * (1 - NOTHING_BETWEEN)]
    return min(good, key=lambda name: len(stores_of(configs[name])))


def tune(
    trial: Trial, stores: Sequence[str], draft_lengths: Sequence[int] = DRAFT_LENGTHS, rounds: int = 3
) -> dict[str, Any]:
    """Search the fastest configuration.

    Args:
        trial: runs configurations; the first one is always without speculation.
        stores: paths of token stores; may be empty.
        draft_lengths: draft lengths to try.
        rounds: number of rounds in the final.

    Returns:
        ``name`` and ``speculative_config`` of the winner (None: speculation does not pay here), ``expected`` (the
        winner's numbers in the final), ``stages`` (the results of all stages) and ``final``.
    """
    configs: dict[str, Config | None] = {OFF: None}
    seen: dict[str, float] = {}
    stages: list[dict[str, Any]] = []

    def stage(name: str, choices: Mapping[str, Config]) -> dict[str, float]:
        configs.update(choices)
        result = trial(name, {OFF: None, **choices}, STAGE_ROUNDS)
        speed_ups = {choice: result["configs"][choice]["speed_up"] for choice in choices if choice in result["configs"]}
        seen.update(speed_ups)
        stages.append({"stage": name, **result})
        return speed_ups

    ups = stage("draft length", lengths(stores, draft_lengths))
    if not ups:
        return _chosen(OFF, None, stages, stages[-1])
    winner = best(ups, configs)
    k = int((configs[winner] or {})["num_speculative_tokens"])
    kept = list(stores)
    if choices := store_choices(k, stores):
        winner = best({winner: seen[winner], **stage("store", choices)}, configs)
        kept = stores_of(configs[winner])
    stage("proposers", proposer_choices(k, kept))
    ranked = sorted(seen, key=lambda name: -seen[name])[:NUM_FINALISTS]
    finalists = [OFF, *(name for name in seen if name in ranked)]
    final = trial("final", {name: configs[name] for name in finalists}, rounds)
    ups = {name: final["configs"][name]["speed_up"] for name in finalists if name in final["configs"]}
    winner = best(ups, configs)
    return _chosen(winner, configs[winner], stages, final)


def _chosen(name: str, config: Config | None, stages: list[dict[str, Any]], final: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "speculative_config": None if config is None else dict(config),
        "expected": final["configs"][name],
        "stages": stages,
        "final": final,
    }


def trial_of(options: Options, progress: Progress) -> Trial:
    """A trial with these options, except for their configurations and rounds."""

    def run(stage: str, configs: Mapping[str, Config | None], rounds: int) -> dict[str, Any]:
        def shown(name: str, share: float, status: str) -> None:
            progress(f"{stage}: {name}", share, status)

        return bench(replace(options, configs=configs, repeats=rounds), shown)

    return run


def rows(result: Mapping[str, Any]) -> Iterator[list[str]]:
    """Table of all configurations of all stages, its heading row first."""
    yield ["stage", "configuration", "speed-up", "tokens/s", "emitted/step", "acceptance"]
    for stage in [*result["stages"], {"stage": "final", **result["final"]}]:
        for name, numbers in stage["configs"].items():
            acceptance = numbers["acceptance"]
            yield [
                stage["stage"],
                name,
                f"{numbers['speed_up']:.2f}x",
                f"{numbers['tokens_per_s']:,.1f}",
                f"{numbers['emitted_per_step']:.2f}",
                "-" if acceptance is None else f"{acceptance:.1%}",
            ]
