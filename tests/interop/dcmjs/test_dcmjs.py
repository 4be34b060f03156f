"""The storage provider against dcmjs-dimse, a sender that shares no code with the others."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)

from dicom_io.performed import Availability, NewStep, StepChange
from dicom_io.pixels import decode
from dicom_io.sop_classes import AVAILABILITY, PERFORMED_STEP
from tests.dicom_io.support import Recorder, ct, head, run, save, serving
from tests.interop.intake import Intake, running_intake
from tests.peers import encode, node_packages
from tests.peers import program as tool

pytestmark = [pytest.mark.interop, pytest.mark.xdist_group("dcmjs")]

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="session")
def node_modules() -> Path:
    """The folder into which the pinned packages are installed, once for all test processes."""
    return node_packages(HERE)


def dcmjs(folder: Path, port: int, *files: Path, calling: str = "DCMJS", **options: Any) -> dict[str, Any]:
    command = ["node", HERE / "sender.cjs", port, calling, "SCANSIDE", json.dumps(options), *files]
    done = subprocess.run([str(part) for part in command], cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize("encode", [[], ["dcmconv", "+ti"], ["dcmcjpeg", "+e1"], ["dcmcjpls", "+el"], ["dcmcrle"]])
def test_dcmjs_echoes_and_stores(node_modules: Path, tmp_path: Path, encode: list[str]) -> None:
    files = []
    for number in range(5):
        file = save(ct(head(12, False, seed=number), 12, instance_number=number), tmp_path / f"{number}.dcm")
        if encode:
            run(tool(encode[0]), *encode[1:], file, tmp_path / f"{number}.enc")
            file = tmp_path / f"{number}.enc"
        files.append(file)
    recorder = Recorder()
    with serving(recorder) as server:
        assert dcmjs(node_modules, server.port, *files) == {"outcome": "released", "statuses": [0] * 6}
        recorder.wait(closed=1)

    assert [c.outcome for c in recorder.closed_calls] == ["released"]
    assert {r.calling_ae for r in recorder.received} == {"DCMJS"}
    for received, file in zip(recorder.received, files, strict=True):
        got = dcmread(BytesIO(received.part10))
        assert got.SOPInstanceUID == dcmread(file).SOPInstanceUID == received.sop_instance_uid
        kept = tmp_path / "kept.dcm"
        kept.write_bytes(received.part10)
        assert (decode(kept).stored == decode(file).stored).all()


def test_dcmjs_stores_a_real_head(node_modules: Path, ge_head: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    files = sorted(ge_head.glob("*.dcm"))
    with serving(recorder) as server:
        assert dcmjs(node_modules, server.port, *files) == {"outcome": "released", "statuses": [0] * 29}
    pixels = {r.sop_instance_uid: dcmread(BytesIO(r.part10)).PixelData for r in recorder.received}
    assert pixels == {dcmread(f).SOPInstanceUID: dcmread(f).PixelData for f in files}


def test_dcmjs_learns_that_it_may_not_call(node_modules: Path) -> None:
    with serving(Recorder(), accepted_calling=["SCANNER"]) as server:
        assert dcmjs(node_modules, server.port)["outcome"] == "rejected"


HEAD = {"1.2.3.1": ("1.2.3.1.1", "1.2.3.1.2")}
REFERENCES = [
    {"ReferencedSOPClassUID": "1.2.840.10008.5.1.4.1.1.2", "ReferencedSOPInstanceUID": uid} for uid in HEAD["1.2.3.1"]
]
STEP = {
    "ScheduledStepAttributesSequence": [{"StudyInstanceUID": "1.2.3", "AccessionNumber": ""}],
    "PatientName": "Nobody",
    "PerformedProcedureStepStatus": "IN PROGRESS",
    "PerformedSeriesSequence": [],
}
DONE = {
    "PerformedProcedureStepStatus": "COMPLETED",
    "PerformedSeriesSequence": [{"SeriesInstanceUID": "1.2.3.1", "ReferencedImageSequence": REFERENCES}],
}
ANNOUNCED = {
    "StudyInstanceUID": "1.2.3",
    "ReferencedSeriesSequence": [
        {
            "SeriesInstanceUID": "1.2.3.1",
            "ReferencedSOPSequence": [
                one | {"InstanceAvailability": "ONLINE", "RetrieveAETitle": "PACS"} for one in REFERENCES
            ],
        }
    ],
}


def tell(folder: Path, port: int, *asked: tuple[str, str, str, dict[str, Any]]) -> dict[str, Any]:
    command = ["node", HERE / "steps.cjs", port, "DCMJS", "SCANSIDE", json.dumps(asked)]
    done = subprocess.run([str(part) for part in command], cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_dcmjs_tells_what_was_performed_and_what_there_is(node_modules: Path) -> None:
    recorder = Recorder()
    with serving(recorder) as server:
        result = tell(
            node_modules,
            server.port,
            ("create", PERFORMED_STEP, "1.2.7", STEP),
            ("set", PERFORMED_STEP, "1.2.7", DONE),
            ("create", AVAILABILITY, "1.2.8", ANNOUNCED),
        )
    assert result == {"outcome": "released", "answers": [[0, ""]] * 3}
    assert recorder.performed_calls == [
        NewStep("1.2.7", "1.2.3", {}),
        StepChange("1.2.7", "COMPLETED", HEAD),
        Availability("1.2.8", "1.2.3", HEAD, 0),
    ]


def test_dcmjs_hears_what_is_wrong(node_modules: Path, intake: Intake) -> None:
    result = tell(
        node_modules,
        intake.port,
        ("set", PERFORMED_STEP, "1.2.7", DONE),
        ("create", PERFORMED_STEP, "1.2.7", STEP | {"PerformedProcedureStepStatus": "COMPLETED"}),
        ("create", PERFORMED_STEP, "1.2.7", STEP),
        ("create", PERFORMED_STEP, "1.2.7", STEP),
        ("set", PERFORMED_STEP, "1.2.7", DONE),
        ("set", PERFORMED_STEP, "1.2.7", DONE),
    )
    assert [status for status, _ in result["answers"]] == [0x0112, 0x0106, 0, 0x0111, 0, 0x0110]
    assert result["answers"][-1][1] == "Performed Procedure Step Object may no longer be updated"


@pytest.fixture(scope="module")
def intake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Intake]:
    with running_intake(tmp_path_factory.mktemp("dcmjs") / "box") as one:
        yield one


@pytest.mark.parametrize(
    "options",
    [
        {},
        # The intake takes one operation at a time and says nothing of identities; the sender has to live with both.
        {"asyncOps": {"maxAsyncOpsInvoked": 8, "maxAsyncOpsPerformed": 8}},
        {"userIdentity": {"type": 2, "primaryField": "operator", "secondaryField": "secret"}},
        {"userIdentity": {"type": 1, "positiveResponseRequested": True, "primaryField": "operator"}},
    ],
    ids=["plain", "asynchronous", "password", "identity"],
)
def test_dcmjs_stores_studies_in_a_running_intake(
    node_modules: Path, tmp_path: Path, intake: Intake, options: dict[str, Any]
) -> None:
    encodings = [ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless, JPEGLosslessSV1]
    encodings += [JPEGLSLossless, JPEG2000Lossless]
    sent: list[tuple[Path, UID]] = []
    for number, syntax in enumerate(encodings):
        image = ct(head(12, False, seed=number), 12, study=generate_uid(None), series=generate_uid(None))
        path = encode(save(image, tmp_path / f"{number}.dcm"), tmp_path / f"{number}.encoded", syntax)
        sent.append((path, syntax))
    tap = intake.tap()
    result = dcmjs(node_modules, tap.port, *(path for path, _ in sent), **options)
    assert result == {"outcome": "released", "statuses": [0] * (1 + len(sent))}
    kept = [intake.kept(dcmread(path).SOPInstanceUID) for path, _ in sent]
    for one, (path, syntax) in zip(kept, sent, strict=True):
        assert one.calling_ae == "DCMJS"
        # What comes in Implicit VR it compresses, where it has such a context from another image.
        found = one.dataset.file_meta.TransferSyntaxUID
        assert found == (JPEG2000Lossless if syntax == ImplicitVRLittleEndian else syntax)
        assert (decode(one.path).stored == decode(path).stored).all()
    assert len({one.association for one in kept}) == 1
    assert sorted(tap.data_sets()) == sorted(one.data_set for one in kept)


def test_what_dcmjs_does_not_deflate_is_refused(node_modules: Path, tmp_path: Path, intake: Intake) -> None:
    """dcmjs-dimse 0.3.3 sends a plain data set where it negotiated a deflated one."""
    image = save(ct(head(12, False), 12), tmp_path / "image.dcm")
    path = encode(image, tmp_path / "image.deflated", DeflatedExplicitVRLittleEndian)
    assert dcmjs(node_modules, intake.port, path, image) == {"outcome": "released", "statuses": [0, 0xC000, 0]}
    kept = intake.kept(dcmread(image).SOPInstanceUID)
    assert kept.dataset.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian
