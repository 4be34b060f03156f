"""Headers as pydicom and highdicom write them, and as nobody should."""

from __future__ import annotations

import io
import json
import time
import tracemalloc
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import DeflatedExplicitVRLittleEndian

from dicom_io.errors import HeaderError
from dicom_io.header import Header, read_header
from tests.dicom_io.support import ct, head, run, save
from tests.peers import program as tool

PIXELS = head(12, False)


def read(dataset: Dataset) -> Header:
    stream = io.BytesIO()
    dataset.save_as(stream, enforce_file_format=True)
    return read_header(stream.getvalue())


def with_raw(keyword: str, value: bytes) -> Header:
    """The header of an instance in which one element's bytes are replaced, whatever they are."""
    dataset = ct(PIXELS, 12)
    marker = b"7777777777"
    tag = dataset[keyword].tag
    vr = dataset[keyword].VR
    dataset.add_new(tag, "LO", marker.decode())
    stream = io.BytesIO()
    dataset.save_as(stream, enforce_file_format=True)
    value += b" " * (len(value) % 2)
    old = b"LO" + len(marker).to_bytes(2, "little") + marker
    assert stream.getvalue().count(old) == 1
    return read_header(stream.getvalue().replace(old, vr.encode() + len(value).to_bytes(2, "little") + value))


def test_every_attribute_agrees_with_pydicom(ge_head: Path, philips_phantom: Path) -> None:
    for path in [*ge_head.glob("*.dcm"), *philips_phantom.glob("S*/I*0")]:
        dataset, header = dcmread(path), read_header(path)
        assert header.problems == ()
        for name, keyword in {
            "sop_class_uid": "SOPClassUID", "sop_instance_uid": "SOPInstanceUID",
            "study_instance_uid": "StudyInstanceUID", "series_instance_uid": "SeriesInstanceUID",
            "frame_of_reference_uid": "FrameOfReferenceUID", "modality": "Modality", "rows": "Rows",
            "columns": "Columns", "samples_per_pixel": "SamplesPerPixel", "kvp": "KVP",
            "photometric_interpretation": "PhotometricInterpretation", "gantry_detector_tilt": "GantryDetectorTilt",
            "convolution_kernel": "ConvolutionKernel", "body_part_examined": "BodyPartExamined",
            "study_description": "StudyDescription", "series_description": "SeriesDescription",
            "protocol_name": "ProtocolName", "manufacturer": "Manufacturer",
            "manufacturer_model_name": "ManufacturerModelName", "contrast_bolus_agent": "ContrastBolusAgent",
            "patient_age": "PatientAge", "patient_birth_date": "PatientBirthDate", "study_date": "StudyDate",
            "instance_number": "InstanceNumber", "series_number": "SeriesNumber",
            "acquisition_number": "AcquisitionNumber", "station_name": "StationName",
        }.items():  # fmt: skip
            value = getattr(header, name)
            expected = dataset.get(keyword)
            assert (value or None) == (expected or None), (path, keyword)
        assert header.transfer_syntax_uid == dataset.file_meta.TransferSyntaxUID
        assert header.image_type == tuple(dataset.ImageType)
        assert header.number_of_frames == 1
        if "ImagePositionPatient" in dataset:
            (frame,) = header.frames
            assert frame.position == tuple(dataset.ImagePositionPatient)
            assert frame.orientation == tuple(dataset.ImageOrientationPatient)
            assert frame.spacing == tuple(dataset.PixelSpacing)
            assert frame.thickness == dataset.SliceThickness
        else:
            assert header.frames == ()


