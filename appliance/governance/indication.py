"""The gate: whether a model package may see a study, criterion by criterion. What is unknown is refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date, datetime
from functools import lru_cache
from itertools import pairwise
from operator import attrgetter
from typing import Any, Literal
from unicodedata import normalize

from appliance.governance.label import Age, Indication, kernel_matches, scanner_matches
from appliance.governance.ordered import NOTHING_ORDERED, Ordered, onset_said
from appliance.governance.package import Package
from dicom_io.header import Header
from dicom_io.volume import UNIFORM_MM, Volume, uncovered

Outcome = Literal["met", "violated", "unknown", "excepted"]

CRITERIA = (
    "intended_use", "scanner", "modality", "sop_class", "body_part", "age", "contrast", "kvp", "slice_thickness",
    "spacing", "kernel", "tilt", "patient", "geometry", "coverage", "slabs", "gaps", "duplicates", "order", "onset",
    "brain",
)  # fmt: skip
"""The names of the criteria, in the order in which they are shown; exceptions refer to them."""

BOX = "a rule of this box, not of the label"
"""The clause of what is asked of every study, whatever the label says."""

USE = "triage"
"""What this box uses every package for."""

_GROWING = {"coverage", "slabs", "gaps", "spacing"}
"""Criteria that a series which is still arriving can yet come to meet."""

_HEAD = re.compile(
    r"\b(HEAD(?!ACHE|FIRST|REST)\w*|BRAIN\w*|SKULL\w*|CR[AÂ]NI\w*|CEREBR\w*|CERVEAU|ENC[EÉ](PH|F)[AÁ]L\w*|NEURO\w*"
    r"|SCHAEDEL\w*|SCHÄDEL\w*|KOPF\w*|HIRN|CR[AÂ]NE|CR[AÁ]NEO|T[EÊ]TE|CABEZA|CABE[CÇ]A|TESTA|HOOFD|HERSENEN"
    r"|HUVUD|HJÄRNA|HOVED|HJERNE|G[LŁ]OWA|CCT|NCCT|CTH|CTB)\b"
)
_ELSEWHERE = re.compile(
    r"\b(HEAD\W?(AND\W|&\W?)?NECK|NECK|HALS|COU|CUELLO|COLLO|PESCO[CÇ]O|[CTLS]?-?SPINE|CERVICAL\w*|[HBL]WS|RACHIS"
    r"|WIRBELS\w*|COLUMNA|COLUNA|COLONNA|LUMB\w*|LOMB\w*|DORSAL|CHEST|THORA\w*|T[OÓ]RAX|TORACE|LUNGS?|LUNGEN?|PULM\w*"
    r"|HEART|CORONARY|ABDOM\w*|\w*BAUCH|PELVI\w*|PELVE|BECKEN|BASSIN|LIVER|KIDNEYS?|PANCREAS|SINUS\w*|NNH|ORBIT\w*"
    r"|TEMPORAL|IA[CM]S?|PETROUS|FELSENBEIN\w*|ROCHERS?|MASTOIDS?|FACE|FACIAL|VISAGE|\w*GESICHT\w*|MAXILLO\w*|MANDIBLE"
    r"|JAW|KIEFER\w*|DENTA\w*|EXTREMITY|KNEE|HIP|ANKLE|FOOT|TOE|HAND|WRIST|ELBOW|ARM|LEG|SHOULDER|FEM(UR|ORAL)"
    r"|HUMER\w*|RADI(US|AL)|TIBIA\w*|FIBULA\w*|META(TARS|CARP)\w*|\w*THIGHS?|WHOLE ?BODY|GANZKÖRPER|CAROTIDS?|WILLIS"
    r"|ANGIO\w*|CTA|CTV|PERFUSION|CTP)\b"
)

HEAD_CODES = {
    "69536005 SCT", "12738006 SCT", "89546000 SCT", "T-D1100 SRT", "T-A0100 SRT", "T-11100 SRT",
}  # fmt: skip
"""Head, brain and skull in the schemes that Anatomic Region Sequence comes in (PS3.16, CID 4030; SRT until 2019)."""
_ANATOMY_SCHEMES = ("SCT", "SRT")

_WITHOUT_AGENT = re.compile(
    r"\b(W ?/? ?O(UT)?|WITHOUT|NON?|NOT|PRE|OHNE|VOR|SANS|SIN|SEM|SENZA|ZONDER|UTAN|UDEN|BEZ)[ -]*(IV )?"
    r"([CK]ONTRAST\w*|CON|KM|INJ\w*|ENHANC\w*|MDC|PDC|C|IV)\b|\bO ?KM\b|\bS ?/ ?C(ONTRAST\w*)?\b"
    r"|\b(UNENHANCED|NONCON\w*|PRECON\w*|NATIV\w*|PLAIN)\b"
)
_WITH_AGENT = re.compile(
    # "Enhanced" is also what DICOM calls its multi-frame objects, and conversions to them say so.
    # Protocols are named in one word, too: "HeadContrast", and "HeadNonContrast".
    r"\+ ?(C|IV|KM)\b|\b(C|IV) ?\+|(?<!NON|PRE|OUT)(?<!NO|WO)(?<!OHNE|SANS)[CK]ONTRAST|\bIV CON\b"
    r"|\bENH\b|\bENHANCED(?! (CONVERSION|CT IMAGE|MULTI))|\bCE(CT)?\b|\bKM\b|\b[MP]DC\b|\bCT[APV]\b|ANGIO|PERFUSION"
    r"|\bC/C\b|\bW ?/? ?C(ON)?\b|\bW/( |$)|\bWITH *$"
    r"|\bPOST ?-?(CON|IV|INJ|GD|GAD|C\b)|\b(W|WITH|MIT|AVEC|CON|NACH|APR[EÈ]S) (IV\b|INJ)|\bINJ(ECT\w*)?\b"
    # Nobody scans a head late, twice by plan, or "post" nothing, but after an agent.
    r"|\b(DELAY\w*|TARDI\w*|VENOGR\w*|KM\w+)\b|\b[23] ?(ND|RD)? PHASE\b|(?<!\bFOSS[AE] )\b(POST|IV)$"
    r"|\b(ARTERIAL|VENOUS|PORTAL)\b"
)
_WITH_AND_WITHOUT = re.compile(
    r"\bW ?(AND|[/&+,-])? ?W ?/? ?O\b|\bW ?/? ?O ?(AND|[/&+,-])? ?W\b"
    r"|\b(WITH|MIT|AVEC|CON|COM|MET) ?(AND|UND|ET|Y|E|EN|OR|[/&+,-])? ?(WITHOUT|OHNE|SANS|SIN|SEM|SENZA|ZONDER)\b"
    r"|\b(WITHOUT|OHNE|SANS|SIN|SEM|SENZA|ZONDER) ?(AND|UND|ET|Y|E|EN|[/&+,-])? ?(WITH|MIT|AVEC|CON|COM|MET)\b"
)
"""Of a description of both, nobody knows which this series is."""
_NO_AGENT = re.compile(
    r"(NO|NON|NONE|NOT|WITHOUT|OHNE|SANS|SIN|SENZA|N|N/A|NA|NIL|0|-+)"
    r"( (IV|ORAL|[CK]ONTRAST\w*|AGENT|MEDI(A|UM)|KM|CM|INJ\w*|GIVEN|USED|APPLIED))*"
)
"""Not "non ionic", which is an agent."""

_SPOKEN = attrgetter(
    "modality", "sop_class_uid", "series_description", "protocol_name", "anatomic_region", "body_part_examined",
    "study_description", "patient_age", "patient_birth_date", "study_date", "contrast_bolus_agent", "image_type", "kvp",
    "convolution_kernel", "gantry_detector_tilt", "manufacturer", "manufacturer_model_name", "station_name",
)  # fmt: skip
"""All that is read of a header but its place and its patient."""

_OLDEST = Age(120, "years")
"""Nobody of that age is known to live: it stands for an age or a birth date that nobody knew (01.01.1900)."""

_AGES_DIFFER = 13
"""Months by which a stated age and the dates may differ: one is rounded, the other entered a birthday late."""


UNSEEN_ML = 2.0
"""So much of what is enclosed in bone may lie outside the model's field."""

