"""The board: which version may run, as what and until when, and what becomes of what waits when it is stopped."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.events import Event
from appliance.governance.board import (
    MODES,
    Board,
    BoardError,
    Decision,
    approve,
    integrity,
    make_exception,
    read_board,
    retire,
    revoke,
    suspend,
    suspend_version,
)
from appliance.governance.package import Package, load_configured
from appliance.ledger.board import BoardMoved
from appliance.ledger.database import LedgerError, now
from appliance.ledger.records import Verdict
from appliance.ledger.store import Ledger, NewFinding, NewInstance, Told
from appliance.ledger.views import event_counts, study_report, verify_events
from appliance.settings import Settings
from tests.builders import header

TODAY = date.today()
LATER = TODAY + timedelta(days=100)
SIGNED: dict[str, Any] = {"who": "Dr A", "why": "because"}


def package(version: str = "1.0.0", *, mode: str = "clinical", clearance: str = "test clearance") -> Package:
    """The shipped package as if it were that version of another; its digest follows from the version."""
    digest = f"sha256:{hashlib.sha256(version.encode()).hexdigest()}"
    shipped = load_configured(Settings())[0]
    return replace(shipped, name="pkg", version=version, mode=mode, clearance=clearance, digest=digest)


ONE, TWO = package("1.0.0"), package("2.0.0")
EVALUATED = package("1.0.0", mode="evaluation")


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    one = Ledger(tmp_path / "ledger.sqlite")
    yield one
    one.close()


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    return tmp_path / "evidence"


def judged(ledger: Ledger, one: Package, day: date = TODAY) -> tuple[str, str, str]:
    """Outcome, value and mode."""
    criterion, mode = read_board(ledger).judge(one, day)
    assert (criterion.criterion, criterion.attribute) == ("approval", "board record")
    return criterion.outcome, criterion.value, mode


# --- what holds -----------------------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["approved", "suspended", "suspended version", "retired", "excepted", "revoked"]),
            st.sampled_from([ONE, TWO]),
            st.integers(-2, 2),
            st.sampled_from(MODES),
            st.booleans(),
        ),
        max_size=12,
    )
)
def test_a_version_runs_only_if_the_last_word_on_it_is_an_approval_in_force(
    said: list[tuple[str, Package, int, Any, bool]],
) -> None:
    decisions = [
        Decision(
            record, "", what.split()[0], "pkg" if ours else "other", "A", "b", one.version,
            "" if what == "suspended version" else one.digest,
            TODAY + timedelta(days=days) if what in ("approved", "excepted") else None, mode,
            criterion="age" if what == "excepted" else "", revokes=record - 1 if what == "revoked" else 0,
        )
        for record, (what, one, days, mode, ours) in enumerate(said, 1)
    ]  # fmt: skip
    board = Board(decisions, len(decisions))
    for wanted in (ONE, TWO):
        runs, runs_as = False, ""
        for one in reversed(decisions):
            if one.package != "pkg" or one.what in ("excepted", "revoked"):
                continue
            if one.what == "suspended" and (one.digest or one.version == wanted.version):
                break
            if one.digest == wanted.digest:
                if any((d.what, d.package, d.digest) == ("retired", "pkg", wanted.digest) for d in decisions):
                    break
                runs = one.what == "approved" and one.until is not None and one.until >= TODAY
                runs_as = one.mode
                break
        criterion, mode = board.judge(wanted, TODAY)
        assert criterion.met == runs
        assert not runs or mode == runs_as
        assert not board.distrust("a reason").judge(wanted, TODAY)[0].met


def test_a_clinical_package_needs_an_approval_of_its_very_version(ledger: Ledger, kept: Path) -> None:
    assert judged(ledger, ONE)[:2] == ("violated", "never approved")
    record = approve(ledger, kept, ONE, "clinical", until=LATER, **SIGNED).record
    assert judged(ledger, ONE) == ("met", f"approved by Dr A as clinical until {LATER} (record {record})", "clinical")
    assert judged(ledger, ONE, LATER)[0] == "met"
    outcome, value, _ = judged(ledger, ONE, LATER + timedelta(days=1))
    assert (outcome, "that is over" in value) == ("violated", True)
    assert judged(ledger, TWO)[:2] == ("violated", f"approved was 1.0.0 (record {record}), this is 2.0.0")
    changed = replace(ONE, digest="sha256:" + "0" * 64)
    outcome, value, _ = judged(ledger, changed)
    assert (outcome, "another package.toml" in value) == ("violated", True)
    # The next version is approved before it is there, and the one that runs goes on.
    approve(ledger, kept, TWO, "shadow", until=LATER, **SIGNED)
    assert [judged(ledger, one)[::2] for one in (ONE, TWO)] == [("met", "clinical"), ("met", "shadow")]
    suspend(ledger, kept, "pkg", ONE, who="Dr B", why="false alerts")
    for one in (ONE, TWO):
        outcome, value, _ = judged(ledger, one)
        assert (outcome, "suspended by Dr B: false alerts" in value) == ("violated", True)
    approve(ledger, kept, TWO, "clinical", until=LATER, **SIGNED)
    assert (judged(ledger, TWO)[0], judged(ledger, ONE)[0]) == ("met", "violated")


def test_what_is_only_evaluated_needs_no_approval_until_the_board_has_spoken_of_it(ledger: Ledger, kept: Path) -> None:
    assert judged(ledger, EVALUATED)[::2] == ("met", "evaluation")
    approve(ledger, kept, EVALUATED, "shadow", until=LATER, **SIGNED)
    assert judged(ledger, EVALUATED)[::2] == ("met", "shadow")
    # It would otherwise begin to send by itself.
    assert judged(ledger, EVALUATED, LATER + timedelta(days=1))[0] == "violated"
    assert judged(ledger, package("2.0.0", mode="evaluation"))[0] == "violated"
    suspend(ledger, kept, "pkg", None, **SIGNED)
    assert judged(ledger, EVALUATED)[0] == "violated"
    approve(ledger, kept, EVALUATED, "evaluation", until=LATER, **SIGNED)
    assert judged(ledger, EVALUATED)[::2] == ("met", "evaluation")


def test_broken_records_approve_nothing(ledger: Ledger, kept: Path) -> None:
    approve(ledger, kept, ONE, "clinical", until=LATER, **SIGNED)
    make_exception(ledger, kept, ONE, "age", until=LATER, **SIGNED)
    board = read_board(ledger)
    assert len(board.exceptions(ONE)) == 1
    distrusted = board.distrust("event 3 is gone")
    criterion, _ = distrusted.judge(ONE)
    assert (criterion.outcome, "event 3 is gone" in criterion.value) == ("unknown", True)
    assert distrusted.exceptions(ONE) == []
    # Nor what needs none: the record that is gone may have suspended it.
    assert board.judge(replace(EVALUATED, name="other"))[0].met
    assert distrusted.judge(replace(EVALUATED, name="other"))[0].outcome == "unknown"


def test_a_record_that_cannot_be_read_is_named_and_nothing_is_approved(
    ledger: Ledger, kept: Path, tmp_path: Path
) -> None:
    approve(ledger, kept, ONE, "clinical", until=LATER, **SIGNED)
    number = suspend(ledger, kept, "other", None, **SIGNED).record
    with sqlite3.connect(tmp_path / "ledger.sqlite") as raw:
        raw.execute("update event set detail = ? where id = ?", ('{"package": "pkg"}', number))
    outcome, value, _ = judged(ledger, ONE)
    assert (outcome, f"event {number} (board.suspended)" in value) == ("unknown", True)


def test_only_what_is_cleared_is_clinical(ledger: Ledger, kept: Path) -> None:
    for one, says in (
        (EVALUATED, "its maker made it for evaluation only"),
        (package(clearance="None: research reference"), "not cleared"),
    ):
        with pytest.raises(BoardError, match=says):
            approve(ledger, kept, one, "clinical", until=LATER, **SIGNED)
        assert read_board(ledger).decisions == ()
        approve(ledger, kept, one, "shadow", until=LATER, **SIGNED)
        # A record that was made by other means does not help.
        forged = Decision(1, "", "approved", "pkg", "A", "b", one.version, one.digest, LATER, "clinical")
        criterion, mode = Board([forged], 1).judge(one)
        assert (criterion.outcome, says in criterion.value, mode) == ("violated", True, "evaluation")
        retire(ledger, kept, one, **SIGNED)
        ledger = Ledger(kept.parent / "another.sqlite")


def test_what_was_retired_does_not_come_back(ledger: Ledger, kept: Path) -> None:
    approve(ledger, kept, ONE, "clinical", until=LATER, **SIGNED)
    retire(ledger, kept, ONE, who="Dr C", why="replaced")
    assert "retired by Dr C: replaced" in judged(ledger, ONE)[1]
    with pytest.raises(BoardError, match=r"1\.0\.0 was retired by Dr C"):
        approve(ledger, kept, ONE, "clinical", until=LATER, **SIGNED)
    approve(ledger, kept, TWO, "clinical", until=LATER, **SIGNED)
    assert judged(ledger, TWO)[0] == "met"
    # Not even if two members decide at the same moment.
    decisions = read_board(ledger).decisions
    late = Board([*decisions, replace(decisions[0], record=99)], 99)
    assert late.judge(ONE)[0].outcome == "violated"


def test_a_clock_that_was_set_back_revives_nothing(ledger: Ledger, kept: Path) -> None:
    """The clock of a box whose battery is empty starts in 1970."""
    approve(ledger, kept, ONE, "clinical", until=TODAY, **SIGNED)
    excepted = make_exception(ledger, kept, ONE, "age", until=TODAY, **SIGNED).record
    board = read_board(ledger)
    past = [replace(one, at="2020-06-01T12:00:00+00:00", until=date(2020, 6, 30)) for one in board.decisions]
    newest = replace(past[0], record=99, package="other", at=now())
    over = Board([*past, newest], 99)
    for today in (date(1970, 1, 1), date(2020, 6, 15)):
        assert not over.judge(ONE, today)[0].met
        assert over.exceptions(ONE, today) == []
        assert not over.holds(excepted, today)
        assert Board(past, 2).judge(ONE, today)[0].met
        assert board.judge(ONE, today)[0].met
    assert not Board(past, 2).judge(ONE, date(2020, 7, 1))[0].met
    assert Board(past, 2).exceptions(ONE, date(2020, 7, 1)) == []


# --- records --------------------------------------------------------------------------------------------


def test_a_version_that_is_recalled_stays_so_where_it_comes_back_and_others_run_on(ledger: Ledger, kept: Path) -> None:
    approve(ledger, kept, ONE, "clinical", until=LATER, **SIGNED)
    approve(ledger, kept, TWO, "clinical", until=LATER, **SIGNED)
    record = suspend_version(ledger, kept, "pkg", ONE.version, **SIGNED)
    assert record.said == "suspended in this version"
    outcome, said, _ = judged(ledger, ONE)
    assert outcome == "violated"
    assert said == f"this version was suspended by Dr A: because (record {record.record})"
    assert judged(ledger, TWO)[0] == "met"
    assert judged(ledger, replace(ONE, digest="sha256:another build"))[0] == "violated"
    assert suspend_version(ledger, kept, "pkg", ONE.version, who="Dr B", why="again") == record
    assert read_board(ledger).holds(record.record, TODAY)
    approve(ledger, kept, ONE, "clinical", until=LATER, **SIGNED)  # the board has looked at it again
    assert judged(ledger, ONE)[0] == "met"
    assert not read_board(ledger).holds(record.record, TODAY)
    assert suspend_version(ledger, kept, "pkg", ONE.version, **SIGNED).record > record.record
    with pytest.raises(BoardError, match="--who is empty"):
        suspend_version(ledger, kept, "pkg", "3.0.0", who=" ", why="because")
    with pytest.raises(BoardError, match="--version is empty"):
        suspend_version(ledger, kept, "pkg", "", **SIGNED)
    assert judged(ledger, TWO)[0] == "met"


def test_the_recall_of_another_version_stops_nothing_that_is_only_evaluated(ledger: Ledger, kept: Path) -> None:
    suspend_version(ledger, kept, "pkg", "0.9.0", **SIGNED)
    assert judged(ledger, EVALUATED) == ("met", "none is needed: it is only evaluated", "evaluation")
    suspend_version(ledger, kept, "pkg", EVALUATED.version, **SIGNED)
    assert judged(ledger, EVALUATED)[0] == "violated"


def test_what_waits_of_a_recalled_version_is_withdrawn_and_of_no_other(ledger: Ledger, kept: Path) -> None:
    issued(ledger)
    suspend_version(ledger, kept, "pkg", TWO.version, **SIGNED)
    assert set(deliveries(ledger).values()) == {"pending"}
    suspend_version(ledger, kept, "pkg", ONE.version, **SIGNED)
    assert set(deliveries(ledger).values()) == {"withdrawn"}
    (one, *_) = study_report(ledger, 1)["deliveries"]
    ledger.requeue_delivery(one["id"], ["er"])
    assert ledger.take_delivery("er") is None, "it is stopped still"
    approve(ledger, kept, ONE, "clinical", until=LATER, **SIGNED)
    ledger.requeue_delivery(one["id"], ["er"])
    assert ledger.take_delivery("er") is not None


def test_evidence_is_kept_under_its_digest(ledger: Ledger, kept: Path, tmp_path: Path) -> None:
    (tmp_path / "minutes.pdf").write_bytes(b"we agree")
    decision = approve(ledger, kept, ONE, "shadow", until=LATER, evidence=tmp_path / "minutes.pdf", **SIGNED)
    digest = hashlib.sha256(b"we agree").hexdigest()
    assert (decision.evidence, decision.evidence_digest) == ("minutes.pdf", f"sha256:{digest}")
    assert [path.name for path in kept.iterdir()] == [digest]
    assert (kept / digest).read_bytes() == b"we agree"
    assert read_board(ledger).decisions == (decision,)
    assert (kept / digest).stat().st_mode & 0o777 == 0o444
    # What another try left behind does not stop the next.
    left = kept / f".{digest}.part"
    left.write_bytes(b"we")
    left.chmod(0o444)
    assert approve(ledger, kept, ONE, "shadow", until=LATER, evidence=tmp_path / "minutes.pdf", **SIGNED).record
    assert (kept / digest).read_bytes() == b"we agree"
    assert not left.exists()
    assert decision.row() == {
        "record": decision.record, "at": decision.at, "what": "approved", "package": "pkg", "version": "1.0.0",
        "digest": ONE.digest, "who": "Dr A", "why": "because", "evidence": "minutes.pdf",
        "evidence_digest": f"sha256:{digest}", "mode": "shadow", "until": LATER.isoformat(),
    }  # fmt: skip


def test_nobody_decides_anonymously_or_for_the_past(ledger: Ledger, kept: Path) -> None:
    for changed in ({"who": " "}, {"why": ""}):
        with pytest.raises(BoardError, match="is empty"):
            suspend(ledger, kept, "pkg", ONE, **(SIGNED | changed))
    with pytest.raises(BoardError, match="is over"):
        approve(ledger, kept, ONE, "shadow", until=TODAY - timedelta(days=1), **SIGNED)
    with pytest.raises(BoardError, match="no criterion 'approval'"):
        make_exception(ledger, kept, ONE, "approval", until=LATER, **SIGNED)
    assert ledger.decisions() == []
    approve(ledger, kept, ONE, "shadow", until=TODAY, **SIGNED)
    assert judged(ledger, ONE)[0] == "met"


def test_an_exception_is_for_one_version_and_can_be_revoked(ledger: Ledger, kept: Path) -> None:
    made = make_exception(ledger, kept, ONE, "age", until=LATER, **SIGNED)
    (found,) = read_board(ledger).exceptions(ONE)
    assert (found.package, found.criterion, found.signed_by, found.until) == ("pkg", "age", "Dr A", LATER)
    assert f"record {made.record}" in found.reason
    assert read_board(ledger).exceptions(TWO) == []
    with pytest.raises(BoardError, match="no exception that holds"):
        revoke(ledger, kept, made.record + 1, **SIGNED)
    revoke(ledger, kept, made.record, **SIGNED)
    assert read_board(ledger).exceptions(ONE) == []
    with pytest.raises(BoardError, match="no exception that holds"):
        revoke(ledger, kept, made.record, **SIGNED)
    assert verify_events(ledger) is None


def test_what_holds_is_told(ledger: Ledger, kept: Path) -> None:
    first = approve(ledger, kept, ONE, "shadow", until=LATER, **SIGNED).record
    excepted = make_exception(ledger, kept, ONE, "age", until=TODAY, **SIGNED).record
    stop = suspend(ledger, kept, "pkg", ONE, **SIGNED).record
    board = read_board(ledger)
    assert [board.holds(one, TODAY) for one in (first, excepted, stop)] == [False, True, True]
    assert not board.holds(excepted, LATER)
    approve(ledger, kept, ONE, "shadow", until=LATER, **SIGNED)
    assert not read_board(ledger).holds(stop, TODAY)


def test_integrity_names_what_differs() -> None:
    assert integrity(ONE, "").met
    broken = integrity(ONE, "/p/model.onnx: its digest is another")
    assert (broken.criterion, broken.outcome) == ("integrity", "violated")
    assert "/p/model.onnx" in str(broken)
    assert not integrity(None, "/p/package.sig: it is not there").met
    assert not integrity(None, "").met, "what could not be loaded is not sound"


# --- what waits to be sent ------------------------------------------------------------------------------


def issued(
    ledger: Ledger, positive: bool = True, revision: int = 1, study: str = "1.2.3", version: str = "1.0.0"
) -> int:
    """A verdict of "pkg" with an alert and a report that wait to be sent; returns its analysis."""
    if revision == 1:
        association = ledger.open_association("S", "B", "127.0.0.1")
        one = header(1, study=study, series=f"{study}.1")
        ledger.record_instances([NewInstance(one, f"{study}-1", 10, association)])
    (arriving,) = ledger.arriving_studies() or [None]
    if arriving:
        ledger.complete_study(arriving.id, arriving.last_instance_at, {"by": "test", "confidence": "high"})
    key = arriving.id if arriving else 1
    ledger.decide(key, "pkg", version, admitted=True, reason="", admission=[], selection=[], inputs=[])
    row = ledger.take_analysis(["pkg"])
    assert row is not None
    verdict = Verdict(study, f"{study}.1", "pkg", version, "n", positive, 0.9, 0.5, {}, 0.0, (), (), (), ())
    findings = [
        NewFinding("alert.er", f"MSG{study}.{revision}", "a.hl7", ("er",), 0),
        NewFinding("report", f"2.25.{study}.{revision}", "r.dcm", ("pacs",), 10),
    ]
    ledger.issue_verdict(row["id"], revision, verdict, now(), findings, admission=[], late=False)
    return int(row["id"])


def deliveries(ledger: Ledger) -> dict[str, str]:
    return {one["uid"][:3] + one["uid"][-1]: one["state"] for one in study_report(ledger, 1)["deliveries"]}


@pytest.mark.parametrize("what", ["suspend", "retire"])
def test_what_waits_of_a_stopped_package_is_withdrawn_with_the_decision(ledger: Ledger, kept: Path, what: str) -> None:
    issued(ledger)
    suspend(ledger, kept, "other", None, **SIGNED)
    assert set(deliveries(ledger).values()) == {"pending"}
    if what == "suspend":
        record = suspend(ledger, kept, "pkg", ONE, **SIGNED).record
    else:
        record = retire(ledger, kept, ONE, **SIGNED).record
    assert set(deliveries(ledger).values()) == {"withdrawn"}
    assert ledger.take_delivery("er") is None
    one = study_report(ledger, 1)["deliveries"][0]
    assert f"by Dr A (record {record})" in one["reason"]
    assert event_counts(ledger)["delivery.withdrawn"] == 2
    assert ledger.told(1) == {}
    with pytest.raises(LedgerError, match="no such delivery"):
        ledger.requeue_delivery(99, ["er"])
    ledger.requeue_delivery(one["id"], ["er"])
    assert ledger.take_delivery("er") is None, "it is stopped still"
    approve(ledger, kept, TWO, "clinical", until=LATER, **SIGNED)
    ledger.requeue_delivery(one["id"], ["er"])
    assert ledger.take_delivery("er") is None, "so is its version"
    if what == "suspend":
        approve(ledger, kept, ONE, "clinical", until=LATER, **SIGNED)
        ledger.requeue_delivery(one["id"], ["er"])
        assert ledger.take_delivery("er") is not None
    assert verify_events(ledger) is None


def test_what_another_version_says_outlives_a_retirement_and_no_suspension(ledger: Ledger, kept: Path) -> None:
    """The next version was approved before it was installed, and the last one is retired."""
    approve(ledger, kept, TWO, "clinical", until=LATER, **SIGNED)
    issued(ledger, version="2.0.0")
    retire(ledger, kept, ONE, **SIGNED)
    assert set(deliveries(ledger).values()) == {"pending"}
    row = ledger.take_delivery("er")
    assert row is not None
    ledger.settle_delivery(row, "retry")
    suspend(ledger, kept, "pkg", ONE, **SIGNED)
    assert set(deliveries(ledger).values()) == {"withdrawn"}


def test_what_waits_is_withdrawn_when_its_version_goes_into_shadow(ledger: Ledger, kept: Path) -> None:
    approve(ledger, kept, ONE, "clinical", until=LATER, **SIGNED)
    issued(ledger)
    row = ledger.take_delivery("er")
    assert row is not None
    approve(ledger, kept, TWO, "shadow", until=LATER, **SIGNED)
    assert set(deliveries(ledger).values()) == {"sending", "pending"}
    record = approve(ledger, kept, ONE, "shadow", until=LATER, **SIGNED).record
    assert set(deliveries(ledger).values()) == {"sending", "withdrawn"}
    ledger.settle_delivery(row, "retry")
    assert ledger.take_delivery("er") is None
    (said,) = {one["reason"] for one in study_report(ledger, 1)["deliveries"]}
    assert said == f"the package was put in shadow by Dr A (record {record})"


def test_a_retired_version_that_is_approved_at_the_same_moment_sends_nothing(ledger: Ledger, kept: Path) -> None:
    issued(ledger)
    retire(ledger, kept, ONE, **SIGNED)
    detail = {"version": "1.0.0", "digest": ONE.digest, "mode": "clinical", "until": LATER.isoformat()}
    ledger.record_decision(Event.BOARD_APPROVED, "pkg", **detail, **SIGNED, evidence="", evidence_digest="")
    ledger.requeue_delivery(study_report(ledger, 1)["deliveries"][0]["id"], ["er"])
    assert ledger.take_delivery("er") is None
    assert judged(ledger, ONE)[0] == "violated"


def test_what_another_package_has_to_say_goes_on(ledger: Ledger, kept: Path) -> None:
    issued(ledger)
    suspend(ledger, kept, "other", None, **SIGNED)
    assert ledger.take_delivery("er") is not None
    assert ledger.take_delivery("pacs") is not None


def test_what_was_on_its_way_goes_no_second_time(ledger: Ledger, kept: Path) -> None:
    analysis = issued(ledger)
    row = ledger.take_delivery("er")
    assert row is not None
    suspend(ledger, kept, "pkg", ONE, **SIGNED)
    assert deliveries(ledger)["MSG1"] == "sending"
    ledger.settle_delivery(row, "retry")
    assert ledger.take_delivery("er") is None
    assert deliveries(ledger)["MSG1"] == "withdrawn"
    # It may have arrived: a later answer has to take it into account.
    assert ledger.told(analysis) == {"er": [Told(True, certain=False)]}


def test_that_an_alert_does_not_hold_is_told_all_the_same(ledger: Ledger, kept: Path) -> None:
    issued(ledger)
    row = ledger.take_delivery("er")
    assert row is not None
    ledger.settle_delivery(row, "acknowledge")
    association = ledger.open_association("S", "B", "127.0.0.1")
    ledger.record_instances([NewInstance(header(2), "1.2.3-2", 10, association)])
    issued(ledger, positive=False, revision=2)
    suspend(ledger, kept, "pkg", ONE, **SIGNED)
    assert deliveries(ledger) == {"MSG1": "acknowledged", "MSG2": "pending", "2.21": "withdrawn", "2.22": "withdrawn"}
    assert ledger.take_delivery("er") is not None
    assert ledger.take_delivery("pacs") is None


def test_a_verdict_rests_on_the_newest_decision(ledger: Ledger, kept: Path) -> None:
    before = approve(ledger, kept, ONE, "clinical", until=LATER, **SIGNED).record
    assert ledger.last_decision() == before
    association = ledger.open_association("S", "B", "127.0.0.1")
    ledger.record_instances([NewInstance(header(1), "1", 10, association)])
    (arriving,) = ledger.arriving_studies()
    ledger.complete_study(arriving.id, arriving.last_instance_at, {"by": "test", "confidence": "high"})
    ledger.decide(1, "pkg", "1", admitted=True, reason="", admission=[], selection=[], inputs=[])
    row = ledger.take_analysis(["pkg"])
    assert row is not None
    verdict = Verdict("1.2.3", "1.2.3.1", "pkg", "1", "n", True, 0.9, 0.5, {}, 0.0, (), (), (), ())
    finding = NewFinding("alert.er", "MSG", "a.hl7", ("er",), 0)
    moved = suspend(ledger, kept, "pkg", ONE, **SIGNED).record
    with pytest.raises(BoardMoved):
        ledger.issue_verdict(row["id"], 1, verdict, now(), [finding], admission=[], late=False, board=before)
    assert study_report(ledger, 1)["verdicts"] == study_report(ledger, 1)["deliveries"] == []
    # That one is gone since is no decision: the auditor says so, and nothing is tried for ever.
    ledger.issue_verdict(row["id"], 1, verdict, now(), [finding], admission=[], late=False, board=moved + 1)
    assert len(study_report(ledger, 1)["verdicts"]) == 1
