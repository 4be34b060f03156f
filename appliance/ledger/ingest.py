"""What intake writes into the ledger: associations, instances and refusals."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa

from appliance.events import Event
from appliance.ledger import schema as t
from appliance.ledger.database import Chain, Database, Insert, Statement, now
from appliance.ledger.states import ANALYSIS, STUDY, step
from dicom_io.header import Header


@dataclass(frozen=True, slots=True)
class NewInstance:
    """An instance whose file is safe in the spool: ``size`` bytes under its ``digest``.

    Attributes:
        mends: no whole file lay there before; if there is a row already, that one was lost or damaged.
    """

    header: Header
    digest: str
    size: int
    association_id: int
    mends: bool = False


Stored = Literal["stored", "duplicate", "conflict"]

# What an instance costs before its sender is answered: compiled once.
_i = t.instance.c
_s = t.study.c
_STUDY = Statement(
    sa.select(_s.id, _s.state, _s.removed_at).where(_s.study_instance_uid == sa.bindparam("study_instance_uid"))
)
_INSERT_STUDY = Statement(
    sa.insert(t.study).values(
        study_instance_uid=sa.bindparam("study_instance_uid"),
        state=sa.bindparam("state"),
        completions=sa.bindparam("completions"),
        first_instance_at=sa.bindparam("at"),
        last_instance_at=sa.bindparam("at"),
    )
)
# By the UID alone: with the study beside it SQLite may choose the study's index, and read all of it for each instance.
_EARLIER = Statement(
    sa.select(_i.id, _i.study_id, _i.digest, _i.is_current & _i.removed_at.is_(None)).where(
        _i.sop_instance_uid == sa.bindparam("sop_instance_uid")
    )
)
_SUPERSEDE = Statement(sa.update(t.instance).where(_i.id == sa.bindparam("row")).values(is_current=sa.false()))
_WRITTEN = ("association_id", "series_instance_uid", "header", "size", "is_current", "received_at", "removed_at")
_INSERT_INSTANCES = Insert(t.instance, ("study_id", "sop_instance_uid", "digest", *_WRITTEN))
_RESTORE = Statement(
    sa.update(t.instance).where(_i.id == sa.bindparam("row")).values({name: sa.bindparam(name) for name in _WRITTEN})
)
_UPDATE_STUDY = Statement(
    sa.update(t.study)
    .where(_s.id == sa.bindparam("id"))
    .values(state=sa.bindparam("state"), last_instance_at=sa.bindparam("last_instance_at"), removed_at=sa.null())
)
# To name the others would write their indexes anew, changed or not.
_TOUCH_STUDY = Statement(
    sa.update(t.study).where(_s.id == sa.bindparam("id")).values(last_instance_at=sa.bindparam("last_instance_at"))
)
_a = t.analysis.c
_FAILED = Statement(
    sa.select(_a.id, _a.package)
    .where(_a.study_id == sa.bindparam("study"), _a.state == sa.bindparam("state"))
    .order_by(_a.id)
)
_REQUEUE = Statement(
    sa.update(t.analysis)
    .where(_a.id == sa.bindparam("row"))
    .values({name: sa.bindparam(name) for name in ("state", "attempts", "due_at")})
)
_HOLD = Statement(sa.update(t.study).where(_s.id == sa.bindparam("study")).values(released_at=sa.null()))
_GONE = Statement(
    sa.select(_i.id).where(_i.study_id == sa.bindparam("study"), _i.is_current, _i.removed_at.is_not(None))
)
_DIGESTS_A_QUERY = 500


def requeue_failed(connection: sqlite3.Connection, events: Chain, study_id: int) -> int:
    """Make the failed analyses of a study pending again, in the transaction of that connection. Returns how many."""
    failed = _FAILED.all(connection, study=study_id, state="failed")
    state = step(ANALYSIS, "failed", "requeue")
    for key, package in failed:
        _REQUEUE.run(connection, row=key, state=state, attempts=0, due_at=now())
        events.add(Event.ANALYSIS_REQUEUED, study_id, {"package": package})
    if failed:
        # If it fails again somebody has to see it again.
        _HOLD.run(connection, study=study_id)
    return len(failed)


class Ingest(Database):
    """The part of the ledger that intake writes."""

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

    def close_association(self, association_id: int, outcome: str, stores: int | None = None) -> None:
        """Record how it ended: released, aborted or broken.

        Args:
            stores: how many C-STORE requests came whole over it, for the account of the day.
        """
        counted = {} if stores is None else {"stores": stores}
        with self._write() as connection:
            self._close_association(connection, association_id, outcome, **counted)

    def _close_association(self, connection: sa.Connection, association_id: int, outcome: str, **detail: int) -> None:
        connection.execute(
            t.association.update()
            .where(t.association.c.id == association_id, t.association.c.closed_at.is_(None))
            .values(closed_at=now(), outcome=outcome)
        )
        self._append(connection, Event.ASSOCIATION_CLOSED, None, association=association_id, outcome=outcome, **detail)

    def abandon_associations(self) -> int:
        """At the start of intake: what an earlier process left open is lost. Returns how many."""
        with self._write() as connection:
            keys = connection.scalars(sa.select(t.association.c.id).where(t.association.c.closed_at.is_(None))).all()
            for key in keys:
                self._close_association(connection, key, "lost")
            return len(keys)

    def record_instances(self, arrived: Sequence[NewInstance]) -> list[Stored]:
        """Record instances whose files are already safe on disk; committed and synced on return, all or none.

        The same SOP Instance UID with the same bytes changes nothing; but where its file had been lost or damaged, the
        failed analyses of its study are pending again. With other bytes, both stay and the newest counts. A study that
        was complete is reopened.
        """
        with self._write_fast() as connection:
            batch = _Batch(connection)
            outcomes = [batch.record(new) for new in arrived]
            batch.finish()
            return outcomes

    def requeue_restored(self, digests: Collection[str]) -> int:
        """At the start of intake: files that an earlier process may have mended without coming to write it down.

        Returns how many failed analyses of their studies are pending again.
        """
        wanted = list(digests)
        with self._write() as connection:
            studies = {
                study
                for start in range(0, len(wanted), _DIGESTS_A_QUERY)
                for study in connection.scalars(
                    sa.select(_i.study_id).where(_i.digest.in_(wanted[start : start + _DIGESTS_A_QUERY]))
                )
            }
            raw: Any = connection.connection.driver_connection
            events = Chain(raw)
            count = sum(requeue_failed(raw, events, one) for one in sorted(studies) if not _GONE.all(raw, study=one))
            events.flush()
            return count

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
        """The digest of every instance, current or not, but not of those that retention removed."""
        with self.read() as connection:
            return set(connection.scalars(sa.select(t.instance.c.digest).where(t.instance.c.removed_at.is_(None))))


@dataclass(slots=True)
class _Study:
    id: int
    state: str
    removed_at: str | None = None
    touched: bool = False  # what else is written of it is only when its last instance came
    changed: bool = False


class _Batch:
    """The instances of one transaction: each study is looked up and written once, what is new is written together."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._at = now()
        self._studies: dict[str, _Study] = {}
        self._events = Chain(connection)
        self._new: dict[str, dict[str, Any]] = {}  # by SOP Instance UID, not written yet
        self._mended: set[int] = set()  # studies of which a file was lost or damaged

    def record(self, new: NewInstance) -> Stored:
        header, connection = new.header, self._connection
        study, uid = self._study(header.study_instance_uid), header.sop_instance_uid
        if uid in self._new:
            self._flush()
        # Within the study: a UID that another study uses too must not take the image from that one.
        earlier = [row for row in _EARLIER.all(connection, sop_instance_uid=uid) if row[1] == study.id]
        detail = {"association": new.association_id, "digest": new.digest}
        same = [(row, counts) for row, _, digest, counts in earlier if digest == new.digest]
        if any(counts for _, counts in same):
            self._events.add(Event.INSTANCE_DUPLICATE, study.id, detail)
            if new.mends:
                self._events.add(Event.INSTANCE_RESTORED, study.id, detail)
                self._mended.add(study.id)
            return "duplicate"
        values = {
            "study_id": study.id,
            "association_id": new.association_id,
            "series_instance_uid": header.series_instance_uid,
            "header": json.dumps(header.to_json()),
            "size": new.size,
            "is_current": True,
            "received_at": self._at,
            "removed_at": None,
            "sop_instance_uid": uid,
            "digest": new.digest,
        }
        for row, *_ in earlier:
            _SUPERSEDE.run(connection, row=row)
        if same:
            _RESTORE.run(connection, row=same[0][0], **values)
        else:
            self._new[uid] = values
        outcome: Stored = "conflict" if len(earlier) > len(same) else "stored"
        name = Event.INSTANCE_CONFLICT if outcome == "conflict" else Event.INSTANCE_STORED
        self._events.add(name, study.id, detail)
        following = step(STUDY, study.state, "arrive")
        if following == "reopened" and study.state == "complete":
            self._events.add(Event.STUDY_REOPENED, study.id, {"by": "an instance after completion"})
        study.touched = True
        study.changed |= following != study.state or study.removed_at is not None
        study.state = following
        return outcome

    def finish(self) -> None:
        """Write what was kept back, and the studies that got something."""
        self._flush()
        for key in sorted(self._mended):
            if not _GONE.all(self._connection, study=key):
                requeue_failed(self._connection, self._events, key)
        self._events.flush()
        for study in self._studies.values():
            if study.changed:
                _UPDATE_STUDY.run(self._connection, id=study.id, state=study.state, last_instance_at=self._at)
            elif study.touched:
                _TOUCH_STUDY.run(self._connection, id=study.id, last_instance_at=self._at)

    def _flush(self) -> None:
        _INSERT_INSTANCES.run(self._connection, list(self._new.values()))
        self._new = {}

    def _study(self, uid: str) -> _Study:
        found = self._studies.get(uid)
        if found is None:
            rows = _STUDY.all(self._connection, study_instance_uid=uid)
            found = self._studies[uid] = _Study(*rows[0]) if rows else self._new_study(uid)
        return found

    def _new_study(self, uid: str) -> _Study:
        state = step(STUDY, "", "arrive")
        key = _INSERT_STUDY.run(self._connection, study_instance_uid=uid, state=state, completions=0, at=self._at)
        return _Study(key, state)
