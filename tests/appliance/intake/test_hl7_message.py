"""What is read of HL7 messages, and that nothing that a peer sends is more than a fault."""

from __future__ import annotations

import hl7
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.findings.validate import fault
from appliance.intake.hl7_answer import answers, too_long
from appliance.intake.hl7_message import KINDS, Message, Rules, read_message
from appliance.ledger.orders import Identifier, Merge, NewOrder, NewReport, Update
from tests.hl7_support import a08, a40, msh, omi, orm, oru, pid

RULES = Rules()
EXAMPLES = [orm(), omi(), a08(born="19610101"), a40(survivor="P2^^^HOSP", prior="P1^^^HOSP"), oru()]


def read(text: str, **rules: object) -> Message:
    return read_message(text.encode("utf-8"), Rules(**rules))  # type: ignore[arg-type]


def order(text: str, **rules: object) -> NewOrder:
    message = read(text, **rules)
    assert message.faults == ()
    (change,) = message.changes
    assert isinstance(change, NewOrder)
    return change


# Orders


def test_an_order_as_orm() -> None:
    found = order(orm(priority="S"))
    assert found == NewOrder(
        accession="A1", study_instance_uid="", placer="PL-A1", cancelled=False,
        patient=(Identifier("P1", "HOSP"),), birth_date="19610101", priority="S", urgent=True,
        reason="fell from a ladder",
    )  # fmt: skip


def test_an_order_as_omi() -> None:
    found = order(omi(priority="S", uid="1.2.3"))
    assert (found.accession, found.study_instance_uid, found.placer) == ("A1", "1.2.3", "PL-A1")
    assert (found.priority, found.urgent, found.birth_date) == ("S", True, "")


@pytest.mark.parametrize(
    ("orc", "obr", "urgent"),
    [
        ("ORC|NW|P|F", "OBR|1|P|A1|CT|||||||||||||||||||||||S", False),
        ("ORC|NW|P|F||||^^^^^S", "OBR|1|P|A1|CT", True),
        ("ORC|NW|P|F", "OBR|1|P|A1|CT|STAT", True),
        ("ORC|NW|P|F\rTQ1|1||||||||stat", "OBR|1|P|A1|CT", True),
        ("ORC|NW|P|F\rTQ1|1||||||||A", "OBR|1|P|A1|CT", False),
        ("ORC|NW|P|F", "OBR|1|P|A1|CT", False),
    ],
)
def test_the_priority_wherever_it_stands(orc: str, obr: str, urgent: bool) -> None:
    assert order(f"{msh('ORM^O01')}{pid()}{orc}\r{obr}\r").urgent is urgent


def test_a_site_says_what_is_urgent() -> None:
    assert order(orm(priority="1"), urgent_priorities=("1", "2")).urgent
    assert not order(orm(priority="S"), urgent_priorities=("1", "2")).urgent


@pytest.mark.parametrize(
    ("segments", "accession"),
    [
        ("ORC|NW|P|F3\rOBR|1|P|O3|CT||||||||||||||O18\rIPC|I1", "I1"),
        ("ORC|NW|P|F3\rOBR|1|P|O3|CT||||||||||||||O18", "O18"),
        ("ORC|NW|P|F3\rOBR|1|P|O3^RIS|CT", "O3"),
        ("ORC|NW|P|F3\rOBR|1|P||CT", "F3"),
        ("ORC|NW|P|F3", "F3"),
    ],
)
def test_the_accession_number_wherever_it_stands(segments: str, accession: str) -> None:
    assert order(f"{msh('ORM^O01')}{pid()}{segments}\r").accession == accession


def test_several_orders_in_one_message_are_each_one() -> None:
    groups = "".join(f"ORC|NW|P{n}|A{n}\rOBR|{n}|P{n}|A{n}|CT|{'S' if n == 2 else 'R'}\r" for n in range(1, 4))
    message = read(f"{msh('ORM^O01')}{pid()}{groups}")
    assert [(one.accession, one.urgent) for one in message.changes if isinstance(one, NewOrder)] == [
        ("A1", False), ("A2", True), ("A3", False),
    ]  # fmt: skip


@pytest.mark.parametrize("control", ["CA", "DC", "OC"])
def test_what_is_cancelled_is_said_to_be(control: str) -> None:
    assert order(orm(control=control)).cancelled
    assert not order(orm(control="XO")).cancelled


