"""Which objects a verdict brings, where they go, and in which order; and what one revision knows of another."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pydicom
import pytest
from pydicom.config import IGNORE
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.uid import ComprehensiveSRStorage

from appliance.events import Event
from appliance.findings.render import Revision, render
from appliance.findings.validate import fault
from appliance.governance.indication import Admission, Criterion
from appliance.governance.package import load_configured
from appliance.ledger.database import LedgerError
from appliance.ledger.records import ALERT_STANDS, ANOTHER_PATIENT, Verdict
from appliance.ledger.retention import Rules
from appliance.ledger.standing import set_aside_since
from appliance.ledger.views import event_counts, study_report, troubles
from appliance.services.issuing import Issuer
from appliance.services.routing import in_place_of
from appliance.settings import Destination, DicomDestination, Hl7Destination, Settings
from appliance.study.grouping import group
from appliance.study.selection import select
from dicom_io.header import read_header
from tests.appliance.intake.test_retention import Box
from tests.builders import head_series
from tests.findings_support import Series, ct_series, dciodvfy_errors, verdict_on

EVERYTHING = ["selection", "presentation", "segmentation", "capture", "report"]
PICTURES = ["capture.summary", "capture.1", "capture.2"]


class Issued:
    """A box with two archives, one of which takes everything, and a study that is analysed again and again."""

    def __init__(
        self,
        folder: Path,
        *,
        classes: list[str] | None = None,
        change: Callable[[Dataset], None] = lambda ds: None,
        er: bool = False,
        **objects: list[str],
    ) -> None:
        self.box = Box(folder)
        self.box.settings.run_directory.mkdir(exist_ok=True)
        destinations: list[Destination] = [
            DicomDestination.model_validate(
                {"kind": "dicom", "name": name, "ae_title": "PACS", "host": "h", "port": 104, "objects": wanted}
                | ({"sop_classes": classes} if classes else {})
            )
            for name, wanted in objects.items()
        ]
        if er:
            destinations.append(Hl7Destination(kind="hl7", name="er", host="h", port=1))
        self.box.settings = self.box.settings.model_copy(update={"destination": destinations})
        (folder / "series").mkdir()
        self.series: Series = ct_series(folder / "series", change=change, count=5)
        self.issuer = Issuer(self.box.settings, self.box.ledger, load_configured(Settings()))
        self.left = list(self.series.files.values())
        for _ in range(3):
            self.arrive()

    def arrive(self) -> None:
        path = self.left.pop(0)
        assert self.box.store(read_header(path), path.read_bytes()) == "stored"

    def issue(self, verdict: Verdict, *, draw: bool = True) -> None:
        ledger = self.box.ledger
        (arriving,) = ledger.arriving_studies()
        ledger.complete_study(arriving.id, arriving.last_instance_at, {"by": "test", "confidence": "high"})
        stored = ledger.instances(arriving.id)
        inputs = [[one.sop_instance_uid, one.digest] for one in stored]
        ledger.decide(
            arriving.id, verdict.package, verdict.package_version,
            admitted=True, reason="", admission=[], selection=[], inputs=inputs,
        )  # fmt: skip
        row = ledger.take_analysis([verdict.package])
        assert row is not None
        self.issuer.issue(row, verdict, Admission(()), stored[0])
        if draw:
            self.issuer.render()

    def report(self, revision: int, name: str = "report") -> pydicom.Dataset:
        (path,) = self.box.settings.findings_directory.glob(f"*-{revision}/{name}.dcm")
        return pydicom.dcmread(path)

    def decline(self, destination: str, expected: str) -> None:
        """The destination takes no objects such as the next one."""
        row = self.box.ledger.take_delivery(destination)
        assert row is not None and row["object"] == expected
        (there,) = [one for one in self.box.settings.destination if one.name == destination]
        assert isinstance(there, DicomDestination)
        instead = in_place_of(there, expected)
        self.box.ledger.settle_delivery(row, "decline", f"it takes no {expected}", instead=instead)

    def states(self, destination: str) -> dict[str, tuple[str, str]]:
        """Object → state of its delivery there, and why."""
        rows = study_report(self.box.ledger, 1)["deliveries"]
        return {one["object"]: (one["state"], one["reason"]) for one in rows if one["destination"] == destination}

    def delivered(self, destination: str) -> list[str]:
        """The objects in the order in which that destination gets them."""
        names = []
        while (row := self.box.ledger.take_delivery(destination)) is not None:
            assert (self.box.settings.findings_directory / row["path"]).is_file()
            self.box.ledger.settle_delivery(row, "acknowledge")
            names.append(row["object"])
        return names


@pytest.fixture
def issued(tmp_path: Path) -> Iterator[Issued]:
    made = Issued(tmp_path, plain=["report", "capture"], all=EVERYTHING)
    yield made
    made.box.ledger.close()


def seen(issued: Issued, **changes: object) -> Verdict:
    """A verdict on the slices that are there."""
    there = issued.series.uids[: len(issued.series.uids) - len(issued.left)]
    verdict = verdict_on(issued.series)
    slabs = tuple(slab for slab in verdict.slabs if slab.sop_instance_uid in there)
    return replace(verdict, slabs=slabs, **changes)  # type: ignore[arg-type]


def test_each_archive_gets_what_it_takes_in_its_own_order(issued: Issued) -> None:
    issued.issue(seen(issued))
    assert issued.delivered("plain") == ["report", *PICTURES]
    assert issued.delivered("all") == [
        "selection", "presentation.1", "presentation.2", "segmentation", *PICTURES, "report",
    ]  # fmt: skip


def test_of_a_negative_study_the_picture_stands_in_for_a_report(tmp_path: Path) -> None:
    issued = Issued(tmp_path, plain=["report", "capture"], pictures=["capture"], marks=["segmentation"])
    issued.issue(replace(verdict_on(issued.series, positive=False), slabs=()))
    issued.decline("plain", "report")
    issued.decline("plain", "report.2d")
    assert issued.delivered("plain") == issued.delivered("pictures") == ["capture.summary"]
    assert issued.delivered("marks") == []
    assert issued.states("plain") == {
        "report": ("replaced", "it takes no report"),
        "report.2d": ("replaced", "it takes no report.2d"),
        "capture.summary": ("acknowledged", ""),
    }
    events = [one for one in study_report(issued.box.ledger, 1)["events"] if one["name"] == "delivery.replaced"]
    assert [(one["detail"]["object"], one["detail"]["instead"]) for one in events] == [
        ("report", "report.2d"),
        ("report.2d", "capture.summary"),
    ]
    assert event_counts(issued.box.ledger)["delivery.replaced"] == 2  # so Prometheus sees it
    assert troubles(issued.box.ledger)["deliveries"] == []
    issued.box.ledger.close()


def test_a_negative_report_is_followed_by_one_that_the_study_was_not_analysed(issued: Issued) -> None:
    issued.issue(replace(verdict_on(issued.series, positive=False), slabs=()))
    assert issued.delivered("plain") == ["report"]
    (standing,) = issued.box.ledger.verdicts(1)
    issued.issuer.take_back(standing, None, "a patient of two names")
    assert issued.delivered("plain") == issued.delivered("all")[-1:] == ["report"]
    first, second = issued.report(1), issued.report(2)
    (study,) = second.PredecessorDocumentsSequence
    assert study.ReferencedSeriesSequence[0].ReferencedSOPSequence[0].ReferencedSOPInstanceUID == first.SOPInstanceUID
    (file,) = issued.box.settings.findings_directory.glob("*-2/report.dcm")
    assert b"a patient of two names" in file.read_bytes() and "not analysed" in second.SeriesDescription
    assert second.CompletionFlag == "PARTIAL"
    # Once: what was taken back is not taken back again.
    newest = issued.box.ledger.verdicts(1)[-1]
    issued.issuer.take_back(newest, None, "again")
    assert len(issued.box.ledger.verdicts(1)) == 2


@pytest.mark.parametrize("positive", [False, True])
def test_what_was_found_in_shadow_is_taken_back_without_a_word(tmp_path: Path, positive: bool) -> None:
    issued = Issued(tmp_path, er=True, all=EVERYTHING)
    shadow = replace(verdict_on(issued.series, positive=positive), mode="shadow", provisional=positive)
    issued.issue(shadow if positive else replace(shadow, slabs=()))
    (standing,) = issued.box.ledger.verdicts(1)
    issued.issuer.take_back(standing, None, "a patient of two names")
    assert study_report(issued.box.ledger, 1)["deliveries"] == []
    assert list(issued.box.settings.findings_directory.glob("*-2/*")) == []
    # A negative answer that nobody got needs no second one.
    assert len(issued.box.ledger.verdicts(1)) == 1 + positive
    issued.box.ledger.close()


def test_of_all_pictures_that_wait_those_of_a_positive_study_come_first_and_none_waits_for_one_that_fails(
    issued: Issued, monkeypatch: pytest.MonkeyPatch
) -> None:
    issued.issue(replace(verdict_on(issued.series, positive=False), slabs=()), draw=False)
    issued.arrive()
    issued.issue(seen(issued), draw=False)
    asked: list[tuple[int, str]] = []
    make = render

    def drawn(name: str, revision: Revision, **how: Any) -> pydicom.Dataset:
        asked.append((revision.number, name))
        if name == "capture.1" and len(asked) < 10:
            raise ValueError("no ink")
        return make(name, revision, **how)

    monkeypatch.setattr("appliance.services.issuing.render", drawn)
    issued.issuer.render()
    revisions = [revision for revision, _ in asked]
    assert revisions == sorted(revisions, reverse=True) and set(revisions) == {1, 2}
    assert len(asked) == len(set(asked))
    before = len(asked)
    asked.extend([(0, "")] * 10)  # the ink is there
    issued.issuer.render()
    assert asked[before + 10 :] == [(2, "capture.1")]


def test_a_finding_that_is_not_made_is_seen_while_it_lasts(issued: Issued, monkeypatch: pytest.MonkeyPatch) -> None:
    lasting: list[float] = []
    make = render

    def slow(*what: Any, **how: Any) -> pydicom.Dataset:
        time.sleep(0.01)
        lasting.append(issued.issuer.rendering_seconds())
        if len(lasting) == 1:
            raise ValueError("no ink")
        return make(*what, **how)

    monkeypatch.setattr("appliance.services.issuing.render", slow)
    issued.issue(seen(issued), draw=False)
    assert issued.issuer.rendering_seconds() == 0
    issued.issuer.render()
    assert len(lasting) > 1
    assert all(0.01 <= one < 60 for one in lasting), "each counts for itself"
    assert issued.issuer.rendering_seconds() == 0


def test_the_report_without_space_is_made_where_somebody_may_need_it(issued: Issued) -> None:
    issued.issue(seen(issued))
    issued.arrive()
    issued.issue(seen(issued))
    (path,) = issued.box.settings.findings_directory.glob("*-2/report.2d.dcm")
    made, first = pydicom.dcmread(path), issued.report(1, "report.2d")
    assert made.SOPClassUID == first.SOPClassUID == ComprehensiveSRStorage
    assert made.SOPInstanceUID not in {issued.report(1).SOPInstanceUID, issued.report(2).SOPInstanceUID}
    [document] = made.PredecessorDocumentsSequence[0].ReferencedSeriesSequence[0].ReferencedSOPSequence
    assert document.ReferencedSOPInstanceUID == first.SOPInstanceUID
    assert document.ReferencedSOPClassUID == ComprehensiveSRStorage


def test_only_classes_that_a_destination_takes_go_there(tmp_path: Path) -> None:
    wanted = ["ComprehensiveSRStorage", "SecondaryCaptureImageStorage"]
    issued = Issued(tmp_path, classes=wanted, all=EVERYTHING, plain=["report"], marks=["segmentation"])
    issued.issue(seen(issued))
    assert issued.delivered("all") == [*PICTURES, "report.2d"]
    issued.decline("plain", "report.2d")
    assert issued.delivered("plain") == ["capture.summary"]
    assert issued.delivered("marks") == []
    issued.box.ledger.close()


def test_what_takes_no_report_at_all_gets_the_summary_and_nothing_takes_its_place(tmp_path: Path) -> None:
    issued = Issued(tmp_path, classes=["SecondaryCaptureImageStorage"], plain=["report"], both=["report", "capture"])
    issued.issue(seen(issued))
    assert issued.delivered("both") == PICTURES
    issued.decline("plain", "capture.summary")
    assert issued.states("plain") == {"capture.summary": ("rejected", "it takes no capture.summary")}
    made = {path.stem for path in issued.box.settings.findings_directory.rglob("*.dcm")}
    assert "report.2d" not in made
    issued.box.ledger.close()


def test_a_segmentation_that_is_declined_is_reported(issued: Issued) -> None:
    issued.issue(seen(issued))
    for name in ("selection", "presentation.1", "presentation.2", "segmentation"):
        issued.decline("all", name)
    assert issued.states("all")["segmentation"] == ("rejected", "it takes no segmentation")
    assert event_counts(issued.box.ledger)["delivery.rejected"] == 4
    assert issued.delivered("all") == [*PICTURES, "report"]


def test_a_picture_stands_in_once(issued: Issued) -> None:
    issued.issue(seen(issued))
    issued.decline("plain", "report")
    issued.decline("plain", "report.2d")
    assert issued.delivered("plain") == PICTURES


def test_what_is_refused_for_itself_is_not_replaced(tmp_path: Path) -> None:
    issued = Issued(tmp_path, plain=["report"])
    issued.issue(seen(issued))
    row = issued.box.ledger.take_delivery("plain")
    assert row is not None
    issued.box.ledger.settle_delivery(row, "reject", "0x0124", instead=["report.2d"])
    assert issued.delivered("plain") == []
    issued.box.ledger.close()


def test_what_nobody_takes_is_not_made_but_for_report_and_pictures(tmp_path: Path) -> None:
    issued = Issued(tmp_path, plain=["selection"])
    issued.issue(seen(issued))
    made = {path.stem for path in issued.box.settings.findings_directory.rglob("*.dcm")}
    assert made == {"report", *PICTURES, "selection"}
    assert issued.delivered("plain") == ["selection"]
    issued.box.ledger.close()


def test_pictures_wait_while_an_analysis_may_miss_its_deadline_but_not_for_ever(
    issued: Issued, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drawn() -> int:
        issued.issuer.render()
        return len(list(issued.box.settings.findings_directory.rglob("*.dcm")))

    later = 0.0
    began = time.monotonic()
    monkeypatch.setattr("appliance.services.issuing.time.monotonic", lambda: began + later)
    issued.issuer.hold(True)
    issued.issue(seen(issued))
    assert drawn() == 0
    later = issued.box.settings.budget.analysis_seconds - 1
    issued.issuer.hold(True)
    assert drawn() == 0
    later += 2
    issued.issuer.hold(True)
    assert drawn() > 2
    issued.issuer.hold(False)
    issued.issuer.hold(True)
    issued.arrive()
    before = drawn()
    issued.issue(seen(issued))
    assert drawn() == before
    issued.issuer.hold(False)
    assert drawn() > before


def test_in_shadow_the_same_is_made_and_nobody_gets_it(issued: Issued) -> None:
    issued.issue(seen(issued, mode="shadow"))
    made = {path.stem for path in issued.box.settings.findings_directory.rglob("*.dcm")}
    assert {"report", "segmentation", "presentation.2", "selection"} <= made
    assert issued.delivered("plain") == issued.delivered("all") == []


def test_a_report_names_the_one_that_it_follows_and_overwrites_none(issued: Issued) -> None:
    issued.issue(seen(issued))
    issued.arrive()
    issued.issue(seen(issued))
    first, second = issued.report(1), issued.report(2)
    assert "PredecessorDocumentsSequence" not in first
    [study] = second.PredecessorDocumentsSequence
    [series] = study.ReferencedSeriesSequence
    [document] = series.ReferencedSOPSequence
    assert (study.StudyInstanceUID, series.SeriesInstanceUID) == (first.StudyInstanceUID, first.SeriesInstanceUID)
    assert document.ReferencedSOPInstanceUID == first.SOPInstanceUID != second.SOPInstanceUID
    assert document.ReferencedSOPClassUID == first.SOPClassUID
    assert {row["revision"] for row in study_report(issued.box.ledger, 1)["verdicts"]} == {1, 2}


@pytest.mark.parametrize("change", [{"mode": "shadow"}, {"provisional": True}])
def test_a_report_does_not_follow_what_nobody_has(issued: Issued, change: dict[str, object]) -> None:
    issued.issue(seen(issued, **change))
    issued.arrive()
    issued.issue(seen(issued))
    assert "PredecessorDocumentsSequence" not in issued.report(2)


TEXTS = ("LO", "SH", "PN", "LT", "ST", "UT", "AE", "CS", "DA", "TM", "DT", "AS")
KEPT = ("SpecificCharacterSet", "Modality", "ImageType", "PhotometricInterpretation", "PatientPosition", "RescaleType")
MORE = (
    "StudyDescription", "SeriesDescription", "ConvolutionKernel", "ProtocolName", "AdmissionID", "StationName",
    "PlacerOrderNumberImagingServiceRequest", "InstitutionName", "TimezoneOffsetFromUTC", "AcquisitionDateTime",
    "UniversalEntityID", "UniversalEntityIDType", "LocalNamespaceEntityID",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "odd",
    ["a\r\nb\nc\rd", "a\x00b", "a\\b", "^~\\&|=", "x" * 10_000, "x^~&|\r\n" * 2_000, "\\E\\\\.br\\|"],
    ids=["line breaks", "NUL", "backslash", "delimiters", "long", "long and odd", "escapes"],
)
def test_headers_of_nothing_but_odd_text_hold_no_alert_and_no_object_back(
    tmp_path: Path, odd: str, caplog: pytest.LogCaptureFixture
) -> None:
    def change(ds: Dataset) -> None:
        for keyword in MORE:
            ds.add(DataElement(keyword, dictionary_VR(keyword), "", validation_mode=IGNORE))
        for one in list(ds):
            if one.VR in TEXTS and one.keyword not in KEPT:
                ds[one.tag] = DataElement(one.tag, one.VR, odd, validation_mode=IGNORE)
        item = Dataset()
        for keyword in MORE[-3:]:
            item.add(DataElement(keyword, dictionary_VR(keyword), odd, validation_mode=IGNORE))
        ds.IssuerOfPatientIDQualifiersSequence = ds.IssuerOfAccessionNumberSequence = [item]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        issued = Issued(tmp_path, change=change, er=True, all=EVERYTHING)
    kernel = head_series(30, series="1.2.3.2", series_number=2, convolution_kernel=f"BONE {odd}")
    selection = select(group([*head_series(30), *kernel]))
    left = tuple(f"Series 2 was not analysed: {one.reason}." for one in selection.considered if not one.chosen)
    assert len(left) == 1 and "BONE" in left[0]
    issued.issue(seen(issued, limitations=left, mode="clinical"))
    issued.box.ledger.abandon_findings(issued.box.settings.models.attempts)
    assert issued.states("er") == {"alert.er": ("pending", "")}
    assert {state for state, _ in issued.states("all").values()} == {"pending"}
    (file,) = issued.box.settings.findings_directory.rglob("*.hl7")
    text = file.read_bytes().decode("utf-8")
    assert fault(text) == "" and "not analysed" in text
    assert "reduced message" not in caplog.text
    assert issued.delivered("er") == ["alert.er"] and "report" in issued.delivered("all")
    issued.box.ledger.close()


def _follows(issued: Issued, revision: int) -> list[int]:
    """The revisions whose reports that revision's names as the ones that it follows."""
    number = {str(issued.report(one).SOPInstanceUID): one for one in range(1, revision)}
    studies = issued.report(revision).get("PredecessorDocumentsSequence", [])
    return [
        number[one.ReferencedSOPInstanceUID]
        for study in studies
        for series in study.ReferencedSeriesSequence
        for one in series.ReferencedSOPSequence
    ]


