"""The benchmark of alerts counts what arrives, and what its listener does wrong loses, doubles and reorders nothing."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from appliance.bench.alerts import count
from appliance.cli import app


@pytest.mark.parametrize(
    ("arrived", "lost", "doubled", "reordered", "copies"),
    [
        ("abc", 0, 0, 0, 0),
        ("aabbbc", 0, 0, 0, 3),
        ("ac", 1, 0, 0, 0),
        ("acb", 0, 0, 1, 0),
        ("abac", 0, 0, 0, 1),
        ("cba", 0, 0, 2, 0),
        ("", 3, 0, 0, 0),
    ],
)
def test_what_arrives_is_counted(arrived: str, lost: int, doubled: int, reordered: int, copies: int) -> None:
    told = count("abc", [(one, f"study {one}") for one in arrived])
    assert told == {"sent": 3, "lost": lost, "doubled": doubled, "reordered": reordered, "copies": copies}


def test_an_alert_under_two_control_ids_is_doubled() -> None:
    assert count("ab", [("a", "one"), ("b", "one")])["doubled"] == 1


@pytest.mark.slow
def test_a_listener_that_fails_at_random_gets_each_alert_once_and_in_order() -> None:
    done = CliRunner().invoke(
        app, ["bench", "alerts", "--alerts", "30", "--rounds", "1", "--faults", "--chance", "0.5", "--json"]
    )
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    faults = told["faults"]
    assert (faults["sent"], faults["lost"], faults["doubled"], faults["reordered"]) == (30, 0, 0, 0)
    assert len(faults["what"]) > 3
    assert faults["copies"] > 0
    assert told["outbox"]["alerts_per_s"] > 0 and told["ratio"] > 0