MOST_UNCOVERED = 0.25
"""So much of the way between the first and the last slice may lie in none: every second slice may be missing, evenly,
and no single distance is longer than the others."""

PICTURE = frozenset((
    "kvp", "slice_thickness", "spacing", "kernel", "tilt", "geometry", "coverage", "slabs", "gaps", "duplicates",
    "order",
))  # fmt: skip
"""Criteria of how one series was made. The others are of patient, order, examination or box: where one of those is not
met no other series of the study is any better."""


@dataclass(frozen=True, slots=True)
class Criterion:
    """One line of a label, applied to one study.

    Attributes:
        criterion: its name; an exception of the board refers to it.
        attribute: DICOM keywords that were read, or what was measured.
        value: what was read, as text.
        rule: what the label asks for.
        outcome: unknown counts as refused; excepted is unknown under a signed exception.
        note: who excepted it, until when and why.
        clause: where the label says so.
    """

    criterion: str
    attribute: str
    value: str
    rule: str
    outcome: Outcome
    note: str = ""
    clause: str = ""

    @property
    def met(self) -> bool:
        """Whether it lets the study pass."""
        return self.outcome in ("met", "excepted")

    def row(self) -> dict[str, Any]:
        """What of it is told to machines: criterion, attribute, value, rule, clause, met."""
        return {
            **{name: getattr(self, name) for name in ("criterion", "attribute", "value", "rule", "clause")},
            "met": self.met,
        }

    def __str__(self) -> str:
        said = self.value or "absent"
        return f"{self.criterion}: {self.attribute} is {said}, the label asks for {self.rule}"


