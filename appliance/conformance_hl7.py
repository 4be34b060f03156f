"""The tables of docs/conformance.md that are about HL7; `appliance.conformance` puts them in their places."""

from __future__ import annotations

from collections.abc import Iterable

from appliance.intake.hl7_message import CANCELS, CODES, KINDS, LONGEST_NUMBER, MAXIMUM_GROUPS, REJECTED
from appliance.settings import Hl7Intake

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
