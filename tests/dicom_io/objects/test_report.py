"""The report read back by readers that did not write it: highdicom, and DCMTK's dsrdump."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import highdicom as hd
import highdicom.sr as sr
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.sr._concepts_dict import concepts
from pydicom.sr.coding import Code
from pydicom.uid import ComprehensiveSRStorage

from appliance.ledger.records import Verdict
from dicom_io.objects import codes
from dicom_io.objects.codes import Concept
from dicom_io.objects.common import Algorithm, Device, Place, part10
from dicom_io.objects.report import Report, build_report
from tests.findings_support import ISSUED, SQUARE, ct_series, dciodvfy_errors, rendered, simulated, verdict_on
from tests.peers import program as tool


@pytest.fixture(scope="module", params=[True, False], ids=["positive", "negative"])
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Verdict, Path]:
    folder = tmp_path_factory.mktemp("series")
    series = ct_series(folder)
    verdict = verdict_on(series, positive=request.param)
    path = folder / "report.object"
    path.write_bytes(part10(rendered(series, verdict, "report")))
    return verdict, path


def content(path: Path) -> Any:
    return sr.srread(path).content


def study_group(path: Path) -> Any:
    """The result for the whole study."""
    return content(path).get_image_measurement_groups()[0]


def inferred(group: Any, concept: Concept) -> list[Any]:
    """The coordinates that one of a group's numbers was inferred from."""
    [number] = [one for one in group.get_measurements() if one.name == code(concept)]
    return [one for one in number[0].get("ContentSequence", []) if one.RelationshipType == "INFERRED FROM"]


def code(concept: Concept) -> Code:
    return Code(concept.value, concept.scheme, concept.meaning)


def numbers(group: Any) -> dict[str, tuple[float, str]]:
    return {m.name.meaning: (m.value, m.unit.value) for m in group.get_measurements()}


def texts(path: Path, concept: Concept) -> list[str]:
    found = []

    def visit(item: Dataset) -> None:
        names = item.get("ConceptNameCodeSequence")
        if names and names[0].CodeValue == concept.value and "TextValue" in item:
            found.append(str(item.TextValue))
        for child in item.get("ContentSequence", []):
            visit(child)

    visit(pydicom.dcmread(path))
    return found


def test_it_is_valid(report: tuple[Verdict, Path]) -> None:
    assert dciodvfy_errors(report[1]) == []


def test_the_study_group_says_what_the_verdict_says(report: tuple[Verdict, Path]) -> None:
    verdict, path = report
    group = study_group(path)
    found = numbers(group)
    assert found["Probability of intracranial hemorrhage"] == (pytest.approx(verdict.probability, abs=5e-5), "1")
    assert found["Operating threshold of the probability"] == (verdict.threshold, "1")
    assert found["Volume"] == (pytest.approx(verdict.volume_ml), "mL")
    for label, probability in verdict.subtypes.items():
        assert found[f"Probability of {label} hemorrhage"] == (pytest.approx(probability), "1")
    result = group.get_qualitative_evaluations(code(codes.TRIAGE_RESULT))[0].value
    assert result == code(codes.SUSPECTED if verdict.positive else codes.NONE_FOUND)
    assert group.finding_type == (code(codes.INTRACRANIAL_HEMORRHAGE) if verdict.positive else None)
    categories = [one.value for one in group.get_qualitative_evaluations(code(codes.ACTIONABILITY))]
    assert categories == ([code(codes.ACTIONABLE_1)] if verdict.positive else [])
    types = [one.value for one in group.get_qualitative_evaluations(code(codes.SUSPECTED_TYPE))]
    likely = [code(codes.SUBTYPES[one]) for one in ("subdural", "subarachnoid")]
    assert types == (likely if verdict.positive else [])


def test_a_negative_report_holds_no_finding(report: tuple[Verdict, Path]) -> None:
    verdict, path = report
    done = subprocess.run([tool("dsrdump"), "+Pc", str(path)], capture_output=True, text=True, check=True)
    assert ('(121071,DCM,"Finding")' in done.stdout) == verdict.positive
    assert "1386000" in done.stdout or not verdict.positive
    [impression] = texts(path, codes.IMPRESSION)
    assert impression.startswith("Intracranial haemorrhage suspected" if verdict.positive else "No haemorrhage found")


def test_it_names_procedure_device_algorithm_notice_and_limitations(report: tuple[Verdict, Path]) -> None:
    verdict, path = report
    done = subprocess.run([tool("dsrdump"), "+Pc", "+Pl", str(path)], capture_output=True, text=True, check=True)
    for line in (
        '(121058,DCM,"Procedure reported")=(303653007,SCT,"Computed tomography of head")',
        '(121007,DCM,"Device")',
        '(121013,DCM,"Device Observer Name")="CT-BOX-1"',
        '(121014,DCM,"Device Observer Manufacturer")="scanside"',
        '(111001,DCM,"Algorithm Name")="ich_reference"',
        '(111003,DCM,"Algorithm Version")="0.1.0"',
        "Preliminary Flag    : PRELIMINARY",
        "Completion Flag     : COMPLETE",
        "Verification Flag   : UNVERIFIED",
    ):
        assert line in done.stdout
    assert any(verdict.notice in text for text in texts(path, codes.COMMENT))
    assert any("Triage only" in text for text in texts(path, codes.COMMENT))
    assert texts(path, codes.LIMITATION) == ["Two slices at the vertex were missing - not analysed."]


def test_outlines_lie_on_their_source_images(report: tuple[Verdict, Path]) -> None:
    verdict, path = report
    groups = content(path).get_planar_roi_measurement_groups()
    outlines = [(verdict.slabs[i], line) for i in verdict.key_slabs for line in verdict.slabs[i].outlines]
    assert len(groups) == len(outlines)
    for group, (slab, outline) in zip(groups, outlines, strict=True):
        region = group.roi
        points = np.asarray(region.value)
        # PS3.3 C.18.6: the centre of the first pixel is 0.5\0.5; a closed polyline ends where it starts.
        np.testing.assert_allclose(points, np.array([*outline, outline[0]]) + 0.5)
        [image] = region.ContentSequence
        assert image.ReferencedSOPSequence[0].ReferencedSOPInstanceUID == slab.sop_instance_uid
        assert "ReferencedFrameNumber" not in image.ReferencedSOPSequence[0]
        assert group.finding_type == code(codes.SUBTYPES["subdural"])
        assert numbers(group)["Probability"] == (pytest.approx(slab.probabilities["any"]), "1")
        # A square of 30 by 30 and a triangle of 6 by 6.5 share 6.17 mL by their areas.
        area = 900.0 if outline == SQUARE else 19.5
        assert numbers(group)["Volume"] == (pytest.approx(6.17 * area / 919.5, abs=5e-3), "mL")


def test_a_key_slab_without_an_outline_is_referred_to_whole(report: tuple[Verdict, Path]) -> None:
    verdict, path = report
    groups = [one for one in content(path).get_image_measurement_groups() if one.source_images]
    assert len(groups) == len([i for i in verdict.key_slabs if not verdict.slabs[i].outlines])
    for group in groups:
        [image] = group.source_images
        assert image.referenced_sop_instance_uid == verdict.slabs[2].sop_instance_uid
        assert group.finding_type == code(codes.INTRACRANIAL_HEMORRHAGE)


def test_every_analysed_image_is_evidence_and_in_the_library(report: tuple[Verdict, Path]) -> None:
    verdict, path = report
    ds = pydicom.dcmread(path)
    [study] = ds.CurrentRequestedProcedureEvidenceSequence
    [series] = study.ReferencedSeriesSequence
    analysed = [slab.sop_instance_uid for slab in verdict.slabs]
    assert study.StudyInstanceUID == verdict.study_instance_uid
    assert series.SeriesInstanceUID == verdict.series_instance_uid
    assert [item.ReferencedSOPInstanceUID for item in series.ReferencedSOPSequence] == analysed
    [library] = [i for i in ds.ContentSequence if i.ConceptNameCodeSequence[0].CodeValue == "111028"]
    images = [i for i in library.ContentSequence[0].ContentSequence if i.ValueType == "IMAGE"]
    assert [i.ReferencedSOPSequence[0].ReferencedSOPInstanceUID for i in images] == analysed


def test_the_volume_is_inferred_from_all_outlines_where_their_images_lie(tmp_path: Path) -> None:
    series, verdict = simulated(tmp_path)
    path = tmp_path / "report.object"
    path.write_bytes(part10(rendered(series, verdict, "report")))
    group = study_group(path)
    header = pydicom.dcmread(series.source(series.uids[0]), stop_before_pixels=True)
    assert numbers(group)["Volume"] == (pytest.approx(verdict.volume_ml, abs=5e-3), "mL")
    assert group.finding_type == code(codes.INTRACRANIAL_HEMORRHAGE)
    found = inferred(group, codes.VOLUME)
    assert {(one.ValueType, one.GraphicType, one.ReferencedFrameOfReferenceUID) for one in found} == {
        ("SCOORD3D", "POLYLINE", header.FrameOfReferenceUID)
    }
    # What the first finding outlines comes first: a viewer draws it, and it must not be another slab's.
    first = verdict.key_slabs[0]
    slabs = [verdict.slabs[first], *(slab for slab in verdict.slabs if slab.index != first)]
    outlines = [(slab, outline) for slab in slabs for outline in slab.outlines]
    assert len(found) == len(outlines) > 10
    for drawn, (slab, outline) in zip(found, outlines, strict=True):
        source = pydicom.dcmread(series.source(slab.sop_instance_uid), stop_before_pixels=True)
        transform = hd.spatial.ReferenceToImageTransformer(
            source.ImagePositionPatient, source.ImageOrientationPatient, source.PixelSpacing
        )
        polygon = np.array(drawn.GraphicData, dtype=np.float64).reshape(-1, 3)
        back = transform(polygon)  # (column, row, slice), the first corner at 0
        np.testing.assert_allclose(back[:, :2], np.array([*outline, outline[0]]) + 0.5, atol=1e-3)
        np.testing.assert_allclose(back[:, 2], 0, atol=1e-3)
    assert dciodvfy_errors(path) == []


