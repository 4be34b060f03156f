"""Look-alikes: that each changes what its name says, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from triton_models.training import anatomy
from triton_models.training.anatomy import Head
from triton_models.training.lookalikes import KINDS, add, draw_kinds

pytestmark = pytest.mark.slow

METAL = ("clip", "coil", "dental metal")
Bright = NDArray[np.float32]


@pytest.fixture(scope="module")
def clean() -> Head:
    head = anatomy.draw(np.random.default_rng(12), 70, "M")
    for name in ("table_mm", "midline_mm", "tentorium_mm", "sutures_mm"):  # what may never change
        getattr(head, name).setflags(write=False)
    return head


def added(clean: Head, kind: str, seed: int = 1) -> Head:
    moved = ("hu", "brain", "grey", "ventricle", "subarachnoid", "bone")
    head = replace(clean, **{name: getattr(clean, name).copy() for name in moved})
    add(np.random.default_rng(seed), head, kind)
    return head


def change(clean: Head, kind: str, seed: int = 1) -> Bright:
    return np.asarray(added(clean, kind, seed).hu - clean.hu)


@pytest.mark.parametrize("kind", KINDS)
def test_each_changes_the_image_and_only_what_it_may(clean: Head, kind: str) -> None:
    head = added(clean, kind)
    assert (np.abs(head.hu - clean.hu) > 5).sum() > 3
    assert np.isfinite(head.hu).all()
    if kind not in ("clip", "drain", "craniotomy"):
        assert np.array_equal(head.bone, clean.bone)
    if kind not in ("old infarct", "fresh infarct", "tumour"):
        assert np.array_equal(head.ventricle, clean.ventricle)


def test_one_seed_one_look_alike_bit_for_bit(clean: Head) -> None:
    first, second = (added(clean, "tumour", 3).hu for _ in range(2))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, added(clean, "tumour", 4).hu)


@pytest.mark.parametrize("kind", METAL)
def test_metal_is_brighter_than_bone(clean: Head, kind: str) -> None:
    assert max(added(clean, kind, seed).hu.max() for seed in range(3)) > 3000


@pytest.mark.parametrize("kind", ["calcified falx", "choroid plexus", "pineal", "basal ganglia", "calcified artery"])
def test_lime_is_bright_small_and_inside(clean: Head, kind: str) -> None:
    more = change(clean, kind)
    assert more.max() > 15
    assert not more[clean.table_mm <= 0].any()
    assert (np.abs(more) > 10).sum() < 8000


def test_each_lies_where_its_name_says(clean: Head) -> None:
    falx = change(clean, "calcified falx", 4) > 30
    assert np.abs(clean.midline_mm[falx]).mean() < 25
    pineal = np.argwhere(change(clean, "pineal") > 20) + clean.origin_mm
    assert np.abs(pineal[:, 2]).max() < 12
    assert 15 < pineal[:, 1].mean() < 42
    ganglia = np.argwhere(change(clean, "basal ganglia") > 8) + clean.origin_mm
    assert (ganglia[:, 2] > 5).any() and (ganglia[:, 2] < -5).any()


def test_a_scalp_haematoma_is_outside_the_skull(clean: Head) -> None:
    for seed in range(2):
        more = change(clean, "scalp haematoma", seed)
        assert not more[clean.table_mm > 0].any()
        assert not more[clean.bone > 0.6].any()
        head = added(clean, "scalp haematoma", seed)
        assert ((head.hu > 30) & (clean.hu < 0)).sum() > 500


def test_infarcts_are_dark_and_old_ones_draw_the_ventricle(clean: Head) -> None:
    assert all((change(clean, kind, s) < -4).sum() > 20 for kind in ("old infarct", "fresh infarct") for s in range(2))
    assert added(clean, "old infarct", 5).ventricle.sum() > 1.005 * clean.ventricle.sum()


def test_old_infarcts_lie_at_the_falx_as_well_as_in_the_lobes(clean: Head) -> None:
    middle = []
    for seed in range(12):
        dark = change(clean, "old infarct", seed) < -6
        if dark.sum() > 5000:  # a territory and no lacune
            middle.append(float((np.abs(clean.midline_mm[dark]) < 12).mean()))
    assert sum(share > 0.3 for share in middle) >= 3 and min(middle) < 0.2


def test_contrast_lights_vessels(clean: Head) -> None:
    head = added(clean, "contrast")
    lit = (head.hu > 100) & (clean.hu < 80) & (clean.table_mm > 0)
    assert 1500 < lit.sum() < 80000


def test_a_drain_ends_in_a_ventricle_and_opens_the_skull(clean: Head) -> None:
    head = added(clean, "drain")
    line = (head.hu - clean.hu > 60) & (clean.table_mm > 0)
    assert (clean.ventricle[line] > 0.5).any()
    assert head.bone.sum() < clean.bone.sum()


def test_kinds_are_drawn_as_often_as_is_plausible() -> None:
    rng = np.random.default_rng(5)
    old, young = ([draw_kinds(rng, age) for _ in range(400)] for age in (85, 25))
    assert all(set(kinds) <= set(KINDS) for kinds in old + young)
    share = {kind: sum(kind in kinds for kinds in old) / 400 for kind in KINDS}
    assert share["choroid plexus"] > 0.6 and share["clip"] < 0.06
    assert sum(map(len, old)) > 1.5 * sum(map(len, young))
    assert min(map(len, young)) == 0


def test_an_unknown_kind_is_refused(clean: Head) -> None:
    with pytest.raises(ValueError, match="there are"):
        add(np.random.default_rng(1), clean, "abscess")
