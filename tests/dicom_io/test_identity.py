"""Patient, study and order can be told from whatever header the gate may decide on."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset

from dicom_io.errors import HeaderError
from dicom_io.header import read_header
from dicom_io.identity import identifying_header
from tests.dicom_io.support import ct, head

ISSUER = "IssuerOfPatientIDQualifiersSequence"


def written(path: Path, name: str = "Müller^Jörg", **values: Any) -> Path:
    image = ct(head(12, False), 12, instance_number=1)
    image.SpecificCharacterSet = "ISO_IR 100"
    image.PatientName, image.PatientID, image.AccessionNumber = name, "P 1", "A1"
    qualifier = Dataset()
    qualifier.UniversalEntityID, qualifier.UniversalEntityIDType = "1.2.3", "ISO"
    setattr(image, ISSUER, [qualifier])
    for keyword, value in values.items():
        setattr(image, keyword, value)
    image.save_as(path, enforce_file_format=True)
    return path


def nested(path: Path, levels: int) -> Path:
    """The same with private sequences in one another, behind the attributes that matter."""
    content = written(path).read_bytes()
    at = content.index(struct.pack("<HH", 0x0028, 0x0010))  # Rows
    sequence = struct.pack("<HH2s2xI", 0x0021, 0x1010, b"SQ", 0xFFFFFFFF) + struct.pack(
        "<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF
    )
    ends = struct.pack("<HHI", 0xFFFE, 0xE00D, 0) + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    path.write_bytes(content[:at] + sequence * levels + ends * levels + content[at:])
    return path


def test_a_header_that_pydicom_reads_comes_whole(tmp_path: Path) -> None:
    header = identifying_header(written(tmp_path / "a.dcm"))
    assert str(header.PatientName) == "Müller^Jörg"
    assert header[ISSUER][0].UniversalEntityID == "1.2.3"


def test_sequences_too_deep_for_pydicom_hide_no_patient(tmp_path: Path) -> None:
    path = nested(tmp_path / "deep.dcm", 3000)
    known = read_header(path)
    header = identifying_header(path)
    assert (str(header.PatientName), header.PatientID, header.AccessionNumber) == ("Müller^Jörg", "P 1", "A1")
    assert header.StudyInstanceUID == known.study_instance_uid
    assert ISSUER not in header and "PixelData" not in header


def test_a_value_that_cannot_be_converted_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "a.dcm")
    get = Dataset.get

    def broken(self: Dataset, key: Any, default: Any = None) -> Any:
        if key == "AccessionNumber":
            raise ValueError("not what this library expects")
        return get(self, key, default)

    monkeypatch.setattr(Dataset, "get", broken)
    header = identifying_header(path)
    assert (str(header.PatientName), header.AccessionNumber) == ("Müller^Jörg", "A1")


def test_what_is_no_dicom_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "no.dcm"
    path.write_bytes(b"x" * 500)
    with pytest.raises(HeaderError, match="DICM"):
        identifying_header(path)
    with pytest.raises(FileNotFoundError):
        identifying_header(tmp_path / "absent.dcm")
