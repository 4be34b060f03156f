"""What an HL7 v2 message says of orders, patients and reports, and what is wrong with it (v2.5.1 chapters 2, 3, 4, 7).

Whatever a peer sends ends as a `Message` that can be answered and written down: what cannot be used is a fault with its
place in the message, never an exception.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Literal

import hl7
import hl7.util

from appliance.ledger.orders import Change, Identifier, Merge, NewOrder, NewReport, Patient, Update

# It logs the fields that it cannot unescape, and those name patients.
hl7.util.logger.setLevel(logging.CRITICAL)

LONGEST_NUMBER = 64
"""Characters of an accession number, identifier or UID; DICOM has 16, 64 and 64."""
LONGEST_TEXT = 2000
"""Characters of a reason; what is longer is cut."""
MAXIMUM_GROUPS = 200
"""Orders or reports in one message."""

ORDERS = ("ORM^O01", "OMI^O23")
KINDS = (*ORDERS, "ADT^A08", "ADT^A40", "ORU^R01")
"""What is taken: message code and trigger event (MSH-9.1, MSH-9.2)."""

CODES = {
    "100": "Segment sequence error",
    "101": "Required field missing",
    "102": "Data type error",
    "103": "Table value not found",
    "200": "Unsupported message type",
    "201": "Unsupported event code",
    "202": "Unsupported processing id",
    "203": "Unsupported version id",
    "204": "Unknown key identifier",
    "205": "Duplicate key identifier",
    "206": "Application record locked",
    "207": "Application internal error",
}
"""HL7 table 0357."""
REJECTED = ("200", "201", "202", "203")
"""Codes of what is not acceptable in MSH-9, MSH-11 or MSH-12: AR, or CR (2.9.2, 2.9.3); others are AE, or CE."""

CANCELS = ("CA", "DC", "OC", "OD", "CR", "DR")
"""Order control codes (ORC-1, table 0119) after which there is no order."""
CONTROLS = (
    *CANCELS, "NW", "XO", "XX", "XR", "SC", "SN", "NA", "NR", "OK", "PA", "CH", "RE", "RO", "RP", "RR", "RU", "RF",
    "SR", "SS", "ST", "HD", "HR", "OH", "RL", "OR", "LI", "UN", "DE", "AF", "DF", "FU", "OE", "OF", "OP", "PY", "UX",
)  # fmt: skip
"""Order control codes of table 0119; another is an error."""

_CHARACTER_SETS = {
    "": "", "ASCII": "ascii", "UNICODE UTF-8": "utf-8", "UNICODE": "utf-8", "UTF-8": "utf-8",
    **{f"8859/{part}": f"iso8859-{part}" for part in (1, 2, 3, 4, 5, 6, 7, 8, 9, 15)},
}  # fmt: skip
"""MSH-18 (table 0211, and a name that is often sent) → Python's codec."""
_UNITS = {"h": 1.0, "hr": 1.0, "hrs": 1.0, "hour": 1.0, "hours": 1.0, "min": 1 / 60, "d": 24.0}
_OWN_SCHEME = "99SCANSIDE"


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong: its place (segment, its number, field), a code of table 0357, and in words."""

    segment: str
    number: int
    field: int
    code: str
    text: str


@dataclass(frozen=True, slots=True)
class Rules:
    """What a site decides of reading: see `appliance.settings.Hl7Intake`."""

    processing_ids: tuple[str, ...] = ("P",)
    urgent_priorities: tuple[str, ...] = ("S", "STAT")
    onset_codes: tuple[str, ...] = ("11368-8",)
    authority: str = ""


@dataclass(frozen=True, slots=True)
class Message:
    """A message, read.

    Attributes:
        header: MSH-1 to MSH-20, so that ``header[10]`` is MSH-10; "" where nothing is.
        kind: such as ORM^O01.
        digest: SHA-256 of what follows MSH.
        faults: why it cannot be used; nothing of it is used if there is one.
        changes: what it changes.
        is_answer: it is an acknowledgement, which nobody acknowledges.
        ours: it is one of this box's own messages, which came back.
    """

    header: Sequence[str]
    kind: str
    digest: str
    faults: tuple[Fault, ...] = ()
    changes: tuple[Change, ...] = ()
    is_answer: bool = False
    ours: bool = False

    @property
    def sender(self) -> str:
        """MSH-3 and MSH-4."""
        return f"{self.header[3]}|{self.header[4]}"

    @property
    def code(self) -> Literal["AA", "AE", "AR"]:
        """As it is to be answered in original mode."""
        if not self.faults:
            return "AA"
        return "AR" if any(one.code in REJECTED for one in self.faults) else "AE"

    @property
    def reason(self) -> str:
        """All faults in one line."""
        return "; ".join(
            f"{one.segment}-{one.field}: {one.text}" if one.field else f"{one.segment}: {one.text}".lstrip(": ")
            for one in self.faults
        )


def read_message(block: bytes, rules: Rules) -> Message:
    """Read the content of one MLLP block."""
    header = _header(block)
    separator = header[1].encode("latin-1", "replace") or b"|"
    first, _, rest = block.replace(b"\r\n", b"\r").replace(b"\n", b"\r").lstrip(b"\r").partition(b"\r")
    digest = hashlib.sha256(rest.strip(b"\r") if first.startswith(b"MSH" + separator) else block).hexdigest()
    kind = "^".join(header[9].split(header[2][:1] or "^")[:2])
    faults = list(_envelope(header, kind, rules))
    if kind.split("^")[0] == "ACK":
        return Message(header, kind, digest, is_answer=True)
    changes: tuple[Change, ...] = ()
    ours = False
    if not faults:
        reader = _Reader(header, rules)
        try:
            reader.read(block, kind)
        except Exception as error:
            # The library met something that nobody foresaw: the sender hears of it, and the message is kept.
            reader.fault("MSH", 1, 0, "100", f"it cannot be read: {type(error).__name__}: {error}"[:200])
        faults, changes, ours = reader.faults, tuple(reader.changes), reader.ours
    return Message(header, kind, digest, tuple(faults), () if faults else changes, ours=ours)


def _header(block: bytes) -> tuple[str, ...]:
    """MSH's fields by their numbers, as far as there are any, read so that whatever comes can be answered."""
    line = re.split(rb"[\r\n]", block.lstrip(b"\r\n \xef\xbb\xbf"), maxsplit=1)[0].decode("utf-8", "replace")
    if not line.startswith("MSH") or len(line) < 5:
        return ("",) * 21
    fields = line.split(line[3])
    said = [fields[0], line[3], *fields[1:]]
    return tuple((one.strip() if number > 1 else one) for number, one in enumerate([*said, *[""] * 21][:21]))


