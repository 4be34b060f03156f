"""The alert, judged by hl7apy's strict validation and read by the hl7 package."""

from __future__ import annotations

import time
import unicodedata
import warnings
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import hl7
import pytest
from hl7apy.consts import VALIDATION_LEVEL
from hl7apy.parser import parse_message
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.datadict import tag_for_keyword
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from appliance.findings.alert import Kind, message_control_id, render_alert, render_order_update, study_link
from appliance.findings.validate import fault, segments_fault
from appliance.ledger.records import Verdict
from tests.findings_support import ISSUED, NAMES, Series, ct_series, renamed, verdict_on


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Series:
    return ct_series(tmp_path_factory.mktemp("series"))


def alert(verdict: Verdict, source: Dataset, **changes: Any) -> str:
    arguments: dict[str, Any] = {
        "control_id": "ABCDEFGHIJKLMNOPQRST",
        "kind": "alert",
        "issued_at": ISSUED,
        "processing_id": "P",
        "sending_application": "SCANSIDE",
        "sending_facility": "BOX",
        "receiving_application": "RIS",
        "receiving_facility": "HOSP",
    }
    return render_alert(verdict, source, **{**arguments, **changes})


def valid(text: str) -> hl7.Message:
    """The message parsed, after hl7apy found it valid against the v2.5.1 structures."""
    message = parse_message(text.rstrip("\r"), validation_level=VALIDATION_LEVEL.STRICT, find_groups=True)
    assert message.validate()
    assert message.to_er7().rstrip("\r").split("\r") == text.rstrip("\r").split("\r")
    return hl7.parse(text)


def field(segment: hl7.Segment, number: int) -> str:
    return str(segment[number]) if len(segment) > number else ""


def observation(message: hl7.Message, code: str) -> hl7.Segment:
    [found] = [s for s in message.segments("OBX") if str(s[3]).split("^")[0] == code]
    return found


def test_an_alert_is_a_valid_message_in_utf_8(series: Series) -> None:
    text = alert(verdict_on(series), series.header())
    message = valid(text)
    header = message.segment("MSH")
    assert [field(header, n) for n in (3, 4, 5, 6)] == ["SCANSIDE", "BOX", "RIS", "HOSP"]
    assert field(header, 7) == "20260304050607.8910+0000"
    assert [field(header, n) for n in (9, 10, 11, 12)] == ["ORU^R01^ORU_R01", "ABCDEFGHIJKLMNOPQRST", "P", "2.5.1"]
    assert field(header, 18) == "UNICODE UTF-8"
    assert field(header, 15) == field(header, 16) == ""  # original acknowledgement mode
    assert text.endswith("\r") and "\n" not in text
    assert [str(s[0]) for s in message][:5] == ["MSH", "PID", "PV1", "ORC", "OBR"]


def test_it_says_what_the_verdict_says(series: Series) -> None:
    verdict = verdict_on(series)
    message = valid(alert(verdict, series.header()))
    study = observation(message, "113014")
    assert (field(study, 2), field(study, 3), field(study, 5)) == (
        "ST",
        "113014^DICOM Study^DCM",
        verdict.study_instance_uid,
    )
    impression = observation(message, "59776-5")
    assert (field(impression, 2), field(impression, 3)) == ("TX", "59776-5^Procedure Findings^LN")
    assert field(impression, 5).startswith("Intracranial haemorrhage suspected (subdural, subarachnoid)")
    assert field(impression, 8) == "AA"
    assert field(impression, 17) == "RID49480^ACR Category 1 Actionable Finding^RADLEX"
    assert float(field(observation(message, "122157"), 5)) == pytest.approx(verdict.probability, abs=5e-5)
    volume = observation(message, "118565006")
    assert (field(volume, 2), float(field(volume, 5)), field(volume, 6)) == ("NM", 12.34, "mL^milliliter^UCUM")
    assert field(observation(message, "111001"), 5) == "ich_reference"
    assert field(observation(message, "111003"), 5) == "0.1.0"
    findings = [field(s, 5) for s in message.segments("OBX") if field(s, 3).startswith("121071")]
    assert findings == [
        "1386000^Intracranial hemorrhage^SCT",
        "ICH-SUBDURAL^Subdural hemorrhage^99SCANSIDE",
        "21454007^Subarachnoid intracranial hemorrhage^SCT",
    ]
    assert [field(s, 1) for s in message.segments("OBX")] == [str(n) for n in range(1, 12)]


