"""What a site's template can write, and what it cannot."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.findings.mapping import MappingError, broken_rule, check_template, escaped, mapped, with_field

STANDARD = (
    "MSH|^~\\&|BOX|B|RIS|H|20260102||ORU^R01^ORU_R01|ID1|T|2.5.1|||AL|NE||UNICODE UTF-8\r"
    "PID|1||P1^^^HOSP||Doe^Jane\rPV1|1|U\rORC|RE||A1\rOBR|1||A1|24725-4^CT Head^LN|||||||||||||||||||||P\r"
    "NTE|1|L|Triage only, unverified.\rNTE|2|L|Evaluation only.\rTQ1|1||||||||S^Stat^HL70485\r"
    "OBX|1|ST|113014^DICOM Study^DCM||1.2.3||||||P\rOBX|2|TX|59776-5^F^LN||Found|||AA|||P\r"
    "OBX|3|ST|MESSAGE-KIND^Kind^99SCANSIDE||alert||||||P\r"
)
COPY = (
    "{{ MSH }}\n{{ PID }}\n{{ PV1 }}\n{{ ORC }}\n{{ OBR }}\n"
    "{% for n in NTE %}\n{{ n }}\n{% endfor %}\n{{ TQ1 }}\n{% for o in OBX %}\n{{ o }}\n{% endfor %}\n"
)


def write(template: str, **facts: object) -> str:
    return mapped(template, STANDARD, facts)


def test_the_standard_message_can_be_written_as_it_is() -> None:
    assert write(COPY) == STANDARD


def test_segments_are_changed_left_out_added_and_numbered_anew() -> None:
    template = COPY.replace("{{ TQ1 }}", "").replace("{{ OBR }}", "{{ OBR | field(4, 'CT', who) }}")
    template = template.replace("{% for o in OBX %}", "OBX||ST|X^Y^L||{{ who }}||||||P\n{% for o in OBX %}")
    text = write(template, who="a|b^c\r\nOBX|9|ST")
    assert "|CT^a\\F\\b\\S\\c\\.br\\OBX\\F\\9\\F\\ST|" in text
    assert "\rOBX|1|ST|X^Y^L||a\\F\\b\\S\\c\\.br\\OBX\\F\\9\\F\\ST||||||P\rOBX|2|ST|113014" in text
    assert "TQ1" not in text and text.count("\rOBX|") == 4
    assert "\rOBX|1|ST|S||1.2.3||||||P" in write(COPY + "OBX||ST|S||{{ OBX[0].value }}||||||P").replace("|4|", "|1|")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("{{ MSH }}", "{{ MSH | field(11, 'P') }}"), "MSH-11"),
        (("{{ MSH }}", "{{ MSH | field(10, 'OTHER') }}"), "MSH-10"),
        (("{{ MSH }}", "{{ MSH | field(9, 'ORU', 'R30') }}"), "MSH-9"),
        (("{{ MSH }}", "{{ MSH | field(15, 'NE') }}"), "MSH-15"),
        (("{{ MSH }}", "{{ MSH | field(18, 'ASCII') }}"), "MSH-18"),
        (("{{ MSH }}", ""), "MSH"),
        (("{{ PID }}", "{{ MSH }}"), "MSH"),
        (("{{ PID }}", "{{ PID | field(3, 'P2') }}"), "PID-3"),
        (("{{ PID }}", ""), "PID-3"),
        (("{{ OBR }}", "{{ OBR | field(25, 'F') }}"), "OBR-25 is F"),
        (("{{ OBR }}", ""), "OBR"),
        (("{{ o }}", "{{ o | field(11, 'F') }}"), "OBX-11 is F"),
        (("{{ o }}", "{{ o | field(11, '') }}"), "OBX-11 is empty"),
        (("in NTE", "in NTE[1:]"), "Triage only"),
        (("in NTE", "in NTE[:1]"), "Evaluation only"),
        (("{{ n }}", "{{ n | field(3, 'Reviewed.') }}"), "a note is missing"),
        (("in OBX", "in OBX[1:]"), "113014"),
        (("in OBX", "in OBX[:2]"), "MESSAGE-KIND"),
        (("{{ o }}", "{{ o | field(5, 'x') }}"), "says something else"),
        (("{{ o }}", "{{ o | field(8, '') }}"), "OBX-8"),
        (("{{ TQ1 }}", "{{ 1 / 0 }}"), "ZeroDivisionError"),
        (("{{ TQ1 }}", "{{ nobody }}"), "nobody"),
        (("{{ TQ1 }}", "{% if %}"), "line"),
        (("{{ TQ1 }}", "{{ 'x' * 300000 }}"), "characters"),
        (("{{ TQ1 }}", "{{ OBR.__class__.__mro__ }}"), "unsafe"),
        (("{{ TQ1 }}", "{{ OBR | field(0, 'x') }}"), "field 0"),
        (("{{ TQ1 }}", "{{ MSH | field(2, 'x') }}"), "field 2"),
        (("{{ TQ1 }}", "ZZZ|\x0b"), "control character"),
        (("{{ TQ1 }}", "{% include 'x' %}"), "stumbles"),
    ],
)
def test_no_template_says_what_it_may_not_or_leaves_out_what_it_must(change: tuple[str, str], words: str) -> None:
    assert change[0] in COPY
    with pytest.raises(MappingError, match=words):
        write(COPY.replace(*change))


def test_a_message_that_takes_an_alert_back_flags_nothing() -> None:
    quiet = STANDARD.replace("||AA|", "|||").replace("||alert|", "||withdrawal|")
    assert broken_rule(quiet, quiet) == ""
    assert "OBX-8" in broken_rule(quiet.replace("Found|||", "Found|||AA"), quiet)
    assert "MESSAGE-KIND" in broken_rule(quiet.replace("withdrawal", "alert"), quiet)


def test_a_template_that_cannot_be_read_names_its_line() -> None:
    check_template(COPY)
    with pytest.raises(MappingError, match="line 2"):
        check_template("MSH\n{% for %}")


@given(st.text(max_size=40))
def test_no_value_leaves_its_component(text: str) -> None:
    assert not set(escaped(text).replace("\\.br\\", "")) & set("|^~&\r\n")
    segment = with_field("OBX|1|ST|C||old||||||P", 5, text, "second")
    assert segment.split("|")[6:] == ["", "", "", "", "", "P"]
    assert len(segment.split("|")[5].split("^")) == 2
    written = write(COPY + "OBX||ST|S||{{ text }}||||||P", text=text)
    assert [line.split("|")[11] for line in written.split("\r") if line.startswith("OBX")] == ["P"] * 4
