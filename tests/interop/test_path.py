"""The whole path: a study goes in, an acknowledged alert and findings in the PACS come out."""

from __future__ import annotations

import json
import random
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hl7
import pydicom
import pytest
from highdicom.legacy import LegacyConvertedEnhancedCTImage
from pynetdicom import AE
from pynetdicom.sop_class import CTImageStorage  # type: ignore[attr-defined]

from appliance.bench.latency import said
from tests.interop.box import Box, study, wait_for
from tests.peers import program

pytestmark = [pytest.mark.interop, pytest.mark.xdist_group("box")]

REPORT = "1.2.840.10008.5.1.4.1.1.88.34"
CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
SEGMENTATION = "1.2.840.10008.5.1.4.1.1.66.4"
PRESENTATION = "1.2.840.10008.5.1.4.1.1.11.1"
SELECTION = "1.2.840.10008.5.1.4.1.1.88.59"


def test_a_haemorrhage_is_alerted_once_and_lies_in_the_study(box: Box, tmp_path: Path) -> None:
    uid, files = study(tmp_path, "intraparenchymal", "BLEED1")
    assert [result.error for result in box.send(files)] == [""] * len(files)
    report = box.settled(uid)
    assert report["verdicts"][-1]["positive"]
    (message,) = box.messages(uid)
    assert box.transmissions(uid) == 1
    parsed = hl7.parse(message.read_bytes().decode("utf-8"))
    assert str(parsed.segment("MSH")[9]) == "ORU^R01^ORU_R01"
    assert str(parsed.segment("PID")[3]).startswith("BLEED1")
    assert "AA" in [str(row[8]) for row in parsed.segments("OBX") if len(row) > 8]
    held = box.hospital.pacs.holds(uid)
    sent = {one["uid"] for one in report["deliveries"] if not one["object"].startswith("alert.")}
    assert sent == {instance for _, instance in held}
    classes = [sop_class for sop_class, _ in held]
    keys = len(report["verdicts"][-1]["result"]["key_slabs"])
    expected = {REPORT: 1, CAPTURE: keys + 1, SEGMENTATION: 1, PRESENTATION: keys, SELECTION: 1}
    assert {sop_class: classes.count(sop_class) for sop_class in classes} == expected


def test_a_normal_head_gets_a_report_and_no_alert(box: Box, tmp_path: Path) -> None:
    uid, files = study(tmp_path, None, "NORMAL1")
    box.send(files)
    report = box.settled(uid)
    assert not report["verdicts"][-1]["positive"]
    assert box.messages(uid) == []
    assert [sop_class for sop_class, _ in box.hospital.pacs.holds(uid)] == [REPORT]


def test_a_study_that_broke_off_is_judged_on_what_came_and_says_so(box: Box, tmp_path: Path) -> None:
    uid, files = study(tmp_path, None, "BROKENOFF1")
    ae = AE("CT7")
    ae.add_requested_context(CTImageStorage)
    association = ae.associate(box.peer.host, box.peer.port, ae_title=box.peer.ae_title)
    assert association.is_established
    for path in files[: int(0.7 * len(files))]:
        assert association.send_c_store(pydicom.dcmread(path)).Status == 0x0000
    association.abort()
    report = box.settled(uid)
    assert report["evidence"]["confidence"] == "low"
    result = report["verdicts"][-1]["result"]
    assert result["incomplete"] and any("may be INCOMPLETE" in one for one in result["limitations"])
    (finding,) = [one for one in report["findings"] if one["object"] == "report"]
    made = pydicom.dcmread(box.settings.findings_directory / finding["path"])
    assert made.CompletionFlag == "PARTIAL"
    assert b"INCOMPLETE" in (box.settings.findings_directory / finding["path"]).read_bytes()


