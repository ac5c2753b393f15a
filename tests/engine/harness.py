"""Real vLLM engines for tests, each in a child process of its own (see ``child.py``)."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from vllm_specplug.tiny_models import target_path

HERE = Path(__file__).parent


class EngineError(Exception):
    """The child answered with an exception, or died; the message carries its text or the end of its log."""


class Engine:
    """One vLLM engine, or a process in which vLLM can be imported.

    Args:
        engine_args: for ``vllm.LLM``; None starts no engine yet.
        plugin: False keeps this project's plugin from loading: stock vLLM.
        v2: run the V2 model runner, its kernels under Triton's interpreter: some ten tokens a second.
    """

    def __init__(self, engine_args: dict[str, Any] | None = None, plugin: bool = True, v2: bool = False) -> None:
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the engine, closed with it
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
        if v2:
            environment["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE / "v2_site")])
            environment["TRITON_INTERPRET"] = "1"
            environment["VLLM_USE_V2_MODEL_RUNNER"] = "1"
        if not plugin:
            environment["VLLM_PLUGINS"] = "none-of-them"
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "child.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env=environment,
        )
        if engine_args is not None:
            try:
                self.send("start", {**ENGINE_ARGS, **engine_args})
            except BaseException:
                self.close()
                raise

    def send(self, command: str, *args: Any) -> Any:
        """Run a method of ``child.Child`` there and return what it returned."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            pickle.dump((command, args), self.process.stdin)
            self.process.stdin.flush()
            kind, value = pickle.load(self.process.stdout)
        except (EOFError, BrokenPipeError) as error:
            raise EngineError(f"the engine process died:\n{self.tail()}") from error
        if kind == "error":
            raise EngineError(f"{value}\n{self.tail()}")
        return value

    def generate(self, requests: list[dict[str, Any]], **options: Any) -> list[dict[str, Any]]:
        """Outputs of ``requests``, each a dict with ``prompt`` (text or ids), ``params`` and maybe ``lora``."""
        return self.send("generate", requests, options)  # type: ignore[no-any-return]

    def tail(self, num_bytes: int = 4000) -> str:
        """The end of what the engine printed."""
        self.log.seek(0, os.SEEK_END)
        self.log.seek(max(0, self.log.tell() - num_bytes))
        return self.log.read().decode(errors="replace")

    def close(self) -> None:
        """Stop the child; safe to call twice."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self.log.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


ENGINE_ARGS: dict[str, Any] = {
    "model": str(target_path()),
    "dtype": "float32",
    "max_model_len": 1024,
    "max_num_seqs": 16,
    "enforce_eager": True,
    "disable_log_stats": False,
    "seed": 0,
}