def _envelope(header: Sequence[str], kind: str, rules: Rules) -> Iterable[Fault]:
    """What is wrong with MSH."""
    if not header[1]:
        said = header[0] or "nothing"
        yield Fault("MSH", 1, 0, "100", f"a message begins with MSH; this one with {said[:10]!r}")
        return
    if not re.fullmatch(r"[!-/:-@\[-`{-~]", header[1]) or len(set(header[1] + header[2][:4])) != 5:
        yield Fault("MSH", 1, 2, "102", "the separators are not five different characters")
        return
    if not header[10]:
        yield Fault("MSH", 1, 10, "101", "the control id is missing")
    elif len(header[10]) > 199:  # 20 in v2.5.1, 199 since v2.7
        yield Fault("MSH", 1, 10, "102", "the control id has more than 199 characters")
    code, _, event = kind.partition("^")
    known = {one.partition("^")[0] for one in KINDS}
    if code not in known:
        yield Fault("MSH", 1, 9, "200", f"{kind or 'no message type'} is not taken; {', '.join(KINDS)} are")
    elif kind not in KINDS:
        yield Fault("MSH", 1, 9, "201", f"{code} with {event or 'no event'} is not taken; {', '.join(KINDS)} are")
    if (said := header[11].split(header[2][:1])[0]) not in rules.processing_ids:
        yield Fault("MSH", 1, 11, "202", f"{said or 'none'} is not taken here; {', '.join(rules.processing_ids)} is")
    if not re.fullmatch(r"2(\.\d+){1,2}", header[12].split(header[2][:1])[0]):
        yield Fault("MSH", 1, 12, "203", f"{header[12] or 'no version'} is no version 2")
    if header[18].split(header[2][1:2] or "~")[0].upper() not in _CHARACTER_SETS:
        yield Fault("MSH", 1, 18, "103", f"the character set {header[18]} is not read")


