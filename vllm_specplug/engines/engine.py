"""vLLM engines in processes of their own, driven by the demo and the benchmarks.

Engine processes are forked from one that has imported vLLM (:mod:`.preloaded`). Everything that vLLM prints goes to a
log file. No state and no memory carries over from one configuration to the next.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from vllm_specplug.engines.environment import environment
from vllm_specplug.engines.process import serve
from vllm_specplug.engines.work import CHECK_ONLY, Completed, Work
from vllm_specplug.errors import SpecplugError

STOP_TIMEOUT_S = 20.0

OFF = "off"
NGRAM = "ngram"
SPECPLUG = "specplug"


class EngineError(SpecplugError):
    """An engine did not start, or died; its log says why."""


def speculative_config(name: str, num_speculative_tokens: int, datastore: Path | None = None) -> dict[str, Any] | None:
    """vLLM's ``speculative_config`` for one of the configurations that the demo and the benchmarks compare.

    Args:
        name: :data:`OFF`, :data:`NGRAM` or :data:`SPECPLUG`.
        num_speculative_tokens: length of the longest draft.
        datastore: token store of ``rest``; None: specplug drafts without ``rest``.
    """
    if name == OFF:
        return None
    if name == NGRAM:
        # A match of one token, vLLM's smallest, is mostly chance; two to five is what its documentation recommends.
        return {
            "method": "ngram",
            "num_speculative_tokens": num_speculative_tokens,
            "prompt_lookup_min": 2,
            "prompt_lookup_max": 5,
        }
    config: dict[str, Any] = {"method": "specplug", "num_speculative_tokens": num_speculative_tokens}
    return config if datastore is None else {**config, "datastore": str(datastore)}


class Engine:
    """A running vLLM engine. A context manager: leaving it stops the process.

    Args:
        engine_args: arguments of ``vllm.LLM``. The key ``cli`` can hold a list of options of ``vllm serve``, which must
            not set any of the other arguments.
        log: file that everything the engine prints is appended to.
    """

    def __init__(self, engine_args: Mapping[str, Any], log: Path) -> None:
        self.log = log
        log.touch()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["vllm_specplug.engines.preloaded"])
        self._channel, theirs = context.Pipe()
        variables = environment()
        self._process = context.Process(target=serve, args=(theirs, dict(engine_args), str(log), variables))
        with _environment(variables):  # of the process that engines are forked from, if this is the first
            self._process.start()
        theirs.close()

    def wait_until_ready(self) -> float:
        """Wait until the engine has started; returns the seconds that the start took.

        Raises:
            EngineError: the engine did not start.
        """
        return float(self._receive("ready")["start_s"])

    @classmethod
    def check(cls, engine_args: Mapping[str, Any], log: Path) -> int:
        """Let vLLM check arguments without loading a model; returns the longest draft's length, 0 without speculation.

        Raises:
            EngineError: vLLM refuses the arguments.
        """
        with cls({**engine_args, CHECK_ONLY: True}, log) as engine:
            return int(engine._receive("checked")["num_speculative_tokens"])

    def complete(self, work: Work, on_progress: Callable[[int, int, float], None] | None = None) -> Completed:
        """Complete the requests of ``work``.

        Args:
            work: the requests.
            on_progress: called with the numbers of requests that are done, of tokens and of seconds so far.

        Raises:
            EngineError: the engine died.
        """
        with contextlib.suppress(ConnectionError):  # the next event says why the engine ended
            self._channel.send(work)
        return self._receive(  # type: ignore[no-any-return]
            "completed",
            lambda event: on_progress(event["done"], event["tokens"], event["elapsed_s"]) if on_progress else None,
        )["result"]

    def stop(self) -> None:
        """End the process and all that it started, and wait for the end."""
        self._channel.close()
        try:
            self._process.join(STOP_TIMEOUT_S)
        finally:
            self._kill()
            self._process.join()

    def _kill(self) -> None:
        assert self._process.pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # the group is the engine's own session
        self._process.kill()  # it may not have a session of its own yet

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:  # after an error the engine need not finish its work
            self._kill()
        self.stop()

    def _receive(self, wanted: str, on_other: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
        with contextlib.suppress(EOFError, ConnectionError):
            while True:
                event: dict[str, Any] = self._channel.recv()
                if event["event"] == wanted:
                    return event
                if event["event"] == "failed":
                    raise EngineError(f"{event['reason']} (vLLM's log: {self.log})")
                if on_other:
                    on_other(event)
        self._process.join()
        raise EngineError(
            f"the engine ended with exit status {self._process.exitcode}; vLLM's log says why: {self.log}"
        )


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Environment variables of this process within the context."""
    kept = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(kept)