@pytest.mark.parametrize(
    ("said", "acquired"),
    [
        ({"AcquisitionDateTime": "20260601101502.25+0200"}, "20260601101502"),
        ({"AcquisitionDate": "20260601", "AcquisitionTime": "101502.250000"}, "20260601101502"),
        (
            {"AcquisitionDateTime": "202606", "AcquisitionDate": "20260601", "AcquisitionTime": "101502"},
            "20260601101502",
        ),
        ({"AcquisitionDate": "20260601", "AcquisitionTime": "1015"}, ""),
        ({"AcquisitionDate": "2026.06.01", "AcquisitionTime": "101502"}, ""),
        ({"AcquisitionTime": "101502"}, ""),
        ({"StudyDate": "20260601", "ContentDate": "20260601", "ContentTime": "101502"}, ""),
        ({}, ""),
    ],
)
def test_when_it_was_acquired_is_known_to_the_second_or_not_at_all(said: dict[str, str], acquired: str) -> None:
    dataset = ct(PIXELS, 12)
    for keyword in ("AcquisitionDateTime", "AcquisitionDate", "AcquisitionTime"):
        dataset.pop(keyword, None)
    for keyword, value in said.items():
        setattr(dataset, keyword, value)
    assert read(dataset).acquired == acquired


def test_a_path_bytes_and_a_stream_read_the_same(ge_head: Path) -> None:
    path = ge_head / "14.dcm"
    with path.open("rb") as stream:
        assert read_header(path) == read_header(path.read_bytes()) == read_header(stream)


@pytest.mark.parametrize("option", ["+ti", "+te", "+tb", "+td"])
def test_every_encoding_reads_the_same(tmp_path: Path, option: str) -> None:
    dataset = ct(PIXELS, 12, StudyDescription="Tête", SpecificCharacterSet="ISO_IR 100")
    path = save(dataset, tmp_path / "in.dcm")
    run(tool("dcmconv"), option, path, tmp_path / "out.dcm")
    expected, header = read_header(path).to_json(), read_header(tmp_path / "out.dcm").to_json()
    assert expected.pop("transfer_syntax_uid") and header.pop("transfer_syntax_uid")
    assert header == expected
    assert header["study_description"] == "Tête"


def test_a_header_survives_json(ge_head: Path) -> None:
    for header in (read_header(ge_head / "14.dcm"), read(ct(head(12, False, frames=3), 12))):
        assert header.to_json() == asdict(header)
        assert Header.from_json(json.loads(json.dumps(header.to_json()))) == header


def test_what_was_stored_before_an_attribute_was_read_lacks_it() -> None:
    header = read(ct(PIXELS, 12, StationName="CT1"))
    assert header.station_name == "CT1"
    stored = header.to_json()
    for name in ("station_name", "anatomic_region"):
        del stored[name]
    old = Header.from_json(json.loads(json.dumps(stored)))
    assert (old.station_name, old.anatomic_region) == ("", "")


def test_what_a_later_release_stored_besides_is_passed_over() -> None:
    header = read(ct(PIXELS, 12))
    assert Header.from_json({**header.to_json(), "of_tomorrow": 3}) == header


def test_the_code_of_a_region_stands_beside_what_is_examined() -> None:
    region, other = Dataset(), Dataset()
    region.CodeValue, region.CodingSchemeDesignator, region.CodeMeaning = "T-A0100", "SRT", "Brain"
    other.CodeValue, other.CodingSchemeDesignator, other.CodeMeaning = "45048000", "SCT", "Neck"
    dataset = ct(PIXELS, 12, BodyPartExamined="HEAD", AnatomicRegionSequence=Sequence([region, other]))
    assert (read(dataset).body_part_examined, read(dataset).anatomic_region) == ("HEAD", "T-A0100 SRT")
    dataset.BodyPartExamined = ""
    del dataset.AnatomicRegionSequence[0].CodingSchemeDesignator
    assert (read(dataset).body_part_examined, read(dataset).anatomic_region) == ("BRAIN", "")


