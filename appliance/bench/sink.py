"""A sink: reads every PDU into one buffer, answers each C-STORE with Success, and keeps nothing but the UID.

It shows what sockets, senders and the kernel alone allow in Python; it is no receiver. Negotiation is pynetdicom's.
Run it as ``python -m appliance.bench.sink PORT TALLY``. The UIDs of what it answered are appended to the file TALLY
when an association is released, before the release is answered.
"""

from __future__ import annotations

import socket
import sys
import threading
from pathlib import Path

from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import build_context
from pynetdicom.sop_class import CTImageStorage, Verification  # type: ignore[attr-defined, unused-ignore]

from appliance.bench import wire

SUPPORTED = [
    build_context(Verification, [ExplicitVRLittleEndian, ImplicitVRLittleEndian]),
    build_context(CTImageStorage, [ExplicitVRLittleEndian, ImplicitVRLittleEndian]),
]


class Sink:
    """Serves connections, each in a thread."""

    def __init__(self, tally: Path) -> None:
        self._tally = tally
        self._lock = threading.Lock()

    def serve(self, connection: socket.socket) -> None:
        """Serve one association until it is released or breaks."""
        try:
            with connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._associated(connection)
        except (OSError, wire.Broken):
            return

    def _associated(self, connection: socket.socket) -> None:
        reader = wire.Reader(connection)
        _, body = reader.read()
        connection.sendall(wire.acceptance(body, SUPPORTED))
        answered: list[str] = []
        asked: dict[int, bytes] = {}
        command = b""
        while True:
            kind, body = reader.read(quick=True)
            if kind == wire.RELEASE_RQ:
                self._write(answered)
                connection.sendall(wire.RELEASE_RESPONSE)
                return
            if kind != wire.P_DATA:
                return
            for context, control, fragment in wire.values(body):
                if control & wire.IS_COMMAND:
                    command += bytes(fragment)
                    if control & wire.IS_LAST:
                        asked, command = wire.elements_of(command), b""
                        if int.from_bytes(asked[wire.COMMAND_FIELD], "little") == wire.C_ECHO_RQ:
                            connection.sendall(wire.answer_to(context, asked))
                elif control & wire.IS_LAST:
                    connection.sendall(wire.answer_to(context, asked))
                    answered.append(wire.text(asked[wire.AFFECTED_INSTANCE]))

    def _write(self, uids: list[str]) -> None:
        with self._lock, self._tally.open("a", encoding="ascii") as file:
            file.writelines(f"{uid}\n" for uid in uids)


def main() -> None:
    """The program; it runs until it is stopped."""
    sink = Sink(Path(sys.argv[2]))
    with socket.create_server(("127.0.0.1", int(sys.argv[1])), backlog=64) as server:
        while True:
            connection, _ = server.accept()
            threading.Thread(target=sink.serve, args=(connection,), daemon=True).start()


if __name__ == "__main__":
    main()