def test_notes_say_triage_only_notice_and_limitations(series: Series) -> None:
    message = valid(alert(verdict_on(series), series.header()))
    notes = [field(note, 3) for note in message.segments("NTE")]
    assert "unverified" in notes[0] and "research use, not cleared" in notes[1]
    assert notes[2] == "Limitation: Two slices at the vertex were missing – not analysed."


def test_order_and_times_come_from_the_source(tmp_path: Path) -> None:
    def change(ds: Dataset) -> None:
        issuer = Dataset()
        issuer.LocalNamespaceEntityID, issuer.UniversalEntityID = "RIS", "1.2.9"
        issuer.UniversalEntityIDType = "ISO"
        ds.IssuerOfAccessionNumberSequence = Sequence([issuer])
        ds.PlacerOrderNumberImagingServiceRequest, ds.AdmissionID = "PLACER|7", "VISIT-3"
        ds.TimezoneOffsetFromUTC = "+0100"

    series = ct_series(tmp_path, change=change, count=3)
    message = valid(alert(verdict_on(series), series.header()))
    order, request = message.segment("ORC"), message.segment("OBR")
    assert [field(order, n) for n in (1, 2, 3)] == ["RE", "PLACER\\F\\7", "ACC-1^RIS^1.2.9^ISO"]
    assert [field(request, n) for n in (2, 3)] == ["PLACER\\F\\7", "ACC-1^RIS^1.2.9^ISO"]
    assert field(request, 4) == "24725-4^CT Head^LN^303653007^Computed tomography of head^SCT"
    assert field(request, 7) == "20260304041630+0100"
    assert (field(request, 18), field(request, 24), field(request, 25)) == ("ACC-1", "CT", "P")
    assert field(message.segment("PV1"), 19) == "VISIT-3"


def test_patient_identity_has_its_issuer(tmp_path: Path) -> None:
    def change(ds: Dataset) -> None:
        qualifiers = Dataset()
        qualifiers.UniversalEntityID, qualifiers.UniversalEntityIDType = "1.2.3.4", "ISO"
        ds.IssuerOfPatientIDQualifiersSequence = Sequence([qualifiers])

    series = ct_series(tmp_path, change=change, count=3)
    patient = valid(alert(verdict_on(series), series.header())).segment("PID")
    assert [field(patient, n) for n in (3, 5, 7, 8)] == [
        "PID-1^^^HOSP&1.2.3.4&ISO",
        "Doe^Jane^^^^^L^A",
        "19610203",
        "F",
    ]


@pytest.mark.parametrize(
    ("character_set", "expected"),
    [
        ("latin", "Müller^Jörg^^^Dr.^^L^A"),
        ("arabic", "قباني^لنزار^^^^^L^A"),
        ("cyrillic", "Люкceмбypг^Анна^^^^^L^A"),
        ("japanese", "Yamada^Tarou^^^^^L^A~山田^太郎^^^^^L^I~やまだ^たろう^^^^^L^P"),
        ("chinese", "Wang^XiaoDong^^^^^L^A~王^小东^^^^^L^I"),
        ("delimiters", "O\\F\\Brien^A\\T\\B\\R\\C^^^^^L^A"),
    ],
)
def test_names_of_every_character_set_become_xpn(character_set: str, expected: str, tmp_path: Path) -> None:
    declared, name = NAMES[character_set]
    series = ct_series(tmp_path, name=name, character_set=declared, count=3)
    text = alert(verdict_on(series), series.header())
    assert field(valid(text).segment("PID"), 5) == expected
    assert text.encode("utf-8").decode("utf-8") == text


def test_prefix_and_suffix_change_places(tmp_path: Path) -> None:
    series = ct_series(tmp_path, name="Adams^John^Quincy^Rev.^B.A. M.Div.", count=3)
    patient = valid(alert(verdict_on(series), series.header())).segment("PID")
    assert field(patient, 5) == "Adams^John^Quincy^B.A. M.Div.^Rev.^^L^A"


