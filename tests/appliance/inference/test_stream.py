"""A study through the model that a real server runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from appliance.governance.package import OperatingPoint, Package
from appliance.inference.stream import analyse
from appliance.inference.triton import TritonClient
from dicom_io.header import FramePlane
from dicom_io.volume import Plane, assemble

from .conftest import Server
from .test_brain import load

pytestmark = pytest.mark.interop


def test_a_real_head_gets_a_verdict(triton_server: Server, reference: Package, ge_head: Path) -> None:
    volume, hu_of_plane = load(ge_head)
    used: set[str] = set()

    def decoded(index: int) -> np.ndarray:
        used.add("pydicom")
        return hu_of_plane(index)

    with TritonClient(triton_server.url) as client:
        verdict = analyse(reference, client, volume, decoded, study_uid="1.2.3", series_uid="1.2.3.4", codecs=used)
        assert verdict == analyse(
            reference, client, volume, decoded, study_uid="1.2.3", series_uid="1.2.3.4", codecs=used
        )
    assert len(verdict.slabs) == 28
    assert verdict.codecs == ("pydicom",)
    assert verdict.limitations == ()
    assert [slab.sop_instance_uid for slab in verdict.slabs] == [plane.sop_instance_uid for plane in volume.planes]
    assert verdict.probability == max(slab.probabilities["any"] for slab in verdict.slabs)


def test_what_is_asked_for_is_one_plane_after_the_other(triton_server: Server, reference: Package) -> None:
    """Thin slices of a bright disc: every plane is decoded once, and outlines come out on images that are there."""
    planes = [
        Plane(f"1.2.{n}", 0, FramePlane((0.0, 0.0, float(n)), (1, 0, 0, 0, 1, 0), (0.5, 0.5), 1.0), n)
        for n in range(100)
    ]
    rows, columns = np.mgrid[:512, :512] - 255.5
    disc = np.where(np.hypot(rows, columns) < 140, 60.0, -1000.0).astype(np.float32)
    asked: list[int] = []

    def hu_of_plane(index: int) -> np.ndarray:
        asked.append(index)
        return disc

    everything = replace(reference, operating_point=OperatingPoint(0.0, 0.0))
    with TritonClient(triton_server.url) as client:
        verdict = analyse(
            everything, client, assemble(planes), hu_of_plane, study_uid="1", series_uid="2", codecs=["none"]
        )
    assert asked == list(range(100))
    assert len(verdict.slabs) == 20
    assert verdict.positive
    assert len(verdict.key_slabs) == 3
    assert verdict.volume_ml == pytest.approx(256 * 256 * 100 / 1000, rel=0.01)
    uids = {plane.sop_instance_uid for plane in planes}
    assert all(slab.sop_instance_uid in uids and len(slab.outlines) == 1 for slab in verdict.slabs)
