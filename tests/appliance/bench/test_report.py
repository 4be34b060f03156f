"""The figures of a run: medians of rounds, and ratios of what ran in the same round."""

from __future__ import annotations

from io import StringIO

from rich.console import Console

from appliance.bench.report import Round, Series, document, tables

MACHINE = {"cores": 2, "python": "3.11.7", "file_system": "ext4"}


def rounds(*speeds: float, cpu: float = 2.0) -> list[Round]:
    return [Round(images_per_s=one, cpu_s_per_1000=cpu, p50_ms=None, p99_ms=None) for one in speeds]


def test_a_ratio_is_the_median_of_the_ratios_within_each_round() -> None:
    # The machine was slow in the second round; the ratio of the medians would be 100 / 150.
    ours = Series("scanside", "dcmsend", 4, rounds(100.0, 30.0, 300.0, cpu=4.0))
    theirs = Series("storescp", "dcmsend", 4, rounds(200.0, 10.0, 150.0))
    told = document(6, 3, MACHINE, [ours, theirs], [], ours="scanside")
    assert told["ratios"] == {"storescp_4": 2.0}
    assert told["cpu_ratios"] == {"storescp_4": 2.0}
    assert told["sender_ratios"] == {"dcmsend": {"storescp_4": 2.0}}
    assert [one["images_per_s"] for one in told["results"]] == [100.0, 150.0]
    assert [one["images_per_s"] for one in told["results"][0]["rounds"]] == [100.0, 30.0, 300.0]


def test_a_ratio_needs_both_and_a_figure_above_zero() -> None:
    theirs = Series("storescp", "dcmsend", 4, rounds(200.0))
    assert document(6, 1, MACHINE, [theirs], [], ours="scanside")["ratios"] == {}
    ours = Series("scanside", "dcmsend", 1, rounds(200.0))
    assert document(6, 1, MACHINE, [ours, theirs], [], ours="scanside")["ratios"] == {}
    too_short = Series("storescp", "dcmsend", 1, rounds(100.0, cpu=0.0))
    told = document(6, 1, MACHINE, [ours, too_short], [], ours="scanside")
    assert (told["ratios"], told["cpu_ratios"]) == ({"storescp_1": 2.0}, {})


def test_percentiles_are_the_median_of_the_rounds_and_absent_where_unknown() -> None:
    known = Series("sink", "replay", 1, [Round(1.0, 1.0, p50, p50 * 10) for p50 in (3.0, 1.0, 2.0)])
    assert (known.document()["p50_ms"], known.document()["p99_ms"]) == (2.0, 20.0)
    assert Series("sink", "dcmsend", 1, rounds(1.0)).document()["p50_ms"] is None


def test_the_table_shows_every_result_and_what_was_left_out() -> None:
    series = [
        Series("scanside", "dcmsend", 4, rounds(100.0)),
        Series("storescp", "dcmsend", 4, rounds(200.0)),
        Series("sink", "replay", 4, [Round(900.0, 0.5, 1.25, 9.75)]),
    ]
    left_out = [{"name": "orthanc", "reason": "Orthanc is not installed"}]
    output = StringIO()
    console = Console(width=100, file=output)
    console.print(tables(document(6, 1, MACHINE, series, left_out, ours="scanside")))
    shown = output.getvalue()
    for words in ("scanside", "storescp", "0.50", "sink", "900", "1.2", "9.8", "left out: orthanc", "not installed"):
        assert words in shown