def test_a_source_with_little_identity_still_alerts(tmp_path: Path) -> None:
    dropped = ("PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyDate", "AcquisitionDate")
    series = ct_series(tmp_path, drop=dropped, count=3)
    message = valid(alert(verdict_on(series), series.header()))
    patient = message.segment("PID")
    assert [field(patient, n) for n in (5, 7, 8)] == ["^^^^^^U", "", "U"]
    assert field(message.segment("OBR"), 7) == ""


def test_images_without_a_patient_id_say_so_first_and_carry_the_study_uid_as_order_number(tmp_path: Path) -> None:
    series = ct_series(tmp_path, drop=("PatientID", "AccessionNumber"), count=3)
    header = series.header()
    header.PatientID = ""
    message = valid(alert(verdict_on(series), header))
    assert field(message.segment("PID"), 3) == f"{header.StudyInstanceUID}^^^SCANSIDE^U"
    assert "NO patient ID" in field(message.segments("NTE")[0], 3)
    assert field(message.segment("OBR"), 3) == header.StudyInstanceUID
    header.PatientID = "P1"
    assert "NO patient ID" not in alert(verdict_on(series), header)


LONG = "Klinik für Radiologie und Neuroradiologie"  # of an issuer: an IS has 20 characters


@pytest.mark.parametrize(
    ("changes", "place", "expected"),
    [
        ({"IssuerOfPatientID": LONG}, ("PID", 3), f"P1^^^&{LONG}&L"),
        ({"PatientID": "&" * 64}, ("PID", 3), "\\T\\" * 64),
        ({"PatientID": "P" * 200}, ("PID", 3), "1.2.3^^^SCANSIDE^U"),
        ({"PatientName": f"{'N' * 200}^Eva"}, ("PID", 5), "^^^^^^U"),
        ({"AccessionNumber": "A" * 200}, ("OBR", 3), "1.2.3"),
        ({"AdmissionID": "A" * 200}, ("PV1", 19), ""),
        ({"PlacerOrderNumberImagingServiceRequest": "A" * 200}, ("OBR", 2), ""),
    ],
)
def test_what_is_too_long_for_its_field_is_told_whole_and_holds_no_alert_back(
    changes: dict[str, str], place: tuple[str, int], expected: str
) -> None:
    source = Dataset()
    source.StudyInstanceUID, source.PatientID = "1.2.3", "P1"
    for keyword, value in changes.items():
        setattr(source, keyword, value)
    text = alert(POSITIVE, source)
    assert fault(text) == ""
    message = hl7.parse(text)
    assert field(message.segment(place[0]), place[1]) == expected
    ((keyword, value),) = changes.items()
    notes = [hl7.Message().unescape(field(note, 3)) for note in message.segments("NTE")]
    left_out = len(value) > 199 and keyword != "PlacerOrderNumberImagingServiceRequest"
    assert any("too long" in note and value in note for note in notes) == left_out


def test_long_names_of_applications_hold_no_alert_back() -> None:
    source = Dataset()
    source.StudyInstanceUID = "1.2.3"
    names = {"sending_application": "ct1.radiology.hospital.example", "receiving_facility": LONG}
    text = alert(POSITIVE, source, **names)
    assert fault(text) == ""
    header = hl7.parse(text).segment("MSH")
    assert field(header, 3) == "^ct1.radiology.hospital.example^L" and field(header, 6) == f"^{LONG}^L"


