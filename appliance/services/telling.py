"""What each destination of alerts is told of a verdict: made when it is issued, and shown to whoever sets a site up."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import get_args

import pydicom
from pydicom.config import IGNORE
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import DataElement
from sqlalchemy.exc import SQLAlchemyError

from appliance.findings.alert import Kind, message_control_id, render_alert, render_order_update, study_link, value_of
from appliance.findings.mapping import MappingError, mapped
from appliance.findings.notice import Notice, named, render_mail, render_webhook
from appliance.findings.validate import fault, segments_fault
from appliance.findings.wording import impression
from appliance.findings.worklist import mark_text, render_mark
from appliance.inference.verdict import EVALUATION
from appliance.intake.spool import path_of
from appliance.ledger.orders import Order
from appliance.ledger.records import Verdict
from appliance.ledger.store import Inputs, Ledger, Told
from appliance.ledger.views import study_report
from appliance.settings import (
    REST_NAMES,
    AlertDestination,
    Hl7Destination,
    MailDestination,
    OrderDestination,
    RestDestination,
    Settings,
    UpsDestination,
    WorklistDestination,
    WorklistTarget,
    fill,
)
from dicom_io.errors import ScansideError
from dicom_io.identity import identifying_header
from dicom_io.objects.uids import derived_uid


@dataclass(frozen=True, slots=True)
class Issued:
    """A verdict that was issued, and whose it is.

    Attributes:
        at: when, ISO 8601.
        header: of one of its images, without pixels.
    """

    study_id: int
    verdict: Verdict
    revision: int
    at: str
    header: pydicom.Dataset


@dataclass(frozen=True, slots=True)
class Message:
    """What one destination is told.

    Attributes:
        id: MSH-10, or its counterpart in a mail or webhook: the same at every try.
        held_seconds: so long after the verdict it is sent if nobody has acknowledged the alert; 0: at once.
        file: name of its file.
        fault: why it may never be sent; "" if it may.
        unmapped: why it is the standard message although the site has a template; "" otherwise.
        reduced: why it has less in it than it should; "" where it is whole.
    """

    destination: AlertDestination
    kind: Kind
    id: str
    held_seconds: float
    file: str
    content: bytes
    fault: str
    unmapped: str = ""
    reduced: str = ""


def alert_kind(before: Sequence[Told], positive: bool, *, provisional: bool = False) -> Kind | None:
    """What a verdict tells the hospital: an alert once, and what became of it when that is known or has changed.

    Where nobody knows whether the last message arrived its answer is told again, in a form that is no second alert to
    who has it: a correction or confirmation names the first message and replaces it, and is an alert to who has none.

    Args:
        before: what it was told by the earlier revisions, oldest first.
    """
    last = before[-1] if before else Told(positive=False)
    if not positive:
        return "withdrawal" if last.positive or not last.certain else None
    if last.positive and last.provisional and not provisional:
        return "confirmation"
    if last.positive and last.certain:
        return None
    if any(one.positive for one in before):
        return "correction"
    return "provisional" if provisional else "alert"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a verdict tells one destination.

    Attributes:
        test: as a test.
        after: the messages that it follows, oldest first.
    """

    kind: Kind
    test: bool
    after: Sequence[Told]


def answer(before: Sequence[Told], verdict: Verdict) -> Answer | None:
    """What a verdict tells who was told that before; None if it tells nothing new.

    Who had nothing but tests is alerted as if there had been none: a receiver may drop them. What takes something back
    is as real as that, whatever mode the package runs in by then: a test would leave an alert standing. A test repeats
    no alert: it would take the place of a step that still waits to tell of it.

    Args:
        before: what it was told by the earlier revisions, oldest first.
    """
    real = _real(before)
    test = verdict.mode != "clinical" if verdict.positive else alert_kind(real, positive=False) is None
    if test and verdict.positive and real and real[-1].positive:
        return None
    after = before if test else real
    kind = alert_kind(after, verdict.positive, provisional=verdict.provisional)
    return Answer(kind, test, after) if kind else None


def _real(before: Sequence[Told]) -> list[Told]:
    """Those of the messages that were no tests. What took something back was one where that was one, see `answer`."""
    real: list[Told] = []
    for one in before:
        standing = bool(real) and (real[-1].positive or not real[-1].certain)
        if one.mode == "clinical" if one.positive else standing:
            real.append(one)
    return real


