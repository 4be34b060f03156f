"""The tables of docs/conformance.md that are about HL7; `appliance.conformance` puts them in their places."""

from __future__ import annotations

from collections.abc import Iterable

from appliance.intake.hl7_message import CANCELS, CODES, KINDS, LONGEST_NUMBER, MAXIMUM_GROUPS, REJECTED
from appliance.settings import Hl7Intake
from dicom_io.objects import codes

_ORDER = (
    ("PID-3", "identifiers with assigning authority (CX-4); `intake.hl7.authority` where none is said"),
    ("PID-7", "birth date, for the gate's criterion *age*; less than a day is not used"),
    ("ORC-1", f"order control; {', '.join(CANCELS)} cancel; another code than table 0119's is an error"),
    ("ORC-2", "placer order number"),
    ("IPC-1, OBR-18, OBR-3, ORC-3", "accession number: the first of them that is there"),
    ("IPC-3, ZDS-1", "Study Instance UID"),
    ("TQ1-9, ORC-7.6, OBR-27.6, OBR-5", "priority: the first that is there; `intake.hl7.urgent_priorities` goes first"),
    ("OBR-31, ORC-16, OBR-13, DG1-4, DG1-3", "why the study is asked for"),
    ("OBX", "with a code of `intake.hl7.onset_codes`: when it began, as TS or DT, or hours ago as NM or SN"),
)
READ: dict[str, tuple[tuple[str, str], ...]] = {
    "ORM^O01": _ORDER,
    "OMI^O23": _ORDER,
    "ADT^A08": (
        ("PID-3", "whose orders it is about"),
        ("PID-7", "birth date, from now on that of all of them"),
    ),
    "ADT^A40": (("PID-3, MRG-1", "the identifier that stays and the one that goes, of one authority"),),
    "ORU^R01": (
        ("PID-3", "as in an order"),
        ("OBR-18, OBR-3, ORC-3", "accession number: the first of them that is there"),
        ("OBR-22, OBR-25", "time and status of the report"),
        ("OBX-5", "text, of each OBX of type TX, FT or ST; the Study Instance UID from 113014 (DCM)"),
    ),
}
"""Message → the fields that are read of it, and what they are read for."""

WRITTEN: dict[str, dict[int, tuple[str, str]]] = {
    "MSH": {
        3: ("sending application", "`box.name`"),
        4: ("sending facility", "`sending_facility` of the destination"),
        5: ("receiving application", "`receiving_application`"),
        6: ("receiving facility", "`receiving_facility`"),
        7: ("time of message", "time of the verdict, in the box's zone with its offset, to a tenth of a millisecond"),
        9: ("message type", "`ORU^R01^ORU_R01`"),
        10: (
            "control id",
            "20 characters that follow from study, package, version, revision, time of issue, kind and destination",
        ),
        11: (
            "processing id",
            "`processing_id`; `T` for a package not in clinical mode; a withdrawal has that of what it takes back",
        ),
        12: ("version", "`2.5.1`"),
        15: ("accept acknowledgement", "`AL` in enhanced mode"),
        16: ("application acknowledgement", "in enhanced mode `NE`, or `AL`"),
        18: ("character set", "`UNICODE UTF-8`"),
    },
    "PID": {
        1: ("set id", "`1`"),
        3: (
            "patient identifier",
            "Patient ID; Issuer of Patient ID and its qualifiers as assigning authority (CX-4), an issuer of more than "
            "20 characters as a locally defined one (HD-2, L); without a Patient ID the Study Instance UID, type `U`",
        ),
        5: ("name", "once for each of the alphabetic, ideographic and phonetic groups (XPN-8); `^^^^^^U` for none"),
        7: ("birth date", "Patient's Birth Date, if it is a day"),
        8: ("sex", "`F`, `M`, `O`, else `U`"),
    },
    "PV1": {1: ("set id", "`1`"), 2: ("class", "`U`: unknown"), 19: ("visit number", "Admission ID")},
    "ORC": {
        1: ("order control", "`RE`: observations follow"),
        2: ("placer order number", "Placer Order Number / Imaging Service Request"),
        3: ("filler order number", "Accession Number with its issuer (EI-2 to EI-4), else the Study Instance UID"),
    },
    "OBR": {
        1: ("set id", "`1`"),
        2: ("placer order number", "as ORC-2"),
        3: ("filler order number", "as ORC-3"),
        4: ("service", "LOINC 24725-4 CT Head, and SNOMED CT 303653007"),
        7: (
            "time of observation",
            "acquisition, else study, by the scanner's clock; without an offset of its own it is in MSH-7's zone",
        ),
        18: ("placer field 1", "Accession Number"),
        22: ("time of status", "time of the verdict"),
        24: ("section", "`CT`"),
        25: ("result status", "`P`: preliminary"),
    },
    "NTE": {
        1: ("set id", "1, 2 …"),
        2: ("source", "`L`"),
        3: (
            "comment",
            "what a message that is no plain alert means; that the images carry no patient ID, if so; what is too "
            "long for its field, whole; that it is triage only; the package's notice; each limitation",
        ),
    },
    "TQ1": {
        1: ("set id", "`1`, in a positive message only"),
        9: ("priority", "`S^Stat^HL70485`; no message says a lower one"),
    },
    "OBX": {
        1: ("set id", "1, 2 …"),
        2: ("type", "see the next table"),
        3: ("observation", "see the next table"),
        4: ("sub-id", "1, 2 … of findings"),
        5: ("value", "see the next table"),
        6: ("units", "UCUM, of numbers that have one"),
        8: ("abnormal flag", "`AA` on the impression of a positive message"),
        11: ("result status", "`P`: preliminary, always"),
        14: ("time of observation", "as OBR-7"),
        17: ("method", "on the impression of a positive message RadLex RID49480, ACR Category 1"),
        19: ("time of analysis", "time of the verdict"),
    },
}
"""Segment of our ORU^R01 → field → its name, and what stands in it."""