@pytest.mark.parametrize(
    "command",
    [
        ["dcmsend", "--no-halt", "-aec", "SCANSIDE"],
        ["storescu", "-aec", "SCANSIDE"],
        ["storescu", "-xi", "-aec", "SCANSIDE"],
    ],
    ids=["dcmsend", "storescu", "storescu-implicit"],
)
def test_dcmtk_sends(box: Box, tmp_path: Path, command: list[str]) -> None:
    name = f"DCMTK{command[0][0]}{len(command)}".upper()
    uid, files = study(tmp_path, "intraparenchymal", name)
    sender = program(command[0])
    subprocess.run(
        [sender, *command[1:], "127.0.0.1", str(box.peer.port), *map(str, files)],
        check=True,
        capture_output=True,
        timeout=60,
    )
    assert box.settled(uid)["verdicts"][-1]["positive"]
    assert len(box.messages(uid)) == 1


@pytest.mark.parametrize(
    ("coder", "codec"),
    [("dcmcrle", "packbits"), ("dcmcjpeg", "jpeg8"), ("dcmcjpls", "jpegls"), ("dcmconv +td", "deflate")],
)
def test_compressed_studies_give_the_same_answer(box: Box, tmp_path: Path, coder: str, codec: str) -> None:
    uid, files = study(tmp_path, "intraparenchymal", f"C{codec}".upper())
    name, *options = coder.split()
    for path in files:
        subprocess.run([program(name), *options, path, path], check=True, capture_output=True, timeout=60)
    assert [result.error for result in box.send(files)] == [""] * len(files)
    verdict = box.settled(uid)["verdicts"][-1]
    assert verdict["result"]["codecs"] == [codec if codec == "deflate" else f"imagecodecs.{codec}"]
    plain, plain_files = study(tmp_path, "intraparenchymal", f"P{codec}".upper())
    box.send(plain_files)
    assert verdict["probability"] == box.settled(plain)["verdicts"][-1]["probability"]


def test_an_enhanced_multi_frame_study(box: Box, tmp_path: Path) -> None:
    uid, files = study(tmp_path, "intraparenchymal", "ENHANCED1")
    converted = LegacyConvertedEnhancedCTImage(
        [pydicom.dcmread(path) for path in files],
        series_instance_uid=pydicom.uid.generate_uid(),
        series_number=7,
        sop_instance_uid=pydicom.uid.generate_uid(),
        instance_number=1,
    )
    path = tmp_path / "enhanced.dcm"
    converted.save_as(path)
    assert [result.error for result in box.send([path])] == [""]
    report = box.settled(uid)
    assert report["verdicts"] and report["verdicts"][-1]["positive"], [one["reason"] for one in report["analyses"]]
    assert len(box.messages(uid)) == 1


def test_studies_that_come_in_pieces_and_mixed_get_the_same_verdicts(box: Box, tmp_path: Path) -> None:
    """Two patients' slices in no order, on three associations at once."""
    plain = {}
    for bleed in ("intraparenchymal", None):
        uid, files = study(tmp_path, bleed, f"PLAIN{bleed or 'NONE'}")
        box.send(files)
        plain[bleed] = box.settled(uid)["verdicts"][-1]["result"]
    mixed = {bleed: study(tmp_path, bleed, f"MIXED{bleed or 'NONE'}") for bleed in plain}
    every = [path for _, files in mixed.values() for path in files]
    random.Random(20261129).shuffle(every)
    with ThreadPoolExecutor(3) as pool:
        for results in pool.map(lambda share: box.send(every[share::3]), range(3)):
            assert not any(result.error for result in results)
    for bleed, (uid, files) in mixed.items():
        report = box.settled(uid)
        assert report["instances"] == len(files)
        assert said(report["verdicts"][-1]["result"]) == said(plain[bleed])
        assert len(box.messages(uid)) == (1 if bleed else 0)