@dataclass(frozen=True, slots=True)
class Admission:
    """The gate's decision on one (study, package)."""

    criteria: tuple[Criterion, ...]

    @property
    def admitted(self) -> bool:
        """True only if every criterion is met or excepted, and there is at least one."""
        return bool(self.criteria) and all(c.met for c in self.criteria)

    @property
    def promising(self) -> bool:
        """Whether the model may see what has arrived: all is met that does not need further slices to be met."""
        return bool(self.criteria) and all(c.met or c.criterion in _GROWING for c in self.criteria)

    @property
    def reason(self) -> str:
        """Why it is refused, in one line; '' when admitted."""
        return "; ".join(str(c) for c in self.criteria if not c.met)

    @property
    def said(self) -> str:
        """Why it is refused, for people: "paediatric (age 009Y; label: 18 years or older)"; '' when admitted."""
        return "; ".join(_said(c) for c in self.criteria if not c.met)

    def to_json(self) -> list[dict[str, Any]]:
        """The criteria, JSON-ready."""
        return [asdict(criterion) for criterion in self.criteria]


@dataclass(frozen=True, slots=True)
class BoardException:
    """What the site's board lets pass although its value is unknown.

    Attributes:
        package, criterion: what it is for.
        reason, signed_by: why, and who answers for it.
        until: the last day on which it holds.
    """

    package: str
    criterion: str
    reason: str
    signed_by: str
    until: date


def rules(package: Package) -> dict[str, tuple[str, str]]:
    """What is asked of a study: criterion → (the rule in words, the clause of the label that it comes from)."""
    label = package.indication
    oldest = f", {label.maximum_age} or younger" if label.maximum_age else ""
    texts = {
        "intended_use": USE,
        "scanner": _only(label.scanners, label.excluded_scanners),
        "modality": " or ".join(label.modality),
        "sop_class": "a listed image class",
        "body_part": " or ".join(label.body_parts),
        "age": f"{label.minimum_age} or older{oldest}",
        "contrast": "with or without" if label.contrast else "no contrast agent",
        "kvp": _span(label.kvp, "kV"),
        "slice_thickness": _span(label.slice_thickness_mm, "mm"),
        "spacing": _span(label.slice_spacing_mm, "mm") if label.slice_spacing_mm else "any",
        "kernel": _only(label.kernels, label.excluded_kernels),
        "tilt": f"{label.maximum_tilt_degrees or 0:g}° or less",
        "patient": "one patient",
        "geometry": "readable in every image",
        "coverage": f"{label.minimum_coverage_mm:g} mm or more",
        "slabs": f"{label.minimum_slabs} or more",
        "gaps": "no gap between slices",
        "duplicates": "no slice sent twice",
        "order": "numbers that rise or fall along the head",
        "onset": f"{label.maximum_hours_since_onset or 0:g} hours or less since onset",
        "brain": f"{label.minimum_brain_ml:g} mL or more, none of it outside the model's field",
    }
    clauses: dict[str, str] = dict.fromkeys(("scanner", "patient", "geometry", "gaps"), BOX)
    clauses.update(label.clauses)
    return {name: (texts[name], clauses[name]) for name in CRITERIA if name in clauses}


