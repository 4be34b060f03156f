"""The benchmark of preprocessing: every implementation and its plain peers on the same slabs, in interleaved rounds.

Run it as ``python -m appliance.bench.preprocess --json`` where only NumPy and OpenCV are installed; what else is
there (DALI, CuPy with a GPU) is measured, too. What is measured, and what it means, is written in docs/performance.md.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from appliance.inference import preprocess, preprocess_dali, preprocess_gpu
from appliance.inference.preprocess import AIR_HU, SIZE, WINDOWS
from dicom_io.errors import ScansideError

SHAPE = (512, 512)
PEERS = ("opencv", "numpy")

Slabs = NDArray[np.float32]
Work = Callable[[], Any]


def measure(slabs: int = 32, rounds: int = 5, spacing_mm: float = 0.5) -> dict[str, Any]:
    """Run the benchmark; the document that `scanside bench preprocess --json` prints.

    Args:
        slabs: slabs of 512 x 512 in one batch; each round does one batch with each implementation.
        spacing_mm: between their rows and columns; at most 0.5, because the peers cut nothing off.

    Raises:
        ScansideError: the spacing is another one, or an implementation or a peer does not agree with the definition.
    """
    if not 0 < spacing_mm <= 0.5:
        raise ScansideError(f"a spacing of {spacing_mm:g} mm cannot be measured", remedy="give one of at most 0.5 mm")
    hu = heads(slabs)
    works: dict[str, Work] = {}
    left_out: list[dict[str, str]] = []
    for name, prepare in CONTESTANTS.items():
        reason = _missing(name, spacing_mm)
        if reason:
            left_out.append({"name": name, "reason": reason})
        else:
            works[name] = prepare(hu, (spacing_mm, spacing_mm))
    expected = np.stack(works["definition"]())
    parity = {name: _difference(name, work(), expected) for name, work in works.items() if name != "definition"}
    seconds: dict[str, list[float]] = {name: [] for name in works}
    names = list(works)
    for number in range(rounds):
        turn = number % len(names)  # nobody always comes after the same one
        for name in (*names[turn:], *names[:turn]):
            start = time.perf_counter()
            works[name]()
            seconds[name].append(time.perf_counter() - start)
    return {
        "device": _gpu_name() if not _no_gpu() else "cpu",
        "slabs": slabs,
        "rounds": rounds,
        "spacing_mm": spacing_mm,
        "machine": {
            "cores": len(os.sched_getaffinity(0)),
            "python": platform.python_version(),
            "numpy": np.__version__,
            "opencv": cv2.__version__,
        },
        "slices_per_s": {name: round(slabs / median(each), 1) for name, each in seconds.items()},
        "ratios": ratios(seconds),
        "parity": parity,
        "left_out": left_out,
    }


def ratios(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """Each implementation's speed over that of the fastest peer in the same round, and of those the median."""
    fastest = [min(each) for each in zip(*(seconds[name] for name in PEERS if name in seconds), strict=True)]
    return {
        name: round(median(peer / own for peer, own in zip(fastest, each, strict=True)), 3)
        for name, each in seconds.items()
        if name not in PEERS
    }


def heads(count: int) -> Slabs:
    """(count, 512, 512) HU, all different: an ellipse of noisy brain in a skull, in air."""
    random = np.random.default_rng(0)
    rows, columns = np.ogrid[-1 : 1 : SHAPE[0] * 1j, -1 : 1 : SHAPE[1] * 1j]
    radius = np.hypot(rows / 0.8, columns / 0.65)
    head = np.where(radius < 0.9, 35.0, np.where(radius < 1, 1200.0, -1000.0))
    noisy: Slabs = (head + random.normal(0, 8, (count, *SHAPE))).round().astype(np.float32)
    return noisy


def _definition(hu: Slabs, spacing_mm: tuple[float, float]) -> Work:
    return lambda: [preprocess.model_input(image, spacing_mm) for image in hu]


