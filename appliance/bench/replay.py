"""A sender that costs next to nothing: data sets go from the page cache to the socket, behind headers made by hand.

Run it as ``python -m appliance.bench.replay [--every SECONDS] HOST PORT CALLING CALLED LIST…``, one LIST for each
association: a file with the path of a Part 10 file in each line. With ``--every`` an image is sent no sooner than that
long after the one before, as a scanner makes them. It prints ``ready``, waits for a line on its standard input, sends,
and prints one JSON object: ``seconds`` from the first connection to the last release, ``responses_ms`` for each image,
and ``error``, empty if every answer was Success.

Each association negotiates by pynetdicom's PDUs, then sends one image after another and waits for each answer, as
common senders do. The response time of an image is that from its first byte to the end of its answer.
"""

from __future__ import annotations

import json
import mmap
import resource
import socket
import struct
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydicom.filereader import read_file_meta_info

from appliance.bench import wire

TIMEOUT = 300.0
"""Seconds; a receiver of one association at a time keeps the others waiting before it accepts them."""
_GATHER = 512
"""Parts of one gathering write; Linux takes up to 1024 (IOV_MAX)."""


@dataclass(frozen=True, slots=True)
class Image:
    """A data set in the page cache, and what the command says about it."""

    sop_class: str
    sop_instance: str
    syntax: str
    data: memoryview


def load(path: Path) -> Image:
    """Map a Part 10 file into memory, and read it once, so that the sending does not wait for the disk."""
    meta = read_file_meta_info(path)
    with path.open("rb") as file:
        whole = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    # The group length (0002,0000) is the first element; its value counts what follows it (PS3.10 7.1).
    start = 144 + int(struct.unpack_from("<I", whole, 140)[0])
    sum(whole[:: mmap.PAGESIZE])
    return Image(
        str(meta.MediaStorageSOPClassUID), str(meta.MediaStorageSOPInstanceUID), str(meta.TransferSyntaxUID),
        whole[start:],
    )  # fmt: skip


class Association:
    """Sends its images over one association when `start` is set."""

    def __init__(
        self, address: tuple[str, int], titles: tuple[str, str], images: Sequence[Image], every: float = 0.0
    ) -> None:
        self._address = address
        self._titles = titles
        self._images = images
        self._every = every
        self.responses_ms: list[float] = []
        self.error = ""

    def run(self, start: threading.Event) -> None:
        """For a thread: wait for ``start``, then send everything and release."""
        start.wait()
        try:
            with socket.create_connection(self._address, timeout=TIMEOUT) as connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._converse(connection)
        except (OSError, wire.Broken) as error:
            self.error = str(error) or type(error).__name__

    def _converse(self, connection: socket.socket) -> None:
        first = self._images[0]
        connection.sendall(wire.request(*self._titles, first.sop_class, first.syntax))
        reader = wire.Reader(connection)
        longest = min(wire.accepted(*reader.read()), wire.MAXIMUM_PDU)
        first_at = time.perf_counter()
        for number, image in enumerate(self._images):
            message_id = number % 65_535 + 1
            request = wire.store_request(message_id, image.sop_class, image.sop_instance)
            parts = [memoryview(request), *wire.data_pdus(image.data, longest)]
            time.sleep(max(0.0, first_at + number * self._every - time.perf_counter()))
            began = time.perf_counter()
            _send(connection, parts)
            answer = _answer(reader)
            self.responses_ms.append((time.perf_counter() - began) * 1000)
            status = int.from_bytes(answer[wire.STATUS], "little")
            if status != 0x0000 or int.from_bytes(answer[wire.RESPONDED_TO], "little") != message_id:
                raise wire.Broken(f"{image.sop_instance} was answered with status 0x{status:04X}")
        connection.sendall(wire.RELEASE_REQUEST)
        kind, _ = reader.read()
        if kind != wire.RELEASE_RP:
            raise wire.Broken(f"the release was answered with PDU type {kind}")


def _send(connection: socket.socket, parts: list[memoryview]) -> None:
    place = 0
    while place < len(parts):
        sent = connection.sendmsg(parts[place : place + _GATHER])
        while sent and sent >= len(parts[place]):
            sent -= len(parts[place])
            place += 1
        if sent:
            parts[place] = parts[place][sent:]


def _answer(reader: wire.Reader) -> dict[int, bytes]:
    """The command set of the next message."""
    command = b""
    while True:
        kind, body = reader.read(quick=True)
        if kind != wire.P_DATA:
            raise wire.Broken(f"an image was answered with PDU type {kind}")
        for _, control, fragment in wire.values(body):
            command += bytes(fragment)
            if control & wire.IS_LAST:
                return wire.elements_of(command)


def main() -> None:
    """The program."""
    words = sys.argv[1:]
    every = float(words[1]) if words[0] == "--every" else 0.0
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a map holds its file open
    host, port, calling, called, *lists = words[2:] if every else words
    associations = [
        Association(
            (host, int(port)),
            (calling, called),
            [load(Path(line)) for line in Path(one).read_text().split("\n")],
            every,
        )
        for one in lists
    ]
    start = threading.Event()
    threads = [threading.Thread(target=one.run, args=(start,), daemon=True) for one in associations]
    for thread in threads:
        thread.start()
    print("ready", flush=True)
    if not sys.stdin.readline():
        return  # whoever started this is gone
    began = time.perf_counter()
    start.set()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    responses = [round(response, 3) for one in associations for response in one.responses_ms]
    error = next((one.error for one in associations if one.error), "")
    print(json.dumps({"seconds": seconds, "responses_ms": responses, "error": error}), flush=True)


if __name__ == "__main__":
    main()
