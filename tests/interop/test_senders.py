"""Senders that nobody here wrote, against a running intake: what each of them sends is what the intake keeps.

"What is sent" is read off the wire by a relay, so that a sender that encodes anew on its way is held to nothing but
its own bytes. Images are compressed by DCMTK and GDCM.
"""

from __future__ import annotations

import json
import re
import struct
import subprocess
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pydicom
import pytest
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.filereader import read_dataset
from pynetdicom import AE

from appliance.demo.orthanc import LOOPBACK, Orthanc, find_orthanc, start_orthanc
from appliance.ledger.views import find_study, study_report
from dicom_io.pixels import decode
from dicom_io.scu import Peer
from tests.dicom_io.support import Tap, data_set, run, save
from tests.interop.intake import AE_TITLE, Intake, as_other_study, running_intake
from tests.peers import ENCODERS, encode, program
from triton_models.training.phantom import simulate, write_study

pytestmark = [pytest.mark.interop, pytest.mark.xdist_group("senders")]

SUCCESS = re.compile(r"DIMSE Status *: 0x0000 \(Success\)")
"""A line of dcmsend's report."""
VIDEOS = {
    "-xm": uid.MPEG2MPML, "-xh": uid.MPEG2MPHL, "-xn": uid.MPEG4HP41, "-xl": uid.MPEG4HP41BD,
    "-x2": uid.MPEG4HP422D, "-x3": uid.MPEG4HP423D, "-xo": uid.MPEG4HP42STEREO, "-x4": uid.HEVCMP51,
    "-x5": uid.HEVCM10P51,
}  # fmt: skip


@pytest.fixture(scope="module")
def intake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Intake]:
    with running_intake(tmp_path_factory.mktemp("senders") / "box") as one:
        yield one


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_study(simulate(5, thickness_mm=10.0, size=128), tmp_path_factory.mktemp("senders") / "study")


@pytest.fixture
def study(phantom: list[Path], tmp_path: Path) -> list[Path]:
    """Two images that nothing else sends."""
    return as_other_study(phantom[6:8], tmp_path / "study")


def dcmtk(name: str, port: int, options: str | Sequence[object], *files: Path) -> subprocess.CompletedProcess[str]:
    """Run a sender of DCMTK that must succeed; its own timeouts, so that a missing answer is an error."""
    words = options.split() if isinstance(options, str) else options
    command = [program(name), "-aec", AE_TITLE, "-to", "20", "-ta", "20", "-td", "20", *words, LOOPBACK, port, *files]
    return run(*command)


def keyed(files: Iterable[Path]) -> dict[str, Dataset]:
    """SOP Instance UID → data set."""
    return {str(one.SOPInstanceUID): one for one in map(pydicom.dcmread, files)}


def check_kept(intake: Intake, files: Sequence[Path], calling_ae: str, syntax: str | None = None) -> None:
    """Each file lies in the spool with its row, with the same data set; in its own transfer syntax, or that one."""
    for instance, sent in keyed(files).items():
        kept = intake.kept(instance)
        assert kept.calling_ae == calling_ae
        found = kept.dataset
        assert found.file_meta.TransferSyntaxUID == (syntax or sent.file_meta.TransferSyntaxUID)
        assert found.file_meta.MediaStorageSOPInstanceUID == instance
        assert found.file_meta.MediaStorageSOPClassUID == sent.SOPClassUID
        assert found == sent
        assert found.PixelData == sent.PixelData


def check_wire(intake: Intake, tap: Tap, files: Sequence[Path]) -> None:
    """What lies in the spool is, byte for byte, what went over the wire."""
    kept = [intake.kept(instance).data_set for instance in keyed(files)]
    assert sorted(tap.data_sets()) == sorted(kept)