def _only(wanted: Sequence[str], excluded: Sequence[str]) -> str:
    return ", ".join([" or ".join(wanted) or "any", *(f"not {one}" for one in excluded)])


def _span(span: tuple[float, float], unit: str) -> str:
    return f"{span[0]:g} to {span[1]:g} {unit}"


def _said(criterion: Criterion) -> str:
    name = criterion.criterion.replace("_", " ")
    asked = "rule" if criterion.clause in ("", BOX) else "label"
    young = criterion.criterion == "age" and criterion.outcome == "violated" and "younger" not in criterion.rule
    word = "paediatric" if young else f"{name} {'not known' if criterion.outcome == 'unknown' else 'outside'}"
    return f"{word} ({name} {criterion.value or 'absent'}; {asked}: {criterion.rule})"


# --- what a header says ---------------------------------------------------------------------------------


def body_region(header: Header) -> Literal["head", "elsewhere", ""]:
    """The region that a header speaks of, the most particular word first; '' if none says.

    Body Part Examined is empty on many scanners and wrong on some, so the description of the series comes before it
    ("CTA CAROTIDS" in a study called HEAD), and of one text another region outweighs the head ("HEAD AND NECK").
    Before Body Part Examined comes the code of the region, of which any that is not the head's is another region.
    """
    for text in (header.series_description, header.protocol_name):
        if region := _region_in(text):
            return region
    code, _, scheme = header.anatomic_region.partition(" ")
    if code and scheme in _ANATOMY_SCHEMES:
        return "head" if header.anatomic_region in HEAD_CODES else "elsewhere"
    return _region_in(header.body_part_examined) or _region_in(header.study_description)


@lru_cache(maxsize=4096)
def _region_in(text: str) -> Literal["head", "elsewhere", ""]:
    words = re.sub(r"[_/.,;^]", " ", normalize("NFC", text).upper())
    if _ELSEWHERE.search(words):
        return "elsewhere"
    return "head" if _HEAD.search(words) else ""


def has_contrast(header: Header) -> bool:
    """Whether the header speaks of a contrast agent; "NONE" and the like do not.

    The agent must be named where one was given (PS3.3 table A.3-1, Contrast/Bolus module), but people forget: so the
    description of the series counts too ("HEAD +C", "POST CONTRAST", "CTA"), Image Type, and the name of the protocol
    where it speaks only of images with an agent. The study's description does not: it may be of two series.
    """
    return contrast_said(header)[1]


def contrast_said(header: Header) -> tuple[str, bool]:
    """What the header says of a contrast agent, and whether it says that there was one."""
    agent = header.contrast_bolus_agent.strip()
    if agent and not _NO_AGENT.fullmatch(agent.upper().replace("_", " ")):
        return agent, True
    without, given = _agent_in(header.series_description)
    if given:
        return f"{agent or 'none'}, but described as {header.series_description}", True
    kinds = " ".join(header.image_type)
    if _agent_in(kinds)[1]:
        return f"{agent or 'none'}, but ImageType is {kinds}", True
    protocol_without, given = _agent_in(header.protocol_name)
    if given and not (without or protocol_without):
        return f"{agent or 'none'}, but the protocol is {header.protocol_name}", True
    return agent or "none", False


def first_with_agent(study: Iterable[Header]) -> Header | None:
    """The earliest image of a study that names a contrast agent and says when it was acquired.

    What is acquired after it has the agent in it, whether it says so or not: a head that is scanned again after an
    angiography. Scouts are not asked, as some devices enter there what is only planned, nor are images that are made
    of others.
    """
    found: Header | None = None
    asked: dict[str, bool] = {}
    for one in study:
        if one.acquired and (found is None or one.acquired < found.acquired):
            if one.series_instance_uid not in asked:
                original = one.image_type[:1] == ("ORIGINAL",) and "LOCALIZER" not in one.image_type
                asked[one.series_instance_uid] = original and has_contrast(one)
            if asked[one.series_instance_uid]:
                found = one
    return found


