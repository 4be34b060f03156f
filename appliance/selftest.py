"""`scanside selftest`: a simulated bleed and a simulated normal head go the whole way through the running box.

They come in where scanners do, are judged by the gate, decoded, read by Triton, and answered: alert and objects come
out at a listener and an archive that this process opens on the loopback, and nowhere else. What tells them from a
patient's study is in `appliance.ledger.selftest`.
"""

from __future__ import annotations

import asyncio
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hl7.mllp
import sqlalchemy as sa

from appliance.demo.listener import LIMIT, Listener
from appliance.demo.plain_pacs import FallbackPacs
from appliance.ledger import schema as t
from appliance.ledger.selftest import SELFTEST_AE, is_loopback
from appliance.ledger.store import Ledger
from appliance.ledger.views import find_study, study_report
from appliance.services.process import only_one
from appliance.services.selftest import LOOPBACK, port_of
from appliance.settings import Settings
from dicom_io.errors import ScansideError
from dicom_io.header import read_header
from dicom_io.scu import Peer, echo, send
from triton_models.training.phantom import Phantom, simulate, write_study

BLEED, BLEED_SEED, NORMAL_SEED = "intraparenchymal", 7, 19
"""Heads that the reference model reads right, as those of the demo."""
_LOOK_SECONDS = 0.1

Step = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class Result:
    """How one head fared.

    Attributes:
        expected: positive or negative.
        positive, probability: of the verdict; of several packages, of the one that is furthest from what was expected.
        seconds: from its last image to all that was expected.
        alert: whether an alert came out.
        objects: how many came out.
        reason: why it failed; '' if it passed.
    """

    expected: str
    study: int | None
    positive: bool | None
    probability: float | None
    seconds: float | None
    alert: bool
    objects: int
    reason: str

    @property
    def passed(self) -> bool:
        """Whether all came out as expected, in time."""
        return not self.reason


@dataclass(frozen=True, slots=True)
class _Outside:
    """The loopback's hospital."""

    folder: Path
    archive: FallbackPacs
    alert_port: int

    def alerted(self, uid: str) -> bool:
        return any(uid in one.read_text(encoding="utf-8") for one in self.folder.glob("*.hl7"))


def run_selftest(settings: Settings, seconds: float, on_step: Step = lambda _: None) -> list[Result]:
    """Send both heads, one after the other; how each fared.

    Args:
        seconds: longest from the last image of one until all of it has come out.

    Raises:
        ScansideError: another self-test runs, or intake cannot be reached as one; nothing was sent then.
    """
    if not settings.ledger_path.exists():
        raise ScansideError("there is no ledger yet", str(settings.ledger_path), "start scanside first")
    with only_one(settings, "selftest"), tempfile.TemporaryDirectory(prefix="scanside-selftest-") as name:
        ledger = Ledger(settings.ledger_path)
        try:
            ledger.sweep_selftests()
            peer = Peer(settings.intake.ae_title, LOOPBACK, port_of(settings))
            _knock(ledger, peer)
            with _outside(Path(name) / "hospital") as outside:
                results = []
                for expected, seed, bleed in ((True, BLEED_SEED, BLEED), (False, NORMAL_SEED, None)):
                    on_step(f"simulating a head {'with' if expected else 'without'} a bleed")
                    head = simulate(seed, bleed=bleed)
                    folder = Path(name) / ("positive" if expected else "negative")
                    results.append(_one(settings, ledger, peer, outside, head, folder, expected, seconds, on_step))
                return results
        finally:
            ledger.close()


def _knock(ledger: Ledger, peer: Peer) -> None:
    """Make sure, before anything is sent, that intake sees us as a self-test.

    Raises:
        ScansideError: it does not answer, or somebody stands between us and it.
    """
    echo(peer, SELFTEST_AE)
    a = t.association.c
    query = sa.select(a.address).where(a.calling_ae == SELFTEST_AE).order_by(a.id.desc()).limit(1)
    with ledger.read() as connection:
        address = connection.scalar(query)
    if address is None or not is_loopback(str(address)):
        raise ScansideError(
            f"intake at {peer} is not of this ledger, or sees us come from {address or 'nowhere'}",
            "intake.port",
            "run the self-test on the box itself, with the box's own configuration",
        )


