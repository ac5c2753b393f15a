"""A process that has imported vLLM and forks a child for every engine that a test starts.

Importing vLLM takes far longer than starting an engine of a tiny model. The argument is a socket's descriptor. Each
message through the socket has a pickled environment and two descriptors, of the child's channel and its log; the answer
is the child's process id. The nursery and its children end when the other ends of their sockets are closed.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import os
import pickle
import signal
import socket
import sys

import child

# Modules that every engine imports, stock ones too. None is of this project: the plugin loads in the child, if at all.
MODULES = (
    "vllm.entrypoints.llm",
    "vllm.engine.arg_utils",
    "vllm.lora.request",
    "vllm.v1.engine.llm_engine",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.structured_output.backend_xgrammar",
    "vllm.model_executor.models.llama",
)
MAX_MESSAGE_BYTES = 1 << 17


def main() -> None:
    requests = socket.socket(fileno=int(sys.argv[1]))
    for name in MODULES:
        importlib.import_module(name)
    gc.freeze()  # garbage collection in a child must not touch shared pages
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # this process never waits for children
    while True:
        message, descriptors, _, _ = socket.recv_fds(requests, MAX_MESSAGE_BYTES, 2)
        if not message:
            return
        process = os.fork()
        if process == 0:
            break
        for descriptor in descriptors:
            os.close(descriptor)
        requests.sendall(str(process).encode())
    requests.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(pickle.loads(message))
    channel, log = descriptors
    for standard in (1, 2):
        os.dup2(log, standard)
    os.close(log)
    child.serve(socket.socket(fileno=channel))
    atexit._run_exitfuncs()
    os._exit(0)  # skips the teardown of vLLM's modules, which takes seconds


if __name__ == "__main__":
    main()
