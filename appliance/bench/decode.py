"""The decoders beside the libraries that others use: slices a second of the same files, and whether all bits are right.

`python -m appliance.bench.decode` does the same as `scanside bench decode` where the command's own libraries are not
installed. What is measured, and what it means, is written in docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import imagecodecs
import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.encaps import encapsulate
from pydicom.uid import (
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    JPEG2000Lossless,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from appliance.bench import slices as simulated
from dicom_io._codecs import CodedFrame, FrameDecoder
from dicom_io.errors import ScansideError
from dicom_io.nvimage import NvImageCodec
from dicom_io.pixels import decode, decode_many

Images = list[NDArray[Any]]

OURS, OURS_ON_A_GPU = "scanside", "scanside gpu"

IMAGES, ROUNDS = 32, 3
"""What is measured unless one asks for something else."""

_INTERCEPT = -1024


@dataclass(frozen=True, slots=True)
class Kind:
    """One transfer syntax, and whether the stored values are signed; all have 12 bits."""

    name: str
    syntax: str
    signed: bool = False


KINDS = (
    Kind("raw", ExplicitVRLittleEndian),
    Kind("rle", RLELossless),
    Kind("jpeg-lossless", JPEGLosslessSV1),
    Kind("jpeg-ls", JPEGLSLossless),
    Kind("jpeg2000", JPEG2000Lossless),
    Kind("jpeg2000-signed", JPEG2000Lossless, signed=True),
    Kind("htj2k", HTJ2KLossless),
)


@dataclass(frozen=True, slots=True)
class Case:
    """The files of one kind, their frames as they lie in the files, and the values that must come out."""

    kind: Kind
    paths: list[Path]
    frames: list[bytes]
    truth: Images


@dataclass(frozen=True, slots=True)
class Contestant:
    """A way to decode all of a case; None as its answer means that it does not take that kind."""

    name: str
    run: Callable[[Case], Images | None]


def measure(
    images: int,
    rounds: int,
    kinds: Sequence[str] = (),
    directory: Path | None = None,
    *,
    on_step: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Run the benchmark; the document that `scanside bench decode --json` prints.

    Args:
        images: slices of each kind, 512 × 512 pixels of 12 bits.
        rounds: how often everything is measured; within a round each contestant decodes each kind once.
        kinds: names of `KINDS`; none means all.
        directory: where the files lie meanwhile; None is the system's temporary folder.

    Raises:
        ScansideError: there is no kind of that name.
    """
    unknown = [name for name in kinds if name not in [one.name for one in KINDS]]
    if unknown:
        names = ", ".join(one.name for one in KINDS)
        raise ScansideError("there is no such kind", unknown[0], f"there are {names}")
    contestants, left_out = _contestants()
    seconds: dict[tuple[str, str], list[float]] = {}
    exact: dict[tuple[str, str], bool] = {}
    with TemporaryDirectory(prefix="scanside-bench-", dir=directory) as folder:
        cases = []
        for kind in KINDS:
            if not kinds or kind.name in kinds:
                on_step(f"encoding {kind.name}")
                cases.append(_case(kind, images, Path(folder)))
        for number in range(-1, rounds):  # the first shows who takes what, and whether the values are right
            for case in cases:
                turn = number % len(contestants)  # nobody always comes after the same one
                for one in (*contestants[turn:], *contestants[:turn]):
                    key = case.kind.name, one.name
                    if number >= 0 and key not in exact:
                        continue
                    on_step(f"{case.kind.name}: {one.name}")
                    began = time.perf_counter()
                    found = one.run(case)
                    took = time.perf_counter() - began
                    if found is None:
                        continue
                    right = len(found) == images and all(map(np.array_equal, found, case.truth))
                    exact[key] = exact.get(key, True) and right
                    if number >= 0:
                        seconds.setdefault(key, []).append(took)
    order = [one.name for one in contestants]
    results = [
        {
            "kind": kind,
            "decoder": name,
            "slices_per_s": round(images / median(took), 1),
            "bit_exact": exact[kind, name],
            "rounds": [round(images / one, 1) for one in took],
        }
        for (kind, name), took in sorted(seconds.items(), key=lambda item: (item[0][0], order.index(item[0][1])))
    ]
    return {
        "images": images,
        "rounds": rounds,
        "machine": {"cores": len(os.sched_getaffinity(0)), "python": platform.python_version(), **_versions()},
        "results": results,
        "ratios": _ratios(seconds, OURS),
        "gpu_ratios": _ratios(seconds, OURS_ON_A_GPU),
        "left_out": left_out,
    }


