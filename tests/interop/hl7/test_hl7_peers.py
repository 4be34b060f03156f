"""The MLLP client against HL7 listeners that nobody here wrote."""

from __future__ import annotations

import asyncio
import json
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hl7
import hl7.mllp
import pytest

from appliance.delivery.hl7 import MllpClient
from tests.peers import node_packages

pytestmark = pytest.mark.interop

HERE = Path(__file__).resolve().parent
NODE_LIBRARIES = {"node-hl7-server": 20, "simple-hl7": 0}
"""Library → the oldest major version of Node.js that it runs on."""


def message(control_id: str, text: str = "Blutung möglich, 脳出血") -> str:
    return (
        f"MSH|^~\\&|SCANSIDE|BOX|RIS|HOSP|20260102030405||ORU^R01^ORU_R01|{control_id}|P|2.5.1|||||||UNICODE UTF-8\r"
        "PID|1||P1^^^HOSP^MR||Müller^Jürgen\r"
        f"OBX|1|TX|59776-5^Procedure Findings^LN||{text}||||||P\r"
    )


def client_of(port: int, ack_timeout: float = 10.0) -> MllpClient:
    return MllpClient("127.0.0.1", port, connect_timeout=5.0, ack_timeout=ack_timeout)


# The listener of the hl7 library for Python


@contextmanager
def python_listener(code: str) -> Iterator[tuple[int, list[str]]]:
    """The library's own server in a thread; its port and the messages that it read."""
    received: list[str] = []
    ready = threading.Event()
    ports: list[int] = []
    loop = asyncio.new_event_loop()

    async def serve(reader: Any, writer: Any) -> None:
        try:
            while True:
                read = await reader.readmessage()
                received.append(str(read))
                writer.writemessage(read.create_ack(code))
                await writer.drain()
        except asyncio.IncompleteReadError:
            writer.close()

    async def start() -> None:
        server = await hl7.mllp.start_hl7_server(serve, "127.0.0.1", 0, encoding="utf-8", limit=2**22)
        ports.append(server.sockets[0].getsockname()[1])
        ready.set()

    def run() -> None:
        loop.run_until_complete(start())
        loop.run_forever()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield ports[0], received
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(5)
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()


@pytest.mark.parametrize("code", ["AA", "AE", "AR", "CA", "CE", "CR"])
def test_python_hl7(code: str) -> None:
    with python_listener(code) as (port, received), client_of(port) as client:
        for number in range(5):
            read = client.send(message(f"M{number}"))
            assert (read.code, read.control_id) == (code, f"M{number}")
        assert received == [message(f"M{number}") for number in range(5)]


def test_python_hl7_takes_a_long_message() -> None:
    with python_listener("AA") as (port, received), client_of(port) as client:
        long = message("LONG", "ö" * 1_000_000)
        assert client.send(long).code == "AA"
        assert received == [long]


# The listeners from npm


@pytest.fixture(scope="session")
def node_modules() -> Path:
    """The folder into which the pinned packages are installed, once for all test processes."""
    return node_packages(HERE)


@contextmanager
def node_listener(folder: Path, library: str, code: str) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    version = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True).stdout
    if int(version.lstrip("v").split(".")[0]) < NODE_LIBRARIES[library]:
        pytest.skip(f"{library} needs Node.js {NODE_LIBRARIES[library]}, this is {version.strip()}")
    process = subprocess.Popen(
        ["node", str(HERE / "peers.cjs"), library, code],
        cwd=folder,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["port"], process
    finally:
        process.kill()
        process.communicate()


def heard(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return str(json.loads(process.stdout.readline())["message"])


@pytest.mark.parametrize("code", ["AA", "AE", "AR"])
@pytest.mark.parametrize("library", NODE_LIBRARIES)
def test_node_listeners_read_our_message_and_we_read_their_answer(node_modules: Path, library: str, code: str) -> None:
    with node_listener(node_modules, library, code) as (port, process), client_of(port) as client:
        read = client.send(message("M1"))
        assert (read.code, read.control_id) == (code, "M1")
        assert heard(process).rstrip("\r") == message("M1").rstrip("\r")


def test_simple_hl7_takes_one_message_after_another(node_modules: Path) -> None:
    with node_listener(node_modules, "simple-hl7", "AA") as (port, process), client_of(port) as client:
        for number in range(20):
            assert client.send(message(f"M{number}", "ö" * 30_000)).control_id == f"M{number}"
            assert hl7.parse(heard(process))["MSH.F10.R1"] == f"M{number}"


def test_a_listener_that_also_answers_earlier_messages_is_followed(
    node_modules: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """node-hl7-server 2.5.0 takes all messages of a connection for one batch and acknowledges each again each time."""
    with node_listener(node_modules, "node-hl7-server", "AA") as (port, process), client_of(port) as client:
        for number in range(4):
            assert client.send(message(f"M{number}")).control_id == f"M{number}"
        seen = [hl7.parse(heard(process))["MSH.F10.R1"] for _ in range(10)]
        assert seen == ["M0", "M0", "M1", "M0", "M1", "M2", "M0", "M1", "M2", "M3"]
    assert "answered M0 while M3 was waited for; ignored" in caplog.text