def test_the_probability_is_inferred_from_the_most_suspicious_slab(report: tuple[Verdict, Path]) -> None:
    verdict, path = report
    found = inferred(study_group(path), codes.PROBABILITY_ANY)
    if not verdict.positive:
        assert found == []
        return
    slab = verdict.slabs[verdict.key_slabs[0]]
    assert len(found) == len(slab.outlines) == 2
    for drawn, outline in zip(found, slab.outlines, strict=True):
        np.testing.assert_allclose(np.reshape(drawn.GraphicData, (-1, 2)), np.array([*outline, outline[0]]) + 0.5)
        [image] = drawn.ContentSequence
        assert image.RelationshipType == "SELECTED FROM"
        assert image.ReferencedSOPSequence[0].ReferencedSOPInstanceUID == slab.sop_instance_uid


def test_every_group_of_a_positive_report_lies_somewhere(tmp_path: Path) -> None:
    """OHIF shows nothing of a report with a group that does not."""
    series = ct_series(tmp_path)
    seen = verdict_on(series)
    verdict = replace(seen, slabs=tuple(replace(slab, outlines=()) for slab in seen.slabs))
    path = tmp_path / "report.object"
    path.write_bytes(part10(rendered(series, verdict, "report")))
    groups = content(path).get_image_measurement_groups()
    assert len(groups) == 1 + len(verdict.key_slabs)
    for group, concept, index in zip(
        groups, (codes.PROBABILITY_ANY, codes.PROBABILITY, codes.PROBABILITY), (1, *verdict.key_slabs), strict=True
    ):
        [border] = inferred(group, concept)
        assert list(border.GraphicData) == [0, 0, 128, 0, 128, 128, 0, 128, 0, 0]
        [image] = border.ContentSequence
        assert image.ReferencedSOPSequence[0].ReferencedSOPInstanceUID == verdict.slabs[index].sop_instance_uid
    assert dciodvfy_errors(path) == []


@pytest.mark.slow
def test_without_coordinates_in_space_it_says_the_same(tmp_path: Path) -> None:
    series, verdict = simulated(tmp_path)
    paths = {name: tmp_path / f"{name}.object" for name in ("report", "report.2d")}
    for name, path in paths.items():
        path.write_bytes(part10(rendered(series, verdict, name)))
    full, flat = paths["report"], paths["report.2d"]
    made = pydicom.dcmread(flat)
    assert (made.SOPClassUID, made.Modality) == (ComprehensiveSRStorage, "SR")
    assert dciodvfy_errors(flat) == []
    dumps = [
        subprocess.run([tool("dsrdump"), "+Pc", str(path)], capture_output=True, text=True, check=True).stdout
        for path in (full, flat)
    ]
    assert ["SCOORD3D" in dump for dump in dumps] == [True, False]
    assert numbers(study_group(flat)) == numbers(study_group(full))
    for get in ("get_planar_roi_measurement_groups", "get_image_measurement_groups"):
        theirs, ours = getattr(content(full), get)(), getattr(content(flat), get)()
        assert [numbers(one) for one in ours] == [numbers(one) for one in theirs]
        assert [one.finding_type for one in ours] == [one.finding_type for one in theirs]
    assert texts(flat, codes.IMPRESSION) == texts(full, codes.IMPRESSION)
    # The volume lies in the same outlines, each on its image.
    outlines = {
        (slab.sop_instance_uid, tuple(np.ravel(np.array([*line, line[0]]) + 0.5).astype(np.float32).tolist()))
        for slab in verdict.slabs
        for line in slab.outlines
    }
    found = inferred(study_group(flat), codes.VOLUME)
    assert len(found) == len(outlines) == len(inferred(study_group(full), codes.VOLUME)) > 10
    drawn = set()
    for one in found:
        assert (one.ValueType, one.GraphicType) == ("SCOORD", "POLYLINE")
        [image] = one.ContentSequence
        drawn.add((str(image.ReferencedSOPSequence[0].ReferencedSOPInstanceUID), tuple(map(float, one.GraphicData))))
    assert drawn == outlines


