"""Runs the web application of the worklist in a thread of its own: uvicorn on a socket that is open already."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from appliance.worklist.web import Service, application
from dicom_io.errors import ScansideError
from dicom_io.tls import ServerCertificates

HEADER_SECONDS = 10.0
"""From a connection to its first whole request, or it is closed."""
MOST_CONNECTIONS = 256
"""More are answered with 503."""
MOST_HEADER_BYTES = 32_768


class _Guarded(H11Protocol):
    """uvicorn waits for the first request for ever; a peer that never asks would keep its place."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.loop.call_later(HEADER_SECONDS, self._close_unless_asked)

    def _close_unless_asked(self) -> None:
        if self.scope is None and not self.transport.is_closing():
            self.transport.close()


class WebServer:
    """A running server.

    Args:
        bound: listens already.
        turn: called by the event loop at least once a second.
    """

    def __init__(
        self,
        service: Service,
        bound: socket.socket,
        certificates: ServerCertificates | None = None,
        turn: Callable[[], None] = lambda: None,
    ) -> None:
        self._service = service
        self._bound = bound
        self._turn = turn
        self._loop: asyncio.AbstractEventLoop | None = None
        self._started = threading.Event()
        factory = None if certificates is None else lambda *_: certificates.renewing_context()
        config = uvicorn.Config(
            application(service),
            http=_Guarded,
            ws="websockets-sansio",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=MOST_CONNECTIONS,
            timeout_keep_alive=15,
            timeout_graceful_shutdown=2,
            h11_max_incomplete_event_size=MOST_HEADER_BYTES,
            ws_max_size=65_536,
            ws_ping_interval=10.0,
            ws_ping_timeout=10.0,
            ssl_context_factory=factory,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, name="worklist-web", daemon=True)
        self._thread.start()
        if not self._started.wait(10.0):
            raise ScansideError("the web server did not start", f"port {self.port}", "see the log")

    @property
    def port(self) -> int:
        """The TCP port."""
        return int(self._bound.getsockname()[1])

    @property
    def running(self) -> bool:
        """Whether it still serves."""
        return self._thread.is_alive()

    def wake(self) -> None:
        """Subscribers may have something to hear; from any thread."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it is closed: nobody listens any more
                self._loop.call_soon_threadsafe(self._service.channels.wake)

    def stop(self, seconds: float) -> None:
        """Answer no more; what is under way has so many seconds."""
        self._server.should_exit = True
        self._thread.join(seconds)

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        turning = asyncio.create_task(self._turns())
        try:
            await self._server.serve(sockets=[self._bound])
        finally:
            turning.cancel()

    async def _turns(self) -> None:
        while True:
            if self._server.started:
                self._started.set()
            self._turn()
            await asyncio.sleep(0.05 if not self._started.is_set() else 1.0)
