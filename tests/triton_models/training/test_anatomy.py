"""The simulated head: its sizes against published adult ones, its maps against one another, its tissue in HU."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from triton_models.training.anatomy import SHAPE, Head, draw
from triton_models.training.fields import Volume

pytestmark = pytest.mark.slow

PEOPLE = ((1, 24, "F"), (2, 84, "M"))
MAPS = ("brain", "grey", "ventricle", "subarachnoid", "bone")


@cache
def head(seed: int, age: int, sex: str) -> Head:
    return draw(np.random.default_rng(seed), age, sex)


def ml(coverage: Volume) -> float:
    """Volume in mL of what covers that much of each cubic mm."""
    return float(coverage.sum()) / 1000


def height(person: Head) -> Volume:
    """z of every voxel, to be broadcast."""
    return (np.arange(SHAPE[0], dtype=np.float32) + np.float32(person.origin_mm[0]))[:, None, None]


@pytest.fixture(params=PEOPLE, ids=lambda person: f"{person[1]}{person[2]}")
def person(request: pytest.FixtureRequest) -> Head:
    return head(*request.param)


def test_one_seed_one_head_bit_for_bit() -> None:
    again, other = draw(np.random.default_rng(1), 24, "F"), head(*PEOPLE[1])
    for name in (*MAPS, "hu", "table_mm", "midline_mm", "tentorium_mm", "sutures_mm"):
        volume = getattr(head(*PEOPLE[0]), name)
        assert volume.dtype == np.float32 and volume.shape == SHAPE and np.isfinite(volume).all(), name
        assert np.array_equal(volume, getattr(again, name)), name
        assert not np.array_equal(volume, getattr(other, name)), name


def test_maps_are_coverages_that_share_out_the_cavity(person: Head) -> None:
    for name in MAPS:
        volume = getattr(person, name)
        assert volume.min() >= -1e-6 and volume.max() <= 1 + 1e-6, name
    content = person.brain + person.ventricle + person.subarachnoid
    assert (person.grey <= person.brain + 1e-6).all()
    assert (content + person.bone <= 1 + 1e-5).all()
    inside, outside = person.table_mm > 1, person.table_mm < -1
    assert np.allclose(content[inside], 1, atol=1e-5) and not content[outside].any() and not person.bone[inside].any()


def test_sizes_are_adults(person: Head) -> None:
    cavity = np.count_nonzero((person.table_mm > 0) & (height(person) > -62)) / 1000
    brain, ventricle = ml(person.brain), ml(person.ventricle)
    assert 1050 < cavity < 1950
    assert 0.58 < brain / cavity < 0.93
    assert 5 < ventricle < 140
    head_mm = [np.ptp(np.flatnonzero((person.hu > -300)[100:].any(axis=axes))) for axes in ((0, 1), (0, 2))]
    assert 130 < head_mm[0] < 175 and 155 < head_mm[1] < 215


def test_age_takes_brain_and_widens_what_holds_fluid() -> None:
    young, old = (head(*person) for person in PEOPLE)

    def share(person: Head, name: str) -> float:
        return ml(getattr(person, name)) / ml(person.brain + person.ventricle + person.subarachnoid)

    assert share(young, "brain") > share(old, "brain") + 0.08
    assert share(old, "ventricle") > 1.7 * share(young, "ventricle")
    assert share(old, "subarachnoid") > 1.3 * share(young, "subarachnoid")


def test_gyri_touch_the_dura_in_places_and_not_in_all_people_alike() -> None:
    touching = []
    for seed in range(3, 8):
        some = draw(np.random.default_rng(seed), 55, "F")
        near = (some.table_mm > 0.8) & (some.table_mm < 1.6) & (height(some) > 0)
        touching.append(some.brain[near].mean())
    assert max(touching) > min(touching) + 0.2
    assert 0.05 < min(touching) < 0.6 and 0.4 < max(touching) < 0.99


def test_tissue_is_in_its_range_of_hu(person: Head) -> None:
    deep = (person.table_mm > 6) & (height(person) > -20)
    grey, white = (person.hu[deep & m] for m in (person.grey > 0.97, (person.brain > 0.99) & (person.grey < 0.03)))
    assert np.median(grey) == pytest.approx(person.grey_hu, abs=1.5) and 33 < person.grey_hu < 43
    assert 4 < np.median(grey) - np.median(white) < 11
    fluid = person.hu[deep & (person.ventricle > 0.99)]
    assert np.median(fluid) == pytest.approx(person.fluid_hu, abs=1) and 2 < person.fluid_hu < 13
    vault = person.hu[(person.bone > 0.99) & (height(person) > 0)]
    assert np.percentile(vault, 5) > 250 and np.percentile(vault, 99) < 2300
    scalp = (person.table_mm < -9) & (person.hu > -130) & (person.hu < 0) & (height(person) > 20)
    assert -110 < np.percentile(person.hu[scalp], 30) < -60
    assert person.hu[:, :3].max() < -900 and person.hu.min() >= -1050  # air


def test_the_cortex_is_grey_and_the_middle_white(person: Head) -> None:
    upper = (height(person) > 25) & (np.abs(person.midline_mm) > 12)
    rim, middle = (upper & at for at in ((person.table_mm > 2) & (person.table_mm < 8), person.table_mm > 24))
    assert person.grey[rim].sum() > 0.7 * person.brain[rim].sum()
    assert person.grey[middle].sum() < 0.4 * person.brain[middle].sum()


def test_the_skull_is_closed_and_has_a_thickness(person: Head) -> None:
    """Along any way out of the vault there are 2 to 20 mm of bone."""
    z0, y0, x0 = (round(-o) for o in person.origin_mm)
    up = height(person)[:, 0, 0] > 10
    for line in (
        person.bone[z0 + 25, y0, x0:],
        person.bone[z0 + 25, y0, :x0],
        person.bone[z0 + 25, y0:, x0 + 4],
        person.bone[z0 + 25, :y0, x0 + 4],
        person.bone[up, y0, x0 + 20],
    ):
        assert 2 < line.sum() < 20


def test_it_lies_as_its_axes_say(person: Head) -> None:
    z0, y0, x0 = (round(-o) for o in person.origin_mm)
    assert np.median(np.diff(person.midline_mm[z0 + 30], axis=1)) == pytest.approx(1, abs=0.15)
    assert abs(np.median(person.midline_mm[z0 + 30, y0 - 40 : y0 + 40, x0])) < 9
    air = (person.hu < -600) & (person.table_mm > -40) & (person.table_mm < -3)
    sinuses = np.flatnonzero(air[z0 - 45 : z0 - 25, :, x0 - 8 : x0 + 8].any(axis=(0, 2)))
    assert np.median(sinuses) < y0 - 15  # in front
    above, below = person.tentorium_mm[z0 + 30, y0 + 50, x0], person.tentorium_mm[z0 - 45, y0 + 50, x0]
    assert above > 10 and below < -10
    cerebellum = (person.brain > 0.5) & (person.tentorium_mm < -3) & (person.table_mm > 4)
    assert 70 < np.count_nonzero(cerebellum) / 1000 < 260  # with the stem


def test_halves_are_alike_but_not_the_same(person: Head) -> None:
    left, right = (ml(person.brain * (side > 0)) for side in (person.midline_mm, -person.midline_mm))
    assert 0.9 < left / right < 1.1
    wide = [ml(person.ventricle * (side > 0)) for side in (person.midline_mm, -person.midline_mm)]
    assert wide[0] != wide[1]


def test_sutures_lie_where_they_should(person: Head) -> None:
    z0, y0, x0 = (round(-o) for o in person.origin_mm)
    outer = (person.bone > 0.5) & (person.sutures_mm < 1.5)
    found = np.argwhere(outer[z0 + 20 :]) - (-20, y0, x0)
    beside_it = found[np.abs(found[:, 2]) > 30]
    assert (beside_it[:, 1] < -5).any() and (beside_it[:, 1] > 40).any()  # coronal, lambdoid
    assert person.sutures_mm[: z0 - 40].min() >= 60
    lines = np.abs(found[:, 2]) < 12
    assert ((found[:, 1] > 5) & (found[:, 1] < 60) & lines).sum() > 50  # sagittal
    solid = (person.bone > 0.95) & (height(person) > 0)
    gap, beside = (person.hu[solid & at].mean() for at in (person.sutures_mm < 0.5, person.sutures_mm > 3))
    assert gap < beside - 100


def test_a_field_is_noise_of_unit_variance_and_of_its_size() -> None:
    one, two = (head(*PEOPLE[0]).field(np.random.default_rng(9), cell) for cell in (4.0, 16.0))
    for field in (one, two):
        assert field.shape == SHAPE and field.std() == pytest.approx(1, abs=0.1) and abs(field.mean()) < 0.2

    def alike(field: Volume, apart: int) -> float:
        return float((field[apart:] * field[:-apart]).mean())

    assert alike(one, 2) > 0.5 and abs(alike(one, 12)) < 0.15
    assert alike(two, 4) > 0.7 and alike(two, 12) < 0.6
