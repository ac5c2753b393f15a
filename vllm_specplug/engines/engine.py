"""vLLM engines in processes of their own, driven by the demo and the benchmarks.

The parent starts ``python -m vllm_specplug.engines.process``, and the two exchange JSON objects, one in a line;
everything that vLLM prints goes to a log file. No state and no memory carries over from one configuration to the next.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from vllm_specplug.engines.environment import environment
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
        self._output = log.open("ab")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "vllm_specplug.engines.process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._output,
            env=environment(),
            start_new_session=True,  # Ctrl-C reaches the parent alone, which then stops the whole group
        )
        self._send(dict(engine_args))

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
        self._send(asdict(work))
        answer = self._receive(
            "completed",
            lambda event: on_progress(event["done"], event["tokens"], event["elapsed_s"]) if on_progress else None,
        )
        del answer["event"]
        return Completed(**answer)

    def stop(self) -> None:
        """End the process and all that it started, and wait for the end."""
        process = self._process
        with contextlib.suppress(BrokenPipeError):
            _pipe(process.stdin).close()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the group is the engine's own session
            process.wait()
            _pipe(process.stdout).close()
            self._output.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:  # after an error the engine need not finish its work
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self.stop()

    def _send(self, message: dict[str, Any]) -> None:
        pipe = _pipe(self._process.stdin)
        with contextlib.suppress(BrokenPipeError):  # the next read reports why the engine ended
            pipe.write(json.dumps(message).encode() + b"\n")
            pipe.flush()

    def _receive(self, wanted: str, on_other: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
        for line in _pipe(self._process.stdout):
            event: dict[str, Any] = json.loads(line)
            if event["event"] == wanted:
                return event
            if event["event"] == "failed":
                raise EngineError(f"{event['reason']} (vLLM's log: {self.log})")
            if on_other:
                on_other(event)
        code = self._process.wait()
        raise EngineError(f"the engine ended with exit status {code}; vLLM's log says why: {self.log}")


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None
    return stream