def test_a_report_follows_the_one_that_said_that_nothing_was_analysed(issued: Issued) -> None:
    negative = replace(verdict_on(issued.series, positive=False), slabs=(), mode="clinical")
    issued.issue(negative)
    (standing,) = issued.box.ledger.verdicts(1)
    issued.issuer.take_back(standing, None, "a patient of two names")
    issued.arrive()
    issued.issue(negative)
    assert [_follows(issued, revision) for revision in (1, 2, 3)] == [[], [1], [2]]
    (series,) = issued.report(3).PredecessorDocumentsSequence[0].ReferencedSeriesSequence
    assert series.SeriesInstanceUID == issued.report(2).SeriesInstanceUID


def _negative(issued: Issued) -> Verdict:
    return replace(verdict_on(issued.series, positive=False), slabs=(), mode="clinical")


@pytest.mark.parametrize("objects", [["report", "capture"], ["report"], ["capture"]])
def test_an_archive_that_takes_pictures_alone_sees_that_a_negative_study_was_not_analysed(
    tmp_path: Path, objects: list[str]
) -> None:
    issued = Issued(tmp_path, classes=["SecondaryCaptureImageStorage"], plain=objects)
    issued.issue(_negative(issued))
    assert issued.delivered("plain") == ["capture.summary"]
    (standing,) = issued.box.ledger.verdicts(1)
    issued.issuer.take_back(standing, None, "a patient of two names")
    assert issued.delivered("plain") == ["capture.summary"]
    first, second = issued.report(1, "capture.summary"), issued.report(2, "capture.summary")
    assert "not analysed" in second.SeriesDescription and "Not analysed" in second.DerivationDescription
    assert second.pixel_array.shape[1] == first.pixel_array.shape[1]
    assert first.PatientID == second.PatientID and first.StudyInstanceUID == second.StudyInstanceUID
    path = issued.box.settings.findings_directory.glob("*-2/capture.summary.dcm")
    assert dciodvfy_errors(next(path)) == []
    issued.box.ledger.close()


