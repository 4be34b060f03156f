"""What has arrived of a study is what the ledger holds, however it came to hold it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.ledger import schema as t
from appliance.ledger.database import later
from appliance.ledger.store import Ledger, NewInstance
from appliance.study.arrival import Arrivals
from appliance.study.grouping import group
from appliance.study.selection import select
from tests.builders import header

parts = st.lists(
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 2), st.integers(0, 1)), min_size=1, max_size=6), max_size=6
)
"""Parts of (instance number, series, which of two contents)."""


@pytest.mark.slow
@settings(deadline=None, max_examples=25)
@given(parts)
def test_a_look_shows_what_is_current(
    tmp_path_factory: pytest.TempPathFactory, came: list[list[tuple[int, int, int]]]
) -> None:
    folder = tmp_path_factory.mktemp("ledger")
    ledger = Ledger(folder / "ledger.sqlite")
    association = ledger.open_association("CT1", "SCANSIDE", "10.0.0.1")
    watched = Arrivals(ledger)
    for part in came:
        ledger.record_instances(
            [
                NewInstance(
                    replace(header(number, series=f"1.2.3.{series}"), series_description=f"content {content}"),
                    f"{number}-{series}-{content}",
                    100,
                    association,
                )
                for number, series, content in part
            ]
        )
        arrival = watched.look(1)
        assert sorted(arrival.instances.values(), key=lambda one: one.digest) == sorted(
            ledger.instances(1), key=lambda one: one.digest
        )
        assert arrival.series == group(one.header for one in ledger.instances(1))
        assert arrival.selection == select(arrival.series)
    ledger.close()


def test_a_study_that_comes_again_after_retention_is_seen_whole(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    association = ledger.open_association("CT1", "SCANSIDE", "10.0.0.1")
    new = [NewInstance(header(number), f"digest {number}", 100, association) for number in range(1, 8)]
    ledger.record_instances(new)
    watched = Arrivals(ledger)
    assert len(watched.look(1).instances) == 7
    with ledger._write() as connection:
        connection.execute(t.instance.update().values(removed_at=later(0)))
    assert watched.look(1).instances == {}
    ledger.record_instances(new[:3])
    assert len(watched.look(1).instances) == 3
    ledger.record_instances(new[3:])
    assert len(watched.look(1).series[0].headers) == 7
    ledger.close()


def test_what_was_forgotten_is_read_again(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    association = ledger.open_association("CT1", "SCANSIDE", "10.0.0.1")
    ledger.record_instances([NewInstance(header(1), "digest", 100, association)])
    watched = Arrivals(ledger)
    watched.look(1)
    watched.forget(1)
    assert len(watched.look(1).instances) == 1
    ledger.close()
