"""Stored values against the encoders and decoders of DCMTK, pydicom and the codec libraries, bit for bit."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, encapsulate_extended, generate_frames
from pydicom.uid import (
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from dicom_io.errors import DecodeError
from dicom_io.pixels import SUPPORTED_TRANSFER_SYNTAXES, decode
from tests.dicom_io.support import COLUMNS, ROWS, ct, head, run, save
from tests.peers import program as tool

FORMATS = [(12, False), (12, True), (16, False), (16, True)]
KINDS = pytest.mark.parametrize(("bits", "signed"), FORMATS, ids=["u12", "s12", "u16", "s16"])

# Each DCMTK encoder, with the codec that must then do the decoding.
DCMTK = {
    "implicit": (["dcmconv", "+ti"], "raw"),
    "explicit": (["dcmconv", "+te"], "raw"),
    "big endian": (["dcmconv", "+tb"], "raw"),
    "deflated": (["dcmconv", "+td"], "deflate"),
    "rle": (["dcmcrle"], "imagecodecs.packbits"),
    "jpeg lossless sv1": (["dcmcjpeg", "+e1"], "imagecodecs.jpeg8"),
    **{f"jpeg lossless predictor {n}": (["dcmcjpeg", "+el", "+sv", str(n)], "imagecodecs.jpeg8") for n in range(1, 8)},
    "jpeg-ls": (["dcmcjpls", "+el"], "imagecodecs.jpegls"),
}


def encapsulated(pixels: NDArray[Any], bits: int, syntax: str, frames: list[bytes], **attributes: Any) -> Dataset:
    dataset = ct(pixels, bits, **attributes)
    dataset.PixelData = encapsulate(frames)
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True
    dataset.file_meta.TransferSyntaxUID = syntax
    return dataset


def wavelet(pixels: NDArray[Any], bits: int, syntax: str) -> bytes:
    if syntax == JPEG2000Lossless:
        return bytes(imagecodecs.jpeg2k_encode(pixels, level=0, codecformat="j2k", bitspersample=bits, reversible=True))
    return bytes(imagecodecs.htj2k_encode(pixels, reversible=True))


@KINDS
@pytest.mark.parametrize("name", DCMTK)
def test_every_encoder_of_dcmtk_round_trips(tmp_path: Path, name: str, bits: int, signed: bool) -> None:
    command, codec = DCMTK[name]
    pixels = head(bits, signed)
    source = save(ct(pixels, bits), tmp_path / "in.dcm")
    run(tool(command[0]), *command[1:], source, tmp_path / "out.dcm")

    decoded = decode(tmp_path / "out.dcm")

    assert decoded.codec == codec
    assert decoded.stored.dtype == (np.int16 if signed else np.uint16)
    np.testing.assert_array_equal(decoded.stored, pixels)
    np.testing.assert_array_equal(decoded.hu, pixels.astype(np.float32) - (0 if signed else 1024))


@KINDS
@pytest.mark.parametrize("syntax", [JPEG2000Lossless, HTJ2KLossless, HTJ2KLosslessRPCL], ids=["j2k", "ht", "rpcl"])
def test_wavelet_syntaxes_round_trip(tmp_path: Path, syntax: str, bits: int, signed: bool) -> None:
    pixels = head(bits, signed, frames=2)
    frames = [wavelet(frame, bits, syntax) for frame in pixels]
    path = save(encapsulated(pixels, bits, syntax, frames), tmp_path / "out.dcm")

    decoded = decode(path)

    assert decoded.codec == "imagecodecs.jpeg2k"
    np.testing.assert_array_equal(decoded.stored, pixels)


@pytest.mark.parametrize("name", ["implicit", "big endian", "deflated", "rle", "jpeg lossless sv1", "jpeg-ls"])
def test_a_real_slice_survives_each_syntax(ge_head: Path, tmp_path: Path, name: str) -> None:
    command, _ = DCMTK[name]
    run(tool(command[0]), *command[1:], ge_head / "14.dcm", tmp_path / "out.dcm")

    np.testing.assert_array_equal(decode(tmp_path / "out.dcm").stored[0], dcmread(ge_head / "14.dcm").pixel_array)


@pytest.mark.parametrize("syntax", [JPEG2000Lossless, HTJ2KLossless])
def test_a_real_slice_survives_the_wavelets(ge_head: Path, tmp_path: Path, syntax: str) -> None:
    dataset = dcmread(ge_head / "14.dcm")
    pixels = dataset.pixel_array
    dataset.PixelData = encapsulate([wavelet(pixels, 16, syntax)])
    dataset["PixelData"].is_undefined_length = True
    dataset.file_meta.TransferSyntaxUID = syntax

    np.testing.assert_array_equal(decode(save(dataset, tmp_path / "out.dcm")).stored[0], pixels)


def test_every_supported_syntax_is_tested() -> None:
    assert len(SUPPORTED_TRANSFER_SYNTAXES) == len({*DCMTK} - {f"jpeg lossless predictor {n}" for n in range(2, 8)}) + 3


@KINDS
def test_padding_becomes_air(tmp_path: Path, bits: int, signed: bool) -> None:
    least = -(1 << bits - 1) if signed else 0
    pixels = head(bits, signed)
    pixels[0, :5] = least
    path = save(ct(pixels, bits, RescaleIntercept="-1024", PixelPaddingValue=least), tmp_path / "a.dcm")

    hu = decode(path).hu

    assert np.all(hu[0, :5] == -1024)
    np.testing.assert_array_equal(hu[pixels != least], pixels[pixels != least].astype(np.float32) - 1024)


def test_a_range_of_padding(tmp_path: Path) -> None:
    pixels = head(16, True)
    pixels[0, 1, :6] = [-2001, -2000, -1999, -1500, -1499, 40]
    dataset = ct(pixels, 16, PixelPaddingValue=-2000, PixelPaddingRangeLimit=-1500)

    hu = decode(save(dataset, tmp_path / "a.dcm")).hu

    assert hu[0, 1, :6].tolist() == [-2001, -1024, -1024, -1024, -1499, 40]


def test_padding_of_the_real_head_is_air(ge_head: Path) -> None:
    decoded = decode(ge_head / "14.dcm")
    assert decoded.stored.min() == -1500
    assert np.all(decoded.hu[decoded.stored == -1500] == -1024)


def test_padding_that_would_erase_tissue_is_refused(tmp_path: Path) -> None:
    dataset = ct(head(16, True), 16, PixelPaddingValue=0)
    dataset.PixelData = bytes(len(dataset.PixelData))
    with pytest.raises(DecodeError, match="no air"):
        decode(save(dataset, tmp_path / "a.dcm"))


def test_each_frame_of_an_enhanced_object_has_its_own_rescale(tmp_path: Path) -> None:
    pixels = head(12, False, frames=3)
    dataset = ct(pixels, 12)
    for index, group in enumerate(dataset.PerFrameFunctionalGroupsSequence):
        group.PixelValueTransformationSequence[0].RescaleSlope = str(index + 1)

    hu = decode(save(dataset, tmp_path / "a.dcm")).hu

    expected = pixels.astype(np.float32) * np.array([1, 2, 3], np.float32)[:, None, None] - 1024
    np.testing.assert_array_equal(hu, expected)


def test_a_shared_rescale_holds_for_all_frames(tmp_path: Path) -> None:
    pixels = head(12, False, frames=3)
    dataset = ct(pixels, 12)
    for group in dataset.PerFrameFunctionalGroupsSequence:
        transformation = group.PixelValueTransformationSequence
        del group.PixelValueTransformationSequence
    dataset.SharedFunctionalGroupsSequence[0].PixelValueTransformationSequence = transformation

    np.testing.assert_array_equal(decode(save(dataset, tmp_path / "a.dcm")).hu, pixels.astype(np.float32) - 1024)


def test_overlays_in_the_high_bits_are_masked_off(tmp_path: Path) -> None:
    for signed in (False, True):
        pixels = head(12, signed)
        dataset = ct(pixels, 12)
        dataset.add_new(0x60000100, "US", 16)
        dataset.add_new(0x60000102, "US", 14)
        cells = (pixels.view(np.uint16) & 0x0FFF) | (np.arange(ROWS)[:, None] % 2 << 14).astype(np.uint16)
        dataset.PixelData = cells.astype("<u2").tobytes()

        np.testing.assert_array_equal(decode(save(dataset, tmp_path / "a.dcm")).stored, pixels)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.integers(2, 16),
    signed=st.booleans(),
    extended=st.booleans(),
    data=st.data(),
)
def test_signs_extend_from_the_bits_stored(
    tmp_path_factory: pytest.TempPathFactory, bits: int, signed: bool, extended: bool, data: st.DataObject
) -> None:
    """Whether a device writes zeros or copies of the sign above the bits stored makes no difference."""
    least, most = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    values = data.draw(st.lists(st.integers(least, most), min_size=12, max_size=12))
    pixels = np.array(values, np.int16 if signed else np.uint16).reshape(1, 3, 4)
    dataset = ct(pixels, bits)
    if not extended:
        dataset.PixelData = (pixels.view(np.uint16) & ((1 << bits) - 1)).astype("<u2").tobytes()

    decoded = decode(save(dataset, tmp_path_factory.mktemp("p") / "a.dcm"))

    np.testing.assert_array_equal(decoded.stored, pixels)


def test_a_frame_that_writes_the_sign_now_so_and_now_otherwise_is_refused(tmp_path: Path) -> None:
    """12 bits stored in cells of 16: -1000 with its sign's bits, and 2500, which would be read as -1596."""
    dataset = ct(head(12, True), 12)
    cells = np.frombuffer(dataset.PixelData, np.int16).copy()
    cells[:4] = -1000, -1000, 40, 80
    for ours, refused in ((2500, True), (2047, False)):
        cells[4] = ours
        dataset.PixelData = cells.tobytes()
        path = save(dataset, tmp_path / f"{ours}.dcm")
        if refused:
            with pytest.raises(DecodeError, match="outside the 12 bits stored"):
                decode(path)
        else:
            assert decode(path).stored.ravel()[:5].tolist() == [-1000, -1000, 40, 80, 2047]


