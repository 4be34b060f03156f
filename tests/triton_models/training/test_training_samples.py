"""What the network is taught from: slabs as the appliance makes them, with their neighbours and their truth."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from appliance.inference.preprocess import model_input
from triton_models.training import samples
from triton_models.training.haemorrhage import SUBTYPES
from triton_models.training.samples import (
    CALIBRATION,
    CROP,
    KERNELS_READ,
    REFUSED_KINDS,
    TRAIN,
    Heads,
    Store,
    Study,
    Variety,
    make_head,
    neighbours,
    run_input,
    slabs_of,
)
from triton_models.training.scanner import Protocol, Scan


def study(count: int, thickness_mm: float, size: int = 64, *, tilt_deg: float = 0.0) -> Study:
    """Noise, and in the middle third a block of each of two subtypes."""
    rng = np.random.default_rng(count)
    hu = rng.normal(30, 5, (count, size, size)).astype(np.float32)
    mask = np.zeros(hu.shape, dtype=np.uint8)
    third = slice(count // 3, 2 * count // 3)
    mask[third, 16:24, 16:32] = 2
    mask[third, 40:48, 16:24] = 5
    sine, cosine = np.sin(np.deg2rad(tilt_deg)), np.cos(np.deg2rad(tilt_deg))
    positions = tuple((0.0, -sine * n * thickness_mm, cosine * n * thickness_mm) for n in range(count))
    scan = Scan(hu, mask, {"intraparenchymal": 1.5}, positions, (1.0, 0.0, 0.0, 0.0, cosine, sine))
    return Study(scan, (1.0, 1.0), thickness_mm, ("pineal",))


@pytest.mark.parametrize("tilt_deg", [0.0, 18.0])
def test_a_thick_slice_is_a_slab_and_thin_ones_are_averaged(tilt_deg: float) -> None:
    thick = study(9, 5.0, tilt_deg=tilt_deg)
    slabs = slabs_of(thick)
    assert len(slabs.fields) == 9
    assert np.abs(slabs.fields[4][96:160, 96:160] - thick.scan.hu[4]).max() <= 0.5
    assert sum(slabs.thickness_mm) == pytest.approx(45)
    thin = study(40, 1.25, tilt_deg=tilt_deg)
    slabs = slabs_of(thin)
    assert len(slabs.fields) == 10
    assert np.abs(slabs.fields[3][96:160, 96:160] - thin.scan.hu[12:16].mean(axis=0)).max() <= 0.51
    assert (slabs.fields[3][:90] == -1024).all()


def test_what_a_slab_covers_of_each_subtype_is_its_share_of_the_map() -> None:
    bled = study(40, 1.25)
    slabs = slabs_of(bled)
    areas = slabs.covered.sum(axis=(2, 3)) * samples.MAP_PIXEL_MM2 / 255
    parts = bled.scan.mask.reshape(10, 4, 64, 64)
    for kind in range(len(SUBTYPES)):
        assert areas[:, kind] == pytest.approx((parts == kind + 1).sum(axis=(2, 3)).mean(axis=1), abs=0.5)
    row, column = np.argwhere(slabs.covered[5, 1] == 255).mean(axis=0)
    assert (4 * row + 1.5, 4 * column + 1.5) == pytest.approx((96 + 19.5, 96 + 23.5))


def test_a_slab_stands_between_its_neighbours_foot_to_head() -> None:
    fields = np.arange(4, dtype=np.float32)[:, None, None] * 10 + np.zeros((4, 256, 256), np.float32)
    inputs = run_input(fields)
    assert inputs.shape == (4, 9, 256, 256)
    alone = np.stack([model_input(field, (1.0, 1.0)) for field in fields])
    for n, expected in enumerate([(0, 0, 1), (0, 1, 2), (1, 2, 3), (2, 3, 3)]):
        assert np.array_equal(inputs[n], alone[list(expected)].reshape(9, 256, 256))
    assert neighbours(0, 1) == [0, 0, 0]


def test_a_head_is_kept_as_it_was_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scans = [study(9, 5.0), study(40, 1.25)]
    monkeypatch.setattr(samples, "_draw", lambda kind, seed: scans)
    for folder in ("train-1", "train-2"):
        (tmp_path / folder).mkdir()
        make_head((tmp_path / folder, TRAIN, 1, 0))
    store = Store(tmp_path, [Heads(TRAIN, 1, 1), Heads(TRAIN, 2, 1)])
    assert len(store) == 2 * 19
    assert [(first, end) for first, end, _ in store.scans] == [(0, 9), (9, 19), (19, 28), (28, 38)]
    cut = [slabs_of(scan) for scan in scans]
    fields, covered = store.run(28, 38)
    assert np.array_equal(fields, cut[1].fields) and np.array_equal(covered, cut[1].covered)
    for slab, (scan, members) in {9: (1, (0, 0, 1)), 8: (0, (7, 8, 8)), 19: (0, (0, 0, 1)), 32: (1, (3, 4, 5))}.items():
        fields, covered = store.sample(slab)
        assert np.array_equal(fields, cut[scan].fields[list(members)])
        assert np.array_equal(covered, cut[scan].covered[members[1]])
    assert store.areas_mm2[:9] == pytest.approx(cut[0].covered.sum(axis=(2, 3)) * 16 / 255, abs=0.01)
    told = json.loads((tmp_path / "train-1" / "head-00000.json").read_text(encoding="utf-8"))
    assert told["scans"][0]["look_alikes"] == ["pineal"]


def test_calibration_draws_what_would_be_read_and_training_more(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels: set[str] = set()

    def scan(rng: object, head: object, truth: object, protocol: Protocol) -> Scan:
        kernels.add(protocol.kernel)
        return study(2, 5.0).scan

    monkeypatch.setattr(samples.anatomy, "draw", lambda *_: SimpleNamespace(age=80, hu=np.zeros((2, 2, 2))))
    monkeypatch.setattr(samples.lookalikes, "add", lambda *_: None)
    monkeypatch.setattr(samples.haemorrhage, "draw_study", lambda *_: None)
    monkeypatch.setattr(samples.haemorrhage, "bleed", lambda *_: None)
    monkeypatch.setattr(samples.scanner, "scan", scan)
    kinds = {kind for seed in range(150) for drawn in samples._draw(TRAIN, seed) for kind in drawn.look_alikes}
    assert kernels - set(KERNELS_READ) and kinds > set(REFUSED_KINDS)
    kernels.clear()
    kinds = {kind for seed in range(150) for drawn in samples._draw(CALIBRATION, seed) for kind in drawn.look_alikes}
    assert kernels and kernels <= set(KERNELS_READ)
    assert kinds and not kinds & set(REFUSED_KINDS)


@given(kind=st.sampled_from([TRAIN, CALIBRATION]), seed=st.integers(0, 99), count=st.integers(0, 999))
def test_heads_are_written_as_they_are_read(kind: samples.Kind, seed: int, count: int) -> None:
    heads = Heads(kind, seed, count)
    assert Heads.parse(str(heads)) == heads


@pytest.mark.parametrize(
    "text", ["", "train", "train-3", "train-:4", "train-3:", "test-3:4", "train-3:-4", "train-3:4:5"]
)
def test_heads_of_another_form_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="KIND-SEED:COUNT"):
        Heads.parse(text)


@pytest.fixture(scope="module")
def variety() -> Variety:
    return Variety(1)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), row=st.integers(26, 36), column=st.integers(28, 34))
def test_however_a_sample_is_varied_its_truth_moves_along(variety: Variety, seed: int, row: int, column: int) -> None:
    covered = np.zeros((5, 64, 64), dtype=np.uint8)
    covered[2, row : row + 4, column : column + 6] = 255
    fields = np.zeros((3, 256, 256), dtype=np.int16)
    fields[1, 4 * row : 4 * row + 16, 4 * column : 4 * column + 24] = 1000
    hu, blood = variety(np.random.default_rng(seed), fields, covered)
    assert hu.shape == (*CROP, 3) and blood.shape == (5, CROP[0] // 4, CROP[1] // 4)
    assert not blood[[0, 1, 3, 4]].any()
    level = hu[:, :, 1].max() / 2  # whatever window it was cut off at
    light = np.clip(hu[:, :, 1] - level, 0, None)
    inner = cv2.erode((blood[2] > 0.99).astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
    enlarged = np.kron(inner, np.ones((4, 4))) > 0
    assert (hu[:, :, 1][enlarged] > level).all()
    for axis in (0, 1):
        of_hu, of_map = np.indices(light.shape)[axis], np.indices(blood[2].shape)[axis]
        told = 4 * (of_map * blood[2]).sum() / blood[2].sum() + 1.5
        assert (of_hu * light).sum() / light.sum() == pytest.approx(told, abs=0.6)


def head(row: int, column: int) -> NDArray[np.int16]:
    """(3, 256, 256) HU of a round head about that place: grey within a dark seam within bone."""
    far = np.hypot(*(np.indices((256, 256)) - np.array([row, column])[:, None, None]))
    hu = np.select([far > 75, far > 69, far > 66], [-1000, 1000, 10], 34)
    return np.repeat(hu[None].astype(np.int16), 3, axis=0)


@pytest.mark.parametrize(("row", "column"), [(128, 128), (104, 150), (150, 108)])
def test_a_step_looks_at_the_head_wherever_it_lies(variety: Variety, row: int, column: int) -> None:
    fields = head(row, column)
    for seed in range(30):
        hu, _ = variety(np.random.default_rng(seed), fields, np.zeros((5, 64, 64), np.uint8))
        places = np.argwhere(hu[:, :, 1] > -300)  # the brain too: it is darker than that through no window
        if len(places) < 0.9 * hu[:, :, 1].size:  # one that was stored through a window has no air
            assert np.abs(places.mean(axis=0) - (np.array(CROP) - 1) / 2).max() < 20


def test_what_lies_beside_bone_is_shown_dark_and_bright(variety: Variety) -> None:
    fields = head(128, 128)
    covered = np.zeros((5, 64, 64), np.uint8)
    differences = []
    for seed in range(150):
        hu, blood = variety(np.random.default_rng(seed), fields, covered, (256, 256))
        assert not blood.any()
        bone = hu[:, :, 1] > 300
        if not bone.any():
            continue
        near = cv2.distanceTransform((~bone).astype(np.uint8), cv2.DIST_L2, 5)
        middle = np.argwhere(bone).mean(axis=0)
        within = np.hypot(*(np.indices(bone.shape) - middle[:, None, None])) < 60
        beside = (near > 1.5) & (near < 4) & (hu[:, :, 1] > -60)
        differences.append(np.median(hu[:, :, 1][beside]) - np.median(hu[:, :, 1][within & (near > 15)]))
    assert min(differences) < -5 and max(differences) > 12


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), row=st.integers(6, 54), column=st.integers(6, 54), share=st.floats(0.02, 1))
def test_a_scar_darkens_brain_and_neither_what_is_bright_nor_blood(
    seed: int, row: int, column: int, share: float
) -> None:
    blood = np.zeros((5, 64, 64), dtype=np.float32)
    blood[2, row : row + 3, column : column + 4] = share
    hu = np.full((256, 256, 3), 34, dtype=np.float32)
    hu[:, 120:123] = 70  # a falx
    before, outline = hu.copy(), np.zeros((256, 256), dtype=np.float32)
    samples._darken(np.random.default_rng(seed), hu, blood, outline, outline + 1)
    labelled = np.kron(blood[2] > 0, np.ones((4, 4))) > 0
    assert np.array_equal(hu[labelled], before[labelled])
    assert np.array_equal(hu[:, 121], before[:, 121])
    darker = before - hu
    assert darker.min() == 0 and darker.max() <= 24
    assert np.mean(darker[:, :, 1] > 4) > 0.003


def test_bone_of_the_next_slab_is_lent_to_what_is_soft_and_less_than_hides_blood() -> None:
    fields = np.full((64, 64, 3), 30, dtype=np.float32)
    fields[:32, :, 0] = 1500  # bone below one half
    fields[:, :32, 1] = 900  # and in the middle slab itself
    lent = []
    for seed in range(20):
        hu = fields.copy()
        samples._bone_between(np.random.default_rng(seed), hu)
        lent.append(float(hu[0, 63, 1] - 30))
        assert np.array_equal(hu[fields > 150], fields[fields > 150])
        assert np.all(hu[32:, 32:, 1] == 30) and np.all(hu[:, 32:, 2] == 30)
    assert min(lent) >= 0 and 25 < max(lent) <= 48


def test_neighbours_change_places_or_are_missing_but_the_middle_stays(variety: Variety) -> None:
    fields = np.repeat(np.array([-500, 0, 500], np.int16), 256 * 256).reshape(3, 256, 256)
    seen = set()
    for seed in range(80):
        hu, _ = variety(np.random.default_rng(seed), fields, np.zeros((5, 64, 64), np.uint8))
        middle = np.median(hu[80:140, 70:120], axis=(0, 1))
        assert abs(middle[1]) < 60
        seen.add(tuple(int(value) for value in np.rint(middle / 500)))
    assert {(-1, 0, 1), (1, 0, -1)} < seen and seen & {(0, 0, 1), (0, 0, -1), (1, 0, 0), (-1, 0, 0)}


@pytest.mark.slow
def test_one_seed_one_variation(variety: Variety) -> None:
    fields = np.random.default_rng(0).integers(-20, 80, (3, 256, 256)).astype(np.int16)
    covered = np.zeros((5, 64, 64), np.uint8)
    once, again = (variety(np.random.default_rng(7), fields, covered)[0] for _ in range(2))
    assert np.array_equal(once, again)
    assert not np.array_equal(once, variety(np.random.default_rng(8), fields, covered)[0])