@pytest.mark.parametrize(
    ("option", "syntax"),
    [
        ("-xe", uid.ExplicitVRLittleEndian),
        ("-xb", uid.ExplicitVRBigEndian),
        ("-xi", uid.ImplicitVRLittleEndian),
        ("-xs", uid.JPEGLosslessSV1),
        ("-xy", uid.JPEGBaseline8Bit),
        ("-xx", uid.JPEGExtended12Bit),
        ("-xv", uid.JPEG2000Lossless),
        ("-xw", uid.JPEG2000),
        ("-xt", uid.JPEGLSLossless),
        ("-xu", uid.JPEGLSNearLossless),
        ("-xr", uid.RLELossless),
        ("-xd", uid.DeflatedExplicitVRLittleEndian),
        ("-xs -R", uid.JPEGLosslessSV1),
        ("-xe +C -R", uid.ExplicitVRLittleEndian),
        ("-xs +C", uid.ExplicitVRLittleEndian),
        ("-xi -pdu 4096 --max-send-pdu 4096", uid.ImplicitVRLittleEndian),
    ],
)
def test_storescu_in_each_syntax_that_it_proposes(
    intake: Intake, study: list[Path], tmp_path: Path, option: str, syntax: str
) -> None:
    files = [encode(path, tmp_path / path.name, syntax) for path in study]
    tap = intake.tap()
    dcmtk("storescu", tap.port, option, *files)
    check_kept(intake, files, "STORESCU")
    check_wire(intake, tap, files)
    assert intake.ended(str(pydicom.dcmread(files[0]).SOPInstanceUID)) == "released"


def test_storescu_encodes_anew_where_it_proposes_nothing_else(intake: Intake, study: list[Path]) -> None:
    tap = intake.tap()
    dcmtk("storescu", tap.port, "-xi", *study)
    check_kept(intake, study, "STORESCU", uid.ImplicitVRLittleEndian)
    check_wire(intake, tap, study)


def film(path: Path, syntax: uid.UID) -> Path:
    """A multi-frame capture that claims to be a film. No encoder made it: nothing on the way decodes it."""
    dataset = Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = (
        uid.MultiFrameTrueColorSecondaryCaptureImageStorage
    )
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = uid.generate_uid(None)
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = uid.generate_uid(None), uid.generate_uid(None)
    dataset.NumberOfFrames, dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 2, 3, "YBR_PARTIAL_420"
    dataset.Rows, dataset.Columns = 16, 16
    dataset.PixelData = encapsulate([bytes(range(256)) * 40], has_bot=False)
    dataset["PixelData"].VR = "OB"
    return save(dataset, path)


@pytest.mark.parametrize("option", VIDEOS)
def test_storescu_sends_films(intake: Intake, tmp_path: Path, option: str) -> None:
    path = film(tmp_path / "film.dcm", VIDEOS[option])
    tap = intake.tap()
    dcmtk("storescu", tap.port, option, path)
    check_kept(intake, [path], "STORESCU")
    check_wire(intake, tap, [path])


def test_dcmsend_in_every_syntax_over_one_association(intake: Intake, phantom: list[Path], tmp_path: Path) -> None:
    sources = {}
    for number, syntax in enumerate(ENCODERS):
        (source,) = as_other_study(phantom[7:8], tmp_path / f"{number}")
        sources[encode(source, tmp_path / f"{number}.dcm", syntax)] = source, syntax
    # Without compression it sends in the one syntax that the intake likes best.
    uncompressed = uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian, uid.ExplicitVRBigEndian
    plain = {path: source for path, (source, syntax) in sources.items() if syntax in uncompressed}
    files = [path for path in sources if path not in plain]
    files += [film(tmp_path / f"film{option}.dcm", syntax) for option, syntax in VIDEOS.items()]
    report = tmp_path / "report.txt"
    tap = intake.tap()
    dcmtk("dcmsend", tap.port, ["-dn", "-ma", "+crf", report], *plain, *files)
    assert len(SUCCESS.findall(report.read_text())) == len(plain) + len(files)
    check_kept(intake, files, "DCMSEND")
    check_kept(intake, list(plain.values()), "DCMSEND", uid.ExplicitVRLittleEndian)
    check_wire(intake, tap, [*plain, *files])
    assert len({intake.kept(instance).association for instance in keyed(files)}) == 1