@pytest.mark.parametrize(("signed", "cell"), [(False, 0x1000), (False, 0x8001), (True, 0x1001), (True, 0xE800)])
def test_values_outside_the_bits_stored_are_refused(tmp_path: Path, signed: bool, cell: int) -> None:
    dataset = ct(head(12, signed), 12)
    dataset.PixelData = cell.to_bytes(2, "little") + dataset.PixelData[2:]
    with pytest.raises(DecodeError, match="outside the 12 bits stored"):
        decode(save(dataset, tmp_path / "a.dcm"))


@pytest.mark.parametrize("syntax", [JPEG2000Lossless, HTJ2KLossless])
def test_signed_values_in_an_unsigned_codestream_are_bit_patterns(tmp_path: Path, syntax: str) -> None:
    for bits in (12, 16):
        pixels = head(bits, True)
        patterns = pixels.view(np.uint16) & np.uint16((1 << bits) - 1)
        path = save(encapsulated(pixels, bits, syntax, [wavelet(patterns[0], bits, syntax)]), tmp_path / "a.dcm")

        np.testing.assert_array_equal(decode(path).stored, pixels)


def test_negative_samples_where_the_header_says_unsigned_are_refused(tmp_path: Path) -> None:
    pixels = head(12, False)
    for samples in (head(12, True)[0], (pixels[0] >> 1).astype(np.int16)):
        frames = [wavelet(samples, 12, JPEG2000Lossless)]
        path = save(encapsulated(pixels, 12, JPEG2000Lossless, frames), tmp_path / "a.dcm")
        if samples.min() < 0:
            with pytest.raises(DecodeError, match="outside the 12 bits"):
                decode(path)
        else:
            np.testing.assert_array_equal(decode(path).stored[0], samples)


