"""The ledger's queries of what the hospital says over HL7, or its modality worklist: orders, merged patients, reports.

A message is written down before it is acknowledged, with all that it changes, in one transaction. Orders are matched to
studies when somebody asks, so it does not matter which of the two came first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import sqlalchemy as sa

from appliance.events import Event
from appliance.ledger import schema as t
from appliance.ledger.database import Database, Row, now

QUERIED = "C-FIND MWL"
"""The kind of what a modality worklist answered."""
LONGEST_CHAIN = 50
"""Merges of merged patients that are followed."""


@dataclass(frozen=True, slots=True)
class Identifier:
    """A patient's identifier with who assigned it (CX-1 and CX-4, HL7 v2.5.1 2.A.14); "" where that is not said."""

    value: str
    namespace: str = ""
    universal: str = ""

    def names(self, other: Identifier) -> bool:
        """The same patient by the same authority, where both say one."""
        return self.value == other.value and self.same_authority(other) is not False

    def same_authority(self, other: Identifier) -> bool | None:
        """Whether one authority assigned both; None where one of them does not say."""
        ours, theirs = self._authorities, other._authorities
        return bool(ours & theirs) if ours and theirs else None

    @property
    def _authorities(self) -> set[str]:
        return {name.casefold() for name in (self.namespace, self.universal) if name}


Patient = tuple[Identifier, ...]
"""All identifiers that a message gives one patient (PID-3)."""


@dataclass(frozen=True, slots=True)
class NewOrder:
    """One imaging order, as a message says it is now.

    Attributes:
        accession, study_instance_uid, placer: its numbers, "" where they are not said.
        cancelled: it is not to be carried out, or no longer.
        birth_date: PID-7, YYYYMMDD; "" where it is not said or less than a day.
        priority: as it stands there; urgent: whether this site counts it as such.
        reason: why the study is asked for.
        onset: what is said of when it began; between onset_earliest and onset_latest (UTC, ISO 8601), "" if unknown.
    """

    accession: str
    study_instance_uid: str
    placer: str
    cancelled: bool
    patient: Patient
    birth_date: str = ""
    priority: str = ""
    urgent: bool = False
    reason: str = ""
    onset: str = ""
    onset_earliest: str = ""
    onset_latest: str = ""


@dataclass(frozen=True, slots=True)
class Update:
    """What is now said of a patient (ADT^A08)."""

    patient: Patient
    birth_date: str


@dataclass(frozen=True, slots=True)
class Merge:
    """One patient's identifier is no longer used; the other stands for both (ADT^A40)."""

    prior: Identifier
    survivor: Identifier


@dataclass(frozen=True, slots=True)
class NewReport:
    """A radiologist's report (ORU^R01): status as OBR-25 has it, the text of its observations."""

    accession: str
    study_instance_uid: str
    patient: Patient
    status: str
    reported_at: str
    text: str


@dataclass(frozen=True, slots=True)
class Scheduled:
    """What a modality worklist says of an order when it is asked.

    It may be older than what HL7 said: it never makes an order less urgent, takes no cancellation back, and takes its
    patient no identifier away. Where it names another patient, both are kept as orders of one number, which contradict
    each other until HL7 says again whose it is.
    """

    order: NewOrder


Change = NewOrder | Scheduled | Update | Merge | NewReport


@dataclass(frozen=True, slots=True)
class NewMessage:
    """A message as it came.

    Attributes:
        peer: the address that it came from.
        sender: MSH-3 and MSH-4; control_id: MSH-10; kind: such as ORM^O01; digest: SHA-256 of what follows MSH.
        code: AA, AE or AR, as it is to be answered; reason: why, for AE and AR.
        changes: what it changes; nothing unless the code is AA.
    """

    peer: str
    sender: str
    control_id: str
    kind: str
    digest: str
    content: bytes
    code: Literal["AA", "AE", "AR"]
    reason: str
    changes: tuple[Change, ...] = ()


Taken = Literal["taken", "duplicate", "reused"]
"""What became of a message: it is new; it was accepted before and changes nothing again; its MSH-10 was used for
another message that was accepted."""