ODD = st.text("\r\n\t\x00\x0b\x1b\x85\u2028\ud800&^~|\\.brx", max_size=300).map(lambda one: one * 40) | st.text(
    max_size=400
)
"""Line breaks, control characters, delimiters and escapes, up to 12,000 of them."""


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(
    st.dictionaries(
        st.sampled_from(
            [
                "PatientID",
                "IssuerOfPatientID",
                "PatientName",
                "AccessionNumber",
                "AdmissionID",
                "PatientBirthDate",
                "PatientSex",
                "PlacerOrderNumberImagingServiceRequest",
                "AcquisitionDate",
                "AcquisitionTime",
            ]
        ),
        st.text(st.characters(codec="utf-8"), max_size=90) | st.text("&^~|\\x", min_size=60, max_size=300) | ODD,
    ),
    st.lists(st.text(st.characters(codec="utf-8"), max_size=250), min_size=3, max_size=3),
    st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=60),
    st.lists(ODD, min_size=3, max_size=3),
)
def test_whatever_the_images_say_of_the_patient_the_alert_may_leave(
    said: dict[str, str], issuer: list[str], box: str, texts: list[str]
) -> None:
    source = Dataset()
    source.StudyInstanceUID = "1.2.3"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for keyword, value in said.items():
            source.add(DataElement(tag_for_keyword(keyword), "LO", value, already_converted=True))
        item = Dataset()
        for keyword, value in zip(("LocalNamespaceEntityID", "UniversalEntityID", "UniversalEntityIDType"), issuer,
                                  strict=True):  # fmt: skip
            item.add(DataElement(tag_for_keyword(keyword), "LO", value, already_converted=True))
        source.IssuerOfAccessionNumberSequence = source.IssuerOfPatientIDQualifiersSequence = [item]
    notice, limitation, reason = texts
    verdict = renamed(POSITIVE, notice=notice, limitations=(limitation, "plain"))
    withdrawn = renamed(verdict, positive=False, withdrawn=reason)
    for text in (
        alert(verdict, source, sending_application=box),
        alert(withdrawn, source, kind="withdrawal", sending_application=box),
    ):
        assert fault(text) == ""
        assert len(text.encode("utf-8").split(b"\r")) == text.count("\r") + 1


@pytest.mark.parametrize(
    "odd",
    ["\r", "\n", "a\r\nb", "\x00", "\x0b\x1c", "x" * 70_000, "\n" * 70_000, "\ud800"],
    ids=["CR", "LF", "CRLF", "NUL", "VT FS", "long", "long and broken", "half a surrogate pair"],
)
def test_no_line_break_and_no_length_in_any_text_holds_an_alert_back(odd: str) -> None:
    source = Dataset()
    source.StudyInstanceUID = "1.2.3"
    for keyword in ("PatientID", "PatientName", "AccessionNumber", "AdmissionID"):
        source.add(DataElement(tag_for_keyword(keyword), "LO", "x" * 200 + odd, already_converted=True))
    source.add(DataElement(tag_for_keyword("RequestAttributesSequence"), "LO", odd, already_converted=True))
    text = alert(renamed(POSITIVE, notice=odd, limitations=(odd, f"Series 3 has a kernel ({odd}).")), source)
    assert fault(text) == ""
    assert text.encode("utf-8")
    names = ("sending_application", "sending_facility", "receiving_application", "receiving_facility")
    order = render_order_update(
        source,
        control_id="M1",
        priority="S",
        said=odd,
        issued_at=ISSUED,
        processing_id="P",
        **dict.fromkeys(names, "A"),
    )
    assert segments_fault(order) == ""


@pytest.mark.parametrize(("keyword", "segment", "number"), [("PatientID", "PID", 3), ("AccessionNumber", "OBR", 18)])
def test_a_backslash_in_an_identifier_arrives_as_one(tmp_path: Path, keyword: str, segment: str, number: int) -> None:
    series = ct_series(tmp_path, count=3)
    header = series.header()
    setattr(header, keyword, ["12", "34"])  # how pydicom reads 12, backslash, 34
    message = valid(alert(verdict_on(series), header))
    assert field(message.segment(segment), number).split("^")[0] == "12\\E\\34"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"AcquisitionDate": "00000000", "AcquisitionTime": "101112"}, "20260304041500"),
        ({"AcquisitionDate": "20260304", "AcquisitionTime": "996199"}, "20260304041500"),
        ({"AcquisitionDate": "20260304", "AcquisitionTime": ""}, "20260304041500"),
        ({"AcquisitionDateTime": "20260305031500.25"}, "20260305031500"),
        (
            {"AcquisitionDate": "20260304", "AcquisitionTime": "101112", "TimezoneOffsetFromUTC": "+9900"},
            "20260304101112",
        ),
    ],
)
def test_an_impossible_time_is_not_sent(tmp_path: Path, changes: dict[str, str], expected: str) -> None:
    series = ct_series(tmp_path, count=3)
    header = series.header()
    header.StudyDate, header.StudyTime, header.PatientBirthDate = "20260304", "041500", "00000000"
    for keyword, value in changes.items():
        setattr(header, keyword, value)
    message = valid(alert(verdict_on(series), header))
    assert field(message.segment("OBR"), 7) == expected
    assert field(message.segment("PID"), 7) == ""


