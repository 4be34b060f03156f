"""Every query that a stage makes of the ledger."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa

from appliance.events import Event
from appliance.ledger import schema as t
from appliance.ledger.database import Database, LedgerError, later, now, seconds_between
from appliance.ledger.records import Verdict
from appliance.ledger.states import ANALYSIS, DELIVERY, STUDY, step
from dicom_io.header import Header

Row = sa.RowMapping


@dataclass(frozen=True, slots=True)
class StoredInstance:
    """A current instance of a study."""

    sop_instance_uid: str
    digest: str
    association_id: int
    received_at: str
    header: Header


@dataclass(frozen=True, slots=True)
class Arriving:
    """A study that is receiving or reopened, and what is known of the associations that brought it.

    Attributes:
        open_associations: how many of them are still open.
        last_closed_at: when the last of the others ended; None if none has.
        outcomes: how they ended, each way once, sorted: aborted, broken, lost, released.
    """

    id: int
    last_instance_at: str
    open_associations: int
    last_closed_at: str | None
    outcomes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NewFinding:
    """A finding that an issued verdict brings, and where it goes.

    Attributes:
        uid: SOP Instance UID, or MSH-10 of an alert; the same at every try.
        path: file below the findings folder, if it is already rendered.
        destinations: names of destinations.
        urgency: 0 is delivered first.
    """

    object: str
    uid: str
    path: str | None
    destinations: tuple[str, ...]
    urgency: int


class Ledger(Database):
    """The one truth of the box. Safe to share between threads; every service opens its own."""

    # --- intake -----------------------------------------------------------------------------------------

    def open_association(self, calling_ae: str, called_ae: str, address: str) -> int:
        """Record that a peer is connected; returns the number of the association."""
        with self._write() as connection:
            result = connection.execute(
                t.association.insert().values(
                    calling_ae=calling_ae, called_ae=called_ae, address=address, opened_at=now()
                )
            )
            key = int(result.inserted_primary_key[0])  # type: ignore[index]
            self._append(connection, Event.ASSOCIATION_OPENED, None, association=key, calling_ae=calling_ae)
            return key

    def close_association(self, association_id: int, outcome: str) -> None:
        """Record how it ended: released, aborted or broken."""
        with self._write() as connection:
            self._close_association(connection, association_id, outcome)

    def _close_association(self, connection: sa.Connection, association_id: int, outcome: str) -> None:
        connection.execute(
            t.association.update()
            .where(t.association.c.id == association_id, t.association.c.closed_at.is_(None))
            .values(closed_at=now(), outcome=outcome)
        )
        self._append(connection, Event.ASSOCIATION_CLOSED, None, association=association_id, outcome=outcome)

    def abandon_associations(self) -> int:
        """At the start of intake: what an earlier process left open is lost. Returns how many."""
        with self._write() as connection:
            keys = connection.scalars(sa.select(t.association.c.id).where(t.association.c.closed_at.is_(None))).all()
            for key in keys:
                self._close_association(connection, key, "lost")
            return len(keys)

    def record_instance(
        self, header: Header, digest: str, size: int, association_id: int
    ) -> Literal["stored", "duplicate", "conflict"]:
        """Record one instance whose file is already safe on disk; committed and synced on return.

        The same SOP Instance UID with the same bytes changes nothing. With other bytes, both stay and the
        newest counts. A study that was complete is reopened.
        """
        with self._write() as connection:
            study_id, state = self._study_for(connection, header)
            c = t.instance.c
            earlier = connection.execute(
                sa.select(c.digest, c.is_current).where(c.sop_instance_uid == header.sop_instance_uid)
            ).all()
            if any(row.digest == digest and row.is_current for row in earlier):
                self._append(connection, Event.INSTANCE_DUPLICATE, study_id, association=association_id, digest=digest)
                return "duplicate"
            connection.execute(
                t.instance.update().where(c.sop_instance_uid == header.sop_instance_uid).values(is_current=False)
            )
            values = {
                "study_id": study_id,
                "association_id": association_id,
                "series_instance_uid": header.series_instance_uid,
                "header": header.to_json(),
                "size": size,
                "is_current": True,
                "received_at": now(),
            }
            if any(row.digest == digest for row in earlier):
                same = (c.sop_instance_uid == header.sop_instance_uid) & (c.digest == digest)
                connection.execute(t.instance.update().where(same).values(**values))
            else:
                connection.execute(
                    t.instance.insert().values(sop_instance_uid=header.sop_instance_uid, digest=digest, **values)
                )
            following = step(STUDY, state, "arrive")
            connection.execute(
                t.study.update()
                .where(t.study.c.id == study_id)
                .values(state=following, last_instance_at=values["received_at"])
            )
            name = Event.INSTANCE_CONFLICT if earlier else Event.INSTANCE_STORED
            self._append(connection, name, study_id, association=association_id, digest=digest)
            if following == "reopened" and state == "complete":
                self._append(connection, Event.STUDY_REOPENED, study_id, by="an instance after completion")
            return "conflict" if earlier else "stored"

    def _study_for(self, connection: sa.Connection, header: Header) -> tuple[int, str]:
        uid = header.study_instance_uid
        row = connection.execute(
            sa.select(t.study.c.id, t.study.c.state).where(t.study.c.study_instance_uid == uid)
        ).first()
        if row:
            return row.id, row.state
        at = now()
        result = connection.execute(
            t.study.insert().values(
                study_instance_uid=uid,
                state=step(STUDY, "", "arrive"),
                completions=0,
                first_instance_at=at,
                last_instance_at=at,
            )
        )
        return int(result.inserted_primary_key[0]), "receiving"  # type: ignore[index]

    def record_refusal(self, association_id: int, status: int, reason: str, size: int) -> None:
        """Record an instance that was not taken, with the DIMSE status that its sender got."""
        with self._write() as connection:
            self._append(
                connection,
                Event.INSTANCE_REFUSED,
                None,
                association=association_id,
                status=f"0x{status:04X}",
                reason=reason,
                size=size,
            )

    def digests(self) -> set[str]:
        """The digest of every instance, current or not."""
        with self.read() as connection:
            return set(connection.scalars(sa.select(t.instance.c.digest)))

    # --- study ------------------------------------------------------------------------------------------

    def arriving_studies(self) -> list[Arriving]:
        """Studies that are receiving or reopened, oldest first."""
        a, i, s = t.association.c, t.instance.c, t.study.c
        brought = sa.select(i.study_id, i.association_id).distinct().subquery()
        query = (
            sa.select(s.id, s.last_instance_at, a.closed_at, a.outcome)
            .join(brought, brought.c.study_id == s.id)
            .join(t.association, a.id == brought.c.association_id)
            .where(s.state.in_(("receiving", "reopened")))
            .order_by(s.id)
        )
        with self.read() as connection:
            rows = connection.execute(query).all()
        found = []
        for (key, last), group in itertools.groupby(rows, key=lambda row: (row.id, row.last_instance_at)):
            members = list(group)
            closed = [row.closed_at for row in members if row.closed_at is not None]
            outcomes = tuple(sorted({row.outcome for row in members if row.outcome is not None}))
            found.append(Arriving(key, last, len(members) - len(closed), max(closed, default=None), outcomes))
        return found

    def instances(self, study_id: int) -> list[StoredInstance]:
        """The current instances of a study, in the order in which they came."""
        c = t.instance.c
        with self.read() as connection:
            rows = connection.execute(
                sa.select(c.sop_instance_uid, c.digest, c.association_id, c.received_at, c.header)
                .where(c.study_id == study_id, c.is_current)
                .order_by(c.id)
            ).all()
        return [
            StoredInstance(
                row.sop_instance_uid,
                row.digest,
                row.association_id,
                row.received_at,
                Header.from_json(row.header),
            )
            for row in rows
        ]

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

    def undecided_studies(self, packages: Sequence[str]) -> list[tuple[int, str]]:
        """Complete studies that a package has not judged since their last completion: (study, package)."""
        a, s = t.analysis.c, t.study.c
        found: list[tuple[int, str]] = []
        with self.read() as connection:
            for package in packages:
                decided = (
                    sa.select(a.id)
                    .where(a.study_id == s.id, a.package == package, a.completion == s.completions)
                    .exists()
                )
                keys = connection.scalars(sa.select(s.id).where(s.state == "complete", ~decided).order_by(s.id))
                found += [(key, package) for key in keys]
        return sorted(found)

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
        series_instance_uid: str | None,
    ) -> None:
        """Record whether a package may see a complete study, and which series of it."""
        c = t.analysis.c
        with self._write() as connection:
            row = (
                connection.execute(sa.select(t.analysis).where(c.study_id == study_id, c.package == package))
                .mappings()
                .first()
            )
            completion = connection.scalar(sa.select(t.study.c.completions).where(t.study.c.id == study_id))
            values = {
                "state": step(ANALYSIS, row["state"] if row else "", "admit" if admitted else "refuse"),
                "package_version": version,
                "completion": completion,
                "attempts": 0,
                "admission": admission,
                "selection": selection,
                "series_instance_uid": series_instance_uid,
                "reason": reason,
            }
            if row:
                connection.execute(t.analysis.update().where(c.id == row["id"]).values(**values))
            else:
                connection.execute(t.analysis.insert().values(study_id=study_id, package=package, **values))
            name = Event.STUDY_ADMITTED if admitted else Event.STUDY_REFUSED
            self._append(connection, name, study_id, package=package, version=version, reason=reason)

    # --- inference --------------------------------------------------------------------------------------

    def take_analysis(self) -> Row | None:
        """Start the oldest admitted analysis and return its row with ``study_instance_uid``, or None."""
        c = t.analysis.c
        with self._write() as connection:
            row = (
                connection.execute(
                    sa.select(t.analysis, t.study.c.study_instance_uid)
                    .join(t.study)
                    .where(c.state == "admitted")
                    # One that failed goes to the end of the queue, so that it delays no other.
                    .order_by(c.attempts, c.id)
                    .limit(1)
                )
                .mappings()
                .first()
            )
            if row is None:
                return None
            self._move_analysis(connection, row["id"], "start", attempts=row["attempts"] + 1)
            self._append(
                connection,
                Event.ANALYSIS_STARTED,
                row["study_id"],
                package=row["package"],
                attempt=row["attempts"] + 1,
            )
            return row

    def _move_analysis(self, connection: sa.Connection, key: int, event: str, **values: Any) -> Row:
        c = t.analysis.c
        row = connection.execute(sa.select(t.analysis).where(c.id == key)).mappings().one()
        connection.execute(
            t.analysis.update().where(c.id == key).values(state=step(ANALYSIS, row["state"], event), **values)
        )
        return row

    def park_analyses(self) -> int:
        """At the start of the engine: what it was doing when it died is done again. Returns how many."""
        with self._write() as connection:
            keys = connection.scalars(sa.select(t.analysis.c.id).where(t.analysis.c.state == "running")).all()
            for key in keys:
                self._move_analysis(connection, key, "park")
            return len(keys)

    def park_analysis(self, analysis_id: int) -> None:
        """Put back an analysis that could not be worked on now through no fault of its own."""
        with self._write() as connection:
            row = self._move_analysis(connection, analysis_id, "park")
            connection.execute(
                t.analysis.update().where(t.analysis.c.id == analysis_id).values(attempts=row["attempts"] - 1)
            )

    def withhold(self, analysis_id: int, reason: str, admission: list[dict[str, Any]]) -> None:
        """Refuse a study whose pixels showed what its headers did not."""
        with self._write() as connection:
            row = self._move_analysis(connection, analysis_id, "refuse", reason=reason, admission=admission)
            self._append(connection, Event.STUDY_REFUSED, row["study_id"], package=row["package"], reason=reason)

    def fail_analysis(self, analysis_id: int, reason: str, attempts: int) -> bool:
        """Record a failed try; True if it was the last one and the analysis is set aside."""
        with self._write() as connection:
            tried = connection.scalar(sa.select(t.analysis.c.attempts).where(t.analysis.c.id == analysis_id))
            final = tried is not None and tried >= attempts
            row = self._move_analysis(connection, analysis_id, "fail" if final else "retry", reason=reason)
            name = Event.ANALYSIS_FAILED if final else Event.ANALYSIS_ATTEMPT_FAILED
            self._append(connection, name, row["study_id"], package=row["package"], attempt=tried, reason=reason)
            return final

    def last_verdict(self, analysis_id: int) -> Row | None:
        """The newest verdict of an analysis: revision, positive …"""
        with self.read() as connection:
            return (
                connection.execute(
                    sa.select(t.verdict)
                    .where(t.verdict.c.analysis_id == analysis_id)
                    .order_by(t.verdict.c.revision.desc())
                    .limit(1)
                )
                .mappings()
                .first()
            )

    def last_instance_at(self, study_id: int) -> str:
        """When the newest instance of a study was stored."""
        with self.read() as connection:
            return str(connection.scalars(sa.select(t.study.c.last_instance_at).where(t.study.c.id == study_id)).one())

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
    ) -> int:
        """Write a verdict, its findings and their deliveries in one transaction; returns its number.

        Args:
            admission: what the gate said in the end, with what only the pixels showed.
        """
        with self._write() as connection:
            row = self._move_analysis(connection, analysis_id, "issue", reason="", admission=admission)
            result = connection.execute(
                t.verdict.insert().values(
                    analysis_id=analysis_id,
                    revision=revision,
                    positive=verdict.positive,
                    probability=verdict.probability,
                    result=verdict.to_json(),
                    issued_at=issued_at,
                    late=late,
                )
            )
            verdict_id = int(result.inserted_primary_key[0])  # type: ignore[index]
            for new in findings:
                result = connection.execute(
                    t.finding.insert().values(verdict_id=verdict_id, object=new.object, uid=new.uid, path=new.path)
                )
                key = int(result.inserted_primary_key[0])  # type: ignore[index]
                for destination in new.destinations:
                    connection.execute(
                        t.delivery.insert().values(
                            finding_id=key,
                            destination=destination,
                            urgency=new.urgency,
                            state=step(DELIVERY, "", "create"),
                            due_at=issued_at,
                        )
                    )
            self._append(
                connection,
                Event.VERDICT_ISSUED,
                row["study_id"],
                package=verdict.package,
                version=verdict.package_version,
                revision=revision,
                positive=verdict.positive,
                probability=round(verdict.probability, 6),
            )
            if late:
                self._append(connection, Event.STUDY_LATE, row["study_id"], at="verdict")
            return verdict_id

    # --- findings ---------------------------------------------------------------------------------------

    def unrendered_findings(self, attempts: int) -> Sequence[Row]:
        """Findings without a file, most urgent first, with their verdict's and study's columns."""
        f, v, a = t.finding.c, t.verdict.c, t.analysis.c
        with self.read() as connection:
            return (
                connection.execute(
                    sa.select(
                        f.id,
                        f.object,
                        f.uid,
                        f.attempts,
                        v.id.label("verdict_id"),
                        v.revision,
                        v.result,
                        v.issued_at,
                        a.study_id,
                        a.package,
                    )
                    .select_from(t.finding.join(t.verdict).join(t.analysis))
                    .where(f.path.is_(None), f.attempts < attempts)
                    .order_by(f.id)
                )
                .mappings()
                .all()
            )

    def rendered(self, finding_id: int, study_id: int, path: str) -> None:
        """Record that a finding's file is safe on disk; from now on it may be delivered."""
        with self._write() as connection:
            connection.execute(t.finding.update().where(t.finding.c.id == finding_id).values(path=path))
            self._append(connection, Event.FINDING_RENDERED, study_id, finding=finding_id, path=path)

    def render_failed(self, finding_id: int, study_id: int, reason: str, attempts: int) -> None:
        """Record a try at rendering that failed; after so many its deliveries are dead letters."""
        c, d = t.finding.c, t.delivery.c
        with self._write() as connection:
            connection.execute(
                t.finding.update().where(c.id == finding_id).values(attempts=c.attempts + 1, reason=reason)
            )
            self._append(connection, Event.FINDING_FAILED, study_id, finding=finding_id, reason=reason)
            tried = connection.scalar(sa.select(c.attempts).where(c.id == finding_id)) or 0
            if tried < attempts:
                return
            waiting = connection.execute(
                sa.select(d.id, d.destination).where(d.finding_id == finding_id, d.state == "pending")
            ).all()
            for key, destination in waiting:
                said = f"its object could not be made: {reason}"
                self._move_delivery(connection, key, "give_up", reason=said)
                self._append(
                    connection, Event.DELIVERY_DEAD, study_id, delivery=key, destination=destination, reason=said
                )

    # --- delivery ---------------------------------------------------------------------------------------

    def take_delivery(self, destination: str) -> Row | None:
        """Start the most urgent due delivery to a destination: its row with uid, object, path, study_id."""
        d, f, v, a = t.delivery.c, t.finding.c, t.verdict.c, t.analysis.c
        with self._write() as connection:
            row = (
                connection.execute(
                    sa.select(t.delivery, f.uid, f.object, f.path, a.study_id, a.package, v.revision)
                    .select_from(t.delivery.join(t.finding).join(t.verdict).join(t.analysis))
                    .where(
                        d.destination == destination,
                        d.state == "pending",
                        d.due_at <= now(),
                        f.path.is_not(None),
                        ~self._earlier_open(),
                    )
                    .order_by(d.urgency, d.id)
                    .limit(1)
                )
                .mappings()
                .first()
            )
            if row is None:
                return None
            self._move_delivery(
                connection, row["id"], "take", attempts=row["attempts"] + 1, sent_at=row["sent_at"] or now()
            )
            self._append(
                connection,
                Event.DELIVERY_SENDING,
                row["study_id"],
                delivery=row["id"],
                object=row["object"],
                destination=destination,
                attempt=row["attempts"] + 1,
            )
            return row

    @staticmethod
    def _earlier_open() -> sa.Exists:
        """An older delivery of the same object of the same analysis to the same place is still under way.

        A correction must not overtake the alert that it corrects.
        """
        d, f, v = t.delivery.alias("earlier"), t.finding.alias("its"), t.verdict.alias("its_verdict")
        return (
            sa.select(d.c.id)
            .select_from(d.join(f, d.c.finding_id == f.c.id).join(v, f.c.verdict_id == v.c.id))
            .where(
                d.c.id < t.delivery.c.id,
                d.c.destination == t.delivery.c.destination,
                d.c.state.in_(("pending", "sending")),
                f.c.object == t.finding.c.object,
                v.c.analysis_id == t.analysis.c.id,
            )
            .exists()
        )

    def _move_delivery(self, connection: sa.Connection, key: int, event: str, **values: Any) -> None:
        state = connection.scalar(sa.select(t.delivery.c.state).where(t.delivery.c.id == key))
        connection.execute(
            t.delivery.update().where(t.delivery.c.id == key).values(state=step(DELIVERY, state or "", event), **values)
        )

    def settle_delivery(
        self,
        row: Row,
        outcome: Literal["acknowledge", "retry", "reject", "give_up"],
        reason: str = "",
        *,
        wait_seconds: float = 0.0,
        budget_seconds: float | None = None,
    ) -> None:
        """Record what became of a taken delivery; a retry is due after ``wait_seconds``.

        With ``budget_seconds``, an acknowledgement later than that after the study's last instance marks
        the verdict late.
        """
        names = {
            "acknowledge": Event.DELIVERY_ACKNOWLEDGED,
            "retry": Event.DELIVERY_RETRIED,
            "reject": Event.DELIVERY_REJECTED,
            "give_up": Event.DELIVERY_DEAD,
        }
        values: dict[str, Any] = {"reason": reason, "due_at": later(wait_seconds)}
        if outcome == "acknowledge":
            values["acknowledged_at"] = now()
        with self._write() as connection:
            self._move_delivery(connection, row["id"], outcome, **values)
            self._append(
                connection,
                names[outcome],
                row["study_id"],
                delivery=row["id"],
                object=row["object"],
                destination=row["destination"],
                reason=reason,
            )
            if outcome == "acknowledge" and budget_seconds is not None:
                self._mark_late(connection, row, budget_seconds)

    def _mark_late(self, connection: sa.Connection, row: Row, budget_seconds: float) -> None:
        last = connection.scalar(sa.select(t.study.c.last_instance_at).where(t.study.c.id == row["study_id"]))
        v = t.verdict.c
        verdict_id = sa.select(t.finding.c.verdict_id).where(t.finding.c.id == row["finding_id"])
        if last and seconds_between(last, now()) > budget_seconds:
            changed = connection.execute(
                t.verdict.update().where(v.id.in_(verdict_id), v.late.is_(False)).values(late=True)
            )
            if changed.rowcount:
                self._append(connection, Event.STUDY_LATE, row["study_id"], at="acknowledgement")

    def park_deliveries(self, destinations: Sequence[str] | None = None) -> int:
        """At the start of delivery: what was on its way is sent again, under its old name."""
        d = t.delivery.c
        query = sa.select(d.id).where(d.state == "sending")
        if destinations is not None:
            query = query.where(d.destination.in_(destinations))
        with self._write() as connection:
            keys = connection.scalars(query).all()
            for key in keys:
                self._move_delivery(connection, key, "park")
            return len(keys)

    def requeue_delivery(self, delivery_id: int) -> None:
        """Send a dead or rejected delivery once more, because somebody asked for it.

        Raises:
            LedgerError: there is no such delivery, or it is not dead or rejected.
        """
        with self._write() as connection:
            state = connection.scalar(sa.select(t.delivery.c.state).where(t.delivery.c.id == delivery_id))
            if (state, "requeue") not in DELIVERY:
                raise LedgerError(
                    f"it is {state}, not dead or rejected" if state else "there is no such delivery",
                    f"delivery {delivery_id}",
                    "`scanside study UID` lists the deliveries of a study",
                )
            self._move_delivery(connection, delivery_id, "requeue", attempts=0, due_at=now())
            finding = sa.select(t.delivery.c.finding_id).where(t.delivery.c.id == delivery_id).scalar_subquery()
            connection.execute(t.finding.update().where(t.finding.c.id == finding).values(attempts=0))
