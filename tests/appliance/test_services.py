"""What a verdict tells the hospital, over the life of a study; and what the engine makes of one that lost its files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast

from hypothesis import given
from hypothesis import strategies as st

from appliance.governance.package import load_configured
from appliance.ledger import schema as t
from appliance.ledger.database import later
from appliance.ledger.views import event_counts, study_report
from appliance.services import Engine, alert_kind
from appliance.settings import Settings
from appliance.settings import Study as StudySettings
from dicom_io.header import Header
from tests.appliance.intake.test_retention import Box
from tests.builders import header


@given(st.lists(st.booleans(), min_size=1, max_size=8))
def test_the_hospital_always_knows_the_newest_answer_and_is_told_only_changes(answers: list[bool]) -> None:
    known = False
    told = []
    for number, positive in enumerate(answers):
        kind = alert_kind(answers[:number], positive)
        if positive == known:
            assert kind is None
        elif positive:
            assert kind == ("correction" if told else "alert")
        else:
            assert kind == "withdrawal"
        if kind:
            told.append(kind)
        known = positive
    assert told.count("alert") <= 1
    assert (told[:1] == ["alert"]) == any(answers)


def engine_beside(box: Box) -> Engine:
    """An engine with the shipped package under the name that the box's studies know; no study may reach Triton."""
    package = dataclasses.replace(load_configured(Settings())[0], name="pkg")
    settings = box.settings.model_copy(update={"study": StudySettings(settle_seconds=0, quiet_seconds=0.001)})
    return Engine(settings, box.ledger, [package], cast(Any, None), cast(Any, None))


def come_again(box: Box, one: Header) -> None:
    assert box.store(one) in ("stored", "conflict")
    box.ledger.close_association(box.association, "released")
    engine_beside(box).step()


def test_what_comes_back_to_a_study_without_images_leaves_its_verdict(tmp_path: Path) -> None:
    """A capture that the PACS sends on, days after retention took the study's files."""
    box = Box(tmp_path)
    box.receive(1)
    box.finish(1)
    assert box.retention.step() == 1
    come_again(box, header(9, study="1.1", series="1.1.9", modality="OT"))
    report = study_report(box.ledger, 1)
    assert (report["state"], event_counts(box.ledger)["study.completed"]) == ("complete", 2)
    assert [one["state"] for one in report["analyses"]] == ["issued"]
    assert [one["revision"] for one in box.ledger.verdicts(1)] == [1]
    assert event_counts(box.ledger)["study.refused"] == 0
    box.ledger.close()


def test_a_study_of_which_only_a_part_came_again_is_refused(tmp_path: Path) -> None:
    box = Box(tmp_path)
    headers = box.receive(1)
    (arriving,) = box.ledger.arriving_studies()
    box.ledger.complete_study(arriving.id, arriving.last_instance_at, {"by": "test", "confidence": "high"})
    box.ledger.decide(1, "pkg", "1", admitted=False, reason="a test", admission=[], selection=[], inputs=[])
    with box.ledger._write() as connection:
        connection.execute(t.study.update().values(completed_at=later(-1e6)))
    assert box.retention.step() == 1
    come_again(box, headers[0])
    (analysis,) = study_report(box.ledger, 1)["analyses"]
    assert analysis["state"] == "refused"
    assert "2 instances were removed by retention" in analysis["reason"]
    box.ledger.close()
