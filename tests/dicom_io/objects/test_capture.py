"""Key slabs as pictures: the right grey values, the outline on the right pixels, a valid object."""

from __future__ import annotations

import io
import subprocess
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.dataset import Dataset

from appliance.findings.wording import TRIAGE_ONLY, summary
from dicom_io.objects.capture import OUTLINE_COLOR, key_image, png, zoom
from dicom_io.objects.common import part10
from tests.findings_support import SIZE, SQUARE, ct_series, dciodvfy_errors, rendered, verdict_on
from tests.peers import program as tool


def colored(picture: np.ndarray) -> np.ndarray:
    """Where a picture's image part is not grey: that is the outline."""
    return (picture.max(axis=2).astype(int) - picture.min(axis=2)) > 60


def test_the_window_is_the_brain_window() -> None:
    hu = np.full((512, 512), -1024.0, np.float32)
    hu[:, 100:200], hu[:, 200:300], hu[:, 300:] = 40.0, 60.0, 1000.0
    picture = key_image(hu, (), ())
    # PS3.3 C.11.2.1.2.1 with center 40 and width 80: 0.5 + 0.5/79 at 40 HU, above 79 HU white.
    assert [int(picture[5, column, 0]) for column in (50, 300, 500, 900)] == [0, 129, 194, 255]


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([64, 256, 512, 700]),
    st.floats(0.2, 0.8),
    st.floats(0.2, 0.8),
    st.floats(0.05, 0.15),
)
def test_the_outline_is_drawn_where_it_is_and_nowhere_else(size: int, x: float, y: float, r: float) -> None:
    left, top, right, bottom = ((v * size) for v in (x - r, y - r, x + r, y + r))
    outline = ((left, top), (right, top), (right, bottom), (left, bottom))
    factor = zoom(size)
    picture = key_image(np.full((size, size), 35, np.float32), (outline,), ())
    drawn = colored(picture[: size * factor])
    rows, columns = np.nonzero(drawn)
    # In source pixels, back through the enlargement (pixel centres at integers).
    rows, columns = (rows + 0.5) / factor - 0.5, (columns + 0.5) / factor - 0.5
    tolerance = 3.5 / factor  # half the line's width, antialiased
    assert rows.min() == pytest.approx(top, abs=tolerance) and rows.max() == pytest.approx(bottom, abs=tolerance)
    assert columns.min() == pytest.approx(left, abs=tolerance)
    assert columns.max() == pytest.approx(right, abs=tolerance)
    distance = np.minimum.reduce([abs(rows - top), abs(rows - bottom), abs(columns - left), abs(columns - right)])
    assert distance.max() < tolerance


def test_the_banner_covers_none_of_the_image_and_long_lines_are_broken() -> None:
    hu = np.full((512, 512), 35, np.float32)
    bare, bannered = key_image(hu, (), ()), key_image(hu, (), ("Suspected", "word " * 60))
    np.testing.assert_array_equal(bare[:1024], bannered[:1024])
    strip = bannered[1024:]
    assert strip.shape[0] > 4 * 34  # the long line takes more than one
    assert (strip == np.array(OUTLINE_COLOR)).all(axis=2).any()  # the first line stands out
    assert not (strip[:, -10:] > 30).any() and not (strip[-10:] > 30).any()  # nothing runs over the edge


def test_a_png_holds_the_same_picture() -> None:
    picture = key_image(np.full((64, 64), 35, np.float32), (SQUARE,), ("a",))
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png(picture)))), picture)


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, Dataset, Path]:
    folder = tmp_path_factory.mktemp("series")
    series = ct_series(folder)
    path = folder / "capture.object"
    path.write_bytes(part10(rendered(series, verdict_on(series), "capture.1")))
    return pydicom.dcmread(path), series.header(), path


def test_the_capture_is_valid(captured: tuple[Dataset, Dataset, Path]) -> None:
    assert dciodvfy_errors(captured[2]) == []