def _worded(issued: Issued, answer: Answer) -> Issued:
    """The verdict in the words of its answer: as a test, or not."""
    verdict = issued.verdict
    if answer.test == (verdict.mode != "clinical"):
        return issued
    notice = verdict.notice.removeprefix(EVALUATION).strip()
    if answer.test:
        notice = f"{EVALUATION} {notice}"
    return replace(issued, verdict=replace(verdict, mode="evaluation" if answer.test else "clinical", notice=notice))


def recipients(
    settings: Settings, told: Mapping[str, Sequence[Told]], verdict: Verdict
) -> list[tuple[AlertDestination, Answer, float]]:
    """The destinations that a verdict tells something new: what, and for how many seconds that is held.

    A step of the escalation that was never told of the study waits for those that are told now; where these know it
    already it has nothing to wait for and is not told. A step that was told hears what became of it as the others do;
    one of which nobody knows whether the alert arrived is told it again as if it had not been told.
    """
    found: list[tuple[AlertDestination, Answer, float]] = []
    for destination in settings.alert_destinations:
        told_now = answer(told.get(destination.name, []), verdict)
        if told_now is None:
            continue
        before = told_now.after
        doubtful = bool(before) and before[-1].positive and not before[-1].certain
        held = destination.after_seconds if not before or (doubtful and verdict.positive) else 0.0
        if held and not any(not one.after_seconds for one, _, _ in found):
            continue
        found.append((destination, told_now, held))
    return found


def messages(settings: Settings, told: Mapping[str, Sequence[Told]], issued: Issued) -> list[Message]:
    """The message to each of the `recipients` of a verdict."""
    made: list[Message] = []
    for destination, told_now, held in recipients(settings, told, issued.verdict):
        first = told_now.after[0].uid if told_now.after else ""
        made.append(message(settings, destination, _worded(issued, told_now), told_now.kind, held, first))
    return made


def message(
    settings: Settings,
    destination: AlertDestination,
    issued: Issued,
    kind: Kind,
    held_seconds: float = 0.0,
    first: str = "",
) -> Message:
    """The message of that kind to one destination; HL7 is validated, as a receiver would do it.

    An alert in another form is better than none: where the whole message cannot be made or is invalid, whatever the
    reason, free text is left out of it, and where that is not enough, what the images say in unusual characters.

    Args:
        first: MSH-10 of the first message that it got on this study.
    """
    made: list[Message] = []
    why: list[str] = []
    bare = replace(issued, verdict=_bare(issued.verdict))
    for said in (issued, bare, replace(bare, header=_plain(issued))):
        try:
            one = _message(settings, destination, said, kind, held_seconds, first)
        except Exception as error:
            why.append(_where(error))
            continue
        if not one.fault:
            return replace(one, reduced=why[0] if why else "")
        made.append(one)
        why.append(one.fault)
    if made:
        return made[0]
    identity = _identity(destination, issued, kind)
    return Message(destination, kind, identity, held_seconds, f"{identity}.none", b"", f"it cannot be made: {why[0]}")


def _where(error: Exception) -> str:
    """What went wrong, without its words: they may be a patient's."""
    at = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {at.name}, line {at.lineno}"


_NEEDED = (
    "PatientName", "PatientID", "IssuerOfPatientID", "PatientBirthDate", "PatientSex", "AccessionNumber", "AdmissionID",
    "PlacerOrderNumberImagingServiceRequest", "StudyDate", "StudyTime", "AcquisitionDate", "AcquisitionTime",
)  # fmt: skip
_REDUCED = (
    "REDUCED MESSAGE: the whole one was not valid. Limitations and reasons are left out, perhaps what the images say "
    "of patient and order: see the report."
)


def _usual(text: str) -> str:
    """Text with letters, digits and the commonest signs, of at most 500 characters."""
    return "".join(one if one.isalnum() or one in " .,:;()/+-_" else " " for one in text)[:500]


def _bare(verdict: Verdict) -> Verdict:
    """A verdict without free text, but for its notice in usual characters."""
    return replace(
        verdict,
        notice=f"{_REDUCED} {_usual(verdict.notice)}",
        limitations=(),
        withdrawn="for a reason that cannot be written here" if verdict.withdrawn else "",
    )


def _plain(issued: Issued) -> pydicom.Dataset:
    """What a header says of patient and order in usual characters: whole values, the others are left out."""
    plain = pydicom.Dataset()
    plain.StudyInstanceUID = issued.verdict.study_instance_uid
    for keyword in _NEEDED:
        try:
            text = value_of(issued.header, keyword)
        except Exception:  # a damaged header may hold anything
            continue
        if text and len(text) <= 64 and _usual(text.replace("^", "")) == text.replace("^", ""):
            plain.add(DataElement(keyword, dictionary_VR(keyword), text, validation_mode=IGNORE))
    return plain