@dataclass(frozen=True, slots=True)
class Order:
    """An order of the ledger, by its number there; the rest as in `NewOrder`.

    Attributes:
        birth_source: where the birth date stands, such as "PID-7 of order 12".
        patient_source: likewise the patient's identifiers.
    """

    id: int
    accession: str
    study_instance_uid: str
    patient: Patient
    cancelled: bool
    birth_date: str
    birth_source: str
    patient_source: str
    priority: str
    urgent: bool
    reason: str
    onset: str
    onset_earliest: str
    onset_latest: str


_BY_SOMEBODY = (t.event.c.name == Event.STUDY_RECONSIDERED, t.event.c.detail["asked"].as_string() == "retry")
_ASKED = sa.select(t.event.c.id, t.event.c.study_id).where(*_BY_SOMEBODY, t.event.c.id > sa.bindparam("last"))


class Orders(Database):
    """The part of the ledger that HL7 messages and orders are in."""

    def take_message(self, new: NewMessage) -> Taken:
        """Write a message down with all that it changes; committed and synced on return.

        One that was accepted before changes nothing again; one that was not is a new try.
        """
        c = t.hl7_message.c
        with self._write() as connection:
            same = sa.select(c.id, c.digest).where(
                c.sender == new.sender, c.control_id == new.control_id, c.control_id != "", c.code == "AA"
            )
            earlier = connection.execute(same.limit(1)).first()
            if earlier is not None and earlier.digest == new.digest:
                self._append(connection, Event.MESSAGE_DUPLICATE, None, message=earlier.id)
                return "duplicate"
            if earlier is not None:
                reason = f"MSH-10 was used for another message, number {earlier.id}"
                new = replace(new, code="AE", reason=reason, changes=())
            self._take(connection, new)
            return "taken" if earlier is None else "reused"

    def _take(self, connection: sa.Connection, new: NewMessage) -> None:
        """Write a message down with what it changes."""
        result = connection.execute(
            t.hl7_message.insert().values(
                received_at=now(),
                peer=new.peer,
                sender=new.sender,
                control_id=new.control_id,
                kind=new.kind,
                digest=new.digest,
                code=new.code,
                reason=new.reason,
                content=new.content,
            )
        )
        key = int(result.inserted_primary_key[0])  # type: ignore[index]
        if new.code == "AA":
            self._append(connection, Event.MESSAGE_TAKEN, None, message=key, kind=new.kind)
        else:
            self._append(connection, Event.MESSAGE_REFUSED, None, message=key, kind=new.kind, code=new.code)
        for change in new.changes:
            match change:
                case NewOrder():
                    self._take_order(connection, key, change)
                case Scheduled():
                    self._take_order(connection, key, change.order, queried=True)
                case Update():
                    self._update_patient(connection, key, change)
                case Merge():
                    self._merge_patients(connection, key, change)
                case NewReport():
                    self._take_report(connection, key, change)

    def _take_order(self, connection: sa.Connection, message: int, new: NewOrder, *, queried: bool = False) -> None:
        c = t.imaging_order.c
        same = c.accession == new.accession
        if not new.accession:
            # Without a number it is known by the study; a message of HL7 must have one.
            same = sa.and_(same, c.study_instance_uid == new.study_instance_uid)
        found = [
            row
            for row in connection.execute(sa.select(t.imaging_order).where(same)).mappings()
            if _one_authority(_patient(row["patient"]), new.patient)
        ]
        values = {
            **asdict(new),
            "patient": [asdict(one) for one in new.patient],
            "message_id": message,
            "birth_message_id": message,
            "changed_at": now(),
        }
        theirs = self._names(connection, new.patient)
        kin = [row for row in found if _one_patient(self._names(connection, _patient(row["patient"])), theirs)]
        # A worklist may not know yet whose order it is now: only HL7 gives it to somebody else.
        row = next(iter(kin if queried else kin or found), None)
        gone: list[int] = []
        if row and not queried and not new.cancelled:  # the newest word of whose it is
            ours = _patient(row["patient"])
            others = (other for other in found if _one_authority(ours, _patient(other["patient"])))
            gone = [other["id"] for other in others if other["id"] != row["id"]]
        if row:  # what a later message does not say stays as it was said before
            silent = [name for name in ("study_instance_uid", "placer") if not getattr(new, name)]
            if row in kin:  # of somebody else nothing holds that was said of a person or a case
                silent += [] if new.reason else ["reason"]
                silent += [] if new.priority else ["priority", "urgent"]
                silent += [] if new.birth_date else ["birth_date", "birth_message_id"]
                silent += [] if new.onset else ["onset", "onset_earliest", "onset_latest"]
            if queried:
                silent += ["priority", "urgent"] if row["urgent"] else []
                silent += ["cancelled"] if row["cancelled"] else []
                before = _patient(row["patient"])
                more = [one for one in new.patient if not any(one.names(other) for other in before)]
                values["patient"] = [asdict(one) for one in (*before, *more)]
            values |= {name: row[name] for name in silent}
        facts = ("patient", "birth_date", "cancelled", "onset_earliest", "onset_latest", "urgent", "study_instance_uid")
        if row is None or gone or any(row[name] != values[name] for name in facts):
            values["facts_message_id"] = message
        if row is None:
            key = int(connection.execute(t.imaging_order.insert().values(**values)).inserted_primary_key[0])  # type: ignore[index]
            # Whose order a worklist contradicts is met by a study that has no other number than this, too.
            unsaid = (c.id.in_([other["id"] for other in found]), c.study_instance_uid == "")
            study = {"study_instance_uid": new.study_instance_uid, "facts_message_id": message}
            connection.execute(t.imaging_order.update().where(*unsaid).values(**study))
        else:
            key = row["id"]
            connection.execute(t.imaging_order.update().where(c.id == key).values(**values))
            connection.execute(t.imaging_order.delete().where(c.id.in_(gone)))
        name = Event.ORDER_CANCELLED if new.cancelled else Event.ORDER_CHANGED if row else Event.ORDER_PLACED
        instead = {"instead_of": gone} if gone else {}
        self._append(connection, name, None, order=key, message=message, urgent=bool(values["urgent"]), **instead)

    def _update_patient(self, connection: sa.Connection, message: int, new: Update) -> None:
        for row in self._orders_of(connection, new.patient):
            if new.birth_date and row["birth_date"] != new.birth_date:
                connection.execute(
                    t.imaging_order.update()
                    .where(t.imaging_order.c.id == row["id"])
                    .values(
                        birth_date=new.birth_date,
                        birth_message_id=message,
                        facts_message_id=message,
                        changed_at=now(),
                    )
                )
                self._append(connection, Event.ORDER_CHANGED, None, order=row["id"], message=message)

    def _merge_patients(self, connection: sa.Connection, message: int, new: Merge) -> None:
        # Before and after: whose orders now name another patient.
        touched = [*self._orders_of(connection, (new.prior,)), *self._orders_of(connection, (new.survivor,))]
        connection.execute(
            t.patient_merge.insert().values(
                message_id=message,
                prior_value=new.prior.value,
                prior_namespace=new.prior.namespace,
                prior_universal=new.prior.universal,
                value=new.survivor.value,
                namespace=new.survivor.namespace,
                universal=new.survivor.universal,
                merged_at=now(),
            )
        )
        self._append(connection, Event.PATIENT_MERGED, None, message=message)
        for key in {row["id"] for row in touched}:
            connection.execute(
                t.imaging_order.update().where(t.imaging_order.c.id == key).values(facts_message_id=message)
            )

    def _take_report(self, connection: sa.Connection, message: int, new: NewReport) -> None:
        values = {**asdict(new), "patient": [asdict(one) for one in new.patient], "message_id": message}
        result = connection.execute(t.radiology_report.insert().values(**values, received_at=now()))
        key = int(result.inserted_primary_key[0])  # type: ignore[index]
        self._append(connection, Event.REPORT_RECEIVED, None, report=key, message=message, status=new.status)

    def _orders_of(self, connection: sa.Connection, patient: Patient) -> list[Row]:
        """The orders of one patient."""
        values = {one.value for one in patient}
        # json_each: each identifier of each order's patient.
        each = sa.func.json_each(t.imaging_order.c.patient).table_valued("value")
        named = sa.select(t.imaging_order.c.id).select_from(t.imaging_order, each)
        named = named.where(sa.func.json_extract(each.c.value, "$.value").in_(values))
        query = sa.select(t.imaging_order).where(t.imaging_order.c.id.in_(named))
        return [
            row
            for row in connection.execute(query).mappings()
            if any(ours.names(theirs) for ours in _patient(row["patient"]) for theirs in patient)
        ]

    # --- studies ----------------------------------------------------------------------------------------

    def orders_for(self, accessions: Iterable[str], study_instance_uid: str) -> tuple[list[Order], int]:
        """The orders that have one of these accession numbers, or name this study, whoever the patient is.

        Returns:
            The orders, and the newest message at that moment.
        """
        c = t.imaging_order.c
        query = sa.select(t.imaging_order).where(_about(c, accessions, study_instance_uid)).order_by(c.id)
        with self.read() as connection:
            heard = _newest(connection)
            rows = connection.execute(query).mappings().all() if heard else []
            c = t.hl7_message.c
            said = {row[name] for row in rows for name in ("message_id", "birth_message_id")}
            kinds = {one.id: one.kind for one in connection.execute(sa.select(c.id, c.kind).where(c.id.in_(said)))}
            return [_order(row, kinds) for row in rows], heard

    def names(self, patient: Patient) -> Patient:
        """Every identifier that stands for one of these after all merges, these among them."""
        with self.read() as connection:
            return self._names(connection, patient)

    @staticmethod
    def _names(connection: sa.Connection, patient: Patient) -> Patient:
        c = t.patient_merge.c
        known = dict.fromkeys(patient)
        waiting = list(patient)
        for _ in range(LONGEST_CHAIN):
            if not waiting:
                break
            values = [one.value for one in waiting]
            query = sa.select(t.patient_merge).where(c.prior_value.in_(values)).order_by(c.id)
            found = []
            for row in connection.execute(query).mappings():
                prior = Identifier(row["prior_value"], row["prior_namespace"], row["prior_universal"])
                if any(one.names(prior) for one in waiting):
                    found.append(Identifier(row["value"], row["namespace"], row["universal"]))
            waiting = [one for one in dict.fromkeys(found) if one not in known]
            known |= dict.fromkeys(waiting)
        return tuple(known)

    def identify_study(self, study_id: int, accessions: Sequence[str], orders: Sequence[int], heard: int) -> None:
        """Note by which accession numbers orders find a study, before the gate decides on it.

        Args:
            orders: those that the gate heeds; each that is new to the study is an event.
            heard: the newest message when they were read.
        """
        c = t.study_accession.c
        with self._write() as connection:
            before = connection.scalars(sa.select(c.orders).where(c.study_id == study_id)).all()
            linked = {key for row in before for key in row}
            connection.execute(t.study_accession.delete().where(c.study_id == study_id))
            for accession in dict.fromkeys(accessions or [""]):
                row = {"study_id": study_id, "accession": accession, "heard": heard, "orders": list(orders)}
                connection.execute(t.study_accession.insert().values(**row))
            for key in orders:
                if key not in linked:
                    self._append(connection, Event.STUDY_ORDERED, study_id, order=key)

    def late_orders(self, since: int) -> tuple[list[tuple[int, int]], int]:
        """Complete studies, each with an order of which the gate has not heard all when it decided.

        Args:
            since: look at what was said after that message only.

        Returns:
            (study, order) …, and the newest message.
        """
        o, i, s = t.imaging_order.c, t.study_accession.c, t.study.c
        by_number = sa.and_(o.accession == i.accession, i.accession != "")
        with self.read() as connection:
            newest = _newest(connection)
            if newest == since:
                return [], newest
            found: dict[int, int] = {}
            joined = sa.join(t.study_accession, t.study, s.id == i.study_id)
            for condition in (by_number, sa.and_(o.study_instance_uid == s.study_instance_uid, i.study_id == s.id)):
                query = (
                    sa.select(i.study_id, o.id)
                    .select_from(joined, t.imaging_order)
                    .where(condition, o.facts_message_id > since, o.facts_message_id > i.heard, s.state == "complete")
                )
                found.update((row[0], row[1]) for row in connection.execute(query))
        return sorted(found.items()), newest

    def reconsider(self, study_id: int, **because: int | str) -> bool:
        """Have the gate asked again about a complete study, and what it admits analysed; whether it is complete.

        Args:
            because: what is noted with it, such as the number of an order.
        """
        with self._write() as connection:
            s = t.study.c
            changed = connection.execute(
                t.study.update()
                .where(s.id == study_id, s.state == "complete")
                .values(completions=s.completions + 1, completed_at=now())
            )
            if changed.rowcount:
                self._append(connection, Event.STUDY_RECONSIDERED, study_id, **because)
            return bool(changed.rowcount)

    def asked_since(self, last: int) -> tuple[set[int], int]:
        """The studies that somebody asked to be decided anew after that event, and the newest such event."""
        with self.read() as connection:
            rows = connection.execute(_ASKED, {"last": last}).all()
        return {row.study_id for row in rows}, max((row.id for row in rows), default=last)

    def asked_again(self, study_id: int, package: str) -> bool:
        """Whether somebody asked for a study to be decided anew, and the package has judged it no more since."""
        e = t.event.c
        mine = sa.select(sa.func.coalesce(sa.func.max(e.id), 0)).where(e.study_id == study_id)
        asked = mine.where(*_BY_SOMEBODY)
        judged = mine.where(e.name == Event.VERDICT_ISSUED, e.detail["package"].as_string() == package)
        with self.read() as connection:
            return bool(connection.scalar(sa.select(asked.scalar_subquery() > judged.scalar_subquery())))

    def report_rows(self, accessions: Iterable[str], study_instance_uid: str) -> list[dict[str, Any]]:
        """The radiologists' reports with one of these accession numbers, or that name this study, oldest first."""
        c = t.radiology_report.c
        query = sa.select(t.radiology_report).where(_about(c, accessions, study_instance_uid))
        with self.read() as connection:
            return [dict(row) for row in connection.execute(query.order_by(c.id)).mappings()]

    # --- messages ---------------------------------------------------------------------------------------

    def messages(self, limit: int, *, refused: bool = False) -> list[dict[str, Any]]:
        """The newest messages, without their content."""
        c = t.hl7_message.c
        query = sa.select(*(one for one in c if one.name != "content")).order_by(c.id.desc()).limit(limit)
        if refused:
            query = query.where(c.code != "AA")
        with self.read() as connection:
            return [dict(row) for row in connection.execute(query).mappings()]

    def message_content(self, key: int) -> bytes | None:
        """A message as it came; None if there is none of that number, or its content was removed."""
        with self.read() as connection:
            return connection.scalar(sa.select(t.hl7_message.c.content).where(t.hl7_message.c.id == key))

    def empty_messages(self, before: str) -> int:
        """Remove the content of the messages that came before that time; returns of how many."""
        c = t.hl7_message.c
        with self._write() as connection:
            emptied = connection.execute(
                t.hl7_message.update().where(c.received_at < before, c.content.is_not(None)).values(content=None)
            )
            if emptied.rowcount:
                self._append(connection, Event.MESSAGES_EMPTIED, None, messages=emptied.rowcount, before=before)
            return int(emptied.rowcount)


