"""Work items as strangers send them, and what they become."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataset import Dataset

from dicom_io.workitem import (
    MAXIMUM_BYTES,
    MAXIMUM_DEPTH,
    TRANSITIONS,
    WorkitemError,
    from_dataset,
    is_uid,
    lacks_for_end,
    normal,
    read_json,
    text,
    to_dataset,
)
from tests.workitems import abandoned, performed, workitem

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(("00741000", "0040A370", "00100010", "vr", "Value", "InlineBinary", "zz")), inner
        )
    ),
    max_leaves=12,
)


def nested(depth: int) -> dict[str, Any]:
    inner: dict[str, Any] = {"00080050": {"vr": "SH", "Value": ["A"]}}
    for _ in range(depth - 1):
        inner = {"0040A370": {"vr": "SQ", "Value": [inner]}}
    return inner


@given(JSON)
def test_any_json_is_a_data_set_or_an_error(found: Any) -> None:
    try:
        step = read_json(json.dumps(found).encode())
    except WorkitemError as error:
        assert error.status in (0x0115, 0x0213)
    else:
        to_dataset(step)


@given(st.binary(max_size=60))
def test_any_bytes_are_an_error(data: bytes) -> None:
    with pytest.raises(WorkitemError):
        read_json(b"\x01" + data)


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b"[{},{}]", b"{" * 100_000, b"[" * 100_000, b'{"1":{}}', b'{"00741000":{"vr":"CS","Value":7}}',
     json.dumps(nested(MAXIMUM_DEPTH + 1)).encode(), b'{"a":"' + b"x" * MAXIMUM_BYTES + b'"}',
     b'{"0040A370":{"vr":"SQ","Value":[7]}}', b'{"0040A370":{"vr":"SQ","Value":7}}',
     b'{"00280010":{"vr":"US","Value":[70000000]}}', b'{"00741000":{"vr":"XX","Value":["A"]}}'],
)  # fmt: skip
def test_hostile_bodies(data: bytes) -> None:
    with pytest.raises(WorkitemError):
        read_json(data)


def test_it_is_the_same_after_json_and_a_data_set() -> None:
    step = normal(workitem())
    assert read_json(json.dumps(nested(MAXIMUM_DEPTH)).encode()) == nested(MAXIMUM_DEPTH)
    dataset = to_dataset(step)
    assert dataset.PatientName == "Müller^Eva"
    assert from_dataset(dataset) == step
    assert read_json(json.dumps([step]).encode()) == step
    other = Dataset()
    other.SpecificCharacterSet = "ISO_IR 100"
    other.PatientName = "Müller"
    assert text(from_dataset(other), "PatientName") == "Müller"


@pytest.mark.parametrize(("uid", "fits"), [("1.2", True), ("1", False), ("1.02", False), ("1." * 33 + "1", False),
                                           ("1..2", False), ("", False), (None, False), ("2.25.0", True)])  # fmt: skip
def test_uids(uid: object, fits: bool) -> None:
    assert is_uid(uid) == fits


def test_every_state_has_an_answer_to_every_event() -> None:
    states, events = {state for state, _ in TRANSITIONS}, {event for _, event in TRANSITIONS}
    assert len(TRANSITIONS) == len(states) * len(events) == 5 * 11


def test_what_an_end_requires() -> None:
    assert lacks_for_end({}, "COMPLETED") == "UnifiedProcedureStepPerformedProcedureSequence"
    assert lacks_for_end({}, "CANCELED") == "ProcedureStepProgressInformationSequence"
    assert lacks_for_end(performed(), "COMPLETED") == lacks_for_end(abandoned(), "CANCELED") == ""
    done = performed()
    del done["00741216"]["Value"][0]["00404051"]
    assert lacks_for_end(done, "COMPLETED").endswith("PerformedProcedureStepEndDateTime")