def test_signed_values_in_too_few_bits_are_refused(tmp_path: Path) -> None:
    pixels = head(16, True)
    frames = [wavelet(head(12, False)[0], 12, JPEG2000Lossless)]
    with pytest.raises(DecodeError, match="too few"):
        decode(save(encapsulated(pixels, 16, JPEG2000Lossless, frames), tmp_path / "a.dcm"))


@pytest.mark.parametrize(
    ("attributes", "match"),
    [
        ({"PhotometricInterpretation": "MONOCHROME1"}, "PhotometricInterpretation is MONOCHROME1"),
        ({"SamplesPerPixel": 3}, "SamplesPerPixel is 3"),
        ({"BitsAllocated": 8}, "BitsAllocated is 8"),
        ({"BitsAllocated": 32}, "BitsAllocated is 32"),
        ({"HighBit": 15}, "HighBit is 15"),
        ({"BitsStored": 0}, "BitsStored"),
        ({"BitsStored": 17}, "BitsStored"),
        ({"PixelRepresentation": 2}, "PixelRepresentation"),
        ({"RescaleSlope": None}, "RescaleSlope"),
        ({"RescaleIntercept": None}, "RescaleIntercept"),
        ({"RescaleSlope": "0"}, "do not give HU"),
        ({"RescaleSlope": "-1"}, "do not give HU"),
        ({"RescaleIntercept": "1e30"}, "do not give HU"),
        ({"RescaleType": "US"}, "not HU"),
        ({"Rows": ROWS + 1}, "bytes of pixel data"),
        ({"Columns": COLUMNS - 1}, "bytes of pixel data"),
        ({"Rows": 0}, "Rows"),
        ({"NumberOfFrames": 2}, "bytes of pixel data"),
        ({"NumberOfFrames": 0}, "NumberOfFrames"),
        ({"NumberOfFrames": 2147483647}, "too large"),
        ({"PixelData": None}, "no pixel data"),
    ],
)
def test_what_is_no_ct_image_is_refused(tmp_path: Path, attributes: dict[str, Any], match: str) -> None:
    path = save(ct(head(12, False), 12, **attributes), tmp_path / "a.dcm")
    with pytest.raises(DecodeError, match=match) as caught:
        decode(path)
    assert caught.value.where == str(path)


