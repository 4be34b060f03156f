"""Readers that nobody here wrote, on the spool: each reads every file in it, and sees the volume that we see."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom import uid
from pydicom.encaps import generate_frames

from dicom_io.header import read_header
from dicom_io.pixels import SUPPORTED_TRANSFER_SYNTAXES, decode
from dicom_io.volume import Volume, assemble, planes_of
from tests.dicom_io.support import run
from tests.interop.box import wait_for
from tests.interop.intake import AE_TITLE, Intake, as_other_study, running_intake
from tests.peers import ENCODERS, encode, program
from triton_models.training.phantom import simulate, write_study

pytestmark = [pytest.mark.interop, pytest.mark.xdist_group("readers")]

CONVERTED = (uid.ExplicitVRLittleEndian, uid.JPEGLosslessSV1, uid.RLELossless, uid.JPEG2000Lossless)
"""What Debian's dcm2niix decodes by itself, of all that loses nothing (it is built without JPEG-LS)."""
UNCOMPRESSED = {
    uid.ExplicitVRLittleEndian: ["storescu", "-xe"],
    uid.ImplicitVRLittleEndian: ["storescu", "-xi"],
    uid.ExplicitVRBigEndian: ["storescu", "-xb"],
}


@dataclass(frozen=True)
class Spool:
    """A spool that holds one study in several transfer syntaxes, and what we read of its source.

    Attributes:
        files: path → transfer syntax, SOP Instance UID.
        series: Series Instance UID → how many of the volume's first slices it holds, where dcm2niix decodes it.
        hu: (slices, rows, columns) of the source, in the volume's order.
        padded: where that is no tissue but padding, of which each reader makes what it likes.
    """

    folder: Path
    files: dict[Path, tuple[str, str]]
    series: dict[str, int]
    volume: Volume
    hu: NDArray[np.float32]
    padded: NDArray[np.bool_]


def send_as(intake: Intake, files: list[Path], folder: Path, syntax: uid.UID) -> list[Path]:
    """Send the images as a study of their own in that transfer syntax; returns what was sent."""
    copies = as_other_study(files, folder)
    with ThreadPoolExecutor(2) as pool:
        sent = list(pool.map(lambda path: encode(path, path.with_suffix(".sent"), syntax), copies))
    # dcmsend would encode uncompressed images anew.
    sender = UNCOMPRESSED.get(syntax, ["dcmsend", "-dn"])
    options = ["-aec", AE_TITLE, "-to", "20", "-ta", "20", "-td", "20"]
    run(program(sender[0]), *sender[1:], *options, intake.peer.host, intake.port, *sent)
    return sent


@pytest.fixture(scope="module", params=["simulated", "real"])
def spool(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Spool]:
    folder = tmp_path_factory.mktemp("readers")
    syntaxes: tuple[uid.UID, ...]
    if request.param == "real":
        # Its values are signed, which not every lossy encoder takes.
        source, syntaxes = sorted(request.getfixturevalue("ge_head").glob("*.dcm")), CONVERTED
    else:
        syntaxes = tuple(ENCODERS)
        source = write_study(simulate(5, thickness_mm=10.0, size=256), folder / "phantom")
    by_uid = {read_header(path).sop_instance_uid: path for path in source}
    volume = assemble([plane for path in source for plane in planes_of(read_header(path))])
    ordered = [by_uid[plane.sop_instance_uid] for plane in volume.planes]
    decoded = [decode(path) for path in ordered]
    padding = pydicom.dcmread(source[0]).get("PixelPaddingValue")
    files, series = {}, {}
    with running_intake(folder / "box") as intake:
        for number, syntax in enumerate(syntaxes):
            # The whole head once, and less of it where a program has to encode each slice.
            count = len(ordered) if syntax == uid.ExplicitVRLittleEndian else 6 if syntax in CONVERTED else 1
            for path in send_as(intake, ordered[:count], folder / f"{number}", syntax):
                sent = read_header(path)
                files[intake.kept(sent.sop_instance_uid).path] = str(syntax), sent.sop_instance_uid
                if syntax in CONVERTED:
                    series[sent.series_instance_uid] = count
        # There are second names, and names made ahead, for some seconds.
        wait_for(lambda: True if not list(intake.spool.glob("incoming/*/*")) else None, 30.0, intake.process.tail)
        yield Spool(
            intake.spool,
            files,
            series,
            volume,
            np.concatenate([one.hu for one in decoded]),
            np.concatenate([one.stored for one in decoded]) == padding,
        )


@dataclass(frozen=True)
class Nifti:
    """A NIfTI-1 file: what its header of 348 bytes says, and its values.

    Attributes:
        dimensions: columns, rows, slices.
        spacing: mm, in that order.
        affine: (3, 4): column, row and slice counted from 0 → mm to the right, to the front and upwards (sform).
        values: (slices, rows, columns), rescaled.
    """

    dimensions: tuple[int, ...]
    spacing: tuple[float, ...]
    affine: NDArray[np.float64]
    values: NDArray[np.float64]

    @classmethod
    def read(cls, path: Path) -> Nifti:
        content = path.read_bytes()
        assert struct.unpack_from("<i", content) == (348,)
        assert content[344:348] == b"n+1\0"
        assert content[123] & 7 == 2  # lengths in millimetres
        count, *lengths = struct.unpack_from("<8h", content, 40)
        dimensions = tuple(lengths[:count])
        (kind,) = struct.unpack_from("<h", content, 70)
        offset, slope, intercept = struct.unpack_from("<3f", content, 108)
        cells = np.frombuffer(content, {4: "<i2", 512: "<u2"}[kind], int(np.prod(dimensions)), int(offset))
        return cls(
            dimensions,
            struct.unpack_from("<3f", content, 80),
            np.array(struct.unpack_from("<12f", content, 280)).reshape(3, 4),
            cells.reshape(dimensions[::-1]) * slope + intercept,
        )


