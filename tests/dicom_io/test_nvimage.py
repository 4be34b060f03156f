"""nvImageCodec against the CPU's codecs, bit for bit; what is left to them; and that a decoder that lies is caught.

Its decoders on the CPU take unsigned JPEG 2000 and HTJ2K. What is marked ``gpu`` needs one.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    CTImageStorage,
    EnhancedCTImageStorage,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    JPEG2000Lossless,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    generate_uid,
)

from dicom_io import nvimage
from dicom_io._codecs import Cells, CodedFrame, FrameDecoder, decode_frame
from dicom_io.errors import DecodeError, ScansideError
from dicom_io.nvimage import BATCH, NvImageCodec, known_frames
from dicom_io.pixels import SAMPLED_ONE_IN, decode, decode_many, decoder_for
from dicom_io.plausible import ImplausibleImage

ROWS, COLUMNS = 48, 40
WAVELETS = [JPEG2000Lossless, HTJ2KLossless, HTJ2KLosslessRPCL]


def gpus() -> int:
    """How many GPUs the driver has."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    return 0 if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) else count.value


@pytest.fixture(scope="module")
def cpu() -> NvImageCodec:
    pytest.importorskip("nvidia.nvimgcodec")
    return NvImageCodec("cpu")


@pytest.fixture(scope="module")
def gpu() -> NvImageCodec:
    """Whatever is wrong with it where there is a GPU is a failure, and no reason to skip."""
    if not gpus():
        pytest.skip("there is no NVIDIA GPU")
    return NvImageCodec("gpu")


def image(bits: int, signed: bool = False, *, seed: int = 0, rows: int = ROWS, columns: int = COLUMNS) -> NDArray[Any]:
    """(rows, columns) of smooth anatomy with noise that also holds the extreme values of its range."""
    least, most = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    y, x = np.mgrid[:rows, :columns]
    smooth = np.sin(x / 7 + seed) * np.cos(y / 9) / 2.5 + 0.5
    values = least + smooth * (most - least) + np.random.default_rng(seed).normal(0, 5, smooth.shape)
    made = values.clip(least, most).astype(np.int16 if signed else np.uint16)
    made[0, 0], made[-1, -1] = least, most
    return made


def coded(syntax: str, values: NDArray[Any], bits: int) -> CodedFrame:
    if syntax in (JPEGLossless, JPEGLosslessSV1):
        patterns = values.view(np.uint16) & np.uint16((1 << bits) - 1)
        cells = patterns if bits > 8 else patterns.astype(np.uint8)
        data = imagecodecs.jpeg8_encode(cells, lossless=True, predictor=1, bitspersample=bits)
    elif syntax == JPEG2000Lossless:
        data = imagecodecs.jpeg2k_encode(values, level=0, codecformat="j2k", bitspersample=bits, reversible=True)
    elif syntax == JPEGLSLossless:
        data = imagecodecs.jpegls_encode(values)
    else:
        data = imagecodecs.htj2k_encode(values, reversible=True)
    return CodedFrame(syntax, bytes(data), *values.shape)


def reference(frame: CodedFrame) -> Cells:
    return decode_frame(frame.syntax, frame.data, frame.rows, frame.columns)


def assert_as_reference(cells: Cells | None, frame: CodedFrame) -> None:
    expected = reference(frame)
    assert cells is not None
    assert (cells.precision, cells.signed) == (expected.precision, expected.signed)
    np.testing.assert_array_equal(cells.values, expected.values)


def write(folder: Path, frames: Sequence[CodedFrame], bits: int, signed: bool) -> Path:
    """A CT instance of these frames."""
    meta, one = FileMetaDataset(), Dataset()
    meta.TransferSyntaxUID = frames[0].syntax
    one.file_meta = meta
    one.SOPClassUID = meta.MediaStorageSOPClassUID = CTImageStorage if len(frames) == 1 else EnhancedCTImageStorage
    one.SOPInstanceUID = meta.MediaStorageSOPInstanceUID = generate_uid(None)
    one.SamplesPerPixel, one.PhotometricInterpretation = 1, "MONOCHROME2"
    one.Rows, one.Columns, one.NumberOfFrames = frames[0].rows, frames[0].columns, len(frames)
    one.BitsAllocated, one.BitsStored, one.HighBit, one.PixelRepresentation = 16, bits, bits - 1, int(signed)
    one.RescaleSlope, one.RescaleIntercept = "1", "0" if signed else "-1024"
    one.PixelData = encapsulate([frame.data for frame in frames])
    one["PixelData"].VR, one["PixelData"].is_undefined_length = "OB", True
    path = folder / f"{one.SOPInstanceUID}.dcm"
    one.save_as(path, enforce_file_format=True, implicit_vr=False, little_endian=True)
    return path