def _identity(destination: AlertDestination | WorklistTarget, issued: Issued, kind: Kind) -> str:
    verdict = issued.verdict
    # With the time of issue: who counts revisions anew, as after a ledger was lost, must not be taken for a repeat.
    key = (verdict.study_instance_uid, verdict.package, verdict.package_version, str(issued.revision), issued.at, kind)
    return message_control_id(*key, destination.name)


def _message(
    settings: Settings, destination: AlertDestination, issued: Issued, kind: Kind, held_seconds: float, first: str
) -> Message:
    verdict, header = issued.verdict, issued.header
    identity, at = _identity(destination, issued, kind), datetime.fromisoformat(issued.at)
    if isinstance(destination, Hl7Destination):
        text = render_alert(
            verdict,
            header,
            control_id=identity,
            kind=kind,
            revision=issued.revision,
            issued_at=at,
            # What is only evaluated must not look like the real thing to an interface engine.
            processing_id=destination.processing_id if verdict.mode == "clinical" else "T",
            sending_application=settings.box.name,
            sending_facility=destination.sending_facility,
            receiving_application=destination.receiving_application,
            receiving_facility=destination.receiving_facility,
            acknowledgement=destination.acknowledgement,
            first=first,
            link=study_link(destination.study_link, header),
        )
        text, unmapped = in_form(destination, text, facts(issued, kind))
        file = f"{identity}.hl7"
        return Message(destination, kind, identity, held_seconds, file, text.encode("utf-8"), fault(text), unmapped)
    named_values = named(header, destination.include)
    notice = Notice(identity, kind, settings.box.name, issued.study_id, verdict, issued.revision, at, named_values)
    if isinstance(destination, MailDestination):
        mail = render_mail(notice, destination.sender, destination.recipients)
        return Message(destination, kind, identity, held_seconds, f"{identity}.eml", mail, "")
    return Message(destination, kind, identity, held_seconds, f"{identity}.json", render_webhook(notice), "")


@dataclass(frozen=True, slots=True)
class Change:
    """What one worklist is asked to change.

    Attributes:
        id: the same at every try.
        file: name of its file.
        fault: why it may never be sent; "" if it may.
    """

    destination: WorklistTarget
    id: str
    file: str
    content: bytes
    fault: str = ""


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of a study beside the verdict that a worklist is told of.

    Attributes:
        late_seconds: see `mark_text`.
        orders: reads those of the study and its patient that were not cancelled.
        positive_elsewhere: reads whether a positive verdict of another package in clinical mode stands.
    """

    late_seconds: float | None
    orders: Callable[[], Sequence[Order]]
    positive_elsewhere: Callable[[], bool]


def marks(settings: Settings, told: Mapping[str, Sequence[Told]], issued: Issued, known: Known) -> list[Change]:
    """What this verdict changes on each worklist.

    Whatever an image's header holds against one of them, neither an alert nor another worklist waits for it. Where the
    disk or the ledger fails all of it has to be tried again.
    """
    made: list[Change] = []
    for destination in settings.worklist_destinations:
        told_now = answer(told.get(destination.name, []), issued.verdict)
        if told_now is None:
            continue
        identity = _identity(destination, issued, told_now.kind)
        try:
            said = _worded(issued, told_now)
            made += _changes(settings, destination, said, told_now.kind, identity, known)
        except (OSError, SQLAlchemyError):
            raise
        except Exception as error:
            fault = f"it cannot be made: {_where(error)}"
            made.append(Change(destination, identity, f"{identity}.none", b"", fault))
    return made


def _changes(
    settings: Settings,
    destination: WorklistTarget,
    issued: Issued,
    kind: Kind,
    identity: str,
    known: Known,
) -> list[Change]:
    """The change of one worklist; none where nothing is to be asked of it."""
    verdict, header, at = issued.verdict, issued.header, datetime.fromisoformat(issued.at)
    notice = Notice(identity, kind, settings.box.name, issued.study_id, verdict, issued.revision, at, ())
    match destination:
        case WorklistDestination() | UpsDestination():
            # Another one at every message: that of another patient, or of a lost ledger, may be there.
            item = derived_uid(settings.box.uid_root, "workitem", verdict.study_instance_uid, identity)
            content = render_mark(notice, header, destination.mode, item, known.late_seconds)
            return [Change(destination, identity, f"{identity}.json", content)]
        case OrderDestination():
            return _order_update(settings, destination, notice, header, known)
        case RestDestination():
            return _rest_request(destination, notice, header, known)


def _order_update(
    settings: Settings,
    destination: OrderDestination,
    notice: Notice,
    header: pydicom.Dataset,
    known: Known,
) -> list[Change]:
    """The message that raises an order or takes that back; none where the order is urgent already, or its priority
    before is not known, or the package is not in clinical mode, or another one's positive verdict keeps it raised."""
    if notice.is_test or (not notice.verdict.positive and known.positive_elsewhere()):
        return []
    orders = known.orders()
    if any(one.urgent for one in orders):
        return []
    usual = next((one.priority for one in reversed(orders) if one.priority), destination.usual_priority)
    priority = destination.priority if notice.verdict.positive else usual
    if not priority:
        return []
    text = render_order_update(
        header,
        control_id=notice.id,
        priority=priority,
        said=mark_text(notice, known.late_seconds),
        issued_at=notice.issued_at,
        processing_id=destination.processing_id,
        sending_application=settings.box.name,
        sending_facility=destination.sending_facility,
        receiving_application=destination.receiving_application,
        receiving_facility=destination.receiving_facility,
    )
    return [Change(destination, notice.id, f"{notice.id}.hl7", text.encode("utf-8"), segments_fault(text))]


