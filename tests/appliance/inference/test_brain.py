"""How much brain a volume holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from appliance.inference.brain import Brain, brain_area_mm2
from appliance.inference.slabs import plan_slabs, slab_hu
from dicom_io.errors import HeaderError
from dicom_io.header import read_header
from dicom_io.volume import Plane, Volume, assemble, planes_of

Loaded = tuple[Volume, Callable[[int], NDArray[np.float32]]]


def load(folder: Path, series_number: int | None = None) -> Loaded:
    """A series' volume, and its planes in HU by pydicom."""
    planes: list[Plane] = []
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        try:
            header = read_header(path)
        except HeaderError:
            continue
        if series_number is None or header.series_number == series_number:
            planes += planes_of(header)
            files[header.sop_instance_uid] = path
    volume = assemble(planes)

    def hu_of_plane(index: int) -> NDArray[np.float32]:
        dataset = pydicom.dcmread(files[volume.planes[index].sop_instance_uid])
        hu: NDArray[np.float32] = dataset.pixel_array.astype(np.float32)
        return hu * float(dataset.get("RescaleSlope", 1)) + float(dataset.get("RescaleIntercept", 0))

    return volume, hu_of_plane


def brain_volume_ml(hu_of_plane: Callable[[int], NDArray[np.float32]], volume: Volume) -> float:
    """As it is added up from slabs; none of it lies outside the field."""
    areas = {
        plan: brain_area_mm2(
            slab_hu(map(hu_of_plane, plan.members), "slab"), volume.planes[plan.representative].geometry.spacing, 256
        )
        for plan in plan_slabs(volume, 5.0)
    }
    assert not any(area.unseen for area in areas.values())
    return sum(area.seen * plan.thickness_mm / 1000 for plan, area in areas.items())


def head(radius_mm: float, inside_hu: float, breach_mm: float = 0.0) -> NDArray[np.float32]:
    """A slice of a round skull, 6 mm thick, in air, with pixels of half a millimetre."""
    rows, columns = (np.mgrid[:512, :512] - 255.5) / 2
    distance = np.hypot(rows, columns)
    hu = np.full((512, 512), -1000.0, np.float32)
    hu[distance < radius_mm + 10] = 40.0  # scalp
    hu[distance < radius_mm + 6] = 1000.0
    hu[(np.abs(columns) < breach_mm / 2) & (rows < 0) & (distance < radius_mm + 6)] = 40.0
    hu[distance < radius_mm] = inside_hu
    return hu


def test_a_real_head(ge_head: Path) -> None:
    volume, hu_of_plane = load(ge_head)
    assert 1000 < brain_volume_ml(hu_of_plane, volume) < 1700


@pytest.mark.parametrize("series_number", [201, 202])
def test_a_hollow_skull(philips_phantom: Path, series_number: int) -> None:
    volume, hu_of_plane = load(philips_phantom, series_number)
    assert brain_volume_ml(hu_of_plane, volume) < 20


@pytest.mark.parametrize("inside_hu", [5.0, 35.0, 75.0])
def test_a_round_skull_full_of_tissue(inside_hu: float) -> None:
    expected = np.pi * 70**2
    assert brain_area_mm2(head(70, inside_hu), (0.5, 0.5), 256).seen == pytest.approx(expected, rel=0.05)


def test_scalp_alone_is_no_brain() -> None:
    assert brain_area_mm2(head(70, -1000.0), (0.5, 0.5), 256) == Brain(0, 0)
    assert brain_area_mm2(np.full((512, 512), 40.0, np.float32), (0.5, 0.5), 256) == Brain(0, 0)


def test_the_rim_where_bone_blurs_into_air_is_no_brain() -> None:
    hollow = cv2.GaussianBlur(head(70, -1000.0), (0, 0), 5)
    assert brain_area_mm2(hollow, (0.5, 0.5), 256) == Brain(0, 0)


def test_a_burr_hole_is_closed_and_a_craniectomy_is_not() -> None:
    assert brain_area_mm2(head(70, 35.0, breach_mm=8), (0.5, 0.5), 256).seen == pytest.approx(np.pi * 70**2, rel=0.05)
    assert brain_area_mm2(head(70, 35.0, breach_mm=60), (0.5, 0.5), 256) == Brain(0, 0)


@given(down=st.integers(-70, 70), across=st.integers(-70, 70), millimetres=st.sampled_from([0.5, 0.6, 0.75, 0.9]))
def test_what_lies_outside_the_field_is_told_from_what_the_model_sees(
    down: int, across: int, millimetres: float
) -> None:
    pixels = int(140 / millimetres) * 2
    rows, columns = (np.mgrid[:pixels, :pixels] - (pixels - 1) / 2) * millimetres
    away = np.hypot(rows - down, columns - across)
    hu = np.select([away > 66, away > 60], [-1000.0, 1000.0], 35.0).astype(np.float32)
    inside = (away < 60) & (np.abs(rows) < 100) & (np.abs(columns) < 100)
    found = brain_area_mm2(hu, (millimetres, millimetres), 200)
    assert found.seen + found.unseen == pytest.approx(np.pi * 60**2, rel=0.05)  # it always reaches into the field
    assert found.seen == pytest.approx(inside.sum() * millimetres**2, abs=450)
    if max(abs(down), abs(across)) < 38:
        assert found.unseen == 0


def test_the_marrow_of_raised_arms_beside_the_head_is_no_brain_that_is_not_seen() -> None:
    rows, columns = np.mgrid[:800, :800] / 2 - 199.75
    hu = np.full((800, 800), -1000.0, np.float32)
    for across, radius in ((0, 70), (-165, 21), (165, 21)):
        away = np.hypot(rows, columns - across)
        hu[away < radius + 6] = 1000.0
        hu[away < radius] = 40.0
    found = brain_area_mm2(hu, (0.5, 0.5), 256)
    assert found.unseen == 0
    assert found.seen == pytest.approx(np.pi * 70**2, rel=0.05)