def _ratios(seconds: dict[tuple[str, str], list[float]], ours: str) -> dict[str, float]:
    """``<kind>_<decoder>`` → our speed over theirs in each round, and of those the median."""
    return {
        f"{kind}_{name}": round(median(their / our for our, their in zip(seconds[kind, ours], theirs, strict=True)), 3)
        for (kind, name), theirs in sorted(seconds.items())
        if name != ours and (kind, ours) in seconds
    }


def _versions() -> dict[str, str]:
    return {"imagecodecs": imagecodecs.__version__, "pydicom": pydicom.__version__}


def _contestants() -> tuple[list[Contestant], list[dict[str, str]]]:
    """Those that can run here, and why the others cannot.

    Each runs on one thread, but for nvImageCodec, which has threads of its own, and "scanside all cores".
    """
    found = [
        Contestant(OURS, lambda case: [decode(path).stored[0] for path in case.paths]),
        Contestant("scanside all cores", lambda case: [one.stored[0] for one in decode_many(case.paths)]),
        Contestant("imagecodecs", _imagecodecs),
        Contestant("pydicom", _pydicom),
    ]
    left_out = []
    for backend in ("cpu", "gpu"):
        try:
            codec = NvImageCodec(backend)
        except ScansideError as error:
            left_out.append({"name": f"nvimgcodec {backend}", "reason": str(error)})
            continue
        found.append(Contestant(f"nvimgcodec {backend}", _raw(codec)))
        if backend == "gpu":
            found.append(Contestant(OURS_ON_A_GPU, _with(codec)))
    return found, left_out


def _imagecodecs(case: Case) -> Images | None:
    """The fastest function of imagecodecs for the syntax, on frames that lie in memory, unchecked."""
    syntax, shape = case.kind.syntax, case.truth[0].shape
    if syntax == ExplicitVRLittleEndian:
        return None
    if syntax == RLELossless:
        rows = (imagecodecs.dicomrle_decode(frame, "<u2") for frame in case.frames)
        return [np.frombuffer(one, "<u2").reshape(shape) for one in rows]
    functions: dict[str, Callable[[bytes], Any]] = {
        JPEGLosslessSV1: imagecodecs.jpeg8_decode,
        JPEGLSLossless: imagecodecs.jpegls_decode,
        JPEG2000Lossless: imagecodecs.jpeg2k_decode,
        HTJ2KLossless: imagecodecs.htj2k_decode,
    }
    return [np.asarray(functions[syntax](frame)) for frame in case.frames]


def _pydicom(case: Case) -> Images | None:
    """pydicom with whichever of its plug-ins are installed."""
    try:
        return [pydicom.dcmread(path).pixel_array for path in case.paths]
    except (NotImplementedError, RuntimeError):  # it has no plug-in for the syntax
        return None


def _raw(codec: NvImageCodec) -> Callable[[Case], Images | None]:
    """nvImageCodec by itself: all frames in one call, from memory to memory."""

    def run(case: Case) -> Images | None:
        cells = codec.decode([CodedFrame(case.kind.syntax, frame, *case.truth[0].shape) for frame in case.frames])
        values = [one.values for one in cells if one is not None]
        return values if len(values) == len(cells) else None

    return run


def _with(decoder: FrameDecoder) -> Callable[[Case], Images | None]:
    """This box with a GPU: files to HU, with the sample that the CPU decodes, too."""

    def run(case: Case) -> Images | None:
        decoded = decode_many(case.paths, decoder)
        return [one.stored[0] for one in decoded] if all(one.codec == decoder.name for one in decoded) else None

    return run


