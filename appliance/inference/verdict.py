"""From the model's outputs to a verdict on the study.

The rule is the simplest that can be stated to a reader: a study is as suspicious as its most suspicious slab.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from appliance.governance.package import ANY, Package
from appliance.ledger.records import Outline, SlabResult, Verdict
from dicom_io.volume import Volume

from .preprocess import map_to_source, to_field
from .slabs import SlabPlan
from .triton import Output

KEY_SLABS = 3
EVALUATION = "Evaluation only, no basis for care."
"""Stands before the notice of every package that is not in clinical mode, wherever its verdict is shown."""
FINE_MM = 0.5
"""Pixel of the enlarged lesion map that outlines and areas are taken from."""
SPECK_MM2 = 4.0
"""Regions smaller than this are neither drawn nor measured: a quarter of a pixel of the model's own map."""


def aggregate(
    package: Package,
    volume: Volume,
    plans: Sequence[SlabPlan],
    output: Output,
    *,
    study_uid: str,
    series_uid: str,
    shape: tuple[int, int],
    codecs: Collection[str],
    limitations: Sequence[str] = (),
) -> Verdict:
    """The verdict of one package on one study.

    The probability of the study, of any haemorrhage and of each subtype, is the highest among the slabs. It is
    positive from the package's threshold on. Only slabs that reach that threshold themselves have outlines and a
    volume: where the lesion map, enlarged bilinearly, reaches its own threshold within the source image.

    Args:
        output: of the plans, in their order.
        shape: (rows, columns) of the volume's images.
        codecs: decoders that produced the pixels.
        limitations: sentences to carry along; the label's own, gaps and left-out duplicates of the volume are added.

    Raises:
        ValueError: there are no slabs, or not one output for each.
    """
    if not plans or len(plans) != len(output.probabilities) or len(plans) != len(output.lesion_map):
        raise ValueError(
            f"{len(plans)} slabs, {len(output.probabilities)} probabilities and {len(output.lesion_map)} lesion maps"
        )
    threshold = package.operating_point.threshold
    slabs = []
    for plan, values, lesion_map in zip(plans, output.probabilities, output.lesion_map, strict=True):
        plane = volume.planes[plan.representative]
        probabilities = {label: float(value) for label, value in zip(package.labels, values, strict=True)}
        outlines: tuple[Outline, ...] = ()
        area_mm2 = 0.0
        if probabilities[ANY] >= threshold:
            outlines, area_mm2 = lesions(package, lesion_map, shape, plane.geometry.spacing)
        slabs.append(
            SlabResult(
                index=plan.index,
                offset_mm=plan.offset_mm,
                thickness_mm=plan.thickness_mm,
                sop_instance_uid=plane.sop_instance_uid,
                frame=plane.frame,
                probabilities=probabilities,
                outlines=outlines,
                volume_ml=area_mm2 * plan.thickness_mm / 1000,
            )
        )
    highest = {label: max(slab.probabilities[label] for slab in slabs) for label in package.labels}
    return Verdict(
        study_instance_uid=study_uid,
        series_instance_uid=series_uid,
        package=package.name,
        package_version=package.version,
        udi=package.udi,
        notice=package.notice if package.mode == "clinical" else f"{EVALUATION} {package.notice}",
        positive=highest[ANY] >= threshold,
        probability=highest[ANY],
        threshold=threshold,
        subtypes={label: value for label, value in highest.items() if label != ANY},
        volume_ml=sum(slab.volume_ml for slab in slabs),
        slabs=tuple(slabs),
        key_slabs=_key_slabs(slabs, threshold),
        codecs=tuple(sorted(set(codecs))),
        limitations=(
            *(f"The label says: {one.text}." for one in package.indication.limitations),
            *limitations,
            *_limitations(volume),
        ),
    )


def lesions(
    package: Package, lesion_map: NDArray[np.float32], shape: tuple[int, int], spacing_mm: tuple[float, float]
) -> tuple[tuple[Outline, ...], float]:
    """Where a lesion map reaches the package's threshold.

    Args:
        lesion_map: (map, map) in 0..1.
        shape: (rows, columns) of the source image.
        spacing_mm: its spacing (between rows, between columns).

    Returns:
        Closed outlines in the source image, largest first, and the area within them in mm² (holes not counted).
    """
    size, pixel_mm = package.preprocessing.size, package.preprocessing.spacing_mm
    fine = round(size * pixel_mm / FINE_MM)
    values = cv2.resize(lesion_map, (fine, fine), interpolation=cv2.INTER_LINEAR)
    image = to_field(np.ones(shape, np.float32), spacing_mm, size=size, pixel_mm=pixel_mm, fill=0)
    within = cv2.resize(image, (fine, fine), interpolation=cv2.INTER_NEAREST) > 0.5
    mask = ((values >= package.operating_point.lesion_threshold) & within).astype(np.uint8)
    count, regions, statistics, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    pixel_mm2 = (size * pixel_mm / fine) ** 2
    found = []
    for region in range(1, count):
        area = float(statistics[region, cv2.CC_STAT_AREA]) * pixel_mm2
        if area < SPECK_MM2:
            continue
        contours, _ = cv2.findContours((regions == region).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        contour = contours[0]
        simple = cv2.approxPolyDP(contour, 0.5, closed=True)
        points = (simple if len(simple) >= 3 else contour).reshape(-1, 2)
        if len(points) < 3:  # a line one fine pixel wide
            continue
        on_map = (points + 0.5) * (len(lesion_map) / fine) - 0.5
        source = map_to_source(on_map, shape, spacing_mm, map_size=len(lesion_map), size=size, pixel_mm=pixel_mm)
        source = np.clip(source, 0, (shape[1] - 1, shape[0] - 1))
        found.append((area, tuple((round(float(c), 2), round(float(r), 2)) for c, r in source)))
    found.sort(key=lambda item: -item[0])
    return tuple(outline for _, outline in found), sum(area for area, _ in found)


def _key_slabs(slabs: Sequence[SlabResult], threshold: float) -> tuple[int, ...]:
    """The most suspicious positive slabs; next to one already chosen only if nothing else is left."""
    ranked = sorted(
        (index for index, slab in enumerate(slabs) if slab.probabilities[ANY] >= threshold),
        key=lambda index: (-slabs[index].probabilities[ANY], -slabs[index].volume_ml, index),
    )
    chosen: list[int] = []
    for index in ranked:
        if all(abs(index - other) > 1 for other in chosen):
            chosen.append(index)
    chosen += [index for index in ranked if index not in chosen]
    return tuple(chosen[:KEY_SLABS])


def _limitations(volume: Volume) -> list[str]:
    sentences = []
    if volume.gaps:
        places = "one place" if len(volume.gaps) == 1 else f"{len(volume.gaps)} places"
        missing = sum(gap.mm for gap in volume.gaps)
        sentences.append(
            f"Slices are missing in {places}, {missing:.1f} mm in all; nothing is known of what lies there."
        )
    if volume.duplicates:
        sentences.append(left_out(len(volume.duplicates)))
    return sentences


def left_out(slices: int) -> str:
    """The limitation that so many slices lie where another one does, and were not read."""
    subject = (
        "One slice in the place of another was" if slices == 1 else f"{slices} slices in the place of another were"
    )
    return f"{subject} left out."