def test_of_a_negative_study_there_is_a_report_without_space_as_well(tmp_path: Path) -> None:
    series = ct_series(tmp_path)
    path = tmp_path / "report.object"
    path.write_bytes(part10(rendered(series, verdict_on(series, positive=False), "report.2d")))
    assert dciodvfy_errors(path) == []
    [impression] = texts(path, codes.IMPRESSION)
    assert impression.startswith("No haemorrhage found")


def test_without_a_frame_of_reference_nothing_lies_in_space(tmp_path: Path) -> None:
    series = ct_series(tmp_path, drop=("FrameOfReferenceUID",))
    path = tmp_path / "report.object"
    path.write_bytes(part10(rendered(series, verdict_on(series), "report")))
    assert content(path).get_volumetric_roi_measurement_groups() == []
    assert "Volume" in numbers(study_group(path))
    assert len(content(path).get_planar_roi_measurement_groups()) == 2


def test_a_report_on_a_part_of_the_series_says_so(tmp_path: Path) -> None:
    series = ct_series(tmp_path, count=5)
    verdict = verdict_on(series, positive=False)
    whole = rendered(series, verdict, "report")
    part = rendered(series, verdict, "report", analysed=[uid for uid in series.uids if uid != series.uids[2]])
    assert (whole.CompletionFlag, part.CompletionFlag) == ("COMPLETE", "PARTIAL")
    assert "CompletionFlagDescription" not in whole and "missing" in part.CompletionFlagDescription
    path = tmp_path / "report.object"
    path.write_bytes(part10(part))
    assert dciodvfy_errors(path) == []


def test_a_report_names_the_one_before(tmp_path: Path) -> None:
    series = ct_series(tmp_path)
    verdict = verdict_on(series)
    first = rendered(series, verdict, "report")
    uids = (first.SOPInstanceUID, first.SeriesInstanceUID)
    path = tmp_path / "report.object"
    path.write_bytes(part10(rendered(series, verdict, "report", revision=2, predecessor=uids)))
    done = subprocess.run([tool("dsrdump"), str(path)], capture_output=True, text=True, check=True)
    assert re.search("Predecessor Docs *: 1", done.stdout)
    [study] = pydicom.dcmread(path).PredecessorDocumentsSequence
    [document] = study.ReferencedSeriesSequence[0].ReferencedSOPSequence
    assert document.ReferencedSOPInstanceUID == first.SOPInstanceUID
    assert study.ReferencedSeriesSequence[0].SeriesInstanceUID == first.SeriesInstanceUID
    assert dciodvfy_errors(path) == []


def test_private_codes_are_declared(report: tuple[Verdict, Path]) -> None:
    ds = pydicom.dcmread(report[1])
    assert [i.CodingSchemeDesignator for i in ds.CodingSchemeIdentificationSequence] == ["99SCANSIDE"]
    assert ds.CodingSchemeIdentificationSequence[0].CodingSchemeResponsibleOrganization


def test_without_an_analysed_image_there_is_no_report() -> None:
    empty = Report("l", "1.2", None, codes.NONE_FOUND, "", (), (), (), (), ())
    place = Place("1.2.3", "1.2.4", 1, 1, "", ISSUED)
    with pytest.raises(ValueError, match="at least one"):
        build_report(
            empty,
            Dataset(),
            procedure=codes.CT_HEAD,
            algorithm=Algorithm("a", "1", "m"),
            device=Device("1.2", "n", "m", "m", "1"),
            place=place,
        )


def table() -> list[Concept]:
    values = list(vars(codes).values())
    nested = [c for value in values if isinstance(value, dict) for c in value.values()]
    return [value for value in [*values, *nested] if isinstance(value, Concept)]


def test_every_code_is_in_the_list_that_is_named_or_private() -> None:
    for concept in table():
        assert len(concept.value) <= 16 and len(concept.meaning) <= 64  # SH and LO
        if concept.scheme == codes.PRIVATE_SCHEME:
            assert concept.source == codes.OWN
        elif concept.source.startswith("PS3.16"):
            meanings = [
                known[concept.value][0] for known in concepts[concept.scheme].values() if concept.value in known
            ]
            assert meanings, concept
        else:
            # Verified by hand; a new one is added here only with its list.
            assert concept.value in ("274100004", "21454007", "mL"), concept


def test_codes_are_unique() -> None:
    keys = [(concept.scheme, concept.value) for concept in table()]
    assert len(keys) == len(set(keys))
