"""The alert: an HL7 v2.5.1 unsolicited result, ORU^R01 (chapter 7), from a verdict.

Every result in it is preliminary (P): this box never finalises one, so it never sends F; and as table 0085 lets C
replace final results only, a correction is a preliminary result again. A receiver tells the kinds of message apart by
the observation MESSAGE-KIND. What follows an alert names the first message on the study (FIRST-MESSAGE, its MSH-10),
and replaces what has the same patient, order numbers and study UID and a lower REVISION.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable
from datetime import date, datetime
from typing import Literal
from urllib.parse import quote

from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.sequence import Sequence

from appliance.findings import wording
from appliance.ledger.records import Verdict
from dicom_io.objects import codes
from dicom_io.objects.codes import Concept

Kind = Literal["provisional", "alert", "confirmation", "correction", "withdrawal", "refusal"]
Acknowledgement = Literal["original", "accept", "application"]

FOLLOWING = ("confirmation", "correction", "withdrawal")
"""Kinds that say what became of an earlier message."""

_ASKED: dict[Acknowledgement, dict[int, str]] = {
    "original": {},
    "accept": {14: "AL", 15: "NE"},
    "application": {14: "AL", 15: "AL"},
}
"""MSH-15 and MSH-16 (2.9.3, table 0155), a place further left each."""

_CONTROL_ID_LENGTH = 20  # of MSH-10 in v2.5.1
_ESCAPES = str.maketrans({"\\": "\\E\\", "|": "\\F\\", "^": "\\S\\", "&": "\\T\\", "~": "\\R\\"})
_LONGEST, _LONGEST_NAMESPACE = 199, 20
"""Characters of an ST and of an IS, escapes counted: what is longer makes a message invalid."""
_LONGEST_TEXT = 10_000
"""Characters of a text before they are escaped, which makes five of one at most: TX and FT have room for 65,536."""
_NO_PATIENT_ID = (
    "There is NO patient ID here: identify the patient by name, accession and study UID. PID-3 holds the study UID."
)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""Control characters, and halves of a surrogate pair, which no UTF-8 can be made of."""
_SUBTYPES_OF_NAMES = ("A", "I", "P")  # alphabetic, ideographic, phonetic (table 0465)


def value_of(source: Dataset | None, keyword: str) -> str:
    """What a header says there, as text; "" for nothing."""
    value = source.get(keyword) if source is not None else None
    if isinstance(value, MultiValue):  # a backslash, or a yen sign of ISO_IR 13, within a single value
        value = "\\".join(map(str, value))
    return "" if value is None else str(value).strip()


def accession_of(source: Dataset) -> str:
    """The accession number of a study; where it has none, that of the request it was made for (PS3.3 C.7.3.1.1)."""
    return value_of(source, "AccessionNumber") or value_of(
        _first_item(source, "RequestAttributesSequence"), "AccessionNumber"
    )


def study_link(template: str, source: Dataset) -> str:
    """The address of a study in a viewer; "" where the study lacks what the address needs.

    Args:
        template: ``{study_uid}``, ``{accession}`` and ``{patient_id}`` stand for the study's own.
    """
    values = {"study_uid": "StudyInstanceUID", "accession": "AccessionNumber", "patient_id": "PatientID"}
    for name, keyword in values.items():
        if f"{{{name}}}" in template:
            value = value_of(source, keyword)
            if not value:
                return ""
            template = template.replace(f"{{{name}}}", quote(value, safe=""))
    return template


def message_control_id(*parts: str) -> str:
    """MSH-10 for the delivery that these parts name: always the same 20 characters, so a receiver can deduplicate."""
    name = "".join(f"{len(part)}:{part}" for part in parts)
    return base64.b32encode(hashlib.sha256(name.encode()).digest()).decode()[:_CONTROL_ID_LENGTH]


