"""An optional endpoint of vLLM's server that reloads the token stores without a restart.

vLLM loads this endpoint if ``VLLM_PLUGINS`` names it: ``VLLM_PLUGINS=specplug,specplug_stores``. Then ``POST
/specplug/reload_stores`` reloads, and so does the signal SIGHUP to the server (with one API server process only: with
several, vLLM's parent process receives the signal and ends).
"""

from __future__ import annotations

import asyncio
import signal
from argparse import Namespace
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse

from vllm_specplug.log import logger
from vllm_specplug.reloading import ReloadError, reload_stores_async

PATH = "/specplug/reload_stores"


class StoresEndpoint:
    """An ``EndpointPlugin`` of vLLM that reloads token stores."""

    name = "specplug_stores"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._engine: Any = None
        self._lock = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    def attach_router(self, app: FastAPI) -> None:
        """Add the route."""

        @app.post(PATH)
        async def reload_stores() -> JSONResponse:
            try:
                return JSONResponse({"reloaded": await self._reload()})
            except ReloadError as error:
                return JSONResponse({"error": str(error)}, status_code=409)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Keep the engine client, and reload on SIGHUP from now on."""
        self._engine = engine_client
        if engine_client is not None:
            try:
                asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._on_signal)
            except (RuntimeError, ValueError) as error:  # not in the main thread
                logger.warning("specplug: SIGHUP does not reload token stores here: %s", error)

    async def _reload(self) -> list[str]:
        if self._engine is None:
            raise ReloadError("this server has no engine, and so no token stores")
        async with self._lock:
            names = await reload_stores_async(self._engine.collective_rpc)
        logger.info("specplug: token stores reloaded: %s", ", ".join(names) or "none has changed")
        return names

    def _on_signal(self) -> None:
        async def reload() -> None:
            try:
                await self._reload()
            except Exception as error:
                logger.error("specplug: token stores were not reloaded: %s", error)

        task = asyncio.get_running_loop().create_task(reload())
        self._tasks.add(task)  # the loop itself holds tasks weakly
        task.add_done_callback(self._tasks.discard)
