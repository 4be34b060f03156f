"""Bleeds: that each lies where its mechanism puts it, has the volume asked for and moves what it should."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation, gaussian_filter1d, label, uniform_filter1d

from triton_models.training import anatomy
from triton_models.training.anatomy import Head
from triton_models.training.haemorrhage import LEVELS, SUBTYPES, Bleed, bleed, draw_study, statistics
from triton_models.training.masses import NoRoom

pytestmark = pytest.mark.slow

SEEDS = (1, 2)
Mask = NDArray[np.bool_]


@pytest.fixture(scope="module")
def clean() -> Head:
    head = anatomy.draw(np.random.default_rng(11), 60, "F")
    for name in ("bone", "table_mm", "midline_mm", "tentorium_mm", "sutures_mm"):  # what may never change
        getattr(head, name).setflags(write=False)
    return head


def copied(clean: Head) -> Head:
    moved = ("hu", "brain", "grey", "ventricle", "subarachnoid")
    return replace(clean, **{name: getattr(clean, name).copy() for name in moved})


def bled(
    clean: Head, seed: int, subtype: str, volume_ml: float, hu: float | None = None
) -> tuple[Head, NDArray[np.uint8], Bleed]:
    head, truth = copied(clean), np.zeros(clean.hu.shape, dtype=np.uint8)
    return head, truth, bleed(np.random.default_rng(seed), head, truth, subtype, volume_ml, hu)


def masks(clean: Head, subtype: str, volume_ml: float) -> list[tuple[Head, Mask]]:
    found = []
    for seed in SEEDS:
        head, truth, _ = bled(clean, seed, subtype, volume_ml)
        assert set(np.unique(truth)) == {0, SUBTYPES.index(subtype) + 1}
        found.append((head, truth > 0))
    return found


@pytest.mark.parametrize("subtype", SUBTYPES)
def test_the_volume_is_what_was_asked_for(clean: Head, subtype: str) -> None:
    head, truth, rng = copied(clean), np.zeros(clean.hu.shape, dtype=np.uint8), np.random.default_rng(3)
    before = 0
    for volume_ml in (1.4, 0.6, 0.1, 0.1, 0.03, 0.03):  # so small that none moves the others
        made = bleed(rng, head, truth, subtype, volume_ml)
        total = int(np.count_nonzero(truth))
        assert (total - before) / 1000 == pytest.approx(volume_ml, rel=0.15)
        assert made.volume_ml == pytest.approx((total - before) / 1000)
        before = total
    assert set(np.unique(truth)) == {0, SUBTYPES.index(subtype) + 1}


@pytest.mark.parametrize("subtype", ["epidural", "intraparenchymal", "subarachnoid", "subdural"])
def test_so_is_a_large_one(clean: Head, subtype: str) -> None:
    assert bled(clean, 4, subtype, 30.0)[2].volume_ml == pytest.approx(30, rel=0.15)


def test_ventricles_hold_no_more_than_they_hold(clean: Head) -> None:
    head, truth, made = bled(clean, 1, "intraventricular", 500.0)
    assert made.volume_ml == pytest.approx((head.ventricle >= 0.5).sum() / 1000)
    assert not truth[head.ventricle < 0.5].any()
    before = head.hu.copy()
    with pytest.raises(NoRoom):
        bleed(np.random.default_rng(2), head, truth, "intraventricular", 1.0)
    assert np.array_equal(head.hu, before)


@pytest.mark.parametrize("subtype", SUBTYPES)
def test_nothing_bleeds_outside_the_skull_and_the_skull_stays(clean: Head, subtype: str) -> None:
    head, truth, _ = bled(clean, 5, subtype, 12.0)
    assert head.table_mm[truth > 0].min() > 0
    bone = (clean.bone > 0.5) & (clean.table_mm < 0)
    assert np.array_equal(head.hu[bone], clean.hu[bone])
    inside = clean.table_mm > 2
    assert head.hu[inside].max() <= max(clean.hu[inside].max(), 110)  # nor does any of it come along


@pytest.mark.parametrize(("subtype", "hu"), [("epidural", 68.0), ("intraparenchymal", 60.0), ("subdural", 40.0)])
def test_blood_is_as_bright_as_asked_for(clean: Head, subtype: str, hu: float) -> None:
    head, truth, _ = bled(clean, 6, subtype, 15.0, hu)
    assert np.median(head.hu[truth > 0]) == pytest.approx(hu, abs=4)


def test_one_seed_one_bleed_bit_for_bit(clean: Head) -> None:
    (first, one, same), (second, other, again) = (bled(clean, 7, "intraparenchymal", 20.0) for _ in range(2))
    assert same == again
    assert np.array_equal(one, other)
    assert np.array_equal(first.hu, second.hu)
    assert not np.array_equal(one, bled(clean, 8, "intraparenchymal", 20.0)[1])


def test_an_epidural_lies_on_the_skull_within_its_sutures(clean: Head) -> None:
    for _, mask in masks(clean, "epidural", 10.0):
        assert clean.table_mm[mask].min() < 1.5
        assert clean.sutures_mm[mask].min() > 1
        pieces, _ = label(mask)
        assert np.bincount(pieces[mask]).max() > 0.95 * mask.sum()
        depth = clean.table_mm[mask]
        assert depth.max() > 5
        spread = np.ptp(np.argwhere(mask), axis=0).max()
        assert spread < 12 * depth.max()  # a lens, not a sheet


def test_a_subdural_keeps_to_its_side_and_crosses_sutures(clean: Head) -> None:
    crossed = 0
    for head, mask in masks(clean, "subdural", 35.0):
        assert np.unique(np.sign(head.midline_mm[mask])).size == 1
        crossed += bool(head.sutures_mm[mask].min() < 1)
        assert np.percentile(head.table_mm[mask], 90) < 20
    assert crossed


@pytest.mark.parametrize("subtype", ["epidural", "subdural"])
@pytest.mark.parametrize("volume_ml", [0.1, 0.5, 3.0])
def test_what_counts_of_blood_at_the_skull_is_what_a_slab_shows_as_blood(
    clean: Head, subtype: str, volume_ml: float
) -> None:
    for head, mask in masks(clean, subtype, volume_ml):
        slab = uniform_filter1d(head.hu, 5, axis=0)
        for axis in (1, 2):
            slab = gaussian_filter1d(slab, 0.75, axis=axis)
        assert slab[mask].mean() < 80  # 98 in 100 real ones have a mean under 73, the brightest 89
        hidden = binary_dilation(mask, iterations=2) & ~mask & (clean.table_mm > 0.4) & (clean.table_mm < 1.1)
        # Where it lies on bone there is blood between, too; not so on the falx or the tentorium.
        if np.count_nonzero(hidden) > 20 and np.percentile(clean.table_mm[mask], 10) < 3:
            assert np.median(head.hu[hidden]) > np.median(clean.hu[hidden]) + 5


def test_a_small_subdural_is_no_film(clean: Head) -> None:
    for seed in range(3):
        _, truth, _ = bled(clean, seed, "subdural", 0.3)
        assert np.ptp(np.argwhere(truth), axis=0).max() < 25


def test_blood_among_the_arachnoid_stays_there(clean: Head) -> None:
    for head, mask in masks(clean, "subarachnoid", 6.0):
        assert head.subarachnoid[mask].min() >= 0.4


def test_blood_in_ventricles_sinks_to_the_back(clean: Head) -> None:
    sunk = []
    for seed in range(5):
        head, truth, _ = bled(clean, seed, "intraventricular", 3.0)
        assert head.ventricle[truth > 0].min() >= 0.5
        y = np.nonzero(truth)[1]
        sunk.append(y.min() > np.median(np.nonzero(head.ventricle >= 0.5)[1]))
    assert sum(sunk) >= 2  # the others are casts


def test_a_clot_in_the_brain_pushes_the_ventricles(clean: Head) -> None:
    for head, mask in masks(clean, "intraparenchymal", 40.0):
        assert head.brain[mask].mean() > 0.8
        assert not (head.ventricle[mask] >= 0.5).any()
        assert head.ventricle.sum() < 0.97 * clean.ventricle.sum()
        assert head.subarachnoid.sum() < clean.subarachnoid.sum()


def test_a_small_one_pushes_nothing(clean: Head) -> None:
    head, _, _ = bled(clean, 9, "intraparenchymal", 1.0)
    assert np.array_equal(head.ventricle, clean.ventricle)


def test_several_come_together_and_leave_one_another_alone(clean: Head) -> None:
    made = set()
    for seed in range(3):
        head, truth = copied(clean), np.zeros(clean.hu.shape, dtype=np.uint8)
        bleeds = draw_study(np.random.default_rng(seed), head, truth)
        present = {SUBTYPES[code - 1] for code in np.unique(truth) if code}
        assert present == {each.subtype for each in bleeds}
        assert np.count_nonzero(truth) / 1000 == pytest.approx(sum(each.volume_ml for each in bleeds), rel=0.25)
        made |= present
    assert len(made) > 2


def test_half_of_what_is_drawn_is_under_a_millilitre() -> None:
    for subtype, real in statistics().items():
        assert list(real.volume_ml) == sorted(real.volume_ml)
        assert len(real.volume_ml) == len(real.hu) == len(real.lesions) == len(LEVELS)
        if subtype not in ("epidural", "intraparenchymal"):
            assert real.volume_ml[LEVELS.index(0.5)] < 1


def test_drawn_volumes_follow_the_table(clean: Head) -> None:
    rng, head, truth = np.random.default_rng(0), copied(clean), np.zeros(clean.hu.shape, dtype=np.uint8)
    volumes = [bleed(rng, head, truth, "subarachnoid").volume_ml for _ in range(24)]
    assert 0.05 < np.median(volumes) < 0.6


@pytest.mark.parametrize(("subtype", "volume_ml"), [("extradural", 3.0), ("epidural", 0.0), ("subdural", -1.0)])
def test_nonsense_is_refused(clean: Head, subtype: str, volume_ml: float) -> None:
    with pytest.raises(ValueError, match="subtypes are epidural"):
        bled(clean, 1, subtype, volume_ml)