OBSERVED: dict[str, tuple[str, str]] = {
    "113014": ("Study Instance UID", "always"),
    "59776-5": ("the impression, in a sentence or two", "always"),
    "121071": ("each finding: haemorrhage, then the subtypes that are likely", "positive"),
    "122157": ("probability of haemorrhage in the study", "unless the study was not analysed"),
    "118565006": ("volume in mL", "unless the study was not analysed"),
    "111001": ("name of the package", "always"),
    "111003": ("version of the package", "always"),
    "128739": ("unique device identifier of the package", "if it has one"),
    "REVISION": ("revision of the verdict", "always"),
    "MESSAGE-KIND": ("provisional, alert, confirmation, correction, withdrawal or refusal", "always"),
    "FIRST-MESSAGE": ("MSH-10 of the first message on the study", "confirmation, correction, withdrawal"),
    "STUDY-LINK": ("address of the study in a viewer", "with `study_link`"),
}
"""OBX-3.1 → what stands in OBX-5, and when it is sent; in this order."""

WHEN: dict[str, str] = {
    "100": "no MSH at the beginning, or a segment that must be there is not; also a batch (FHS, BHS)",
    "101": "no control id, identifier, order control, accession number or prior identifier",
    "102": f"separators that are not five; no date in PID-7; a number of more than {LONGEST_NUMBER} characters; bytes "
    "that are not of the character set in MSH-18",
    "103": "an order control code that table 0119 lacks; a character set that is not read",
    "200": f"another message than {', '.join(KINDS)}",
    "201": "the same with another trigger event",
    "202": "another MSH-11 than `intake.hl7.processing_ids`",
    "203": "MSH-12 is no version 2",
    "204": "ADT^A40 whose MRG-1 has an authority that no PID-3 has",
    "205": "the control id was used by this sender for another message, which was accepted",
    "207": "it cannot be written down, there is no room on the disk, it is longer than "
    f"`intake.hl7.maximum_message_bytes`, or has more than {MAXIMUM_GROUPS} orders",
}
"""Code of table 0357 → when it is answered."""


def _table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    columns = list(head)
    lines = [columns, ["---"] * len(columns), *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def hl7_listener() -> str:
    """Limits of the listener."""

    def default(name: str) -> object:
        return Hl7Intake.model_fields[name].get_default(call_default_factory=True)

    rows = [
        ("ports", f"`intake.hl7.port` (default {default('port')}), `intake.hl7.tls.port`"),
        (
            "connections at once",
            f"`intake.hl7.maximum_connections` (default {default('maximum_connections')}), "
            f"`intake.hl7.maximum_connections_per_address` (default {default('maximum_connections_per_address')}); "
            "more are closed",
        ),
        ("longest message", f"`intake.hl7.maximum_message_bytes` (default {default('maximum_message_bytes'):,})"),
        (
            "slow message",
            f"its connection is closed if it is not whole after `intake.hl7.message_seconds` (default "
            f"{default('message_seconds'):g})",
        ),
        ("character sets (MSH-18)", "UTF-8, ISO 8859-1 to -9 and -15, ASCII; not said: UTF-8, else ISO 8859-1"),
        ("versions (MSH-12)", "every version 2; the answer is of the same"),
        ("fragments, several messages in one packet", "read"),
        ("no CR after FS, bytes between blocks, a block begun anew", "borne, and noted in the ledger"),
        ("a message that is cut off", "nothing, and noted in the ledger"),
    ]
    return _table(("", ""), rows)


def hl7_out() -> str:
    """The segments of our messages, field by field."""
    rows = [
        (f"{segment}-{number}", name, what)
        for segment, fields in WRITTEN.items()
        for number, (name, what) in sorted(fields.items())
    ]
    return _table(("field", "name", "what"), rows)


def hl7_observations() -> str:
    """The observations of our messages."""
    concepts = {one.value: one for one in vars(codes).values() if isinstance(one, codes.Concept)}
    rows = [
        (f"{code} {concepts[code].meaning} ({concepts[code].scheme})", what, when)
        for code, (what, when) in OBSERVED.items()
    ]
    return _table(("OBX-3", "OBX-5", "when"), rows)


def hl7_in() -> str:
    """What is read of each message that comes."""
    rows: list[tuple[str, str, str]] = []
    for kind, fields in READ.items():
        if kind == "OMI^O23":
            continue
        name = "ORM^O01, OMI^O23" if kind == "ORM^O01" else kind
        rows += [(name if place == 0 else "", field, what) for place, (field, what) in enumerate(fields)]
    return _table(("message", "field", "what is read"), rows)


def hl7_errors() -> str:
    """Error codes of ERR-3."""
    return _table(
        ("ERR-3", "MSA-1", "when"),
        ((f"{code} {CODES[code]}", "AR, CR" if code in REJECTED else "AE, CE", when) for code, when in WHEN.items()),
    )
