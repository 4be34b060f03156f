"""Small builders that many tests share."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from appliance.intake.spool import Spool
from dicom_io.header import FramePlane, Header

CT = "1.2.840.10008.5.1.4.1.1.2"
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
EXPLICIT = "1.2.840.10008.1.2.1"
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def plane(z: float, *, thickness: float | None = 5.0, orientation: tuple[float, ...] = AXIAL) -> FramePlane:
    """A slice of 0.5 mm pixels at that height."""
    return FramePlane((-128.0, -128.0, z), orientation, (0.5, 0.5), thickness)


def header(
    number: int = 1, *, series: str = "1.2.3.1", study: str = "1.2.3", z: float | None = None, **changes: Any
) -> Header:
    """The header of slice ``number`` of an adult's plain head CT with 5 mm slices."""
    height = 5.0 * number if z is None else z
    base = Header(
        sop_class_uid=CT,
        sop_instance_uid=f"{series}.{number}",
        study_instance_uid=study,
        series_instance_uid=series,
        transfer_syntax_uid=EXPLICIT,
        modality="CT",
        image_type=("ORIGINAL", "PRIMARY", "AXIAL"),
        rows=512,
        columns=512,
        number_of_frames=1,
        samples_per_pixel=1,
        photometric_interpretation="MONOCHROME2",
        frames=(plane(height, thickness=changes.pop("thickness", 5.0)),),
        gantry_detector_tilt=0.0,
        kvp=120.0,
        convolution_kernel="STANDARD",
        body_part_examined="HEAD",
        study_description="CT HEAD",
        series_description="AXIAL",
        protocol_name="",
        manufacturer="ACME",
        manufacturer_model_name="ONE",
        contrast_bolus_agent="",
        frame_of_reference_uid="1.2.3.9",
        patient="somebody",
        patient_age="065Y",
        patient_birth_date="19610101",
        study_date="20260601",
        instance_number=number,
        series_number=int(series.rsplit(".", 1)[-1]),
        acquisition_number=1,
        number_of_series_related_instances=None,
        images_in_acquisition=None,
        problems=(),
    )
    return replace(base, **changes)


def head_series(count: int = 30, **changes: Any) -> list[Header]:
    """A contiguous series of that many slices."""
    step = changes.pop("step", 5.0)
    return [header(n, z=step * n, **changes) for n in range(1, count + 1)]


def spooled(spool: Spool, content: bytes) -> str:
    """Put bytes into a spool as intake does; returns their digest."""
    lane = spool.take_lane()
    incoming = spool.open(lane)
    incoming.write(memoryview(content))
    incoming.sync()
    spool.publish(incoming)
    spool.give_back(lane)
    return incoming.digest


def mentioning(words: str) -> list[bytes]:
    """The command lines of other processes that hold these words."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes()
        except OSError:
            continue
        if words.encode() in line and entry.parent.name != str(os.getpid()):
            found.append(line)
    return found
