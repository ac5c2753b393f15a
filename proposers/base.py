"""The interface of proposers: their input, their answers, and their base class. numpy only; knows no vLLM.

Words: *draft* tokens are guesses for the next output tokens of a request; the verifier *accepts* a prefix of them and
adds one more token of its own; accepted tokens and that one are the *emitted* tokens of the step.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

TENANT_OPTION = "specplug_tenant"
"""Request option: name of the tenant whose history this request reads and writes; "" is the shared history."""

STORES_OPTION = "specplug_datastore"
"""Request option: names of the stores to consult, as a tuple; absent: all of them."""


@dataclass(frozen=True, slots=True)
class ProposerContext:
    """Sizes, stores and options that a proposer gets at construction; they never change.

    Attributes:
        vocab_size: number of token ids that the target model can emit.
        num_speculative_tokens: longest draft of a request.
        max_num_requests: most requests in one batch.
        max_model_len: most tokens (prompt + output) of one request.
        datastores: path of each token store by its name, in the order of the configuration.
        options: the proposer's own options, as in the configuration.
    """

    vocab_size: int
    num_speculative_tokens: int
    max_num_requests: int = 256
    max_model_len: int = 4096
    datastores: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TargetNoise:
    """The noise with which the verifier will draw the next tokens of each request.

    Pass ``kind``, a key and a token id to :func:`vllm_specplug.samplers.noise.noise_of`. Noise helps proposers that
    have weights for several candidates: see :func:`~vllm_specplug.samplers.noise.noisy_score`.

    Attributes:
        kind: the hash that vLLM uses, a constant of :mod:`vllm_specplug.samplers.noise`.
        keys: ``[num_requests, max_draft_tokens]`` uint64: key of each coming token; column 0 is the first draft token.
            Rows of greedy requests are not filled.
        temperature: ``[num_requests]`` float32; 0 for greedy requests, which have no noise.
    """

    kind: int
    keys: NDArray[np.uint64]
    temperature: NDArray[np.float32]

    def scales(self, sharpness: float) -> NDArray[np.float64]:
        """Factor of a proposer's log weights, ``[num_requests]``: sharpness over temperature squared, 0 if greedy.

        Dividing by the temperature once would be right if a proposer's frequencies were the target's at temperature 1.
        In measurements they are flatter than the target at low temperatures: with votes of a store, a scale of 1.6 is
        best at temperature 1, 2 at 0.8 and 6 at 0.5 (benchmarks/target_noise.py).
        """
        sampling = self.temperature > 0
        return np.where(sampling, sharpness / np.where(sampling, self.temperature, 1.0) ** 2, 0.0)


@dataclass(frozen=True, slots=True)
class DraftBatch:
    """The requests that want a draft in this step. All arrays are read-only for the proposer.

    Attributes:
        request_ids: ``[num_requests]``, stable for the life of a request.
        token_ids: ``[num_rows, max_model_len]`` int32, the engine's table of token ids; a proposer that does not come
            with this package gets a copy of its requests' rows. Row ``rows[i]`` holds request ``i``'s prompt and
            emitted tokens, the last one at column ``num_tokens[i] - 1``; later columns are garbage.
        rows: ``[num_requests]`` int64, table row of each request.
        num_tokens: ``[num_requests]`` int64, prompt and emitted tokens so far.
        num_prompt_tokens: ``[num_requests]`` int64, prompt tokens.
        max_draft_tokens: ``[num_requests]`` int64, longest draft that can help the request (at least 1).
        options: ``[num_requests]``, each request's own ``extra_args``.
        noise: the noise of the coming tokens; None if the verifier's is not known (every request then counts as
            greedy).
        num_chains: most chains of a request, the main chain included: see ``Drafts.others``.
    """

    request_ids: Sequence[str]
    token_ids: NDArray[np.int32]
    rows: NDArray[np.int64]
    num_tokens: NDArray[np.int64]
    num_prompt_tokens: NDArray[np.int64]
    max_draft_tokens: NDArray[np.int64]
    options: Sequence[Mapping[str, Any]] = ()
    noise: TargetNoise | None = None
    num_chains: int = 1

    def __len__(self) -> int:
        return len(self.request_ids)

    def context(self, index: int) -> NDArray[np.int32]:
        """Request ``index``'s tokens so far, ``[num_tokens[index]]`` int32, as a view."""
        return self.token_ids[self.rows[index], : self.num_tokens[index]]

    def subset(self, indices: Sequence[int]) -> DraftBatch:
        """The batch for the requests at ``indices`` only, in that order."""
        at = np.asarray(indices, dtype=np.int64)
        noise = self.noise
        if noise is not None:
            noise = TargetNoise(noise.kind, noise.keys[at], noise.temperature[at])
        return DraftBatch(
            request_ids=[self.request_ids[index] for index in indices],
            token_ids=self.token_ids,
            rows=self.rows[at],
            num_tokens=self.num_tokens[at],
            num_prompt_tokens=self.num_prompt_tokens[at],
            max_draft_tokens=self.max_draft_tokens[at],
            options=[self.options[index] for index in indices] if self.options else (),
            noise=noise,
            num_chains=self.num_chains,
        )

    def noise_inputs(self, sharpness: float) -> tuple[int, NDArray[np.uint64], NDArray[np.float64]]:
        """Arguments with which a compiled kernel draws with the target's noise: kind, keys and scales of log weights.

        Args:
            sharpness: factor of the proposer's log weights at temperature 1.

        Returns:
            ``kind``, ``keys`` (``[num_requests, max_draft_tokens]`` uint64) and ``scales`` (``[num_requests]`` float64,
            0 for greedy requests); without noise kind 0 and scales of 0. All arrays as :func:`kernel_input` makes them.
        """
        noise = self.noise
        if noise is None:
            keys = np.zeros((len(self), int(self.max_draft_tokens.max(initial=0))), dtype=np.uint64)
            return 0, kernel_input(keys, np.uint64), kernel_input(np.zeros(len(self)), np.float64)
        return noise.kind, kernel_input(noise.keys, np.uint64), kernel_input(noise.scales(sharpness), np.float64)

    @classmethod
    def from_contexts(
        cls,
        contexts: Sequence[Sequence[int] | NDArray[np.integer[Any]]],
        max_draft_tokens: int,
        request_ids: Sequence[str] | None = None,
    ) -> DraftBatch:
        """A batch of plain token lists, for tests, benchmarks and use without an engine."""
        lengths = np.array([len(c) for c in contexts], dtype=np.int64)
        table = np.zeros((len(contexts), int(lengths.max(initial=1))), dtype=np.int32)
        for row, context in zip(table, contexts, strict=True):
            row[: len(context)] = context
        return cls(
            request_ids=request_ids or [str(i) for i in range(len(contexts))],
            token_ids=table,
            rows=np.arange(len(contexts), dtype=np.int64),
            num_tokens=lengths,
            num_prompt_tokens=lengths.copy(),
            max_draft_tokens=np.full(len(contexts), max_draft_tokens, dtype=np.int64),
            options=[{} for _ in contexts],
        )