def render_alert(
    verdict: Verdict,
    source: Dataset,
    *,
    control_id: str,
    kind: Kind,
    issued_at: datetime,
    processing_id: Literal["P", "T", "D"],
    sending_application: str,
    sending_facility: str,
    receiving_application: str,
    receiving_facility: str,
    revision: int = 1,
    acknowledgement: Acknowledgement = "original",
    first: str = "",
    link: str = "",
) -> str:
    r"""The message as ER7 text, each segment ended by \r; it is to be sent as UTF-8.

    Args:
        source: header of an analysed image; patient, visit and order are its.
        control_id: MSH-10, see `message_control_id`.
        kind: "provisional" says that haemorrhage is suspected on a part of the study, "confirmation" that it still is
            on the whole, "alert" and "correction" that it is, "withdrawal" that it no longer is, "refusal" that the
            study was not analysed.
        issued_at: when the verdict was issued (aware).
        acknowledgement: which answer is asked for: that of original mode, or in enhanced mode the accept
            acknowledgement alone, or the application's after it.
        first: MSH-10 of the first message on this study; it stands in what follows that one.
        link: address of the study in a viewer; "" for none.

    Raises: ValueError if `kind` contradicts the verdict, or `control_id` is not 1 to 20 printable ASCII characters.
    """
    if verdict.positive == (kind in ("withdrawal", "refusal")):
        raise ValueError(f"{kind!r} contradicts a verdict with positive={verdict.positive}")
    if not re.fullmatch(rf"[!-~]{{1,{_CONTROL_ID_LENGTH}}}", control_id):
        raise ValueError(f"message control id {control_id!r} is not 1 to {_CONTROL_ID_LENGTH} characters")
    sent = _timestamp(issued_at)
    segments = [
        _segment(
            "MSH",
            {
                # MSH-1 is the separator itself, so every later field stands one place further left.
                1: "^~\\&",
                2: _named(sending_application),
                3: _named(sending_facility),
                4: _named(receiving_application),
                5: _named(receiving_facility),
                6: sent,
                8: "ORU^R01^ORU_R01",
                9: _text(control_id),
                10: processing_id,
                11: "2.5.1",
                **_ASKED[acknowledgement],
                17: "UNICODE UTF-8",
            },
        ),
        *_patient(source, sending_application),
        *_order(source, sent),
        *_notes(verdict, kind, revision, source),
        *([_segment("TQ1", {1: "1", 9: _components("S", "Stat", "HL70485")})] if verdict.positive else []),
        *_observations(verdict, kind, revision, _acquired(source), sent, first, link),
    ]
    return "".join(segment + "\r" for segment in segments)


def render_order_update(
    source: Dataset,
    *,
    control_id: str,
    priority: str,
    said: str,
    issued_at: datetime,
    processing_id: Literal["P", "T", "D"],
    sending_application: str,
    sending_facility: str,
    receiving_application: str,
    receiving_facility: str,
) -> str:
    r"""ORM^O01 that changes the priority of a study's order (HL7 v2.5.1 4.4.1), as ER7, each segment ended by \r.

    Args:
        source: header of an analysed image; patient, visit and order are its.
        priority: of HL7 table 0485, into ORC-7.6 and OBR-27.6.
        said: why, into an NTE.
    """
    sent = _timestamp(issued_at)
    header = {
        1: "^~\\&",
        2: _named(sending_application),
        3: _named(sending_facility),
        4: _named(receiving_application),
        5: _named(receiving_facility),
        6: sent,
        8: "ORM^O01^ORM_O01",
        9: _text(control_id),
        10: processing_id,
        11: "2.5.1",
        17: "UNICODE UTF-8",
    }
    orc, obr = (one.split("|") for one in _order(source, sent))
    timing = f"^^^^^{_text(priority)}"
    placer, filler = (*orc, "", "", "")[2:4]
    numbers = {2: placer, 3: filler}
    service = {number: obr[number] for number in (4, 18, 24) if len(obr) > number}
    segments = [
        _segment("MSH", header),
        *_patient(source, sending_application),
        _segment("ORC", {1: "XO", **numbers, 7: timing, 9: sent}),
        _segment("OBR", {1: "1", **numbers, **service, 27: timing}),
        *_numbered([said, *_unfitting(source)]),
    ]
    return "".join(segment + "\r" for segment in segments)