def test_an_archive_that_declines_reports_sees_that_a_negative_study_was_not_analysed(issued: Issued) -> None:
    issued.issue(_negative(issued))
    for name in ("report", "report.2d"):
        issued.decline("plain", name)
    assert issued.delivered("plain") == ["capture.summary"]
    (standing,) = issued.box.ledger.verdicts(1)
    issued.issuer.take_back(standing, None, "a patient of two names")
    for name in ("report", "report.2d"):
        issued.decline("plain", name)
    assert issued.delivered("plain") == ["capture.summary"]


def test_pictures_of_a_bleed_are_followed_by_one_that_none_was_found(issued: Issued) -> None:
    issued.issue(seen(issued))
    assert issued.delivered("plain") == ["report", *PICTURES]
    issued.arrive()
    issued.issue(_negative(issued))
    assert issued.delivered("plain") == ["report", "capture.summary"]


def test_pictures_under_another_patient_id_are_followed_by_one_that_takes_them_back(issued: Issued) -> None:
    issued.issue(seen(issued))
    issued.delivered("plain")
    (standing,) = issued.box.ledger.verdicts(1)
    issued.issuer.take_back(standing, None, ANOTHER_PATIENT)
    assert issued.delivered("plain") == ["report", "capture.summary"]
    assert "not analysed" in issued.report(2, "capture.summary").SeriesDescription


