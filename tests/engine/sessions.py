"""Streaming-input sessions, which go on with more input behind a stop token: what is sent, and what must come back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from harness import Engine

NUM_TOKENS = 14
"""Tokens of a turn, at most."""


def made(engine: Engine, prompts: list[str], num_sessions: int) -> tuple[list[dict[str, Any]], list[list[int]]]:
    """Sessions of three turns that end at token 1, 2, 3 ... or at a repetition, and what the first turn goes on with.

    Args:
        engine: stock vLLM.
        prompts: text of the first turns.
        num_sessions: number of sessions, of which every third samples.
    """
    params: list[dict[str, Any]] = [
        {"temperature": 0.0 if at % 3 else 0.8, "seed": at, "max_tokens": NUM_TOKENS, "ignore_eos": True}
        for at in range(num_sessions)
    ]
    for each in params[::4]:  # they repeat themselves soon
        each["allowed_token_ids"] = [100, 101]
    sent = [{"prompt": prompts[at % len(prompts)], "params": params[at]} for at in range(num_sessions)]
    outputs = engine.generate(sent)
    sessions, free = [], []
    for at, output in enumerate(outputs):
        prompt, tokens = output["prompt_token_ids"], output["outputs"][0]["token_ids"]
        ends: dict[str, Any] = {"stop_token_ids": [tokens[at % (NUM_TOKENS - 2)]]}
        if at % 4 == 0:
            ends = {"repetition_detection": {"max_pattern_size": 3, "min_count": 2}}
        sessions.append({"turns": [prompt, prompt[3:9], prompt[-7:]], "params": {**params[at], **ends}})
        free.append(prompt + tokens)
    return sessions, free


def write_oracle(path: Path, sessions: list[dict[str, Any]], free: list[list[int]], turns: list[Any]) -> None:
    """Write for ``in_child.Oracle`` how all turns go on, the first one also behind its stop token."""
    sequences = list(free)
    for session, emitted in zip(sessions, turns, strict=True):
        context: list[int] = []
        for prompt, steps in zip(session["turns"], emitted, strict=True):
            tokens = [token for step in steps for token in step]
            context += prompt
            sequences.append(context + tokens)
            context = context + tokens[:-1]  # the last token of a turn is not part of the next prompt
    path.write_text(json.dumps(sequences))


def flat(turns: list[Any]) -> list[list[list[int]]]:
    """Tokens by session and turn, without the steps."""
    return [[[token for step in steps for token in step] for steps in session] for session in turns]


def check(engine: Engine, sessions: list[dict[str, Any]], expected: list[Any], is_counted: bool = True) -> None:
    """Run sessions and compare: stock's tokens, later turns drafted like the first, each returned token counted once.

    Args:
        engine: an engine that drafts what :func:`write_oracle` wrote.
        sessions: the sessions.
        expected: what stock vLLM emitted, by session, turn and step.
        is_counted: whether the runner counts exactly the tokens that are returned.
    """
    before = engine.send("stats")["emitted"]
    ours = engine.send("call", "sessions", sessions)
    assert flat(ours) == flat(expected)
    for session, turns in zip(sessions, flat(ours), strict=True):
        assert len(turns[0]) < NUM_TOKENS, "the first turn ends early"
        assert turns[0][-1] in session["params"].get("stop_token_ids", [100, 101])
    assert any(len(turns[0][-1]) > 1 for turns in ours), "an end among accepted drafts"
    for turn in range(3):
        steps = [step for session in ours for step in session[turn]]
        assert sum(map(len, steps)) > 1.1 * len(steps), f"nothing is drafted in turn {turn + 1}"
    if is_counted:
        assert engine.send("stats")["emitted"] - before == sum(map(len, (t for s in flat(ours) for t in s)))
