"""Real vLLM engines for tests, each in its own child process (see ``child.py``)."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import small_model

from vllm_specplug.tiny_models import target_path

HERE = Path(__file__).parent
END_TIMEOUT_S = 20

num_started = 0
"""Number of engines that this process has started, including those that failed to start."""


class EngineError(Exception):
    """The child raised an exception or died; the message has its text and the end of the log."""


class Nursery:
    """The process from which the engines of this process are forked; see ``nursery.py``.

    Args:
        v2: fork engines on the V2 model runner, whose kernels run under Triton's interpreter.
    """

    def __init__(self, v2: bool) -> None:
        self.v2 = v2
        self._socket, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
        command = [sys.executable, str(HERE / "nursery.py"), str(theirs.fileno())]
        with tempfile.TemporaryFile() as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._environment(),
                pass_fds=[theirs.fileno()],
            )  # fmt: skip
        theirs.close()
        atexit.register(self.close)

    def _environment(self) -> dict[str, str]:
        environment = {
            **os.environ,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            # One unpinned thread: a tiny model gains nothing from two, and pinned ones stall when the machine is busy.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(HERE),
        }
        environment.pop("TRITON_INTERPRET", None)
        if self.v2:
            environment["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE / "v2_site")])
            environment["TRITON_INTERPRET"] = "1"
            environment["VLLM_USE_V2_MODEL_RUNNER"] = "1"
        return environment

    def fork(self, channel: socket.socket, log: int, plugin: bool) -> int:
        """Start a child that serves ``channel`` and prints to the descriptor ``log``; returns its process id."""
        environment = self._environment()
        if not plugin:
            environment["VLLM_PLUGINS"] = "none-of-them"
        socket.send_fds(self._socket, [pickle.dumps(environment)], [channel.fileno(), log])
        answer = self._socket.recv(100)
        if not answer:
            raise EngineError(f"the process that engines are forked from ended with status {self._process.wait()}")
        return int(answer)

    def close(self) -> None:
        self._socket.close()
        self._process.wait()


@functools.cache
def nursery(v2: bool) -> Nursery:
    return Nursery(v2)


class Engine:
    """One vLLM engine, or a process in which vLLM can be imported.

    Args:
        engine_args: arguments of ``vllm.LLM``; None starts no engine yet.
        plugin: False keeps this project's plugin from loading: stock vLLM.
        v2: run the V2 model runner, with kernels under Triton's interpreter: some tens of tokens per second. The model
            has a small vocabulary unless ``engine_args`` name another one.
        asynchronous: use async scheduling, as on a GPU.
    """

    def __init__(
        self,
        engine_args: dict[str, Any] | None = None,
        plugin: bool = True,
        v2: bool = False,
        asynchronous: bool = False,
    ) -> None:
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the engine, closed with it
        channel, theirs = socket.socketpair()
        self._process = os.pidfd_open(nursery(v2).fork(theirs, self.log.fileno(), plugin))
        theirs.close()
        self._commands, self._answers = channel.makefile("wb"), channel.makefile("rb")
        channel.close()  # the two files keep the socket open until they are closed
        if engine_args is not None:
            global num_started
            num_started += 1
            try:
                if asynchronous:
                    self.send("call", "keep_async_scheduling")
                model = {"model": str(small_model.target_path())} if v2 else {}
                self.send("start", {**ENGINE_ARGS, **model, **engine_args})
            except BaseException:
                self.close()
                raise

    def send(self, command: str, *args: Any) -> Any:
        """Run a method of ``child.Child`` in the child process and return its result."""
        try:
            pickle.dump((command, args), self._commands)
            self._commands.flush()
            kind, value = pickle.load(self._answers)
        except (EOFError, ConnectionError) as error:
            raise EngineError(f"the engine process died:\n{self.tail()}") from error
        if kind == "error":
            raise EngineError(f"{value}\n{self.tail()}")
        return value

    def generate(self, requests: list[dict[str, Any]], **options: Any) -> list[dict[str, Any]]:
        """Outputs of ``requests``: dictionaries with ``prompt`` (text or ids), ``params`` and optionally ``lora``."""
        return self.send("generate", requests, options)  # type: ignore[no-any-return]

    def tail(self, num_bytes: int = 4000) -> str:
        """The end of the engine's log."""
        self.log.seek(0, os.SEEK_END)
        self.log.seek(max(0, self.log.tell() - num_bytes))
        return self.log.read().decode(errors="replace")

    def close(self) -> None:
        """Stop the child; safe to call twice."""
        if self.log.closed:
            return
        with contextlib.suppress(ConnectionError):
            self._commands.close()
        self._answers.close()
        if not select.select([self._process], [], [], END_TIMEOUT_S)[0]:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._process, signal.SIGKILL)
            select.select([self._process], [], [])
        os.close(self._process)
        self.log.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Engines:
    """Keeps engines running for the next test with the same arguments.

    Args:
        room: most idle engines; if there are more, the least recently used one is stopped.
    """

    def __init__(self, room: int = 2) -> None:
        self._room = room
        self._idle: dict[str, Engine] = {}

    @contextlib.contextmanager
    def borrowed(self, engine_args: dict[str, Any], **more: bool) -> Iterator[Engine]:
        """An engine with an empty prefix cache, for one user at a time; arguments are those of :class:`Engine`."""
        key = json.dumps([engine_args, more], sort_keys=True)
        engine = self._idle.pop(key, None) or Engine(engine_args, **more)
        try:
            engine.generate([], reset_prefix_cache=True)
            yield engine
        except BaseException:
            engine.close()
            raise
        self._idle[key] = engine
        while len(self._idle) > self._room:
            self._idle.pop(next(iter(self._idle))).close()

    def close(self) -> None:
        while self._idle:
            self._idle.popitem()[1].close()


ENGINE_ARGS: dict[str, Any] = {
    "model": str(target_path()),
    "dtype": "float32",
    "max_model_len": 1024,
    "max_num_seqs": 16,
    "enforce_eager": True,
    "disable_log_stats": False,
    "seed": 0,
}
