"""Files come as they were received, whichever decoder did them; else nothing comes of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom.encaps import encapsulate
from pydicom.uid import HTJ2KLossless

from appliance.inference.decode import decode_each, decode_verified_many
from dicom_io._codecs import Cells, CodedFrame, decode_frame
from dicom_io.errors import DecodeError
from dicom_io.header import read_header
from dicom_io.plausible import ImplausibleImage
from dicom_io.volume import Volume, assemble, planes_of
from tests.dicom_io.support import ct, head, save

Files = dict[str, tuple[Path, str]]


def study(folder: Path, slices: Sequence[NDArray[Any]], *, compressed: bool = False) -> tuple[Volume, Files]:
    """Slices of 12 bits as files, foot to head, and as a volume."""
    planes, files = [], {}
    for number, pixels in enumerate(slices):
        dataset = ct(pixels, 12, position=(-10.0, -10.0, 5.0 * number), instance_number=number)
        if compressed:
            dataset.PixelData = encapsulate(
                [bytes(imagecodecs.htj2k_encode(frame, reversible=True)) for frame in pixels]
            )
            dataset["PixelData"].VR, dataset["PixelData"].is_undefined_length = "OB", True
            dataset.file_meta.TransferSyntaxUID = HTJ2KLossless
        path = save(dataset, folder / f"{number}.dcm")
        header = read_header(path)
        planes += planes_of(header)
        files[header.sop_instance_uid] = path, hashlib.sha256(path.read_bytes()).hexdigest()
    return assemble(planes), files


def slices(count: int = 8) -> list[NDArray[Any]]:
    return [head(12, False, seed=seed) for seed in range(count)]


class Other:
    """A stand-in for a GPU's decoder: right, but for the frames that it returns as zeros."""

    name = "other"

    def __init__(self, zeros: Sequence[int] = (), declined: Sequence[int] = ()) -> None:
        self._zeros, self._declined = zeros, declined

    def decode(self, frames: Sequence[CodedFrame]) -> list[Cells | None]:
        found: list[Cells | None] = []
        for number, frame in enumerate(frames):
            cells = decode_frame(frame.syntax, frame.data, frame.rows, frame.columns)
            if number in self._zeros:
                cells = Cells(np.zeros_like(cells.values), cells.precision, cells.signed)
            found.append(None if number in self._declined else cells)
        return found


def in_order(volume: Volume, files: Files) -> list[tuple[Path, str]]:
    return [files[plane.sop_instance_uid] for plane in volume.planes]


def test_files_come_in_the_order_in_which_they_were_asked_for(tmp_path: Path) -> None:
    made = slices()
    wanted = in_order(*study(tmp_path, made))
    for decoded in (decode_verified_many(wanted), decode_each(wanted)):
        assert [one.codec for one in decoded] == ["raw"] * len(made)
        for one, pixels in zip(decoded, made, strict=True):
            np.testing.assert_array_equal(one.hu, pixels.astype(np.float32) - 1024)


def test_another_decoder_is_named_with_the_reference_where_it_left_frames(tmp_path: Path) -> None:
    made = slices()
    wanted = in_order(*study(tmp_path, made, compressed=True))
    assert {one.codec for one in decode_verified_many(wanted)} == {"imagecodecs.jpeg2k"}
    assert {one.codec for one in decode_verified_many(wanted, Other())} == {"other"}
    decoded = decode_verified_many(wanted, Other(declined=[2]))
    assert [one.codec for one in decoded] == ["other"] * 2 + ["imagecodecs.jpeg2k"] + ["other"] * 5
    for one, pixels in zip(decoded, made, strict=True):
        np.testing.assert_array_equal(one.hu, pixels.astype(np.float32) - 1024)


@pytest.mark.parametrize("number", range(8))
def test_a_decoder_that_returns_zeros_is_caught(tmp_path: Path, number: int) -> None:
    wanted = in_order(*study(tmp_path, slices(), compressed=True))
    with pytest.raises(ImplausibleImage, match="differently") as caught:
        decode_verified_many(wanted, Other(zeros=[number]))
    assert caught.value.where == str(tmp_path / f"{number}.dcm")


def test_a_file_that_changed_or_is_gone_is_an_error(tmp_path: Path) -> None:
    wanted = in_order(*study(tmp_path, slices()))
    path = tmp_path / "3.dcm"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    for decoded in (decode_verified_many, decode_each):
        with pytest.raises(DecodeError, match="changed since it was received"):
            decoded(wanted)
    path.unlink()
    for decoded in (decode_verified_many, decode_each):
        with pytest.raises(DecodeError, match="is gone"):
            decoded(wanted)
