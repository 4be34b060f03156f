"""Which studies' files may go: never one with anything to do, the oldest first, and what is left of one that went."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.ledger import schema as t
from appliance.ledger.database import LedgerError, later
from appliance.ledger.retention import Rules
from appliance.ledger.store import Ledger
from appliance.ledger.views import event_counts, verify_events

HOUR = 3600.0
RULES = Rules(packages=("pkg", "other"), attempts=3, keep_seconds=72 * HOUR)
PACKAGES = ("pkg", "other", "gone")
"""The last of them is not configured."""
AFTER_30_DAYS = replace(RULES, troubled_seconds=30 * 24 * HOUR)


@dataclass(frozen=True)
class Sent:
    """A finding of one revision, and its delivery to one place."""

    made: bool = True
    attempts: int = 0
    delivery: str | None = "acknowledged"


@dataclass(frozen=True)
class Analysed:
    """What one package did; ``revisions`` holds the findings of each verdict, by their object."""

    package: str
    state: str = "issued"
    of_last_completion: bool = True
    revisions: tuple[dict[str, Sent], ...] = ({},)


@dataclass(frozen=True)
class Told:
    """A study as a row of the ledger would tell it."""

    age_hours: float = 100.0
    state: str = "complete"
    instances: int = 2
    analyses: tuple[Analysed, ...] = field(default=(Analysed("pkg"), Analysed("other", "refused")))
    commitment: str | None = None
    released: bool = False
    removed: bool = False

    def undone(self) -> bool:
        """Is there anything that the box will or should do by itself?"""
        asked = {one.package for one in self.analyses if one.of_last_completion}
        return (
            self.state != "complete"
            or not {"pkg", "other"} <= asked
            or any(one.state == "running" for one in self.analyses)
            or any(one.state == "admitted" and one.package != "gone" for one in self.analyses)
            or any(not sent.made and sent.attempts < 3 for sent in self._sent())
            or any(sent.delivery in ("pending", "sending") for sent in self._sent())
            or self.commitment in ("requested", "reporting")
        )

    def troubled(self) -> bool:
        """Has anything gone wrong that nobody may know of?"""
        if any(one.state == "failed" or (one.state == "admitted" and one.package == "gone") for one in self.analyses):
            return True
        if any(not sent.made for sent in self._sent()):
            return True
        for one in self.analyses:
            for name in ("report", "alert.er"):
                # The last revision that went to a place answers for those before it.
                last = [revision[name].delivery for revision in one.revisions if name in revision]
                last = [state for state in last if state is not None]
                if last and last[-1] in ("dead", "rejected"):
                    return True
        return False

    def may_go(self) -> bool:
        return not self.removed and self.age_hours > 72 and not self.undone() and (self.released or not self.troubled())

    def _sent(self) -> Iterator[Sent]:
        for one in self.analyses:
            for revision in one.revisions:
                yield from revision.values()


def write(ledger: Ledger, studies: list[Told]) -> None:
    """Make the ledger hold exactly these studies, numbered from 1."""
    engine = sa.create_engine(f"sqlite:///{ledger._engine.url.database}")
    numbers = itertools.count(1)
    with engine.begin() as c:
        for table in reversed(t.metadata.sorted_tables):
            c.execute(table.delete())
        c.execute(t.association.insert().values(id=1, calling_ae="S", called_ae="B", address="a", opened_at=later(0)))
        for key, one in enumerate(studies, 1):
            at = later(-one.age_hours * HOUR)
            gone = later(-HOUR) if one.removed else None
            c.execute(
                t.study.insert().values(
                    id=key, study_instance_uid=f"1.{key}", state=one.state, completions=2, first_instance_at=at,
                    last_instance_at=at, completed_at=None if one.state == "receiving" else at, removed_at=gone,
                    released_at=later(0) if one.released else None,
                )
            )  # fmt: skip
            for number in range(one.instances):
                c.execute(
                    t.instance.insert().values(
                        study_id=key, association_id=1, series_instance_uid="1", sop_instance_uid=f"1.{key}.{number}",
                        digest=f"{key}-{number}", size=10, header={"a": 1}, is_current=number % 2 == 0,
                        received_at=at, removed_at=gone,
                    )
                )  # fmt: skip
            if one.commitment is not None:
                c.execute(
                    t.commitment.insert().values(
                        transaction_uid=f"9.{key}", calling_ae="S", called_ae="B", address="a", state=one.commitment,
                        request=[["1.2", "7.7"], ["1.2", f"1.{key}.0"]], requested_at=at, due_at=at,
                    )
                )  # fmt: skip
            for analysed in one.analyses:
                _write_analysis(c, numbers, key, analysed, at, gone)
    engine.dispose()


def _write_analysis(
    c: sa.Connection, numbers: Iterator[int], study: int, one: Analysed, at: str, gone: str | None
) -> None:
    analysis = next(numbers)
    c.execute(
        t.analysis.insert().values(
            id=analysis, study_id=study, package=one.package, package_version="1", state=one.state,
            completion=2 if one.of_last_completion else 1, due_at=at, admission=[], selection=[], inputs=[],
        )
    )  # fmt: skip
    for revision, sent in enumerate(one.revisions, 1):
        verdict = next(numbers)
        c.execute(
            t.verdict.insert().values(
                id=verdict, analysis_id=analysis, revision=revision, positive=True, probability=0.9, result={},
                inputs=[], issued_at=at,
            )
        )  # fmt: skip
        for name, made in sent.items():
            finding = next(numbers)
            c.execute(
                t.finding.insert().values(
                    id=finding, verdict_id=verdict, object=name, uid=f"2.{finding}", attempts=made.attempts,
                    path=f"{study}/{finding}.dcm" if made.made else None, removed_at=gone,
                )
            )  # fmt: skip
            if made.delivery is not None:
                c.execute(
                    t.delivery.insert().values(
                        finding_id=finding, destination="er", urgency=0, state=made.delivery, due_at=at
                    )
                )


def rows(ledger: Ledger, study: int) -> str:
    """Everything that the ledger holds of a study but its events, as text."""
    i, f, a = t.instance.c, t.finding.c, t.analysis.c
    of_study = sa.select(f.id).select_from(t.finding.join(t.verdict).join(t.analysis)).where(a.study_id == study)
    queries = (
        sa.select(t.study).where(t.study.c.id == study),
        sa.select(t.instance).where(i.study_id == study),
        sa.select(t.analysis).where(a.study_id == study),
        sa.select(t.finding).where(f.id.in_(of_study)),
        sa.select(t.delivery).where(t.delivery.c.finding_id.in_(of_study)),
    )
    with ledger.read() as connection:
        return json.dumps([[dict(row) for row in connection.execute(query).mappings()] for query in queries])


sent = st.builds(
    Sent,
    made=st.sampled_from([True, True, True, False]),
    attempts=st.integers(0, 4),
    delivery=st.sampled_from([None, "acknowledged", "acknowledged", "pending", "sending", "rejected", "dead"]),
)
findings = st.dictionaries(st.sampled_from(["report", "alert.er"]), sent, max_size=2)
revisions = st.lists(findings, max_size=2).map(tuple)
STATES = ["admitted", "running", "refused", "issued", "failed"]
PLAIN = {"report": Sent(), "alert.er": Sent()}


def one_of_them(change: Analysed) -> tuple[Analysed, ...]:
    """The analyses of a finished study, but for one."""
    others = [one for one in (Analysed("pkg", revisions=(PLAIN,)), Analysed("other")) if one.package != change.package]
    return (change, *others)


# In whole seconds: the ledger's times have microseconds, and the studies of a test are written one after the other.
old = st.integers(73 * 3600, 5000 * 3600).map(lambda seconds: seconds / 3600)

# Each as what is different from a finished study: states that are random all through are hardly ever finished.
changes = st.one_of(
    st.fixed_dictionaries({"age_hours": st.sampled_from([0.5, 71.9, 72.1]) | old}),
    st.fixed_dictionaries({"state": st.sampled_from(["receiving", "reopened"])}),
    st.fixed_dictionaries({"commitment": st.sampled_from(["requested", "reporting", "acknowledged", "dead"])}),
    st.fixed_dictionaries({"released": st.just(True)}),
    st.fixed_dictionaries({"removed": st.just(True)}),
    st.fixed_dictionaries({"instances": st.integers(1, 3)}),
    st.fixed_dictionaries({"analyses": st.sampled_from([(), (Analysed("pkg"),), (Analysed("other", "refused"),)])}),
    *(
        st.fixed_dictionaries({"analyses": st.builds(Analysed, st.sampled_from(PACKAGES), **one).map(one_of_them)})
        for one in (
            {"state": st.sampled_from(STATES)},
            {"of_last_completion": st.just(False)},
            {"revisions": revisions},
            {"revisions": st.tuples(findings, findings)},
        )
    ),
)


@st.composite
def told(draw: st.DrawFn) -> Told:
    one = Told(age_hours=draw(old), analyses=one_of_them(Analysed("other", "refused")))
    for change in draw(st.lists(changes, max_size=2)):
        one = replace(one, **change)
    return one


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ledger]:
    one = Ledger(tmp_path_factory.mktemp("ledger") / "ledger.sqlite")
    yield one
    one.close()


@given(studies=st.lists(told(), min_size=1, max_size=6))
@settings(max_examples=200, deadline=None)
@pytest.mark.slow
def test_in_any_state_of_the_ledger_only_what_is_finished_may_go(ledger: Ledger, studies: list[Told]) -> None:
    write(ledger, studies)
    kept = ledger.kept_studies(RULES)
    assert {one.study_id for one in kept} == {key for key, one in enumerate(studies, 1) if not one.removed}
    may_go = [one.study_id for one in kept if not one.holds]
    assert set(may_go) == {key for key, one in enumerate(studies, 1) if one.may_go()}
    ages = [studies[key - 1].age_hours for key in may_go]
    assert ages == sorted(ages, reverse=True)
    for key, one in enumerate(studies, 1):
        before = rows(ledger, key)
        others = [rows(ledger, other) for other in range(1, len(studies) + 1) if other != key]
        removal = ledger.remove_study(key, RULES)
        assert (removal is not None) == one.may_go()
        if removal is None:
            assert rows(ledger, key) == before
        assert [rows(ledger, other) for other in range(1, len(studies) + 1) if other != key] == others
    assert verify_events(ledger) is None


def test_a_study_that_went_leaves_its_rows_and_nothing_to_read(ledger: Ledger) -> None:
    made = Analysed("pkg", revisions=({"report": Sent(), "alert.er": Sent()},))
    write(ledger, [Told(instances=3, analyses=(made, Analysed("other", "refused"))), Told()])
    removal = ledger.remove_study(1, RULES)
    assert removal is not None
    assert removal.digests == ("1-0", "1-1", "1-2")
    assert (len(removal.paths), removal.size) == (2, 30)
    assert ledger.digests() == {"2-0", "2-1"}
    assert ledger.unnamed_digests(["1-0", "2-0"]) == ["1-0"]
    assert sorted(ledger.removed_paths()) == sorted(removal.paths)
    assert [one.study_id for one in ledger.kept_studies(RULES)] == [2]
    assert (ledger.removed_instances(1), ledger.removed_instances(2)) == (2, 0)
    with ledger.read() as connection:
        assert connection.scalars(sa.select(t.instance.c.header).where(t.instance.c.study_id == 1)).all() == [{}] * 3
    assert ledger.remove_study(1, RULES) is None
    assert event_counts(ledger)["retention.removed"] == 1
    with pytest.raises(LedgerError, match="were removed"):
        ledger.release_study(1)


def test_a_file_that_another_study_names_too_stays(ledger: Ledger) -> None:
    write(ledger, [Told(instances=3), Told(age_hours=1)])
    with ledger._write() as connection:
        for shared in ("0", "1"):  # one that counts, and one that was superseded
            of_study_2 = t.instance.c.digest == f"2-{shared}"
            connection.execute(t.instance.update().where(of_study_2).values(digest=f"1-{shared}"))
    removal = ledger.remove_study(1, RULES)
    assert removal is not None
    assert removal.digests == ("1-2",)


@pytest.mark.parametrize(
    ("one", "said"),
    [
        (Told(state="reopened"), "it is reopened"),
        (Told(age_hours=71.9), "younger than retention.keep_hours"),
        (Told(analyses=(Analysed("pkg"),)), "other has not decided on it"),
        (Told(analyses=(Analysed("pkg", "admitted"), Analysed("other"))), "its analysis by pkg is admitted"),
        (Told(analyses=(Analysed("pkg", "failed"), Analysed("other"))), "its analysis by pkg failed"),
        (Told(commitment="requested"), "storage commitment"),
        (
            Told(analyses=(Analysed("pkg", revisions=({"alert.er": Sent(delivery="dead")},)), Analysed("other"))),
            "its alert.er to er is dead",
        ),
        (
            Told(analyses=(Analysed("pkg", revisions=({"report": Sent(made=False)},)), Analysed("other"))),
            "its report is not made",
        ),
    ],
)
def test_what_holds_a_study_is_said(ledger: Ledger, one: Told, said: str) -> None:
    write(ledger, [one])
    (kept,) = ledger.kept_studies(RULES)
    assert any(said in hold for hold in kept.holds), kept.holds


DEAD = (Analysed("pkg", revisions=({"alert.er": Sent(delivery="dead")},)), Analysed("other"))


@pytest.mark.parametrize(
    ("one", "may_go"),
    [
        (Told(analyses=(Analysed("pkg", of_last_completion=False), Analysed("other"))), False),
        (Told(commitment="reporting", released=True), False),
        (Told(commitment="dead"), True),
        # Given up after three tries: released, it may go; after two it is still to be made.
        (Told(analyses=one_of_them(Analysed("pkg", revisions=({"report": Sent(False, 3, None)},)))), False),
        (
            Told(analyses=one_of_them(Analysed("pkg", revisions=({"report": Sent(False, 3, None)},))), released=True),
            True,
        ),
        (
            Told(analyses=one_of_them(Analysed("pkg", revisions=({"report": Sent(False, 2, None)},))), released=True),
            False,
        ),
        # A newer revision went to the same place since; of another object it would not count.
        (Told(analyses=one_of_them(Analysed("pkg", revisions=({"report": Sent(delivery="dead")}, PLAIN)))), True),
        (
            Told(
                analyses=one_of_them(
                    Analysed("pkg", revisions=({"report": Sent(delivery="dead")}, {"alert.er": Sent()}))
                )
            ),
            False,
        ),
        (Told(analyses=one_of_them(Analysed("pkg", revisions=(PLAIN, {"report": Sent(delivery="dead")})))), False),
        (Told(analyses=one_of_them(Analysed("gone", "admitted"))), False),
        (Told(analyses=one_of_them(Analysed("gone", "admitted")), released=True), True),
        (Told(analyses=one_of_them(Analysed("gone", "running")), released=True), False),
    ],
)
def test_the_finer_points(ledger: Ledger, one: Told, may_go: bool) -> None:
    write(ledger, [one])
    assert one.may_go() is may_go
    assert (ledger.remove_study(1, RULES) is not None) is may_go


@pytest.mark.parametrize("state", ["dead", "rejected"])
def test_an_alert_that_reached_nobody_holds_its_study_until_somebody_says_so(ledger: Ledger, state: str) -> None:
    analyses = (Analysed("pkg", revisions=({"alert.er": Sent(delivery=state)},)), Analysed("other"))
    write(ledger, [Told(age_hours=100_000, analyses=analyses)])
    assert ledger.remove_study(1, RULES) is None
    ledger.release_study(1)
    assert event_counts(ledger)["retention.released"] == 1
    assert ledger.remove_study(1, RULES) is not None


def test_a_release_does_not_outlive_another_try_nor_a_new_completion(ledger: Ledger) -> None:
    write(ledger, [Told(analyses=DEAD), Told(analyses=DEAD)])
    with ledger.read() as connection:
        delivery = connection.scalars(sa.select(t.delivery.c.id).order_by(t.delivery.c.id)).first()
    ledger.release_study(1)
    ledger.release_study(2)
    assert delivery is not None
    ledger.requeue_delivery(delivery, ["er"])
    assert ledger.remove_study(1, RULES) is None  # it is under way
    row = ledger.take_delivery("er")
    assert row is not None
    ledger.settle_delivery(row, "give_up", "again")
    assert ledger.remove_study(1, RULES) is None  # and failed once more
    with ledger._write() as connection:
        of_study_2 = t.study.c.id == 2
        connection.execute(t.study.update().where(of_study_2).values(released_at=later(-101 * HOUR)))
    assert ledger.remove_study(2, RULES) is None


def test_troubles_are_forgiven_at_an_age_only_where_the_site_says_so(ledger: Ledger) -> None:
    write(ledger, [Told(age_hours=31 * 24, analyses=DEAD), Told(age_hours=29 * 24, analyses=DEAD)])
    assert ledger.remove_study(1, RULES) is None
    assert ledger.remove_study(2, AFTER_30_DAYS) is None
    assert ledger.remove_study(1, AFTER_30_DAYS) is not None


def test_a_clock_that_was_set_back_lets_nothing_go(ledger: Ledger) -> None:
    write(ledger, [Told(age_hours=-1000)])
    assert ledger.remove_study(1, replace(RULES, keep_seconds=0.0)) is None


def test_what_failed_before_a_study_went_does_not_hold_it_when_it_came_again(ledger: Ledger) -> None:
    analyses = (Analysed("pkg", revisions=({"alert.er": Sent(delivery="dead"), "report": Sent(False, 3)},)), DEAD[1])
    write(ledger, [Told(analyses=analyses)])
    assert ledger.remove_study(1, RULES) is None
    with ledger._write() as connection:
        connection.execute(t.finding.update().values(removed_at=later(0)))
    assert ledger.remove_study(1, RULES) is not None


def test_what_was_removed_cannot_be_sent_again(ledger: Ledger) -> None:
    write(ledger, [Told(analyses=DEAD, released=True)])
    assert ledger.remove_study(1, RULES) is not None
    with ledger.read() as connection:
        delivery = connection.scalars(sa.select(t.delivery.c.id)).one()
    with pytest.raises(LedgerError, match="retention removed its object"):
        ledger.requeue_delivery(delivery, ["er"])


def test_a_failed_analysis_of_a_removed_study_is_not_tried_again(ledger: Ledger) -> None:
    write(ledger, [Told(analyses=(Analysed("pkg", "failed"), Analysed("other")), released=True)])
    assert ledger.remove_study(1, RULES) is not None
    with pytest.raises(LedgerError, match="send the whole study again"):
        ledger.requeue_analyses(1)


def test_the_migration_keeps_what_is_there_and_goes_back(tmp_path: Path) -> None:
    from alembic import command
    from alembic.config import Config

    path = tmp_path / "ledger.sqlite"
    config = Config()
    migrations = Path(__file__).parents[3] / "appliance" / "ledger" / "migrations"
    config.set_main_option("script_location", str(migrations))
    engine = sa.create_engine(f"sqlite:///{path}")
    with engine.connect() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0002")
        connection.execute(
            sa.text(
                "insert into study (id, study_instance_uid, state, completions, first_instance_at, last_instance_at)"
                " values (1, '1.2', 'complete', 1, 'a', 'b')"
            )
        )
        connection.commit()
    ledger = Ledger(path)
    assert [one.study_id for one in ledger.kept_studies(RULES)] == [1]
    ledger.close()
    with engine.connect() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, "0002")
        assert connection.execute(sa.text("select count(*) from study")).scalar() == 1
        assert "removed_at" not in {one["name"] for one in sa.inspect(connection).get_columns("study")}