def _order(source: Dataset, sent: str) -> list[str]:
    """ORC and OBR. The accession number is the filler's order number, and stands in OBR-18 too, where the IHE
    Radiology framework (Scheduled Workflow) carries it."""
    request = _first_item(source, "RequestAttributesSequence")
    placer = value_of(source, "PlacerOrderNumberImagingServiceRequest") or value_of(
        request, "PlacerOrderNumberImagingServiceRequest"
    )
    accession = accession_of(source)
    issuer = _first_item(source, "IssuerOfAccessionNumberSequence")
    # OBR-3 is required; without an accession the study's UID is the one number that everybody has.
    filler = _fitting(_components(_text(accession), *_authority(issuer))) if accession else ""
    filler = filler or _text(value_of(source, "StudyInstanceUID"))
    service = (
        *(codes.CT_HEAD_LOINC.value, codes.CT_HEAD_LOINC.meaning, codes.CT_HEAD_LOINC.scheme),
        *(codes.CT_HEAD.value, codes.CT_HEAD.meaning, codes.CT_HEAD.scheme),
    )
    fields = {
        1: "1",
        2: _fitting(_text(placer)),
        3: filler,
        4: _components(*(_text(part) for part in service)),
        7: _acquired(source),
        18: _fitting(_text(accession)),
        22: sent,
        24: "CT",
        25: "P",
    }
    return [_segment("ORC", {1: "RE", 2: _fitting(_text(placer)), 3: filler}), _segment("OBR", fields)]


def _notes(verdict: Verdict, kind: Kind, revision: int, source: Dataset) -> list[str]:
    lines = [wording.TRIAGE_ONLY, verdict.notice]
    if kind == "provisional":
        lines.insert(0, "PROVISIONAL: the study was still arriving. This alert will be confirmed or withdrawn.")
    if kind == "confirmation":
        lines.insert(0, f"CONFIRMATION: revision {revision} of this verdict, on the whole study, confirms the alert.")
    if kind == "correction":
        lines.insert(0, f"CORRECTION: revision {revision} of this verdict replaces the earlier alert.")
    if kind == "withdrawal":
        lines.insert(0, f"WITHDRAWAL: revision {revision} of this verdict takes the earlier alert back.")
    if not value_of(source, "PatientID"):
        lines.insert(0, _NO_PATIENT_ID)
    lines = [*_unfitting(source), *lines]
    lines += [f"Limitation: {limitation}" for limitation in verdict.limitations]
    return _numbered(lines)


def _numbered(notes: Iterable[str]) -> list[str]:
    return [
        _segment("NTE", {1: str(number), 2: "L", 3: _long_text(note)}) for number, note in enumerate(notes, start=1)
    ]


def _unfitting(source: Dataset) -> list[str]:
    """What identifies patient and order and is too long for its field: whole, in words. Cut off, it would name
    another."""
    fields = {
        "patient ID with its issuer": (_identified(source), f"{value_of(source, 'PatientID')} {_issuer_said(source)}"),
        "patient's name": (_spelt(source), value_of(source, "PatientName")),
        "accession number": (_text(accession_of(source)), accession_of(source)),
        "admission ID": (_text(value_of(source, "AdmissionID")), value_of(source, "AdmissionID")),
    }
    return [
        f"The {name} is too long for its field. It is: {value}"
        for name, (field, value) in fields.items()
        if field and not _fitting(field)
    ]


