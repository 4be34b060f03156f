"""The model card: a page of tables from the figures, plots, pictures, and the figures themselves as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from appliance.inference.preprocess import AIR_HU, to_field, window

from .charts import Axis, Plot, Series, intervals, plot
from .measures import SMALL_ML, Outcome, roc

GOALS = {"auc": 0.97, "sensitivity": 0.95, "specificity": 0.95, "sensitivity_under_5_ml": 0.75}
BRAIN = (40.0, 80.0)
TILE, TILE_MM = 320, 0.7
TRUTH, CALLED = (0, 200, 120), (255, 150, 0)
GREYS = 96
"""In a picture's palette: one of noise in full colour is three times as large."""
ENOUGH = 8
"""Groups of fewer studies are not ranked among the weakest."""

Examples = Mapping[str, Sequence[tuple[Outcome, NDArray[np.uint8]]]]
""""hits", "misses" and "false_alarms": studies, and of each a picture (320, 320, 3)."""

_NAMES = {
    "auc": "AUC, study",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "sensitivity_under_5_ml": f"sensitivity under {SMALL_ML:g} mL",
}
_OTHERS = {
    "subtype_named_right": "found bleeds whose highest-scoring subtype is there",
    "key_slab_holds_blood": "found bleeds with blood in a key slab",
    "refused": "refused by the gate before the model saw them",
    "blood_too_little_to_see": "bleed so little that no voxel shows it",
}


