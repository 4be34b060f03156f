"""An alert that leaves while the study still arrives, and what becomes of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pydicom
import pytest
from pynetdicom import AE
from pynetdicom.association import Association
from pynetdicom.sop_class import CTImageStorage  # type: ignore[attr-defined]

from appliance.demo.hospital import SCANNER_AE

from .box import Box, running_box, study, wait_for

pytestmark = [pytest.mark.interop, pytest.mark.xdist_group("provisional")]


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    with running_box(
        tmp_path_factory.mktemp("provisional"),
        provisional={"alerts": True, "threshold": 0.8, "slabs": 2},
        study={"quiet_seconds": 60.0, "settle_seconds": 0.5},
    ) as made:
        yield made


@contextmanager
def scanner(box: Box) -> Iterator[Association]:
    """An association that stays open until the test has seen what it waits for."""
    ae = AE(SCANNER_AE)
    ae.add_requested_context(CTImageStorage)
    association = ae.associate(box.peer.host, box.peer.port, ae_title=box.peer.ae_title)
    assert association.is_established
    try:
        yield association
    finally:
        association.release()


def put(association: Association, paths: Sequence[Path]) -> None:
    for path in paths:
        assert association.send_c_store(pydicom.dcmread(path)).Status == 0x0000


def kinds(box: Box, uid: str) -> list[str]:
    """What the hospital was told, in order: the observation MESSAGE-KIND of each message."""
    texts = [path.read_text(encoding="utf-8") for path in box.messages(uid)]
    rows = [row.split("|") for text in texts for row in text.splitlines() if row.startswith("OBX")]
    return [row[5] for row in rows if row[3].startswith("MESSAGE-KIND")]


def told(box: Box, uid: str, count: int) -> list[str]:
    return wait_for(
        lambda: found if len(found := kinds(box, uid)) >= count else None,
        30.0,
        lambda: f"{kinds(box, uid)}: {box.report(uid)}",
    )


def listed(box: Box, uid: str) -> dict[str, Any]:
    """What `scanside studies` says of a study."""
    (one,) = [row for row in json.loads(box.command("studies", "--json").stdout) if row["study_instance_uid"] == uid]
    return dict(one)


def test_a_provisional_alert_is_confirmed_by_the_whole_study(box: Box, tmp_path: Path) -> None:
    uid, files = study(tmp_path, "intraparenchymal", "EARLY1")
    with scanner(box) as association:
        put(association, files[:-6])
        assert told(box, uid, 1) == ["provisional"]
        report = box.report(uid)
        assert report is not None
        assert report["state"] == "receiving"
        assert report["verdicts"][0]["result"]["provisional"]
        assert [one["object"] for one in report["findings"]] == ["alert.er"]
        assert listed(box, uid)["provisional"] and listed(box, uid)["positive"]
        assert "positive, provisional" in box.command("study", uid).stdout
        (message,) = box.messages(uid)
        text = message.read_text(encoding="utf-8")
        assert "PROVISIONAL: the study was still arriving." in text
        assert re.search(r"The study was still arriving: \d+ slices were read\.", text)
        put(association, files[-6:])
    assert told(box, uid, 2) == ["provisional", "confirmation"]
    report = box.settled(uid)
    assert [one["revision"] for one in report["verdicts"]] == [1, 2]
    assert not report["verdicts"][1]["result"]["provisional"]
    assert "report" in [one["object"] for one in report["findings"]]


def test_a_provisional_alert_is_withdrawn_when_the_whole_study_is_refused(box: Box, tmp_path: Path) -> None:
    uid, files = study(tmp_path, "intraparenchymal", "EARLY2")
    with scanner(box) as association:
        put(association, files[:-3])
        assert told(box, uid, 1) == ["provisional"]
        for path in files[-3:]:
            dataset = pydicom.dcmread(path)
            dataset.PatientID = "SOMEBODY ELSE"
            dataset.save_as(path)
        put(association, files[-3:])
    assert told(box, uid, 2) == ["provisional", "withdrawal"]
    report = box.settled(uid)
    assert report["analyses"][0]["state"] == "refused"
    message = box.messages(uid)[-1].read_text(encoding="utf-8")
    assert "Nothing is said of haemorrhage" in message
    assert "No haemorrhage found" not in message
    assert "|122157^" not in message, "a probability of what is no longer said"
    names = [event["name"] for event in report["events"]]
    assert names.count("verdict.withdrawn") == 1
    # Nobody may read a negative answer from it.
    assert listed(box, uid)["positive"] is None
    shown = box.command("study", uid).stdout
    assert "withdrawn, patient" in shown
    assert "negative" not in shown


def test_a_study_without_haemorrhage_says_nothing_early(box: Box, tmp_path: Path) -> None:
    uid, files = study(tmp_path, None, "EARLY3")
    with scanner(box) as association:
        put(association, files)
    report = box.settled(uid)
    assert [one["revision"] for one in report["verdicts"]] == [1]
    assert kinds(box, uid) == []