# --- on the CPU, for real -------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("syntax", WAVELETS, ids=["j2k", "ht", "rpcl"])
def test_unsigned_wavelets_as_the_reference(cpu: NvImageCodec, syntax: str, bits: int) -> None:
    frame = coded(syntax, image(bits), bits)
    (cells,) = cpu.decode([frame])
    assert_as_reference(cells, frame)
    assert cpu.name.startswith("nvimgcodec ") and cpu.name.endswith(" (cpu)")
    assert cpu.takes == ("JPEG 2000, unsigned", "HTJ2K, unsigned")


def without_asking(codec: NvImageCodec) -> NvImageCodec:
    """The same decoder, but for its library: that is a stand-in which fails the test if it is called."""

    class Asked:
        def decode(self, *_: Any, **__: Any) -> None:
            pytest.fail("it was asked")

    other = copy(codec)
    other._decoder = Asked()
    return other


@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("syntax", [JPEGLossless, JPEGLosslessSV1], ids=["57", "70"])
def test_it_is_never_asked_for_jpeg_lossless(cpu: NvImageCodec, syntax: str, bits: int) -> None:
    """nvJPEG decoded some of it to other pixels and reported success (docs/decisions/gpu.md)."""
    frame = coded(syntax, image(bits), bits)
    np.testing.assert_array_equal(reference(frame).values, image(bits))
    assert without_asking(cpu).decode([frame]) == [None]


def test_what_it_was_not_proven_to_decode_it_is_not_asked_for(cpu: NvImageCodec) -> None:
    frames = [
        coded(JPEG2000Lossless, image(12, True), 12),
        coded(HTJ2KLossless, image(12, True), 12),
        coded(JPEGLSLossless, image(12), 12),
    ]
    assert without_asking(cpu).decode(frames) == [None, None, None]
    assert cpu.decode([]) == []


@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
def test_an_impossible_image_is_none(cpu: NvImageCodec, signed: bool) -> None:
    """Its library is a stand-in: none can be made to return such images."""

    class Returning:
        def __init__(self, values: NDArray[Any]) -> None:
            self._values = values

        def cpu(self) -> NDArray[Any]:
            return self._values

        def decode(self, *_: Any, **__: Any) -> list[Returning]:
            return [self]

    right = image(12, signed)
    frame = coded(JPEG2000Lossless, right, 12)
    codec = copy(cpu)
    codec.takes = tuple(known_frames())

    def decoded(values: NDArray[Any]) -> Cells | None:
        codec._decoder = Returning(values)
        return codec.decode([frame])[0]

    assert_as_reference(decoded(right), frame)
    assert_as_reference(decoded(right[..., None]), frame)
    above, below = right.copy(), right.astype(np.int16)
    above[5, 6], below[5, 6] = int(right.max()) + 1, int(right.min()) - 1
    for wrong in (above, below, right[:-1], right.T, np.stack([right, right], -1)):
        assert decoded(wrong) is None
    assert decoded(right.astype(np.uint16 if signed else np.int16)) is None


