"""Every query that a stage makes of the ledger; those of intake are in ingest.py, of deliveries in outbox.py."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from appliance.events import Event
from appliance.ledger import schema as t
from appliance.ledger.board import BoardMoved
from appliance.ledger.commitments import Commitments
from appliance.ledger.contradiction import patient_since, unanswered
from appliance.ledger.database import Chain, Row, later, now, seconds_between
from appliance.ledger.deadlines import Deadlines
from appliance.ledger.ingest import Ingest, requeue_failed
from appliance.ledger.ingest import NewInstance as NewInstance
from appliance.ledger.keeping import Keeping
from appliance.ledger.marks import Marks
from appliance.ledger.performed import Performed
from appliance.ledger.queries import Queries
from appliance.ledger.records import ALERT_STANDS, Verdict
from appliance.ledger.retention import Retention, require_files
from appliance.ledger.selftest import Selftests
from appliance.ledger.states import ANALYSIS, STUDY, step
from appliance.ledger.tasks import Tasks
from dicom_io.header import Header

Inputs = Sequence[Sequence[str]]
"""What an analysis was admitted on: (SOP Instance UID, digest) of each instance, in the volume's order."""


NO_MORE = 1_000_000
"""Tries of a finding that is not tried."""
_ENDED = ("withdrawn", "spared", "dead")
"""States of a delivery that is not tried any more, and of which the destination has said nothing final."""
LONGEST_PAUSE = 300.0
"""No pause between two tries is longer, in seconds."""


@dataclass(frozen=True, slots=True)
class StoredInstance:
    """An instance of a study: ``digest`` names its file in the spool."""

    sop_instance_uid: str
    digest: str
    header: Header


@dataclass(frozen=True, slots=True)
class Arriving:
    """A study that is receiving or reopened, and what is known of the associations that brought it.

    Attributes:
        open_associations: how many of them are still open.
        last_closed_at: when the last of the others ended; None if none has.
        outcomes: how they ended, each way once, sorted: aborted, broken, lost, released.
        calling_ae: the sender of the first instance.
        visits: for each series and association that brought some of it: the series, when the first of these instances
            came, and when the association ended, None while it is open; in the order of their coming.
        said_at: when a performed step or a notification last said something of it; None if none did.
    """

    id: int
    last_instance_at: str
    open_associations: int
    last_closed_at: str | None
    outcomes: tuple[str, ...]
    calling_ae: str = ""
    visits: tuple[tuple[str, str, str | None], ...] = ()
    said_at: str | None = None


@dataclass(frozen=True, slots=True)
class NewFinding:
    """A finding that an issued verdict brings, and where it goes.

    Attributes:
        uid: SOP Instance UID, or MSH-10 of an alert; the same at every try.
        path: file below the findings folder, if it is already rendered.
        destinations: names of destinations.
        urgency: 0 is delivered first.
        urgencies: of a destination that has an order of its own.
        held_seconds: so long after the verdict it is a step of the escalation; 0: it is delivered at once.
        failed: why it can never be delivered; it is then a dead letter as soon as deliveries are looked at.
    """

    object: str
    uid: str
    path: str | None
    destinations: tuple[str, ...]
    urgency: int
    held_seconds: float = 0.0
    failed: str = ""
    urgencies: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Notice:
    """What a refusal tells the hospital: a verdict that says nothing of the study, with its findings."""

    verdict: Verdict
    issued_at: str
    findings: Sequence[NewFinding]


@dataclass(frozen=True, slots=True)
class Told:
    """An answer that a destination was told.

    Attributes:
        uid: under which MSH-10.
        certain: False where nobody knows whether it arrived, and it is not sent any more.
        mode: in which the package ran whose verdict it told.
    """

    positive: bool
    provisional: bool = False
    uid: str = field(default="", compare=False)
    certain: bool = True
    mode: str = field(default="", compare=False)


# What the engine asks the ledger at every step, or at every look at a study that arrives, is put together once: that
# takes SQLAlchemy longer than to run it.