def test_escapes_character_sets_and_line_ends_are_read() -> None:
    assert order(orm(extra="DG1|1||S06^a \\T\\ b\r")).reason == "fell from a ladder; a & b"
    latin = orm(extra="DG1|1||S06^Blutung möglich\r").replace("UNICODE UTF-8", "8859/1").encode("latin-1")
    undeclared = latin.replace(b"8859/1", b"")
    for block in (latin, undeclared, latin.replace(b"\r", b"\r\n"), latin.replace(b"\r", b"\n")):
        message = read_message(block, RULES)
        assert isinstance(message.changes[0], NewOrder)
        assert message.changes[0].reason == "fell from a ladder; Blutung möglich"
        assert message.digest == read_message(latin, RULES).digest


def test_the_separators_are_the_messages_own() -> None:
    found = order(orm(priority="S").translate(str.maketrans("|^~&", "#$!%")))
    assert (found.accession, found.urgent, found.patient) == ("A1", True, (Identifier("P1", "HOSP"),))


def test_each_identifier_has_its_authority_or_that_of_the_site() -> None:
    found = order(orm(patient="P1^^^HOSP&1.2.3&ISO~99^^^&1.9&ISO~7"), authority="HERE")
    assert found.patient == (Identifier("P1", "HOSP", "1.2.3"), Identifier("99", "", "1.9"), Identifier("7", "HERE"))


@pytest.mark.parametrize(
    ("born", "day"), [("19610101", "19610101"), ("196101010830", "19610101"), ("1961", ""), ("196101", ""), ("", "")]
)
def test_a_birth_date_is_a_day_or_nothing(born: str, day: str) -> None:
    assert order(orm(born=born)).birth_date == day


@pytest.mark.parametrize(
    ("obx", "said", "earliest", "latest"),
    [
        ("TS|11368-8^^LN||20260601073000+0200", "20260601073000+0200", "05:30:00", "05:30:01"),
        ("TS|11368-8^^LN||202606010730", "202606010730", "05:30:00", "05:31:00"),  # MSH-7 has the zone
        ("NM|11368-8^^LN||2.5|h", "2.5 h", "06:00:00", "06:00:01"),
        ("NM|11368-8^^LN||30|min^minute^UCUM||||||||20260601100000+0200", "30 min", "07:30:00", "07:30:01"),
        ("TX|11368-8^^LN||this morning", "this morning", "", ""),
        ("NM|11368-8^^LN||2.5|furlongs", "2.5 furlongs", "", ""),
        ("NM|9999-9^^LN||2.5|h", "", "", ""),
    ],
)
def test_when_it_began(obx: str, said: str, earliest: str, latest: str) -> None:
    found = order(orm(extra=f"OBX|1|{obx}\r"))
    assert found.onset == said
    assert found.onset_earliest == (f"2026-06-01T{earliest}+00:00" if earliest else "")
    assert found.onset_latest == (f"2026-06-01T{latest}+00:00" if latest else "")


def test_a_day_is_all_of_it_and_a_time_without_zone_is_none() -> None:
    found = order(orm(extra="OBX|1|DT|11368-8^^LN||20260531\r"))
    assert (found.onset_earliest, found.onset_latest) == ("2026-05-30T22:00:00+00:00", "2026-05-31T22:00:00+00:00")
    nowhere = orm(extra="OBX|1|TS|11368-8^^LN||202605310800\r").replace("+0200", "")
    assert (order(nowhere).onset, order(nowhere).onset_earliest) == ("202605310800", "")


# Patients and reports


def test_a_patients_data_and_a_merge() -> None:
    assert read(a08(born="19700203")).changes == (Update((Identifier("P1", "HOSP"),), "19700203"),)
    prior, survivor = Identifier("P1", "HOSP"), Identifier("P2", "HOSP")
    assert read(a40(survivor="P2^^^HOSP", prior="P1^^^HOSP")).changes == (Merge(prior, survivor),)
    both = a40(survivor="P2^^^HOSP~E2^^^STATE", prior="E1^^^STATE~P1^^^HOSP")
    assert set(read(both).changes) == {
        Merge(prior, survivor), Merge(Identifier("E1", "STATE"), Identifier("E2", "STATE")),
    }  # fmt: skip


def test_a_report_with_its_lines() -> None:
    (found,) = read(oru(text="Findings:\\.br\\none ~Impression: \\T\\ so")).changes
    assert found == NewReport(
        "A1", "", (Identifier("P1", "HOSP"),), "F", "20260601110000+0200", "Findings:\nnone \nImpression: & so"
    )


def test_an_alert_of_ours_that_comes_back_is_no_radiologists_report() -> None:
    from appliance.bench.alerts import alert

    message = read(alert(1)[2], processing_ids=("T",))
    assert (message.ours, message.changes, message.code) == (True, (), "AA")


