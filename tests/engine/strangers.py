"""Proposers of some two hundred bad behaviours, one a class of this module, and what is to become of each.

:data:`BEHAVIOURS` says by name: ``out`` (left out), ``stays`` (its answers are cut to what is allowed, or its fault
harms nothing of the engine's), ``late`` (left out by the deadline).
"""

from __future__ import annotations

import asyncio
import ctypes
import itertools
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from vllm_specplug.proposers import DraftBatch, Drafts, Proposer
from vllm_specplug.proposers.base import StoreStats

BEHAVIOURS: dict[str, str] = {}
OPTIONS = {"plain": [1, {"deep": [2]}]}


class Stranger(Proposer):
    """Drafts two tokens, which are nearly always wrong."""

    def propose(self, batch: DraftBatch) -> Any:
        return [[7, 8]] * len(batch)


def behave(name: str, fate: str, **methods: Any) -> None:
    """Add a class with these methods to this module."""
    name = "".join(each if each.isalnum() else "_" for each in name)
    assert name not in BEHAVIOURS, name
    BEHAVIOURS[name] = fate
    globals()[name] = type(name, (Stranger,), {"__module__": __name__, **methods})


# What they raise


class OfItsOwn(BaseException):
    pass


class UnspeakableError(RuntimeError):
    def __str__(self) -> str:
        raise SystemExit(1)

    __repr__ = __str__


class MuteError(Exception):
    def __str__(self) -> Any:
        return 5

    __repr__ = __str__


def endless() -> Exception:
    first, second = RuntimeError("first"), RuntimeError("second")
    first.__cause__, second.__cause__ = second, first
    return first


def deep() -> Any:
    return deep()


RAISED: dict[str, Callable[[], BaseException]] = {
    "RuntimeError": lambda: RuntimeError("broken on purpose"),
    "SystemExit": lambda: SystemExit(3),
    "KeyboardInterrupt": KeyboardInterrupt,
    "CancelledError": asyncio.CancelledError,
    "GeneratorExit": GeneratorExit,
    "StopIteration": StopIteration,
    "MemoryError": MemoryError,
    "RecursionError": deep,
    "OfItsOwn": OfItsOwn,
    "UnspeakableError": UnspeakableError,
    "MuteError": MuteError,
    "endless": endless,
    "odd": lambda: LookupError("\ud800\x1b[31m\n[/red]{}%s"),
    "long": lambda: RuntimeError("x" * 1_000_000),
}


def raises(kind: str) -> Callable[..., Any]:
    def method(self: Any, *_: Any) -> Any:
        raise RAISED[kind]()

    return method


for _kind in RAISED:
    for _method in ("__init__", "warm_up", "describe", "propose", "observe", "finish", "memory_bytes", "store_stats"):
        behave(f"raises_{_kind}_in_{_method.strip('_')}", "out", **{_method: raises(_kind)})


# What they answer


def answers(name: str, fate: str, make: Callable[[DraftBatch], Any]) -> None:
    behave(f"answers_{name}", fate, propose=lambda self, batch: make(batch))


def drafts(batch: DraftBatch, **arrays: Any) -> Drafts:
    """Drafts with these values in the place of their arrays."""
    answer = Drafts.from_lists([[7, 8]] * len(batch))
    for name, values in arrays.items():
        setattr(answer, name, values(len(batch)) if callable(values) else values)
    return answer


class Evil:
    """Everything that is read of it raises."""

    def __getattribute__(self, name: str) -> Any:
        raise SystemExit(name)

    def __iter__(self) -> Any:
        raise KeyboardInterrupt

    __len__ = __array__ = __index__ = __int__ = __float__ = __str__ = __repr__ = __iter__  # type: ignore[assignment]


class Pretender:
    __class__ = Drafts  # type: ignore[assignment]
    others = ()


def object_array(n: int) -> Any:
    made = np.empty((n, 2), dtype=object)
    made[:] = Evil()
    return made


for _name, _answer in {
    "None": None, "5": 5, "text": "text", "bytes": b"bytes", "object": object(), "nothing": [], "a_class": Drafts,
    "Evil": Evil(), "Pretender": Pretender(), "a_function": len, "nan": float("nan"), "Ellipsis": ...,
}.items():  # fmt: skip
    answers(_name, "out", lambda batch, answer=_answer: answer)
