"""The part of `scanside deliver` that takes tasks from somebody else's worklist, and tells it how they ended."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pydicom

from appliance.governance.ordered import patient_of
from appliance.ledger.orders import Identifier
from appliance.ledger.store import Ledger
from appliance.ledger.tasks import Task
from appliance.ledger.views import find_study, study_report
from appliance.operations.health import Watchdog
from appliance.services.peers import peer_of
from appliance.settings import DicomDestination, DicomwebDestination, ImageDestination, Settings
from appliance.worklist.performer import LONGEST_PAUSE, Outcome, Output, Performer
from dicom_io.workitem import Step, code, text

log = logging.getLogger(__name__)

ENDED = ("acknowledged", "rejected", "dead", "withdrawn", "replaced")


def perform_tasks(settings: Settings, ledger: Ledger, watchdog: Watchdog) -> Performer | None:
    """Take tasks from the worklist that the settings name, if they do."""
    section = settings.performer
    if section is None:
        return None
    package = section.package or settings.models.packages[0]
    performer = Performer(
        ledger,
        lambda: peer_of(section),
        section.calling_ae_title or settings.intake.ae_title,
        [code_of(one) for one in section.workitem_codes],
        code_of(section.station, settings.box.name),
        lambda step, uid: study_of(settings, ledger, step, uid),
        lambda task: outcome_of(settings, ledger, package, task),
        poll_seconds=section.poll_seconds,
        answer_seconds=section.answer_seconds,
        turn=watchdog.loop("the performer", LONGEST_PAUSE + section.poll_seconds + 20 * section.answer_seconds),
    )
    performer.start()
    log.info("delivery: takes tasks from %s@%s:%d", section.ae_title, section.host, section.port)
    return performer


def code_of(said: str, meaning: str = "") -> Step:
    """A code of the settings, as value^scheme or value^scheme^meaning, as an item of a code sequence."""
    value, scheme, *rest = said.split("^")
    return code(value, scheme, (rest[0] if rest else "") or meaning or value)


def study_of(settings: Settings, ledger: Ledger, step: Step, uid: str) -> int | None:
    """The study with that UID, if it is here and of the step's patient; else None."""
    study = find_study(ledger, uid)
    # A number of a study is no UID.
    if study is None or ledger.begun(study)[0] != uid or ledger.selftest(study) is not None:
        return None
    authority = settings.intake.authority
    asked = Identifier(text(step, "PatientID").strip(), text(step, "IssuerOfPatientID").strip() or authority)
    here = ledger.names(patient_of((one.header for one in ledger.instances(study)), authority))
    theirs = ledger.names((asked,)) if asked.value else ()
    if theirs and here and not any(one.names(other) for one in here for other in theirs):
        log.error("study %d: a task of the worklist names it with another patient, and is left alone", study)
        return None
    return study


def outcome_of(settings: Settings, ledger: Ledger, package: str, task: Task) -> Outcome | None:
    """How a task ends by what the ledger knows of its study; None as long as something may still come."""
    report = study_report(ledger, task.study_id)
    analysis = next((one for one in report["analyses"] if one["package"] == package), None)
    if report["state"] != "complete" or analysis is None or analysis["completion"] != report["completions"]:
        return None
    if analysis["state"] in ("refused", "failed"):
        verb = "refused" if analysis["state"] == "refused" else "set aside"
        return Outcome(False, reason=f"the study was {verb} by {package}: {analysis['reason']}")
    verdicts = [one for one in report["verdicts"] if one["analysis_id"] == analysis["id"]]
    if analysis["state"] != "issued" or not verdicts or verdicts[-1]["result"].get("provisional"):
        return None
    verdict = verdicts[-1]
    if verdict["result"].get("mode") == "shadow":
        return Outcome(False, reason=f"{package} runs in shadow here: nobody is told its results")
    archives = [one for one in settings.destination if isinstance(one, ImageDestination)]
    names = {one.name for one in archives}
    deliveries = [
        one for one in report["deliveries"] if one["verdict_id"] == verdict["id"] and one["destination"] in names
    ]
    if any(one["state"] not in ENDED for one in deliveries):
        return None
    by = f"{package} {verdict['result']['package_version']}"
    return Outcome(True, by, outputs=_outputs(settings.findings_directory, archives, report, deliveries))


def _outputs(
    folder: Path, archives: list[Any], report: dict[str, Any], deliveries: list[dict[str, Any]]
) -> tuple[Output, ...]:
    """What lies in an archive, each object once: in the first archive that keeps it."""
    paths = {one["uid"]: one["path"] for one in report["findings"] if one["path"] and not one["removed_at"]}
    found: dict[tuple[str, str], list[tuple[str, str]]] = {}
    known: set[str] = set()
    for archive in archives:
        for one in deliveries:
            if one["destination"] != archive.name or one["state"] != "acknowledged" or one["uid"] in known:
                continue
            if (path := paths.get(one["uid"])) is None:
                continue
            header = pydicom.dcmread(folder / path, stop_before_pixels=True)
            known.add(one["uid"])
            instance = str(header.SOPClassUID), str(header.SOPInstanceUID)
            found.setdefault((archive.name, str(header.SeriesInstanceUID)), []).append(instance)
    by_name = {one.name: one for one in archives}
    study = report["study_instance_uid"]
    return tuple(_output(by_name[name], study, series, tuple(all_)) for (name, series), all_ in found.items())


def _output(
    archive: DicomDestination | DicomwebDestination, study: str, series: str, instances: tuple[tuple[str, str], ...]
) -> Output:
    if isinstance(archive, DicomDestination):
        return Output(study, series, instances, ae_title=archive.ae_title)
    return Output(study, series, instances, url=f"{archive.url.rstrip('/')}/studies/{study}/series/{series}")