@dataclass(slots=True)
class Drafts:
    """One draft per request. Plain lists of token ids get :attr:`DEFAULT_CONFIDENCE`.

    Attributes:
        token_ids: ``[num_requests, max_tokens]`` int32; columns from ``num_tokens[i]`` on are ignored.
        num_tokens: ``[num_requests]`` int64; 0 if there is nothing to propose.
        confidence: ``[num_requests, max_tokens]`` float32 in [0, 1]: estimated chance that a draft token is accepted
            given that all before it are. It decides between proposers, never about correctness.
        match_length: ``[num_requests]`` int32, length of the context match that the draft follows; None if the proposer
            does not match. The ensemble uses it to weigh drafts.
        votes: ``[num_requests, max_tokens]`` int32, occurrences that chose each draft token; None if there are
            no votes.
        others: side chains, best first, at most ``batch.num_chains - 1``: each is a Drafts for the same
            requests, whose drafts may share first tokens with earlier chains (as paths of a tree), but differ from
            them. Side chains are verified beside the main chain if that pays.
    """

    DEFAULT_CONFIDENCE: ClassVar[float] = 0.5

    token_ids: NDArray[np.int32]
    num_tokens: NDArray[np.int64]
    confidence: NDArray[np.float32]
    match_length: NDArray[np.int32] | None = None
    votes: NDArray[np.int32] | None = None
    others: tuple[Drafts, ...] = ()

    @classmethod
    def empty(cls, num_requests: int, max_tokens: int) -> Drafts:
        """Empty drafts with room for ``max_tokens`` tokens per request."""
        return cls(
            token_ids=np.zeros((num_requests, max_tokens), dtype=np.int32),
            num_tokens=np.zeros(num_requests, dtype=np.int64),
            confidence=np.zeros((num_requests, max_tokens), dtype=np.float32),
        )

    @classmethod
    def from_lists(cls, token_ids: Sequence[Sequence[int]], confidence: float = DEFAULT_CONFIDENCE) -> Drafts:
        """Drafts from plain lists of token ids, one per request, all with the same confidence."""
        drafts = cls.empty(len(token_ids), max(map(len, token_ids), default=0))
        for index, tokens in enumerate(token_ids):
            drafts.token_ids[index, : len(tokens)] = tokens
            drafts.num_tokens[index] = len(tokens)
        drafts.confidence[:] = confidence
        return drafts

    def kernel_inputs(self) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
        """The five arrays as :func:`kernel_input` makes them; ``match_length`` or ``votes`` of None have length 0."""
        return (
            kernel_input(self.token_ids, np.int32),
            kernel_input(self.num_tokens, np.int64),
            kernel_input(self.confidence, np.float32),
            _NO_MATCH if self.match_length is None else kernel_input(self.match_length, np.int32),
            _NO_VOTES if self.votes is None else kernel_input(self.votes, np.int32),
        )