def test_an_archive_that_hears_of_refusals_and_takes_pictures_alone_gets_one(tmp_path: Path) -> None:
    issued = Issued(tmp_path, classes=["SecondaryCaptureImageStorage"], plain=["report"])
    archive = issued.box.settings.destination[0].model_copy(update={"refusals": True})
    settings = issued.box.settings.model_copy(update={"destination": [archive]})
    (package, *_) = load_configured(Settings())
    (source, *_) = issued.box.ledger.instances(1)
    told = Issuer(settings, issued.box.ledger, [package]).refusal(
        1,
        package,
        "clinical",
        Admission((Criterion("age", "PatientAge", "009Y", "18 years or older", "refused"),)),
        source,
    )
    assert told is not None
    assert [(one.object, one.destinations) for one in told.findings] == [("capture.summary", ("plain",))]
    issued.box.ledger.close()


def _sent(issued: Issued, destination: str, verdict: int) -> dict[str, tuple[int, str]]:
    """Object of a verdict → number and state of its delivery there."""
    rows = study_report(issued.box.ledger, 1)["deliveries"]
    mine = [one for one in rows if one["destination"] == destination and one["verdict_id"] == verdict]
    return {one["object"]: (one["id"], one["state"]) for one in mine}


def test_pictures_that_still_wait_when_a_later_verdict_denies_them_never_leave(issued: Issued) -> None:
    issued.issue(seen(issued))
    issued.arrive()
    issued.issue(_negative(issued))
    assert issued.delivered("plain") == ["report", "report", "capture.summary"]
    assert issued.delivered("all") == ["capture.summary", "report", "report"]
    for archive in ("plain", "all"):
        first = _sent(issued, archive, 1)
        assert {name for name, (_, state) in first.items() if state == "acknowledged"} == {"report"}
        assert {state for name, (_, state) in first.items() if name != "report"} == {"withdrawn"}
        with pytest.raises(LedgerError, match="revision 2 is negative"):
            issued.box.ledger.requeue_delivery(first["capture.1"][0], ["plain", "all"])
    assert issued.states("plain")["capture.1"][1] == "revision 2 is negative, which contradicts it"
    assert set_aside_since(issued.box.ledger, datetime(2020, 1, 1, tzinfo=UTC)) == ([], [])