def test_dcm2niix_makes_our_volume_of_each_series(spool: Spool, tmp_path: Path) -> None:
    run(program("dcm2niix"), "-b", "n", "-z", "n", "-f", "%j", "-o", tmp_path, spool.folder)
    rows, columns = spool.volume.planes[0].geometry.spacing
    step = spool.volume.offsets[1] - spool.volume.offsets[0]
    for series, count in spool.series.items():
        # Of a head with a tilted gantry it also makes a straightened one, and says so in its name.
        (path,) = (path for path in tmp_path.glob(f"{series}*.nii") if "_Tilt" not in path.name)
        nifti, hu, padded = Nifti.read(path), spool.hu[:count], spool.padded[:count]
        assert nifti.dimensions == hu.shape[::-1]
        assert nifti.spacing == pytest.approx((columns, rows, step), rel=1e-5)
        # It counts rows from the back of the head.
        assert (nifti.values[:, ::-1] == hu)[~padded].all()
        if spool.volume.tilt_degrees == 0:
            planes = [plane.geometry.position for plane in spool.volume.planes[:count]]
            corners = [(0, hu.shape[1] - 1, number, 1) for number in range(count)]
            places = [(-to_the_left, -to_the_back, upwards) for to_the_left, to_the_back, upwards in planes]
            assert nifti.affine @ np.transpose(corners) == pytest.approx(np.transpose(places), abs=1e-3)


def test_gdcm_knows_each_file(spool: Spool) -> None:
    scanned = run(
        program("gdcmscanner"), "-r", "-p", "-d", spool.folder, "-t", "2,10", "-t", "8,18", "-t", "2,3"
    ).stdout
    found = {}
    for name, values in re.findall(r"Filename: (\S+) \(could be read\)\n((?:\(.*\n)+)", scanned):
        seen = dict(re.findall(r"\(([0-9a-f,]+)\) -> \[([0-9.]+)\]", values))
        assert seen["0002,0003"] == seen["0008,0018"]
        found[Path(name)] = seen["0002,0010"], seen["0008,0018"]
    assert found == spool.files


def test_gdcminfo_and_gdcmdump_read_each_file(spool: Spool) -> None:
    info = run(program("gdcminfo"), "-r", "-i", spool.folder).stdout
    seen = re.findall(
        r"^filename: (\S+)$.*?^Dimensions: \((\d+),(\d+),1\)$.*?^TransferSyntax: (\S+)$", info, re.M | re.S
    )
    _, rows, columns = spool.hu.shape
    wanted = {(str(path), str(columns), str(rows), syntax) for path, (syntax, _) in spool.files.items()}
    assert set(seen) == wanted
    dump = run(program("gdcmdump"), "-r", "-i", spool.folder).stdout
    instances = re.findall(r"\(0008,0018\) (?:UI|\?\? \(UI\)) \[([0-9.]+)\]", dump)  # "??" in Implicit VR
    assert sorted(instances) == sorted(instance for _, instance in spool.files.values())


def test_gdcm_decodes_the_pixels_that_we_decode(spool: Spool, tmp_path: Path) -> None:
    one_each = {syntax: path for path, (syntax, _) in spool.files.items()}
    for number, (syntax, path) in enumerate(one_each.items()):
        raw, plain = tmp_path / f"{number}.raw", tmp_path / f"{number}.dcm"
        run(program("gdcmraw"), "-i", path, "-o", raw)
        if uid.UID(syntax).is_encapsulated:
            sent = b"".join(generate_frames(pydicom.dcmread(path).PixelData, number_of_frames=1))
        else:
            sent = decode(path).stored.tobytes()
        assert raw.read_bytes() == sent, syntax
        run(program("gdcmconv"), "--raw", path, plain)
        if syntax in SUPPORTED_TRANSFER_SYNTAXES:
            assert (decode(plain).stored == decode(path).stored).all(), syntax


def test_dcmtk_reads_each_file(spool: Spool) -> None:
    tested = run(program("dcmftest"), *spool.files).stdout
    assert tested.splitlines() == [f"yes: {path}" for path in spool.files]
    dumped = run(program("dcmdump"), "+P", "0002,0010", "+P", "0002,0003", "+P", "0008,0018", "-Un", *spool.files)
    assert dumped.stderr == ""
    uids = re.findall(
        r"\(0002,0010\) UI \[(\S+)\].*\n\(0002,0003\) UI \[(\S+)\].*\n\(0008,0018\) UI \[(\S+)\]", dumped.stdout
    )
    assert uids == [(syntax, instance, instance) for syntax, instance in spool.files.values()]
