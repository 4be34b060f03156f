"""The selection read back by highdicom and DCMTK."""

from __future__ import annotations

import subprocess
from pathlib import Path

import highdicom as hd
import pydicom
import pytest

from dicom_io.objects import codes
from dicom_io.objects.common import Device, Place, part10
from dicom_io.objects.selection import build_selection
from tests.findings_support import ISSUED, ct_series, dciodvfy_errors, rendered, verdict_on
from tests.peers import program as tool


def test_it_selects_the_source_of_each_key_slab_most_important_first(tmp_path: Path) -> None:
    series = ct_series(tmp_path)
    verdict = verdict_on(series)
    path = tmp_path / "selection.object"
    path.write_bytes(part10(rendered(series, verdict, "selection")))
    assert dciodvfy_errors(path) == []
    key = [verdict.slabs[index].sop_instance_uid for index in verdict.key_slabs]
    document = hd.ko.KeyObjectSelectionDocument.from_dataset(pydicom.dcmread(path))
    assert [document.resolve_reference(uid)[2] for uid in key] == key
    references = document.content.get_references()
    assert [one.referenced_sop_instance_uid for one in references] == key
    assert {document.resolve_reference(uid)[:2] for uid in key} == {(series.study_uid, series.series_uid)}
    [observer] = document.content.get_observer_contexts()
    assert observer.observer_identifying_attributes.name == "CT-BOX-1"
    done = subprocess.run([tool("dsrdump"), "+Pc", "+Pl", str(path)], capture_output=True, text=True, check=True)
    assert '(113000,DCM,"Of Interest")' in done.stdout
    assert "Intracranial haemorrhage suspected (subdural" in done.stdout
    assert "a radiologist must read this study" in done.stdout and verdict.notice in done.stdout


def test_without_an_image_there_is_no_selection(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs an image"):
        build_selection(
            [],
            ct_series(tmp_path, count=1).header(),
            title=codes.OF_INTEREST,
            description="",
            device=Device("1.2.9", "box", "m", "m", "1"),
            place=Place("1.2.3", "1.2.4", 1, 1, "", ISSUED),
        )