def test_lossy_and_unknown_syntaxes_are_refused(tmp_path: Path) -> None:
    pixels = head(12, False)
    for syntax, match in ((JPEGBaseline8Bit, "lossy"), ("1.2.840.10008.1.2.4.100", "not supported")):
        with pytest.raises(DecodeError, match=match):
            decode(save(encapsulated(pixels, 12, syntax, [b"\xff\xd8\xff\xd9"]), tmp_path / "a.dcm"))


def test_lossy_streams_under_a_lossless_syntax_are_refused(tmp_path: Path) -> None:
    pixels = head(12, False)
    lossy = {
        JPEG2000Lossless: bytes(imagecodecs.jpeg2k_encode(pixels[0], level=40, codecformat="j2k", reversible=False)),
        HTJ2KLossless: bytes(imagecodecs.htj2k_encode(pixels[0], level=0.01, reversible=False)),
        JPEGLSLossless: bytes(imagecodecs.jpegls_encode(pixels[0], level=3)),
        JPEGLossless: bytes(imagecodecs.jpeg8_encode((pixels[0] >> 4).astype(np.uint8), level=90)),
    }
    for syntax, frame in lossy.items():
        with pytest.raises(DecodeError, match=r"lossy|lossless|another kind of JPEG"):
            decode(save(encapsulated(pixels, 12, syntax, [frame]), tmp_path / "a.dcm"))


def test_a_point_transform_is_lossy(tmp_path: Path) -> None:
    pixels = head(12, False)
    frame = bytearray(imagecodecs.ljpeg_encode(pixels[0], bitspersample=12))
    scan = frame.index(b"\xff\xda")
    frame[scan + 1 + frame[scan + 3]] = 0x02  # the last byte of the scan's header: Al
    with pytest.raises(DecodeError, match="point transform"):
        decode(save(encapsulated(pixels, 12, JPEGLosslessSV1, [bytes(frame)]), tmp_path / "a.dcm"))