def test_a_kind_that_a_gpu_should_take_and_does_not_is_logged(
    cpu: NvImageCodec, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """nvImageCodec's decoders on the CPU stand in for those on a GPU: they take nothing that is signed."""
    library = importlib.import_module("nvidia.nvimgcodec")
    on_cpu = {
        "device_id": library.NVIMGCODEC_DEVICE_CPU_ONLY,
        "backends": [library.Backend(library.BackendKind.CPU_ONLY)],
    }
    real = library.Decoder
    monkeypatch.setattr(library, "Decoder", lambda **_: real(**on_cpu))
    codec = NvImageCodec("gpu")
    assert codec.takes == cpu.takes
    warned = [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING]
    assert len(warned) == 2
    assert all(any(kind in one for one in warned) for kind in ("JPEG 2000, signed", "HTJ2K, signed"))
    assert all(codec.name in one for one in warned)


def test_of_its_decoders_on_the_cpu_no_more_is_expected(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("nvidia.nvimgcodec")
    NvImageCodec("cpu")
    assert not caplog.records


def test_frames_keep_their_places_across_batches(cpu: NvImageCodec) -> None:
    frames = [coded(HTJ2KLossless, image(12, seed=seed), 12) for seed in range(BATCH + 9)]
    frames[3] = frames[BATCH] = CodedFrame(HTJ2KLossless, b"garbage", ROWS, COLUMNS)
    for number, cells in enumerate(cpu.decode(frames)):
        if number in (3, BATCH):
            assert cells is None
        else:
            assert_as_reference(cells, frames[number])


@settings(max_examples=40, deadline=None)
@given(data=st.binary(max_size=400), syntax=st.sampled_from(WAVELETS))
def test_garbage_is_none(cpu: NvImageCodec, data: bytes, syntax: str) -> None:
    good = coded(HTJ2KLossless, image(12), 12)
    first, second = cpu.decode([CodedFrame(syntax, data, ROWS, COLUMNS), good])
    assert first is None
    assert_as_reference(second, good)


@pytest.mark.parametrize("syntax", [JPEG2000Lossless, HTJ2KLossless], ids=["j2k", "ht"])
@settings(max_examples=40, deadline=None)
@given(cut=st.floats(0.02, 0.99), ending=st.sampled_from([b"", b"\xff\xd9", b"\0\0"]))
def test_a_frame_that_was_cut_off_is_none(cpu: NvImageCodec, syntax: str, cut: float, ending: bytes) -> None:
    frame = coded(syntax, image(12), 12)
    shorter = CodedFrame(syntax, frame.data[: int(len(frame.data) * cut)] + ending, ROWS, COLUMNS)
    assert cpu.decode([shorter]) == [None]


@settings(max_examples=40, deadline=None)
@given(position=st.floats(0, 0.999), value=st.integers(1, 255), syntax=st.sampled_from(WAVELETS))
def test_a_damaged_frame_is_none_or_in_range(cpu: NvImageCodec, position: float, value: int, syntax: str) -> None:
    frame = coded(syntax, image(12), 12)
    at = int(position * len(frame.data))
    data = frame.data[:at] + bytes([frame.data[at] ^ value]) + frame.data[at + 1 :]
    (cells,) = cpu.decode([CodedFrame(syntax, data, ROWS, COLUMNS)])
    assert cells is None or (cells.values.shape == (ROWS, COLUMNS) and int(cells.values.max()) < 1 << cells.precision)


def test_a_tile_part_of_open_length_is_left_to_the_reference(cpu: NvImageCodec) -> None:
    """Psot 0 (ISO/IEC 15444-1 A.4.2) reaches to the end of the stream, wherever that is."""
    frame = coded(JPEG2000Lossless, image(12), 12)
    at = frame.data.index(b"\xff\x90") + 6
    opened = CodedFrame(frame.syntax, frame.data[:at] + bytes(4) + frame.data[at + 4 :], ROWS, COLUMNS)
    np.testing.assert_array_equal(reference(opened).values, image(12))
    assert cpu.decode([opened]) == [None]


def test_another_size_than_the_header_says_is_none(cpu: NvImageCodec) -> None:
    frame = coded(HTJ2KLossless, image(12), 12)
    assert cpu.decode([CodedFrame(frame.syntax, frame.data, COLUMNS, ROWS)]) == [None]


def test_a_library_that_fails_leaves_all_to_the_reference(cpu: NvImageCodec, caplog: pytest.LogCaptureFixture) -> None:
    """The failing library is a fake: no GPU can be made to fail at will."""

    class Failing:
        def decode(self, *_: Any, **__: Any) -> None:
            raise RuntimeError("CUDA error 700")

    codec = NvImageCodec("cpu")
    codec._decoder = Failing()
    assert codec.decode([coded(HTJ2KLossless, image(12), 12)] * 2) == [None, None]
    assert "CUDA error 700" in caplog.text


def test_a_decoder_that_does_not_know_a_known_frame_is_not_used(
    cpu: NvImageCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other() -> dict[str, tuple[CodedFrame, NDArray[Any]]]:
        return {kind: (frame, values + values.dtype.type(1)) for kind, (frame, values) in known_frames().items()}

    monkeypatch.setattr(nvimage, "known_frames", other)
    with pytest.raises(ScansideError, match="decodes JPEG 2000, unsigned wrongly"):
        NvImageCodec("cpu")


def test_the_known_frames_are_what_the_reference_makes_of_them() -> None:
    for frame, values in known_frames().values():
        np.testing.assert_array_equal(reference(frame).values, values)


@pytest.mark.skipif(gpus() > 0, reason="there is an NVIDIA GPU")
def test_without_a_gpu_the_device_says_so() -> None:
    assert decoder_for("cpu") is None
    with pytest.raises(ScansideError, match=r"no GPU|cannot be imported") as caught:
        decoder_for("gpu")
    assert "box.device" in caught.value.remedy


# --- many instances -------------------------------------------------------------------------------------


def test_instances_name_the_decoder_of_their_frames(cpu: NvImageCodec, tmp_path: Path) -> None:
    unsigned, signed = coded(HTJ2KLossless, image(12), 12), coded(HTJ2KLossless, image(12, True), 12)
    paths = [
        write(tmp_path, [unsigned], 12, False),
        write(tmp_path, [signed], 12, True),
        write(tmp_path, [coded(JPEGLSLossless, image(16), 16)], 16, False),
        write(tmp_path, [coded(HTJ2KLossless, image(11, seed=n) // 2, 12) for n in range(3)], 12, True),
    ]
    found = decode_many(paths, cpu)
    assert [one.codec for one in found] == [cpu.name, "imagecodecs.jpeg2k", "imagecodecs.jpegls", cpu.name]
    for one, path in zip(found, paths, strict=True):
        expected = decode(path)
        np.testing.assert_array_equal(one.stored, expected.stored)
        np.testing.assert_array_equal(one.hu, expected.hu)
        assert one.stored.dtype == expected.stored.dtype


def test_without_a_decoder_the_reference_does_all(tmp_path: Path) -> None:
    paths = [write(tmp_path, [coded(HTJ2KLossless, image(12, seed=n), 12)], 12, False) for n in range(3)]
    for one, path in zip(decode_many(paths), paths, strict=True):
        np.testing.assert_array_equal(one.stored, decode(path).stored)
        assert one.codec == "imagecodecs.jpeg2k"


def test_a_cut_instance_is_an_error_that_names_it(cpu: NvImageCodec, tmp_path: Path) -> None:
    frame = coded(HTJ2KLossless, image(12), 12)
    cut = CodedFrame(frame.syntax, frame.data[: len(frame.data) // 2] + b"\xff\xd9", ROWS, COLUMNS)
    paths = [write(tmp_path, [one], 12, False) for one in (frame, cut, frame)]
    with pytest.raises(DecodeError, match="compressed frame") as caught:
        decode_many(paths, cpu)
    assert caught.value.where == str(paths[1])


class Liar:
    """A stand-in for a GPU's decoder that has a fault: right but for the frames that it is told to get wrong."""

    name = "liar"

    def __init__(self, wrong: dict[int, str], declined: Sequence[int] = ()) -> None:
        self._wrong, self._declined = wrong, declined

    def decode(self, frames: Sequence[CodedFrame]) -> list[Cells | None]:
        right = [reference(frame) for frame in frames]
        found: list[Cells | None] = []
        for number, cells in enumerate(right):
            values = cells.values.copy()
            fault = self._wrong.get(number)
            if fault == "zeros":
                values[:] = 0
            elif fault == "stuck":
                values = right[number - 1].values
            elif fault == "one bit":
                values[7, 5] ^= 1
            found.append(None if number in self._declined else Cells(values, cells.precision, cells.signed))
        return found


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("series")
    return [write(folder, [coded(HTJ2KLossless, image(12, seed=n), 12)], 12, False) for n in range(40)]


def test_a_decoder_that_is_right_is_believed(series: list[Path]) -> None:
    decoder: FrameDecoder = Liar({}, declined=[0, 20, 32])
    found = decode_many(series, decoder)
    assert {number for number, one in enumerate(found) if one.codec != "liar"} == {0, 20, 32}
    for one, path in zip(found, series, strict=True):
        np.testing.assert_array_equal(one.stored, decode(path).stored)


@settings(max_examples=25, deadline=None)
@given(number=st.integers(1, 39), fault=st.sampled_from(["zeros", "stuck"]))
def test_zeros_and_stuck_buffers_are_caught_wherever_they_are(series: list[Path], number: int, fault: str) -> None:
    with pytest.raises(ImplausibleImage, match=r"liar and imagecodecs\.jpeg2k") as caught:
        decode_many(series, Liar({number: fault}))
    assert caught.value.where == str(series[number])
    assert "analysed" in caught.value.remedy


@pytest.mark.parametrize("number", [0, SAMPLED_ONE_IN, 20, 2 * SAMPLED_ONE_IN, 39])
def test_one_wrong_bit_in_the_sample_is_caught(series: list[Path], number: int) -> None:
    with pytest.raises(ImplausibleImage):
        decode_many(series, Liar({number: "one bit"}))


@pytest.mark.parametrize("count", [1, 2, 7])
def test_of_a_few_frames_the_middle_one_is_compared(series: list[Path], count: int) -> None:
    with pytest.raises(ImplausibleImage):
        decode_many(series[:count], Liar({count // 2: "one bit"}))


def test_frames_that_are_alike_in_truth_are_no_fault(tmp_path: Path) -> None:
    frame = coded(HTJ2KLossless, image(12), 12)
    flat = coded(HTJ2KLossless, np.full((ROWS, COLUMNS), 24, np.uint16), 12)
    paths = [write(tmp_path, [one], 12, False) for one in (frame, frame, flat)]
    assert [one.codec for one in decode_many(paths, Liar({}))] == ["liar"] * 3


def test_a_decoder_that_forgets_frames_is_an_error(series: list[Path]) -> None:
    class Forgetful(Liar):
        def decode(self, frames: Sequence[CodedFrame]) -> list[Cells | None]:
            return super().decode(frames)[1:]

    with pytest.raises(DecodeError, match="39 of 40"):
        decode_many(series, Forgetful({}))


# --- on a GPU -------------------------------------------------------------------------------------------

LARGE = pytest.mark.parametrize(("rows", "columns"), [(ROWS, COLUMNS), (512, 512), (433, 511)])


@pytest.mark.gpu
@LARGE
@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
@pytest.mark.parametrize("bits", [12, 16])
@pytest.mark.parametrize("syntax", WAVELETS, ids=["j2k", "ht", "rpcl"])
def test_gpu_wavelets(gpu: NvImageCodec, syntax: str, bits: int, signed: bool, rows: int, columns: int) -> None:
    frame = coded(syntax, image(bits, signed, rows=rows, columns=columns), bits)
    (cells,) = gpu.decode([frame])
    assert_as_reference(cells, frame)


@pytest.mark.gpu
def test_gpu_takes_all_known_kinds(gpu: NvImageCodec, caplog: pytest.LogCaptureFixture) -> None:
    assert set(NvImageCodec("gpu").takes) == set(known_frames())
    assert not caplog.records
    assert gpu.name.startswith("nvimgcodec ") and "cpu" not in gpu.name


@pytest.mark.gpu
def test_gpu_a_mixed_batch_keeps_its_places(gpu: NvImageCodec) -> None:
    kinds = [JPEG2000Lossless, HTJ2KLossless, HTJ2KLosslessRPCL]
    frames = [coded(kinds[n % 3], image(12, n % 2 == 1, seed=n), 12) for n in range(2 * BATCH + 5)]
    for number in (1, BATCH, BATCH + 1):
        frames[number] = CodedFrame(frames[number].syntax, b"\xff\x4fgarbage\xff\xd9", ROWS, COLUMNS)
    frames[2] = coded(JPEGLosslessSV1, image(12), 12)
    for number, cells in enumerate(gpu.decode(frames)):
        if number in (1, 2, BATCH, BATCH + 1):
            assert cells is None
        else:
            assert_as_reference(cells, frames[number])


@pytest.mark.gpu
@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=400), syntax=st.sampled_from(WAVELETS))
def test_gpu_garbage_is_none(gpu: NvImageCodec, data: bytes, syntax: str) -> None:
    good = coded(syntax, image(12), 12)
    first, second = gpu.decode([CodedFrame(syntax, data, ROWS, COLUMNS), good])
    assert first is None
    assert_as_reference(second, good)


@pytest.mark.gpu
@pytest.mark.parametrize("syntax", [JPEG2000Lossless, HTJ2KLossless], ids=["j2k", "ht"])
@settings(max_examples=60, deadline=None)
@given(cut=st.floats(0.02, 0.99), ending=st.sampled_from([b"", b"\xff\xd9", b"\0\0"]))
def test_gpu_a_frame_that_was_cut_off_is_none(gpu: NvImageCodec, syntax: str, cut: float, ending: bytes) -> None:
    frame = coded(syntax, image(12), 12)
    shorter = CodedFrame(syntax, frame.data[: int(len(frame.data) * cut)] + ending, ROWS, COLUMNS)
    assert gpu.decode([shorter]) == [None]
    assert_as_reference(gpu.decode([frame])[0], frame)  # and it still works


@pytest.mark.gpu
@pytest.mark.parametrize(("syntax", "bits", "signed"), [(HTJ2KLossless, 12, False), (JPEG2000Lossless, 16, True)])
def test_gpu_a_series_of_files(gpu: NvImageCodec, tmp_path: Path, syntax: str, bits: int, signed: bool) -> None:
    frames = [coded(syntax, image(bits, signed, seed=n, rows=512, columns=512), bits) for n in range(40)]
    paths = [write(tmp_path, [frame], bits, signed) for frame in frames]
    for one, path in zip(decode_many(paths, gpu), paths, strict=True):
        assert one.codec == gpu.name
        np.testing.assert_array_equal(one.stored, decode(path).stored)