def tile(
    hu: NDArray[np.float32],
    truth: NDArray[np.bool_],
    outlines: Iterable[Sequence[tuple[float, float]]],
    spacing_mm: tuple[float, float],
) -> NDArray[np.uint8]:
    """A slab in the brain window, (320, 320, 3), with a contour about the blood and one about what the model called.

    Args:
        hu: (rows, columns).
        truth: (rows, columns), where the blood is.
        outlines: closed, of (column, row), as in a verdict.
        spacing_mm: (between rows, between columns).
    """
    called = np.zeros(hu.shape, np.uint8)
    for outline in outlines:
        cv2.fillPoly(called, [np.rint(outline).astype(np.int32)], 1)
    grey = window(to_field(hu, spacing_mm, size=TILE, pixel_mm=TILE_MM, fill=AIR_HU), [BRAIN])[0]
    picture = np.repeat(np.rint(255 * grey).astype(np.uint8)[:, :, None], 3, axis=2)
    for mask, colour, width in ((called, CALLED, 2), (truth, TRUTH, 1)):
        field = to_field(mask.astype(np.float32), spacing_mm, size=TILE, pixel_mm=TILE_MM, fill=0)
        contours, _ = cv2.findContours((field > 0.5).astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(picture, contours, -1, colour, width)
    return picture


def write(folder: Path, figures: Mapping[str, Any], outcomes: Sequence[Outcome], pictures: Examples) -> None:
    """Write the card in place of the one that is there.

    Args:
        folder: made if it is not there; receives README.md, metrics.json, SVG plots and PNG pictures.
        figures: what `measures.summary` says of the unseen family, with what `evaluate` adds.
        outcomes: of both families.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob("*.svg"), *folder.glob("*.png")):
        old.unlink()
    for name, tiles in pictures.items():
        if tiles:
            row = np.concatenate([picture for _, picture in tiles], axis=1)
            paletted = Image.fromarray(row).quantize(palette=_palette(), dither=Image.Dither.NONE)
            paletted.save(folder / f"{name}.png", optimize=True)
    for name, svg in plots(figures, outcomes).items():
        (folder / name).write_text(svg, encoding="utf-8")
    shown = {name: [one for one, _ in tiles] for name, tiles in pictures.items()}
    (folder / "README.md").write_text(readme(figures, shown), encoding="utf-8")
    (folder / "metrics.json").write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _palette() -> Image.Image:
    """Greys, and the colours of the two contours."""
    greys = np.repeat(np.linspace(0, 255, GREYS).round().astype(np.uint8), 3)
    image = Image.new("P", (1, 1))
    image.putpalette([*map(int, greys), *TRUTH, *CALLED])
    return image


def plots(figures: Mapping[str, Any], outcomes: Sequence[Outcome]) -> dict[str, str]:
    """{file name: SVG}."""
    seen = [one for one in outcomes if not one.unjudged]
    curves = []
    for family, name in (("unseen", "unseen settings"), ("training", "settings of the training")):
        members = [one for one in seen if one.family == family]
        points = roc([o.probability for o in members if o.bleeds], [o.probability for o in members if not o.bleeds])
        curves.append(Series(name, points, joined=True))
    point = (1 - figures["specificity"]["value"], figures["sensitivity"]["value"])
    tenths = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    made = {
        "roc.svg": plot(
            Plot(
                "Receiver operating characteristic of the study's probability",
                Axis("1 - specificity", tenths),
                Axis("sensitivity", tenths),
                [*curves, Series("shipped operating point", [point])],
            )
        ),
        "reliability.svg": plot(
            Plot(
                "Reliability: how often a study bleeds of which a probability is said",
                Axis("probability that was said, mean of the bin", tenths),
                Axis("share that bleeds", tenths),
                [
                    _reliability("unseen settings", figures["calibration"]),
                    _reliability("settings of the training", figures["training_family"]["calibration"]),
                ],
                [((0.0, 0.0), (1.0, 1.0), "")],
            )
        ),
        "strata.svg": intervals(
            "Sensitivity and specificity by group, unseen settings", _strata(figures), GOALS["sensitivity"]
        ),
    }
    found = [o for o in seen if o.family == "unseen" and o.bleeds and o.probability >= figures["threshold"]]
    if volume := figures["volume_agreement"]:
        points = [((one.called_ml + one.volume_ml) / 2, one.called_ml - one.volume_ml) for one in found]
        reach = max(1.0, *(abs(difference) for _, difference in points), -volume["lower_limit"]["value"])
        step = next(s for s in (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0) if 4 * s >= reach or s == 100.0)
        lines = {"bias": volume["bias"], "+1.96 s": volume["upper_limit"], "-1.96 s": volume["lower_limit"]}
        made["agreement.svg"] = plot(
            Plot(
                "Lesion volume, called minus true (Bland and Altman)",
                Axis("mean of both, mL", [0.1, 0.3, 1, 3, 10, 30, 100], logarithmic=True),
                Axis("difference, mL", [step * n for n in range(-4, 5)]),
                [Series("found bleeds", points)],
                [((0.1, one["value"]), (100, one["value"]), name) for name, one in lines.items()],
            )
        )
    return made


def _reliability(name: str, calibration: Mapping[str, Any]) -> Series:
    bins = calibration["bins"]
    return Series(
        name,
        [(one["said"], one["observed"]["value"]) for one in bins],
        spans=[(one["observed"]["low"], one["observed"]["high"]) for one in bins],
    )


def _strata(figures: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Every group of the unseen family that has a sensitivity or a specificity of its own."""
    groups = {
        "sensitivity, all": {"all": figures["sensitivity"]},
        "sensitivity by subtype": figures["by_subtype"],
        "sensitivity by volume, mL": figures["by_volume_ml"],
        "sensitivity by attenuation, HU": figures["by_blood_hu"],
        "sensitivity by signal to noise": figures["by_signal_to_noise"],
        "specificity, all": {"all": figures["specificity"]},
        "specificity by look-alike": figures["by_look_alike"],
    }
    for key, name in (("by_thickness_mm", "thickness, mm"), ("by_kernel", "kernel"), ("by_vendor", "vendor")):
        for figure in ("sensitivity", "specificity"):
            groups[f"{figure} by {name}"] = {label: one[figure] for label, one in figures[key].items()}
    return groups


def readme(figures: Mapping[str, Any], shown: Mapping[str, Sequence[Outcome]]) -> str:
    """The page.

    Args:
        figures: as for `write`.
        shown: the studies of each picture.
    """
    return "\n".join(_lines(figures, shown)) + "\n"


def _lines(figures: Mapping[str, Any], shown: Mapping[str, Sequence[Outcome]]) -> Iterator[str]:
    package, threshold = figures["package"], figures["threshold"]
    familiar, counts = figures["training_family"], figures["studies_by_family"]
    yield from (
        f"# Model card: {package['title'].lower()}, {package['name']} {package['version']}",
        "",
        f"**{package['notice']} Clearance: {package['clearance']}.** Nothing on this page says anything about real "
        "patients, but for one real head at its end.",
        "",
        "Written by `make evaluate` from [metrics.json](metrics.json), which holds every figure; do not edit it.",
        "",
        "## What simulated means",
        "",
        "Every head here but one is drawn by a program (`triton_models/training`): an averaged brain atlas deformed at",
        "random, blood painted into it by rules, a scanner imitated by formulas. The same authors wrote the simulator",
        "and trained the network, and the network learned from nothing else. These figures show that it learned what",
        "it was taught, how far that carries to other simulated scanners, and where it fails even there. They do not",
        "show how it does on people, whose blood, calcium, tumours, movement and surgery are more varied than any",
        "rule: expect less. A figure for real patients needs real patients, a reference standard by several readers,",
        "and a study that was planned before.",
        "",
        "It is for research and for running this appliance without cleared weights. It is triage and not diagnosis: a",
        "negative answer rules nothing out. Children and contrast are outside its indication.",
        "",
        "## Goals",
        "",
        f"{counts['unseen']} studies of unseen seeds **and** unseen simulator settings (other kernels, another noise,",
        "other vendors): each head once without and once with a haemorrhage, on another scanner and with other",
        f"look-alikes. Beside them {counts['training']} of unseen seeds with the settings of the training, to show the",
        "shift. Of each figure the 95 % interval and the number of studies.",
        "",
    )
    rows = []
    for name, goal in GOALS.items():
        one = figures[name]
        met = one["value"] is not None and one["value"] >= goal
        rows.append([_NAMES[name], f"{goal:.2f}", f"**{_said(one)}**", "met" if met else "**not met**",
                     _said(familiar[name])])  # fmt: skip
    yield from _table(["", "goal", "unseen settings", "", "settings of the training"], rows)
    yield from (
        "",
        f"The operating point is the shipped one: positive from a probability of {threshold:g} on. A cleared product "
        "publishes a sensitivity of 0.72 under 5 mL, on patients, which cannot be compared with this.",
        *_stated(figures["stated"]),
        "",
        "![Receiver operating characteristic](roc.svg)",
        "",
    )
    yield from _table(
        ["", "unseen settings", "settings of the training"],
        [[words, _said(figures[name]), _said(familiar[name])] for name, words in _OTHERS.items()],
    )
    reasons = ", ".join(f"{name} {count}" for name, count in sorted(figures["refused_because"].items()))
    yield from ("", "Studies of the last two rows count in no other figure. Criteria of the gate that refused: "
                    f"{reasons or 'none'}.")  # fmt: skip
    yield from ("", "## By what bleeds", "")
    volumes = list(figures["by_volume_ml"])
    yield from _table(
        ["sensitivity", "all volumes", *(f"{name} mL" for name in volumes)],
        [
            ["all", _said(figures["sensitivity"]), *(_said(figures["by_volume_ml"][name]) for name in volumes)],
            *(
                [subtype, _said(one),
                 *(_found(figures["by_subtype_and_volume_ml"][subtype][name]) for name in volumes)]
                for subtype, one in figures["by_subtype"].items()
            ),
        ],
    )  # fmt: skip
    yield from (
        "",
        "A study with several kinds counts under each; in the cells of subtype and volume, where most of its blood is.",
        "",
    )
    yield from _table(
        ["mean attenuation of the blood, HU", "sensitivity"],
        [[name, _said(one)] for name, one in figures["by_blood_hu"].items()],
    )
    yield from (
        "",
        "How far the blood stands out where it does so most: contrast to what lies 2 to 10 mm around, times the root "
        "of the number of independent samples (one for every 4 mm²), over their spread. Below 5, nothing can be told "
        "from noise with certainty (Rose, J Opt Soc Am 1948; 38:196): "
        f"{figures['by_signal_to_noise']['below 5']['n']} of {figures['sensitivity']['n']} studies with blood.",
        "",
    )
    yield from _table(
        ["signal to noise of the blood", "sensitivity"],
        [[name, _said(one)] for name, one in figures["by_signal_to_noise"].items()],
    )
    yield from (
        "",
        "## By how it was scanned",
        "",
    )
    for key, name in (("by_thickness_mm", "slice thickness, mm"), ("by_kernel", "kernel"), ("by_vendor", "vendor")):
        yield from _table(
            [name, "settings", "sensitivity", "specificity"],
            [
                [label, settings, _said(one["sensitivity"]), _said(one["specificity"])]
                for settings, some in (("unseen", figures), ("of the training", familiar))
                for label, one in some[key].items()
            ],
        )
        yield ""
    yield from (
        "Of sharp kernels (bone) there is none: the appliance does not choose such a series.",
        "",
        "## With look-alikes",
        "",
        "Studies without blood that hold each of them, alone or with others. "
        f"{figures['studies_for_look_alikes']} more studies of the unseen settings were drawn for the rare ones, each "
        "alone in its head and on slices of 5 mm; they count here only. Contrast is refused by the gate.",
        "",
    )
    yield from _table(
        ["look-alike", "specificity"], [[kind, _said(one)] for kind, one in figures["by_look_alike"].items()]
    )
    yield from ("", "![Sensitivity and specificity by group](strata.svg)", "", "## Calibration", "")
    yield from _table(
        ["", "unseen settings", "settings of the training"],
        [
            [name, _said(figures["calibration"][key]), _said(familiar["calibration"][key])]
            for key, name in (("brier", "Brier score"), ("ece", "expected calibration error, ten bins"))
        ],
    )
    yield from (
        "",
        "Half of these studies bleed. Where fewer do, the same probability means less.",
        "",
        "![Reliability](reliability.svg)",
        "",
        "## Lesion volume",
        "",
    )
    if volume := figures["volume_agreement"]:
        yield from _table(
            ["called minus true, mL", "found bleeds, unseen settings"],
            [
                ["bias", _said(volume["bias"])],
                ["limits of agreement, lower", _said(volume["lower_limit"])],
                ["limits of agreement, upper", _said(volume["upper_limit"])],
                ["median of called over true", f"{volume['median_ratio']:.2f}"],
            ],
        )
        yield from ("", "The difference grows with the volume, which one pair of limits does not show; the plot does.",
                    "", "![Bland and Altman's plot](agreement.svg)")  # fmt: skip
    else:
        yield "Too few bleeds were found to say anything."
    yield from ("", "## Pictures", "")
    yield from ("Brain window; green: the blood that was drawn, orange: what the model called. Chosen by rule.", "")
    rules = {
        "hits": "Hits: of each subtype, where it is most of the blood, the one of median volume among those found",
        "misses": "Misses: the largest; the slab with the most blood",
        "false_alarms": "False alarms: the most probable",
    }
    for name, rule in rules.items():
        yield from (f"{rule}.", "")
        if shown[name]:
            yield from (f"![{name.replace('_', ' ').capitalize()}]({name}.png)", "")
            yield from _table(
                ["", "blood, mL", "called, mL", "probability", "slices, kernel", "look-alikes", "seed"],
                [_row(number, one) for number, one in enumerate(shown[name], 1)],
            )
        else:
            yield "There were none."
        yield ""
    yield from _real(figures["real"])
    yield from ("", "## Where it fails", "")
    yield from _failures(figures)
    yield from ("", "## How it was measured", "")
    yield from _method(figures)


def _stated(stated: Mapping[str, Any]) -> Iterator[str]:
    if "sensitivity" in stated and "specificity" in stated:
        yield (
            f"package.toml states what it was set at: sensitivity {stated['sensitivity']:.3f}, specificity "
            f"{stated['specificity']:.3f}, on {stated.get('studies', '?')} other studies."
        )


def _real(real: Mapping[str, Any]) -> Iterator[str]:
    yield from ("## A real head", "")
    if "skipped" in real:
        yield f"**Skipped:** {real['skipped']}."
        return
    gate = (
        f"As it is, the gate refuses it ({real['gate']}), so that one criterion is excused here."
        if real["gate"]
        else ""
    )
    yield from (
        f"`{real['name']}`, a real head CT without visible haemorrhage, {len(real['slabs'])} slabs. {gate}".rstrip(),
        f"It comes out **{'positive, which is wrong' if real['positive'] else 'negative'}**: probability "
        f"{real['probability']:.3f}, positive from {real['threshold']:g} on. One head proves nothing, and this one "
        "less: how training varies what lies beside bone was set with it in view.",
        *_raised(real),
        "",
        "Probability of each slab, foot to head: " + ", ".join(f"{one:.3f}" for one in real["slabs"]) + ".",
    )


def _raised(real: Mapping[str, Any]) -> Iterator[str]:
    calibrated = real.get("threshold_of_calibration", real["threshold"])
    if calibrated < real["threshold"]:
        called = "positive" if real["probability"] >= calibrated else "negative"
        yield (
            f"The simulated calibration studies alone would have set the threshold at {calibrated:g}, where it would "
            f"be {called}: real heads score higher than simulated ones. The threshold was raised with this head in "
            "view, so that it is no evidence for it."
        )


def _failures(figures: Mapping[str, Any]) -> Iterator[str]:
    """The weakest groups and the counts, from the figures alone."""
    missed = figures["sensitivity"]["n"] - _count(figures["sensitivity"])
    alarms = figures["specificity"]["n"] - _count(figures["specificity"])
    small = sum(
        one["n"] - _count(one) for name, one in figures["by_volume_ml"].items() if name in ("below 1", "1 to 5")
    )
    yield from (
        f"{missed} of {figures['sensitivity']['n']} bleeds were missed, {small} of them under {SMALL_ML:g} mL; "
        f"{alarms} of {figures['specificity']['n']} studies without blood were called positive.",
        "",
        f"The weakest groups of {ENOUGH} studies and more, unseen settings:",
        "",
    )
    ranked = sorted(
        (
            (one["value"], group, label, one)
            for group, rows in _strata(figures).items()
            for label, one in rows.items()
            if one["n"] >= ENOUGH and not group.endswith(", all")
        ),
        key=lambda row: row[:3],
    )
    yield from _table(
        ["figure", "group", "value", "wrong"],
        [[group, label, _said(one), f"{one['n'] - _count(one)} of {one['n']}"] for _, group, label, one in ranked[:12]],
    )
    cells = sorted(
        (
            (one["n"] - _count(one), subtype, name, one)
            for subtype, row in figures["by_subtype_and_volume_ml"].items()
            for name, one in row.items()
            if one["n"] > _count(one)
        ),
        key=lambda row: (-row[0], row[1], row[2]),
    )
    if cells:
        yield from ("", "Most misses, by what most of the blood is:", "")
        yield from _table(
            ["subtype", "mL", "missed", "sensitivity"],
            [[subtype, name, f"{wrong} of {one['n']}", _said(one)] for wrong, subtype, name, one in cells[:8]],
        )


def _method(figures: Mapping[str, Any]) -> Iterator[str]:
    seeds = figures["seeds"]
    yield from (
        f"    {figures['command']}",
        "",
        f"- Package {figures['package']['name']} {figures['package']['version']}, model.onnx "
        f"`{figures['package']['model_onnx']}`.",
        f"- Seeds {seeds['unseen'][0]} to {seeds['unseen'][1]} (unseen settings) and {seeds['training'][0]} to "
        f"{seeds['training'][1]} (settings of the training). An odd seed's study is of the head of the even seed "
        "before it. A seed gives the same study bit for bit on the same versions.",
        "- Each study is written as CT Image Storage and read by the appliance's own code: headers, choice of the "
        "series, gate, decoder, slabs, the package's model.onnx in a real Triton (ONNX Runtime, CPU), verdict. "
        "Probability, volume, outlines and key slabs are the verdict's.",
        "- Slices of 512 x 512 pixels, 0.6 to 7 mm thick, gantry tilted in a third of the studies.",
        "- A study bleeds if a voxel of its mask does (blood fills two fifths of it); its volume is that of the blood "
        "within the slices. Blood that the edge of the bone hides in a slab counts in neither, as in the outlines that "
        "readers drew for the statistics; up to 0.6.0 it did. A volume is called only in slabs that are positive "
        "themselves.",
        "- Intervals: proportions Wilson 1927; AUC DeLong 1988, on the logit; Brier score and calibration error "
        "bootstrap percentiles; limits of agreement Bland and Altman 1986. Nothing is corrected for the number of "
        "groups.",
        f"- {figures['seconds']} s of simulating, writing and reading, all added up, on {figures['cores']} cores.",
        "- " + ", ".join(f"{name} {version}" for name, version in figures["versions"].items()) + ".",
    )


def _row(number: int, one: Outcome) -> list[str]:
    blood = ", ".join(f"{name} {volume:.1f}" for name, volume in one.volumes_ml.items()) or "none"
    return [
        str(number),
        blood,
        f"{one.called_ml:.1f}",
        f"{one.probability:.2f}",
        f"{one.thickness_mm:g} mm, {one.kernel}",
        ", ".join(one.look_alikes) or "none",
        str(one.seed),
    ]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "| " + " | ".join(["---"] * len(head)) + " |"
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def _said(one: Mapping[str, Any]) -> str:
    """An estimate in words."""
    if one["value"] is None:
        return "–"
    digits = 3 if abs(one["value"]) < 10 else 1
    low, high = (f"{one[end]:.{digits}f}" for end in ("low", "high"))
    return f"{one['value']:.{digits}f} ({low} to {high}; {one['n']})"


def _found(one: Mapping[str, Any]) -> str:
    return f"{_count(one)} of {one['n']}" if one["n"] else "–"


def _count(one: Mapping[str, Any]) -> int:
    """Of a proportion."""
    found: float = (one["value"] or 0.0) * one["n"]
    return round(found)
