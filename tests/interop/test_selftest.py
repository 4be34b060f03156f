"""The self-test on a running box: it comes out right, nobody else hears of it, and a patient's study goes its way."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from appliance.ledger.selftest import SELFTEST_AE, SELFTEST_DESTINATIONS
from appliance.ledger.views import verify_events
from tests.interop.box import Box, study, wait_for

pytestmark = [pytest.mark.interop, pytest.mark.xdist_group("box"), pytest.mark.timeout(900)]


def counted(box: Box, line: str) -> float:
    figures = box.command("metrics").stdout.splitlines()
    return next((float(one.split()[-1]) for one in figures if one.startswith(line)), 0.0)


def test_it_passes_and_only_the_box_itself_hears_of_it(box: Box, tmp_path: Path) -> None:
    heard, issued = len(box.hospital.heard()), counted(box, 'scanside_events_total{event="verdict.issued"}')
    uid, files = study(tmp_path, "subdural", "BESIDETEST")
    command = [sys.executable, "-m", "appliance.cli", "--config", str(box.config), "selftest", "--json"]
    command += ["--seconds", "300"]  # of a busy machine
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as test:
        wait_for(
            lambda: True if any(one.calling_ae == SELFTEST_AE for one in box.ledger.arriving_studies()) else None,
            120.0,
            lambda: f"no self-test arrives\n{box.process.tail(30)}",
        )
        box.send(files)  # a patient, while it lasts
        said, complaint = test.communicate(timeout=300)
    answer = json.loads(said)
    assert test.returncode == 0, (answer, complaint, box.process.tail(30))
    assert answer["ok"] is True
    positive, negative = answer["studies"]
    assert (positive["expected"], positive["positive"], positive["alert"]) == ("positive", True, True)
    assert (negative["expected"], negative["positive"], negative["alert"]) == ("negative", False, False)
    assert positive["objects"] > negative["objects"] >= 1

    # The patient's study: its verdict, and to its own destinations alone.
    report = box.settled(uid)
    assert report["selftest"] is False
    assert {one["destination"] for one in report["deliveries"]} <= {"pacs", "er"}
    messages = box.messages(uid)
    assert len(messages) == (1 if report["verdicts"][-1]["positive"] else 0)

    # The tests: marked, and told to nobody else.
    assert len(box.hospital.heard()) == heard + len(messages)
    for one in answer["studies"]:
        told = json.loads(box.command("study", str(one["study"]), "--json").stdout)
        assert told["selftest"] is True
        assert {delivery["destination"] for delivery in told["deliveries"]} <= set(SELFTEST_DESTINATIONS)
        assert {delivery["state"] for delivery in told["deliveries"]} == {"acknowledged"}
        assert not box.messages(told["study_instance_uid"])
        assert not box.hospital.pacs.holds(told["study_instance_uid"])
    assert counted(box, 'scanside_events_total{event="verdict.issued"}') == issued + len(report["verdicts"])
    assert counted(box, 'scanside_selftest_passed{expected="positive"}') == 1.0
    assert counted(box, 'scanside_selftest_passed{expected="negative"}') == 1.0
    assert counted(box, "scanside_alerts_unreached") == 0.0
    listed = {one["study"]: one["selftest"] for one in json.loads(box.command("studies", "--json").stdout)}
    assert [listed[one["study"]] for one in answer["studies"]] == [True, True]
    assert verify_events(box.ledger) is None


def test_it_fails_where_the_way_is_broken(box: Box) -> None:
    """Delivery is gone: the bleed is read and no alert comes out; nobody is told afterwards either."""
    heard = len(box.hospital.heard())
    box.suspend("deliver")
    try:
        done = subprocess.run(
            [sys.executable, "-m", "appliance.cli", "--config", str(box.config), "selftest", "--json",
             "--seconds", "8"],
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
    finally:
        box.resume("deliver")
    assert done.returncode == 1, done.stdout
    answer = json.loads(done.stdout)
    assert answer["ok"] is False
    assert [one["alert"] for one in answer["studies"]] == [False, False]
    assert all(one["reason"] for one in answer["studies"])
    assert counted(box, 'scanside_selftest_passed{expected="positive"}') == 0.0
    keys = [one["study"] for one in answer["studies"]]

    def swept() -> bool | None:
        told = [json.loads(box.command("study", str(key), "--json").stdout) for key in keys]
        open_ = [one for report in told for one in report["deliveries"] if one["state"] in ("pending", "sending")]
        return None if open_ else True

    wait_for(swept, 60.0, lambda: f"deliveries are left\n{box.process.tail(30)}")
    assert len(box.hospital.heard()) == heard
    assert box.command("check").returncode == 0
    assert json.loads(box.command("status", "--json").stdout)["in_flight"]["total"] == 0
