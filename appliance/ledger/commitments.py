"""The ledger's queries of storage commitment."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa

from appliance.events import Event
from appliance.ledger import schema as t
from appliance.ledger.database import Database, Row, later, now
from appliance.ledger.states import COMMITMENT, step
from dicom_io.commitment import CommitmentRequest, Failure, Reference

LEASE_SECONDS = 600.0
"""A try takes less, whatever the peer does: it is bounded by time-outs. One that is older was forgotten, because its
outcome could not be written down."""

_UIDS_A_QUERY = 500  # SQLite bounds the variables of a statement


@dataclass(frozen=True, slots=True)
class Held:
    """A current instance: what the ledger says of its file."""

    sop_class_uid: str
    digest: str
    size: int


def requested(row: Row) -> CommitmentRequest:
    """The request of a commitment's row."""
    references = tuple(Reference(class_uid, instance_uid) for class_uid, instance_uid in row["request"])
    return CommitmentRequest(row["transaction_uid"], references)


def no_address(calling_ae: str) -> str:
    """Why a report cannot be sent on an association of ours."""
    return f"no address configured for AE {calling_ae}"


class Commitments(Database):
    """The part of the ledger that storage commitment works with."""

    def request_commitment(
        self, request: CommitmentRequest, calling_ae: str, called_ae: str, address: str, *, due_in: float
    ) -> int | None:
        """Write down a request; its report is due on a new association after so many seconds.

        The same transaction of the same peer again is the same request, and is answered once more if it was settled.

        Returns:
            the number of the request; None, and nothing changes, if the peer used that Transaction UID for other
            instances before.
        """
        c = t.commitment.c
        asked = [[one.sop_class_uid, one.sop_instance_uid] for one in request.references]
        with self._write() as connection:
            row = (
                connection.execute(
                    sa.select(t.commitment).where(
                        c.calling_ae == calling_ae, c.transaction_uid == request.transaction_uid
                    )
                )
                .mappings()
                .first()
            )
            if row is not None and sorted(row["request"]) != sorted(asked):
                self._append(
                    connection,
                    Event.COMMITMENT_REFUSED,
                    None,
                    commitment=row["id"],
                    calling_ae=calling_ae,
                    reason="its Transaction UID was used for other instances",
                )
                return None
            before = row["state"] if row else ""
            values: dict[str, Any] = {
                "state": step(COMMITMENT, before, "request"),
                "called_ae": called_ae,
                "address": address,
            }
            if before != "reporting":
                values |= {"attempts": 0, "due_at": later(due_in), "reason": ""}
            if row is None:
                result = connection.execute(
                    t.commitment.insert().values(
                        transaction_uid=request.transaction_uid,
                        calling_ae=calling_ae,
                        request=asked,
                        requested_at=now(),
                        **values,
                    )
                )
                key = int(result.inserted_primary_key[0])  # type: ignore[index]
            else:
                key = row["id"]
                connection.execute(t.commitment.update().where(c.id == key).values(**values))
            self._append(
                connection,
                Event.COMMITMENT_REQUESTED,
                None,
                commitment=key,
                calling_ae=calling_ae,
                instances=len(asked),
                before=before,
            )
            return key

    def take_commitment(self, key: int) -> Row | None:
        """Start a try at that report on its own association, due or not; None if it is under way or settled."""
        c = t.commitment.c
        return self._take_commitment((c.id == key) & (c.state == "requested"), "its own association")

    def commitment_state(self, key: int) -> str:
        """What has become of a request, see `appliance.ledger.states.COMMITMENT`."""
        with self.read() as connection:
            return str(self._commitment(connection, key)["state"])

    def take_due_commitment(self, calling_ae: str, longest_pause: float = 300.0) -> Row | None:
        """Start a try at the report that has been due longest to a peer, on a new association.

        One whose try began more than `LEASE_SECONDS` ago and was never settled is due again.

        Args:
            longest_pause: none waits longer than so many seconds for its next try, even if the clock was set back.
        """
        c = t.commitment.c
        is_due = c.due_at <= now()
        waits = (c.state == "requested") & (is_due | (c.due_at > later(longest_pause)))
        forgotten = (c.state == "reporting") & is_due
        return self._take_commitment((c.calling_ae == calling_ae) & (waits | forgotten), "a new association")

    def _take_commitment(self, condition: sa.ColumnElement[bool], way: str) -> Row | None:
        c = t.commitment.c
        query = sa.select(t.commitment).where(condition).order_by(c.due_at, c.id).limit(1)
        with self.read() as connection:
            if connection.execute(query.with_only_columns(c.id)).first() is None:
                return None  # most often; and a writer holds up whoever stores an instance
        with self._write() as connection:
            row = connection.execute(query).mappings().first()
            if row is None:
                return None
            if row["state"] == "reporting":
                self._move_commitment(connection, row, "park", Event.COMMITMENT_PARKED, {})
                row = self._commitment(connection, row["id"])
            attempt = row["attempts"] + 1
            values = {"attempts": attempt, "due_at": later(LEASE_SECONDS)}
            self._move_commitment(connection, row, "take", Event.COMMITMENT_REPORTING, values, attempt=attempt, on=way)
            return row

    def settle_commitment(
        self,
        row: Row,
        outcome: Literal["acknowledge", "retry", "give_up"],
        reason: str = "",
        *,
        wait_seconds: float = 0.0,
        failed: Sequence[Failure] = (),
    ) -> bool:
        """Record what became of a try; a retry is due after ``wait_seconds``.

        Args:
            row: what the try began with.
            failed: of a report that was acknowledged, the instances that it did not commit to.

        Returns:
            False, and nothing changes, if the try took so long that another one was begun since.
        """
        names = {
            "acknowledge": Event.COMMITMENT_REPORTED,
            "retry": Event.COMMITMENT_RETRIED,
            "give_up": Event.COMMITMENT_DEAD,
        }
        values: dict[str, Any] = {"reason": reason}
        detail: dict[str, Any] = {"reason": reason}
        if outcome == "acknowledge":
            values |= {"acknowledged_at": now(), "failed": [[f.reference.sop_instance_uid, f.reason] for f in failed]}
            detail |= {"failed": len(failed)}
        elif outcome == "retry":
            values |= {"due_at": later(wait_seconds)}
        with self._write() as connection:
            current = self._commitment(connection, row["id"])
            if (current["state"], current["attempts"]) != ("reporting", row["attempts"] + 1):
                return False
            self._move_commitment(connection, current, outcome, names[outcome], values, **detail)
            return True

    def leave_commitments(self, keys: Iterable[int], configured: Collection[str]) -> int:
        """The association that brought these requests has ended: what is still to be reported goes another way.

        It is due at once, or after the pause that it is in, where the peer's address is configured, and dead where it
        is not. One that is under way or settled stays as it is.

        Returns:
            how many go another way.
        """
        elsewhere = 0
        with self._write() as connection:
            for key in keys:
                row = self._commitment(connection, key)
                if row["state"] != "requested":
                    continue
                if row["calling_ae"] not in configured:
                    self._abandon_commitment(connection, row)
                    continue
                if not row["attempts"]:  # else it waits for its next try
                    self._make_due(connection, key)
                elsewhere += 1
        return elsewhere

    @staticmethod
    def _make_due(connection: sa.Connection, key: int) -> None:
        connection.execute(t.commitment.update().where(t.commitment.c.id == key).values(due_at=now()))

    def park_commitments(self, configured: Collection[str]) -> int:
        """At the start of intake: what was on its way is sent again; what has no way any more is dead.

        Args:
            configured: AE titles of the peers whose address is configured.

        Returns:
            how many are taken up again.
        """
        query = sa.select(t.commitment).where(t.commitment.c.state.in_(("requested", "reporting")))
        parked = 0
        with self._write() as connection:
            for row in connection.execute(query.order_by(t.commitment.c.id)).mappings().all():
                if row["calling_ae"] not in configured:
                    self._abandon_commitment(connection, row)
                    continue
                if row["state"] == "reporting":
                    self._move_commitment(connection, row, "park", Event.COMMITMENT_PARKED, {"due_at": now()})
                elif not row["attempts"]:
                    self._make_due(connection, row["id"])
                parked += 1
        return parked

    def current_instances(self, sop_instance_uids: Sequence[str]) -> dict[str, list[Held]]:
        """The current instances with these UIDs, in whatever study; nothing where there is none.

        One that retention has removed is none.
        """
        c = t.instance.c
        there = c.is_current & c.removed_at.is_(None)
        columns = (c.sop_instance_uid, c.digest, c.size, c.header["sop_class_uid"].as_string().label("sop_class_uid"))
        found: dict[str, list[Held]] = {}
        with self.read() as connection:
            for start in range(0, len(sop_instance_uids), _UIDS_A_QUERY):
                some = sop_instance_uids[start : start + _UIDS_A_QUERY]
                for row in connection.execute(sa.select(*columns).where(c.sop_instance_uid.in_(some), there)):
                    found.setdefault(row.sop_instance_uid, []).append(Held(row.sop_class_uid, row.digest, row.size))
        return found

    def commitments(self) -> Sequence[Row]:
        """Every request for storage commitment, oldest first."""
        with self.read() as connection:
            return connection.execute(sa.select(t.commitment).order_by(t.commitment.c.id)).mappings().all()

    @staticmethod
    def _commitment(connection: sa.Connection, key: int) -> Row:
        return connection.execute(sa.select(t.commitment).where(t.commitment.c.id == key)).mappings().one()

    def _abandon_commitment(self, connection: sa.Connection, row: Row) -> None:
        reason = no_address(row["calling_ae"])
        self._move_commitment(connection, row, "give_up", Event.COMMITMENT_DEAD, {"reason": reason}, reason=reason)

    def _move_commitment(
        self, connection: sa.Connection, row: Row, event: str, name: Event, values: dict[str, Any], **detail: Any
    ) -> None:
        connection.execute(
            t.commitment.update()
            .where(t.commitment.c.id == row["id"])
            .values(state=step(COMMITMENT, row["state"], event), **values)
        )
        self._append(connection, name, None, commitment=row["id"], calling_ae=row["calling_ae"], **detail)
