"""Tasks of somebody else's worklist, taken by a delivery that is killed with -9 again and again."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from appliance import init
from appliance.operations.leash import Leashed
from appliance.settings import load_settings
from tests.appliance.intake.test_retention import Box
from tests.builders import header
from tests.foreign_worklist import ForeignWorklist, ai_task
from tests.interop.box import wait_for

pytestmark = [pytest.mark.interop, pytest.mark.slow]
TASKS, KILLS = 20, 2


@pytest.mark.timeout(400)
def test_each_task_is_claimed_once_and_ended_once_whenever_it_is_killed(tmp_path: Path) -> None:
    there = ForeignWorklist(*(ai_task(f"2.{number}") for number in range(1, TASKS + 1)))
    performer = {
        "ae_title": "MANAGER", "host": "127.0.0.1", "port": there.port, "workitem_codes": ["110004^DCM"],
        "poll_seconds": 0.05,
    }  # fmt: skip
    config = init.write(tmp_path, {"performer": performer, "models": {"packages": ["pkg"]}})
    settings = load_settings(config)
    box = Box(settings.box.state_directory)
    box.store(header(1, study="1.1", series="1.1.1", patient_id="P1", issuer_of_patient_id="HOSP"))
    (arriving,) = box.ledger.arriving_studies()
    box.ledger.complete_study(arriving.id, arriving.last_instance_at, {"by": "test", "confidence": "high"})
    box.ledger.decide(arriving.id, "pkg", "1", admitted=False, reason="a knee", admission=[], selection=[], inputs=[])
    command = [sys.executable, "-m", "appliance.cli", "--config", config, "deliver"]
    process = Leashed(command, log=tmp_path / "deliver.log", grace=12.0)
    try:
        for number in range(1, KILLS + 1):
            # In the middle of the claims, and of the ends.
            wait_for(
                lambda n=number: True if len(there.told) >= n * 2 * TASKS // (KILLS + 1) else None,
                90.0,
                lambda: str(there.told),
            )
            os.killpg(process.keeper_pid, signal.SIGKILL)
            process.stop()
            process = Leashed(command, log=tmp_path / f"deliver{number}.log", grace=12.0)
        wait_for(
            lambda: None if box.ledger.open_tasks() or len(there.told) < 2 * TASKS else True,
            90.0,
            lambda: f"{there.told}\n{process.tail(30)}",
        )
    finally:
        process.stop()
        there.stop()
    assert sorted(there.told) == sorted(
        (f"2.{number}", state) for number in range(1, TASKS + 1) for state in ("IN PROGRESS", "CANCELED")
    )
    assert sorted(uid for uid, _ in there.claims) == sorted(there.steps)
    assert {one.state for one in box.ledger.tasks_of(arriving.id)} == {"canceled"}
    box.ledger.close()