def test_pictures_of_a_second_bleed_leave_and_those_of_the_first_do_not(issued: Issued) -> None:
    issued.issue(seen(issued))
    issued.arrive()
    issued.issue(_negative(issued))
    issued.arrive()
    issued.issue(seen(issued))
    issued.delivered("plain")
    assert {state for _, state in _sent(issued, "plain", 3).values()} == {"acknowledged"}
    assert _sent(issued, "plain", 1)["capture.1"][1] == "withdrawn"


@pytest.mark.parametrize("change", [{"mode": "shadow"}, {"limitations": (ALERT_STANDS,)}])
def test_pictures_leave_if_who_denies_them_tells_nobody_or_lets_them_stand(
    issued: Issued, change: dict[str, Any]
) -> None:
    issued.issue(seen(issued))
    issued.arrive()
    issued.issue(replace(_negative(issued), **change))
    assert set(PICTURES) <= set(issued.delivered("plain"))


def test_nothing_of_another_patient_leaves_but_what_takes_it_back(issued: Issued) -> None:
    issued.issue(seen(issued))
    (standing,) = issued.box.ledger.verdicts(1)
    issued.issuer.take_back(standing, None, ANOTHER_PATIENT)
    (_, back) = issued.box.ledger.verdicts(1)
    assert issued.delivered("plain") == ["report", "capture.summary"]
    assert {state for _, state in _sent(issued, "plain", 1).values()} == {"withdrawn"}
    assert set(_sent(issued, "plain", back["id"])) == {"report", "capture.summary"}
    with pytest.raises(LedgerError, match="another Patient ID"):
        issued.box.ledger.requeue_delivery(_sent(issued, "plain", 1)["capture.1"][0], ["plain", "all"])