def test_the_zone_of_the_message_is_that_of_the_times_that_name_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MSH-7's offset holds for all times of a message without one (HL7 v2.5.1, 2.9.3): the scanner's are local."""
    series = ct_series(tmp_path, count=3)
    header = series.header()
    header.AcquisitionDateTime = "20260715140000"
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        said = alert(verdict_on(series), header, issued_at=datetime(2026, 7, 15, 12, 5, tzinfo=UTC))
    finally:
        monkeypatch.undo()
        time.tzset()
    message = valid(said)
    assert field(message.segment("MSH"), 7) == "20260715140500.0000+0200"
    assert field(message.segment("OBR"), 22) == "20260715140500.0000+0200"
    assert field(message.segment("OBR"), 7) == "20260715140000"


def test_a_correction_replaces_and_a_withdrawal_takes_back(series: Series) -> None:
    correction = valid(alert(verdict_on(series), series.header(), kind="correction", revision=2))
    assert field(correction.segments("NTE")[0], 3).startswith("CORRECTION: revision 2")
    assert field(observation(correction, "59776-5"), 8) == "AA"
    negative = verdict_on(series, positive=False)
    withdrawal = valid(alert(negative, series.header(), kind="withdrawal", revision=3))
    assert field(withdrawal.segments("NTE")[0], 3).startswith("WITHDRAWAL: revision 3")
    impression = observation(withdrawal, "59776-5")
    assert field(impression, 5).startswith("The earlier alert is withdrawn. No haemorrhage found")
    assert field(impression, 8) == field(impression, 17) == ""
    assert not [s for s in withdrawal.segments("OBX") if field(s, 3).startswith("121071")]
    for message, kind, revision in ((correction, "correction", "2"), (withdrawal, "withdrawal", "3")):
        assert field(observation(message, "MESSAGE-KIND"), 5) == kind
        assert field(observation(message, "REVISION"), 5) == revision


@pytest.mark.parametrize("kind", ["alert", "correction", "withdrawal"])
def test_nothing_is_ever_final(kind: Kind, series: Series) -> None:
    verdict = verdict_on(series, positive=kind != "withdrawal")
    message = valid(alert(verdict, series.header(), kind=kind, revision=2))
    assert field(message.segment("OBR"), 25) == "P"
    assert {field(s, 11) for s in message.segments("OBX")} == {"P"}


@pytest.mark.parametrize(("positive", "kind"), [(False, "alert"), (False, "correction"), (True, "withdrawal")])
def test_a_kind_that_contradicts_the_verdict_is_refused(positive: bool, kind: Kind, series: Series) -> None:
    with pytest.raises(ValueError, match="contradicts"):
        alert(verdict_on(series, positive=positive), series.header(), kind=kind)


@pytest.mark.parametrize("control_id", ["", "x" * 21, "a b", "é"])
def test_a_control_id_that_hl7_does_not_allow_is_refused(control_id: str, series: Series) -> None:
    with pytest.raises(ValueError, match="control id"):
        alert(verdict_on(series), series.header(), control_id=control_id)


def test_control_ids_are_stable_and_distinct() -> None:
    ids = {message_control_id(*parts) for parts in (("a", "b"), ("ab", ""), ("a", "b", ""), ("b", "a"))}
    assert len(ids) == 4 and all(len(one) == 20 and one.isalnum() for one in ids)
    assert message_control_id("a", "b") == message_control_id("a", "b")


def test_the_same_verdict_gives_the_same_message(series: Series) -> None:
    verdict, source = verdict_on(series), series.header()
    elsewhere = ISSUED.astimezone(timezone(timedelta(hours=9)))
    assert alert(verdict, source) == alert(verdict, source, issued_at=elsewhere)


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=60))
def test_no_text_breaks_the_message_and_all_of_it_arrives(text: str) -> None:
    source = Dataset()
    source.PatientID = "1"
    verdict = renamed(POSITIVE, package=text, notice=text, limitations=(text,))
    message = hl7.parse(alert(verdict, source))
    assert [str(s[0]) for s in message] == [
        *["MSH", "PID", "PV1", "ORC", "OBR"], *["NTE"] * 3, "TQ1", *["OBX"] * 11
    ]  # fmt: skip
    plain = "".join(" " if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in text).strip()
    assert hl7.Message().unescape(field(observation(message, "111001"), 5)) == plain


def test_a_subtype_without_a_code_is_told_in_words_only(series: Series) -> None:
    message = valid(alert(renamed(verdict_on(series), subtypes={"microbleed": 0.9}), series.header()))
    assert "microbleed" in field(observation(message, "59776-5"), 5)
    assert field(observation(message, "121071"), 5) == "1386000^Intracranial hemorrhage^SCT"


def test_line_breaks_in_text_become_hl7_line_breaks(series: Series) -> None:
    verdict = renamed(verdict_on(series), limitations=("first\r\nsecond\nthird",))
    message = hl7.parse(alert(verdict, series.header()))  # hl7apy would escape the escape when it writes it again
    assert field(message.segments("NTE")[2], 3) == "Limitation: first\\.br\\second\\.br\\third"


POSITIVE = Verdict(
    study_instance_uid="1.2.3",
    series_instance_uid="1.2.4",
    package="p",
    package_version="1",
    notice="n",
    positive=True,
    probability=0.9,
    threshold=0.5,
    subtypes={"subdural": 0.9, "subarachnoid": 0.6},
    volume_ml=1.0,
    slabs=(),
    key_slabs=(),
    codecs=(),
    limitations=(),
)


def test_a_positive_answer_asks_to_be_read_at_once_and_no_other_says_a_priority(series: Series) -> None:
    message = valid(alert(verdict_on(series), series.header()))
    assert field(message.segment("TQ1"), 9) == "S^Stat^HL70485"
    text = alert(verdict_on(series, positive=False), series.header(), kind="withdrawal")
    assert valid(text).segments("OBX") != [] and "TQ1" not in text, "it never lowers a study"


@pytest.mark.parametrize("kind", ["alert", "confirmation", "correction", "provisional"])
def test_what_follows_an_alert_names_the_first_message(series: Series, kind: Kind) -> None:
    message = valid(alert(verdict_on(series), series.header(), kind=kind, first="FIRST123"))
    named = [field(one, 5) for one in message.segments("OBX") if str(one[3]).startswith("FIRST-MESSAGE")]
    assert named == (["FIRST123"] if kind in ("confirmation", "correction") else [])


def test_the_device_identifier_and_the_link_are_there_where_there_are_any(series: Series) -> None:
    udi = "(01)04012345678901(8012)1.0.0|^&"
    link = study_link("https://viewer/?s={study_uid}&a={accession}", series.header())
    message = valid(alert(replace(verdict_on(series), udi=udi), series.header(), link=link))
    assert field(observation(message, "128739"), 5) == "(01)04012345678901(8012)1.0.0\\F\\\\S\\\\T\\"
    pointer = observation(message, "STUDY-LINK")
    assert field(pointer, 2) == "RP"
    assert field(pointer, 5) == f"{link.replace('&', chr(92) + 'T' + chr(92))}^^TEXT^HTML"
    bare = valid(alert(verdict_on(series), series.header()))
    assert not {"128739", "STUDY-LINK", "FIRST-MESSAGE"} & {str(one[3]).split("^")[0] for one in bare.segments("OBX")}


def test_a_link_is_the_studys_own_or_none() -> None:
    source = Dataset()
    source.StudyInstanceUID, source.AccessionNumber = "1.2.3", "A/1 ?&"
    assert study_link("https://v/{study_uid}?a={accession}", source) == "https://v/1.2.3?a=A%2F1%20%3F%26"
    assert study_link("https://v/{patient_id}", source) == ""
    assert study_link("", source) == ""