# Faults


@pytest.mark.parametrize(
    ("text", "code", "faults"),
    [
        pytest.param("", "AE", ["MSH-0 100"], id="nothing"),
        pytest.param("GET / HTTP/1.1\r\n\r\n", "AE", ["MSH-0 100"], id="another protocol"),
        pytest.param("PID|1||P1\r", "AE", ["MSH-0 100"], id="no header"),
        pytest.param("FHS|^~\\&|RIS\rBHS|^~\\&\r", "AE", ["MSH-0 100"], id="a batch"),
        pytest.param("MSH|^^^^|A\r", "AE", ["MSH-2 102"], id="separators"),
        pytest.param(orm(""), "AE", ["MSH-10 101"], id="no control id"),
        pytest.param(orm("x" * 200), "AE", ["MSH-10 102"], id="a long control id"),
        pytest.param(msh("BAR^P01"), "AR", ["MSH-9 200"], id="another type"),
        pytest.param(msh(""), "AR", ["MSH-9 200"], id="no type"),
        pytest.param(msh("ADT^A01"), "AR", ["MSH-9 201"], id="another event"),
        pytest.param(orm(processing="T"), "AR", ["MSH-11 202"], id="a test message"),
        pytest.param(orm(version="3.0"), "AR", ["MSH-12 203"], id="another version"),
        pytest.param(orm().replace("UNICODE UTF-8", "GB 18030-2000"), "AE", ["MSH-18 103"], id="character set"),
        pytest.param(msh("ORM^O01"), "AE", ["PID-0 100"], id="no patient"),
        pytest.param(orm(patient=""), "AE", ["PID-3 101"], id="no identifier"),
        pytest.param(orm(patient="P" * 65), "AE", ["PID-3 102", "PID-3 101"], id="a long one"),
        pytest.param(orm(born="19611332"), "AE", ["PID-7 102"], id="no such day"),
        pytest.param(msh("ORM^O01") + pid(), "AE", ["ORC-0 100"], id="no order"),
        pytest.param(orm(control="ZZ"), "AE", ["ORC-1 103"], id="order control"),
        pytest.param(orm(control=""), "AE", ["ORC-1 101"], id="no order control"),
        pytest.param(f"{msh('ORM^O01')}{pid()}ORC|NW|P\rOBR|1|P\r", "AE", ["OBR-18 101"], id="no accession number"),
        pytest.param(msh("ADT^A40") + pid(), "AE", ["MRG-0 100"], id="no merge"),
        pytest.param(a40(survivor="1^^^A", prior="2^^^B"), "AE", ["MRG-1 204"], id="authorities"),
        pytest.param(a40(survivor="1^^^A", prior=""), "AE", ["MRG-1 101"], id="nobody merged"),
    ],
)
def test_what_cannot_be_used_says_where_and_why(text: str, code: str, faults: list[str]) -> None:
    message = read(text)
    assert (message.code, message.changes) == (code, ())
    assert [f"{one.segment}-{one.field} {one.code}" for one in message.faults] == faults
    assert all(one.text for one in message.faults)
    assert message.reason


def test_of_a_message_with_one_fault_nothing_is_used() -> None:
    groups = "ORC|NW|P1|A1\rOBR|1|P1|A1|CT|S\rORC|NW|P2\rOBR|2|P2\r"
    message = read(f"{msh('ORM^O01')}{pid()}{groups}")
    assert (message.code, message.changes) == ("AE", ())
    assert [(one.segment, one.number) for one in message.faults] == [("OBR", 2)]


def test_bytes_that_are_not_in_the_declared_character_set_are_a_fault() -> None:
    message = read_message(orm().encode("latin-1"), RULES)
    assert [(one.segment, one.field, one.code) for one in message.faults] == [("MSH", 18, "102")]


# Whatever comes

VALID = {"AA", "AE", "AR", "CA", "CE", "CR"}


def check(block: bytes) -> None:
    message = read_message(block, RULES)
    assert not (message.faults and message.changes)
    for answer in answers(message, "BOX"):
        lines = answer.split("\r")
        assert lines[0].startswith("MSH|^~\\&|") and lines[-1] == ""
        assert lines[1].split("|")[1] in VALID
        assert not {"\x0b", "\x1c", "\n"} & set(answer)
        assert len(lines) - 3 in (0, len(message.faults), 1)


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=300).map(lambda data: data.translate(None, b"\x0b\x1c")))
def test_any_bytes_are_read_and_can_be_answered(data: bytes) -> None:
    check(data)
    check(b"MSH|^~\\&|" + data)