def _opencv(hu: Slabs, spacing_mm: tuple[float, float]) -> Work:
    """The same arithmetic as one writes it down who wants OpenCV to do it."""
    edges = [round(length * spacing) for length, spacing in zip(SHAPE, spacing_mm, strict=True)]
    top, left = ((SIZE - edge) // 2 for edge in edges)
    border = (top, SIZE - edges[0] - top, left, SIZE - edges[1] - left)

    def one(image: NDArray[np.float32]) -> NDArray[np.float32]:
        small = cv2.resize(image, (edges[1], edges[0]), interpolation=cv2.INTER_AREA)
        small = cv2.copyMakeBorder(small, *border, cv2.BORDER_CONSTANT, value=AIR_HU)
        channels = np.empty((len(WINDOWS), SIZE, SIZE), np.float32)
        for channel, (centre, width) in zip(channels, WINDOWS, strict=True):
            np.clip((small - np.float32(centre - width / 2)) * np.float32(1 / width), 0, 1, out=channel)
        return channels

    return lambda: [one(image) for image in hu]


def _numpy(hu: Slabs, spacing_mm: tuple[float, float]) -> Work:
    """The mean of four pixels as strided sums, then the windows in place; only for half-millimetre pixels."""

    def one(image: NDArray[np.float32]) -> NDArray[np.float32]:
        small = image[::2, ::2] + image[1::2, ::2]
        small += image[::2, 1::2]
        small += image[1::2, 1::2]
        small *= np.float32(0.25)
        channels = np.empty((len(WINDOWS), SIZE, SIZE), np.float32)
        for channel, (centre, width) in zip(channels, WINDOWS, strict=True):
            np.subtract(small, np.float32(centre - width / 2), out=channel)
            channel *= np.float32(1 / width)
            np.clip(channel, 0, 1, out=channel)
        return channels

    return lambda: [one(image) for image in hu]


def _arrays(hu: Slabs, spacing_mm: tuple[float, float]) -> Work:
    run = preprocess_gpu.prepare(np, SHAPE, spacing_mm)
    return lambda: run(hu)


def _cupy(hu: Slabs, spacing_mm: tuple[float, float]) -> Work:
    return _on_gpu(hu, spacing_mm)


def _cupy_resident(hu: Slabs, spacing_mm: tuple[float, float]) -> Work:
    import cupy

    return _on_gpu(cupy.asarray(hu), spacing_mm)


def _on_gpu(hu: Any, spacing_mm: tuple[float, float]) -> Work:
    import cupy

    run = preprocess_gpu.prepare(cupy, SHAPE, spacing_mm)

    def work() -> Any:
        result = run(hu)
        cupy.cuda.get_current_stream().synchronize()
        return result

    return work


def _dali_cpu(hu: Slabs, spacing_mm: tuple[float, float]) -> Work:
    threads = len(os.sched_getaffinity(0))
    run = preprocess_dali.prepare("cpu", SHAPE, spacing_mm, maximum_batch=len(hu), threads=threads)
    return lambda: run(hu)


def _dali_gpu(hu: Slabs, spacing_mm: tuple[float, float]) -> Work:
    run = preprocess_dali.prepare("gpu", SHAPE, spacing_mm, maximum_batch=len(hu))
    return lambda: run(hu)


CONTESTANTS: dict[str, Callable[[Slabs, tuple[float, float]], Work]] = {
    "definition": _definition,
    "opencv": _opencv,
    "numpy": _numpy,
    "arrays": _arrays,
    "dali_cpu": _dali_cpu,
    "dali_gpu": _dali_gpu,
    "cupy": _cupy,
    "cupy_resident": _cupy_resident,
}
"""`cupy` and `dali_gpu` are given slabs in host memory, `cupy_resident` slabs on the device; all three leave the result
there."""


def _missing(name: str, spacing_mm: float) -> str:
    """Why a contestant cannot be measured here; empty if it can."""
    if name == "numpy" and spacing_mm != 0.5:
        return "averages whole pixels only: needs 0.5 mm"
    if name.startswith("dali") and not _installed("nvidia.dali"):
        return "DALI is not installed"
    return _no_gpu() if name.endswith("gpu") or name.startswith("cupy") else ""


def _installed(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def _no_gpu() -> str:
    if not _installed("cupy"):
        return "CuPy is not installed"
    import cupy

    try:
        return "" if cupy.cuda.runtime.getDeviceCount() else "there is no GPU"
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"there is no GPU that works: {error}"


def _gpu_name() -> str:
    import cupy

    return str(cupy.cuda.runtime.getDeviceProperties(0)["name"].decode())


def _difference(name: str, got: Any, expected: NDArray[np.float32]) -> float:
    host = np.stack(got) if isinstance(got, list) else got.get() if hasattr(got, "get") else got
    if host.shape != expected.shape:
        raise ScansideError(f"made {host.shape} where the definition makes {expected.shape}", name)
    difference = float(np.abs(host - expected).max())
    if not difference <= preprocess.TOLERANCE:
        raise ScansideError(
            f"is {difference:.2g} from the definition", name, f"at most {preprocess.TOLERANCE:g} is the same arithmetic"
        )
    return difference


def lines(told: Mapping[str, Any]) -> str:
    """The document for people."""
    machine = told["machine"]
    rows = [
        f"{told['slabs']} slabs of 512 x 512 at {told['spacing_mm']:g} mm, median of {told['rounds']} rounds; "
        f"{told['device']}, {machine['cores']} cores, Python {machine['python']}, NumPy {machine['numpy']}, "
        f"OpenCV {machine['opencv']}",
        f"{'':<14}{'slices/s':>10}{'of fastest peer':>17}{'from definition':>17}",
    ]
    for name, speed in told["slices_per_s"].items():
        ratio, parity = told["ratios"].get(name), told["parity"].get(name)
        shown = ("" if ratio is None else f"{ratio:.2f}", "" if parity is None else f"{parity:.1e}")
        rows.append(f"{name:<14}{speed:>10.0f}{shown[0]:>17}{shown[1]:>17}")
    rows += [f"left out: {one['name']}: {one['reason']}" for one in told["left_out"]]
    return "\n".join(rows)


def main() -> None:
    """The program for a machine with nothing but NumPy and OpenCV."""
    parser = argparse.ArgumentParser(description="Measure preprocessing beside its peers.")
    parser.add_argument("--slabs", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--spacing", type=float, default=0.5)
    parser.add_argument("--json", action="store_true")
    wanted = parser.parse_args()
    told = measure(wanted.slabs, wanted.rounds, wanted.spacing)
    print(json.dumps(told, indent=2) if wanted.json else lines(told))


if __name__ == "__main__":
    main()
