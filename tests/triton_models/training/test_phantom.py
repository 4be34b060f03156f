"""The phantom generator: what it draws, and the studies that it writes."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest

from dicom_io.header import read_header
from dicom_io.volume import assemble, planes_of
from triton_models.training.phantom import SUBTYPES, Phantom, simulate, study, write_study
from triton_models.training.scanner import PADDING_HU
from triton_models.training.vendors import VENDORS

pytestmark = pytest.mark.slow

SEED = 5


@cache
def phantom(bleed: str | None = None, **how: Any) -> Phantom:
    return simulate(SEED, bleed=bleed, **{"size": 128, "thickness_mm": 7.0, **how})


def test_one_seed_one_phantom_bit_for_bit() -> None:
    first, second = phantom("subdural"), simulate(SEED, bleed="subdural", size=128, thickness_mm=7.0)
    assert np.array_equal(first.hu, second.hu)
    assert np.array_equal(first.mask, second.mask)
    assert first.volume_ml == second.volume_ml


def test_two_studies_of_one_head_leave_it_as_it_was() -> None:
    first, other = (study(seed, person=2, positive=seed == 2, size=32, thickness_mm=7.0) for seed in (2, 3))
    assert (first.age, first.sex, other.seed) == (other.age, other.sex, 3)
    assert first.volume_ml and not other.volume_ml
    alone = study(2, positive=True, size=32, thickness_mm=7.0)
    assert np.array_equal(alone.hu, first.hu) and alone.volume_ml == first.volume_ml


def test_a_head_has_a_heads_attenuations() -> None:
    hu = phantom().hu
    assert hu.min() >= -1024 and hu.max() <= 3071
    assert 0.01 < (hu > 600).mean() < 0.2
    middle = hu[len(hu) // 2]
    assert np.median(middle[:8]) == pytest.approx(-1000, abs=30)  # air in front of the face
    assert 18 < np.median(middle[50:78, 50:78]) < 45


def test_without_a_bleed_there_is_no_truth_of_one() -> None:
    clean = phantom()
    assert not clean.mask.any()
    assert clean.volume_ml == {} and clean.bleeds == ()


@pytest.mark.parametrize("bleed", ["intraparenchymal", "subdural"])
def test_blood_is_dense_and_marked_as_its_subtype(bleed: str) -> None:
    """The other subtypes are looked at on the head itself, in test_haemorrhage.py."""
    bled, clean = phantom(bleed), phantom()
    blood = bled.mask > 0
    assert set(np.unique(bled.mask)) == {0, SUBTYPES.index(bleed) + 1}
    assert np.median(bled.hu[blood]) > np.median(clean.hu[blood]) + 8
    assert np.median(np.abs(bled.hu - clean.hu)[~blood]) < 0.01  # the same person otherwise
    voxel_ml = bled.spacing_mm[0] * bled.spacing_mm[1] * bled.step / 1000
    assert bled.volume_ml[bleed] == pytest.approx(np.count_nonzero(bled.mask) * voxel_ml, rel=0.15)
    assert bled.volume_ml[bleed] == pytest.approx(bled.bleeds[0].volume_ml, rel=0.15)


def test_thin_slices_show_the_same_head_more_finely() -> None:
    thick, thin = phantom(thickness_mm=4.0, size=64), phantom(thickness_mm=2.0, size=64)
    assert len(thin.hu) == 2 * len(thick.hu)
    assert thin.positions[1][2] - thin.positions[0][2] == pytest.approx(2.0)
    joined = (thin.hu[::2] + thin.hu[1::2]) / 2
    assert np.corrcoef(joined.ravel(), thick.hu.ravel())[0, 1] > 0.97


def test_a_tilted_gantry_shears_the_stack_and_the_head_stays_where_it_is(tmp_path: Path) -> None:
    straight, tilted = phantom("intraparenchymal"), phantom("intraparenchymal", tilt_deg=20.0)
    headers = [read_header(path) for path in write_study(tilted, tmp_path)]
    volume = assemble([plane for header in headers for plane in planes_of(header)])
    assert volume.tilt_degrees == pytest.approx(20, abs=0.1)
    assert tilted.orientation[5] < 0  # as a scanner that calls it +20 writes it
    assert not volume.gaps
    assert np.diff(volume.offsets) == pytest.approx(tilted.step, abs=0.01)

    def centre(one: Phantom) -> np.ndarray[Any, Any]:
        slices, rows, columns = (axis.mean() for axis in np.nonzero(one.mask))
        row, column = np.array(one.orientation[:3]), np.array(one.orientation[3:])
        at = np.array([np.interp(slices, range(len(one.positions)), axis) for axis in zip(*one.positions, strict=True)])
        return np.asarray(at + columns * one.spacing_mm[1] * row + rows * one.spacing_mm[0] * column)

    assert centre(tilted) == pytest.approx(centre(straight), abs=2.5)
    assert tilted.volume_ml["intraparenchymal"] == pytest.approx(straight.volume_ml["intraparenchymal"], rel=0.1)


def test_a_study_is_wholly_drawn_from_its_seed() -> None:
    once, again = (study(31, positive=True, size=64, thickness_mm=7.0) for _ in range(2))
    assert np.array_equal(once.hu, again.hu) and once.look_alikes == again.look_alikes
    assert once.bleeds and once.vendor in VENDORS and not VENDORS[once.vendor].unseen
    other = study(31, positive=False, family="unseen", size=64, thickness_mm=7.0)
    assert VENDORS[other.vendor].unseen and not other.mask.any()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"bleed": "extradural"}, "extradural"),
        ({"thickness_mm": 0}, "thickness"),
        ({"look_alikes": ["halo"]}, "halo"),
        ({"vendor": "acme"}, "acme"),
        ({"tilt_deg": 45}, "tilts"),
        ({"bleed": "epidural", "volume_ml": -1, "size": 64}, "mL"),
    ],
)
def test_what_cannot_be_drawn_is_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        simulate(1, **arguments)


@pytest.mark.parametrize("name", VENDORS)
def test_every_vendor_writes_the_same_head(name: str, tmp_path: Path) -> None:
    """In its own words and its own numbers: what is read back is what was simulated."""
    bled, vendor = replace(phantom("intraparenchymal"), vendor=name), VENDORS[name]
    hu = bled.hu.copy()
    if vendor.padding is not None:
        hu[:, :10, :10] = PADDING_HU
    paths = write_study(replace(bled, hu=hu), tmp_path, patient_id="P-1", accession_number="ACC-1")
    instances = [pydicom.dcmread(path) for path in paths]
    assert len({i.SOPInstanceUID for i in instances}) == len(instances) == len(bled.hu)
    assert len({(i.StudyInstanceUID, i.SeriesInstanceUID, i.FrameOfReferenceUID) for i in instances}) == 1
    for n, instance in enumerate(instances):
        stored = instance.pixel_array
        padding = hu[n] <= PADDING_HU
        assert (
            np.abs(stored * float(instance.RescaleSlope) + float(instance.RescaleIntercept) - hu[n])[~padding].max()
            <= 0.5
        )
        assert (stored[padding] == vendor.padding).all()
        assert tuple(instance.ImagePositionPatient) == pytest.approx(bled.positions[n])
        assert tuple(instance.PixelSpacing) == pytest.approx(bled.spacing_mm, abs=1e-5)
    first = instances[0]
    assert (first.PatientID, first.AccessionNumber, first.Manufacturer) == ("P-1", "ACC-1", vendor.manufacturer)
    assert "SIMULATED" in first.ImageComments
    assert first.PatientBirthDate or first.PatientAge
    truth = json.loads((tmp_path / "truth.json").read_text(encoding="utf-8"))
    with np.load(tmp_path / "truth.npz") as stored_truth:
        bleeding = stored_truth["mask"].any(axis=(1, 2))
    assert sorted(truth["instance_numbers"]["intraparenchymal"]) == sorted(
        instance.InstanceNumber for instance, one in zip(instances, bleeding, strict=True) if one
    )
    assert truth["study_instance_uid"] == first.StudyInstanceUID


def test_writing_again_writes_the_same_bytes_and_another_study_has_other_uids(tmp_path: Path) -> None:
    once, again = (write_study(phantom(), tmp_path / name) for name in ("once", "again"))
    assert [p.read_bytes() for p in once] == [p.read_bytes() for p in again]
    other = write_study(phantom("subdural"), tmp_path / "other")
    uids = [pydicom.dcmread(p, stop_before_pixels=True) for p in (once[0], other[0])]
    assert uids[0].StudyInstanceUID != uids[1].StudyInstanceUID
    assert uids[0].SOPInstanceUID != uids[1].SOPInstanceUID


@pytest.mark.parametrize("name", VENDORS)
def test_dciodvfy_finds_no_error(name: str, tmp_path: Path) -> None:
    if shutil.which("dciodvfy") is None:
        pytest.skip("dciodvfy (dicom3tools) is not installed")
    look_alikes = ("contrast",) if name == "ge" else ()
    paths = write_study(replace(phantom("subdural"), vendor=name, look_alikes=look_alikes), tmp_path)
    for path in (paths[0], paths[-1]):
        said = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True, check=False)
        assert "CTImage" in said.stdout + said.stderr
        assert "Error" not in said.stdout + said.stderr, said.stderr
