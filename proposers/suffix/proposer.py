"""Suffix decoding: drafts from what this request and earlier ones said, after Oliaro et al., "SuffixDecoding" (2024).

Prompt and output of every request go, token by token, into one suffix automaton (:mod:`.automaton`). Each request
stands in it at the state of its own text; the links from there are its suffixes, longest first, with everything that
ever followed them, in this request or another. A draft token is what followed the longest suffix most often or last,
or what followed one of the next shorter ones, whichever is likelier to be right (:func:`.continuation_score`):
long matches are specific, short ones have seen more, the idea of prediction by partial matching (Cleary and Witten,
1984).

If the request samples and the verifier's noise is known, the continuations race with it instead:
``scale * log(occurrences) + noise`` (:mod:`vllm_specplug.samplers.noise`).

If several chains are of use, the best few continuations are proposed: a token that lost to a draft token is a branch,
and the most promising one of all is followed as if it had won (:mod:`..tree`).

The history is bounded. A tenant has two automata: one being built, and before it an older one that is only read. When
the first is full it takes the place of the second, which is forgotten.

Against the paper and its implementation: an automaton is linear in its text where a tree of bounded depth holds each
token many times over; prompts are shared, too; the match is kept from step to step instead of searched for.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_specplug.proposers.base import (
    TENANT_OPTION,
    DraftBatch,
    Drafts,
    NoiseInputs,
    Proposer,
    ProposerContext,
    kernel_input,
)
from vllm_specplug.proposers.options import check_number, check_probability, check_whole, with_defaults
from vllm_specplug.proposers.slots import SlotMap
from vllm_specplug.proposers.suffix.automaton import (
    ROOT,
    SLOT_WORDS,
    Automaton,
    extend_text,
    rehash,
)
from vllm_specplug.proposers.suffix.drafts import (
    INSERTED,
    LIMITS,
    MEMBERS,
    NUM_TOKENS,
    ROWS,
    SERIAL,
    SLOTS,
    draft_batch,
)
from vllm_specplug.proposers.suffix.history_file import HistoryFile
from vllm_specplug.proposers.suffix.tenants import Tenant
from vllm_specplug.proposers.suffix.trees import draft_trees

DEFAULT_OPTIONS: Mapping[str, int | float | str | None] = {
    "min_match": 1,
    "max_history_bytes": 256 << 20,
    "share": "all",
    "sharpness": 1.6,
    "min_confidence": 0.05,
    "history_file": None,
    "save_interval_s": 5.0,
}
"""What ``options`` may set.

min_match: no draft from a shorter match, in tokens.
max_history_bytes: most bytes that the history takes, over all tenants; a token takes about 55.
share: "all": requests of a tenant (all without one are one) draft from each other's text; "none": only from their own.
sharpness: factor of the logarithm of occurrences at temperature 1, where drafts are drawn with the target's noise; 0
    always takes the likeliest.
min_confidence: a draft ends before the token whose chance of counting (itself and all before it accepted) is below.
history_file: where finished requests are kept from one start to the next, as token ids; only the server's user may read
    it. None: nowhere.