def compressed(syntax: str, pixels: NDArray[Any], tmp_path: Path) -> list[bytes]:
    """The frames of one compressed syntax, made by the codec libraries."""
    if syntax in (JPEGLosslessSV1, JPEGLossless):
        return [bytes(imagecodecs.ljpeg_encode(frame, bitspersample=12)) for frame in pixels]
    if syntax == JPEGLSLossless:
        return [bytes(imagecodecs.jpegls_encode(frame)) for frame in pixels]
    if syntax == RLELossless:
        dataset = ct(pixels, 12)
        dataset.compress(RLELossless, encoding_plugin="pydicom", generate_instance_uid=False)
        return list(generate_frames(dataset.PixelData, number_of_frames=len(pixels)))
    return [wavelet(frame, 12, syntax) for frame in pixels]


COMPRESSED = [RLELossless, JPEGLosslessSV1, JPEGLSLossless, JPEG2000Lossless, HTJ2KLossless]
COMPRESSED_NAMES = ["rle", "jpeg lossless", "jpeg-ls", "jpeg 2000", "htj2k"]


@pytest.mark.parametrize("syntax", COMPRESSED, ids=COMPRESSED_NAMES)
def test_frames_with_each_kind_of_offset_table(tmp_path: Path, syntax: str) -> None:
    pixels = head(12, False, frames=3)
    frames = compressed(syntax, pixels, tmp_path)
    dataset = encapsulated(pixels, 12, syntax, frames)
    variants = {
        "basic": dataset.PixelData,
        "empty": encapsulate(frames, has_bot=False),
        "fragmented": encapsulate(frames, fragments_per_frame=2) if syntax != RLELossless else dataset.PixelData,
    }
    for data in variants.values():
        dataset.PixelData = data
        np.testing.assert_array_equal(decode(save(dataset, tmp_path / "a.dcm")).stored, pixels)
    dataset.PixelData, dataset.ExtendedOffsetTable, dataset.ExtendedOffsetTableLengths = encapsulate_extended(frames)
    np.testing.assert_array_equal(decode(save(dataset, tmp_path / "a.dcm")).stored, pixels)

    dataset.ExtendedOffsetTable = dataset.ExtendedOffsetTable[8:] + dataset.ExtendedOffsetTable[:8]
    with pytest.raises(DecodeError, match="Extended Offset Table"):
        decode(save(dataset, tmp_path / "a.dcm"))


def test_offset_tables_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    pixels = head(12, False, frames=2)
    frames = compressed(JPEGLSLossless, pixels, tmp_path)
    dataset = encapsulated(pixels, 12, JPEGLSLossless, frames)
    good = dataset.PixelData
    for table in (b"\0\0\0\0\2\0\0\0", good[12:16] + good[8:12], b"\0\0\0\0\0\0\0\0"):
        dataset.PixelData = good[:8] + table + good[16:]
        with pytest.raises(DecodeError, match="Basic Offset Table"):
            decode(save(dataset, tmp_path / "a.dcm"))
    dataset.PixelData = encapsulate(frames[:1])
    with pytest.raises(DecodeError, match="1 compressed frames"):
        decode(save(dataset, tmp_path / "a.dcm"))


@pytest.mark.parametrize("syntax", COMPRESSED, ids=COMPRESSED_NAMES)
@settings(max_examples=25, deadline=None)
@given(cut=st.floats(0.02, 0.99), ending=st.sampled_from([b"", b"\xff\xd9", b"\0\0"]))
def test_a_frame_that_was_cut_off_is_never_decoded(
    tmp_path_factory: pytest.TempPathFactory, syntax: str, cut: float, ending: bytes
) -> None:
    """Well encapsulated, even with an end marker put back: only the codestream tells."""
    folder = tmp_path_factory.mktemp("cut")
    pixels = head(12, False)
    (frame,) = compressed(syntax, pixels, folder)
    dataset = encapsulated(pixels, 12, syntax, [frame[: int(len(frame) * cut)] + ending])
    with pytest.raises(DecodeError):
        decode(save(dataset, folder / "a.dcm"))


