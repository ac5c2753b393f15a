"""The history of a tenant: its automata and counters."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_specplug.proposers.suffix.automaton import Automaton


@dataclass(slots=True, eq=False)
class Tenant:
    """The texts of one tenant's requests: the automaton that grows, and the one before it."""

    key: tuple[str, str]
    new: Automaton
    old: Automaton | None
    new_id: int
    """Unique number of ``new``, from which a request sees that the automaton was replaced."""
    old_id: int = 0
    last_used: int = 0
    num_requests: int = 0
    counted_bytes: int = 0
    """Bytes in use when they were last counted."""

    def automata(self) -> list[Automaton]:
        return [self.new] if self.old is None else [self.new, self.old]

    def num_bytes(self) -> int:
        return sum(each.num_bytes() for each in self.automata())

    def reserved_bytes(self) -> int:
        return sum(each.reserved_bytes() for each in self.automata())