@settings(deadline=None, max_examples=300)
@given(
    st.sampled_from(EXAMPLES),
    st.lists(
        st.tuples(
            st.integers(0, 500), st.integers(0, 40), st.sampled_from(["|", "^", "~", "&", "\\", "\r", "é", "\0"])
        ),
        max_size=6,
    ),
)
def test_any_damaged_message_is_read_and_can_be_answered(text: str, damages: list[tuple[int, int, str]]) -> None:
    for place, length, new in damages:
        text = text[:place] + new * (length % 4) + text[place + length :]
    check(text.encode("utf-8", "surrogatepass"))


# Answers


@pytest.mark.parametrize("version", ["2.3", "2.3.1", "2.4", "2.5", "2.5.1", "2.6"])
@pytest.mark.parametrize("text", ["good", "bad"])
def test_an_answer_is_hl7_of_the_senders_version(version: str, text: str) -> None:
    message = read(orm(version=version) if text == "good" else orm(control="ZZ", version=version))
    (answer,) = answers(message, "BOX")
    if version >= "2.4":  # hl7apy does not know an ACK that is older
        assert fault(answer) == ""
    assert str(hl7.parse(answer)) == answer
    fields = answer.split("\r")[0].split("|")
    assert (fields[2:6], fields[11]) == (["SCANSIDE", "BOX", "RIS", "HOSP"], version)
    assert answer.split("\r")[1].split("|")[:3] == ["MSA", "AA" if text == "good" else "AE", "M1"]
    assert ("\rERR|" in answer) is (text == "bad")


def test_an_error_segment_says_where_what_and_in_words() -> None:
    (answer,) = answers(read(orm(control="Z|Z")), "BOX")
    assert "\rMSA|AE|M1|Z is no order control code\r" in answer
    assert "\rERR||ORC^1^1|103^Table value not found^HL70357|E||||Z is no order control code\r" in answer
    (older,) = answers(read(orm(control="ZZ", version="2.3")), "BOX")
    assert "\rERR|ORC^1^1^103&Table value not found&HL70357\r" in older


@pytest.mark.parametrize(
    ("modes", "good", "unusable", "unacceptable"),
    [
        ("|||", ["AA"], ["AE"], ["AR"]),
        ("||AL|NE", ["CA"], ["CE"], ["CR"]),
        ("||AL|AL", ["CA", "AA"], ["CA", "AE"], ["CR"]),
        ("||NE|AL", ["AA"], ["AE"], ["AR"]),
        ("||NE|NE", [], [], []),
        ("||AL|ER", ["CA"], ["CA", "AE"], ["CR"]),
        ("||ER|ER", [], ["AE"], ["CR"]),
        ("||SU|SU", ["CA", "AA"], [], []),
        ("||AL|", ["CA"], ["CE"], ["CR"]),
    ],
)
def test_both_modes_answer_as_they_are_asked_to(
    modes: str, good: list[str], unusable: list[str], unacceptable: list[str]
) -> None:
    for text, expected in (
        (orm(modes=modes), good),
        (orm(control="ZZ", modes=modes), unusable),
        (orm(processing="T", modes=modes), unacceptable),
    ):
        said = answers(read(text), "BOX")
        assert [one.split("\r")[1].split("|")[1] for one in said] == expected
        assert len({one.split("|")[9] for one in said}) == len(said)
        assert all(fault(one) == "" for one in said)


def test_what_was_not_kept_is_never_answered_as_if_it_were() -> None:
    for modes, expected in (("|||", ["AE"]), ("||AL|AL", ["CE"]), ("||AL|NE", ["CE"]), ("||NE|AL", ["AE"])):
        said = answers(read(orm(modes=modes)), "BOX", unkept="the disk is full")
        assert [one.split("\r")[1].split("|")[1] for one in said] == expected
        assert "207^Application internal error" in said[0]


def test_an_acknowledgement_is_never_answered() -> None:
    message = read(f"{msh('ACK^R01^ACK')}MSA|AA|X1\r")
    assert (message.is_answer, answers(message, "BOX")) == (True, [])


def test_the_answer_to_what_is_too_long_is_hl7() -> None:
    answer = too_long(1000, "BOX")
    assert "MSA|AR|" in answer and "longer than 1000 bytes" in answer


def test_every_kind_is_read() -> None:
    assert {read(text).kind for text in EXAMPLES} == set(KINDS)