def test_it_says_what_it_is(captured: tuple[Dataset, Dataset, Path]) -> None:
    made, source, _ = captured
    assert list(made.ImageType) == ["DERIVED", "SECONDARY"]
    assert (made.ConversionType, made.Modality, made.BurnedInAnnotation) == ("WSD", "OT", "NO")
    assert "FrameOfReferenceUID" not in made and "ImagePositionPatient" not in made
    assert list(made.PatientOrientation) == ["L", "P"]
    assert made.LossyImageCompression == "00"
    assert "research use, not cleared" in made.ImageComments
    [reference] = made.SourceImageSequence
    assert reference.ReferencedSOPClassUID == source.SOPClassUID
    assert (made.SeriesNumber, made.InstanceNumber, made.SeriesDescription) == (
        9012,
        2,
        "ich_reference key images (unverified)",
    )


def test_another_reader_sees_the_outline_at_the_lesion(captured: tuple[Dataset, Dataset, Path], tmp_path: Path) -> None:
    target = tmp_path / "seen.ppm"
    subprocess.run([tool("dcm2pnm"), "+op", str(captured[2]), str(target)], check=True, capture_output=True)
    seen = np.asarray(Image.open(target))
    np.testing.assert_array_equal(seen, captured[0].pixel_array)
    factor = zoom(SIZE)
    for column, row in SQUARE:
        assert tuple(seen[round((row + 0.5) * factor), round((column + 0.5) * factor)]) == OUTLINE_COLOR


def test_a_source_that_once_was_lossy_stays_marked(tmp_path: Path) -> None:
    def lossy(ds: Dataset) -> None:
        ds.LossyImageCompression, ds.LossyImageCompressionRatio = "01", "12.5"
        ds.LossyImageCompressionMethod = "ISO_10918_1"

    series = ct_series(tmp_path, change=lossy, count=3)
    path = tmp_path / "capture.object"
    path.write_bytes(part10(rendered(series, verdict_on(series), "capture.1")))
    made = pydicom.dcmread(path)
    assert (made.LossyImageCompression, made.LossyImageCompressionRatio) == ("01", 12.5)
    assert dciodvfy_errors(path) == []


def test_no_patient_identity_is_burned_in(tmp_path: Path) -> None:
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
    one = ct_series(tmp_path / "one", name="Doe^Jane", count=3)
    other = ct_series(tmp_path / "other", name="Roe^Richard", count=3, change=lambda ds: setattr(ds, "PatientID", "X"))
    pictures = [rendered(series, verdict_on(series), "capture.1").PixelData for series in (one, other)]
    assert pictures[0] == pictures[1]


@pytest.mark.parametrize("positive", [True, False])
def test_the_summary_is_a_valid_picture_that_names_nobody(positive: bool, tmp_path: Path) -> None:
    series = ct_series(tmp_path)
    verdict = verdict_on(series, positive=positive)
    made = rendered(series, verdict, "capture.summary")
    path = tmp_path / "summary.object"
    path.write_bytes(part10(made))
    assert dciodvfy_errors(path) == []
    slabs = [verdict.slabs[index].sop_instance_uid for index in verdict.key_slabs]
    assert [one.ReferencedSOPInstanceUID for one in made.get("SourceImageSequence", [])] == slabs
    picture = made.pixel_array
    assert picture.shape[1] == 1024
    yellow = (picture[..., 0] > 200) & (picture[..., 1] > 150) & (picture[..., 2] < 60)
    assert yellow[60 : 1024 // 3].any() == positive  # outlines, where else are lines in white
    assert made.PatientOrientation in ("", None)
    said = " ".join(summary(verdict))
    for part in (verdict.notice, TRIAGE_ONLY, *verdict.limitations):
        assert part in said
    assert ("No haemorrhage found" in said) != positive
    for part in (series.header().PatientID, str(series.header().PatientName), series.header().AccessionNumber):
        assert part not in said