@dataclass(slots=True)
class Verified:
    """Result of verification in one step, with one entry per request that emitted tokens.

    Attributes:
        request_ids: ``[num_requests]`` request ids.
        draft_token_ids: the draft that was verified, ``[num_requests]`` lists (empty: an ordinary step). With side
            chains, the chain with the most accepted tokens.
        target_token_ids: the target's tokens, ``[num_requests]`` lists. The first ``num_emitted`` of them were emitted.
            If the verifier drew all positions at once, the tokens behind them follow: the target's choice after the
            rejected draft tokens, up to one more than the draft is long.
        num_emitted: ``[num_requests]``, accepted draft tokens plus one.
        num_unsettled: requests in the step that emitted nothing, since their prompts are not complete.
        further: chains of each request that were verified beside ``draft_token_ids``, ``[num_requests]`` lists of
            lists of tokens; empty if no request had any.
    """

    request_ids: list[str]
    draft_token_ids: list[list[int]]
    target_token_ids: list[list[int]]
    num_emitted: list[int]
    num_unsettled: int = 0
    further: list[list[list[int]]] = field(default_factory=list)


@dataclass
class StoreStats:
    """Counters of one token store.

    Attributes:
        tokens: number of tokens in the store.
        bytes: size of the store's file.
        lookups: drafts that were looked up in the store.
        hits: lookups that had a draft as their result.
    """

    tokens: int = 0
    bytes: int = 0
    lookups: int = 0
    hits: int = 0