def _arriving() -> sa.Select[Any]:
    a, i, s = t.association.c, t.instance.c, t.study.c
    arriving = sa.select(s.id).where(s.state.in_(("receiving", "reopened")))
    brought = (
        sa.select(i.study_id, i.association_id, i.series_instance_uid, sa.func.min(i.received_at).label("first"))
        .where(i.study_id.in_(arriving))
        .group_by(i.study_id, i.association_id, i.series_instance_uid)
        .subquery()
    )
    p = t.performed.c
    said = (
        sa.select(sa.func.max(p.changed_at))
        .where(p.study_instance_uid == s.study_instance_uid)
        .correlate(t.study)
        .scalar_subquery()
    )
    return (
        sa.select(
            s.id,
            s.last_instance_at,
            a.id.label("association"),
            a.closed_at,
            a.outcome,
            a.calling_ae,
            brought.c.series_instance_uid,
            brought.c.first,
            said.label("said_at"),
        )
        .join(brought, brought.c.study_id == s.id)
        .join(t.association, a.id == brought.c.association_id)
        .order_by(s.id, brought.c.first)
    )


def _waiting(at: Any, longest: Any) -> sa.ColumnElement[bool]:
    """An analysis that is to be worked on now: admitted, due, and its study unchanged since the gate decided.

    Args:
        at: the time now.
        longest: the end of the longest pause: a clock that was set back must not make a study wait for it to catch up.
    """
    a, s = t.analysis.c, t.study.c
    due = (a.due_at <= at) | (a.due_at > longest)
    return sa.and_(a.state == "admitted", due, s.state == "complete", a.completion == s.completions)


def _evidence() -> sa.Select[Any]:
    s = t.study.c
    newest = sa.select(s.evidence, s.completed_at).where(s.completed_at.is_not(None), s.state == "complete")
    newest_few = newest.order_by(s.completed_at.desc()).limit(sa.bindparam("among")).subquery()
    sender = newest_few.c.evidence["calling_ae"].as_string()
    query = sa.select(newest_few.c.evidence).where(sender == sa.bindparam("sender"))
    return query.order_by(newest_few.c.completed_at.desc()).limit(sa.bindparam("most"))


_ARRIVING = _arriving()
_WAITING_PACKAGES = (
    sa.select(t.analysis.c.package)
    .distinct()
    .join(t.study)
    .where(_waiting(sa.bindparam("at"), sa.bindparam("longest")))
)
_EARLIER_EVIDENCE = _evidence()
_MINE = (
    t.instance.c.study_id == sa.bindparam("study"),
    t.instance.c.is_current,
    t.instance.c.removed_at.is_(None),
)
_CURRENT = sa.select(t.instance.c.id).where(*_MINE)
_SINCE = (
    sa.select(t.instance.c.id, t.instance.c.sop_instance_uid, t.instance.c.digest, t.instance.c.header)
    .where(*_MINE, t.instance.c.id >= sa.bindparam("first"))
    .order_by(t.instance.c.id)
)