def test_frames_of_an_enhanced_object() -> None:
    dataset = ct(head(12, False, frames=3), 12)
    for keyword in ("PlaneOrientationSequence", "PixelMeasuresSequence"):  # these in the shared groups
        for group in dataset.PerFrameFunctionalGroupsSequence:
            dataset.SharedFunctionalGroupsSequence[0][keyword] = group[keyword]
            del group[keyword]
    details = {"CTXRayDetailsSequence": ("KVP", 120), "CTAcquisitionDetailsSequence": ("GantryDetectorTilt", 12.5),
               "CTReconstructionSequence": ("ConvolutionKernel", "H31s")}  # fmt: skip
    for sequence, (keyword, value) in details.items():
        item = Dataset()
        setattr(item, keyword, value)
        setattr(dataset.SharedFunctionalGroupsSequence[0], sequence, Sequence([item]))
    region, anatomy, agent = Dataset(), Dataset(), Dataset()
    region.CodeMeaning, agent.CodeMeaning = "Head", "Iodinated contrast"
    region.CodeValue, region.CodingSchemeDesignator = "69536005", "SCT"
    anatomy.AnatomicRegionSequence = Sequence([region])
    dataset.SharedFunctionalGroupsSequence[0].FrameAnatomySequence = Sequence([anatomy])
    dataset.ContrastBolusAgentSequence = Sequence([agent])

    header = read(dataset)

    assert header.number_of_frames == 3
    assert [frame.position[2] for frame in header.frames] == [50, 55, 60]
    assert {frame.spacing for frame in header.frames} == {(0.5, 0.4)}
    assert {frame.orientation for frame in header.frames} == {(1, 0, 0, 0, 1, 0)}
    assert (header.kvp, header.gantry_detector_tilt, header.convolution_kernel) == (120, 12.5, "H31s")
    assert (header.body_part_examined, header.contrast_bolus_agent) == ("HEAD", "Iodinated contrast")
    assert header.anatomic_region == "69536005 SCT"
    assert header.problems == ()


@pytest.mark.parametrize(
    ("sequence", "keyword", "values", "field"),
    [
        ("CTXRayDetailsSequence", "KVP", (120, 120, 70), "kvp"),
        ("CTXRayDetailsSequence", "KVP", (120, 120, None), "kvp"),
        ("CTReconstructionSequence", "ConvolutionKernel", ("H31s", "H60s", "H31s"), "convolution_kernel"),
    ],
)
def test_frames_that_differ_leave_unknown_what_they_differ_in(
    sequence: str, keyword: str, values: tuple[Any, ...], field: str
) -> None:
    """The first frame does not speak for the one that was scanned at 70 kV."""
    for told in ((values[0],) * 3, values):
        dataset = ct(head(12, False, frames=3), 12)
        for group, value in zip(dataset.PerFrameFunctionalGroupsSequence, told, strict=True):
            item = Dataset()
            setattr(item, keyword, value)
            setattr(group, sequence, Sequence([item] if value is not None else []))
        header = read(dataset)
        known = len(set(told)) == 1
        assert getattr(header, field) == (told[0] if known else None if field == "kvp" else "")
        assert any(keyword in one for one in header.problems) is not known


def test_an_agent_without_a_name_is_an_agent() -> None:
    dataset = ct(head(12, False), 12)
    dataset.ContrastBolusAgentSequence = Sequence([Dataset()])
    assert read(dataset).contrast_bolus_agent == "an agent that is not named"


