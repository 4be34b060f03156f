"""The ledger's queries of retention: which studies' files may go, and that they went."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import sqlalchemy as sa

from appliance.events import Event
from appliance.ledger import schema as t
from appliance.ledger.contradiction import denied
from appliance.ledger.database import Database, LedgerError, Row, later, now

_FINISHED = ("refused", "issued")
_UNSUCCESSFUL = ("dead", "rejected")
_DIGESTS_A_QUERY = 500


@dataclass(frozen=True, slots=True)
class Rules:
    """When the files of a study may go.

    Attributes:
        packages: names of the configured model packages; each must have said something of the study.
        attempts: tries after which a finding that could not be made is given up.
        keep_seconds: least age of a study, from its completion.
        troubled_seconds: age at which troubles hold it no longer; None: they do until somebody releases it.
    """

    packages: Collection[str]
    attempts: int
    keep_seconds: float
    troubled_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class KeptStudy:
    """A study whose files lie on the disk.

    Attributes:
        completed_at: None as long as it never was complete.
        instances, size: how many files it has in the spool, and their bytes.
        holds: why the files may not go; empty if they may.
        selftest: it is of a self-test; its files go as soon as that has ended.
    """

    study_id: int
    completed_at: str | None
    instances: int
    size: int
    holds: tuple[str, ...]
    selftest: bool = False


@dataclass(frozen=True, slots=True)
class Removal:
    """What a study's removal leaves to delete.

    Attributes:
        digests: its instances' files in the spool that no other study's row names.
        paths: its findings' files, below the findings folder.
        size: bytes of those instances.
    """

    study_id: int
    digests: tuple[str, ...]
    paths: tuple[str, ...]
    size: int


class Retention(Database):
    """The part of the ledger that retention works with."""

    def kept_studies(self, rules: Rules, *, selftests: bool = False) -> list[KeptStudy]:
        """Every study that has files: self-tests, then the first completed first; those never completed come last.

        Args:
            selftests: only those.
        """
        c, s = t.instance.c, t.study.c
        wanted = s.removed_at.is_(None) & s.selftest if selftests else s.removed_at.is_(None)
        with self.read() as connection:
            studies = connection.execute(
                sa.select(
                    s.id, s.completed_at, sa.func.count(c.id), sa.func.coalesce(sa.func.sum(c.size), 0), s.selftest
                )
                .select_from(t.study.outerjoin(t.instance, (c.study_id == s.id) & c.removed_at.is_(None)))
                .where(wanted)
                .group_by(s.id)
                .order_by(~s.selftest, s.completed_at.is_(None), s.completed_at, s.id)
            ).all()
            holds = _holds(connection, rules) if studies else {}
        return [
            KeptStudy(key, completed_at, instances, size, tuple(holds.get(key, ())), selftest)
            for key, completed_at, instances, size, selftest in studies
        ]

    def remove_study(self, study_id: int, rules: Rules) -> Removal | None:
        """Mark the files of a study as removed, before they are; None if something holds it now.

        The rows stay as the account; the headers, which nothing reads any more, are dropped.
        """
        c, f, s = t.instance.c, t.finding.c, t.study.c
        at = now()
        with self._write() as connection:
            kept = connection.scalar(sa.select(s.id).where(s.id == study_id, s.removed_at.is_(None)))
            if kept is None or _holds(connection, rules, study_id):
                return None
            mine = (c.study_id == study_id) & c.removed_at.is_(None)
            rows = connection.execute(sa.select(t.instance).where(mine).order_by(c.id)).mappings().all()
            # An update would leave the rows where they are: SQLite gives a page back only when it becomes empty.
            connection.execute(t.instance.delete().where(mine))
            if rows:
                emptied = {"removed_at": at, "header": {}}
                connection.execute(t.instance.insert(), [{**row, **emptied} for row in rows])
            verdicts = sa.select(t.verdict.c.id).join(t.analysis).where(t.analysis.c.study_id == study_id)
            made = f.verdict_id.in_(verdicts) & f.removed_at.is_(None)
            paths = connection.scalars(sa.select(f.path).where(made, f.path.is_not(None)).order_by(f.id)).all()
            connection.execute(t.finding.update().where(made).values(removed_at=at))
            connection.execute(t.study.update().where(s.id == study_id).values(removed_at=at))
            size = sum(row["size"] for row in rows)
            self._append(
                connection, Event.RETENTION_REMOVED, study_id, instances=len(rows), findings=len(paths), bytes=size
            )
            digests = _unnamed(connection, dict.fromkeys(row["digest"] for row in rows))
        return Removal(study_id, tuple(digests), tuple(paths), size)

    def unnamed_digests(self, digests: Iterable[str]) -> list[str]:
        """Those of some files in the spool that no row names, except as removed."""
        with self.read() as connection:
            return _unnamed(connection, digests)

    def removed_among(self, digests: Collection[str]) -> list[str]:
        """Those of some files in the spool that rows name, and only as removed."""
        c = t.instance.c
        wanted = self.unnamed_digests(digests)
        with self.read() as connection:
            return [
                digest
                for start in range(0, len(wanted), _DIGESTS_A_QUERY)
                for digest in connection.scalars(
                    sa.select(c.digest).distinct().where(c.digest.in_(wanted[start : start + _DIGESTS_A_QUERY]))
                )
            ]

    def removed_paths(self) -> list[str]:
        """The files of the findings that were removed, below the findings folder."""
        f = t.finding.c
        query = sa.select(f.path).where(f.removed_at.is_not(None), f.path.is_not(None)).order_by(f.id)
        with self.read() as connection:
            return list(connection.scalars(query))

    def removed_instances(self, study_id: int, series: str | None = None) -> int:
        """How many current instances of a study, or of one series of it, have no file any more: it cannot be judged."""
        c = t.instance.c
        query = sa.select(sa.func.count()).where(c.study_id == study_id, c.is_current, c.removed_at.is_not(None))
        if series is not None:
            query = query.where(c.series_instance_uid == series)
        with self.read() as connection:
            return int(connection.scalars(query).one())

    def release_study(self, study_id: int) -> None:
        """Let the troubles of a study hold its files no longer, because somebody has seen them.

        What is still to be done holds it all the same. A new completion or another try takes the release back.

        Raises:
            LedgerError: there is no such study, or it was removed.
        """
        s = t.study.c
        with self._write() as connection:
            row = connection.execute(sa.select(s.removed_at).where(s.id == study_id)).first()
            where = f"study {study_id}"
            if row is None:
                raise LedgerError("there is no such study", where, "`scanside studies` lists them")
            if row.removed_at is not None:
                raise LedgerError(f"its files were removed on {row.removed_at[:10]}", where, "nothing is held")
            connection.execute(t.study.update().where(s.id == study_id).values(released_at=now()))
            self._append(connection, Event.RETENTION_RELEASED, study_id)


def require_files(connection: sa.Connection, study_id: int) -> None:
    """For whoever takes up a study's work again.

    Raises:
        LedgerError: files of it were removed.
    """
    c = t.instance.c
    gone = connection.scalar(
        sa.select(sa.func.max(c.removed_at)).where(c.study_id == study_id, c.is_current, c.removed_at.is_not(None))
    )
    if gone is not None:
        what = f"retention removed files of it on {gone[:10]}"
        raise LedgerError(what, f"study {study_id}", "send the whole study again")


def _unnamed(connection: sa.Connection, digests: Iterable[str]) -> list[str]:
    c = t.instance.c
    wanted = list(digests)
    named: set[str] = set()
    for start in range(0, len(wanted), _DIGESTS_A_QUERY):
        some = wanted[start : start + _DIGESTS_A_QUERY]
        named |= set(connection.scalars(sa.select(c.digest).where(c.digest.in_(some), c.removed_at.is_(None))))
    return [digest for digest in wanted if digest not in named]


def _holds(connection: sa.Connection, rules: Rules, study_id: int | None = None) -> dict[int, list[str]]:
    """Study → why its files may not go, for all studies that have files or for one of them.

    Two kinds of reason: what is still to be done holds a study always; what went wrong for good, until somebody
    released it since its last completion or it is old enough. What is in no known state counts as still to be done.
    """
    s = t.study.c
    kept = s.removed_at.is_(None) if study_id is None else s.removed_at.is_(None) & (s.id == study_id)
    undone = _analyses(connection, rules, kept)
    troubles: defaultdict[int, list[str]] = defaultdict(list)
    for key, reason, final in (*_unmade(connection, rules, kept), *_deliveries(connection, kept)):
        (troubles if final else undone)[key].append(reason)
    for key, reason in _failures(connection, rules, kept):
        troubles[key].append(reason)
    for key in _awaiting_commitment(connection, kept):
        undone[key].append("a request for storage commitment is not answered")
    young = later(-rules.keep_seconds)
    forgiven = None if rules.troubled_seconds is None else later(-rules.troubled_seconds)
    held: dict[int, list[str]] = {}
    tests = t.selftest.c
    ended = sa.select(tests.id).where(tests.study_instance_uid == s.study_instance_uid, tests.ended_at.is_not(None))
    columns = (s.id, s.state, s.completed_at, s.released_at, s.selftest, ended.exists().label("ended"))
    for row in connection.execute(sa.select(*columns).where(kept)):
        reasons = list(undone[row.id])
        if row.selftest:
            reasons = [] if row.ended else ["its self-test has not ended"]
        elif row.state != "complete" or row.completed_at is None:
            reasons.append(f"it is {row.state}")
        else:
            released = row.released_at is not None and row.released_at >= row.completed_at
            if not released and (forgiven is None or row.completed_at > forgiven):
                reasons += troubles[row.id]
            if row.completed_at > young:
                reasons.append("it is younger than retention.keep_hours")
        if reasons:
            held[row.id] = reasons
    return held


def _analyses(connection: sa.Connection, rules: Rules, kept: sa.ColumnElement[bool]) -> defaultdict[int, list[str]]:
    """What the configured packages have still to say."""
    a, s = t.analysis.c, t.study.c
    found: defaultdict[int, list[str]] = defaultdict(list)
    for package in rules.packages:
        decided = sa.select(a.id).where(a.study_id == s.id, a.package == package, a.completion == s.completions)
        for key in connection.scalars(sa.select(s.id).where(kept, s.state == "complete", ~decided.exists())):
            found[key].append(f"{package} has not decided on it")
    query = sa.select(a.study_id, a.package, a.state).join(t.study).where(kept, a.state.not_in((*_FINISHED, "failed")))
    for row in connection.execute(query):
        if row.state != "admitted" or row.package in rules.packages:
            found[row.study_id].append(f"its analysis by {row.package} is {row.state}")
    return found


def _failures(connection: sa.Connection, rules: Rules, kept: sa.ColumnElement[bool]) -> Iterable[tuple[int, str]]:
    """Analyses that were set aside, or whose package is no longer configured."""
    a = t.analysis.c
    query = sa.select(a.study_id, a.package, a.state).join(t.study).where(kept, a.state.in_(("failed", "admitted")))
    for row in connection.execute(query):
        if row.state == "failed":
            yield row.study_id, f"its analysis by {row.package} failed"
        elif row.package not in rules.packages:
            yield row.study_id, f"{row.package} was to analyse it and is no longer configured"


def _unmade(connection: sa.Connection, rules: Rules, kept: sa.ColumnElement[bool]) -> Iterable[tuple[int, str, bool]]:
    """Findings without a file: (study, reason, whether they were given up).

    One that was given up does not count once a later verdict denied it.
    """
    f, a = t.finding.c, t.analysis.c
    query = (
        sa.select(f.id, a.study_id, f.object, f.attempts)
        .select_from(t.finding.join(t.verdict).join(t.analysis).join(t.study))
        .where(kept, f.path.is_(None), f.removed_at.is_(None))
        .order_by(f.id)
    )
    for row in connection.execute(query):
        given_up = row.attempts >= rules.attempts
        if not (given_up and denied(connection, row.id)):
            yield row.study_id, f"its {row.object} {'could not be' if given_up else 'is not'} made", given_up


def superseded() -> sa.Exists:
    """A newer revision of the object of a delivery goes, or went, to the same place."""
    newer_d, newer_f, newer_v = (one.alias(f"newer_{one.name}") for one in (t.delivery, t.finding, t.verdict))
    return (
        sa.select(newer_d.c.id)
        .select_from(
            newer_d.join(newer_f, newer_d.c.finding_id == newer_f.c.id).join(
                newer_v, newer_f.c.verdict_id == newer_v.c.id
            )
        )
        .where(
            newer_d.c.destination == t.delivery.c.destination,
            newer_f.c.object == t.finding.c.object,
            newer_v.c.analysis_id == t.verdict.c.analysis_id,
            newer_v.c.revision > t.verdict.c.revision,
        )
        .exists()
    )


def _deliveries(connection: sa.Connection, kept: sa.ColumnElement[bool]) -> Iterable[tuple[int, str, bool]]:
    """Deliveries that have not succeeded: (study, reason, whether they were given up).

    One that was given up does not count once a newer revision of the same object goes to the same place, or a later
    verdict denied it: it cannot be sent again, and the newer one answers for both.
    """
    d, f, a = t.delivery.c, t.finding.c, t.analysis.c
    joined = t.delivery.join(t.finding).join(t.verdict).join(t.analysis).join(t.study)
    query = (
        sa.select(a.study_id, d.finding_id, f.object, d.destination, d.state)
        .select_from(joined)
        .where(
            kept,
            f.removed_at.is_(None),
            d.state.not_in(("acknowledged", "withdrawn", "spared", "replaced")),
            d.state.not_in(_UNSUCCESSFUL) | ~superseded(),
        )
        .order_by(d.id)
    )
    rows: Iterable[Row] = connection.execute(query).mappings()
    for row in rows:
        if row["state"] in _UNSUCCESSFUL and denied(connection, row["finding_id"]):
            continue
        reason = f"its {row['object']} to {row['destination']} is {row['state']}"
        yield row["study_id"], reason, row["state"] in _UNSUCCESSFUL


def _awaiting_commitment(connection: sa.Connection, kept: sa.ColumnElement[bool]) -> Iterable[int]:
    """Studies of whose instances somebody asked whether they are safe, and has no answer yet (PS3.4 annex J)."""
    c, i = t.commitment.c, t.instance.c
    each = sa.func.json_each(c.request).table_valued("value")
    asked = (
        sa.select(sa.func.json_extract(each.c.value, "$[1]"))
        .select_from(t.commitment.join(each, sa.true()))
        .where(c.state.not_in(("acknowledged", "dead")))
    )
    query = sa.select(i.study_id).distinct().join(t.study).where(kept, i.sop_instance_uid.in_(asked))
    return connection.scalars(query).all()