save_interval_s: seconds between two saves, more if saving takes long; nothing is written while nothing new was said.
"""

SMALLEST_HISTORY_BYTES = 1 << 20
FILE_SHARE = 16
"""Unsaved token ids take at most 1/16 of ``max_history_bytes``."""


_Out = tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.int64], NDArray[np.int32]]
"""What kernels write: tokens and votes, confidence, number of tokens, match length."""


class SuffixProposer(Proposer):
    """Drafts from the text of all requests; for options see :data:`DEFAULT_OPTIONS`.

    Requests whose option :data:`~.base.TENANT_OPTION` differs never see each other's text. When the memory is used up
    the tenant that was used least recently forgets first, its older automaton before its newer one.

    Raises:
        ValueError: an option is unknown or out of its range, or the history file is none of ours, or of another
            vocabulary, or its folder cannot be written to.
    """

    def __init__(self, context: ProposerContext) -> None:
        super().__init__(context)
        options = with_defaults("suffix", DEFAULT_OPTIONS, context.options)
        self._min_match = check_whole("suffix", "min_match", options["min_match"])
        smallest = max(SMALLEST_HISTORY_BYTES, 4096 * context.max_num_requests)
        max_bytes = check_whole("suffix", "max_history_bytes", options["max_history_bytes"], smallest)
        if options["share"] not in ("all", "none"):
            raise ValueError(f"proposer 'suffix': share must be 'all' or 'none', not {options['share']!r}")
        self._is_private = options["share"] == "none"
        self._noise = NoiseInputs(check_number("suffix", "sharpness", options["sharpness"]))
        self._min_confidence = check_probability("suffix", "min_confidence", options["min_confidence"])
        save_interval_s = check_number("suffix", "save_interval_s", options["save_interval_s"])
        if save_interval_s == 0:
            raise ValueError("proposer 'suffix': save_interval_s must be above 0")
        history_file = options["history_file"]
        if history_file is not None and (not isinstance(history_file, (str, os.PathLike)) or not str(history_file)):
            raise ValueError(f"proposer 'suffix': history_file must be a path, not {history_file!r}")
        if history_file is not None and self._is_private:
            raise ValueError(
                "proposer 'suffix': with share 'none' nobody would read the history_file: give one of the two only"
            )
        self._max_automata_bytes = max_bytes - (max_bytes // FILE_SHARE if history_file is not None else 0)
        self._tenants: OrderedDict[tuple[str, str], Tenant] = OrderedDict()  # used least recently first
        self._reserved_bytes = 0  # of all automata: with thousands of tenants, too many to add up each time
        self._used_bytes = 0  # the same for what is in use; tenants with live requests as last counted
        self._forgetful: list[tuple[Tenant, int]] = []  # who forgets next, from the end, unless used since that step
        self._num_automata = 0
        self._clock = 0
        self._num_owners = 0
        self._slots = SlotMap()
        self._tenant_of: list[Tenant | None] = []
        self._requests: NDArray[np.int64] = np.zeros((0, 8), dtype=np.int64)
        self._nothing = Automaton.nothing()
        self._work: NDArray[np.int64] = np.zeros((5, 8), dtype=np.int64)
        self._has_all_members = False
        self._token_ids: NDArray[np.int32] | None = None
        self._contexts: NDArray[np.int32] = kernel_input(np.zeros((0, 0)), np.int32)
        self._file: HistoryFile | None = None
        self._num_loaded = 0
        if history_file is not None:
            self._file = HistoryFile(Path(history_file), context.vocab_size, max_bytes // FILE_SHARE, save_interval_s)
            for name, tokens in self._file.load():
                tenant = self._tenant((name, ""))
                self._clock += 1
                self._use(tenant)
                self._insert_text(tenant, tokens)
                self._count(tenant)
                self._num_loaded += len(tokens)
            self._file.start()

    # -- Tenants and memory ------------------------------------------------------------------------------------------

    def _new_id(self) -> int:
        self._num_automata += 1
        return self._num_automata

    def _tenant(self, key: tuple[str, str]) -> Tenant:
        tenant = self._tenants.get(key)
        if tenant is None:
            tenant = Tenant(key, Automaton(), None, self._new_id(), last_used=self._clock)
            self._reserved_bytes += tenant.new.reserved_bytes()
            self._tenants[key] = tenant
            while self._reserved_bytes > self._max_automata_bytes and self._forget(tenant):
                pass
        return tenant

    def _use(self, tenant: Tenant) -> None:
        tenant.last_used = self._clock
        self._tenants.move_to_end(tenant.key)

    def _forget(self, but: Tenant) -> bool:
        """Drop the older or the only automaton of the tenant used least recently; False if all are dropped."""
        tenant = self._next_to_forget(but)
        if tenant is None:
            return False
        if tenant.old is not None:
            self._reserved_bytes -= tenant.old.reserved_bytes()
            tenant.old = None
            tenant.old_id = 0
        elif tenant.num_requests == 0:
            self._reserved_bytes -= tenant.new.reserved_bytes()
            del self._tenants[tenant.key]
        else:
            self._reserved_bytes += Automaton.smallest_bytes() - tenant.new.reserved_bytes()
            tenant.new = Automaton()
            tenant.new_id = self._new_id()
        self._count(tenant)
        return True

    def _next_to_forget(self, but: Tenant) -> Tenant | None:
        """The tenant used least recently, of those used in the same step the largest; None if nobody can forget."""
        for is_new in (False, True):
            if is_new:  # when it is used up only: with hundreds of live tenants, looking at all each time takes long
                self._forgetful = self._used_least_recently(but)
            while self._forgetful:
                tenant, last_used = self._forgetful.pop()
                if tenant is not but and tenant.last_used == last_used and self._can_forget(tenant):
                    return tenant
        return None

    def _used_least_recently(self, but: Tenant) -> list[tuple[Tenant, int]]:
        """Tenants that can forget and were last used in the same step, with its number; the largest last."""
        found: list[Tenant] = []
        for tenant in self._tenants.values():
            if found and tenant.last_used > found[0].last_used:
                break
            if tenant is not but and self._can_forget(tenant):
                found.append(tenant)
        return [(tenant, tenant.last_used) for tenant in sorted(found, key=Tenant.reserved_bytes)]

    def _can_forget(self, tenant: Tenant) -> bool:
        if tenant.num_requests and tenant.old is None:
            return tenant.new.reserved_bytes() > Automaton.smallest_bytes()
        return self._tenants.get(tenant.key) is tenant

    def _count(self, tenant: Tenant) -> None:
        """Count anew what a tenant's automata use; nothing if it was dropped."""
        num_bytes = tenant.num_bytes() if tenant.key in self._tenants else 0
        self._used_bytes += num_bytes - tenant.counted_bytes
        tenant.counted_bytes = num_bytes

    def _make_room(self, tenant: Tenant) -> None:
        """Room in the automaton of ``tenant`` that is full: it grows, others forget, or it becomes the older one."""
        share = self._max_automata_bytes // 2
        while True:
            before = tenant.new.reserved_bytes()
            left = self._max_automata_bytes - self._reserved_bytes + before
            if tenant.new.grow(min(share, left)):
                self._reserved_bytes += tenant.new.reserved_bytes() - before
                return
            if left >= share or not self._forget(tenant):
                break
        if tenant.old is not None:
            self._reserved_bytes -= tenant.old.reserved_bytes()
        tenant.old = tenant.new
        tenant.new = Automaton()
        self._reserved_bytes += tenant.new.reserved_bytes()
        tenant.new_id, tenant.old_id = self._new_id(), tenant.new_id

    def _insert_text(self, tenant: Tenant, tokens: NDArray[np.int32]) -> None:
        """A whole text at once."""
        self._num_owners += 1
        last, done = ROOT, 0
        tokens = kernel_input(tokens, np.int32)
        while True:
            new = tenant.new
            last, count = extend_text(
                new.states, new.edges, new.table, new.sizes, last, tokens[done:], self._num_owners & 0x7FFFFFFF
            )
            done += count
            if done == len(tokens):
                return
            self._make_room(tenant)
            if tenant.new is not new:
                last = ROOT

    # -- Requests ----------------------------------------------------------------------------------------------------

    def _enter(self, batch: DraftBatch) -> NDArray[np.int64]:
        """Slots of the batch's requests; those that are new get a serial number and a tenant."""
        new = self._slots.new(batch.request_ids)
        slots = self._slots.enter(batch.request_ids)
        if new:
            num_more = self._slots.num_slots - len(self._requests)
            if num_more > 0:
                self._requests = np.concatenate([self._requests, np.zeros((num_more, 8), dtype=np.int64)])
                self._tenant_of += [None] * num_more
            for index in new:
                options = batch.options[index] if batch.options else {}
                self._start(int(slots[index]), batch.request_ids[index], options)
        return slots

    def _start(self, slot: int, request_id: str, options: Mapping[str, Any]) -> None:
        self._num_owners += 1
        self._requests[slot] = 0
        self._requests[slot, SERIAL] = self._num_owners & 0x7FFFFFFF
        tenant = self._tenant((str(options.get(TENANT_OPTION, "")), request_id if self._is_private else ""))
        tenant.num_requests += 1
        self._tenant_of[slot] = tenant

    def _groups(self, slots: NDArray[np.int64]) -> list[tuple[Tenant, list[int]]]:
        """The tenants of a batch and the places in it of their requests."""
        members: dict[tuple[str, str], list[int]] = {}
        for index, slot in enumerate(slots.tolist()):
            tenant = self._tenant_of[slot]
            assert tenant is not None
            members.setdefault(tenant.key, []).append(index)
        return [(self._tenants[key], indices) for key, indices in members.items()]

    # -- The protocol ------------------------------------------------------------------------------------------------

    def propose(self, batch: DraftBatch) -> Drafts:
        return self._run(batch, max(batch.max_draft_tokens.tolist(), default=0))

    def follow(self, batch: DraftBatch) -> None:
        self._run(batch, 0)

    def _run(self, batch: DraftBatch, width: int) -> Drafts:
        """Insert what is new, and draft up to ``width`` tokens."""
        # Runs in every step, so every microsecond counts: as few calls of numpy as possible.
        num_requests = len(batch.request_ids)
        if batch.num_chains > 1 and num_requests > 0 and width > 0:
            return self._run_trees(batch, width)
        tokens_votes: NDArray[np.int32] = np.zeros((2, num_requests, width), dtype=np.int32)
        drafts = Drafts(
            token_ids=tokens_votes[0],
            num_tokens=np.zeros(num_requests, dtype=np.int64),
            confidence=np.zeros((num_requests, width), dtype=np.float32),
            match_length=np.zeros(num_requests, dtype=np.int32),
            votes=tokens_votes[1],
        )
        if num_requests > 0:
            assert drafts.match_length is not None
            out = (tokens_votes, drafts.confidence, drafts.num_tokens, drafts.match_length)
            self._fill(batch, width, draft_batch, out)
        return drafts

    def _run_trees(self, batch: DraftBatch, width: int) -> Drafts:
        """Insert what is new, and draft the best few continuations."""
        num_chains, num_requests = batch.num_chains, len(batch.request_ids)
        tokens_votes: NDArray[np.int32] = np.zeros((2, num_chains, num_requests, width), dtype=np.int32)
        confidence: NDArray[np.float32] = np.zeros((num_chains, num_requests, width), dtype=np.float32)
        num_tokens: NDArray[np.int64] = np.zeros((num_chains, num_requests), dtype=np.int64)
        match_length: NDArray[np.int32] = np.zeros(num_requests, dtype=np.int32)
        self._fill(batch, width, draft_trees, (tokens_votes, confidence, num_tokens, match_length))
        tokens, votes = tokens_votes
        first, *others = (
            Drafts(tokens[chain], num_tokens[chain], confidence[chain], match_length, votes[chain])
            for chain in range(num_chains)
            if chain == 0 or num_tokens[chain].any()
        )
        first.others = tuple(others)
        return first

    def _fill(self, batch: DraftBatch, width: int, kernel: Any, out: _Out) -> None:
        """Let the kernel follow and draft, tenant by tenant."""
        num_requests = len(batch.request_ids)
        slots = self._enter(batch)
        if self._file is not None:
            self._record(batch, slots, self._file)
        noise = self._noise.of(batch, width)
        if batch.token_ids is not self._token_ids:
            self._contexts = kernel_input(batch.token_ids, np.int32)
            # Kept only if it is a view: a copy would not see the next tokens.
            self._token_ids = batch.token_ids if np.may_share_memory(self._contexts, batch.token_ids) else None
        if self._work.shape[1] < num_requests:
            self._work = np.zeros((5, 2 * num_requests), dtype=np.int64)
            self._has_all_members = False
        work = self._work
        work[ROWS, :num_requests] = batch.rows
        work[NUM_TOKENS, :num_requests] = batch.num_tokens
        work[LIMITS, :num_requests] = batch.max_draft_tokens
        work[SLOTS, :num_requests] = slots
        self._clock += 1
        if len(self._tenants) == 1:
            if not self._has_all_members:
                work[MEMBERS] = np.arange(work.shape[1])
                self._has_all_members = True
            (tenant,) = self._tenants.values()
            tenant.last_used = self._clock
            self._run_tenant(tenant, num_requests, noise, kernel, out)
            return
        groups = self._groups(slots)
        self._has_all_members = False
        for tenant, _ in groups:
            self._use(tenant)
        for tenant, members in groups:
            work[MEMBERS, : len(members)] = members
            self._run_tenant(tenant, len(members), noise, kernel, out)

    def _run_tenant(
        self,
        tenant: Tenant,
        num_members: int,
        noise: tuple[int, NDArray[np.uint64], NDArray[np.float64]],
        kernel: Any,
        out: _Out,
    ) -> None:
        done = 0
        while True:
            new, old = tenant.new, tenant.old or self._nothing
            done = kernel(
                new.states, new.edges, new.table, new.sizes, old.states, old.edges, old.table, self._contexts,
                self._requests, self._work, num_members, done, tenant.new_id, tenant.old_id, self._min_match,
                self.context.vocab_size, self._min_confidence, *noise, *out,
            )  # fmt: skip
            if done == num_members:
                return
            self._make_room(tenant)
            if tenant.new is not new:
                done = 0  # those that were done stand in what is the older automaton by now

    def _record(self, batch: DraftBatch, slots: NDArray[np.int64], file: HistoryFile) -> None:
        """Copies of the tokens that are about to be inserted, for the history file."""
        for index, request_id in enumerate(batch.request_ids):
            tenant = self._tenant_of[slots[index]]
            assert tenant is not None
            file.record(request_id, tenant.key[0], batch.context(index), int(self._requests[slots[index], INSERTED]))

    def finish(self, request_ids: Sequence[str]) -> None:
        for slot in self._slots.free(request_ids):
            tenant = self._tenant_of[slot]
            assert tenant is not None
            tenant.num_requests -= 1
            if self._is_private:
                self._reserved_bytes -= tenant.reserved_bytes()
                del self._tenants[tenant.key]
            self._count(tenant)
            self._tenant_of[slot] = None
        if self._file is not None:
            for request_id in request_ids:
                self._file.finish(request_id)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def warm_up(self) -> None:
        # A proposer of its own, so that nothing of this stays in the history: texts that need every kind of growth.
        context = self.context
        other = SuffixProposer(
            ProposerContext(max(context.vocab_size, 64), 2, max_num_requests=1, options={"share": "none"})
        )
        rng = np.random.default_rng(0)
        text = rng.integers(0, 32, size=64, dtype=np.int32)
        other._insert_text(other._tenant(("", "warm-up")), text)
        batch = DraftBatch.from_contexts([text], 2, ["warm-up"])
        other.propose(batch)
        other.propose(replace(batch, num_chains=2))
        rehash(np.zeros((2, SLOT_WORDS), dtype=np.int32), np.zeros((4, SLOT_WORDS), dtype=np.int32))

    def memory_bytes(self) -> int:
        """Bytes of the history and of the state of requests, finished texts that wait to be saved included."""
        for tenant in {id(tenant): tenant for tenant in self._tenant_of if tenant is not None}.values():
            self._count(tenant)
        return self._used_bytes + self._requests.nbytes + (self._file.num_bytes() if self._file is not None else 0)

    def describe(self) -> str:
        who = "its own text" if self._is_private else "the text of all requests"
        words = f"continuations in {who}, {self._max_automata_bytes >> 20} MiB of it"
        if self._file is not None:
            words += f"; {self._num_loaded:,} tokens from {self._file.path}"
        return words
