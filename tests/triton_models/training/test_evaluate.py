"""The evaluation: what it keeps, what it shows, and a real server's answers through the appliance's own code."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import triton_models
from appliance.bench.model import serving
from appliance.governance.package import Package, load_configured
from appliance.settings import Settings
from triton_models.training import card, evaluate
from triton_models.training.evaluate import Reader, examples, fingerprint, more_alike, real_head, run, stored
from triton_models.training.lookalikes import KINDS
from triton_models.training.measures import Outcome
from triton_models.training.phantom import simulate

from .test_measures import BLEED, NOTHING

pytestmark = pytest.mark.slow


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What was simulated; nothing really is."""
    keys: list[tuple[str, int]] = []

    def outcome(family: str, seed: int) -> Outcome:
        if seed == 13:
            raise KeyboardInterrupt
        keys.append((family, seed))
        return replace(BLEED if seed % 2 else NOTHING, family=family, seed=seed)

    monkeypatch.setattr(evaluate, "_outcome", outcome)
    return keys


def test_a_run_goes_on_where_it_was_cut_short(tmp_path: Path, asked: list[tuple[str, int]]) -> None:
    path = tmp_path / "outcomes.jsonl"
    with ThreadPoolExecutor(1) as pool, pytest.raises(KeyboardInterrupt):
        run(pool, path, {"unseen": range(10, 16), "training": range(2)}, "studies")
    first = list(asked)
    assert {("unseen", 10), ("unseen", 11), ("unseen", 12)} <= set(first)
    kept = {(one.family, one.seed) for one in stored(path)}
    assert kept <= set(first)
    with path.open("a") as file:
        file.write(json.dumps(asdict(NOTHING))[:50])  # the power went
    asked.clear()
    with ThreadPoolExecutor(2) as pool:
        found = run(pool, path, {"unseen": range(10, 13), "training": range(2)}, "studies")
    wanted = [*(("unseen", seed) for seed in (10, 11, 12)), ("training", 0), ("training", 1)]
    assert [(one.family, one.seed) for one in found] == wanted
    assert not kept & set(asked) and len(asked) + len(kept & {(o.family, o.seed) for o in found}) == 5
    assert {(one.family, one.seed): one for one in stored(path)}.items() >= {
        (one.family, one.seed): one for one in found
    }.items()


def test_the_pictures_are_chosen_by_rule() -> None:
    outcomes = [
        *(replace(BLEED, seed=n, volumes_ml={"subdural": float(n)}) for n in (1, 2, 9)),
        replace(BLEED, seed=20, volumes_ml={"subdural": 0.5, "epidural": 3.0}),
        *(replace(BLEED, seed=30 + n, volumes_ml={"epidural": 1.0 + n}, probability=0.1) for n in range(7)),
        replace(BLEED, seed=40, volumes_ml={"epidural": 99.0}, probability=0.1, refused="age: unknown"),
        replace(NOTHING, seed=50, probability=0.6),
        replace(NOTHING, seed=51, probability=0.8),
        replace(NOTHING, seed=52),
        replace(BLEED, seed=53, volumes_ml={}),
    ]
    assert examples(outcomes, 0.5) == {"hits": [20, 2], "misses": [36, 35, 34, 33, 32], "false_alarms": [51, 50]}


def test_rare_look_alikes_are_drawn_until_there_are_enough() -> None:
    outcomes = [
        replace(NOTHING, look_alikes=("clip",)),
        replace(NOTHING, look_alikes=("pineal", "clip")),
        replace(BLEED, look_alikes=("pineal",)),
        replace(NOTHING, look_alikes=("pineal",), refused="x"),
    ]
    wanted = more_alike(outcomes, 3)
    assert (len(wanted["clip"]), len(wanted["pineal"]), len(wanted["coil"])) == (1, 2, 3)
    assert set(wanted) == set(KINDS) - {"contrast"}
    seeds = [seed for these in wanted.values() for seed in these]
    assert len(set(seeds)) == len(seeds) and not more_alike(outcomes * 3, 2).get("clip")


@pytest.fixture(scope="module")
def package() -> Package:
    return load_configured(Settings())[0]


def test_another_package_begins_anew(package: Package, tmp_path: Path) -> None:
    text = (package.folder / "package.toml").read_text("utf-8")
    (tmp_path / "package.toml").write_text(text.replace("version", "version ", 1))
    assert fingerprint(package) == fingerprint(package)
    assert fingerprint(package) != fingerprint(replace(package, folder=tmp_path))


