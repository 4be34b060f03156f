"""What a verdict tells the hospital, over the life of a study."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from appliance.services import alert_kind


@given(st.lists(st.booleans(), min_size=1, max_size=8))
def test_the_hospital_always_knows_the_newest_answer_and_is_told_only_changes(answers: list[bool]) -> None:
    known = False
    told = []
    for number, positive in enumerate(answers):
        kind = alert_kind(answers[:number], positive)
        if positive == known:
            assert kind is None
        elif positive:
            assert kind == ("correction" if told else "alert")
        else:
            assert kind == "withdrawal"
        if kind:
            told.append(kind)
        known = positive
    assert told.count("alert") <= 1
    assert (told[:1] == ["alert"]) == any(answers)
