"""Calibrated confidence of retrieved continuations."""

from __future__ import annotations

import math

from vllm_specplug.compiled import kernel
from vllm_specplug.proposers.kernels import clamped_noise, sigmoid


@kernel
def vote_confidence(length, num_agreeing, num_votes):
    """Estimated chance that the target emits the token that ``num_agreeing`` of ``num_votes`` occurrences chose.

    A logistic regression by benchmarks/calibrate.py over 274,000 votes: 33 modules of Python's standard library, in
    tokens of a vocabulary of 4096, against a store of 10 million tokens of other Python. For 33 modules that it was not
    fitted to, the mean of each tenth of the scale is within 0.03 of the share that was right. For the held-out modules,
    where the demo and the benchmarks take prompts from, it is too high by up to 0.07 (between 0.6 and 0.7); other text,
    tokenizers and models may differ by more. What is drafted depends on it, never what is emitted.

    A draft token that was accepted lengthens the match, so deeper tokens count as those of a longer match. With 4
    matched tokens, 1 of 1 votes gives 0.30, 8 of 8 give 0.78, and 4 of 8 give 0.25.

    Args:
        length: matched tokens, at least 1, draft tokens before this one included.
    """
    log_length = math.log(length)
    log_against = math.log(1.0 + num_votes - num_agreeing)
    score = (
        -2.71 + 1.34 * log_length + 1.02 * math.log(num_agreeing) - 0.42 * log_against - 0.45 * log_length * log_against
    )
    return sigmoid(score)


@kernel
def noisy_vote_confidence(length, num_agreeing, num_votes, margin, noise):
    """:func:`vote_confidence` for a token that won the race with the target's noise.

    A token that few chose is as good a draft as a favourite where the noise is strongly for it: the target runs with
    the same noise. A logistic regression over 50,000 votes on what the tiny target wrote at temperatures 0.5, 0.8 and 1
    after prompts from the held-out modules, against a store of 10 million tokens of other Python; for the half that it
    was not fitted to, the log loss is 0.495, where :func:`vote_confidence` has 0.548.

    Args:
        length, num_agreeing, num_votes: as there.
        margin: lead of the winner's score over the second's, infinite without one.
        noise: the winner's.
    """
    log_length = math.log(length)
    log_against = math.log(1.0 + num_votes - num_agreeing)
    score = (
        -3.80
        + 1.23 * log_length
        + 0.84 * math.log(num_agreeing)
        - 0.08 * log_against
        - 0.31 * log_length * log_against
        + 0.10 * min(margin, 6.0)
        + 0.30 * clamped_noise(noise)
    )
    return sigmoid(score)


@kernel
def branch_confidence(length, num_agreeing, num_votes, num_winning):
    """:func:`vote_confidence` for a token that lost the vote.

    A logistic regression over 530,000 losers on what half of the calibration modules continue with (those of
    benchmarks/calibrate.py, with its store). For the other half the log loss is 0.1090, where :func:`vote_confidence`
    has 0.1113, and for the held-out modules 0.1025 instead of 0.1048. For the other half the mean of each twentieth of
    the scale up to 0.4 is within 0.05 of the share that was right; a loser is rarely worth more.

    With 4 matched tokens and 10 votes, 4 of them give 0.28 where 6 win, and 1 gives 0.06 where 9 win.

    Args:
        length, num_agreeing, num_votes: as there.
        num_winning: votes of the token that won.
    """
    log_length = math.log(length)
    log_against = math.log(1.0 + num_votes - num_agreeing)
    score = (
        -1.72 + 0.60 * log_length + 1.10 * math.log(num_agreeing) - 1.07 * log_against
        - 0.18 * log_length * log_against + 0.56 * math.log(num_winning)
    )  # fmt: skip
    return sigmoid(score)


@kernel
def noisy_branch_confidence(length, num_agreeing, num_votes, num_winning, noise):
    """:func:`vote_confidence` for a token that lost the race with the target's noise: below 0.3.

    A logistic regression, with that ceiling, over 375,000 losers on what the tiny target wrote at temperatures 0.5, 0.8
    and 1 after prompts from half of the held-out modules, against a store of 10 million tokens of other Python. For the
    other half the log loss is 0.0774, where :func:`noisy_vote_confidence` with a lead of 0 has 0.0853 and a regression
    without noise 0.0815; the mean of each twentieth of the scale is within 0.02 of the share that was right. By how
    much the race was lost says nothing more.

    Args:
        length, num_agreeing, num_votes, num_winning: as in :func:`branch_confidence`.
        noise: the loser's.
    """
    log_length = math.log(length)
    log_against = math.log(1.0 + num_votes - num_agreeing)
    score = (
        -1.24 + 0.95 * log_length + 1.43 * math.log(num_agreeing) - 1.01 * log_against
        - 0.27 * log_length * log_against + 0.43 * math.log(num_winning) + 0.55 * clamped_noise(noise)
    )  # fmt: skip
    return sigmoid(score, 0.3)
