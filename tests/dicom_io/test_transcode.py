"""Nothing is lost in another transfer syntax, whatever the pixels are; by readers that did not write it."""

from __future__ import annotations

from pathlib import Path

import imagecodecs
import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    RLELossless,
    SecondaryCaptureImageStorage,
)

from dicom_io import transcode
from dicom_io.transcode import SYNTAXES, fitting, transcoded
from tests.dicom_io.support import save
from tests.findings_support import written_objects

PLAIN = (ExplicitVRLittleEndian, ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian)


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return written_objects(tmp_path_factory.mktemp("objects"))


def picture(data: bytes, rows: int, columns: int, bits: int) -> Dataset:
    """Grey, without a header that a reader of pixels needs not."""
    made = Dataset()
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made.SOPClassUID, made.SOPInstanceUID = SecondaryCaptureImageStorage, "2.25.1"
    made.SamplesPerPixel, made.PhotometricInterpretation = 1, "MONOCHROME2"
    made.Rows, made.Columns = rows, columns
    made.BitsAllocated = made.BitsStored = bits
    made.HighBit, made.PixelRepresentation = bits - 1, 0
    made.PixelData = data + b"\0" * (len(data) % 2)
    made["PixelData"].VR = "OB"
    return made


def test_each_object_has_the_syntaxes_that_it_can_have(objects: dict[str, Path]) -> None:
    assert fitting(objects["report"], SYNTAXES) == fitting(objects["presentation.1"], SYNTAXES) == PLAIN
    assert fitting(objects["capture.1"], SYNTAXES) == SYNTAXES
    assert fitting(objects["segmentation"], SYNTAXES) == (*PLAIN, JPEG2000Lossless)
    backwards = tuple(reversed(SYNTAXES))
    assert fitting(objects["capture.1"], backwards) == backwards


@pytest.mark.parametrize("syntax", PLAIN)
@pytest.mark.parametrize("name", ["report", "segmentation", "presentation.1"])
def test_a_plain_syntax_changes_nothing_that_is_said(
    name: str, syntax: str, objects: dict[str, Path], tmp_path: Path
) -> None:
    transcoded(objects[name], tmp_path / "made", syntax)
    made = pydicom.dcmread(tmp_path / "made")
    assert made.file_meta.TransferSyntaxUID == syntax
    ours = pydicom.dcmread(objects[name])
    if "PixelData" in ours:  # without explicit VRs a reader has to choose between OB and OW
        assert made.PixelData == ours.PixelData
        del made.PixelData, ours.PixelData
    assert made == ours
    assert made.file_meta.MediaStorageSOPInstanceUID == made.SOPInstanceUID


@pytest.mark.parametrize("syntax", PLAIN)
def test_the_bytes_of_a_name_stay(syntax: str, objects: dict[str, Path], tmp_path: Path) -> None:
    sent = b"Zhang^XiaoDong=\x1b$)A\xd5\xc5^\x1b$)A\xd0\xa1\xb6\xab= "
    (tmp_path / "source").write_bytes(
        objects["report"]
        .read_bytes()
        .replace(b"ISO_IR 100", b"ISO_IR 58 ")
        .replace(b"PN" + bytes([8, 0]) + b"Doe^Jane", b"PN" + bytes([len(sent), 0]) + sent)
    )
    transcoded(tmp_path / "source", tmp_path / "made", syntax)
    assert pydicom.dcmread(tmp_path / "made").get_item("PatientName").value == sent


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pixels=arrays.arrays(
        np.uint8,
        st.tuples(st.integers(1, 24), st.integers(1, 300), st.sampled_from([1, 3])),
        elements=st.sampled_from([0, 0, 0, 1, 1, 128, 255]),
        fill=st.sampled_from([0, 7]),
    ),
    syntax=st.sampled_from([RLELossless, JPEG2000Lossless]),
)
def test_every_picture_is_read_back_as_it_was(pixels: NDArray[np.uint8], syntax: str, tmp_path: Path) -> None:
    rows, columns, samples = pixels.shape
    image = picture(pixels.tobytes(), rows, columns, 8)
    image.SamplesPerPixel, image.PhotometricInterpretation = samples, "RGB" if samples == 3 else "MONOCHROME2"
    if samples == 3:
        image.PlanarConfiguration = 0
    source, target = save(image, tmp_path / "source"), tmp_path / "target"
    transcoded(source, target, syntax)
    again = pydicom.dcmread(target)
    assert again.file_meta.TransferSyntaxUID == syntax
    np.testing.assert_array_equal(again.pixel_array, pixels[..., 0] if samples == 1 else pixels)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(frames=st.integers(1, 5), rows=st.integers(1, 40), columns=st.integers(1, 40), seed=st.integers(0, 2**32 - 1))
def test_single_bits_stay_single_bits(frames: int, rows: int, columns: int, seed: int, tmp_path: Path) -> None:
    pixels = np.random.default_rng(seed).random((frames, rows, columns)) > 0.7
    image = picture(np.packbits(pixels.ravel(), bitorder="little").tobytes(), rows, columns, 1)
    image.NumberOfFrames = frames
    source, target = save(image, tmp_path / "source"), tmp_path / "target"
    transcoded(source, target, JPEG2000Lossless)
    again = pydicom.dcmread(target)
    coded = list(pydicom.encaps.generate_frames(again.PixelData, number_of_frames=frames))
    assert [one[:4] for one in coded] == frames * [b"\xff\x4f\xff\x51"]
    assert {one[42] for one in coded} == {0}  # SIZ: precision 1, unsigned
    np.testing.assert_array_equal(np.stack([imagecodecs.jpeg2k_decode(one) for one in coded]), pixels)
    assert (again.BitsAllocated, again.BitsStored, again.HighBit) == (1, 1, 0)


def test_what_is_read_back_wrong_is_never_written(
    objects: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = transcode._wavelets
    monkeypatch.setattr(transcode, "_wavelets", lambda frame, bits: real(frame ^ np.uint8(1), bits))
    with pytest.raises(ValueError, match="not what was written"):
        transcoded(objects["segmentation"], tmp_path / "made", JPEG2000Lossless)
    assert not (tmp_path / "made").exists()


def test_what_an_object_cannot_have_is_refused(objects: dict[str, Path], tmp_path: Path) -> None:
    for name, syntax in (("report", RLELossless), ("segmentation", RLELossless)):
        with pytest.raises(ValueError, match="cannot become"):
            transcoded(objects[name], tmp_path / "made", syntax)
    compressed = tmp_path / "compressed"
    transcoded(objects["capture.1"], compressed, RLELossless)
    with pytest.raises(ValueError, match="cannot become"):
        transcoded(compressed, tmp_path / "made", ImplicitVRLittleEndian)
    assert JPEGBaseline8Bit not in SYNTAXES  # it loses something
