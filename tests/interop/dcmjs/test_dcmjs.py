"""The storage provider against dcmjs-dimse, a sender that shares no code with the others."""

from __future__ import annotations

import json
import subprocess
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread

from dicom_io.pixels import decode
from tests.dicom_io.support import Recorder, ct, head, run, save, serving
from tests.peers import node_packages
from tests.peers import program as tool

pytestmark = pytest.mark.interop

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="session")
def node_modules() -> Path:
    """The folder into which the pinned packages are installed, once for all test processes."""
    return node_packages(HERE)


def dcmjs(folder: Path, port: int, *files: Path, calling: str = "DCMJS") -> dict[str, Any]:
    command = ["node", HERE / "sender.cjs", port, calling, "SCANSIDE", *files]
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