def _observations(
    verdict: Verdict, kind: Kind, revision: int, acquired: str, sent: str, first: str, link: str
) -> list[str]:
    positive = kind not in ("withdrawal", "refusal")
    withdrawn = "The earlier alert is withdrawn. " if kind == "withdrawal" else ""
    impression = f"{withdrawn}{wording.impression(verdict)}"
    rows: list[dict[int, str]] = [
        {2: "ST", 3: _coded(codes.DICOM_STUDY), 5: _text(verdict.study_instance_uid)},
        {
            2: "TX",
            3: _coded(codes.PROCEDURE_FINDINGS),
            5: _long_text(impression),
            8: "AA" if positive else "",
            17: _coded(codes.ACTIONABLE_1) if positive else "",
        },
    ]
    if positive:
        likely = wording.likely_subtypes(verdict.subtypes)
        found = [codes.SUBTYPES[label] for label in likely if label in codes.SUBTYPES]
        rows += [
            {2: "CE", 3: _coded(codes.FINDING), 4: str(number), 5: _coded(concept)}
            for number, concept in enumerate([codes.INTRACRANIAL_HEMORRHAGE, *found], start=1)
        ]
    if not verdict.withdrawn:  # what was measured before is no longer said of the study
        rows += [
            {2: "NM", 3: _coded(codes.PROBABILITY), 5: f"{verdict.probability:.4f}", 6: _coded(codes.NO_UNITS)},
            {2: "NM", 3: _coded(codes.VOLUME), 5: f"{verdict.volume_ml:.2f}", 6: _coded(codes.MILLILITER)},
        ]
    rows += [
        {2: "ST", 3: _coded(codes.ALGORITHM_NAME), 5: _text(verdict.package)},
        {2: "ST", 3: _coded(codes.ALGORITHM_VERSION), 5: _text(verdict.package_version)},
        *([{2: "ST", 3: _coded(codes.UDI), 5: _text(verdict.udi)}] if verdict.udi else []),
        {2: "NM", 3: _coded(codes.REVISION), 5: str(revision)},
        {2: "ST", 3: _coded(codes.MESSAGE_KIND), 5: kind},
    ]
    if first and kind in FOLLOWING:
        rows.append({2: "ST", 3: _coded(codes.FIRST_MESSAGE), 5: _text(first)})
    if link and _fitting(_text(link)):
        # RP: a pointer to a text document of type HTML (2.A.65, tables 0191 and 0291).
        rows.append({2: "RP", 3: _coded(codes.STUDY_LINK), 5: _components(_text(link), "", "TEXT", "HTML")})
    return [
        _segment("OBX", {**row, 1: str(number), 11: "P", 14: acquired, 19: sent})
        for number, row in enumerate(rows, start=1)
    ]


def _patient(source: Dataset, sending_application: str) -> list[str]:
    """PID and PV1."""
    return [
        _segment(
            "PID",
            {
                1: "1",
                3: _patient_id(source, sending_application),
                5: _fitting(_spelt(source)) or "^^^^^^U",  # PID-5 is required; U: no name is stated (table 0200)
                7: _birth(source),
                8: _sex(source),
            },
        ),
        _segment("PV1", {1: "1", 2: "U", 19: _fitting(_text(value_of(source, "AdmissionID")))}),
    ]


def _patient_id(source: Dataset, sending_application: str) -> str:
    """PID-3, which is required: the patient's identifier; without one that fits the study's UID, as one of this box.

    Its type is U (table 0203): what it identifies is not stated.
    """
    found = _fitting(_identified(source))
    box = "&".join(_designator(_text(sending_application))).rstrip("&")
    return found or _components(_text(value_of(source, "StudyInstanceUID")), "", "", box, "U")


def _identified(source: Dataset) -> str:
    """The identifier with its issuer as assigning authority (CX-4); "" if the source has none."""
    identifier = value_of(source, "PatientID")
    if not identifier:
        return ""
    qualifiers = _first_item(source, "IssuerOfPatientIDQualifiersSequence")
    authority = _designator(
        _text(value_of(source, "IssuerOfPatientID")),
        _text(value_of(qualifiers, "UniversalEntityID")),
        _text(value_of(qualifiers, "UniversalEntityIDType")),
    )
    return _components(_text(identifier), "", "", "&".join(authority).rstrip("&"))


def _issuer_said(source: Dataset) -> str:
    qualifiers = _first_item(source, "IssuerOfPatientIDQualifiersSequence")
    said = (value_of(source, "IssuerOfPatientID"), value_of(qualifiers, "UniversalEntityID"))
    return f"(issuer: {', '.join(filter(None, said)) or 'not said'})"


def _spelt(source: Dataset) -> str:
    """PID-5: each component group of the person name (PS3.5 6.2.1) as a repetition of XPN; "" for none."""
    groups = value_of(source, "PatientName").split("=")
    repetitions = []
    for group, representation in zip(groups, _SUBTYPES_OF_NAMES, strict=False):
        family, given, middle, prefix, suffix = (*(part.strip() for part in group.split("^")), *[""] * 5)[:5]
        if any((family, given, middle, prefix, suffix)):
            # XPN has the suffix before the prefix; DICOM has them the other way round.
            parts = (_text(part) for part in (family, given, middle, suffix, prefix))
            repetitions.append("^".join([*parts, "", "L", representation]))
    return "~".join(repetitions)


