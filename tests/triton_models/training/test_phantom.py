"""The phantom generator: what it draws, and the studies that it writes."""

from __future__ import annotations

import json
import shutil
import subprocess
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray

from triton_models.training.phantom import SUBTYPES, Phantom, simulate, write_study

SEEDS = (3, 8)
SIZE, THICKNESS_MM = 128, 7.0  # enough for a shape, quick enough for every day


@cache
def phantom(seed: int, bleed: str | None, volume_ml: float | None = None) -> Phantom:
    return simulate(seed, bleed=bleed, volume_ml=volume_ml, size=SIZE, thickness_mm=THICKNESS_MM)


def _pairs(bleed: str) -> list[tuple[Phantom, Phantom, NDArray[np.bool_]]]:
    """The same people with a bleed and without, and where the blood is."""
    return [(phantom(s, bleed), phantom(s, None), phantom(s, bleed).mask > 0) for s in SEEDS]


def _to_bone_mm(clean: Phantom) -> NDArray[np.float32]:
    """Distance of every pixel to the nearest bone in its slice."""
    near = []
    for hu in clean.hu:
        _, parts, statistics, _ = cv2.connectedComponentsWithStats((hu > 250).astype(np.uint8))
        skull = (parts > 0) & (statistics[parts, cv2.CC_STAT_AREA] > 40)  # a calcified plexus is no skull
        near.append(np.minimum(cv2.distanceTransform((~skull).astype(np.uint8), cv2.DIST_L2, 5), SIZE))
    return np.stack(near) * np.float32(clean.spacing_mm[0])


def test_one_seed_one_phantom_bit_for_bit() -> None:
    first, second = (simulate(5, bleed="subdural", size=64, thickness_mm=10) for _ in range(2))
    assert np.array_equal(first.hu, second.hu)
    assert np.array_equal(first.mask, second.mask)
    assert first.volume_ml == second.volume_ml
    assert not np.array_equal(first.hu, simulate(6, bleed="subdural", size=64, thickness_mm=10).hu)