def _case(kind: Kind, images: int, folder: Path) -> Case:
    made = simulated.make(folder, images)
    case = Case(kind, [], [], [])
    for number, one in enumerate(made):
        dataset = pydicom.dcmread(one.path)
        one.path.unlink()
        hu = np.clip(dataset.pixel_array, _INTERCEPT, 2047)
        values = hu.astype(np.int16) if kind.signed else (hu - _INTERCEPT).astype(np.uint16)
        dataset.BitsStored, dataset.HighBit = 12, 11
        dataset.PixelRepresentation = int(kind.signed)
        dataset.RescaleIntercept = "0" if kind.signed else str(_INTERCEPT)
        frame = encoded(kind.syntax, values, dataset)
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.UID(kind.syntax)
        dataset.PixelData = frame if kind.syntax == ExplicitVRLittleEndian else encapsulate([frame])
        dataset["PixelData"].is_undefined_length = kind.syntax != ExplicitVRLittleEndian
        path = folder / f"{kind.name}-{number:06d}.dcm"
        dataset.save_as(path, enforce_file_format=True)
        case.paths.append(path)
        case.frames.append(frame)
        case.truth.append(values)
    return case


def encoded(syntax: str, values: NDArray[Any], dataset: pydicom.Dataset) -> bytes:
    """One frame of a data set in a transfer syntax, without loss.

    Args:
        values: (rows, columns), of 12 bits.
    """
    if syntax == RLELossless:
        dataset.PixelData = values.tobytes()
        dataset.compress(RLELossless, encoding_plugin="pydicom", generate_instance_uid=False)
        (frame,) = pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=1)
        return bytes(frame)
    if syntax in (JPEGLossless, JPEGLosslessSV1):
        predictor = 1 if syntax == JPEGLosslessSV1 else 4
        return bytes(imagecodecs.jpeg8_encode(values, lossless=True, predictor=predictor, bitspersample=12))
    if syntax == JPEGLSLossless:
        return bytes(imagecodecs.jpegls_encode(values))
    if syntax == JPEG2000Lossless:
        return bytes(imagecodecs.jpeg2k_encode(values, level=0, codecformat="j2k", bitspersample=12, reversible=True))
    if syntax == HTJ2KLossless:
        return bytes(imagecodecs.htj2k_encode(values, reversible=True))
    if syntax == HTJ2KLosslessRPCL:
        return bytes(imagecodecs.htj2k_encode(values, reversible=True, tlm=True))  # its order is RPCL in any case
    return values.tobytes()


def lines(told: dict[str, Any]) -> list[str]:
    """The document for people, as plain text."""
    machine = told["machine"]
    found = [
        f"{told['images']} slices of 512 × 512 pixels of 12 bits, median of {told['rounds']} rounds; "
        f"{machine['cores']} cores, Python {machine['python']}, imagecodecs {machine['imagecodecs']}",
        f"{'kind':16}  {'decoder':18}  {'slices/s':>9}  {'exact':5}  ours/theirs",
    ]
    for one in told["results"]:
        ratio = told["ratios"].get(f"{one['kind']}_{one['decoder']}")
        found.append(
            f"{one['kind']:16}  {one['decoder']:18}  {one['slices_per_s']:9.1f}  "
            f"{'yes' if one['bit_exact'] else 'NO':5}" + ("" if ratio is None else f"  {ratio:11.2f}")
        )
    return found + [f"left out: {one['name']}: {one['reason']}" for one in told["left_out"]]


def main() -> None:
    """The command without the libraries that `scanside` needs."""
    options = argparse.ArgumentParser(prog="python -m appliance.bench.decode", description=main.__doc__)
    options.add_argument("--images", type=int, default=IMAGES)
    options.add_argument("--rounds", type=int, default=ROUNDS)
    options.add_argument("--kinds", default="", help="with commas between: " + ", ".join(one.name for one in KINDS))
    options.add_argument("--json", action="store_true")
    chosen = options.parse_args()
    told = measure(chosen.images, chosen.rounds, [one for one in chosen.kinds.split(",") if one])
    print(json.dumps(told, indent=2) if chosen.json else "\n".join(lines(told)))


if __name__ == "__main__":
    main()
