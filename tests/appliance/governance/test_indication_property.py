"""Of studies drawn at random none is admitted that its label excludes, and none refused that it lets in.

The judge here shares no code with the gate: what a text means stands beside it, written by hand for each label, numbers
are compared one by one, and an age is counted birthday by birthday.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from datetime import date, timedelta
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from appliance.governance.indication import admit
from appliance.governance.label import RULES
from appliance.governance.package import Package, load_configured
from appliance.settings import Settings
from dicom_io.header import FramePlane, Header
from dicom_io.volume import assemble, planes_of
from tests.builders import CT, SECONDARY_CAPTURE, header

HEADERS = 100_000

Answer = bool | None
"""Whether a label lets it in; None: nobody knows."""

BASE: Package = load_configured(Settings())[0]
T, F, N = True, False, None


def labelled(**keys: Any) -> Package:
    clauses = dict(BASE.indication.clauses)
    clauses.update({name: "§" for name, of in RULES.items() if set(of) & set(keys)})
    small = {"minimum_slabs": 7, "minimum_coverage_mm": 1.9}
    return replace(BASE, indication=replace(BASE.indication, clauses=clauses, **{**small, **keys}))


PACKAGES = (
    labelled(minimum_slabs=6),
    labelled(minimum_age="22 years", excluded_scanners=("GE",), kvp=(100.0, 140.0), slice_thickness_mm=(0.625, 5.0)),
    labelled(
        minimum_age="6 months", maximum_age="17 years", scanners=("SIEMENS", "GE/Rev*"), maximum_tilt_degrees=10.0
    ),
    labelled(
        contrast=True, kernels=("H*", "STANDARD", "FC2?"), excluded_kernels=("H6*",), slice_spacing_mm=(0.5, 5.0),
        duplicate_slices=False, misordered_slices=False, excluded_scanners=("TOSHIBA/Aquilion*",),
        minimum_coverage_mm=14.9,
    ),
)  # fmt: skip
KVP = ((80, 140), (100, 140), (80, 140), (80, 140))
THICKNESS = ((0.4, 10), (0.625, 5), (0.4, 10), (0.4, 10))
COVERAGE = (1.9, 1.9, 1.9, 14.9)
SLABS = (6, 7, 7, 7)

Region = tuple[str, str, str, str]
REGIONS: dict[Region, Answer] = {  # ProtocolName, AnatomicRegionSequence, BodyPartExamined, StudyDescription
    ("", "", "HEAD", ""): T,
    ("", "", "BRAIN", "TRAUMA"): T,
    ("", "", "", "CT Schädel nativ"): T,
    ("HeadRoutine", "", "CHEST", ""): T,
    ("", "69536005 SCT", "", ""): T,
    ("1.1", "T-A0100 SRT", "NECK", ""): T,
    ("", "", "", ""): N,
    ("", "", "UNKNOWN", "5MM"): N,
    ("", "12 99ACME", "", ""): N,
    ("", "", "CHEST", "CT HEAD"): F,
    ("C-SPINE", "", "HEAD", "CT HEAD"): F,
    ("", "45048000 SCT", "HEAD", ""): F,
    ("", "", "", "HEAD AND NECK"): F,
}
Agent = tuple[str, str, str]
AGENTS: dict[Agent, bool] = {  # ContrastBolusAgent, SeriesDescription, the third value of ImageType: was there one?
    ("", "AXIAL", "AXIAL"): F,
    ("NONE", "W/O CONTRAST", "AXIAL"): F,
    ("", "5 mm", "HELIX"): F,
    ("OMNIPAQUE 350", "AXIAL", "AXIAL"): T,
    ("IV", "W/O", "AXIAL"): T,
    ("", "POST CONTRAST", "AXIAL"): T,
    ("NONE", "+C", "AXIAL"): T,
    ("", "AXIAL", "ANGIO"): T,
}
MAKERS = {
    "GE MEDICAL SYSTEMS": "ge", "GE HEALTHCARE": "ge", "SIEMENS": "siemens", "Siemens Healthineers": "siemens",
    "Philips": "philips", "TOSHIBA": "canon", "Canon Medical Systems": "canon", "Neusoft": "neusoft", "": "",
}  # fmt: skip
MODELS = ("Revolution EVO", "LightSpeed VCT", "Aquilion ONE", "Brilliance 64", "")
SCANNERS = [(who, model) for who in MAKERS for model in MODELS]
KERNELS: dict[str, Answer] = {  # by the last label; no other limits it
    "H31s": T, "H20s\\2": T, "STANDARD": T, "FC26": T, "H60s": F, "BONE": F, "FC30": F, "FC201": F, "": N,
}  # fmt: skip
AGES: dict[str, tuple[Answer, Answer, Answer]] = {  # 18 and older, 22 and older, 6 months to 17 years
    "": (N, N, N), "x": (N, N, N), "65": (N, N, N),
    "017Y": (F, F, T), "018Y": (T, F, F), "021Y": (T, F, F), "022Y": (T, T, F), "065Y": (T, T, F), "000Y": (F, F, N),
    "005M": (F, F, F), "006M": (F, F, T), "215M": (F, F, T), "216M": (T, F, F), "263M": (T, F, F), "264M": (T, T, F),
    "020W": (F, F, F), "026W": (F, F, N), "030W": (F, F, T), "939W": (N, F, N), "940W": (T, F, F), "100D": (F, F, F),
}  # fmt: skip
VOLTAGES = (None, 70.0, 79.9, 80.0, 99.0, 100.0, 120.0, 140.0, 141.0)
STEPS = (0.3, 0.4, 0.5, 0.625, 1.0, 2.5, 5.0, 5.1, 10.0, 11.0)
STUDIED = date(2026, 6, 1)
PLAIN = {one.name: getattr(header(), one.name) for one in fields(Header)}


def every(answers: Iterable[Answer]) -> Answer:
    found = list(answers)
    return F if any(one is F for one in found) else N if any(one is N for one in found) else T


def birthdays(born: date) -> int:
    """How many somebody has had by the day of the study."""
    count = 0
    for year in range(born.year + 1, STUDIED.year + 1):
        leap = year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
        day = (3, 1) if (born.month, born.day) == (2, 29) and not leap else (born.month, born.day)
        count += (year, *day) <= (STUDIED.year, STUDIED.month, STUDIED.day)
    return count


def days_apart(stated: str, born: date) -> float:
    """By how many days a stated age and the dates contradict each other at least."""
    unit = {"D": 1.0, "W": 7.0, "M": 30.44, "Y": 365.25}[stated[3]]
    first, end = int(stated[:3]) * unit, (int(stated[:3]) + 1) * unit
    lived = (STUDIED - born).days
    return max(first - lived, lived - end, 0.0)


def age(which: int, stated: str, text: str) -> Answer:
    by_age = AGES[stated][which % 3]
    if not text:
        return by_age
    born = date(int(text[:4]), int(text[4:6]), int(text[6:]))
    if born > STUDIED:
        return F if by_age is F else N
    years = birthdays(born)
    half = (born.year * 12 + born.month + 6, born.day) <= (STUDIED.year * 12 + STUDIED.month, STUDIED.day)
    by_dates = (years >= 18, years >= 22, half and years < 18)[which % 3]
    if len(stated) < 4:
        return every((by_dates, N if stated else T))  # what cannot be read is not passed over
    return every((by_age, by_dates, N if days_apart(stated, born) > 400 else T))


def scanner(which: int, manufacturer: str, model: str) -> Answer:
    who = MAKERS[manufacturer]
    if which == 0:
        return T
    if not who:
        return N
    if which == 1:
        return who != "ge"
    if which == 2:
        return T if who == "siemens" else F if who != "ge" else N if not model else model.startswith("Rev")
    return T if who != "canon" else N if not model else not model.startswith("Aquilion")


def judge(which: int, headers: list[Header]) -> dict[str, Answer]:
    """What somebody says of a study who reads the label of that number."""
    (low, high), (thin, thick) = KVP[which], THICKNESS[which]
    told: dict[str, Answer] = {
        "intended_use": T,
        "scanner": every(scanner(which, one.manufacturer, one.manufacturer_model_name) for one in headers),
        "modality": every({"CT": T, "MR": F, "": N}[one.modality] for one in headers),
        "sop_class": every(one.sop_class_uid == CT for one in headers),
        "body_part": every(
            REGIONS[one.protocol_name, one.anatomic_region, one.body_part_examined, one.study_description]
            for one in headers
        ),
        "age": every(age(which, one.patient_age, one.patient_birth_date) for one in headers),
        "contrast": which == 3
        or not any(AGENTS[one.contrast_bolus_agent, one.series_description, one.image_type[2]] for one in headers),
        "kvp": every(N if one.kvp is None else not (one.kvp < low or one.kvp > high) for one in headers),
        "patient": len({one.patient for one in headers}) == 1,
        "geometry": every(T if one.frames else N for one in headers),
    }
    thicknesses = [one.frames[0].thickness if one.frames else None for one in headers]
    told["slice_thickness"] = every(N if mm is None else not (mm < thin or mm > thick) for mm in thicknesses)
    numbers: dict[float, list[int | None]] = {}
    top: dict[float, float] = {}
    for one in headers:
        if one.frames:
            height = one.frames[0].position[2]
            numbers.setdefault(height, []).append(one.instance_number)
            top[height] = one.frames[0].thickness or 0.0
    heights = sorted(numbers)
    distances = [b - a for a, b in pairwise(heights)]
    told["gaps"] = max(distances) < 1.5 * min(distances)
    told["coverage"] = heights[-1] - heights[0] + top[heights[-1]] > COVERAGE[which]
    told["slabs"] = len(heights) >= SLABS[which]
    if which == 2:
        told["tilt"] = not any(abs(one.gantry_detector_tilt or 0) > 10 for one in headers)
    if which == 3:
        told["kernel"] = every(KERNELS[one.convolution_kernel] for one in headers)
        told["spacing"] = min(distances) > 0.45 and max(distances) < 5.05
        told["duplicates"] = len(heights) == sum(map(len, numbers.values()))
        last = [max(of, key=lambda number: number or 0) for of in (numbers[height] for height in heights)]
        known = [number for number in last if number is not None]
        rising, falling = sorted(set(known)), sorted(set(known), reverse=True)
        told["order"] = N if len(known) < len(last) else known in (rising, falling)
    return told


@cache
def within(which: int) -> dict[str, list[Any]]:
    """What the label of that number lets in, by what is drawn."""
    (low, high), (thin, thick) = KVP[which], THICKNESS[which]
    return {
        "step": [mm for mm in STEPS if thin <= mm <= thick and (which != 3 or mm in (2.5, 5.0))],
        "scanner": [one for one in SCANNERS if scanner(which, *one)],
        "region": [one for one, answer in REGIONS.items() if answer],
        "agent": [one for one, there in AGENTS.items() if which == 3 or not there],
        "age": [one for one, answers in AGES.items() if answers[which % 3]] + ["", "x"],
        "kvp": [kv for kv in VOLTAGES if kv and low <= kv <= high],
        "kernel": [one for one, answer in KERNELS.items() if which != 3 or answer],
    }


def draw(rng: random.Random, which: int) -> list[Header]:
    """The headers of a study, mostly within the label of that number."""
    odd = rng.choice((0.0, 0.0, 0.01, 0.05))

    def strange() -> bool:
        return rng.random() < odd

    def pick(choices: Sequence[Any], good: Sequence[Any]) -> Any:
        """One of the good ones, or sometimes any."""
        return rng.choice(choices if strange() else good)

    good = within(which)
    count = rng.randint(6, 8)
    step = pick(STEPS, good["step"])
    planes: list[tuple[float, int | None]] = [(step * n, n + 1) for n in range(count)]
    if rng.random() < 0.5:
        planes = [(height, count - n) for n, (height, _) in enumerate(planes)]
    if strange():
        del planes[count // 2]
    if strange():
        planes[0], planes[1] = (planes[0][0], planes[1][1]), (planes[1][0], planes[0][1])
    if strange():
        planes[-1] = planes[-1][0], None
    if strange():
        planes.append((planes[1][0], 99))
    unplaced = strange()
    who, model = pick(SCANNERS, good["scanner"])
    region = pick(list(REGIONS), good["region"])
    agent = pick(list(AGENTS), good["agent"])
    stated, born = "", ""
    while True:  # what is nearly 13 months apart is a matter of days, and of no interest
        stated = rng.choice(list(AGES) if rng.random() < 0.1 else good["age"])
        day = STUDIED - timedelta(rng.choice((rng.randrange(-300, 40_000), rng.randrange(6200, 8200), 180, 190)))
        day = rng.choice((day, date(2026 - rng.choice((17, 18, 21, 22, 65)), rng.choice((5, 6)), rng.choice((1, 2)))))
        born = f"{day:%Y%m%d}" if rng.random() < 0.5 else ""
        if (not born or len(stated) < 4 or not 360 < days_apart(stated, day) < 440) and (
            strange() or rng.random() < 0.02 or age(which, stated, born)
        ):
            break
    headers = []
    for place, (height, number) in enumerate(planes):
        if strange():
            region = rng.choice(list(REGIONS))
        if strange():
            agent = rng.choice(list(AGENTS))
        frame = FramePlane((0.0, 0.0, height), (1.0, 0, 0, 0, 1, 0), (0.5, 0.5), None if strange() else step)
        changes: dict[str, Any] = {
            "frames": () if unplaced and place == 0 else (frame,),
            "modality": rng.choice(("MR", "")) if strange() else "CT",
            "sop_class_uid": SECONDARY_CAPTURE if strange() else CT,
            "kvp": pick(VOLTAGES, good["kvp"]),
            "convolution_kernel": pick(list(KERNELS), good["kernel"]),
            "gantry_detector_tilt": pick((20.0, -18.5, 10.1), (None, 0.0, -10.0, 5.0)),
            "patient": "another" if strange() else "one",
            "patient_age": "017Y" if strange() else stated,
            "patient_birth_date": born,
            "protocol_name": region[0], "anatomic_region": region[1], "body_part_examined": region[2],
            "study_description": region[3], "contrast_bolus_agent": agent[0], "series_description": agent[1],
            "image_type": ("ORIGINAL", "PRIMARY", agent[2]), "manufacturer": who, "manufacturer_model_name": model,
            "instance_number": number, "sop_instance_uid": f"1.2.{place}",
        }  # fmt: skip
        if changes["patient_age"] != stated and born and 360 < days_apart("017Y", day) < 440:
            changes["patient_age"] = stated
        headers.append(Header(**{**PLAIN, **changes}))
    return headers


def gate(which: int, headers: list[Header]) -> tuple[bool, dict[str, Answer]]:
    volume = assemble([plane for one in headers for plane in planes_of(one)])
    found = admit(PACKAGES[which], headers, volume, len(volume.planes), (), STUDIED)
    answer = {"met": T, "violated": F, "unknown": N}
    return found.admitted, {one.criterion: answer[one.outcome] for one in found.criteria}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("which", range(len(PACKAGES)))
def test_the_gate_and_the_judge_agree_on_a_hundred_thousand_headers(which: int) -> None:
    rng = random.Random(20260601 + which)
    drawn, outcomes = 0, Counter[bool]()
    seen: dict[str, set[Answer]] = {}
    while drawn < HEADERS // len(PACKAGES):
        headers = draw(rng, which)
        drawn += len(headers)
        admitted, criteria = gate(which, headers)
        expected = judge(which, headers)
        assert admitted == all(answer is T for answer in expected.values())
        assert criteria == expected
        outcomes[admitted] += 1
        for name, answer in expected.items():
            seen.setdefault(name, set()).add(answer)
    assert min(outcomes[True], outcomes[False]) > 300
    # A test of a criterion that every study met would be none.
    always = {name for name, answers in seen.items() if answers == {T}}
    assert always == {"intended_use", *(["scanner"] if which == 0 else ["contrast"] if which == 3 else [])}


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(rng=st.randoms(use_true_random=False), which=st.integers(0, len(PACKAGES) - 1))
def test_the_gate_and_the_judge_agree_on_what_is_drawn_to_be_small(rng: random.Random, which: int) -> None:
    headers = draw(rng, which)
    admitted, criteria = gate(which, headers)
    assert criteria == judge(which, headers)
    assert admitted == all(criteria.values())
