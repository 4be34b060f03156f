"""The benchmark of alerts: from the outbox through MLLP to the acknowledgement, beside a bare socket, and under faults.

The listener is a thread of the same process, and the same for both, so what it costs weighs on both.
"""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

from pydicom.dataset import Dataset

from appliance.delivery.hl7 import MllpClient, outcome
from appliance.delivery.outbox import Result, Worker
from appliance.events import Event
from appliance.findings.alert import message_control_id, render_alert
from appliance.ledger.database import Row, now
from appliance.ledger.records import Verdict
from appliance.ledger.store import Ledger, NewFinding, NewInstance
from appliance.ledger.views import event_counts, studies
from appliance.mllp import Deframer, frame
from dicom_io.errors import ScansideError
from dicom_io.header import Header

DESTINATION = "er"
Fault = Literal["none", "late", "nak", "cut", "dropped", "wrong id"]
"""What a listener does instead of an answer: none; one that comes after the client has given up; AE; it closes the
connection in the middle of the message, or after it; an answer for another message."""
LOST: tuple[Fault, ...] = ("nak", "cut")
"""Faults after which the listener does not have the message."""


def alert(number: int) -> tuple[Verdict, str, str]:
    """The n-th alert: verdict, MSH-10 and message."""
    uid = f"2.25.{number + 1}"
    verdict = Verdict(
        uid, f"{uid}.1", "ich_reference", "1", "Benchmark.", True, 0.91, 0.5, {"subdural": 0.8}, 12.3, (), (), (), (),
        mode="evaluation",
    )  # fmt: skip
    source = Dataset()
    source.StudyInstanceUID, source.PatientID, source.AccessionNumber = uid, f"P{number}", f"A{number}"
    source.PatientName, source.StudyDate, source.StudyTime = "Bench^Mark", "20260102", "030405"
    identity = message_control_id(uid, DESTINATION)
    text = render_alert(
        verdict, source, control_id=identity, kind="alert", issued_at=datetime.now(UTC), processing_id="T",
        sending_application="SCANSIDE", sending_facility="BOX", receiving_application="ER", receiving_facility="BOX",
    )  # fmt: skip
    return verdict, identity, text


def prepare(ledger: Ledger, folder: Path, count: int) -> list[str]:
    """So many studies with a positive verdict whose alert waits to be delivered; their MSH-10 in order."""
    association = ledger.open_association("BENCH", "SCANSIDE", "127.0.0.1")
    made = [alert(number) for number in range(count)]
    ledger.record_instances(
        [NewInstance(_header(verdict), f"{number:064x}", 1, association) for number, (verdict, _, _) in enumerate(made)]
    )
    ledger.close_association(association, "released")
    for arriving in ledger.arriving_studies():
        ledger.complete_study(arriving.id, arriving.last_instance_at, {"by": "bench", "confidence": "high"})
        ledger.decide(
            arriving.id, "ich_reference", "1", admitted=True, reason="", admission=[], selection=[], inputs=[]
        )
    for verdict, identity, text in made:
        row = ledger.take_analysis(["ich_reference"])
        if row is None or row["study_instance_uid"] != verdict.study_instance_uid:
            raise ScansideError(
                "the studies of the benchmark are not analysed in order", DESTINATION, "report this fault"
            )
        (folder / f"{identity}.hl7").write_text(text, encoding="utf-8", newline="")
        finding = NewFinding(f"alert.{DESTINATION}", identity, f"{identity}.hl7", (DESTINATION,), 0)
        ledger.issue_verdict(row["id"], 1, verdict, now(), [finding], admission=[], late=False)
    return [identity for _, identity, _ in made]