def test_an_enhanced_object_without_all_its_planes_has_no_geometry() -> None:
    dataset = ct(head(12, False, frames=3), 12)
    del dataset.PerFrameFunctionalGroupsSequence[1].PlanePositionSequence
    assert read(dataset).frames == ()
    del dataset.PerFrameFunctionalGroupsSequence[1]
    header = read(dataset)
    assert header.frames == ()
    assert header.problems == ("PerFrameFunctionalGroupsSequence: 2 items for 3 frames",)


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("ImagePositionPatient", b"nan\\0\\0"),
        ("ImagePositionPatient", b"1\\2"),
        ("ImagePositionPatient", b"1\\2\\1e9"),
        ("ImagePositionPatient", b"1\\\\3"),
        ("ImageOrientationPatient", b"1\\0\\0\\1\\0\\0"),
        ("ImageOrientationPatient", b"0\\0\\0\\0\\0\\0"),
        ("ImageOrientationPatient", b"inf\\0\\0\\0\\1\\0"),
        ("ImageOrientationPatient", b"1\\0\\0\\0\\1"),
        ("PixelSpacing", b"0.5"),
        ("PixelSpacing", b"0.5\\0"),
        ("PixelSpacing", b"-0.5\\0.5"),
        ("PixelSpacing", b"1e999\\0.5"),
        ("PixelSpacing", b"0x10\\0.5"),
        ("PixelSpacing", b"1_0\\0.5"),
    ],
)
def test_unusable_geometry_is_absent_and_named(keyword: str, value: bytes) -> None:
    header = with_raw(keyword, value)
    assert header.frames == ()
    assert len(header.problems) == 1
    assert header.problems[0].startswith(f"{keyword}: ")


@pytest.mark.parametrize("value", [b"abc", b"0", b"-5", b"nan", b"1\\2", b"1e9"])
def test_an_unusable_thickness_is_absent_and_named(value: bytes) -> None:
    header = with_raw("SliceThickness", value)
    assert [frame.thickness for frame in header.frames] == [None]
    assert len(header.problems) == 1 and header.problems[0].startswith("SliceThickness: ")


@pytest.mark.parametrize(
    ("keyword", "value", "attribute"),
    [
        ("KVP", b"many", "kvp"),
        ("GantryDetectorTilt", b"infinity", "gantry_detector_tilt"),
        ("InstanceNumber", b"1.5", "instance_number"),
        ("InstanceNumber", b"99999999999", "instance_number"),
        ("SeriesNumber", "١٢".encode(), "series_number"),
    ],
)
def test_unreadable_numbers_are_absent_and_named(keyword: str, value: bytes, attribute: str) -> None:
    header = with_raw(keyword, value)
    assert getattr(header, attribute) is None
    assert header.frames
    assert [problem.split(":")[0] for problem in header.problems] == [keyword]


def test_sizes_that_are_no_numbers() -> None:
    header = with_raw("Rows", b"512 rows")
    assert header.rows == 0 and header.problems[0].startswith("Rows: ")


@pytest.mark.parametrize("number", [0, -1, 2147483647])
def test_a_nonsensical_number_of_frames(number: int) -> None:
    header = read(ct(PIXELS, 12, NumberOfFrames=number))
    assert header.number_of_frames == 0 and header.frames == ()
    assert header.problems[0].startswith("NumberOfFrames")