@pytest.mark.parametrize("syntax", [uid.HTJ2KLossless, uid.HTJ2K])
def test_pynetdicom_in_a_syntax_that_dcmtk_does_not_know(
    intake: Intake, study: list[Path], tmp_path: Path, syntax: uid.UID
) -> None:
    ae, files = AE("PYNETDICOM"), []
    for path in study:
        dataset = pydicom.dcmread(path)
        lossless = syntax == uid.HTJ2KLossless
        stream = imagecodecs.htj2k_encode(dataset.pixel_array, level=None if lossless else 0.01, reversible=lossless)
        dataset.PixelData = encapsulate([bytes(stream)])
        dataset["PixelData"].is_undefined_length = True
        dataset.file_meta.TransferSyntaxUID = syntax
        files.append(save(dataset, tmp_path / path.name))
    ae.add_requested_context(uid.CTImageStorage, syntax)
    tap = intake.tap()
    association = ae.associate(LOOPBACK, tap.port, ae_title=AE_TITLE)
    assert association.is_established
    assert [association.send_c_store(path).Status for path in files] == [0x0000] * len(files)
    association.release()
    check_kept(intake, files, "PYNETDICOM")
    check_wire(intake, tap, files)


@pytest.mark.parametrize("options", ["", "--repeat 20", "--abort", "-pts 38 -ppc 128", "-pdu 4096", "-pdu 131072"])
def test_echoscu(intake: Intake, options: str) -> None:
    done = dcmtk("echoscu", intake.port, f"-v {options}")
    echoes = 20 if "repeat" in options else 1
    assert (done.stdout + done.stderr).count("Received Echo Response (Success)") == echoes


def data_pdus(tap: Tap) -> Iterator[int]:
    """The lengths that the sender's P-DATA-TF PDUs state."""
    at = 0
    while at < len(tap.sent):
        kind, length = struct.unpack(">BxI", tap.sent[at : at + 6])
        at += 6 + length
        if kind == 4:
            yield length


@pytest.mark.parametrize("size", [4096, 16384, 65536, 131072])
@pytest.mark.parametrize("sender", ["storescu", "dcmsend"])
def test_pdus_of_every_size(intake: Intake, study: list[Path], tmp_path: Path, sender: str, size: int) -> None:
    # Also one that is longer than any buffer between the wire and the disk.
    noise = np.random.default_rng(size).bytes(2 * 1024 * 1024)
    study += as_other_study(study[:1], tmp_path / "large", Rows=1024, Columns=1024, PixelData=noise)
    tap = intake.tap()
    dcmtk(sender, tap.port, f"-pdu {size} --max-send-pdu {size}", *study)
    check_kept(intake, study, sender.upper())
    check_wire(intake, tap, study)
    assert max(data_pdus(tap)) == size - 6  # DCMTK counts the six bytes before a PDU, too


def test_several_studies_over_one_association(intake: Intake, phantom: list[Path], tmp_path: Path) -> None:
    studies = [as_other_study(phantom[:4], tmp_path / f"{number}") for number in range(3)]
    files = [path for together in zip(*studies, strict=True) for path in together]  # in turns
    dcmtk("storescu", intake.port, "", *files)
    check_kept(intake, files, "STORESCU")
    assert len({intake.kept(instance).association for instance in keyed(files)}) == 1
    for files in studies:
        assert in_ledger(intake, files)["instances"] == len(files)


def in_ledger(intake: Intake, files: list[Path]) -> dict[str, Any]:
    number = find_study(intake.ledger, str(pydicom.dcmread(files[0]).StudyInstanceUID))
    assert number is not None
    return study_report(intake.ledger, number)


def test_one_study_over_several_associations_at_once(intake: Intake, phantom: list[Path], tmp_path: Path) -> None:
    files = as_other_study(phantom, tmp_path / "study")
    storescu = program("storescu")
    command = [storescu, "-aec", AE_TITLE, "-td", "20", LOOPBACK, str(intake.port)]
    running = [subprocess.Popen([*command, *map(str, files[part::4])], stderr=subprocess.PIPE) for part in range(4)]
    assert [(one.communicate(timeout=60)[1], one.returncode) for one in running] == [(b"", 0)] * 4
    check_kept(intake, files, "STORESCU")
    assert len({intake.kept(instance).association for instance in keyed(files)}) == 4
    assert in_ledger(intake, files)["instances"] == len(files)


