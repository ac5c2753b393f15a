"""A process in which a guest's room stands: a crash of the guest's, or a full memory, does not reach the engine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from multiprocessing.connection import Connection

from vllm_specplug.drafting.guest_room import Answer, Calling, Calls, Room
from vllm_specplug.drafting.guest_thread import GoneError, LateError

END_S = 1.0
"""Seconds in which a process ends by itself when it is no longer needed; then it is killed."""


class GuestProcess:
    """Carries calls out in a process of its own, which ends with this one."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", __name__, str(theirs.fileno()), str(os.getpid())]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(each for each in sys.path if each)}
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], env=environment
        )  # fmt: skip
        theirs.close()
        self._connection = Connection(ours.detach())
        self._number = 0
        weakref.finalize(self, _end, self._process, self._connection)

    def call(self, calls: Calls, deadline_s: float) -> Answer:
        """Carry ``calls`` out.

        Raises:
            LateError: there was no answer within ``deadline_s``; the process is killed.
            GoneError: the process has ended.
        """
        self._number += 1
        end = time.monotonic() + deadline_s
        try:
            self._connection.send((self._number, calls))
            while self._connection.poll(max(0.0, end - time.monotonic())):
                number, answer = self._connection.recv()
                if number == self._number:  # another one's call was interrupted
                    return answer  # type: ignore[no-any-return]
        except Exception as error:  # also what cannot be unpickled
            _end(self._process, self._connection)
            raise GoneError(f"its process ended with status {self._process.returncode}: {error!r}") from None
        _end(self._process, self._connection, after_s=0.0)
        raise LateError(calls[-1][0])


def _end(process: subprocess.Popen[bytes], connection: Connection, after_s: float = END_S) -> None:
    connection.close()
    try:
        process.wait(after_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _end_with(parent: int) -> None:
    """End with the engine's process even while the guest hangs."""
    while os.getppid() == parent:
        time.sleep(END_S)
    os._exit(1)


def main() -> None:
    """Serve one guest on the connection whose descriptor is the first argument, until its other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the engine's
    threading.Thread(target=_end_with, args=(int(sys.argv[2]),), daemon=True).start()
    connection, room = Connection(int(sys.argv[1])), Room()
    while True:
        try:
            number, calls = connection.recv()
        except EOFError:
            return
        connection.send((number, Calling(calls).carry_out(room)))


if __name__ == "__main__":
    main()
