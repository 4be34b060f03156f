"""The figures of `scanside bench latency`: stages, percentiles, and ratios to the mode that waits."""

from __future__ import annotations

from io import StringIO
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from appliance.bench.latency import SCENARIOS, STAGES, Measured, document, plan, said, spread, table
from appliance.cli import app
from dicom_io.errors import ScansideError

BARE = {"inference_s": 0.5, "transfer_scanside_s": 2.0, "transfer_sink_s": 0.25}


def took(seconds: float, whole: float = 10.0, answer: dict[str, Any] | None = None) -> Measured:
    """A study whose alert was acknowledged after so long, and its other stages in even steps before."""
    stages = {stage: seconds * (place + 1) / len(STAGES) for place, stage in enumerate(STAGES)}
    return Measured(stages, whole, answer or {"probability": 0.9})


def test_every_scenario_has_its_percentiles_and_stages() -> None:
    told = document({"thick_28_paced": [took(0.4, 1.0), took(0.2, 3.0), took(0.3, 2.0)]}, {}, [])
    one = told["scenarios"]["thick_28_paced"]
    assert one["last_instance_to_ack_s"] == {"p50": 0.3, "p95": 0.4, "p99": 0.4, "n": 3}
    assert one["first_instance_to_ack_s"]["p50"] == 2.0
    assert {stage: spread["p50"] for stage, spread in one["stages_s"].items()} == {
        "complete": 0.075, "inferred": 0.15, "alert_sent": 0.225, "alert_acknowledged": 0.3,
    }  # fmt: skip
    assert (one["wait_then_infer"], one["verdicts_that_differ"]) == ({}, 0)
    assert (told["bare"], told["ratios"]) == ({}, {})


def test_a_ratio_is_the_median_over_what_the_waiting_mode_took() -> None:
    streamed = {
        "thick_28_paced": [took(0.5), took(0.1), took(0.3)],
        "thin_300_fast": [took(0.6, 5.0), took(0.6, 9.0), took(0.6, 6.0)],
    }
    waited = {5.0: {"thick_28_paced": took(6.0), "thin_300_fast": took(12.0)}}
    quick, slow = {**BARE, "transfer_scanside_s": 1.0}, {**BARE, "transfer_scanside_s": 9.0, "inference_s": 0.6}
    told = document(streamed, waited, [BARE, quick, slow])
    assert told["scenarios"]["thick_28_paced"]["wait_then_infer"] == {"5_s": {"last_instance_to_ack_s": 6.0}}
    assert told["bare"] == BARE
    assert told["ratios"] == {
        "thick_28_paced_over_waiting_5_s": 0.05,
        "thin_300_fast_over_waiting_5_s": 0.05,
        "thin_300_fast_over_bare": 2.5,  # of 5 / 2, 9 / 1 and 6 / 9: the transfer takes longer than the inference
        "thin_300_fast_over_sink": 10.0,  # of 5 / 0.5, 9 / 0.5 and 6 / 0.6: here the inference does
    }


def test_a_verdict_that_differs_in_more_than_its_uids_is_counted() -> None:
    first = {"study_instance_uid": "1.2", "slabs": [{"sop_instance_uid": "1.3", "probabilities": {"any": 0.9}}]}
    other = {"study_instance_uid": "9.2", "slabs": [{"sop_instance_uid": "9.3", "probabilities": {"any": 0.9}}]}
    wrong = {"study_instance_uid": "1.2", "slabs": [{"sop_instance_uid": "1.3", "probabilities": {"any": 0.8}}]}
    assert said(first) == said(other) == {"slabs": [{"probabilities": {"any": 0.9}}]}
    waited = {
        quiet: {"mixed_paced": took(9.0, answer=one)} for quiet, one in ((5.0, other), (30.0, first), (60.0, wrong))
    }
    told = document({"mixed_paced": [took(0.1, answer=first)]}, waited, [])
    assert told["scenarios"]["mixed_paced"]["verdicts_that_differ"] == 1


@given(st.lists(st.integers(0, 10**6).map(lambda value: value / 1000), min_size=1, max_size=300))
def test_a_percentile_is_a_measured_value_that_so_many_do_not_exceed(values: list[float]) -> None:
    told = spread(values)
    assert told["n"] == len(values)
    for share in (50, 95, 99):
        found = told[f"p{share}"]
        assert found in values
        # The largest one that is not above it leaves less than the rest above.
        assert 100 * sum(value > found for value in values) <= (100 - share) * len(values)


def test_the_table_has_a_row_for_each_scenario_and_a_column_for_each_waiting_time() -> None:
    waited = {5.0: {"thick_28_paced": took(5.9)}, 60.0: {"thick_28_paced": took(61.25)}}
    output = StringIO()
    Console(width=160, file=output).print(table(document({"thick_28_paced": [took(0.432)]}, waited, [])))
    for words in ("thick_28_paced", "0.432", "waiting 5 s", "5.9", "waiting 60 s", "61.2"):
        assert words in output.getvalue()


def test_names_and_times_are_checked() -> None:
    assert list(plan([])) == list(SCENARIOS)
    assert list(plan(["thin_300_fast", "thick_28_fast"])) == ["thick_28_fast", "thin_300_fast"]
    with pytest.raises(ScansideError, match="no such scenario"):
        plan(["thick_29_fast"])
    assert CliRunner().invoke(app, ["bench", "latency", "--waiting", "5,soon"]).exit_code == 2
    assert CliRunner().invoke(app, ["bench", "latency", "--scenarios", "thick"]).exit_code == 1