for _name, _row in {
    "rows_of_None": None, "floats": [1.5], "texts": ["7"], "nested": [[1]], "bools": [True], "objects": [object()],
    "Evil_rows": Evil(), "Evil_tokens": [Evil()], "beyond_64_bits": [2**80], "complex": [1j], "numbers": 7,
}.items():  # fmt: skip
    answers(_name, "out", lambda batch, row=_row: [row] * len(batch))
answers("one_row_too_few", "out", lambda batch: [[7]] * (len(batch) - 1) or [])
answers("one_row_too_many", "out", lambda batch: [[7]] * (len(batch) + 1))
answers("rows_without_end", "out", lambda batch: itertools.repeat([7]))
answers("tokens_without_end", "stays", lambda batch: [itertools.repeat(7)] * len(batch))
answers("far_too_long", "stays", lambda batch: [[7] * 100_000] * len(batch))
answers("negative", "stays", lambda batch: [[-1, -(2**40)]] * len(batch))
answers("outside", "stays", lambda batch: [[2**31, 7]] * len(batch))
answers("its_input", "stays", lambda batch: batch.token_ids[batch.rows])
for _name, _fate, _arrays in (
    ("token_ids_None", "out", {"token_ids": None}),
    ("token_ids_floats", "out", {"token_ids": lambda n: np.full((n, 2), 7.0)}),
    ("token_ids_nan", "out", {"token_ids": lambda n: np.full((n, 2), np.nan)}),
    ("token_ids_objects", "out", {"token_ids": object_array}),
    ("token_ids_dates", "out", {"token_ids": lambda n: np.zeros((n, 2), dtype="datetime64[s]")}),
    ("token_ids_records", "out", {"token_ids": lambda n: np.zeros((n, 2), dtype=[("a", int), ("b", object)])}),
    ("token_ids_flat", "out", {"token_ids": lambda n: np.zeros(n, dtype=np.int32)}),
    ("token_ids_deep", "out", {"token_ids": lambda n: np.zeros((n, 2, 2), dtype=np.int32)}),
    ("token_ids_single", "out", {"token_ids": lambda n: np.int32(7)}),
    ("token_ids_of_others", "out", {"token_ids": lambda n: np.zeros((n + 3, 2), dtype=np.int32)}),
    ("token_ids_Evil", "out", {"token_ids": Evil()}),
    ("token_ids_of_no_width", "out", {"token_ids": lambda n: np.zeros((n, 0), dtype=np.int32)}),
    ("token_ids_uint64", "stays", {"token_ids": lambda n: np.full((n, 2), 2**64 - 1, dtype=np.uint64)}),
    ("token_ids_int8", "stays", {"token_ids": lambda n: np.full((n, 2), 7, dtype=np.int8)}),
    ("token_ids_matrix", "stays", {"token_ids": lambda n: np.zeros((n, 2), dtype=np.int32).view(np.matrix)}),
    (
        "a_million_million_tokens",
        "stays",
        {
            "token_ids": lambda n: np.broadcast_to(np.int32(7), (n, 10**12)),
            "confidence": lambda n: np.broadcast_to(np.float32(1), (n, 10**12)),
        },
    ),
    ("num_tokens_None", "out", {"num_tokens": None}),
    ("num_tokens_single", "out", {"num_tokens": 2}),
    ("num_tokens_in_columns", "out", {"num_tokens": lambda n: np.ones((n, 1), dtype=np.int64)}),
    ("num_tokens_texts", "out", {"num_tokens": lambda n: ["2"] * n}),
    ("num_tokens_Evil", "out", {"num_tokens": lambda n: [Evil()] * n}),
    ("num_tokens_negative", "stays", {"num_tokens": lambda n: np.full(n, -(2**62))}),
    ("num_tokens_huge", "stays", {"num_tokens": lambda n: np.full(n, 2**62)}),
    ("num_tokens_floats", "stays", {"num_tokens": lambda n: [1.5] * n}),
    ("confidence_None", "out", {"confidence": None}),
    ("confidence_texts", "out", {"confidence": lambda n: [["a", "b"]] * n}),
    ("confidence_flat", "out", {"confidence": lambda n: np.ones(n)}),
    ("confidence_narrow", "out", {"confidence": lambda n: np.ones((n, 1), dtype=np.float32)}),
    ("confidence_nan", "stays", {"confidence": lambda n: np.full((n, 2), np.nan)}),
    ("confidence_infinite", "stays", {"confidence": lambda n: np.full((n, 2), -np.inf)}),
    ("confidence_above_1", "stays", {"confidence": lambda n: np.full((n, 2), 1e30)}),
    ("match_length_floats", "out", {"match_length": lambda n: np.full(n, 0.5)}),
    ("match_length_Evil", "out", {"match_length": Evil()}),
    ("match_length_negative", "stays", {"match_length": lambda n: np.full(n, -5)}),
    ("votes_texts", "out", {"votes": "many"}),
    ("votes_narrow", "out", {"votes": lambda n: np.ones((n, 1), dtype=np.int32)}),
    ("votes_huge", "stays", {"votes": lambda n: np.full((n, 2), 2**62)}),
    ("others_5", "out", {"others": 5}),
    ("others_Evil", "out", {"others": Evil()}),
    ("others_without_end", "out", {"others": lambda n: itertools.repeat(None)}),
):
    answers(_name, _fate, lambda batch, arrays=_arrays: drafts(batch, **arrays))


