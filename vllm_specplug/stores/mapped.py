"""Parts of files mapped read-only at one range of addresses, in a way that survives what happens to the files.

A process that reads a page of a mapped file which is no longer there (somebody cut the file, a disk or network file
system failed) gets the signal SIGBUS and ends. Checks before the read cannot rule that out, and copies in memory cost
the size of the store in each process. So a handler in machine code, which needs neither Python nor its lock, puts zeros
in the place of the whole range, marks the range as lost, and lets the read go on. It leaves SIGBUS of all other
addresses to the handler before it, so that other crashes stay what they were.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import sys
import threading
import weakref
from typing import Any, BinaryIO

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from vllm_specplug.stores.format import Section

MOST_RANGES = 1024
"""Ranges of a process that are watched at the same time; further ones are mapped, but not watched."""

_START, _STOP, _IS_LOST = range(3)
_MAP_FIXED = 0x10  # Linux's and macOS's number; Python's mmap module has no name for it
_MADV_POPULATE_READ = 22  # Linux's number; Python's mmap module has no name for it
_SA_SIGINFO, _SA_ONSTACK = 0x4, 0x08000000  # Linux's numbers
_IS_SUPPORTED = sys.platform == "linux" and sys.maxsize > 2**32  # the layouts of structures below

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *([ctypes.c_int] * 3), ctypes.c_long]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

_watched: NDArray[np.int64] = np.zeros((MOST_RANGES + 1, 3), dtype=np.int64)
"""Start, stop and a mark of each range, zeros if a row is free; in the last row the number of SIGBUS of others."""
_lock = threading.Lock()


class MappedRange:
    """A range of addresses, zeros at first, into which parts of files are laid.

    Attributes:
        memory: the range; unmapped when nothing refers to it any more.
    """

    def __init__(self, num_bytes: int) -> None:
        self.memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ)
        self._address = np.frombuffer(self.memory, np.uint8).ctypes.data
        self._row = _watch(self._address, num_bytes) if _IS_SUPPORTED else MOST_RANGES
        if self._row < MOST_RANGES:
            # Not at the process's exit, where other threads may still read.
            weakref.finalize(self.memory, _forget, self._row).atexit = False

    @property
    def is_lost(self) -> bool:
        """True once a part of a file could not be read; the range has been zeros since."""
        return self._row < MOST_RANGES and bool(_watched[self._row, _IS_LOST])

    def lay(self, place: int, file: BinaryIO, section: Section) -> None:
        """Map a section of an open file at the byte ``place`` of the range, a multiple of the page size.

        Raises:
            OSError: the system refuses.
        """
        if not section.num_bytes:
            return
        flags = mmap.MAP_SHARED | _MAP_FIXED
        address = self._address + place
        if _libc.mmap(address, section.num_bytes, mmap.PROT_READ, flags, file.fileno(), section.offset) != address:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), file.name)

    def read_ahead(self) -> None:
        """Read all of it into memory, so that later reads meet no page fault."""
        # By ctypes: Python's own madvise holds the interpreter's lock, and an engine's other threads would stand still.
        if _libc.madvise(self._address, len(self.memory), _MADV_POPULATE_READ):  # fails before Linux 5.14
            _libc.madvise(self._address, len(self.memory), mmap.MADV_WILLNEED)


def _watch(start: int, num_bytes: int) -> int:
    """Let the handler watch a range; its row, :data:`MOST_RANGES` if all are taken."""
    with _lock:
        _install()
        row = int(np.argmin(_watched[:MOST_RANGES, _STOP] != 0))
        if _watched[row, _STOP]:
            return MOST_RANGES
        _watched[row] = start, 0, 0
        _watched[row, _STOP] = start + num_bytes  # last: the handler may look at any moment
    return row


def _forget(row: int) -> None:
    _watched[row, _STOP] = 0


# ---------------------------------------------------------------------------------------------------------------------
# The handler
# ---------------------------------------------------------------------------------------------------------------------


class _Action(ctypes.Structure):
    """C's ``struct sigaction`` of 64-bit Linux."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ulong * 16),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