_IDENTIFIERS = ("accession", "study_uid", "patient_id")
"""What a request may name of a study: without one that its address names it would concern something else."""


def _rest_request(destination: RestDestination, notice: Notice, header: pydicom.Dataset, known: Known) -> list[Change]:
    """The request by the site's templates; none where a package that is not in clinical mode would move somebody, nor
    where one would take back what another's positive verdict says, too."""
    template = destination.body if notice.verdict.positive else destination.withdraw_body
    if not template or (notice.is_test and destination.mode == "reprioritise"):
        return []
    # Only what moves nobody, and is told apart by its package, can be taken back alone.
    alone = destination.mode == "suggest" and "${package}" in destination.url + template
    if not (notice.verdict.positive or alone) and known.positive_elsewhere():
        return []
    values = {
        **dict.fromkeys(REST_NAMES, ""),
        **dict(named(header, _IDENTIFIERS)),
        "id": notice.id,
        "kind": notice.kind,
        "study": str(notice.study),
        "probability": f"{notice.verdict.probability:.4f}",
        "package": notice.verdict.package,
        "package_version": notice.verdict.package_version,
        "revision": str(notice.revision),
        "issued_at": notice.issued_at.isoformat(timespec="microseconds"),
        "text": mark_text(notice, known.late_seconds),
    }
    request = {
        "method": destination.method,
        "url": fill(destination.url, values, "url"),
        "body": fill(template, values, "body"),
    }
    needed = [one for one in _IDENTIFIERS if f"${{{one}}}" in destination.url and not values[one]]
    lacking = f"the images have no {', '.join(needed)}" if needed else ""
    content = json.dumps(request, ensure_ascii=False).encode("utf-8")
    return [Change(destination, notice.id, f"{notice.id}.json", content, lacking)]


def facts(issued: Issued, kind: Kind) -> dict[str, object]:
    """What a template may print beside the standard segments."""

    def dicom(keyword: str) -> str:
        return value_of(issued.header, keyword)

    return {
        **{name: getattr(issued.verdict, name) for name in _PRINTABLE},
        "kind": kind,
        "revision": issued.revision,
        "issued_at": issued.at,
        "impression": impression(issued.verdict),
        "dicom": dicom,
    }


_PRINTABLE = (
    "study_instance_uid", "package", "package_version", "notice", "udi", "mode", "positive", "probability",
    "threshold", "subtypes", "volume_ml", "limitations",
)  # fmt: skip


def in_form(destination: Hl7Destination, standard: str, values: Mapping[str, object]) -> tuple[str, str]:
    """The message in the form of the destination's template, and why it is not; "" if it is, or there is none.

    Where the template fails the standard message is sent: an alert in another form is better than none.
    """
    if destination.template is None:
        return standard, ""
    try:
        text = mapped(destination.template.read_text(encoding="utf-8"), standard, values)
    except (OSError, UnicodeDecodeError) as error:
        return standard, f"the template cannot be read: {error}"
    except MappingError as error:
        return standard, str(error)
    if why := fault(text):
        return standard, f"the message is invalid: {why}"
    return text, ""