class Proposer(abc.ABC):
    """Guesses the next tokens of a batch of requests.

    Subclass, implement :meth:`propose`, and name the class in ``"proposers"``. A proposer may be wrong, slow or raise:
    the engine's output stays the same, token for token. A proposer that raises, or does not answer in time, is logged,
    counted and left out from then on.

    State is keyed by request id. A request appears in :meth:`propose` when it has emitted its first token, may pause
    (preemption) and resume with the same tokens, and ends when :meth:`finish` names it.
    """

    def __init__(self, context: ProposerContext) -> None:
        self.context = context

    @abc.abstractmethod
    def propose(self, batch: DraftBatch) -> Drafts | Sequence[Sequence[int]]:
        """Up to ``batch.max_draft_tokens[i]`` token ids for each request, as :class:`Drafts` or plain lists."""

    def observe(self, verified: Verified) -> None:  # noqa: B027 - an optional hook, empty on purpose
        """Learn from a verified step. Called once per step, before :meth:`propose`; not while proposers rest."""

    def follow(self, batch: DraftBatch) -> None:  # noqa: B027 - an optional hook, empty on purpose
        """Read new tokens without drafting. Called in some steps, instead of :meth:`propose`, while proposers rest."""

    def finish(self, request_ids: Sequence[str]) -> None:  # noqa: B027 - an optional hook, empty on purpose
        """Drop the state of these requests, which ended or were aborted."""

    def close(self) -> None:  # noqa: B027 - an optional hook, empty on purpose
        """Save what must outlive the engine. Called when the engine shuts down in an orderly way."""

    def warm_up(self) -> None:  # noqa: B027 - an optional hook, empty on purpose
        """Compile, map files, touch memory. Called once before the first request."""

    def memory_bytes(self) -> int:
        """Bytes of the current state about requests, for the counters."""
        return 0

    def store_stats(self) -> Mapping[str, StoreStats]:
        """Counters of the proposer's token stores, by name."""
        return {}

    def held_stores(self) -> Mapping[str, Any]:
        """The token stores in use, by name; each has a ``version``, see :meth:`open_stores`."""
        return {}

    def open_stores(self) -> Mapping[str, Any]:
        """Open new versions of the token stores; the stores in use stay in use.

        Called in a separate thread while drafting goes on, and may take long.

        Returns:
            The new versions of stores that were replaced on disk, by name, for :meth:`take_stores`. Each has a
            ``version``, a string that is equal in all processes for equal content.

        Raises:
            ValueError: a new version cannot be used.
        """
        return {}

    def take_stores(self, stores: Mapping[str, Any]) -> None:  # noqa: B027 - an optional hook, empty on purpose
        """Draft from ``stores``, opened by :meth:`open_stores`, from the next call on."""

    def describe(self) -> str:
        """A few words for the start-up line, such as the store's size."""
        return ""


def read_only(array: NDArray[Any]) -> NDArray[Any]:
    """A read-only view: proposers must not write to the engine's arrays."""
    view = array.view()
    view.flags.writeable = False
    return view


def kernel_input(array: NDArray[Any], dtype: type[np.generic]) -> NDArray[Any]:
    """A read-only, contiguous view of ``array`` (a copy only if it has another dtype or layout).

    Kernels are compiled anew for each kind of array, writable or not, contiguous or not. With this function they only
    get the kind that ``warm_up`` compiles them for.
    """
    view = np.ascontiguousarray(array, dtype=dtype).view()
    view.setflags(write=False)
    return view


_NO_MATCH = kernel_input(np.zeros(0), np.int32)
_NO_VOTES = kernel_input(np.zeros((0, 0)), np.int32)


class NoiseInputs:
    """Calls :meth:`DraftBatch.noise_inputs` for successive batches; without noise it reuses its own arrays.

    Args:
        sharpness: factor of the proposer's log weights at temperature 1.
    """

    def __init__(self, sharpness: float) -> None:
        self._sharpness = sharpness
        self._no_keys = kernel_input(np.zeros((0, 0)), np.uint64)
        self._no_scales = kernel_input(np.zeros(0), np.float64)

    def of(self, batch: DraftBatch, width: int) -> tuple[int, NDArray[np.uint64], NDArray[np.float64]]:
        """Kind, keys (``[at least num_requests, at least width]``) and scales (``[at least num_requests]``).

        Args:
            batch: the batch.
            width: longest draft of the batch; with 0 nothing is drafted, and the noise is left out.
        """
        if batch.noise is not None and width > 0:
            return batch.noise_inputs(self._sharpness)
        num_requests = len(batch)
        if len(self._no_scales) < num_requests or self._no_keys.shape[1] < width:
            shape = max(num_requests, len(self._no_scales)), max(width, self._no_keys.shape[1])
            self._no_keys = kernel_input(np.zeros(shape), np.uint64)
            self._no_scales = kernel_input(np.zeros(shape[0]), np.float64)
        return 0, self._no_keys, self._no_scales
