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

import numpy as np
from numba import cfunc, types
from numba.extending import intrinsic
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
_handler: Any = None


def _install() -> None:
    """Make our handler that of SIGBUS, and remember the one before; again if somebody has set another meanwhile."""
    global _handler
    if _handler is None:
        _handler = _compile_handler()
    now = _Action()
    _libc.sigaction(signal.SIGBUS, None, ctypes.byref(now))
    if now.handler == _handler.address:
        return
    ctypes.pointer(_previous)[0] = now
    _watched[MOST_RANGES, 0] = 0
    ours = _Action(handler=_handler.address, flags=_SA_SIGINFO | _SA_ONSTACK)
    _libc.sigaction(signal.SIGBUS, ctypes.byref(ours), None)


@intrinsic
def _numbers_at(typing_context, address):  # type: ignore[no-untyped-def]
    """An address as a pointer to int64 numbers."""

    def build(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.int64)(types.int64), build


def _compile_handler() -> Any:
    """The handler as machine code.

    It allocates nothing, raises nothing and calls only mmap and sigaction, so that it may run at any instruction.
    """
    remap = ctypes.CFUNCTYPE(
        ctypes.c_ssize_t, ctypes.c_ssize_t, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_ssize_t
    )(ctypes.cast(_libc.mmap, ctypes.c_void_p).value)
    set_action = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_ssize_t, ctypes.c_ssize_t)(
        ctypes.cast(_libc.sigaction, ctypes.c_void_p).value
    )
    watched_at, previous_at, default_at = _watched.ctypes.data, ctypes.addressof(_previous), ctypes.addressof(_default)
    end, protection = 3 * MOST_RANGES, int(mmap.PROT_READ)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED

    @cfunc(types.void(types.int32, types.CPointer(types.int64), types.voidptr))  # type: ignore[untyped-decorator]
    def handle(number, info, _):  # type: ignore[no-untyped-def]
        watched = _numbers_at(watched_at)
        address = info[2]  # si_addr of siginfo_t
        for row in range(0, end, 3):
            start, stop = watched[row], watched[row + 1]
            # All at once: page by page, a store could take more maps than the system lets a process have.
            if start <= address < stop and remap(start, stop - start, protection, flags, -1, 0) == start:
                watched[row + 2] = 1
                return
        # The read is repeated, under the handler from before us; the second time, that one has called us in turn.
        watched[end] += 1
        set_action(number, previous_at if watched[end] == 1 else default_at, 0)

    return handle
