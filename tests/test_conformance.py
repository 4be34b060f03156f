"""docs/conformance.md says what the code does."""

from __future__ import annotations

import inspect
import re
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import get_args

import pytest
from pydicom.dataset import Dataset

from appliance.conformance import STATUSES, TABLES, fill
from appliance.conformance_hl7 import OBSERVED, READ, WHEN, WRITTEN
from appliance.findings.alert import Kind, render_alert
from appliance.intake import hl7_answer, hl7_message, hl7_receiver, receiver
from appliance.intake.hl7_message import CODES, KINDS
from appliance.ledger.records import Verdict
from dicom_io import _association, commitment, performed

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "conformance.md").read_text(encoding="utf-8")


def test_the_tables_are_those_of_the_code() -> None:
    assert set(re.findall(r"<!-- table: (\w+) -->", TEXT)) == set(TABLES)
    assert fill(TEXT) == TEXT, "run `make conformance`"


@pytest.mark.parametrize("name", TABLES)
def test_a_table_that_drifts_is_found(name: str) -> None:
    cut = re.sub(rf"(<!-- table: {name} -->\n).*?(?=<!-- end -->)", r"\1", TEXT, flags=re.DOTALL)
    assert cut != TEXT
    assert fill(cut) == TEXT


def test_every_status_that_the_code_knows_is_explained() -> None:
    known = {
        value
        for module in (_association, receiver, performed)
        for name, value in vars(module).items()
        if name.isupper() and isinstance(value, int) and re.search(rf"^{name} = 0x", source(module), re.MULTILINE)
    }
    known |= {commitment.INVALID_ARGUMENT, commitment.RESOURCE_LIMITATION}
    assert known == set(STATUSES)
    assert len(known) > 5


def source(module: ModuleType) -> str:
    assert module.__file__
    return Path(module.__file__).read_text(encoding="utf-8")


def test_links_between_documents_lead_somewhere() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_message_that_is_taken_and_every_error_is_told() -> None:
    assert set(READ) == set(KINDS)
    source = inspect.getsource(hl7_message) + inspect.getsource(hl7_answer) + inspect.getsource(hl7_receiver)
    used = set(re.findall(r'"(1\d\d|20\d)"', source.split("REJECTED =")[1])) | set(hl7_message.REJECTED)
    assert set(WHEN) == used
    assert set(WHEN) <= set(CODES)


def test_every_field_of_every_message_of_ours_is_told() -> None:
    """What the tables say is what messages of every kind hold together, no more and no less."""
    source = Dataset()
    source.StudyInstanceUID, source.PatientID, source.PatientName = "1.2.3", "P1", "A^B"
    source.PatientBirthDate, source.AccessionNumber, source.AdmissionID = "19610101", "A1", "V1"
    source.StudyDate, source.StudyTime, source.PlacerOrderNumberImagingServiceRequest = "20260101", "0102", "PL1"
    verdict = Verdict(
        "1.2.3", "1.2.3.1", "package", "1.0.0", "Notice.", True, 0.9, 0.5, {"subdural": 0.8}, 1.0, (), (), (), (),
        udi="(01)1",
    )  # fmt: skip
    fields: dict[str, set[int]] = {}
    seen: set[str] = set()
    for kind in get_args(Kind):
        quiet = replace(verdict, positive=False, withdrawn="x" if kind == "refusal" else "")
        text = render_alert(
            quiet if kind in ("withdrawal", "refusal") else verdict, source, control_id="ID", kind=kind,
            issued_at=datetime.now(UTC), processing_id="P", sending_application="A", sending_facility="B",
            receiving_application="C", receiving_facility="D", acknowledgement="application", first="F", link="http://x",
        )  # fmt: skip
        observed = dict.fromkeys(line.split("|")[3].split("^")[0] for line in text.split("\r") if line[:3] == "OBX")
        assert list(observed) == [code for code in OBSERVED if code in observed], "in this order"
        seen |= set(observed)
        for line in text.split("\r"):
            name, *rest = line.split("|")
            # MSH-1 is the separator itself, and MSH-2 the others.
            start = 2 if name == "MSH" else 1
            found = {number for number, value in enumerate(rest, start=start) if value} - ({2} if start == 2 else set())
            fields[name] = fields.get(name, set()) | found
    fields.pop("")
    assert {name: set(told) for name, told in WRITTEN.items()} == fields
    assert seen == set(OBSERVED)