@pytest.mark.parametrize("keyword", ["SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "SOPClassUID"])
@pytest.mark.parametrize("value", [b"", b"../../etc/passwd", b"1.2.3\0/x", b"1..2", b".1", b"1.", b"1.2 3", b"9" * 65])
def test_what_is_no_uid_is_refused(keyword: str, value: bytes) -> None:
    with pytest.raises(HeaderError, match=f"{keyword} missing or no UID"):
        with_raw(keyword, value)


def test_padding_and_the_longest_uid_are_accepted() -> None:
    longest = "1." + "2" * 62
    assert read(ct(PIXELS, 12, study=longest)).study_instance_uid == longest
    assert with_raw("SeriesInstanceUID", b"1.2.3\0\0\0").series_instance_uid == "1.2.3"
    assert with_raw("SeriesInstanceUID", b"1.2.30 ").series_instance_uid == "1.2.30"


def test_what_is_no_dicom_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no DICOM")
    for source in (b"", b"DICM", bytes(132), tmp_path / "notes.txt", tmp_path / "absent", tmp_path):
        with pytest.raises(HeaderError):
            read_header(source)


def test_directory_files_are_no_instances(philips_phantom: Path) -> None:
    with pytest.raises(HeaderError, match="SOPClassUID"):
        read_header(philips_phantom / "DIRFILE")


def test_pixels_are_not_read(ge_head: Path) -> None:
    """A file that ends where its pixel data begins has the same header."""
    whole = (ge_head / "14.dcm").read_bytes()
    assert read_header(whole[: len(whole) - 524288]) == read_header(whole)


def test_hostile_files_read_or_are_an_error(malformed: Path) -> None:
    outcomes: dict[str, int] = {"read": 0, "refused": 0}
    for path in sorted(malformed.rglob("*.dcm")):
        started = time.monotonic()
        try:
            header = read_header(path)
            assert Header.from_json(json.loads(json.dumps(header.to_json()))) == header
            outcomes["read"] += 1
        except HeaderError as error:
            assert error.where == str(path) and len(str(error)) < 600
            outcomes["refused"] += 1
        assert time.monotonic() - started < 1, path
    assert outcomes["read"] > 150 and outcomes["refused"] > 30


def nested(depth: int, *, tag: bytes, undefined: bool) -> bytes:
    """A whole instance with sequences within sequences of that tag."""
    dataset = ct(PIXELS, 12, PixelData=None)
    stream = io.BytesIO()
    dataset.save_as(stream, enforce_file_format=True)
    opening = tag + b"SQ\0\0" + b"\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0\xff\xff\xff\xff"
    closing = b"\xfe\xff\x0d\xe0\0\0\0\0" + b"\xfe\xff\xdd\xe0\0\0\0\0"
    if undefined:
        return stream.getvalue() + opening * depth + closing * depth
    body = b""
    for _ in range(depth):
        item = b"\xfe\xff\x00\xe0" + len(body).to_bytes(4, "little") + body
        body = tag + b"SQ\0\0" + len(item).to_bytes(4, "little") + item
    return stream.getvalue() + body


@pytest.mark.parametrize("undefined", [True, False])
@pytest.mark.parametrize("tag", [b"\x40\x00\x75\x02", b"\x00\x52\x29\x92"], ids=["unused", "functional groups"])
def test_deep_nesting_costs_little(tag: bytes, undefined: bool) -> None:
    for depth in (50, 5_000):
        source = nested(depth, tag=tag, undefined=undefined)
        tracemalloc.start()
        started = time.monotonic()
        assert read_header(source).rows == 48
        assert time.monotonic() - started < 2
        assert tracemalloc.get_traced_memory()[1] < 20 * len(source) + (4 << 20)
        tracemalloc.stop()


def test_a_deflate_bomb_is_cut_short(tmp_path: Path) -> None:
    """200 MB of zeros in 200 kB, before any pixel data."""
    bomb = ct(PIXELS, 12, PixelData=None)
    bomb.add_new(0x00091001, "OB", bytes(200 << 20))
    bomb.add_new(0x00090010, "LO", "BOMB")
    bomb.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    path = save(bomb, tmp_path / "bomb.dcm")
    del bomb
    assert path.stat().st_size < 1 << 20
    tracemalloc.start()
    with pytest.raises(HeaderError):
        read_header(path)
    assert tracemalloc.get_traced_memory()[1] < 150 << 20
    tracemalloc.stop()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_headers_read_or_are_an_error(data: st.DataObject) -> None:
    whole = bytearray(_WHOLE)
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(132, len(whole) - 1))
        junk = data.draw(st.binary(min_size=1, max_size=6))
        whole[at : at + len(junk)] = junk
    cut = data.draw(st.integers(132, len(whole)))
    try:
        header = read_header(bytes(whole[:cut]))
    except HeaderError:
        return
    assert Header.from_json(json.loads(json.dumps(header.to_json()))) == header
    assert all(np.isfinite(frame.position).all() for frame in header.frames)


def _whole() -> bytes:
    dataset: Any = ct(head(12, False, frames=2), 12, PixelData=None)
    stream = io.BytesIO()
    dataset.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


_WHOLE = _whole()