def test_a_head_has_a_heads_attenuations() -> None:
    for seed in SEEDS:
        hu = phantom(seed, None).hu
        assert hu.min() >= -1024 and hu.max() <= 3071
        middle = hu[len(hu) // 2]
        bone = hu > 600
        assert 0.01 < bone.mean() < 0.2
        assert np.median(middle[:8]) == pytest.approx(-1000, abs=30)  # air in front of the face
        brain = hu[9:15, 40:-40, 40:-40]
        assert 18 < np.median(brain) < 45


def test_without_a_bleed_there_is_no_truth_of_one() -> None:
    clean = phantom(SEEDS[0], None)
    assert not clean.mask.any()
    assert clean.volume_ml == {}


@pytest.mark.parametrize("bleed", SUBTYPES)
def test_blood_is_dense_and_marked_as_its_subtype(bleed: str) -> None:
    for bled, clean, blood in _pairs(bleed):
        assert set(np.unique(bled.mask)) == {0, SUBTYPES.index(bleed) + 1}
        assert 38 < np.median(bled.hu[blood]) < 95
        assert np.median(bled.hu[blood]) > np.median(clean.hu[blood]) + 8
        elsewhere = cv2.dilate(blood.any(axis=0).astype(np.uint8), np.ones((3, 3), np.uint8)) == 0
        assert np.median(np.abs(bled.hu - clean.hu)[:, elsewhere]) == 0  # the same person otherwise


@pytest.mark.parametrize("bleed", SUBTYPES)
def test_the_stated_volume_is_the_masks(bleed: str) -> None:
    bled = phantom(SEEDS[0], bleed)
    voxel_mm3 = bled.spacing_mm[0] * bled.spacing_mm[1] * bled.step
    assert bled.volume_ml[bleed] == pytest.approx(np.count_nonzero(bled.mask) * voxel_mm3 / 1000)
    assert bled.volume_ml[bleed] > 3


def test_ventricular_and_subarachnoid_blood_replaces_fluid() -> None:
    for bleed in ("intraventricular", "subarachnoid"):
        for _, clean, blood in _pairs(bleed):
            brain = np.median(clean.hu[9:15, 40:-40, 40:-40])
            assert np.median(clean.hu[blood]) < brain - 5


def test_ventricular_blood_is_deep_in_the_head() -> None:
    for _, clean, blood in _pairs("intraventricular"):
        assert np.percentile(_to_bone_mm(clean)[blood], 5) > 12


def test_parenchymal_blood_is_in_the_brain_with_a_dark_rim() -> None:
    for bled, clean, blood in _pairs("intraparenchymal"):
        assert np.percentile(_to_bone_mm(clean)[blood], 10) > 1
        slab = int(blood.sum(axis=(1, 2)).argmax())
        outer = cv2.dilate(blood[slab].astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
        inner = cv2.dilate(blood[slab].astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
        rim = outer & ~inner & (np.abs(clean.hu[slab]) < 70)
        assert np.mean(bled.hu[slab][rim]) < np.mean(clean.hu[slab][rim]) + 2


@pytest.mark.parametrize("bleed", ["epidural", "subdural"])
def test_blood_on_the_brain_lies_against_the_skull(bleed: str) -> None:
    for bled, clean, blood in _pairs(bleed):
        distance = _to_bone_mm(clean)
        for slab in np.flatnonzero(blood.sum(axis=(1, 2)) > 20):
            assert distance[slab][blood[slab]].min() < 4
        assert np.median(distance[blood]) < 15
        columns = np.flatnonzero(blood.any(axis=(0, 1)))
        middle = np.average(np.arange(SIZE), weights=(bled.hu > 600).sum(axis=(0, 1)))
        assert columns[-1] < middle + 12 or columns[0] > middle - 12  # one side only


def test_an_epidural_is_thicker_and_shorter_than_a_subdural_of_the_same_volume() -> None:
    def ratio(bleed: str) -> float:
        ratios = []
        for seed in SEEDS:
            bled, clean = phantom(seed, bleed, 30.0), phantom(seed, None)
            blood = bled.mask > 0
            slab = int(blood.sum(axis=(1, 2)).argmax())
            thick = np.percentile(_to_bone_mm(clean)[slab][blood[slab]], 98)
            rows, columns = np.nonzero(blood[slab])
            ratios.append(float(thick / (np.hypot(np.ptp(rows), np.ptp(columns)) * bled.spacing_mm[0])))
        return float(np.mean(ratios))

    assert ratio("epidural") > 1.4 * ratio("subdural")


@pytest.mark.parametrize("bleed", SUBTYPES)
def test_more_blood_when_more_is_asked_for(bleed: str) -> None:
    small, large = (
        sum(simulate(s, bleed=bleed, volume_ml=v, size=96, thickness_mm=8).volume_ml.get(bleed, 0) for s in SEEDS)
        for v in (2.0, 25.0)
    )
    assert 0 < small < 0.6 * large


def test_thin_slices_show_the_same_head_more_finely_and_more_noisily() -> None:
    thick, thin = (simulate(4, thickness_mm=t, size=64) for t in (4.0, 2.0))
    assert len(thin.hu) == 2 * len(thick.hu)
    assert thin.step == 2.0
    assert thin.positions[1][2] - thin.positions[0][2] == pytest.approx(2.0)
    joined = (thin.hu[::2] + thin.hu[1::2])[: len(thick.hu)] / 2
    assert np.corrcoef(joined.ravel(), thick.hu.ravel())[0, 1] > 0.97


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match="extradural"):
        simulate(1, bleed="extradural")
    with pytest.raises(ValueError, match="thickness"):
        simulate(1, thickness_mm=0)
    with pytest.raises(ValueError, match="mL"):
        simulate(1, bleed="epidural", volume_ml=-1, size=64)


def test_a_study_says_what_the_phantom_is(tmp_path: Path) -> None:
    bled = simulate(12, bleed="epidural", size=64)
    paths = write_study(bled, tmp_path, patient_id="P-1", accession_number="ACC-1")
    instances = [pydicom.dcmread(path) for path in paths]
    assert len(instances) == len(bled.hu)
    assert len({i.SOPInstanceUID for i in instances}) == len(instances)
    assert len({(i.StudyInstanceUID, i.SeriesInstanceUID, i.FrameOfReferenceUID) for i in instances}) == 1
    for n, instance in enumerate(instances):
        hu = instance.pixel_array * float(instance.RescaleSlope) + float(instance.RescaleIntercept)
        assert np.abs(hu - bled.hu[n]).max() <= 0.5
        assert tuple(instance.ImagePositionPatient) == pytest.approx(bled.positions[n])
        assert tuple(instance.PixelSpacing) == pytest.approx(bled.spacing_mm, abs=1e-5)
        assert instance.file_meta.MediaStorageSOPInstanceUID == instance.SOPInstanceUID
    first = instances[0]
    assert (first.PatientID, first.AccessionNumber) == ("P-1", "ACC-1")
    assert (first.Modality, first.BodyPartExamined, first.KVP) == ("CT", "HEAD", 120)
    assert "SIMULATED" in first.ImageComments
    born, scanned = first.PatientBirthDate, first.StudyDate
    years = int(scanned[:4]) - int(born[:4]) - (scanned[4:] < born[4:])
    assert first.PatientAge == f"{years:03d}Y"
    truth = json.loads((tmp_path / "truth.json").read_text(encoding="utf-8"))
    with np.load(tmp_path / "truth.npz") as stored:
        mask = stored["mask"]
    voxel_ml = float(first.PixelSpacing[0]) * float(first.PixelSpacing[1]) * float(first.SliceThickness) / 1000
    assert truth["volume_ml"]["epidural"] == pytest.approx((mask == 1).sum() * voxel_ml, rel=0.01)
    assert truth["instance_numbers"]["epidural"] == [n + 1 for n in range(len(mask)) if mask[n].any()]
    assert truth["study_instance_uid"] == first.StudyInstanceUID


def test_writing_again_writes_the_same_bytes_and_another_study_has_other_uids(tmp_path: Path) -> None:
    clean = simulate(12, size=64, thickness_mm=10)
    once, again = write_study(clean, tmp_path / "once"), write_study(clean, tmp_path / "again")
    assert [p.read_bytes() for p in once] == [p.read_bytes() for p in again]
    other = write_study(simulate(12, bleed="epidural", size=64, thickness_mm=10), tmp_path / "other")
    uids = [pydicom.dcmread(p, stop_before_pixels=True) for p in (once[0], other[0])]
    assert uids[0].StudyInstanceUID != uids[1].StudyInstanceUID
    assert uids[0].SOPInstanceUID != uids[1].SOPInstanceUID


@pytest.mark.parametrize("bleed", [None, *SUBTYPES])
def test_dciodvfy_finds_no_error(bleed: str | None, tmp_path: Path) -> None:
    if shutil.which("dciodvfy") is None:
        pytest.skip("dciodvfy (dicom3tools) is not installed")
    paths = write_study(simulate(7, bleed=bleed, size=64, thickness_mm=10), tmp_path)
    for path in (paths[0], paths[-1]):
        said = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True, check=False)
        assert "CTImage" in said.stdout + said.stderr
        assert "Error" not in said.stdout + said.stderr, said.stderr
