"""The tables of states allow what the design allows, and nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.ledger.states import ANALYSIS, COMMITMENT, DELIVERY, PERFORMED, STUDY, StateError, step

TABLES = {
    "study": STUDY,
    "analysis": ANALYSIS,
    "delivery": DELIVERY,
    "commitment": COMMITMENT,
    "performed": PERFORMED,
}


@pytest.mark.parametrize("name", TABLES)
@given(data=st.data())
def test_only_what_the_table_says(name: str, data: st.DataObject) -> None:
    table = TABLES[name]
    states = sorted({state for state, _ in table} | set(table.values()))
    events = sorted({event for _, event in table})
    state, event = data.draw(st.sampled_from(states)), data.draw(st.sampled_from(events))
    if (state, event) in table:
        assert step(table, state, event) == table[state, event]
    else:
        with pytest.raises(StateError):
            step(table, state, event)


@pytest.mark.parametrize("name", TABLES)
def test_every_state_can_be_reached(name: str) -> None:
    table = TABLES[name]
    reached, before = {""}, set[str]()
    while reached != before:
        before = set(reached)
        reached |= {after for (state, _), after in table.items() if state in reached}
    assert reached == {state for state, _ in table} | set(table.values())


@pytest.mark.parametrize(
    ("table", "state", "event"),
    [
        (DELIVERY, "acknowledged", "take"),
        (DELIVERY, "acknowledged", "requeue"),
        (DELIVERY, "sending", "take"),
        (ANALYSIS, "refused", "start"),
        (ANALYSIS, "", "start"),
        (ANALYSIS, "issued", "issue"),
        (STUDY, "complete", "complete"),
        (PERFORMED, "discontinued", "complete"),
    ],
)
def test_what_would_harm_a_patient_is_impossible(table: dict[tuple[str, str], str], state: str, event: str) -> None:
    with pytest.raises(StateError):
        step(table, state, event)