# What they write to


def writes(name: str, write: Callable[[Any, DraftBatch], Any], fate: str = "stays") -> None:
    def propose(self: Any, batch: DraftBatch) -> Any:
        num_requests = len(batch)
        write(self, batch)
        return [[7]] * num_requests

    behave(f"writes_{name}", fate, propose=propose)


def in_torch(array: Any) -> torch.Tensor:
    """A tensor over the same memory: torch warns once of numpy's flag, and does not heed it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.as_tensor(array)


writes("the_table", lambda self, batch: in_torch(batch.token_ids).clamp_(0, 3))
writes(
    "the_table_by_address", lambda self, batch: ctypes.memset(batch.token_ids.ctypes.data, 1, batch.token_ids.nbytes)
)
writes("the_table_of_numpy", lambda self, batch: batch.context(0).fill(7), "out")
writes("flags", lambda self, batch: (batch.token_ids.setflags(write=True), batch.token_ids.fill(3)))
for _name in ("rows", "num_tokens", "num_prompt_tokens", "max_draft_tokens"):
    writes(_name, lambda self, batch, name=_name: in_torch(getattr(batch, name)).fill_(10**6))
writes("noise", lambda self, batch: batch.noise and (batch.noise.keys.fill(0), batch.noise.temperature.fill(0)))
writes("the_batch", lambda self, batch: object.__setattr__(batch, "request_ids", ()))
writes("options", lambda self, batch: [dict.clear(each) or each.update(x=self) for each in batch.options])  # type: ignore[func-returns-value]
writes("context", lambda self, batch: (self.context.options.clear(), self.context.datastores.update(x="y")))
writes("its_own_sizes", lambda self, batch: object.__setattr__(self.context, "vocab_size", 10**9))


def forget(self: Any, verified: Any) -> None:
    for lists in (verified.draft_token_ids, verified.target_token_ids, verified.further):
        for each in lists:
            each.clear()
        lists.clear()
    verified.request_ids.clear()
    verified.num_emitted[:] = [10**9] * 100


behave("writes_what_was_verified", "stays", observe=forget)
behave("writes_what_is_finished", "stays", finish=lambda self, request_ids: request_ids.clear())


def flickering(self: Any, batch: DraftBatch) -> Drafts:
    """Answer arrays that a thread of its own goes on to change."""
    answer = drafts(batch)

    def change() -> None:
        for value in range(2000):
            answer.token_ids.fill(-value)
            answer.num_tokens.fill(value * 10**6)
            answer.confidence.fill(np.nan)
            time.sleep(0)

    if not getattr(self, "thread", None):
        self.thread = threading.Thread(target=change, daemon=True)
        self.thread.start()
    return answer


behave("writes_its_answer_later", "stays", propose=flickering)


# What they say of themselves

for _name, _fate, _value in (
    ("10_to_the_400", "out", 10**400), ("a_dictionary", "out", {"x": 5}), ("None", "out", None),
    ("text", "out", "many"),
    ("nan", "out", float("nan")), ("infinite", "out", float("inf")), ("negative", "out", -1), ("Evil", "out", Evil()),
    ("an_array", "out", np.zeros(3)), ("two_to_the_63", "out", 2**63), ("True", "stays", True),
):  # fmt: skip
    behave(f"says_memory_is_{_name}", _fate, memory_bytes=lambda self, value=_value: value)


class NoEnd(Mapping[str, Any]):
    def __getitem__(self, key: str) -> Any:
        return StoreStats()

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[str]:
        return map(str, itertools.count())


for _name, _fate, _value in (
    ("numbers", "out", {"x": 5}), ("None", "out", None), ("5", "out", 5), ("Evil", "out", Evil()),
    ("huge", "out", {"x": StoreStats(tokens=10**400)}), ("unknown", "out", {"x": StoreStats(tokens=None)}),  # type: ignore[arg-type]
    ("nan", "out", {"x": StoreStats(bytes=float("nan"))}), ("negative", "out", {"x": StoreStats(hits=-1)}),  # type: ignore[arg-type]
    ("named_by_Evil", "out", {Evil: StoreStats(), 5: Evil()}),
    ("without_end", "stays", NoEnd()), ("named_None", "stays", {None: StoreStats(1)}),
    ("named_oddly", "stays", {'\ud800"\n\\\x1b[31m{}[red]': StoreStats(1)}),
    ("named_at_length", "stays", {"x" * 10**6: StoreStats(1)}), ("named_like_anothers", "stays", {"x": StoreStats(1)}),
    ("named_like_anothers_too", "stays", {"x": StoreStats(2)}),
):  # fmt: skip
    behave(f"says_stores_are_{_name}", _fate, store_stats=lambda self, value=_value: value)
for _name, _fate, _value in (
    ("None", "stays", None), ("5", "stays", 5), ("Evil", "out", Evil()), ("odd", "stays", "\ud800\n\x1b[31m[red]%s{}"),
    ("long", "stays", "x" * 10**6), ("bytes", "stays", b"\xff"),
):  # fmt: skip
    behave(f"says_it_is_{_name}", _fate, describe=lambda self, value=_value: value)


# What they do to their surroundings


def spoil(self: Any, batch: DraftBatch) -> Any:
    np.seterr(all="raise")
    torch.set_grad_enabled(True)
    torch.inference_mode(False).__enter__()
    return [[7]] * len(batch)


behave("spoils_the_states_of_its_thread", "stays", propose=spoil)
behave("leaves_no_context", "out", __init__=lambda self, context: None, propose=lambda self, batch: self.context)


# What never ends


def sleep(*_: Any) -> Any:
    while True:
        time.sleep(3600)


def spin(*_: Any) -> Any:
    while True:
        pass


def blocked(*_: Any) -> Any:
    lock = threading.Lock()
    with lock:
        lock.acquire()


class Slow:
    def __iter__(self) -> Any:
        return sleep()

    __array__ = __int__ = __str__ = __iter__

    @property
    def tokens(self) -> Any:
        return sleep()


class SlowWordsError(Exception):
    __str__ = __repr__ = sleep


def in_slow_words(*_: Any) -> Any:
    raise SlowWordsError


for _method in ("__init__", "warm_up", "describe", "propose", "observe", "finish", "memory_bytes", "store_stats"):
    behave(f"sleeps_in_{_method.strip('_')}", "late", **{_method: sleep})
behave("spins", "late", propose=spin)
behave("waits_for_itself", "late", propose=blocked)
behave("has_no_words_for_its_error", "late", propose=in_slow_words)
behave("rows_that_never_come", "late", propose=lambda self, batch: Slow())
behave("tokens_that_never_come", "late", propose=lambda self, batch: [Slow()] * len(batch))
behave("arrays_that_never_come", "late", propose=lambda self, batch: drafts(batch, token_ids=Slow()))
behave("memory_that_never_comes", "late", memory_bytes=lambda self: Slow())
behave("stores_that_never_come", "late", store_stats=lambda self: {Slow(): StoreStats()})


class Commanded(Proposer):
    """Does what its option ``what`` says, and says which process it works in."""

    def propose(self, batch: DraftBatch) -> Any:
        what = self.context.options["what"]
        if what == "crashes":
            ctypes.string_at(0)
        if what == "exits":
            os._exit(7)
        if what == "hangs":
            time.sleep(3600)
        if what == "raises":
            raise SystemExit
        return [[batch.context(index)[-1] + 1] for index in range(len(batch))]

    def memory_bytes(self) -> int:
        return os.getpid()


def entries(*fates: str) -> list[dict[str, Any]]:
    """Entries of ``"proposers"`` with these fates."""
    return [{"name": f"{__name__}.{name}", **OPTIONS} for name, fate in BEHAVIOURS.items() if fate in fates]


def misjudged(proposers: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Names of those whose counters do not say what was to become of them."""
    wrong = []
    for name, fate in BEHAVIOURS.items():
        counters = proposers.get(f"{__name__}.{name}")
        if counters is not None and (counters["active"], counters["errors"], counters["late"]) != {
            "stays": (True, 0, 0), "out": (False, 1, 0), "late": (False, 1, 1)
        }[fate]:  # fmt: skip
            wrong.append(name)
    return wrong