@dataclass
class _Reader:
    header: Sequence[str]
    rules: Rules
    faults: list[Fault] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    ours: bool = False
    _met: dict[str, int] = field(default_factory=dict)
    _numbers: dict[int, int] = field(default_factory=dict)

    def fault(self, segment: str, number: int, place: int, code: str, text: str) -> None:
        self.faults.append(Fault(segment, number, place, code, text))

    def read(self, block: bytes, kind: str) -> None:
        text = self._text(block)
        if text is None:
            return
        segments = list(hl7.parse(text))
        for segment in segments:
            name = str(segment[0])
            self._met[name] = self._met.get(name, 0) + 1
            self._numbers[id(segment)] = self._met[name]
        if kind == "ADT^A40":
            self._merges(segments)
            return
        pid = next((one for one in segments if str(one[0]) == "PID"), None)
        if pid is None:
            self.fault("PID", 1, 0, "100", "there is no PID segment")
            return
        patient = self._patient(pid, 3)
        if not patient:
            self.fault("PID", 1, 3, "101", "the patient has no identifier")
            return
        birth_date = self._birth_date(pid)
        if kind == "ADT^A08":
            self.changes.append(Update(patient, birth_date))
            return
        self._groups(segments, patient, birth_date, reports=kind == "ORU^R01")

    def _text(self, block: bytes) -> str | None:
        said = self.header[18].split(self.header[2][1:2] or "~")[0].upper()
        codec = _CHARACTER_SETS[said]
        try:
            # Not said: ASCII by the standard, in fact UTF-8 or what the peer's system writes.
            text = block.decode(codec or "utf-8")
        except UnicodeDecodeError:
            if codec:
                self.fault("MSH", 1, 18, "102", f"it is not written in {said}")
                return None
            text = block.decode("latin-1")
        return re.sub(r"\r\n|\n", "\r", text).strip("\ufeff\r ") + "\r"

    # --- fields -----------------------------------------------------------------------------------------

    def _get(self, segment: hl7.Segment, place: int, component: int = 1, part: int = 1, repetition: int = 1) -> str:
        """A leaf, unescaped, on one line; "" where there is none, or it is said to be empty."""
        said = " ".join(self._lines(segment, place, component, part, repetition).split())
        return "" if said == '""' else said

    def _lines(self, segment: hl7.Segment, place: int, component: int, part: int, repetition: int) -> str:
        try:
            said = str(segment.extract_field(0, place, repetition, component, part))
        except (IndexError, KeyError):
            return ""
        return re.sub(r"\r\n|\r", "\n", said)

    def _repetitions(self, segment: hl7.Segment, place: int) -> int:
        return len(segment(place)) if place < len(segment) else 0

    def _number(self, segment: hl7.Segment, place: int, said: str) -> str:
        """A number of an order; too long a one is a fault."""
        if len(said) > LONGEST_NUMBER or not said.isprintable():
            where = self._numbers[id(segment)]
            self.fault(str(segment[0]), where, place, "102", f"it has more than {LONGEST_NUMBER} characters")
            return ""
        return said

    def _patient(self, segment: hl7.Segment, place: int) -> Patient:
        found = []
        for number in range(1, min(self._repetitions(segment, place), 20) + 1):
            value = self._number(segment, place, self._get(segment, place, repetition=number))
            namespace = self._get(segment, place, 4, repetition=number)
            universal = self._get(segment, place, 4, 2, repetition=number)
            if value:
                found.append(Identifier(value, namespace or ("" if universal else self.rules.authority), universal))
        return tuple(dict.fromkeys(found))

    def _birth_date(self, pid: hl7.Segment) -> str:
        """PID-7 as a day; "" for less than a day, which tells too little."""
        said = self._get(pid, 7)
        if not said:
            return ""
        try:
            day = datetime.strptime(said[:8], "%Y%m%d") if len(said) >= 8 else None
        except ValueError:
            day = None
        if day is None and not re.fullmatch(r"\d{4}(0[1-9]|1[0-2])?", said):
            self.fault("PID", self._numbers[id(pid)], 7, "102", "it is no date")
        return day.strftime("%Y%m%d") if day and re.fullmatch(r"\d{8}.*", said) else ""

    # --- messages ---------------------------------------------------------------------------------------

    def _merges(self, segments: Sequence[hl7.Segment]) -> None:
        patient: Patient = ()
        for segment in segments:
            name = str(segment[0])
            if name == "PID":
                patient = self._patient(segment, 3)
                if not patient:
                    self.fault("PID", self._numbers[id(segment)], 3, "101", "the patient has no identifier")
            elif name == "MRG":
                number = self._numbers[id(segment)]
                prior = self._patient(segment, 1)
                if not prior:
                    self.fault("MRG", number, 1, "101", "the prior identifier is missing")
                for one in prior:
                    survivor = next((new for new in patient if one.same_authority(new) is not False), None)
                    if survivor is None:
                        self.fault("MRG", number, 1, "204", "no PID-3 before it is of the same authority")
                    elif survivor != one:
                        self.changes.append(Merge(one, survivor))
        if not self._met.get("MRG"):
            self.fault("MRG", 1, 0, "100", "there is no MRG segment")

    def _groups(self, segments: Sequence[hl7.Segment], patient: Patient, birth_date: str, *, reports: bool) -> None:
        """Each ORC with what belongs to it; of reports each OBR."""
        begins = "OBR" if reports else "ORC"
        starts = [place for place, one in enumerate(segments) if str(one[0]) == begins]
        if not starts:
            self.fault(begins, 1, 0, "100", f"there is no {begins} segment")
            return
        if len(starts) > MAXIMUM_GROUPS:
            self.fault(begins, 1, 0, "207", f"there are more than {MAXIMUM_GROUPS} of them")
            return
        for start, end in zip(starts, [*starts[1:], len(segments)], strict=True):
            group = segments[start:end]
            if reports:
                before = segments[start - 1] if start and str(segments[start - 1][0]) == "ORC" else None
                self._report(group, patient, before)
            else:
                self._order(group, patient, birth_date)

    def _order(self, group: Sequence[hl7.Segment], patient: Patient, birth_date: str) -> None:
        orc, obr, tq1, ipc, zds = (_first(group, name) for name in ("ORC", "OBR", "TQ1", "IPC", "ZDS"))
        assert orc is not None, "a group begins with it"
        number = self._numbers[id(orc)]
        control = self._get(orc, 1).upper()
        if control not in CONTROLS:
            code = "103" if control else "101"
            self.fault("ORC", number, 1, code, f"{control[:10] or 'nothing'} is no order control code")
            return
        accession = self._accession(orc, obr, ipc)
        if not accession:
            where = self._numbers[id(obr)] if obr is not None else 1
            self.fault("OBR", where, 18, "101", "there is no accession number: in IPC-1, OBR-18, OBR-3, ORC-3")
            return
        uid = self._number(ipc, 3, self._get(ipc, 3)) if ipc is not None else ""
        if not uid and zds is not None:
            uid = self._number(zds, 1, self._get(zds, 1))
        priority = next(
            (
                said
                for segment, place, component in ((tq1, 9, 1), (orc, 7, 6), (obr, 27, 6), (obr, 5, 1))
                if segment is not None and (said := self._get(segment, place, component))
            ),
            "",
        )
        onset, earliest, latest = self._onset(group)
        self.changes.append(
            NewOrder(
                accession=accession,
                study_instance_uid=uid,
                placer=self._number(orc, 2, self._get(orc, 2)),
                cancelled=control in CANCELS,
                patient=patient,
                birth_date=birth_date,
                priority=priority[:LONGEST_NUMBER],
                urgent=priority.upper() in {one.upper() for one in self.rules.urgent_priorities},
                reason=self._reason(group)[:LONGEST_TEXT],
                onset=onset[:LONGEST_TEXT],
                onset_earliest=earliest,
                onset_latest=latest,
            )
        )

    def _accession(self, orc: hl7.Segment | None, obr: hl7.Segment | None, ipc: hl7.Segment | None) -> str:
        """The first that is said of IPC-1 (OMI), OBR-18 (IHE), OBR-3 and ORC-3, the filler's order number."""
        for segment, place in ((ipc, 1), (obr, 18), (obr, 3), (orc, 3)):
            if segment is not None and (said := self._get(segment, place)):
                return self._number(segment, place, said)
        return ""

    def _reason(self, group: Sequence[hl7.Segment]) -> str:
        """Reason for study, relevant clinical information and diagnoses, each once."""
        found = []
        places = (("OBR", 31, (2, 1)), ("ORC", 16, (2, 1)), ("OBR", 13, (1,)), ("DG1", 4, (1,)), ("DG1", 3, (2, 1)))
        for name, place, components in places:
            for segment in (one for one in group if str(one[0]) == name):
                for number in range(1, min(self._repetitions(segment, place), 20) + 1):
                    said = (self._get(segment, place, one, repetition=number) for one in components)
                    found.append(next((one for one in said if one), ""))
        return "; ".join(dict.fromkeys(one for one in found if one))

    def _onset(self, group: Sequence[hl7.Segment]) -> tuple[str, str, str]:
        """When it began: what an observation with one of the site's codes says; the earliest and latest that may be.

        A time without a zone is of MSH-7's. Hours are counted back from OBX-14, else from MSH-7.
        """
        zone = _zone(self.header[7])
        for obx in (one for one in group if str(one[0]) == "OBX"):
            if self._get(obx, 3) not in self.rules.onset_codes:
                continue
            said, unit = self._get(obx, 5), self._get(obx, 6)
            span = _span(said, zone)
            if self._get(obx, 2) in ("NM", "SN"):
                said = self._get(obx, 5, 2) if self._get(obx, 2) == "SN" else said
                told = _span(self._get(obx, 14) or self.header[7].split(self.header[2][:1])[0], zone)
                factor = _UNITS.get(unit.casefold())
                span = None
                if told and factor and re.fullmatch(r"\d{1,5}(\.\d+)?", said):
                    ago = timedelta(hours=float(said) * factor)
                    span = told[0] - ago, told[1] - ago
            shown = f"{said} {unit}".strip()
            return (shown, span[0].isoformat(), span[1].isoformat()) if span else (shown, "", "")
        return "", "", ""

    def _report(self, group: Sequence[hl7.Segment], patient: Patient, orc: hl7.Segment | None) -> None:
        obr = group[0]
        observations = [one for one in group if str(one[0]) == "OBX"]
        if any(self._get(one, 3, 3) == _OWN_SCHEME for one in observations):
            self.ours = True
            return
        accession = self._accession(orc, obr, None)
        if not accession:
            where = self._numbers[id(obr)]
            self.fault("OBR", where, 18, "101", "there is no accession number: in OBR-18, OBR-3, ORC-3")
            return
        uid = next((self._get(one, 5) for one in observations if self._get(one, 3) == "113014"), "")
        texts = []
        for one in observations:
            if self._get(one, 2) in ("TX", "FT", "ST"):
                found = range(1, min(self._repetitions(one, 5), 1000) + 1)
                texts.append("\n".join(self._lines(one, 5, 1, 1, number) for number in found))
        self.changes.append(
            NewReport(
                accession=accession,
                study_instance_uid=uid if len(uid) <= LONGEST_NUMBER else "",
                patient=patient,
                status=self._get(obr, 25)[:LONGEST_NUMBER],
                reported_at=self._get(obr, 22)[:LONGEST_NUMBER],
                text="\n".join(texts).strip(),
            )
        )


