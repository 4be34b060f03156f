"""The HL7 listener of intake with senders that nobody here wrote, and killed while they send."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import hl7
import hl7.client
import pytest

from appliance import init
from appliance.delivery.hl7 import MllpClient
from appliance.demo.orthanc import LOOPBACK, free_ports
from appliance.ledger.store import Ledger
from appliance.ledger.views import event_counts, verify_events
from appliance.settings import load_settings
from dicom_io.errors import PeerError
from tests.hl7_support import a08, a40, msh, omi, orm, oru
from tests.interop.box import wait_for
from tests.peers import node_packages

pytestmark = pytest.mark.interop

HERE = Path(__file__).resolve().parent


class Hearing:
    """A running `scanside intake` that hears HL7."""

    def __init__(self, folder: Path) -> None:
        port, self.port = free_ports(2)
        intake = {"host": LOOPBACK, "port": port, "reserve_percent": 0.0, "reserve_bytes": 0}
        self.config = init.write(folder, {"intake": {**intake, "hl7": {"port": self.port}}})
        self.log = folder / "intake.log"
        self.start()
        self.ledger = Ledger(load_settings(self.config).ledger_path)

    def start(self) -> None:
        command = [sys.executable, "-m", "appliance.cli", "--config", self.config, "intake"]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(command, stderr=log)

        def listening() -> bool | None:
            assert self.process.poll() is None, self.log.read_text()
            try:
                hl7.client.MLLPClient(LOOPBACK, self.port).close()
            except OSError:
                return None
            return True

        wait_for(listening, 60.0, lambda: f"no HL7 is heard\n{self.log.read_text()}")

    def stop(self) -> None:
        self.ledger.close()
        self.process.terminate()
        assert self.process.wait(15) == 0, self.log.read_text()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def hearing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hearing]:
    one = Hearing(tmp_path_factory.mktemp("hearing"))
    yield one
    one.stop()


@pytest.fixture(scope="session")
def node_modules() -> Path:
    return node_packages(HERE)


def some(prefix: str) -> list[tuple[str, str]]:
    """Messages of every kind, and the code that each is to be answered with."""
    return [
        (orm(f"{prefix}1", accession=f"{prefix}A", priority="S"), "AA"),
        (omi(f"{prefix}2", accession=f"{prefix}B"), "AA"),
        (a08(f"{prefix}3", born="19700101"), "AA"),
        (a40(f"{prefix}4", survivor="P2^^^OTHER", prior="P1^^^OTHER"), "AA"),
        (oru(f"{prefix}5", accession=f"{prefix}A", text="Blutung, 脳出血"), "AA"),
        (orm(f"{prefix}6", control="ZZ"), "AE"),
        (f"{msh('ADT^A01', f'{prefix}7')}EVN|A01\r", "AR"),
    ]


def check(hearing: Hearing, prefix: str, answered: Sequence[str]) -> None:
    read = [hl7.parse(one.strip("\r\n") + "\r") for one in answered]
    sent = some(prefix)
    assert [(str(one.segment("MSA")(1)), str(one.segment("MSA")(2))) for one in read] == [
        (code, f"{prefix}{number}") for number, (_, code) in enumerate(sent, start=1)
    ]
    assert [len(one.segments("ERR")) for one in read if "\rERR|" in str(one)] == [1, 1]
    (urgent,), _ = hearing.ledger.orders_for([f"{prefix}A"], "")
    assert (urgent.urgent, urgent.birth_date) == (True, "19700101")
    (report,) = hearing.ledger.report_rows([f"{prefix}A"], "")
    assert report["text"] == "Blutung, 脳出血"


def test_the_hl7_librarys_client(hearing: Hearing) -> None:
    with hl7.client.MLLPClient(LOOPBACK, hearing.port) as client:
        answered = [client.send_message(text).strip(b"\x0b\x1c\r").decode() for text, _ in some("PY")]
    check(hearing, "PY", answered)


@pytest.mark.parametrize(("library", "prefix"), [("node-hl7-client", "NH"), ("simple-hl7", "SH")])
def test_node_clients(hearing: Hearing, node_modules: Path, library: str, prefix: str) -> None:
    done = subprocess.run(
        ["node", str(HERE / "senders.cjs"), library, str(hearing.port)],
        cwd=node_modules,
        input=json.dumps([text for text, _ in some(prefix)]),
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    check(hearing, prefix, [json.loads(line)["answer"] for line in done.stdout.splitlines()])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_what_was_acknowledged_is_kept_once_whenever_intake_is_killed(tmp_path: Path) -> None:
    """An interface engine sends each order until it has an AA for it; intake is killed with -9 meanwhile."""
    chance = random.Random(20261129)
    hearing = Hearing(tmp_path)
    tries: list[str] = []
    sending = threading.Event()

    def send() -> None:
        client = MllpClient(LOOPBACK, hearing.port, connect_timeout=2.0, ack_timeout=2.0)
        for number in range(300):
            while True:
                tries.append(f"M{number}")
                try:
                    # Each changes the order that the one before it placed: one that is applied late would show.
                    priority = "S" if number % 2 else "R"
                    if client.send(orm(f"M{number}", accession=f"A{number // 10}", priority=priority)).code == "AA":
                        break
                except PeerError:
                    time.sleep(0.05)
        client.close()
        sending.set()

    thread = threading.Thread(target=send)
    thread.start()
    kills = 0
    while not sending.wait(chance.uniform(0.2, 1.0)):
        if kills < 3:
            hearing.kill()
            hearing.start()
            kills += 1
    thread.join(60)
    counts = event_counts(hearing.ledger)
    kept = [one["control_id"] for one in reversed(hearing.ledger.messages(1000))]
    assert kept == [f"M{number}" for number in range(300)], "each once, in order"
    assert counts["message.taken"] == 300 and counts["order.placed"] == 30 and counts["order.changed"] == 270
    for number in range(30):
        (order,), _ = hearing.ledger.orders_for([f"A{number}"], "")
        assert order.urgent
    assert verify_events(hearing.ledger) is None
    assert kills
    hearing.stop()
