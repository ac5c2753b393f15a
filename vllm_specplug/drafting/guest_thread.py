"""A thread in which a guest's room stands: calls are waited for until a deadline."""

from __future__ import annotations

import contextlib
import ctypes
import queue
import sys
import threading
import weakref
from typing import Any

from vllm_specplug.drafting.guest_room import Answer, Calling, Calls, Room


class LateError(Exception):
    """There was no answer in time; the message names the call that was under way."""


class GoneError(Exception):
    """There will be no answer; the message says why."""


class _Left(BaseException):
    """Raised in a thread that is waited for no longer."""


class _Waited(Calling):
    """Calls that a thread waits for."""

    def __init__(self, calls: Calls) -> None:
        super().__init__(calls)
        self.answer = Answer()
        self.is_left = False
        self.done = threading.Lock()
        self.done.acquire()


class GuestThread:
    """Carries calls out in a daemon thread.

    Signals never reach it: Python handles them in the main thread. So a ``KeyboardInterrupt`` in it is the guest's own,
    and a user's Ctrl-C ends the wait of the thread that calls.

    Args:
        name: of the guest.
        room: its room; all threads of a guest share it.
    """

    def __init__(self, name: str, room: Room) -> None:
        calls: queue.SimpleQueue[_Waited | None] = queue.SimpleQueue()
        self._calls = calls
        self._thread = threading.Thread(
            target=_serve, args=(room, calls, _device()), name=f"specplug proposer {name}", daemon=True
        )
        self._thread.start()
        weakref.finalize(self, calls.put, None).atexit = False

    def call(self, calls: Calls, deadline_s: float) -> Answer:
        """Carry ``calls`` out.

        Raises:
            LateError: there was no answer within ``deadline_s``; the thread is left to itself.
        """
        waited = _Waited(calls)
        self._calls.put(waited)
        if not waited.done.acquire(timeout=deadline_s):
            waited.is_left = True
            self._leave()
            raise LateError(waited.method)
        return waited.answer

    def _leave(self) -> None:
        """Ask the thread to end. It does when it next runs Python code, so that no endless loop takes time for ever."""
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread.ident or 0), ctypes.py_object(_Left))


def _serve(room: Room, calls: queue.SimpleQueue[_Waited | None], device: int | None) -> None:
    with contextlib.suppress(_Left), _as_in_a_step(device):
        while (waited := calls.get()) is not None:
            waited.answer = waited.carry_out(room)
            waited.done.release()
            if waited.is_left:
                return
            del waited  # its arguments are not kept until the next call


def _device() -> int | None:
    """The calling thread's CUDA device, which a new thread would not have."""
    torch: Any = sys.modules.get("torch")
    return torch.cuda.current_device() if torch is not None and torch.cuda.is_initialized() else None


@contextlib.contextmanager
def _as_in_a_step(device: int | None) -> Any:
    """The states of torch that belong to a thread: the device, and no gradients, as in a step of the engine."""
    torch: Any = sys.modules.get("torch")
    if torch is None:
        yield
        return
    if device is not None:
        torch.cuda.set_device(device)
    with torch.no_grad():
        yield
