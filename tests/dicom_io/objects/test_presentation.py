"""The presentation state judged and applied by DCMTK, and its text held against the image that it stands on."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset

from appliance.ledger.records import Verdict
from dicom_io.objects.capture import WINDOW_CENTER, WINDOW_WIDTH
from dicom_io.objects.common import part10
from dicom_io.objects.presentation import text_box
from tests.findings_support import Series, ct_series, dciodvfy_errors, rendered, simulated, verdict_on
from tests.peers import program as tool

pytestmark = pytest.mark.slow  # a head, simulated once


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Series, Verdict, list[Path]]:
    folder = tmp_path_factory.mktemp("head")
    series, verdict = simulated(folder)
    paths = [folder / f"presentation.{number}" for number in range(1, len(verdict.key_slabs) + 1)]
    for path in paths:
        path.write_bytes(part10(rendered(series, verdict, path.name)))
    return series, verdict, paths


def test_it_is_valid_for_both_validators(made: tuple[Series, Verdict, list[Path]]) -> None:
    assert made[2]
    for path in made[2]:
        assert dciodvfy_errors(path) == []
        done = subprocess.run([tool("dcmpschk"), str(path)], capture_output=True, text=True, timeout=60)
        assert "Test passed" in done.stdout + done.stderr


def test_each_shows_its_key_slab_whole_with_its_outlines(made: tuple[Series, Verdict, list[Path]]) -> None:
    series, verdict, paths = made
    for number, (path, index) in enumerate(zip(paths, verdict.key_slabs, strict=True), start=1):
        ds, slab = pydicom.dcmread(path), verdict.slabs[index]
        [referenced] = ds.ReferencedSeriesSequence
        assert referenced.SeriesInstanceUID == verdict.series_instance_uid
        [annotation] = ds.GraphicAnnotationSequence
        for item in (referenced.ReferencedImageSequence, annotation.ReferencedImageSequence):
            assert [one.ReferencedSOPInstanceUID for one in item] == [slab.sop_instance_uid]
        source = pydicom.dcmread(series.source(slab.sop_instance_uid), stop_before_pixels=True)
        [area] = ds.DisplayedAreaSelectionSequence
        assert list(area.DisplayedAreaTopLeftHandCorner) == [1, 1]
        assert list(area.DisplayedAreaBottomRightHandCorner) == [source.Columns, source.Rows]
        assert list(area.PresentationPixelSpacing) == list(source.PixelSpacing)
        assert slab.outlines and len(annotation.GraphicObjectSequence) == len(slab.outlines)
        for drawn, outline in zip(annotation.GraphicObjectSequence, slab.outlines, strict=True):
            points = np.array(drawn.GraphicData).reshape(-1, 2)
            # The centre of the first pixel is 0.5\0.5; a closed polyline ends where it starts.
            np.testing.assert_allclose(points, np.array([*outline, outline[0]]) + 0.5, atol=1e-3)
            assert (drawn.GraphicType, drawn.GraphicAnnotationUnits) == ("POLYLINE", "PIXEL")
            assert drawn.NumberOfGraphicPoints == len(points)
        assert ds.InstanceNumber == number


def test_the_text_says_it_all_and_stands_on_air(made: tuple[Series, Verdict, list[Path]]) -> None:
    series, verdict, paths = made
    for path, index in zip(paths, verdict.key_slabs, strict=True):
        slab = verdict.slabs[index]
        [text] = pydicom.dcmread(path).GraphicAnnotationSequence[0].TextObjectSequence
        said = " ".join(str(text.UnformattedTextValue).split())
        for part in ("Haemorrhage suspected", f"{slab.probabilities['any']:.3f}", "unverified", verdict.notice):
            assert part in said
        (left, top), (right, bottom) = text.BoundingBoxTopLeftHandCorner, text.BoundingBoxBottomRightHandCorner
        assert 0 <= left < right <= 1 and 0 <= top < bottom <= 1 and text.BoundingBoxAnnotationUnits == "DISPLAY"
        hu = series.hu(slab.sop_instance_uid, slab.frame)
        rows, columns = hu.shape
        below = hu[round(top * rows) : round(bottom * rows), round(left * columns) : round(right * columns)]
        assert (below < -200).mean() > 0.7  # black in the brain window
        first = below[: len(below) // 3]
        assert (first < -200).mean() > 0.9


def test_text_and_outlines_have_a_rim_that_tells_them_from_bone(made: tuple[Series, Verdict, list[Path]]) -> None:
    [annotation] = pydicom.dcmread(made[2][0]).GraphicAnnotationSequence
    [text] = annotation.TextObjectSequence
    assert (text.AnchorPointVisibility, text.AnchorPointAnnotationUnits) == ("N", "DISPLAY")
    styles = [text.TextStyleSequence, *(one.LineStyleSequence for one in annotation.GraphicObjectSequence)]
    assert len(styles) > 1
    for [style] in styles:
        color = style.get("TextColorCIELabValue") or style.PatternOnColorCIELabValue
        assert (style.ShadowStyle, style.ShadowOpacity) == ("OUTLINED", 1)
        assert np.hypot(style.ShadowOffsetX, style.ShadowOffsetY) > 0  # its width
        assert style.ShadowColorCIELabValue[0] < 100 < 0x6000 < color[0]  # L* of 0 to 100 as 0 to 65535


@pytest.mark.parametrize(("rows", "columns", "side"), [(0, 1, "RIGHT"), (1, 0, "LEFT"), (1, 1, "RIGHT")])
def test_the_darkest_corner_is_found(rows: int, columns: int, side: str) -> None:
    hu = np.full((100, 100), 1000, np.float32)
    hu[50 * rows : 50 * rows + 50, 50 * columns : 50 * columns + 50] = -1000
    (left, top, right, bottom), flush = text_box(hu, 8)
    assert flush == side
    assert (hu[int(top * 100) : int(bottom * 100), int(left * 100) : int(right * 100)] == -1000).all()


def test_dcmtk_shows_the_image_in_the_brain_window(made: tuple[Series, Verdict, list[Path]], tmp_path: Path) -> None:
    series, verdict, paths = made
    slab = verdict.slabs[verdict.key_slabs[0]]
    target = tmp_path / "seen.pgm"
    command = [tool("dcmp2pgm"), "-p", str(paths[0]), str(series.source(slab.sop_instance_uid)), str(target)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    seen = np.asarray(Image.open(target)).astype(int)
    hu = series.hu(slab.sop_instance_uid, slab.frame)
    # PS3.3 C.11.2.1.2.1
    expected = np.clip(((hu - (WINDOW_CENTER - 0.5)) / (WINDOW_WIDTH - 1) + 0.5) * 255, 0, 255)
    assert seen.shape == hu.shape
    assert abs(seen - expected).max() <= 2


def test_dcmtk_reads_the_outlines_and_the_text(made: tuple[Series, Verdict, list[Path]], tmp_path: Path) -> None:
    series, verdict, paths = made
    for path, index in zip(paths, verdict.key_slabs, strict=True):
        slab = verdict.slabs[index]
        command = [tool("dcmp2pgm"), "-v", "-p", str(path), str(series.source(slab.sop_instance_uid)), "/dev/null"]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
        said = done.stdout + done.stderr
        drawn = re.findall(r"points=(\d+) type=polyline filled=no units=pixel\s+I:\s+coordinates: (.*)", said)
        assert len(drawn) == len(slab.outlines)
        for (count, points), outline in zip(drawn, slab.outlines, strict=True):
            read = np.array([pair.split("\\") for pair in points.rstrip(", ").split(", ")], dtype=float)
            assert len(read) == int(count)
            np.testing.assert_allclose(read, np.array([*outline, outline[0]]) + 0.5, atol=1e-3)
        assert "units=display" in said and "Haemorrhage suspected" in said


def test_a_key_slab_without_an_outline_has_its_text(tmp_path: Path) -> None:
    series = ct_series(tmp_path)
    path = tmp_path / "presentation.object"
    path.write_bytes(part10(rendered(series, verdict_on(series), "presentation.2")))
    [annotation] = pydicom.dcmread(path).GraphicAnnotationSequence
    assert "GraphicObjectSequence" not in annotation and len(annotation.TextObjectSequence) == 1
    assert dciodvfy_errors(path) == []


def test_the_rescale_is_the_images_own(tmp_path: Path) -> None:
    def steep(ds: Dataset) -> None:
        ds.RescaleSlope, ds.RescaleIntercept = "0.5", "-12.25"

    series = ct_series(tmp_path, change=steep, count=3)
    made = rendered(series, verdict_on(series), "presentation.1")
    assert (made.RescaleSlope, made.RescaleIntercept) == (0.5, -12.25)
