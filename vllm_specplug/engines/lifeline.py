"""Engine processes that end with the process that started them.

A replica that is killed leaves vLLM's engine core behind, which does not notice and keeps its memory or GPU. If
:data:`VARIABLE` is "1", the plugin, which vLLM loads in each of its processes, waits for the end of the parent process
and then ends its own.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading

VARIABLE = "SPECPLUG_END_WITH_PARENT"
"""Environment variable: "1" ties the processes of an engine to the process that starts the engine."""

_is_held = False


def hold() -> None:
    """Tie this process to its parent if :data:`VARIABLE` is "1"; no effect in the process that starts an engine."""
    global _is_held
    parent = multiprocessing.parent_process()
    if _is_held or parent is None or os.environ.get(VARIABLE) != "1":
        return
    _is_held = True

    def wait() -> None:
        parent.join()  # waits on a pipe that the parent holds open as long as it lives
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, name="specplug-lifeline", daemon=True).start()