def test_orthanc_sends_and_shows_the_findings_in_the_same_study(box: Box, tmp_path: Path) -> None:
    uid, files = study(tmp_path, "intraparenchymal", "ORTHANC1")
    pacs = box.hospital.pacs
    program("storescu")
    subprocess.run(
        ["storescu", "-aet", "SCANNER", "-aec", pacs.ae_title, pacs.host, str(pacs.port), *map(str, files)],
        check=True,
        capture_output=True,
        timeout=60,
    )
    pacs.store_to("scanside", [one.orthanc_id for one in pacs.instances(uid)])  # type: ignore[attr-defined]
    box.settled(uid)
    series = {one.series_description for one in pacs.instances(uid)}  # type: ignore[attr-defined]
    assert len(series) == 6
    modalities = {one.modality for one in pacs.instances(uid)}  # type: ignore[attr-defined]
    assert modalities == {"CT", "SR", "OT", "SEG", "PR", "KO"}


def test_identity_is_the_patients_in_every_object(box: Box, tmp_path: Path) -> None:
    uid, files = study(tmp_path, "intraparenchymal", "IDENT1")
    source = pydicom.dcmread(files[0])
    box.send(files)
    report = box.settled(uid)
    for finding in report["findings"]:
        if finding["path"].endswith(".dcm"):
            made = pydicom.dcmread(box.settings.findings_directory / finding["path"])
            for keyword in ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber",
                            "StudyInstanceUID", "StudyDate", "StudyTime", "StudyID"):  # fmt: skip
                assert made[keyword].value == source[keyword].value, keyword


def test_a_late_slice_gives_a_second_revision_and_no_second_alert(box: Box, tmp_path: Path) -> None:
    uid, files = study(tmp_path, "intraparenchymal", "LATE1")
    box.send(files[:-1])
    first = box.settled(uid)
    assert first["verdicts"][-1]["positive"]
    box.send(files[-1:])
    wait_for(
        lambda: True if len((box.report(uid) or {"verdicts": []})["verdicts"]) == 2 else None,
        60.0,
        lambda: f"no second revision: {box.report(uid)}",
    )
    second = box.settled(uid)
    assert [one["revision"] for one in second["verdicts"]] == [1, 2]
    assert len(box.messages(uid)) == 1
    held = [sop_class for sop_class, _ in box.hospital.pacs.holds(uid)]
    assert held.count(REPORT) == 2


def test_what_comes_back_from_the_pacs_makes_no_new_revision(box: Box, tmp_path: Path) -> None:
    uid, files = study(tmp_path, "intraparenchymal", "ROUTED1")
    box.send(files)
    report = box.settled(uid)
    captures = [
        box.settings.findings_directory / one["path"]
        for one in report["findings"]
        if one["object"].startswith("capture")
    ]
    assert captures
    box.send(captures)

    def kept() -> bool | None:
        names = [event["name"] for event in (box.report(uid) or {"events": []})["events"]]
        return True if "verdict.kept" in names else None

    wait_for(kept, 30.0, lambda: f"not kept: {box.report(uid)}")
    report = box.settled(uid)
    assert report["instances"] == len(files) + len(captures)
    assert [one["revision"] for one in report["verdicts"]] == [1]
    assert box.transmissions(uid) == 1


def test_two_patients_in_one_study_are_refused(box: Box, tmp_path: Path) -> None:
    uid, files = study(tmp_path, "intraparenchymal", "MIXED1")
    for path in files[::2]:
        dataset = pydicom.dcmread(path)
        dataset.PatientID = "SOMEBODY ELSE"
        dataset.save_as(path)
    box.send(files)
    report = box.settled(uid)
    assert report["analyses"][0]["state"] == "refused"
    assert "patient" in report["analyses"][0]["reason"]
    assert box.messages(uid) == []