def _first(group: Sequence[hl7.Segment], name: str) -> hl7.Segment | None:
    return next((one for one in group if str(one[0]) == name), None)


_TIME = re.compile(
    r"(?P<Y>\d{4})((?P<m>\d\d)((?P<d>\d\d)((?P<H>\d\d)((?P<M>\d\d)((?P<S>\d\d)(\.\d+)?)?)?)?)?)?(?P<zone>[+-]\d{4})?"
)
_LENGTHS: tuple[tuple[str, Callable[[datetime], datetime]], ...] = (
    ("S", lambda at: at + timedelta(seconds=1)),
    ("M", lambda at: at + timedelta(minutes=1)),
    ("H", lambda at: at + timedelta(hours=1)),
    ("d", lambda at: at + timedelta(days=1)),
    ("m", lambda at: (at.replace(day=1) + timedelta(days=32)).replace(day=1)),
    ("Y", lambda at: at.replace(year=at.year + 1)),
)


def _span(text: str, zone: str) -> tuple[datetime, datetime] | None:
    """The first and last moment (UTC) that a time (TS, 2.A.76) may mean; None where it is none, or has no zone."""
    found = _TIME.fullmatch(text)
    if not found or not (offset := found["zone"] or zone):
        return None
    try:
        day = [int(found[part] or least) for part, least in zip("YmdHMS", (0, 1, 1, 0, 0, 0), strict=True)]
        at = datetime.strptime(f"{offset}", "%z").replace(
            year=day[0], month=day[1], day=day[2], hour=day[3], minute=day[4], second=day[5]
        )
        length = next(length for part, length in _LENGTHS if found[part])
        return at.astimezone(UTC), length(at).astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def _zone(text: str) -> str:
    found = _TIME.fullmatch(re.split(r"[^\d.+-]", text, maxsplit=1)[0])
    return (found["zone"] or "") if found else ""