@pytest.mark.parametrize("name", ["explicit", "big endian", "deflated", "rle", "jpeg-ls"])
def test_a_file_that_was_cut_off_is_never_decoded(tmp_path: Path, name: str) -> None:
    command, _ = DCMTK[name]
    run(tool(command[0]), *command[1:], save(ct(head(12, False), 12), tmp_path / "in.dcm"), tmp_path / "out.dcm")
    whole = (tmp_path / "out.dcm").read_bytes()
    for length in {*range(0, len(whole) - 1, max(1, len(whole) // 150)), len(whole) - 9}:
        (tmp_path / "cut.dcm").write_bytes(whole[:length])
        with pytest.raises(DecodeError):
            decode(tmp_path / "cut.dcm")


@pytest.mark.parametrize("syntax", COMPRESSED, ids=COMPRESSED_NAMES)
@settings(max_examples=60, deadline=None)
@given(position=st.floats(0, 0.999), value=st.integers(1, 255), count=st.integers(1, 8))
def test_a_damaged_frame_decodes_to_values_in_range_or_is_an_error(
    tmp_path_factory: pytest.TempPathFactory, syntax: str, position: float, value: int, count: int
) -> None:
    folder = tmp_path_factory.mktemp("bad")
    pixels = head(12, False)
    (frame,) = compressed(syntax, pixels, folder)
    at = int(position * len(frame))
    damaged = frame[:at] + bytes(byte ^ value for byte in frame[at : at + count]) + frame[at + count :]
    path = save(encapsulated(pixels, 12, syntax, [damaged]), folder / "a.dcm")
    try:
        decoded = decode(path)
    except DecodeError:
        return
    assert decoded.stored.shape == pixels.shape
    assert decoded.stored.max() < 4096


def test_frames_of_another_size_are_refused(tmp_path: Path) -> None:
    pixels = head(12, False)
    for syntax in COMPRESSED:
        frames = compressed(syntax, pixels, tmp_path)
        dataset = encapsulated(pixels, 12, syntax, frames, Rows=COLUMNS, Columns=ROWS)
        if syntax == RLELossless:
            dataset.Columns = ROWS + 1
        with pytest.raises(DecodeError):
            decode(save(dataset, tmp_path / "a.dcm"))


def test_malformed_files_are_refused(malformed: Path) -> None:
    """The corpus has no rescale, so none of it is CT that could be used."""
    for path in sorted(malformed.rglob("*.dcm")):
        with pytest.raises(DecodeError):
            decode(path)


@pytest.mark.parametrize(("shift", "good"), [(0, True), (8, False), (-8, False)])
def test_rle_segments_of_wrong_lengths_that_make_up_the_right_sum_are_refused(
    tmp_path: Path, shift: int, good: bool
) -> None:
    def literal(count: int) -> bytes:  # PackBits (PS3.5 G.3.1): runs of up to 128 bytes as they are
        content = bytes(n % 7 for n in range(count))
        runs = [content[n : n + 128] for n in range(0, count, 128)]
        coded = b"".join(bytes([len(run) - 1]) + run for run in runs)
        return coded + bytes(len(coded) % 2)

    count = ROWS * COLUMNS
    high, low = literal(count + shift), literal(count - shift)
    frame = struct.pack("<16I", 2, 64, 64 + len(high), *[0] * 13) + high + low
    dataset = ct(head(12, False), 12)
    dataset.PixelData = encapsulate([frame])
    dataset["PixelData"].is_undefined_length = True
    dataset.file_meta.TransferSyntaxUID = RLELossless
    path = save(dataset, tmp_path / "rle.dcm")
    if good:
        expected = np.array([n % 7 * 257 for n in range(count)]).reshape(ROWS, COLUMNS)
        assert np.array_equal(decode(path).stored[0], expected)
    else:
        with pytest.raises(DecodeError):
            decode(path)