def test_repeated_instances_are_kept_once(intake: Intake, study: list[Path]) -> None:
    tap = intake.tap()
    dcmtk("storescu", tap.port, "--repeat 4", *study)
    assert len(tap.data_sets()) == 4 * len(study)
    check_kept(intake, study, "STORESCU")  # one row each
    dcmtk("dcmsend", intake.port, "", *study)
    check_kept(intake, study, "STORESCU")
    assert in_ledger(intake, study)["instances"] == len(study)


def test_another_encoding_under_the_same_uid_is_kept_as_well(intake: Intake, study: list[Path], tmp_path: Path) -> None:
    again = encode(study[0], tmp_path / "again.dcm", uid.RLELossless)
    dcmtk("storescu", intake.port, "", study[0])
    dcmtk("storescu", intake.port, "-xr", again)
    both = intake.all_kept(str(pydicom.dcmread(again).SOPInstanceUID))
    assert [one.dataset.file_meta.TransferSyntaxUID for one in both] == [uid.ExplicitVRLittleEndian, uid.RLELossless]
    assert in_ledger(intake, study)["instances"] == 1


def test_storescu_that_aborts_after_the_last_answer(intake: Intake, study: list[Path]) -> None:
    tap = intake.tap()
    dcmtk("storescu", tap.port, "--abort", *study)
    check_kept(intake, study, "STORESCU")
    check_wire(intake, tap, study)
    assert intake.ended(str(pydicom.dcmread(study[0]).SOPInstanceUID)) == "aborted"


def test_storescu_with_a_user_identity(intake: Intake, study: list[Path]) -> None:
    dcmtk("storescu", intake.port, "-usr operator -pwd secret", *study)
    check_kept(intake, study, "STORESCU")


def test_a_sender_that_wants_its_identity_confirmed_goes_away(intake: Intake, study: list[Path]) -> None:
    command = [program("storescu"), "-aec", AE_TITLE, "-usr", "operator", "-pwd", "secret", "-rsp", LOOPBACK]
    done = subprocess.run([*command, str(intake.port), *map(str, study)], capture_output=True, text=True, timeout=60)
    assert "Positive response requested but none received" in done.stderr
    assert done.returncode != 0
    assert [intake.all_kept(instance) for instance in keyed(study)] == [[]] * len(study)
    dcmtk("echoscu", intake.port, "")


