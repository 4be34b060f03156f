"""The hospital's side of HL7: a listener that acknowledges messages and keeps each once.

Run it as ``python -m appliance.demo.listener --port 2575 --out received``. MLLP, parsing and the acknowledgement are
those of the `hl7` library, not of this appliance, so that the demo proves something.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import signal
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import hl7
import hl7.mllp

LIMIT = 4 * 1024 * 1024
"""Bytes that one message may have."""


def file_name(control_id: str) -> str:
    """The name of the file of the message with this MSH-10: safe in any folder, and different for different ids."""
    name = quote(control_id, safe="", encoding="utf-8", errors="replace")
    if name.startswith("."):
        name = "%2E" + name[1:]
    if len(name) > 120:
        name = name[:40] + "-" + hashlib.sha256(control_id.encode("utf-8", "replace")).hexdigest()
    return name + ".hl7"


class Listener:
    """Answers every message with one code, and keeps those that it accepts.

    Args:
        folder: receives ``<MSH-10>.hl7`` for each distinct message, exactly as it was sent, once it is whole.
        answer: MSA-1 of every answer; only a message answered with AA is kept.
        as_json: write each line as JSON.
    """

    def __init__(self, folder: Path, answer: str = "AA", as_json: bool = False) -> None:
        self.folder = folder
        self.answer = answer
        self.as_json = as_json
        self.duplicates = 0

    async def serve(self, reader: Any, writer: Any) -> None:
        """Answer one connection until its peer closes it or sends what is no MLLP."""
        try:
            while True:
                block = await reader.readblock()
                writer.writeblock(self.take(block).encode("utf-8"))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the peer closed the connection, which is how MLLP ends
        except (hl7.mllp.InvalidBlockError, hl7.HL7Exception, ValueError, LookupError) as error:
            self.report("unreadable", reason=str(error))
        finally:
            writer.close()

    def take(self, block: bytes) -> str:
        """Keep the message unless it is a duplicate, and give the acknowledgement for it.

        Raises:
            hl7.HL7Exception, ValueError, LookupError: it is no HL7 message that an answer could refer to.
        """
        message = hl7.parse(block.decode("utf-8", errors="replace"))
        header = message.segment("MSH")
        control_id = str(header[10]).strip()
        code = self.answer if control_id else "AE"
        acknowledgement = str(message.create_ack(code))
        path = self.folder / file_name(control_id)
        if code != "AA":
            state = "refused"
        elif path.exists():
            self.duplicates += 1
            state = "duplicate"
        else:
            _write(path, block)
            state = "stored"
        self.report(
            state, id=control_id, type=str(header[9]), sender=str(header[3]), bytes=len(block), answer=code,
            **({"file": path.name} if state == "stored" else {}),
            **({"duplicates": self.duplicates} if state == "duplicate" else {}),
        )  # fmt: skip
        return acknowledgement

    def report(self, state: str, **facts: str | int) -> None:
        """Print one line about one message."""
        now = datetime.now().astimezone()
        if self.as_json:
            print(json.dumps({"time": now.isoformat(), "state": state, **facts}), flush=True)
        else:
            print(f"{now:%H:%M:%S} {state:<10}", *(f"{key}={value}" for key, value in facts.items()), flush=True)


def _write(path: Path, data: bytes) -> None:
    """Write the file so that a reader of the folder never sees half of it."""
    whole = path.with_name(f".{path.name}.part")
    with whole.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    whole.rename(path)


async def run(listener: Listener, host: str, port: int, ready_file: Path | None = None) -> None:
    """Serve until SIGTERM or SIGINT; ``ready_file`` receives the port once connections are taken.

    Raises:
        OSError: the port cannot be bound.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    server = await hl7.mllp.start_hl7_server(
        listener.serve, host, port, limit=LIMIT, encoding="utf-8", encoding_errors="replace"
    )
    bound = server.sockets[0].getsockname()[1]
    listener.report("listening", host=host, port=bound, folder=str(listener.folder), answer=listener.answer)
    if ready_file is not None:
        _write(ready_file, f"{bound}\n".encode())
    await stop.wait()
    server.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; 0 after a stop that was asked for, 2 where it cannot start."""
    parser = argparse.ArgumentParser(prog="listener", description="An HL7 listener that acknowledges and keeps.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=2575, help="0 takes a free one")
    parser.add_argument("--out", type=Path, required=True, help="folder that receives the messages")
    parser.add_argument("--answer", choices=["AA", "AE", "AR"], default="AA", help="what to answer to every message")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--ready-file", type=Path, help="receives the port once connections are taken")
    options = parser.parse_args(arguments)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        asyncio.run(
            run(Listener(options.out, options.answer, options.json), options.host, options.port, options.ready_file)
        )
    except OSError as error:
        print(f"{options.host}:{options.port}: cannot listen: {error.strerror or error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
