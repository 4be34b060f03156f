"""The demo's HL7 listener as the separate process that it is, seen through a plain socket and its folder."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import hl7
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.demo.listener import file_name


def message(control_id: str, extra: str = "") -> bytes:
    return (
        f"MSH|^~\\&|BOX|A|RIS|B|20260102030405||ORU^R01^ORU_R01|{control_id}|P|2.5.1\rOBX|1|TX|1||Blutung ö{extra}\r"
    ).encode()


@dataclass
class Running:
    process: subprocess.Popen[str]
    port: int
    folder: Path

    def exchange(self, *blocks: bytes, connection: socket.socket | None = None) -> list[hl7.Message]:
        """Send the blocks in one packet and read as many answers."""
        with connection or socket.create_connection(("127.0.0.1", self.port), 5) as peer:
            peer.settimeout(5)
            peer.sendall(b"".join(b"\x0b" + block + b"\x1c\r" for block in blocks))
            data = b""
            while data.count(b"\x1c\r") < len(blocks):
                piece = peer.recv(65536)
                if not piece:
                    break
                data += piece
            return [hl7.parse(part.lstrip(b"\x0b").decode()) for part in data.split(b"\x1c\r") if part]

    def stop(self) -> list[dict[str, object]]:
        self.process.send_signal(signal.SIGTERM)
        output, _ = self.process.communicate(timeout=5)
        return [json.loads(line) for line in output.splitlines()]


@contextmanager
def listening(folder: Path, *options: str) -> Iterator[Running]:
    ready = folder.parent / f"{folder.name}.port"
    process = subprocess.Popen(
        [sys.executable, "-m", "appliance.demo.listener", "--port", "0", "--out", str(folder),
         "--ready-file", str(ready), "--json", *options],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[3],
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 15
        while not ready.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield Running(process, int(ready.read_text()), folder)
    finally:
        ready.unlink(missing_ok=True)
        process.kill()
        process.wait()


def test_messages_are_kept_once_and_byte_for_byte(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    with listening(folder) as running:
        acks = running.exchange(message("M1"), message("M2"), message("M1", "again"))
        assert [(ack["MSA.F1.R1"], ack["MSA.F2.R1"]) for ack in acks] == [("AA", "M1"), ("AA", "M2"), ("AA", "M1")]
        lines = running.stop()
    assert {path.name for path in folder.iterdir()} == {"M1.hl7", "M2.hl7"}
    assert (folder / "M1.hl7").read_bytes() == message("M1")
    assert [(line["state"], line.get("id")) for line in lines[1:]] == [
        ("stored", "M1"),
        ("stored", "M2"),
        ("duplicate", "M1"),
    ]
    with listening(folder) as running:
        [ack] = running.exchange(message("M1", "after a restart"))
        assert ack["MSA.F1.R1"] == "AA"
        assert running.stop()[1]["state"] == "duplicate"
    assert (folder / "M1.hl7").read_bytes() == message("M1")


@pytest.mark.parametrize("code", ["AE", "AR"])
def test_a_refusing_listener_keeps_nothing(tmp_path: Path, code: str) -> None:
    folder = tmp_path / "in"
    with listening(folder, "--answer", code) as running:
        [ack] = running.exchange(message("M1"))
        assert (ack["MSA.F1.R1"], ack["MSA.F2.R1"]) == (code, "M1")
        assert running.stop()[1]["state"] == "refused"
    assert list(folder.iterdir()) == []


def test_a_control_id_cannot_leave_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    with listening(folder) as running:
        running.exchange(message("../../evil"), message("."), message(".."), message("a/b\0c"), message("x" * 5000))
        running.stop()
    assert len(list(folder.iterdir())) == 5
    assert {path.name for path in tmp_path.iterdir()} == {"in"}


def test_garbage_costs_its_own_connection_only(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    with listening(folder) as running:
        good = socket.create_connection(("127.0.0.1", running.port), 5)
        for garbage in (b"hello\x1c\r", b"\x0bhello\x1c\r", b"\x0b\x1c\r", b"\x0bMSH|^~\\&|A\x1c\r", b"\x0bMSH\x1c\r"):
            with socket.create_connection(("127.0.0.1", running.port), 5) as peer:
                peer.sendall(garbage)
                peer.settimeout(5)
                assert peer.recv(100) == b""
        assert running.exchange(message("M1"), connection=good)[0]["MSA.F1.R1"] == "AA"
        assert [line["state"] for line in running.stop()[1:]] == ["unreadable"] * 5 + ["stored"]


def test_a_message_without_control_id_is_an_error(tmp_path: Path) -> None:
    with listening(tmp_path / "in") as running:
        assert running.exchange(message(""))[0]["MSA.F1.R1"] == "AE"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_stops_at_once_while_a_connection_is_open(tmp_path: Path, number: signal.Signals) -> None:
    with (
        listening(tmp_path / "in") as running,
        socket.create_connection(("127.0.0.1", running.port), 5) as peer,
    ):
        peer.sendall(b"\x0bMSH|half a mess")
        time.sleep(0.1)
        begun = time.monotonic()
        running.process.send_signal(number)
        assert running.process.wait(5) == 0
        assert time.monotonic() - begun < 2


def test_a_port_in_use_is_one_clear_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        ended = subprocess.run(
            [sys.executable, "-m", "appliance.demo.listener", "--port", str(port), "--out", str(tmp_path)],
            capture_output=True,
            text=True,
            timeout=20,
            cwd=Path(__file__).parents[3],
        )
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"127.0.0.1:{port}: cannot listen")
    assert len(ended.stderr.splitlines()) == 1


@settings(deadline=None)
@given(st.lists(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=300), unique=True, max_size=20))
def test_file_names_are_safe_and_distinct(ids: list[str]) -> None:
    names = [file_name(control_id) for control_id in ids]
    assert len(set(names)) == len(ids)
    for name in names:
        assert name.isascii()
        assert "/" not in name
        assert "\0" not in name
        assert len(name) <= 128
        assert name.endswith(".hl7")
        assert not name.startswith(".") or name == ".hl7"