def test_a_file_that_changed_on_disk_is_not_analysed(box: Box, tmp_path: Path) -> None:
    uid, files = study(tmp_path, "intraparenchymal", "ROTTEN1")
    box.send(files[:-1])
    box.settled(uid)
    report = box.report(uid)
    assert report is not None
    _, digest = report["analyses"][0]["inputs"][3]
    stored = box.settings.spool_directory / digest[:2] / f"{digest}.dcm"
    content = bytearray(stored.read_bytes())
    content[-1000] ^= 1
    stored.write_bytes(content)
    box.kill("engine")  # it knows the answer of that slab, from when the file was whole
    box.send(files[-1:])

    def failed() -> str | None:
        (analysis,) = (box.report(uid) or {"analyses": [{"state": ""}]})["analyses"]
        return analysis["reason"] if analysis["state"] == "failed" else None

    assert "changed since it was received" in wait_for(failed, 60.0, lambda: f"not failed: {box.report(uid)}")
    assert len((box.report(uid) or {})["verdicts"]) == 1
    assert "set aside" in box.command("studies").stdout
    stored.unlink()
    assert box.command("retry", "--study", uid).returncode == 0
    assert "the file is gone" in wait_for(failed, 60.0, lambda: f"not failed: {box.report(uid)}")
    content[-1000] ^= 1
    stored.write_bytes(content)
    assert box.command("retry", "--study", uid).returncode == 0
    wait_for(
        lambda: True if len((box.report(uid) or {"verdicts": []})["verdicts"]) == 2 else None,
        60.0,
        lambda: f"not analysed again: {box.report(uid)}",
    )


def test_a_second_box_on_the_same_data_does_not_start(box: Box) -> None:
    for service in ("intake", "engine", "deliver", "run"):
        second = box.command(service)
        assert second.returncode == 1
        assert "runs already" in second.stderr
        assert "Traceback" not in second.stderr


def test_the_same_study_again_changes_nothing(box: Box, tmp_path: Path) -> None:
    uid, files = study(tmp_path, "intraparenchymal", "TWICE1")
    box.send(files)
    box.settled(uid)
    assert [result.error for result in box.send(files)] == [""] * len(files)
    report = box.settled(uid)
    assert len(report["verdicts"]) == 1
    assert report["instances"] == len(files)
    assert len(box.messages(uid)) == 1


def test_a_real_head_without_age_is_refused_and_says_why(box: Box, ge_head: Path) -> None:
    files = sorted(ge_head.glob("*.dcm"))
    box.send(files)
    report = box.settled(pydicom.dcmread(files[0], stop_before_pixels=True).StudyInstanceUID)
    (analysis,) = report["analyses"]
    assert analysis["state"] == "refused"
    assert "age" in analysis["reason"]
    assert report["deliveries"] == []


def test_the_command_tells_what_happened(box: Box, tmp_path: Path) -> None:
    uid, files = study(tmp_path, "intraparenchymal", "SHOWN1")
    box.send(files)
    box.settled(uid)
    listed = json.loads(box.command("studies", "--json").stdout)
    (row,) = [one for one in listed if one["study_instance_uid"] == uid]
    assert row["positive"]
    assert row["alert_seconds"] > 0
    shown = json.loads(box.command("study", uid, "--json").stdout)
    assert {one["outcome"] for one in shown["analyses"][0]["admission"]} == {"met"}
    assert all(moment is not None for moment in shown["timeline"].values())
    table = box.command("study", uid).stdout
    for word in ("Timeline", "Admission", "positive", "Deliveries", "acknowledged"):
        assert word in table
    assert "BLEED" not in table
    day = json.loads(box.command("accounting", "--verify", "--json").stdout)
    assert day["balanced"]
    # Uncounted are those that were open when another test stopped the box.
    assert day["differences"] == []
    assert day["counted"] >= len(files)
    assert day["outcomes"]["analysed"] >= len(files)
    missing = box.command("study", "9.9.9")
    assert (missing.returncode, "no such study" in missing.stderr) == (1, True)
    assert 'scanside_events_total{event="verdict.issued"}' in box.command("metrics").stdout
    checks = json.loads(box.command("check", "--json").stdout)["checks"]
    assert {one["check"] for one in checks} >= {
        "ledger",
        "models",
        "intake",
        "triton",
        "destination pacs",
        "destination er",
    }