def acquired_after(headers: Iterable[Header], first: Header | None) -> bool:
    """Whether all of these were acquired after another image; False where their times do not say: a plain head must not
    be taken back for an angiography that came later, in the hour that clocks show twice."""
    began = min((one.acquired for one in headers), default="")
    if first is None or began <= first.acquired:
        return False
    return not (shown_twice(began) or shown_twice(first.acquired))


def shown_twice(acquired: str) -> bool:
    """Whether the clocks of the box's zone show this time, YYYYMMDDHHMMSS, twice, as in a night of autumn."""
    try:
        local = datetime.strptime(acquired, "%Y%m%d%H%M%S")
    except ValueError:
        return False
    return local.replace(fold=0).astimezone().utcoffset() != local.replace(fold=1).astimezone().utcoffset()


@lru_cache(maxsize=4096)
def _agent_in(text: str) -> tuple[bool, bool]:
    """Whether a description speaks of images without an agent, and of images with one."""
    words = " ".join(re.sub(r"[_.,;^()]+", " ", normalize("NFC", text).upper()).split())
    without = bool(_WITHOUT_AGENT.search(words) or re.search(r"\bW ?/? ?O\b", words))
    both = _WITH_AND_WITHOUT.search(words)
    return without, bool(both or _WITH_AGENT.search(_WITHOUT_AGENT.sub(" ", words)))


def age_said(label: Indication, header: Header, births: Sequence[tuple[str, str]] = ()) -> tuple[str, bool | None]:
    """What the header says of the patient's age at the study, and whether the label lets that in.

    It may say so twice: as PatientAge, and by PatientBirthDate and StudyDate. Who is outside the label by either is
    outside it. Who is inside by both, which differ by more than 13 months, is of unknown age: one is somebody else's.
    So it is where one of them is there and cannot be read, or gives an age that nobody reaches. An order may say it,
    too: then all of this holds of its birth date as well, and where the images have one, that must be the same.

    Args:
        births: birth dates of orders (YYYYMMDD), each with where it stands.
    """
    youngest, oldest = Age.of(label.minimum_age), Age.of(label.maximum_age) if label.maximum_age else None
    told: list[str] = []
    answers: list[bool | None] = []
    stated, disagree = None, False
    if text := header.patient_age.strip():
        try:
            stated = Age.of(text)
        except ValueError:
            told.append(f"{text} (no age)")
            answers.append(None)
        else:
            told.append(text)
            too_old = stated.has_reached(oldest.next) if oldest else False
            answers.append(_all((stated.has_reached(youngest), None if too_old is None else not too_old)))
            answers.append(None if stated.has_reached(_OLDEST) else True)
    if text := header.patient_birth_date.strip():
        born, studied = _day(text), _day(header.study_date)
        if born is None or studied is None or studied < born:
            told.append("born after the study" if born and studied else "a birth date that cannot be used")
            answers.append(None)
        else:
            told.append(f"{_completed(born, studied)} by the dates")
            answers.append(_on(youngest, born) <= studied and not (oldest and _on(oldest.next, born) <= studied))
            answers.append(None if _on(_OLDEST, born) <= studied else True)
            disagree = stated is not None and _differ(stated, (studied - born).days)
    for ordered, source in births:
        born, studied = _day(ordered), _day(header.study_date)
        if born is None or studied is None or studied < born:
            told.append(f"a birth date that cannot be used in {source}")
            answers.append(None)
            continue
        told.append(f"{_completed(born, studied)} by {source}")
        answers.append(_on(youngest, born) <= studied and not (oldest and _on(oldest.next, born) <= studied))
        answers.append(None if _on(_OLDEST, born) <= studied else True)
        images = header.patient_birth_date.strip()
        disagree |= bool(images) and _day(images) != born
        disagree |= stated is not None and _differ(stated, (studied - born).days)
    if disagree and False not in answers:
        return " but ".join(told), None
    return ", ".join(told), _all(answers)


def _day(text: str) -> date | None:
    try:
        return date.fromisoformat(text.strip()) if re.fullmatch(r"\d{8}", text.strip()) else None
    except ValueError:
        return None