def test_a_sender_that_puts_all_syntaxes_into_one_context_and_cannot_decompress(
    intake: Intake, study: list[Path], tmp_path: Path
) -> None:
    """The intake takes the uncompressed one of them, which suits a scanner's images. This sender gives up by itself."""
    path = encode(study[0], tmp_path / "compressed.dcm", uid.JPEGLosslessSV1)
    command = [program("storescu"), "-aec", AE_TITLE, "-xs", "+C", LOOPBACK, str(intake.port), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "unable to convert dataset" in done.stderr
    assert intake.all_kept(str(pydicom.dcmread(path).SOPInstanceUID)) == []
    dcmtk("storescu", intake.port, "-xs", path)
    check_kept(intake, [path], "STORESCU")


def test_storescu_invents_studies(intake: Intake, study: list[Path]) -> None:
    tap = intake.tap()
    dcmtk("storescu", tap.port, "-xe +IR 1 +IS 1 --repeat 2", *study)
    invented = [(read_dataset(BytesIO(one), False, True), one) for one in tap.data_sets()]
    assert len({dataset.StudyInstanceUID for dataset, _ in invented}) == 2 * len(study)
    for dataset, sent in invented:
        assert intake.kept(dataset.SOPInstanceUID).data_set == sent


def test_what_a_scanner_sends_beside_its_slices(intake: Intake, tmp_path: Path, philips_phantom: Path) -> None:
    """A scout and captures; the folder holds files that are no images, too."""
    folders = [philips_phantom / name for name in ("S1000", "S2010", "S4010")]
    report = tmp_path / "report.txt"
    dcmtk("dcmsend", intake.port, ["-nh", "+sd", "+r", "+crf", report], *folders)
    files = [path for folder in folders for path in folder.glob("I*")]
    assert len(SUCCESS.findall(report.read_text())) == len(files)
    check_kept(intake, files, "DCMSEND")
    assert in_ledger(intake, files)["instances"] == len(files)


@pytest.fixture(scope="module")
def orthanc(intake: Intake, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    """Orthanc that knows the intake with its own defaults, and one that may ask it to send."""
    found = find_orthanc()
    if found is None:
        pytest.skip("Orthanc is not installed")
    modalities = {"asks": Peer("ASKS", LOOPBACK, 4)}
    one = start_orthanc(found, tmp_path_factory.mktemp("senders") / "orthanc", modalities)
    try:
        order(one, "/modalities/box", "PUT", {"AET": AE_TITLE, "Host": LOOPBACK, "Port": intake.port})
        yield one
    finally:
        one.stop()


def order(orthanc: Orthanc, path: str, method: str, body: object) -> Any:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(orthanc.url + path, data=data, method=method)
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as answer:
        return json.loads(answer.read() or b"null")


@pytest.mark.parametrize(
    ("syntax", "transcoding"),
    [
        (uid.ExplicitVRLittleEndian, True),
        (uid.ExplicitVRLittleEndian, False),
        (uid.ImplicitVRLittleEndian, True),
        (uid.DeflatedExplicitVRLittleEndian, True),
        (uid.JPEGLosslessSV1, True),
        (uid.JPEGLosslessSV1, False),
        (uid.JPEG2000Lossless, True),
        (uid.JPEGLSLossless, True),
        (uid.RLELossless, True),
        (uid.JPEGBaseline8Bit, True),
    ],
)
def test_orthanc_sends(
    intake: Intake, orthanc: Orthanc, study: list[Path], tmp_path: Path, syntax: str, transcoding: bool
) -> None:
    files = [encode(path, tmp_path / path.name, syntax) for path in study]
    held = [order(orthanc, "/instances", "POST", path.read_bytes())["ID"] for path in files]
    tap = intake.tap()
    peer = {"AET": AE_TITLE, "Host": LOOPBACK, "Port": tap.port, "AllowTranscoding": transcoding}
    order(orthanc, "/modalities/tap", "PUT", peer)
    orthanc.store_to("tap", held)
    check_kept(intake, files, orthanc.ae_title)
    check_wire(intake, tap, files)


def test_orthanc_sends_whole_studies_and_what_it_transcoded(
    intake: Intake, orthanc: Orthanc, study: list[Path], tmp_path: Path
) -> None:
    held = [order(orthanc, "/instances", "POST", path.read_bytes()) for path in study]
    change = {"Transcode": uid.JPEGLosslessSV1, "KeepSource": True, "Synchronous": True}
    made = order(orthanc, f"/studies/{held[0]['ParentStudy']}/modify", "POST", change)["ID"]
    orthanc.store_to("box", [held[0]["ParentStudy"], made])
    check_kept(intake, study, orthanc.ae_title)
    plain = [pydicom.dcmread(path).PixelData for path in study]
    compressed = order(orthanc, f"/studies/{made}/instances", "GET", b"")
    assert len(compressed) == len(study)
    for one in compressed:
        found = intake.kept(one["MainDicomTags"]["SOPInstanceUID"])
        assert found.dataset.file_meta.TransferSyntaxUID == uid.JPEGLosslessSV1
        assert found.data_set == data_set(orthanc.file(one["ID"]))
        assert decode(found.path).stored.tobytes() in plain


def test_orthanc_moves_a_study_here(intake: Intake, orthanc: Orthanc, study: list[Path]) -> None:
    """Its C-STORE requests name the one who asked: Move Originator Application Entity Title, PS3.7 9.3.1.1."""
    for path in study:
        order(orthanc, "/instances", "POST", path.read_bytes())
    tap = intake.tap()
    order(orthanc, "/modalities/moved", "PUT", {"AET": "MOVED", "Host": LOOPBACK, "Port": tap.port})
    keys = ["-k", "QueryRetrieveLevel=STUDY", "-k", f"StudyInstanceUID={pydicom.dcmread(study[0]).StudyInstanceUID}"]
    titles = ["-aet", "ASKS", "-aec", orthanc.ae_title, "-aem", "MOVED"]
    run(program("movescu"), *titles, "-S", *keys, LOOPBACK, orthanc.port)
    check_kept(intake, study, orthanc.ae_title)
    check_wire(intake, tap, study)
    originator = struct.pack("<HHI", 0x0000, 0x1030, 4) + b"ASKS"
    assert tap.sent.count(originator) == len(study)