def _one(
    settings: Settings,
    ledger: Ledger,
    peer: Peer,
    outside: _Outside,
    head: Phantom,
    folder: Path,
    expected: bool,
    seconds: float,
    on_step: Step,
) -> Result:
    # Drawn at random, so that nobody else can send this study, by accident or otherwise; all UIDs follow from it.
    files = write_study(head, folder, patient_id=f"SELFTEST-{uuid.uuid4().hex}", accession_number="SELFTEST")
    uid = read_header(files[0]).study_instance_uid
    ledger.begin_selftest(uid, expected=expected, alert_port=outside.alert_port, object_port=outside.archive.port)
    result = Result("positive" if expected else "negative", None, None, None, None, False, 0, "it did not end")
    try:
        on_step(f"sending {len(files)} images")
        failed = [one for one in send(files, peer, SELFTEST_AE) if one.error]
        last = time.monotonic()
        if failed:
            said = f"{len(failed)} images were not stored: {failed[0].error}"
            result = Result(result.expected, find_study(ledger, uid), None, None, None, False, 0, said)
            return result
        on_step("waiting for what comes out")
        while True:
            took = time.monotonic() - last
            result = _look(settings, ledger, outside, uid, expected, took)
            if result.passed or result.seconds is not None or took > seconds:
                return result
            time.sleep(_LOOK_SECONDS)
    finally:
        ledger.end_selftest(uid, passed=result.passed, seconds=result.seconds, reason=result.reason)


def _look(settings: Settings, ledger: Ledger, outside: _Outside, uid: str, expected: bool, took: float) -> Result:
    """How it fares by now; with seconds once nothing more will come."""
    key = find_study(ledger, uid)
    report: dict[str, Any] = study_report(ledger, key) if key is not None else {"analyses": [], "verdicts": []}
    alert, objects = outside.alerted(uid), len(outside.archive.holds(uid))
    verdicts = [one for one in report["verdicts"] if not one["result"].get("withdrawn")]
    worst = min(verdicts, key=lambda one: one["probability"] * (1 if expected else -1), default=None)
    by_package = {one["package"]: one for one in report["analyses"]}
    reason, final = "", False
    for package in settings.models.packages:
        state = by_package.get(package, {"state": "undecided", "reason": ""})
        if state["state"] != "issued":
            reason = f"{package}: {state['state']}{': ' if state['reason'] else ''}{state['reason']}"
            final = state["state"] in ("refused", "failed")
            break
    if not reason and worst is not None and worst["positive"] != expected:
        reason = f"the verdict is {'positive' if worst['positive'] else 'negative'} ({worst['probability']:.2f})"
        final = True
    elif not reason and alert != expected:
        reason = "no alert came out" if expected else "an alert came out"
        final = not expected
    elif not reason and not objects:
        reason = "no object came out"
    elif not reason and (left := [one for one in report["deliveries"] if one["state"] != "acknowledged"]):
        reason = f"{left[0]['object']} is {left[0]['state']}"
    return Result(
        "positive" if expected else "negative",
        key,
        worst["positive"] if worst else None,
        worst["probability"] if worst else None,
        round(took, 3) if final or not reason else None,
        alert,
        objects,
        reason,
    )


@contextmanager
def _outside(folder: Path) -> Iterator[_Outside]:
    """A listener for alerts and an archive for objects, on ports of the loopback that were free."""
    folder.mkdir()
    archive = FallbackPacs(folder / "archive", ae_title="SELFTEST", host=LOOPBACK)
    loop = asyncio.new_event_loop()
    try:
        listener = _Quiet(folder)
        server: Any = loop.run_until_complete(
            hl7.mllp.start_hl7_server(
                listener.serve, LOOPBACK, 0, limit=LIMIT, encoding="utf-8", encoding_errors="replace"
            )
        )
        thread = threading.Thread(target=loop.run_forever, name="selftest-alerts", daemon=True)
        thread.start()
        try:
            yield _Outside(folder, archive, int(server.sockets[0].getsockname()[1]))
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join(5.0)
            server.close()
    finally:
        archive.stop()
        loop.close()


class _Quiet(Listener):
    """A listener that prints nothing."""

    def report(self, state: str, **facts: object) -> None:
        """Nobody reads it."""