def _on(age: Age, born: date) -> date:
    try:
        return age.reached_on(born)
    except (OverflowError, ValueError):
        return date.max


def _completed(born: date, studied: date) -> Age:
    """The age in whole years, of infants in months, of the newborn in days."""
    days = (studied - born).days
    for unit, length, least in (("years", 365.2425, 2), ("months", 30.436875, 2)):
        count = int(days / length) + 1
        while count and _on(Age(count, unit), born) > studied:
            count -= 1
        if count >= least:
            return Age(count, unit)
    return Age(days, "days")


def _differ(stated: Age, days: int) -> bool:
    slack = _AGES_DIFFER * 31
    return not stated.days()[0] - slack <= days <= stated.next.days()[1] + slack


# --- the gate -------------------------------------------------------------------------------------------


def admit(
    package: Package,
    headers: Sequence[Header],
    volume: Volume,
    slabs: int,
    exceptions: Sequence[BoardException] = (),
    today: date | None = None,
    ordered: Ordered = NOTHING_ORDERED,
    study: Sequence[Header] = (),
) -> Admission:
    """Apply a package's indication to the selected series of a study.

    A criterion is met only if every image meets it: one slice of a child, or of another patient, refuses them all.

    Args:
        headers: of every image of the series.
        study: of every instance of the study; whose images they are is asked of all that come from the scanner.
        volume: its geometry.
        slabs: how many slabs of the model's thickness it yields.
        exceptions: of the board; each lets one unknown criterion of one package pass until its day.
        today: the day on which exceptions must hold; today if omitted.
        ordered: what the hospital's orders say of the study.
    """
    label = package.indication
    asked = rules(package)
    # The slices of a series differ in little else than their place.
    distinct = list({_SPOKEN(header): header for header in headers}.values())
    criteria: list[Criterion] = []

    def judge(criterion: str, attribute: str, value: str, met: bool | None) -> None:
        if criterion in asked:
            criteria.append(_criterion(asked, criterion, attribute, value, met))

    def every(criterion: str, attribute: str, read: Callable[[Header], tuple[str, bool | None]]) -> None:
        if criterion not in asked:
            return
        answers = dict.fromkeys(map(read, distinct))
        met = _all(met for _, met in answers)
        shown = [text for text, one in answers if one is met] or [text for text, _ in answers]
        judge(criterion, attribute, " / ".join(shown[:3]), met)

    judge("intended_use", "package", package.intended_use, package.intended_use == USE)
    criteria.append(scanner(package, distinct))
    every("modality", "Modality", lambda h: (h.modality, h.modality in label.modality if h.modality else None))
    every("sop_class", "SOPClassUID", lambda h: (h.sop_class_uid, h.sop_class_uid in label.sop_classes))
    every("body_part", "SeriesDescription, ProtocolName, AnatomicRegionSequence, BodyPartExamined, StudyDescription",
          _body_part)  # fmt: skip
    births = ordered.births
    every("age", ", ".join(["PatientAge, PatientBirthDate, StudyDate", *(source for _, source in births)]),
          lambda h: age_said(label, h, births))  # fmt: skip
    agent = None if label.contrast else first_with_agent(study)
    late = agent if acquired_after(headers, agent) else None
    every("contrast", "ContrastBolusAgent, ContrastBolusAgentSequence, SeriesDescription, ImageType, ProtocolName",
          lambda h: _contrast(label, h, late))  # fmt: skip
    every("kvp", "KVP", lambda h: ("", None) if h.kvp is None else (f"{h.kvp:g} kV", _in(h.kvp, label.kvp)))
    judge("slice_thickness", "SliceThickness", *_thickness(label, headers))
    distances = [after - before for before, after in pairwise(volume.offsets)]
    met = _within(distances, label.slice_spacing_mm) if label.slice_spacing_mm else None
    judge("spacing", "distance of neighbouring ImagePositionPatient", _range(distances, "mm"), met)
    every("kernel", "ConvolutionKernel", lambda h: _kernel(label, h))
    leans = [
        volume.tilt_degrees,
        *(abs(h.gantry_detector_tilt) for h in distinct if h.gantry_detector_tilt is not None),
    ]
    judge("tilt", "ImageOrientationPatient, GantryDetectorTilt", f"{max(leans):.1f}°",
          max(leans) <= (label.maximum_tilt_degrees or 0))  # fmt: skip
    patients = len({header.patient for header in headers})
    said = "the same in every image" if patients == 1 else f"{patients} different"
    # A scout of whoever lay there before: nobody knows under whose name the head is. Other objects are not asked: they
    # may come back from an archive that has merged two records, our own among them. One without an ID is not another's.
    ids = {one.patient_id for one in (*headers, *study) if one.modality == "CT" and one.patient_id}
    if len(ids) > 1:
        said += f", but {len(ids)} Patient IDs in the study"
    said += "".join(f", but another one in {one.patient_source}, which has this study's number"
                    for one in ordered.others)  # fmt: skip
    judge("patient", ", ".join(["PatientID, IssuerOfPatientID, PatientName, PatientBirthDate",
                                *(one.patient_source for one in ordered.others)]),
          said, patients == 1 and len(ids) <= 1 and not ordered.others)  # fmt: skip
    placed = sum(bool(header.frames) for header in headers)
    judge("geometry", "ImagePositionPatient, ImageOrientationPatient, PixelSpacing",
          f"readable in {placed} of {len(headers)} images", True if placed == len(headers) else None)  # fmt: skip
    coverage = volume.offsets[-1] - volume.offsets[0] + (volume.planes[-1].geometry.thickness or 0.0)
    judge("coverage", "ImagePositionPatient", f"{coverage:.0f} mm", coverage >= label.minimum_coverage_mm)
    judge("slabs", "slabs", str(slabs), slabs >= label.minimum_slabs)
    missing = sum(gap.mm for gap in volume.gaps)
    holes = "none" if not volume.gaps else f"{len(volume.gaps)}, {missing:.1f} mm in all"
    bare = uncovered(volume)
    thin = bare > MOST_UNCOVERED + 1e-3  # positions are rounded
    if thin:
        holes = f"{bare:.0%} of the head lies between the slices"
    judge("gaps", "ImagePositionPatient, SliceThickness", holes, not volume.gaps and not thin)
    twice = len(volume.duplicates)
    judge("duplicates", "ImagePositionPatient", f"{twice} slices sent twice" if twice else "none", not twice)
    judge("order", "InstanceNumber, ImagePositionPatient", *_order(volume))
    if label.maximum_hours_since_onset is not None:
        judge("onset", "time since onset in the order", *onset_said(ordered, label.maximum_hours_since_onset))
    return Admission(tuple(_except(package, c, exceptions, today or date.today()) for c in criteria))


