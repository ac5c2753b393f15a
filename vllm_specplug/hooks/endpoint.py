"""An optional endpoint of vLLM's server that reloads the token stores without a restart.

vLLM loads this endpoint if ``VLLM_PLUGINS`` names it: ``VLLM_PLUGINS=specplug,specplug_stores``. Then ``POST
/specplug/reload_stores`` reloads, and so does the signal SIGHUP to the server (with one API server process only: with
several, vLLM's parent process receives the signal and ends). If the server has a key, the endpoint asks for it.
"""

from __future__ import annotations

import asyncio
import math
import os
import signal
import time
from argparse import Namespace
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from vllm_specplug.hooks import seam_list, seams
from vllm_specplug.log import logger
from vllm_specplug.reloading import ReloadError, reload_stores_async

PATH = "/specplug/reload_stores"
LEAST_INTERVAL_S = 1.0
"""Least seconds from the end of a reload to the next: callers in between share the next one, which costs steps."""


_T = TypeVar("_T")


class StoresEndpoint:
    """An ``EndpointPlugin`` of vLLM that reloads token stores."""

    name = "specplug_stores"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._engine: Any = None
        self._is_allowed: Callable[[Any], bool] = lambda headers: True
        self._lock = asyncio.Lock()
        self._ended = -math.inf  # time of the end of the last reload
        self._coming: asyncio.Task[list[str]] | None = None  # a reload that has not begun: callers may join it
        self._tasks: set[asyncio.Task[Any]] = set()

    def attach_router(self, app: FastAPI) -> None:
        """Add the route."""

        @app.post(PATH)
        async def reload_stores(request: Request) -> JSONResponse:
            if not self._is_allowed(request.headers):  # vLLM guards its own paths only
                return JSONResponse({"error": "Unauthorized"}, status_code=401)
            try:
                return JSONResponse({"reloaded": await self._reload()})
            except ReloadError as error:
                return JSONResponse({"error": str(error)}, status_code=409)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Keep the engine client and the server's keys, and reload on SIGHUP from now on."""
        self._engine = engine_client
        self._is_allowed = _guard_of(args)
        if engine_client is not None:
            try:
                asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._on_signal)
            except (RuntimeError, ValueError) as error:  # not in the main thread
                logger.warning("specplug: SIGHUP does not reload token stores here: %s", error)

    async def _reload(self) -> list[str]:
        if self._engine is None:
            raise ReloadError("this server has no engine, and so no token stores")
        if self._coming is None:
            self._coming = self._keep(self._reload_once())
        return await asyncio.shield(self._coming)  # a caller that hangs up does not end it for the others

    async def _reload_once(self) -> list[str]:
        async with self._lock:
            await asyncio.sleep(self._ended + LEAST_INTERVAL_S - time.monotonic())
            self._coming = None  # a store written from now on may be missed: its callers get a reload of their own
            try:
                names = await reload_stores_async(self._engine.collective_rpc)
            finally:
                self._ended = time.monotonic()
        logger.info("specplug: token stores reloaded: %s", ", ".join(names) or "none has changed")
        return names

    def _keep(self, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        """Start a task, and hold it until it ends: the loop itself holds tasks weakly."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._drop)
        return task

    def _drop(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # asyncio would log it as never retrieved if every caller has hung up

    def _on_signal(self) -> None:
        async def reload() -> None:
            try:
                await self._reload()
            except Exception as error:
                logger.error("specplug: token stores were not reloaded: %s", error)

        self._keep(reload())


def _guard_of(args: Namespace) -> Callable[[Any], bool]:
    """From a request's headers to whether they carry one of the server's keys; always True if the server has none."""
    keys = [key for key in (getattr(args, "api_key", None) or [os.environ.get("VLLM_API_KEY")]) if key]
    if not keys:
        return lambda headers: True
    seams.check(seam_list.SERVER_USED)
    from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

    return AuthenticationMiddleware(None, keys).verify_token  # type: ignore[no-any-return]
