"""docs/conformance.md says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

from appliance.intake import receiver
from dicom_io import scp

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "conformance.md").read_text(encoding="utf-8")


def column(heading: str, index: int) -> list[str]:
    """One column of the table below a heading row that begins with that text."""
    lines = TEXT.split(f"| {heading}", 1)[1].split("\n")[2:]
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append(line.strip("| ").split(" | ")[index].strip())
    return rows


def test_every_storage_class_and_syntax_is_stated() -> None:
    assert tuple(column("SOP class | UID", 1)) == scp.STORAGE_CLASSES
    assert tuple(column("transfer syntax, in order", 1)) == scp.PLAIN_SYNTAXES + scp.COMPRESSED_SYNTAXES


def test_every_status_is_stated() -> None:
    stated = {int(code, 16) for code in re.findall(r"^\| (0x[0-9A-F]{4}) ", TEXT, re.MULTILINE)}
    assert stated == {
        receiver.SUCCESS,
        receiver.OUT_OF_RESOURCES,
        receiver.DOES_NOT_MATCH_SOP_CLASS,
        receiver.CANNOT_UNDERSTAND,
        scp.INVALID_INSTANCE,
        scp.CLASS_NOT_SUPPORTED,
    }


def test_limits_are_stated() -> None:
    assert f"{scp.MAXIMUM_PDU:,} bytes" in TEXT


def test_links_between_documents_lead_somewhere() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"