def admit_pixels(package: Package, admission: Admission, seen_ml: float, unseen_ml: float) -> Admission:
    """The same admission with what only the pixels show: that there is a brain in the picture, and the model sees it.

    Args:
        seen_ml: soft tissue within the skull, in the field that the model sees.
        unseen_ml: of the same, beyond that field: a head far from the centre of a large image. Up to `UNSEEN_ML`
            nobody minds, as what is enclosed in bone at the border of a large image may be no brain.
    """
    value, met = f"{seen_ml:.0f} mL", seen_ml >= package.indication.minimum_brain_ml
    if unseen_ml > UNSEEN_ML:
        value, met = f"{value}, and {unseen_ml:.0f} mL outside the model's field", False
    return _with_brain(package, admission, value, met)


def pixels_unknown(package: Package, admission: Admission, why: str) -> Admission:
    """The same admission where nobody looked at the pixels."""
    return _with_brain(package, admission, why, None)


def _with_brain(package: Package, admission: Admission, value: str, met: bool | None) -> Admission:
    brain = _criterion(rules(package), "brain", "soft tissue inside the skull", value, met)
    return Admission((*admission.criteria, brain))


def still_excepted(
    package: Package, admission: Admission, exceptions: Sequence[BoardException], today: date | None = None
) -> Admission:
    """The same admission under the exceptions that hold now: one that is over or was revoked lets nothing pass."""
    day = today or date.today()
    unknown = (replace(c, outcome="unknown", note="") if c.outcome == "excepted" else c for c in admission.criteria)
    return Admission(tuple(_except(package, c, exceptions, day) for c in unknown))


