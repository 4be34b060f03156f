"""docs/conformance.md says what the code does."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest

from appliance.conformance import STATUSES, TABLES, fill
from appliance.conformance_hl7 import READ, WHEN
from appliance.intake import hl7_answer, hl7_message, hl7_receiver, receiver
from appliance.intake.hl7_message import CODES, KINDS
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
