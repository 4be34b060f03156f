"""One study through one model: slabs, model input, inference, verdict; a batch of slabs in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from appliance.governance.package import Package
from appliance.ledger.records import Verdict
from dicom_io.volume import Volume

from .preprocess import model_input
from .slabs import plan_slabs, slab_hu
from .triton import Output, TritonClient
from .verdict import aggregate


def analyse(
    package: Package,
    client: TritonClient,
    volume: Volume,
    hu_of_plane: Callable[[int], NDArray[Any]],
    *,
    study_uid: str,
    series_uid: str,
    codecs: Collection[str],
    limitations: Sequence[str] = (),
) -> Verdict:
    """Run a package on a volume.

    Args:
        hu_of_plane: (rows, columns) HU of the plane with that index; called once for each plane, from the feet up.
        codecs: decoders that produced the pixels; read after the last call of ``hu_of_plane``, which may add to it.
        limitations: sentences that the verdict carries.

    Raises:
        TritonError: the model gave no answer that can be used.
        GeometryError: the planes differ in size.
        ScansideError: whatever ``hu_of_plane`` raises.
    """
    preprocessing = package.preprocessing
    windows = [(window.center, window.width) for window in preprocessing.windows]
    plans = plan_slabs(volume, preprocessing.slab_mm)
    outputs: list[Output] = []
    shape = (0, 0)
    for start in range(0, len(plans), package.model.maximum_batch):
        batch = plans[start : start + package.model.maximum_batch]
        slabs = np.empty((len(batch), *package.model.input.shape), np.float32)
        for slab, plan in zip(slabs, batch, strict=True):
            hu = slab_hu(plan, hu_of_plane)
            shape = (hu.shape[0], hu.shape[1])
            slab[:] = model_input(
                hu,
                volume.planes[plan.representative].geometry.spacing,
                windows=windows,
                size=preprocessing.size,
                pixel_mm=preprocessing.spacing_mm,
            )
        outputs.append(client.infer(package, slabs))
    joined = Output(
        np.concatenate([output.probabilities for output in outputs]),
        np.concatenate([output.lesion_map for output in outputs]),
    )
    return aggregate(
        package,
        volume,
        plans,
        joined,
        study_uid=study_uid,
        series_uid=series_uid,
        shape=shape,
        codecs=codecs,
        limitations=limitations,
    )
