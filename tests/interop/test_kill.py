"""kill -9 at any moment: every accepted study ends with exactly one alert. SIGTERM: work is finished or parked."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from appliance.demo.hospital import SCANNER_AE
from appliance.ledger.views import event_counts, verify_events
from dicom_io.errors import PeerError
from dicom_io.scu import send
from tests.interop.box import URGENT_AE, Box, running_box, study, wait_for

pytestmark = [pytest.mark.interop, pytest.mark.slow, pytest.mark.xdist_group("box")]

SERVICES = ("intake", "engine", "deliver", "triton")


@pytest.mark.parametrize("service", SERVICES)
def test_killed_in_the_middle_of_a_study(box: Box, tmp_path: Path, service: str) -> None:
    uid, files = study(tmp_path, "intraparenchymal", f"KILL{service.upper()}")
    half = len(files) // 2

    def after_half(_: object, sent: list[int] = []) -> None:  # noqa: B006
        sent.append(1)
        if len(sent) == half:
            box.kill(service)

    try:
        results = send(files, box.peer, SCANNER_AE, on_sent=after_half, timeout=5.0)
        missing = [result.path for result in results if result.error]
    except PeerError:
        missing = files
    # As a scanner does: what was not acknowledged is sent again, until it is.
    deadline = time.monotonic() + 30.0
    while missing and time.monotonic() < deadline:
        try:
            missing = [result.path for result in send(missing, box.peer, SCANNER_AE, timeout=5.0) if result.error]
        except PeerError:
            time.sleep(0.5)
    assert missing == []
    report = box.settled(uid, 90.0)
    assert report["instances"] == len(files)
    assert report["verdicts"][-1]["positive"]
    assert len(box.messages(uid)) == 1
    held = {instance for _, instance in box.hospital.pacs.holds(uid)}
    assert {one["uid"] for one in report["deliveries"] if not one["object"].startswith("alert.")} <= held


def test_a_triton_that_hangs_is_started_again_and_work_resumes(box: Box, tmp_path: Path) -> None:
    uid, files = study(tmp_path, "intraparenchymal", "HANGS")
    before = event_counts(box.ledger)
    hangs = box.pid("triton")
    box.send(files[: len(files) // 2])
    os.kill(hangs, signal.SIGSTOP)
    box.send(files[len(files) // 2 :])
    report = box.settled(uid, 90.0)
    assert box.pid("triton") != hangs
    assert not Path(f"/proc/{hangs}").exists()
    assert [one["positive"] for one in report["verdicts"]] == [True]
    assert len(box.messages(uid)) == 1
    # Whether the first try fell into it is a matter of milliseconds; what hung cost at most that one.
    assert report["analyses"][0]["attempts"] <= 2
    after = event_counts(box.ledger)
    for name in ("triton.lost", "triton.restored"):
        assert after[name] - before.get(name, 0) == 1
    # Nothing is shown of a server that is well again.
    assert box.command("check").returncode == 0


def test_an_engine_that_fell_behind_begins_with_the_most_urgent(box: Box, tmp_path: Path) -> None:
    """Meanwhile intake takes all that comes."""
    engine = box.pid("engine")
    os.kill(engine, signal.SIGSTOP)
    try:
        routine = []
        for number in range(2):
            uid, files = study(tmp_path, "intraparenchymal", f"ROUTINE{number}")
            assert not any(result.error for result in box.send(files))
            routine.append(uid)
        urgent, files = study(tmp_path, "intraparenchymal", "URGENT")
        assert not any(result.error for result in box.send(files, URGENT_AE))
        report = box.report(urgent)
        assert report is not None
        assert (report["instances"], report["verdicts"]) == (len(files), [])
        time.sleep(2.0)  # all three are complete by then, and only their urgency tells them apart
    finally:
        os.kill(engine, signal.SIGCONT)

    def judged(uid: str) -> str | None:
        report = box.report(uid)
        return report["verdicts"][0]["issued_at"] if report and report["verdicts"] else None

    issued = {
        uid: wait_for(lambda uid=uid: judged(uid), 60.0, lambda: f"no verdict\n{box.process.tail(30)}")  # type: ignore[misc]
        for uid in (urgent, *routine)
    }
    assert min(issued, key=lambda uid: issued[uid]) == urgent
    for uid in issued:
        box.settled(uid, 90.0)
        assert len(box.messages(uid)) == 1


def test_killed_at_random_moments_after_the_last_slice(box: Box, tmp_path: Path) -> None:
    chance = random.Random(20261124)
    uids = []
    for number in range(8):
        uid, files = study(tmp_path, "intraparenchymal", f"RANDOM{number}")
        box.send(files)
        uids.append(uid)
        time.sleep(chance.uniform(0.0, 2.5))
        box.kill(chance.choice(("engine", "deliver", "engine", "deliver", "triton")))
    for uid in uids:
        report = box.settled(uid, 120.0)
        assert [one["revision"] for one in report["verdicts"]] == [1]
        assert len(box.messages(uid)) == 1, box.messages(uid)
    assert verify_events(box.ledger) is None


def test_a_clean_stop_is_quick_and_nothing_is_lost(tmp_path: Path) -> None:
    with running_box(tmp_path) as one:
        uid, files = study(tmp_path, "intraparenchymal", "STOP1")
        one.send(files)
        began = time.monotonic()
        one.process.stop()
        assert time.monotonic() - began < 12.0
        assert one.process.exit_code == 0
        report = one.report(uid)
        assert report is not None
        assert report["instances"] == len(files)
        restarted = type(one.process)(one.process.command, log=tmp_path / "again.log", grace=12.0)
        try:
            report = one.settled(uid, 90.0)
        finally:
            restarted.stop()
        assert report["verdicts"][-1]["positive"]
        assert len(one.messages(uid)) == 1


def test_what_a_refusing_hospital_gets_is_a_dead_letter_that_can_be_sent_again(tmp_path: Path) -> None:
    with running_box(tmp_path, answer="AR") as one:
        uid, files = study(tmp_path, "intraparenchymal", "REFUSED1")
        one.send(files)
        report = one.settled(uid)
        (alert,) = [row for row in report["deliveries"] if row["object"].startswith("alert.")]
        assert alert["state"] == "rejected"
        assert "AR" in alert["reason"]
        listing = one.command("studies").stdout
        assert "Dead letters" in listing
        assert "rejected" in listing
        assert one.command("retry", str(alert["id"])).returncode == 0

        def rejected_again() -> bool | None:
            events = (one.report(uid) or {"events": []})["events"]
            return True if [event["name"] for event in events].count("delivery.rejected") == 2 else None

        wait_for(rejected_again, 20.0, lambda: "it was not sent again")