_previous = _Action()
_default = _Action()
_kept: list[Any] = []
"""The handler's code."""
_handler = 0


def _install() -> None:
    """Make our handler that of SIGBUS, and remember the one before; again if somebody has set another meanwhile."""
    global _handler
    if not _handler:
        _handler = _compile_handler()
    now = _Action()
    _libc.sigaction(signal.SIGBUS, None, ctypes.byref(now))
    if now.handler == _handler:
        return
    ctypes.pointer(_previous)[0] = now
    _watched[MOST_RANGES, 0] = 0
    ours = _Action(handler=_handler, flags=_SA_SIGINFO | _SA_ONSTACK)
    _libc.sigaction(signal.SIGBUS, ctypes.byref(ours), None)


def _compile_handler() -> int:
    """Address of the handler's machine code.

    Written in LLVM's own language, since it may run at any instruction of any thread: it allocates nothing, raises
    nothing, knows nothing of Python, and calls only mmap and sigaction. In C::

        void handle(int number, siginfo_t *info, void *context) {
            for (long *row = watched; row != watched_end; row += 3)
                if (row[0] <= info->si_addr && info->si_addr < row[1] && mmap(row[0], ...) == row[0]) {
                    row[2] = 1;
                    return;
                }
            sigaction(number, watched_end[0]++ ? &default_action : &previous, NULL);  // and the read is repeated
        }

    A range is replaced at once: page by page, a store could take more maps than the system lets a process have. The
    second time, the handler from before us has called us in turn.
    """
    number, word, void = ir.IntType(32), ir.IntType(64), ir.VoidType()
    module = ir.Module()
    handler = ir.Function(module, ir.FunctionType(void, [number, word, word]), "handle")
    entry, each, inside, lost, following, other = (
        handler.append_basic_block(name) for name in ("entry", "each", "inside", "lost", "following", "other")
    )
    code = ir.IRBuilder(entry)

    def slot(at: Any, index: int) -> Any:
        return code.inttoptr(code.add(at, word(8 * index)), word.as_pointer())

    def function(name: str, result: Any, *arguments: Any) -> Any:
        address = ctypes.cast(getattr(_libc, name), ctypes.c_void_p).value
        return code.inttoptr(word(address), ir.FunctionType(result, arguments).as_pointer())

    end = word(_watched.ctypes.data + 8 * _watched[:MOST_RANGES].size)
    address = code.load(slot(handler.args[1], 2))  # si_addr
    code.branch(each)

    code.position_at_end(each)
    row = code.phi(word)
    row.add_incoming(word(_watched.ctypes.data), entry)
    start, stop = code.load(slot(row, _START)), code.load(slot(row, _STOP))
    is_inside = code.and_(code.icmp_unsigned("<=", start, address), code.icmp_unsigned("<", address, stop))
    code.cbranch(is_inside, inside, following)

    code.position_at_end(inside)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED
    remap = function("mmap", word, word, word, number, number, number, word)
    arguments = [start, code.sub(stop, start), number(mmap.PROT_READ), number(flags), number(-1), word(0)]
    code.cbranch(code.icmp_unsigned("==", code.call(remap, arguments), start), lost, other)

    code.position_at_end(lost)
    code.store(word(1), slot(row, _IS_LOST))
    code.ret_void()

    code.position_at_end(following)
    further = code.add(row, word(8 * _watched.shape[1]))
    row.add_incoming(further, following)
    code.cbranch(code.icmp_unsigned("==", further, end), other, each)

    code.position_at_end(other)
    count = code.load(slot(end, 0))
    code.store(code.add(count, word(1)), slot(end, 0))
    is_first = code.icmp_unsigned("==", count, word(0))
    action = code.select(is_first, word(ctypes.addressof(_previous)), word(ctypes.addressof(_default)))
    code.call(function("sigaction", number, number, word, word), [handler.args[0], action, word(0)])
    code.ret_void()

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(str(module)), machine)
    engine.finalize_object()
    _kept.append(engine)
    return int(engine.get_function_address("handle"))
