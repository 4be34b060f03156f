"""The tables of docs/conformance.md that the code's own tables decide: `make conformance` writes them anew.

The page is in the form of a conformance statement (PS3.2); what stands between the marks ``<!-- table: name -->`` and
``<!-- end -->`` is made here, the rest is written by hand.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from pydicom.uid import UID

from appliance.conformance_hl7 import hl7_errors, hl7_in, hl7_listener, hl7_observations, hl7_out
from appliance.intake import receiver
from appliance.settings import Intake, Tls
from dicom_io import _association as association
from dicom_io import commitment, performed, sop_classes, tls
from dicom_io._upper_layer import LONGEST_PDU, MAXIMUM_PDU, Rejection
from dicom_io.scp import PENDING_CONNECTIONS

STATUSES: dict[int, tuple[str, str]] = {
    association.SUCCESS: (
        "Success",
        "file, folder and the ledger's row are synced to disk; also for an instance that came before with the same "
        "bytes; N-ACTION, N-CREATE, N-SET: the ledger's row is synced to disk; C-ECHO",
    ),
    performed.INVALID_VALUE: (
        "Invalid attribute value",
        "N-CREATE, N-SET: a status that the step cannot have, a UID that is none, several studies",
    ),
    association.PROCESSING_FAILURE: (
        "Processing failure",
        "N-ACTION, N-CREATE, N-SET: the request could not be written down; N-CREATE, N-SET: its data set is damaged; "
        f"N-SET for a step that has ended, with Error ID 0x{performed.MAY_NOT_BE_UPDATED[1]:04X}",
    ),
    performed.DUPLICATE_INSTANCE: ("Duplicate SOP Instance", "N-CREATE with a UID that is there"),
    association.INVALID_INSTANCE: ("Invalid SOP Instance", "the SOP Instance UID of the command is no UID"),
    performed.MISSING_ATTRIBUTE: ("Missing attribute", "N-CREATE, N-SET: what is needed is not there"),
    performed.MISSING_VALUE: (
        "Missing attribute value",
        "N-CREATE, N-SET: what is needed is empty; also a step that ends without a series",
    ),
    association.CLASS_NOT_SUPPORTED: (
        "SOP Class not supported",
        "the class of the command is not that of its presentation context",
    ),
    association.NO_SUCH_ACTION: ("No such action type", "N-ACTION with another Action Type ID than 1"),
    association.UNRECOGNIZED_OPERATION: ("Unrecognized operation", "any other request"),
    association.NO_SUCH_INSTANCE: (
        "No such SOP Instance",
        "N-ACTION on another than the well-known instance; N-SET of a step that was not created",
    ),
    commitment.INVALID_ARGUMENT: ("Invalid argument value", "N-ACTION: its data set is no request for commitment"),
    commitment.RESOURCE_LIMITATION: (
        "Resource limitation",
        "N-ACTION, N-CREATE, N-SET: more instances than a request may name, or than are kept of one study; no room on "
        "the disk",
    ),
    receiver.OUT_OF_RESOURCES: (
        "Out of resources",
        "the disk is full or below its reserve (`intake.reserve_percent`, `intake.reserve_bytes`), or the ledger "
        "cannot be written; worth another try",
    ),
    receiver.DOES_NOT_MATCH_SOP_CLASS: (
        "Data set does not match SOP class",
        "the command names another class or instance than the data set",
    ),
    receiver.CANNOT_UNDERSTAND: ("Cannot understand", "the data set is no DICOM, or lacks one of its UIDs"),
}
"""DIMSE status → its name and when it is answered."""

FAILURES: dict[int, str] = {
    commitment.NO_SUCH_INSTANCE: "no such object instance: not received, or removed since",
    commitment.CLASS_INSTANCE_CONFLICT: "class / instance conflict: here under another SOP class",
    commitment.PROCESSING_FAILURE: "processing failure: its file, read anew, is not what was received or unreadable",
}
"""Failure Reason (0008,1197) → when."""


def _table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    columns = list(head)
    lines = [columns, ["---"] * len(columns), *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _default(name: str) -> object:
    return Intake.model_fields[name].get_default(call_default_factory=True)


def acceptor() -> str:
    """Limits and policies of an acceptor of associations."""
    rows = [
        ("application context", "1.2.840.10008.3.1.1.1; another is rejected"),
        ("maximum PDU received", f"{MAXIMUM_PDU:,} bytes; longer ones, up to {LONGEST_PDU:,}, are taken all the same"),
        ("presentation contexts", "all 128"),
        (
            "associations at once",
            f"`intake.maximum_associations` (default {_default('maximum_associations')}), "
            f"`intake.maximum_associations_per_address` (default {_default('maximum_associations_per_address')})",
        ),
        (
            "connections without an association",
            f"{PENDING_CONNECTIONS} at once, {PENDING_CONNECTIONS // 4} from one address, and as many that the peer "
            "has still to close; more are closed at once",
        ),
        ("calling AE", "everybody, or `intake.accepted_calling_ae_titles`"),
        ("called AE", "any, or only our own with `intake.require_called_ae_title`"),
        ("addresses", "every one, or `intake.accepted_addresses`; others are hung up on"),
        ("association request", f"whole within `intake.request_seconds` (default {_default('request_seconds')} s)"),
        ("idle association", f"aborted after `intake.idle_seconds` (default {_default('idle_seconds')} s)"),
        (
            "slow message",
            f"aborted if after {association.SLOW_AFTER_SECONDS:g} s it has come at less than "
            f"`intake.minimum_bytes_per_second` (default {_default('minimum_bytes_per_second')})",
        ),
        (
            "longest instance",
            f"`intake.maximum_instance_bytes` (default {_default('maximum_instance_bytes'):,}); more is aborted",
        ),
        ("asynchronous operations", "one at a time"),
        ("user identity, extended negotiation", "read and not answered, which declines it (PS3.7 D.3.3)"),
    ]
    return _table(("", ""), rows)


def rejections() -> str:
    """Why an association is rejected (PS3.8 9.3.4)."""
    rows = [(*one.value[:3], one.words) for one in Rejection]
    return _table(("result", "source", "reason", "when"), rows)


def classes() -> str:
    """Storage classes; `intake.storage_classes` adds to them."""
    return _table(("SOP class", "UID"), ((UID(uid).name, uid) for uid in sop_classes.STORAGE_CLASSES))


def performed_classes() -> str:
    """What tells of performed steps and availability, and what is read of it."""
    study = "Scheduled Step Attributes Sequence > Study Instance UID"
    status = "Performed Procedure Step Status"
    series = "Performed Series Sequence > Series Instance UID, Referenced SOP Instance UIDs"
    referenced = "Referenced Series Sequence > Series Instance UID, Referenced SOP Instance UIDs, Instance Availability"
    rows = (
        (sop_classes.PERFORMED_STEP, "N-CREATE", f"{study}; {status} (IN PROGRESS); {series}"),
        (sop_classes.PERFORMED_STEP, "N-SET", f"{status}; {series}"),
        (sop_classes.AVAILABILITY, "N-CREATE", f"Study Instance UID; {referenced}"),
    )
    return _table(
        ("SOP class", "UID", "operation", "what is read"),
        ((UID(uid).name.removesuffix(" SOP Class"), uid, operation, read) for uid, operation, read in rows),
    )


def syntaxes() -> str:
    """Transfer syntaxes, each of which every storage class takes."""
    rows = ((UID(uid).name, uid) for uid in sop_classes.TRANSFER_SYNTAXES)
    return _table(("transfer syntax, in order of preference", "UID"), rows)


def statuses() -> str:
    """DIMSE statuses."""
    return _table(
        ("status", "when"), ((f"0x{code:04X} {name}", when) for code, (name, when) in sorted(STATUSES.items()))
    )


def failures() -> str:
    """Failure reasons of storage commitment."""
    return _table(("Failure Reason", "when"), ((f"0x{code:04X}", when) for code, when in sorted(FAILURES.items())))


def security() -> str:
    """TLS."""
    rows = [
        ("port", f"`intake.tls.port` (default {tls.DEFAULT_PORT}), beside the plain port or instead of it"),
        *(
            (f"profile `{name}`", f"TLS 1.2 with {', '.join(ciphers)}; TLS 1.3")
            for name, ciphers in tls.CIPHERS.items()
        ),
        ("", "the second is a part of PS3.15 B.13: OpenSSL lacks its Camellia suites, Python its CCM ones in TLS 1.3"),
        ("default profile", f"`{Tls.model_fields['profile'].get_default()}`"),
        ("client certificates", "required with `intake.tls.client_authorities`, else not asked for"),
        ("renewal", "certificate, key and authorities are read again when they change; associations go on"),
    ]
    return _table(("", ""), rows)


TABLES: dict[str, Callable[[], str]] = {
    one.__name__: one
    for one in (
        acceptor,
        rejections,
        classes,
        syntaxes,
        statuses,
        failures,
        performed_classes,
        security,
        hl7_listener,
        hl7_in,
        hl7_errors,
        hl7_out,
        hl7_observations,
    )
}
_MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(?=<!-- end -->)", re.DOTALL)


def fill(page: str) -> str:
    """The page with its marked tables as the code says."""
    return _MARKED.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n\n", page)


def main() -> None:
    """Write the tables of the file that is named."""
    path = Path(sys.argv[1])
    path.write_text(fill(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