@pytest.fixture(scope="module")
def reader(package: Package, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    default = Path(triton_models.__file__).parent.parent / ".venv-triton"
    environment = Path(os.environ.get("SCANSIDE_TRITON_ENVIRONMENT", default))
    if not (environment / "bin" / "python3").exists():
        pytest.skip(f"there is no Triton environment {environment} (set SCANSIDE_TRITON_ENVIRONMENT)")
    with serving(package, environment, tmp_path_factory.mktemp("triton")) as url:
        made = Reader(package, url)
        yield made
        made.close()


@pytest.mark.interop
def test_an_absent_head_is_skipped_with_the_reason(reader: Reader, tmp_path: Path) -> None:
    assert real_head(reader, tmp_path / "no_head") == {"skipped": "no_head: the data is absent"}


@pytest.mark.interop
def test_a_real_head_is_negative_and_the_gate_says_why_it_is_not_admitted(reader: Reader, ge_head: Path) -> None:
    told = real_head(reader, ge_head)
    assert told["gate"].startswith("age:") and ";" not in told["gate"]
    assert len(told["slabs"]) == 28 and told["probability"] == max(told["slabs"])
    assert told["positive"] is (told["probability"] >= told["threshold"])
    assert not told["positive"]


@pytest.mark.interop
def test_a_study_is_read_as_the_appliance_reads_it(
    reader: Reader, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = simulate(7, bleed="intraparenchymal", size=256)
    monkeypatch.setattr(evaluate, "drawn", lambda family, seed: made)
    seed = made.seed
    outcome, mask, read = evaluate.evaluated(reader, tmp_path, "training", seed)
    assert outcome.refused == "" and read.verdict is not None and outcome.bleeds
    assert outcome.probability == pytest.approx(max(slab.probabilities["any"] for slab in read.verdict.slabs), abs=1e-6)
    assert outcome.called_ml == pytest.approx(read.verdict.volume_ml, abs=1e-3)
    assert sum(outcome.volumes_ml.values()) == pytest.approx(sum(made.volume_ml.values()), abs=1e-3)
    assert np.array_equal(mask, made.mask)
    # Every slice belongs to one slab, foot to head.
    assert sorted(place for members in read.members for place in members) == list(range(len(made.hu)))
    again, picture = evaluate.example(reader, tmp_path, "training", seed)
    assert replace(again, seconds=0.0) == replace(outcome, seconds=0.0)
    assert (picture == np.array(card.TRUTH)).all(axis=2).any()


def test_a_study_is_simulated_once_and_a_half_written_one_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = simulate(7, bleed="subdural", size=64, thickness_mm=10)
    drawn: list[int] = []
    monkeypatch.setattr(evaluate, "drawn", lambda family, seed: drawn.append(seed) or made)
    (tmp_path / "unseen-4.part").mkdir()
    (tmp_path / "unseen-4.part" / "IMG9999.dcm").touch()  # the power went
    with ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(evaluate, "_studies", tmp_path)
        evaluate.simulate_all(pool, tmp_path, {"unseen": range(2, 5)})
        evaluate.simulate_all(pool, tmp_path, {"unseen": range(2, 6)})
    assert drawn == [2, 3, 4, 5]
    assert len(list((tmp_path / "unseen-4").glob("*.dcm"))) == len(made.hu)
    facts = evaluate._outcome_of(json.loads((tmp_path / "unseen-3" / "facts.json").read_text("utf-8")))
    assert facts.volumes_ml == pytest.approx(made.volume_ml, abs=1e-4) and facts.probability == 0 and not facts.refused
    assert facts.signal_to_noise > 16


def test_each_head_stands_once_without_and_once_with_blood_on_its_familys_scanners(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        evaluate, "study", lambda seed, **asked: (seed, asked["person"], asked["positive"], asked["family"])
    )
    monkeypatch.setattr(evaluate, "simulate", lambda seed, **asked: (seed, asked["look_alikes"], asked["vendor"]))
    assert [evaluate.drawn("unseen", 2), evaluate.drawn("unseen", 3), evaluate.drawn("training", 3)] == [
        (2, 2, False, "unseen"),
        (3, 2, True, "unseen"),
        (3, 2, True, "training"),
    ]
    assert evaluate.drawn("clip", 4) == (4, ("clip",), "neusoft")


def square(side: int, hu: float, share: float = 1.0) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """A brain of 30 ± 4 HU with a square of blood in it, and where that is."""
    field = np.random.default_rng(3).normal(30, 4, (256, 256)).astype(np.float32)
    there = np.zeros_like(field)
    there[100 : 100 + side, 120 : 120 + side] = share
    return field + (hu - 30) * (there > 0), there


@pytest.mark.parametrize(("side", "hu", "expected"), [(10, 50, 25), (10, 34, 5), (4, 50, 10), (20, 50, 50)])
def test_blood_stands_out_by_its_contrast_its_area_and_the_noise(side: int, hu: float, expected: float) -> None:
    assert evaluate.signal_to_noise(*square(side, hu)) == pytest.approx(expected, rel=0.15)


def test_what_does_not_stand_out_counts_nothing() -> None:
    assert evaluate.signal_to_noise(*square(10, 20)) == 0  # darker than the brain
    assert evaluate.signal_to_noise(*square(10, 50, share=0.3)) == 0  # nowhere two fifths of a pixel
    bone, there = square(10, 50)
    bone[there > 0] = 900
    assert evaluate.signal_to_noise(bone, there) == 0  # all of it counts as bone
    air = np.full_like(bone, -1000.0)
    assert evaluate.signal_to_noise(air + 1050 * there, there) == 0  # nothing to stand out from


def test_bone_beside_blood_does_not_make_it_stand_out() -> None:
    field, there = square(10, 50)
    alone = evaluate.signal_to_noise(field, there)
    field[:, 125:] = 1200.0  # half of the square too
    assert evaluate.signal_to_noise(field, there) == pytest.approx(alone, rel=0.2)