def test_a_picture_that_could_not_leave_before_it_was_denied_holds_no_study(issued: Issued) -> None:
    issued.issue(seen(issued))
    for _ in range(1 + len(PICTURES)):
        row = issued.box.ledger.take_delivery("plain")
        assert row is not None
        issued.box.ledger.settle_delivery(row, "acknowledge" if row["object"] == "report" else "give_up")
    issued.delivered("all")
    rules = Rules([], 3, 0.0)
    assert any("capture.1 to plain is dead" in why for why in issued.box.ledger.kept_studies(rules)[0].holds)
    issued.arrive()
    issued.issue(_negative(issued))
    issued.delivered("plain")
    issued.delivered("all")
    assert not any("is dead" in why for why in issued.box.ledger.kept_studies(rules)[0].holds)


@pytest.mark.parametrize("had", ["acknowledge", "retry", "reject", None])
@pytest.mark.parametrize("told", [False, True])
def test_who_has_or_may_have_a_finding_hears_that_it_does_not_hold_though_the_board_stopped_the_package(
    issued: Issued, had: Any, told: bool
) -> None:
    ledger = issued.box.ledger
    issued.issue(seen(issued))
    if had:
        row = ledger.take_delivery("plain")
        assert row is not None and row["object"] == "report"
        ledger.settle_delivery(row, had, wait_seconds=0.0)
    issued.arrive()
    issued.issue(_negative(issued))
    if told:
        issued.delivered("plain")
        issued.arrive()
        issued.issue(_negative(issued))
    ledger.record_decision(Event.BOARD_SUSPENDED, verdict_on(issued.series).package, who="Dr A", reason="drift")
    due = set(issued.delivered("plain"))
    assert due == ({"report", "capture.summary"} if had in ("acknowledge", "retry") and not told else set())
    assert issued.delivered("all") == []