def scanner(package: Package, headers: Sequence[Header]) -> Criterion:
    """The scanner's criterion, which is part of every admission, whether the label limits it or not."""
    label = package.indication
    answers: dict[tuple[str, str, str], bool | None] = {}
    for one in headers:
        who = (one.manufacturer, one.manufacturer_model_name, one.station_name)
        if who not in answers:
            wanted = scanner_matches(label.scanners, *who[:2]) if label.scanners else True
            excluded = scanner_matches(label.excluded_scanners, *who[:2])
            answers[who] = _all((wanted, None if excluded is None else not excluded))
    met = _all(answers.values())
    shown = [who for who, one in answers.items() if one is met] or list(answers)
    value = " / ".join(" · ".join(part.strip() or "–" for part in who) for who in shown[:3])
    attribute = "Manufacturer, ManufacturerModelName, StationName"
    return _criterion(rules(package), "scanner", attribute, value, met)


def _criterion(
    asked: dict[str, tuple[str, str]], criterion: str, attribute: str, value: str, met: bool | None
) -> Criterion:
    outcome: Outcome = "unknown" if met is None else "met" if met else "violated"
    rule, clause = asked[criterion]
    return Criterion(criterion, attribute, value, rule, outcome, clause=clause)


def _all(answers: Iterable[bool | None]) -> bool | None:
    """False if one is, else unknown if one is or there is none."""
    found = set(answers)
    return False if False in found else None if None in found or not found else True


def _in(value: float, span: tuple[float, float]) -> bool:
    return span[0] <= value <= span[1]


def _within(values: Sequence[float], span: tuple[float, float]) -> bool | None:
    """Whether all distances lie in a range, but for the rounding of positions; None if there are none."""
    low, high = span
    return low - UNIFORM_MM <= min(values) <= max(values) <= high + UNIFORM_MM if values else None


def _range(values: Sequence[float], unit: str) -> str:
    if not values:
        return ""
    low, high = f"{min(values):.4g}", f"{max(values):.4g}"
    return f"{low} {unit}" if low == high else f"{low} to {high} {unit}"


def _body_part(header: Header) -> tuple[str, bool | None]:
    texts = (
        header.series_description, header.protocol_name, header.anatomic_region, header.body_part_examined,
        header.study_description,
    )  # fmt: skip
    region = body_region(header)
    return " · ".join(filter(None, texts)), region == "head" if region else None


def _contrast(label: Indication, header: Header, late: Header | None) -> tuple[str, bool | None]:
    said, given = contrast_said(header)
    if late is not None and not given:
        return f"{said}, but acquired after series {late.series_number}, which names an agent", None
    return said, label.contrast or not given


def _thickness(label: Indication, headers: Sequence[Header]) -> tuple[str, bool | None]:
    stated = {plane.thickness for header in headers for plane in header.frames}
    known = sorted(one for one in stated if one is not None)
    if any(not _in(one, label.slice_thickness_mm) for one in known):
        return _range(known, "mm"), False
    if len(known) < len(stated) or not all(header.frames for header in headers):
        return "", None
    return _range(known, "mm"), True


def _kernel(label: Indication, header: Header) -> tuple[str, bool | None]:
    kernel = header.convolution_kernel.strip()
    if not kernel:
        return "", None
    wanted = kernel_matches(label.kernels, kernel) if label.kernels else True
    return kernel, wanted and not kernel_matches(label.excluded_kernels, kernel)


def _order(volume: Volume) -> tuple[str, bool | None]:
    """How the instance numbers (and the frames of one instance) go along the volume."""
    numbers = [(plane.instance_number, plane.frame) for plane in volume.planes]
    known = [(number, frame) for number, frame in numbers if number is not None]
    if len(known) < len(numbers):
        return "", None
    if all(a < b for a, b in pairwise(known)):
        return "they rise", True
    if all(a > b for a, b in pairwise(known)):
        return "they fall", True
    return "they jump", False


def _except(package: Package, criterion: Criterion, exceptions: Sequence[BoardException], today: date) -> Criterion:
    if criterion.outcome != "unknown":
        return criterion
    for one in exceptions:
        if (one.package, one.criterion) == (package.name, criterion.criterion) and today <= one.until:
            note = f"excepted by {one.signed_by} until {one.until}: {one.reason}"
            return replace(criterion, outcome="excepted", note=note)
    return criterion