@dataclass
class Listener:
    """An MLLP listener on the loopback interface; with a chance of faults it misbehaves at random.

    Attributes:
        chance: of a fault, for each message.
        late_seconds: after which a late answer comes; longer than the client waits.
        arrived: (MSH-10, study UID) of each message that it has, copies too, in the order in which they came.
        faults: how often it did what.
    """

    chance: float = 0.0
    late_seconds: float = 0.3
    seed: int = 20261124
    arrived: list[tuple[str, str]] = field(default_factory=list)
    faults: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._lock = threading.Lock()
        self._server = socket.create_server(("127.0.0.1", 0))
        self._connections: list[socket.socket] = []
        self.port = int(self._server.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no more, and end what is open."""
        self._server.close()
        for connection in self._connections:
            connection.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._server.accept()
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._connections.append(connection)
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _draw(self) -> Fault | None:
        with self._lock:
            if self._random.random() >= self.chance:
                return None
            fault: Fault = self._random.choice(get_args(Fault))
            self.faults[fault] = self.faults.get(fault, 0) + 1
            return fault

    def _serve(self, connection: socket.socket) -> None:
        deframer = Deframer(1 << 20)
        with contextlib.suppress(OSError), connection:
            fault = self._draw()
            while data := connection.recv(65536):
                if fault == "cut":
                    return
                for block in deframer.feed(data):
                    if not self._answer(connection, block.decode("utf-8"), fault):
                        return
                    fault = self._draw()

    def _answer(self, connection: socket.socket, message: str, fault: Fault | None) -> bool:
        """Keep a message and answer it; False if the connection is to be closed."""
        identity = message.split("|", 10)[9]
        study = message.partition("113014^DICOM Study^DCM||")[2].partition("|")[0]
        if fault not in LOST:
            with self._lock:
                self.arrived.append((identity, study))
        if fault == "dropped":
            return False
        if fault == "none":
            return True
        if fault == "late":
            time.sleep(self.late_seconds)
        said = "AE" if fault == "nak" else "AA"
        about = "ANOTHER" if fault == "wrong id" else identity
        connection.sendall(frame(f"MSH|^~\\&|ER|BENCH|SCANSIDE|BENCH|20260102||ACK|1|T|2.5.1\rMSA|{said}|{about}\r"))
        return True


def count(sent: Sequence[str], arrived: Sequence[tuple[str, str]]) -> dict[str, int]:
    """What became of the alerts that were sent.

    ``lost``: never arrived. ``doubled``: alerts that a receiver which keeps each MSH-10 once has more than once.
    ``reordered``: alerts that arrived, for the first time, after one that was issued later. ``copies``: what such a
    receiver left out.
    """
    place = {identity: number for number, identity in enumerate(sent)}
    kept = list(dict.fromkeys(arrived))
    studies_ = [study for _, study in kept]
    newest, reordered = -1, 0
    for identity, _ in kept:
        reordered += place[identity] < newest
        newest = max(newest, place[identity])
    return {
        "sent": len(sent),
        "lost": len(set(sent) - {identity for identity, _ in kept}),
        "doubled": len(studies_) - len(set(studies_)),
        "reordered": reordered,
        "copies": len(arrived) - len(kept),
    }


def measure(
    alerts: int,
    rounds: int,
    directory: Path | None = None,
    *,
    faults: float = 0.0,
    on_step: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Both in turn, so many rounds; with a chance of ``faults`` one run more, against a listener that misbehaves.

    Raises:
        ScansideError: alerts are not acknowledged in time.
    """
    ours, bare = [], []
    for number in range(rounds):
        on_step(f"round {number + 1} of {rounds}: a bare socket")
        bare.append(_bare(alerts))
        on_step(f"round {number + 1} of {rounds}: the outbox")
        ours.append(_outbox(alerts, directory, Listener(), ack_timeout=10.0))
    told: dict[str, Any] = {
        "alerts": alerts,
        "rounds": rounds,
        "outbox": _figures(ours),
        "bare_socket": _figures(bare),
        "ratio": round(median(a["alerts_per_s"] / b["alerts_per_s"] for a, b in zip(ours, bare, strict=True)), 4),
    }
    if faults:
        on_step("the outbox, and a listener that misbehaves")
        listener = Listener(faults)
        run = _outbox(alerts, directory, listener, ack_timeout=0.2)
        told["faults"] = {
            "chance": faults,
            "what": dict(sorted(listener.faults.items())),
            **{key: run[key] for key in ("sent", "lost", "doubled", "reordered", "copies", "alerts_per_s")},
        }
    return told


def _figures(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: round(median(one[key] for one in runs), 3) for key in ("alerts_per_s", "p50_ms", "p99_ms")}


def _bare(alerts: int) -> dict[str, float]:
    """Write each message on a socket and read until its answer ends; nothing is parsed or kept."""
    blocks = [frame(alert(number)[2]) for number in range(alerts)]
    listener = Listener()
    each = []
    try:
        with socket.create_connection(("127.0.0.1", listener.port)) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            begun = time.monotonic()
            for block in blocks:
                start = time.monotonic()
                connection.sendall(block)
                answer = b""
                while not answer.endswith(b"\x1c\r"):
                    answer += connection.recv(65536)
                each.append(time.monotonic() - start)
            seconds = time.monotonic() - begun
    finally:
        listener.close()
    return _run(alerts, seconds, each)


def _outbox(alerts: int, directory: Path | None, listener: Listener, *, ack_timeout: float) -> dict[str, Any]:
    """Deliver so many alerts from a new ledger, as `scanside deliver` does."""
    with TemporaryDirectory(dir=directory, prefix="alerts-") as name:
        folder = Path(name)
        ledger = Ledger(folder / "ledger.sqlite")
        sent = prepare(ledger, folder, alerts)
        client = MllpClient("127.0.0.1", listener.port, connect_timeout=5.0, ack_timeout=ack_timeout)

        def deliver(row: Row) -> Result:
            answer = client.send((folder / row["path"]).read_bytes().decode("utf-8"))
            return ("acknowledge" if outcome(answer) == "acknowledged" else "retry"), answer.code

        worker = Worker(
            ledger, DESTINATION, deliver, attempts=1000, first_retry_seconds=0.01, longest_retry_seconds=0.05,
            budget_seconds=60.0, order_seconds=60.0,
        )  # fmt: skip
        begun = time.monotonic()
        worker.start()
        try:
            while (times := _acknowledged(ledger)) is None:
                if time.monotonic() - begun > 60.0 + alerts:
                    raise ScansideError(f"{alerts} alerts were not acknowledged in time", DESTINATION, "ask for fewer")
                time.sleep(0.2)
        finally:
            worker.stop()
            worker.join(10.0)
            client.close()
            listener.close()
        spent = (max(end for _, end in times) - min(start for start, _ in times)) / 1e9
        each = [(end - start) / 1e9 for start, end in times]
        ledger.close()
    return _run(alerts, spent, each) | count(sent, listener.arrived)


def _acknowledged(ledger: Ledger) -> list[tuple[int, int]] | None:
    """Of each alert when its first try was taken up and when its answer was written down, in ns; None until all are."""
    if event_counts(ledger)[Event.DELIVERY_ACKNOWLEDGED] < event_counts(ledger)[Event.VERDICT_ISSUED]:
        return None
    found = []
    for report in studies(ledger):
        events = report["events"]
        first = next(one["monotonic_ns"] for one in events if one["name"] == Event.DELIVERY_SENDING)
        last = next(one["monotonic_ns"] for one in events if one["name"] == Event.DELIVERY_ACKNOWLEDGED)
        found.append((first, last))
    return found


def _run(alerts: int, seconds: float, each: Sequence[float]) -> dict[str, float]:
    cuts = quantiles(each, n=100) if len(each) > 1 else [each[0]] * 99
    return {"alerts_per_s": alerts / seconds, "p50_ms": cuts[49] * 1000, "p99_ms": cuts[98] * 1000}


def _header(verdict: Verdict) -> Header:
    """The least that the ledger wants to know of an image."""
    empty: dict[str, Any] = {"str": "", "int": 0}
    values: dict[str, Any] = {
        one.name: () if "tuple" in str(one.type) else empty.get(str(one.type)) for one in fields(Header)
    }
    uid = verdict.study_instance_uid
    return Header(
        **values
        | {
            "sop_instance_uid": f"{uid}.1.1",
            "study_instance_uid": uid,
            "series_instance_uid": verdict.series_instance_uid,
        }
    )


def lines(told: dict[str, Any]) -> list[str]:
    """The figures for people."""
    said = [
        f"{name.replace('_', ' '):<12} {told[name]['alerts_per_s']:8.0f} alerts/s   "
        f"p50 {told[name]['p50_ms']:7.2f} ms   p99 {told[name]['p99_ms']:7.2f} ms"
        for name in ("outbox", "bare_socket")
    ]
    said.append(f"ours/bare: {told['ratio']:.4f} ({told['alerts']} alerts, median of {told['rounds']} rounds)")
    if "faults" in told:
        one = told["faults"]
        what = ", ".join(f"{number} {name}" for name, number in one["what"].items())
        said.append(f"a listener that misbehaves: {what}")
        figures = "   ".join(f"{name} {one[name]}" for name in ("sent", "lost", "doubled", "reordered", "copies"))
        said.append(figures)
    return said