def try_template(settings: Settings, destination: Hl7Destination) -> dict[str, str]:
    """What is wrong with a destination's template for each kind of message, on an invented study."""
    header = pydicom.Dataset()
    header.StudyInstanceUID, header.PatientID, header.PatientName = "2.25.1", "P1", "Test^Patient"
    header.AccessionNumber, header.StudyDate, header.StudyTime = "A1", "20260102", "030405"
    verdict = Verdict(
        "2.25.1", "2.25.1.1", "package", "1.0.0", "Notice.", True, 0.9, 0.5, {"subdural": 0.8}, 12.3, (), (), (),
        ("A limitation.",), mode="evaluation", udi="(01)1",
    )  # fmt: skip
    wrong = {}
    for kind in get_args(Kind):
        one = verdict
        if kind in ("withdrawal", "refusal"):
            one = replace(verdict, positive=False, withdrawn="a test" if kind == "refusal" else "")
        issued = Issued(1, one, 2, "2026-01-02T03:04:05+00:00", header)
        made = message(settings, destination, issued, kind, first="M1")
        if made.unmapped:
            wrong[kind] = made.unmapped
    return wrong


@dataclass(frozen=True, slots=True)
class Preview:
    """What one verdict tells by today's settings.

    Attributes:
        said: why it tells nothing; "" if it tells something.
    """

    package: str
    revision: int
    positive: bool
    said: str
    messages: Sequence[Message]


def preview(settings: Settings, ledger: Ledger, study_id: int) -> list[Preview]:
    """What the newest verdict of each package on a study tells each destination by the settings as they are now.

    It is rendered anew and sent nowhere. Each destination is taken to know the earlier verdicts.

    Raises:
        ScansideError: there is no verdict yet, or the images are gone, of which patient and order are taken.
    """
    found: list[Preview] = []
    report = study_report(ledger, study_id)
    for analysis in report["analyses"]:
        rows = [one for one in report["verdicts"] if one["analysis_id"] == analysis["id"]]
        if not rows:
            continue
        verdict, revision = Verdict.from_json(rows[-1]["result"]), rows[-1]["revision"]
        before = [
            Told(one["positive"], bool(one["result"].get("provisional")), mode=one["result"].get("mode", ""))
            for one in rows[:-1]
            if one["revision"] > ledger.patient_since(analysis["id"], revision)
        ]
        told_now = answer(before, verdict)
        kind = told_now.kind if told_now else None
        wanted = list(settings.alert_destinations)
        said = "" if kind else "it tells nobody anything new"
        if verdict.withdrawn and not verdict.series_instance_uid:
            kind, said = "refusal", ""
            wanted = [one for one in wanted if isinstance(one, Hl7Destination) and one.refusals]
        if verdict.mode == "shadow":
            kind, said = None, "in shadow nobody is told"
        made: list[Message] = []
        if kind:
            answers = {name: answer(one, verdict) for name, one in ledger.told_of_patient(analysis["id"]).items()}
            firsts = {name: one.after[0].uid for name, one in answers.items() if one and one.after}
            header = _source(settings, ledger, study_id, rows[-1]["inputs"] or analysis["inputs"])
            issued = Issued(study_id, verdict, revision, rows[-1]["issued_at"], header)
            issued = _worded(issued, told_now) if told_now else issued
            made = [message(settings, one, issued, kind, one.after_seconds, firsts.get(one.name, "")) for one in wanted]
            said = "" if made else "no destination wants to hear of it"
        found.append(Preview(analysis["package"], revision, verdict.positive, said, made))
    if not found:
        states = ", ".join(f"{one['package']} is {one['state']}" for one in report["analyses"]) or report["state"]
        raise ScansideError(f"there is no verdict yet ({states})", f"study {study_id}", "wait for it")
    return found


def _source(settings: Settings, ledger: Ledger, study_id: int, inputs: Inputs) -> pydicom.Dataset:
    """The header of an image that was analysed; of a study that was refused, of any."""
    stored = ledger.inputs(study_id, inputs) if inputs else ledger.instances(study_id)
    try:
        return identifying_header(path_of(settings.spool_directory, stored[0].digest))
    except (IndexError, FileNotFoundError) as error:
        remedy = "retention removes them; `scanside study` tells what was sent"
        raise ScansideError("its images are gone", f"study {study_id}", remedy) from error