def _newest(connection: sa.Connection) -> int:
    """The number of the newest message; 0 if there is none."""
    return int(connection.scalar(sa.select(sa.func.max(t.hl7_message.c.id))) or 0)


def _about(columns: Any, accessions: Iterable[str], study_instance_uid: str) -> sa.ColumnElement[bool]:
    """By accession number, or by the study itself."""
    by_study = sa.and_(columns.study_instance_uid == study_instance_uid, columns.study_instance_uid != "")
    return sa.or_(columns.accession.in_([one for one in accessions if one]), by_study)


def _patient(identifiers: Sequence[dict[str, str]]) -> Patient:
    return tuple(Identifier(**one) for one in identifiers)


def _one_patient(ours: Patient, theirs: Patient) -> bool:
    """Whether two patients share an identifier."""
    return any(one.names(other) for one in ours for other in theirs)


def _one_authority(ours: Patient, theirs: Patient) -> bool:
    """Whether two patients may be of one hospital: not if every authority of the one is another than the other's."""
    return not (ours and theirs) or any(one.same_authority(other) is not False for one in ours for other in theirs)


def _order(row: Row, kinds: Mapping[int, str]) -> Order:
    """An order, with the kinds of the messages that it is of."""
    kind, birth = kinds.get(row["message_id"], ""), kinds.get(row["birth_message_id"], "")
    where = "Patient's Birth Date" if birth == QUERIED else "PID-7"
    by = f" by {birth}" if birth == "ADT^A08" else ""
    return Order(
        birth_source=f"{where} of order {row['id']}{by}" if row["birth_date"] else "",
        patient_source=f"{'Patient ID' if kind == QUERIED else 'PID-3'} of order {row['id']}",
        patient=_patient(row["patient"]),
        **{
            name: row[name]
            for name in (
                "id", "accession", "study_instance_uid", "cancelled", "birth_date", "priority", "urgent", "reason",
                "onset", "onset_earliest", "onset_latest",
            )
        },
    )  # fmt: skip