class Ledger(Ingest, Keeping, Selftests, Commitments, Performed, Retention, Deadlines, Queries, Marks, Tasks):
    """The one truth of the box. Safe to share between threads; every service opens its own."""

    # --- study ------------------------------------------------------------------------------------------

    def arriving_studies(self) -> list[Arriving]:
        """Studies that are receiving or reopened, oldest first."""
        with self.read() as connection:
            rows = connection.execute(_ARRIVING).all()
        found = []
        for (key, last), group in itertools.groupby(rows, key=lambda row: (row.id, row.last_instance_at)):
            members = list(group)
            closed = [row.closed_at for row in members if row.closed_at is not None]
            outcomes = tuple(sorted({row.outcome for row in members if row.outcome is not None}))
            found.append(
                Arriving(
                    key,
                    last,
                    len({row.association for row in members if row.closed_at is None}),
                    max(closed, default=None),
                    outcomes,
                    members[0].calling_ae,
                    tuple((row.series_instance_uid, row.first, row.closed_at) for row in members),
                    members[0].said_at,
                )
            )
        return found

    def earlier_evidence(self, calling_ae: str, limit: int) -> list[dict[str, Any]]:
        """The evidence on which the newest complete studies of a sender were complete, the newest first."""
        values = {"among": 20 * limit, "sender": calling_ae, "most": limit}
        with self.read() as connection:
            found = connection.scalars(_EARLIER_EVIDENCE, values).all()
        return [dict(one) for one in found]

    def instances(self, study_id: int) -> list[StoredInstance]:
        """The current instances of a study that have their files, in the order in which they came."""
        c = t.instance.c
        return self._stored(c.study_id == study_id, c.is_current)

    def changes(self, study_id: int, known: Set[int]) -> tuple[dict[int, StoredInstance], set[int]]:
        """What of `instances` is new to one who knows some rows of them already.

        Returns:
            The new rows by number, in the order in which they came; and the known ones that are no longer among them.
        """
        with self.read() as connection:
            current = set(connection.scalars(_CURRENT, {"study": study_id}))
            new = current - known
            rows = connection.execute(_SINCE, {"study": study_id, "first": min(new)}).all() if new else []
        found = {
            row.id: StoredInstance(row.sop_instance_uid, row.digest, Header.from_json(row.header))
            for row in rows
            if row.id in new
        }
        return found, set(known) - current

    def inputs(self, study_id: int, inputs: Inputs) -> list[StoredInstance]:
        """The instances that an analysis was admitted on and that have their files, in that order, current or not."""
        c = t.instance.c
        wanted = {digest: place for place, (_, digest) in enumerate(inputs)}
        found = [one for one in self._stored(c.study_id == study_id) if one.digest in wanted]
        return sorted(found, key=lambda one: wanted[one.digest])

    def _stored(self, *conditions: sa.ColumnElement[bool]) -> list[StoredInstance]:
        c = t.instance.c
        query = sa.select(c.sop_instance_uid, c.digest, c.header).where(*conditions, c.removed_at.is_(None))
        query = query.order_by(c.id)
        with self.read() as connection:
            rows = connection.execute(query).all()
        return [StoredInstance(row.sop_instance_uid, row.digest, Header.from_json(row.header)) for row in rows]

    def complete_study(self, study_id: int, last_instance_at: str, evidence: dict[str, Any]) -> bool:
        """Declare a study complete on that evidence; False if an instance came since it was weighed."""
        with self._write() as connection:
            row = connection.execute(sa.select(t.study).where(t.study.c.id == study_id)).mappings().one()
            if row["last_instance_at"] != last_instance_at or row["state"] == "complete":
                return False
            connection.execute(
                t.study.update()
                .where(t.study.c.id == study_id)
                .values(
                    state=step(STUDY, row["state"], "complete"),
                    completions=row["completions"] + 1,
                    completed_at=now(),
                    evidence=evidence,
                )
            )
            self._append(connection, Event.STUDY_COMPLETED, study_id, **evidence)
            return True

    def undecided_studies(
        self, packages: Mapping[str, str], among: Collection[int] | None = None
    ) -> list[tuple[int, str]]:
        """Complete studies that a package must be asked about: (study, package).

        It has not been asked since their last completion, or they were admitted in another version and not run.

        Args:
            packages: name → version.
            among: look only at these studies. None: at all, which takes as long as there are complete studies, and also
                at what was admitted and not run: the label, or the site's limits, may be others since.
        """
        if among is not None and not among:
            return []
        a, s = t.analysis.c, t.study.c
        found: list[tuple[int, str]] = []
        with self.read() as connection:
            for package, version in packages.items():
                decided = (
                    sa.select(a.id)
                    .where(
                        a.study_id == s.id,
                        a.package == package,
                        a.completion == s.completions,
                        a.state != "admitted"
                        if among is None
                        else (a.state != "admitted") | (a.package_version == version),
                    )
                    .exists()
                )
                query = sa.select(s.id).where(s.state == "complete", ~decided).order_by(s.id)
                keys = connection.scalars(query if among is None else query.where(s.id.in_(among)))
                found += [(key, package) for key in keys]
        return sorted(found)

    def standing_verdict(self, study_id: int, package: str) -> Row | None:
        """The newest verdict of a package on a study, if that is still the state of its analysis."""
        return self._newest_verdict(study_id, package, t.analysis.c.state == "issued")

    def newest_verdict(self, study_id: int, package: str) -> Row | None:
        """The newest verdict of a package on a study, whatever became of its analysis: what the hospital was told."""
        return self._newest_verdict(study_id, package)

    def _newest_verdict(self, study_id: int, package: str, *conditions: sa.ColumnElement[bool]) -> Row | None:
        query = (
            sa.select(t.verdict)
            .join(t.analysis)
            .where(t.analysis.c.study_id == study_id, t.analysis.c.package == package, *conditions)
            .order_by(t.verdict.c.revision.desc())
            .limit(1)
        )
        with self.read() as connection:
            return connection.execute(query).mappings().first()

    def decide(
        self,
        study_id: int,
        package: str,
        version: str,
        *,
        admitted: bool,
        reason: str,
        admission: list[dict[str, Any]],
        selection: list[dict[str, Any]],
        inputs: Inputs,
        notice: Notice | None = None,
    ) -> None:
        """Record whether a package may see a complete study, and which instances of it.

        Args:
            notice: goes out with a refusal, unless this package has spoken of the study before.
        """
        c = t.analysis.c
        with self._write() as connection:
            completion = self._completions(connection, study_id)
            row = self._analysis_of(connection, study_id, package)
            values = {
                "state": step(ANALYSIS, row["state"] if row else "", "admit" if admitted else "refuse"),
                "package_version": version,
                "completion": completion,
                # What was tried in vain stays so if only the gate is asked again.
                "attempts": row["attempts"]
                if row and row["state"] == "admitted" and row["completion"] == completion
                else 0,
                "due_at": now(),
                "admission": admission,
                "selection": selection,
                "inputs": [list(one) for one in inputs],
                "reason": reason,
            }
            if row:
                connection.execute(t.analysis.update().where(c.id == row["id"]).values(**values))
            else:
                connection.execute(t.analysis.insert().values(study_id=study_id, package=package, **values))
            name = Event.STUDY_ADMITTED if admitted else Event.STUDY_REFUSED
            self._append(connection, name, study_id, package=package, version=version, reason=reason)
            self._tell_refusal(connection, study_id, package, notice)

    def _tell_refusal(self, connection: sa.Connection, study_id: int, package: str, notice: Notice | None) -> None:
        row = self._analysis_of(connection, study_id, package)
        assert row is not None
        if notice is None or self._has_spoken(connection, study_id, package):
            return
        # It rests on no image.
        nothing = {"id": row["id"], "inputs": []}
        self._insert_verdict(connection, nothing, 1, notice.verdict, notice.issued_at, notice.findings, late=False)

    def has_spoken(self, study_id: int, package: str) -> bool:
        """Whether a package has a verdict on a study, or said why it has none."""
        with self.read() as connection:
            return self._has_spoken(connection, study_id, package)

    @staticmethod
    def _has_spoken(connection: sa.Connection, study_id: int, package: str) -> bool:
        a = t.analysis.c
        query = sa.select(t.verdict.c.id).join(t.analysis).where(a.study_id == study_id, a.package == package)
        return connection.execute(query.limit(1)).first() is not None

    def begin_early(
        self,
        study_id: int,
        package: str,
        version: str,
        *,
        admission: list[dict[str, Any]],
        selection: list[dict[str, Any]],
        inputs: Inputs,
    ) -> Row | None:
        """Start an analysis of what has arrived of a study; None if a package was asked about that study before.

        Returns:
            As `take_analysis`.
        """
        with self._write() as connection:
            if self._analysis_of(connection, study_id, package) is not None:
                return None
            connection.execute(
                t.analysis.insert().values(
                    study_id=study_id,
                    package=package,
                    state=step(ANALYSIS, step(ANALYSIS, "", "admit"), "start"),
                    package_version=version,
                    completion=self._completions(connection, study_id),
                    attempts=1,
                    due_at=now(),
                    admission=admission,
                    selection=selection,
                    inputs=[list(one) for one in inputs],
                    reason="",
                )
            )
            self._append(connection, Event.ANALYSIS_STARTED, study_id, package=package, attempt=1, early=True)
            query = sa.select(t.analysis, t.study.c.study_instance_uid, t.study.c.evidence).join(t.study)
            query = query.where(t.analysis.c.study_id == study_id, t.analysis.c.package == package)
            return connection.execute(query).mappings().one()

    def keep_verdict(self, study_id: int, package: str, selection: list[dict[str, Any]]) -> None:
        """Record that a study came again to completion with nothing changed that was analysed."""
        with self._write() as connection:
            row = self._analysis_of(connection, study_id, package)
            assert row is not None
            self._move_analysis(
                connection,
                row["id"],
                "keep",
                completion=self._completions(connection, study_id),
                selection=selection,
            )
            self._append(connection, Event.VERDICT_KEPT, study_id, package=package)

    @staticmethod
    def _analysis_of(connection: sa.Connection, study_id: int, package: str) -> Row | None:
        c = t.analysis.c
        query = sa.select(t.analysis).where(c.study_id == study_id, c.package == package)
        return connection.execute(query).mappings().first()

    @staticmethod
    def _completions(connection: sa.Connection, study_id: int) -> int:
        return int(connection.scalars(sa.select(t.study.c.completions).where(t.study.c.id == study_id)).one())

    # --- inference --------------------------------------------------------------------------------------

    def waiting_packages(self) -> set[str]:
        """The packages that have an analysis waiting."""
        with self.read() as connection:
            return set(connection.scalars(_WAITING_PACKAGES, {"at": now(), "longest": later(LONGEST_PAUSE)}))

    def take_analysis(
        self,
        packages: Collection[str],
        urgent: Collection[int] = (),
        urgent_senders: Collection[str] = (),
        *,
        only_urgent: bool = False,
        tried: bool | None = None,
    ) -> Row | None:
        """Start the next analysis of one of these packages, or None.

        Args:
            urgent: studies that go before all others.
            urgent_senders: AE titles whose studies do so too.
            only_urgent: leave the others.
            tried: only what was tried before, or only what was not.

        Returns:
            The row, with the study's ``study_instance_uid`` and ``evidence``.
        """
        c = t.analysis.c
        goes_first = c.study_id.in_(urgent) | t.study.c.evidence["calling_ae"].as_string().in_(urgent_senders)
        query = (
            sa.select(t.analysis, t.study.c.study_instance_uid, t.study.c.evidence)
            .join(t.study)
            .where(_waiting(now(), later(LONGEST_PAUSE)), c.package.in_(packages))
            # One that failed goes behind the others, so that it delays none; behind all of them a self-test.
            .order_by(t.study.c.selftest, c.attempts, ~goes_first, c.id)
            .limit(1)
        )
        if only_urgent:
            query = query.where(goes_first)
        if tried is not None:
            query = query.where((c.attempts > 0) == tried)
        with self._write() as connection:
            row = connection.execute(query).mappings().first()
            if row is None:
                return None
            attempt = row["attempts"] + 1
            self._move_analysis(connection, row["id"], "start", attempts=attempt)
            self._append(connection, Event.ANALYSIS_STARTED, row["study_id"], package=row["package"], attempt=attempt)
            return row

    def retry_waited(self, packages: Collection[str]) -> float:
        """For how many seconds an analysis of one of these packages that failed before has been due; 0 if none is."""
        c = t.analysis.c
        query = (
            sa.select(sa.func.min(c.due_at))
            .select_from(t.analysis.join(t.study))
            .where(_waiting(now(), later(LONGEST_PAUSE)), c.package.in_(packages), c.attempts > 0)
        )
        with self.read() as connection:
            since = connection.scalar(query)
        return max(0.0, seconds_between(since, now())) if since else 0.0

    def _move_analysis(self, connection: sa.Connection, key: int, event: str, **values: Any) -> Row:
        c = t.analysis.c
        row = connection.execute(sa.select(t.analysis).where(c.id == key)).mappings().one()
        connection.execute(
            t.analysis.update().where(c.id == key).values(state=step(ANALYSIS, row["state"], event), **values)
        )
        return row

    def park_analyses(self, attempts: int, working: Collection[int] = ()) -> int:
        """Take up again what the engine was working on when it died or stumbled. Returns how many.

        One that was being worked on at the end of that many engines is set aside: it may be what ends them.

        Args:
            working: analyses that are still being worked on.
        """
        c = t.analysis.c
        with self._write() as connection:
            query = sa.select(t.analysis).where(c.state == "running", c.id.not_in(working))
            rows = connection.execute(query).mappings().all()
            for row in rows:
                if row["attempts"] >= attempts:
                    reason = f"the engine ended or stumbled {row['attempts']} times while it worked on it"
                    self._move_analysis(connection, row["id"], "fail", reason=reason)
                    self._append(
                        connection, Event.ANALYSIS_FAILED, row["study_id"], package=row["package"], reason=reason
                    )
                else:
                    self._move_analysis(connection, row["id"], "park")
                    self._append(connection, Event.ANALYSIS_PARKED, row["study_id"], package=row["package"])
            return len(rows)

    def park_analysis(self, analysis_id: int, reason: str, pause: float) -> None:
        """Put back an analysis that could not be worked on through no fault of its own, without losing a try."""
        with self._write() as connection:
            row = self._move_analysis(connection, analysis_id, "park", reason=reason, due_at=later(pause))
            connection.execute(
                t.analysis.update().where(t.analysis.c.id == analysis_id).values(attempts=row["attempts"] - 1)
            )
            self._append(connection, Event.ANALYSIS_PARKED, row["study_id"], package=row["package"], reason=reason)

    def withhold(
        self, analysis_id: int, reason: str, admission: list[dict[str, Any]], notice: Notice | None = None
    ) -> None:
        """Refuse a study whose pixels showed what its headers did not; the notice as in `decide`."""
        with self._write() as connection:
            row = self._move_analysis(connection, analysis_id, "refuse", reason=reason, admission=admission)
            self._append(connection, Event.STUDY_REFUSED, row["study_id"], package=row["package"], reason=reason)
            self._tell_refusal(connection, row["study_id"], row["package"], notice)

    def fail_analysis(self, analysis_id: int, reason: str, attempts: int, pause: float) -> bool:
        """Record a failed try; True if it was the last and it is set aside, else the next is due after ``pause`` s."""
        with self._write() as connection:
            tried = connection.scalar(sa.select(t.analysis.c.attempts).where(t.analysis.c.id == analysis_id))
            final = tried is not None and tried >= attempts
            event = "fail" if final else "retry"
            row = self._move_analysis(connection, analysis_id, event, reason=reason, due_at=later(pause))
            name = Event.ANALYSIS_FAILED if final else Event.ANALYSIS_ATTEMPT_FAILED
            self._append(connection, name, row["study_id"], package=row["package"], attempt=tried, reason=reason)
            return final

    def quarantine(self, analysis_id: int, reason: str) -> None:
        """Set aside at once an analysis whose images were decoded and cannot be what was scanned."""
        with self._write() as connection:
            row = self._move_analysis(connection, analysis_id, "fail", reason=reason)
            for name in (Event.ANALYSIS_QUARANTINED, Event.ANALYSIS_FAILED):
                self._append(connection, name, row["study_id"], package=row["package"], reason=reason)

    def requeue_analyses(self, study_id: int) -> int:
        """Try the failed analyses of a study again, because somebody asked for it. Returns how many.

        Raises:
            LedgerError: retention removed files of it.
        """
        with self._write() as connection:
            require_files(connection, study_id)
            raw: Any = connection.connection.driver_connection
            events = Chain(raw)
            count = requeue_failed(raw, events, study_id)
            events.flush()
            return count

    def verdicts(self, analysis_id: int) -> Sequence[Row]:
        """The verdicts of an analysis, oldest first: revision, positive …"""
        query = sa.select(t.verdict).where(t.verdict.c.analysis_id == analysis_id).order_by(t.verdict.c.revision)
        with self.read() as connection:
            return connection.execute(query).mappings().all()

    def positive_elsewhere(self, analysis_id: int) -> bool:
        """Whether a positive verdict of another package in clinical mode stands on the same study.

        A later one in shadow, which nobody is told of, changes nothing in that; a negative one takes it back, also of a
        package that is only evaluated by then.
        """
        a, v = t.analysis.c, t.verdict.c
        study = sa.select(a.study_id).where(a.id == analysis_id).scalar_subquery()
        query = (
            sa.select(v.analysis_id, v.positive, v.result["mode"].as_string(), v.result["limitations"])
            .select_from(t.verdict.join(t.analysis))
            .where(a.study_id == study, a.id != analysis_id)
            .order_by(v.revision)
        )
        standing: set[int] = set()
        with self.read() as connection:
            for key, positive, mode, limitations in connection.execute(query):
                if positive and mode == "clinical":
                    standing.add(key)
                elif not positive and mode != "shadow" and ALERT_STANDS not in (limitations or ()):
                    standing.discard(key)
        return bool(standing)

    def study_of(self, analysis_id: int) -> int:
        """The study that an analysis is of."""
        with self.read() as connection:
            return int(connection.scalars(sa.select(t.analysis.c.study_id).where(t.analysis.c.id == analysis_id)).one())

    def told(self, analysis_id: int, what: str = "alert.") -> dict[str, list[Told]]:
        """What each destination was told of an analysis so far: destination → answers, oldest first.

        A message that was rejected at every try told nobody, nor did one that ended before it was ever tried:
        withdrawn, spared, or a dead letter because it was invalid or its destination was gone. What was tried and ended
        without an answer may have arrived, so it counts, and is not `certain`: a later answer must take it back, and
        may say it again only as what replaces it. So it is with one that was rejected after a try without an answer: a
        receiver that has it refuses the same again as a duplicate. One that is held counts: what follows takes its
        place.

        Args:
            what: how the names of the findings begin: "alert." or "worklist.".
        """
        d = t.delivery.c
        query = (
            sa.select(
                d.destination,
                t.verdict.c.positive,
                sa.func.coalesce(t.verdict.c.result["provisional"].as_boolean(), sa.false()),
                t.finding.c.uid,
                d.state.not_in((*_ENDED, "rejected")),
                sa.func.coalesce(t.verdict.c.result["mode"].as_string(), ""),
            )
            .select_from(t.delivery.join(t.finding).join(t.verdict).join(t.analysis))
            .where(t.verdict.c.analysis_id == analysis_id, t.finding.c.object.startswith(what))
            .where(d.state.not_in(_ENDED) | d.sent_at.is_not(None), (d.state != "rejected") | unanswered())
            .order_by(t.verdict.c.revision)
        )
        answers: dict[str, list[Told]] = {}
        with self.read() as connection:
            for destination, positive, provisional, uid, certain, mode in connection.execute(query):
                one = Told(positive, bool(provisional), uid, bool(certain), mode)
                answers.setdefault(destination, []).append(one)
        return answers

    def withdrawn_alerts(self, analysis_id: int) -> set[str]:
        """The destinations to which the newest alert of an analysis was withdrawn before it left."""
        d = t.delivery.c
        query = (
            sa.select(d.destination, d.state)
            .select_from(t.delivery.join(t.finding).join(t.verdict))
            .where(t.verdict.c.analysis_id == analysis_id, t.finding.c.object.startswith("alert."))
            .order_by(d.id)
        )
        with self.read() as connection:
            newest = {row.destination: row.state for row in connection.execute(query)}
        return {name for name, state in newest.items() if state == "withdrawn"}

    def told_of_patient(self, analysis_id: int, what: str = "alert.") -> dict[str, list[Told]]:
        """As `told`, without what was told under another Patient ID before the images came again under this one."""
        ended = self.patient_since(analysis_id)
        query = (
            sa.select(t.finding.c.uid)
            .join(t.verdict)
            .where(t.verdict.c.analysis_id == analysis_id, t.verdict.c.revision <= ended)
        )
        with self.read() as connection:
            others = set(connection.scalars(query)) if ended else set()
        return {
            destination: [one for one in answers if one.uid not in others]
            for destination, answers in self.told(analysis_id, what).items()
        }

    def patient_since(self, analysis_id: int, before: int | None = None) -> int:
        """The last revision, below that one, with which ended what was told under another Patient ID; 0 if none did."""
        with self.read() as connection:
            return patient_since(connection, analysis_id, before)

    def earlier_finding(self, analysis_id: int, name: str, before: int) -> Row | None:
        """The newest finding of that name which a revision below that one brought this patient, and not in shadow:
        uid, and the revision, issued_at and result of its verdict. None if there is none.
        """
        v = t.verdict.c
        query = (
            sa.select(t.finding.c.uid, v.revision, v.issued_at, v.result)
            .join_from(t.finding, t.verdict)
            .where(v.analysis_id == analysis_id, t.finding.c.object == name)
            .where(v.revision < before, v.revision > self.patient_since(analysis_id, before))
            .where(sa.func.coalesce(v.result["mode"].as_string(), "") != "shadow")
            .order_by(v.revision.desc())
            .limit(1)
        )
        with self.read() as connection:
            return connection.execute(query).mappings().first()

    def was_positive(self, analysis_id: int, before: int) -> bool:
        """Whether a whole study's verdict, of a revision below that one, told this patient's archives of a bleed."""
        v = t.verdict.c
        query = (
            sa.select(v.id)
            .where(v.analysis_id == analysis_id, v.positive)
            .where(v.revision < before, v.revision > self.patient_since(analysis_id, before))
            .where(sa.func.coalesce(v.result["mode"].as_string(), "") != "shadow")
            .where(~sa.func.coalesce(v.result["provisional"].as_boolean(), sa.false()))
        )
        with self.read() as connection:
            return connection.execute(query.limit(1)).first() is not None

    def last_instance_at(self, study_id: int) -> str:
        """When the newest instance of a study was stored."""
        with self.read() as connection:
            return str(connection.scalars(sa.select(t.study.c.last_instance_at).where(t.study.c.id == study_id)).one())

    def begun(self, study_id: int) -> tuple[str, str]:
        """The Study Instance UID of a study, and when its first instance was stored."""
        query = sa.select(t.study.c.study_instance_uid, t.study.c.first_instance_at).where(t.study.c.id == study_id)
        with self.read() as connection:
            uid, first = connection.execute(query).one()
            return str(uid), str(first)

    def issue_verdict(
        self,
        analysis_id: int,
        revision: int,
        verdict: Verdict,
        issued_at: str,
        findings: Sequence[NewFinding],
        *,
        admission: list[dict[str, Any]],
        late: bool,
        untold: str = "",
        board: int | None = None,
    ) -> int:
        """Write a verdict, its findings and their deliveries in one transaction; returns its number.

        Args:
            admission: what the gate said in the end, with what only the pixels showed.
            untold: why nobody is told of it, where somebody should be.
            board: the newest decision of the board that the admission rests on.

        Raises:
            BoardMoved: the board has decided something since then; nothing was written.
        """
        with self._write() as connection:
            # Fewer than before are no decision, but a chain that was cut: for the guard to say.
            if board is not None and self._last_decision(connection) > board:
                raise BoardMoved
            row = self._move_analysis(connection, analysis_id, "issue", reason="", admission=admission)
            verdict_id = self._insert_verdict(connection, row, revision, verdict, issued_at, findings, late=late)
            self._append(
                connection,
                Event.VERDICT_ISSUED,
                row["study_id"],
                package=verdict.package,
                version=verdict.package_version,
                revision=revision,
                positive=verdict.positive,
                probability=round(verdict.probability, 6),
                **({"provisional": True} if verdict.provisional else {}),
            )
            if untold:
                self._append(connection, Event.ALERT_UNDELIVERABLE, row["study_id"], reason=untold)
            if late:
                self._append(connection, Event.STUDY_LATE, row["study_id"], at="verdict")
            return verdict_id

    def withdraw_verdict(
        self,
        analysis_id: int,
        revision: int,
        verdict: Verdict,
        issued_at: str,
        findings: Sequence[NewFinding],
        *,
        inputs: Inputs,
    ) -> int:
        """Take back the verdict on a study that was refused in the end; returns the number of the one that says so.

        Args:
            inputs: what the verdict rested on that is taken back; the analysis may have others by now.
        """
        with self._write() as connection:
            study_id = connection.scalar(sa.select(t.analysis.c.study_id).where(t.analysis.c.id == analysis_id))
            about = {"id": analysis_id, "inputs": [list(one) for one in inputs]}
            verdict_id = self._insert_verdict(connection, about, revision, verdict, issued_at, findings, late=False)
            detail = {"package": verdict.package, "revision": revision, "reason": verdict.withdrawn}
            self._append(connection, Event.VERDICT_WITHDRAWN, study_id, **detail)
            return verdict_id

    def _insert_verdict(
        self,
        connection: sa.Connection,
        analysis: Mapping[Any, Any],
        revision: int,
        verdict: Verdict,
        issued_at: str,
        findings: Sequence[NewFinding],
        *,
        late: bool,
    ) -> int:
        result = connection.execute(
            t.verdict.insert().values(
                analysis_id=analysis["id"],
                revision=revision,
                positive=verdict.positive,
                probability=verdict.probability,
                result=verdict.to_json(),
                inputs=analysis["inputs"],
                issued_at=issued_at,
                late=late,
            )
        )
        verdict_id = int(result.inserted_primary_key[0])  # type: ignore[index]
        query = sa.select(t.analysis.c.study_id).where(t.analysis.c.id == analysis["id"])
        study_id = int(connection.scalars(query).one())
        for new in findings:
            result = connection.execute(
                t.finding.insert().values(
                    verdict_id=verdict_id,
                    object=new.object,
                    uid=new.uid,
                    path=None if new.failed else new.path,
                    attempts=NO_MORE if new.failed else 0,
                    reason=new.failed,
                )
            )
            key = int(result.inserted_primary_key[0])  # type: ignore[index]
            if new.failed:
                self._append(connection, Event.FINDING_FAILED, study_id, finding=key, reason=new.failed)
            for destination in new.destinations:
                self._insert_delivery(
                    connection,
                    {"finding": key, "analysis": analysis["id"], "study": study_id},
                    new.object,
                    destination,
                    new.urgencies.get(destination, new.urgency),
                    issued_at,
                    held_seconds=new.held_seconds,
                    positive=verdict.positive,
                )
        return verdict_id