def _birth(source: Dataset) -> str:
    return _day(value_of(source, "PatientBirthDate"))


def _day(text: str) -> str:
    """A day as HL7 has it; '' if there is no such day: a receiver that checks would reject the whole alert."""
    digits = re.sub(r"[^0-9]", "", text)
    try:
        return date.fromisoformat(digits).strftime("%Y%m%d") if len(digits) == 8 else ""
    except ValueError:
        return ""


def _sex(source: Dataset) -> str:
    value = value_of(source, "PatientSex").upper()
    return value if value in ("F", "M", "O") else "U"


def _acquired(source: Dataset) -> str:
    """OBR-7: when the images were acquired, by the scanner's clock; '' if the source does not say.

    The first of acquisition and study that has a time, else the first that has a day.
    """
    whole = value_of(source, "AcquisitionDateTime")
    pairs = [(whole[:8], whole[8:])]
    pairs += [(value_of(source, f"{name}Date"), value_of(source, f"{name}Time")) for name in ("Acquisition", "Study")]
    days = ""
    for day_of, time_of in pairs:
        day = _day(day_of)
        time = re.match(r"([01][0-9]|2[0-3])[0-5][0-9]([0-5][0-9])?", time_of.replace(":", ""))
        if day and time:
            offset = value_of(source, "TimezoneOffsetFromUTC")
            return day + time[0] + (offset if re.fullmatch(r"[+-](0[0-9]|1[0-4])[0-5][0-9]", offset) else "")
        days = days or day
    return days


def _authority(item: Dataset | None) -> tuple[str, str, str]:
    """EI-2 to EI-4 from an HL7v2 Hierarchic Designator macro (PS3.3 10.14)."""
    keywords = ("LocalNamespaceEntityID", "UniversalEntityID", "UniversalEntityIDType")
    first, second, third = (_text(value_of(item, keyword)) for keyword in keywords)
    return _designator(first, second, third)


def _designator(namespace: str, universal: str = "", kind: str = "") -> tuple[str, str, str]:
    """The components of an HD (2.A.33). A name that is too long for a namespace stands where longer ones may, as one
    that is locally defined (L, table 0301); a universal one beside it says enough."""
    if len(namespace) <= _LONGEST_NAMESPACE:
        return namespace, universal, kind
    return ("", universal, kind) if universal else ("", namespace, "L")


def _named(application: str) -> str:
    """MSH-3 to MSH-6."""
    return _components(*_designator(_text(application)))


def _fitting(field: str) -> str:
    """A field; "" if one of its components is longer than a receiver must take."""
    return field if all(len(part) <= _LONGEST for part in re.split(r"[~^&]", field)) else ""


def _first_item(source: Dataset, keyword: str) -> Dataset | None:
    items = source.get(keyword)
    # A damaged header may have anything under the name of a sequence.
    return items[0] if isinstance(items, Sequence) and items else None


def _segment(name: str, fields: dict[int, str]) -> str:
    return "|".join([name, *(fields.get(number, "") for number in range(1, max(fields) + 1))]).rstrip("|")


def _components(*parts: str) -> str:
    return "^".join(parts).rstrip("^")


def _coded(concept: Concept) -> str:
    return _components(_text(concept.value), _text(concept.meaning), _text(concept.scheme))


def _text(value: str) -> str:
    """Text for one component: delimiters escaped (chapter 2.7), line breaks and control characters to spaces."""
    return _printable(value).translate(_ESCAPES)


def _long_text(value: str) -> str:
    r"""Text for a TX or FT field: line breaks become \.br\ (chapter 2.7.2); what is too long is cut off and says so."""
    if len(value) > _LONGEST_TEXT:
        value = f"{value[:_LONGEST_TEXT]} … ({len(value)} characters)"
    return "\\.br\\".join(_text(line) for line in re.split(r"\r\n|\r|\n", value))


def _printable(value: str) -> str:
    return _CONTROL.sub(" ", value).strip()


def _timestamp(moment: datetime) -> str:
    """A time in this box's zone: MSH-7's is that of all times without one (2.9.3), and those are the scanner's."""
    local = moment.astimezone()
    return local.strftime("%Y%m%d%H%M%S.%f")[:-2] + local.strftime("%z")[:5]
