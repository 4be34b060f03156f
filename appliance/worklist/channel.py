"""Reports of events over WebSocket: one channel a subscriber, fed from the ledger (PS3.18 8.10.4 and 11.13)."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.websockets import WebSocket, WebSocketDisconnect

from appliance.ledger.database import Row
from appliance.ledger.store import Ledger
from dicom_io.workitem import EVENT, Step, put

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
"""How long a report that was written without a sign may wait."""
REPLACED = 4000
"""Code with which a channel is closed when its subscriber opens another one."""
MOST_CHANNELS = 64


class Channels:
    """The open channels. `serve` and `wake` belong to one event loop."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._open: dict[str, tuple[WebSocket, asyncio.Event]] = {}

    def wake(self) -> None:
        """There may be something to tell."""
        for _, event in self._open.values():
            event.set()

    async def serve(self, ae_title: str, socket: WebSocket) -> None:
        """Tell a subscriber what waits for it and what comes, until it goes.

        A report is forgotten once it was handed to the connection: what is lost with one that breaks, a subscriber
        learns by asking for the items again, as the standard has it.
        """
        if len(self._open) >= MOST_CHANNELS and ae_title not in self._open:
            await socket.close(1013)
            return
        await socket.accept()
        before = self._open.pop(ae_title, None)
        wanted = asyncio.Event()
        self._open[ae_title] = (socket, wanted)
        if before is not None:
            before[1].set()
        reader = asyncio.create_task(self._read(socket, wanted))
        try:
            while not reader.done() and self._open.get(ae_title, (None,))[0] is socket:
                wanted.clear()
                for row in await run_in_threadpool(self._ledger.next_events, ae_title):
                    await socket.send_text(json.dumps(message(row), ensure_ascii=False))
                    await run_in_threadpool(self._ledger.heard, row["id"])
                    if reader.done():
                        return
                try:
                    await asyncio.wait_for(wanted.wait(), POLL_SECONDS)
                except TimeoutError:
                    continue
        except (WebSocketDisconnect, RuntimeError, OSError):
            log.info("worklist: the channel of %s broke", ae_title)
        finally:
            reader.cancel()
            if self._open.get(ae_title, (None,))[0] is socket:
                del self._open[ae_title]
            elif not reader.done():
                await _close(socket)

    @staticmethod
    async def _read(socket: WebSocket, wanted: asyncio.Event) -> None:
        """Notice that the subscriber goes; what it says is nothing to us."""
        try:
            while (await socket.receive())["type"] != "websocket.disconnect":
                pass
        except (RuntimeError, OSError):
            pass
        finally:
            wanted.set()


async def _close(socket: WebSocket) -> None:
    try:
        await socket.close(REPLACED)
    except (RuntimeError, OSError, WebSocketDisconnect):
        return


def message(row: Row) -> Step:
    """A report as a data set in the DICOM JSON model, with the elements of a command (PS3.18 11.13)."""
    step: Step = {}
    put(step, "AffectedSOPClassUID", "UI", EVENT)
    put(step, "MessageID", "US", int(row["id"]) & 0xFFFF)
    put(step, "AffectedSOPInstanceUID", "UI", row["uid"])
    put(step, "EventTypeID", "US", row["event_type"])
    information: dict[str, Any] = row["information"]
    return {**step, **information}