def test_pictures_of_a_bleed_are_taken_back_with_a_negative_verdict_that_never_left(issued: Issued) -> None:
    issued.issue(seen(issued))
    issued.delivered("plain")
    issued.arrive()
    issued.issue(_negative(issued))
    while (row := issued.box.ledger.take_delivery("plain")) is not None:
        issued.box.ledger.settle_delivery(row, "give_up")
    (_, negative) = issued.box.ledger.verdicts(1)
    issued.issuer.take_back(negative, None, "a patient of two names")
    assert "capture.summary" in issued.delivered("plain")


def test_a_report_that_nothing_was_analysed_goes_to_the_patient_whose_the_images_were_thought_to_be(
    issued: Issued,
) -> None:
    issued.issue(_negative(issued))
    issued.delivered("plain")
    issued.issuer.take_back(issued.box.ledger.verdicts(1)[-1], None, "a patient of two names")
    issued.issuer.take_back(issued.box.ledger.verdicts(1)[-1], None, ANOTHER_PATIENT)
    assert issued.delivered("plain") == ["report"]
    assert _follows(issued, 2) == [1]


def test_a_stopped_package_says_nothing_of_the_patient_whose_the_images_turned_out_to_be(issued: Issued) -> None:
    issued.issue(seen(issued))
    issued.delivered("plain")
    (standing,) = issued.box.ledger.verdicts(1)
    issued.issuer.take_back(standing, None, ANOTHER_PATIENT)
    issued.arrive()
    issued.issue(_negative(issued))
    issued.box.ledger.record_decision(Event.BOARD_SUSPENDED, verdict_on(issued.series).package, who="Dr A", reason="x")
    assert issued.delivered("plain") == ["report", "capture.summary"]
    assert {state for _, state in _sent(issued, "plain", 3).values()} == {"withdrawn"}
