"""The ledger's part in the box's self-test: which studies are of one, and that nobody else is told of them.

A real bleed that counts as a test would be an alert that nobody gets. So a study is a test only if its Study Instance
UID was written into this ledger before its first image came (it is drawn at random, and known to nobody but the
process that wrote it), and if every image of it came from this very machine under `SELFTEST_AE`. Whatever of that does
not hold makes it a patient's, at whatever time it shows.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

import sqlalchemy as sa

from appliance.events import Event
from appliance.ledger import schema as t
from appliance.ledger.database import LedgerError, later, now
from appliance.ledger.escalation import SELFTEST, Escalation

SELFTEST_AE = "SCANSIDE-TEST"
"""The title that the self-test calls with. It alone makes no study a test."""
SELFTEST_ALERTS, SELFTEST_OBJECTS = SELFTEST, f"{SELFTEST}-objects"
"""The names of the destinations of a self-test's studies, both on the loopback."""
SELFTEST_DESTINATIONS = (SELFTEST_ALERTS, SELFTEST_OBJECTS)
LONGEST_SECONDS = 900.0
"""A self-test that has not ended by then was killed."""


@dataclass(frozen=True, slots=True)
class Selftest:
    """One study of a self-test.

    Attributes:
        expected: whether it has a bleed.
        alert_port, object_port: of the loopback, where its alert (MLLP) and its objects (DICOM) go.
        ended_at: None while it lasts.
        passed, seconds, reason: how it went; seconds from its last image to all that was expected.
    """

    study_instance_uid: str
    expected: bool
    alert_port: int
    object_port: int
    begun_at: str
    ended_at: str | None
    passed: bool | None
    seconds: float | None
    reason: str


class Selftests(Escalation):
    """The part of the ledger that the self-test works with."""

    def begin_selftest(self, uid: str, *, expected: bool, alert_port: int, object_port: int) -> None:
        """Write down that the study with this UID, of which nothing came yet, will be a test.

        Raises:
            LedgerError: something of it came already.
        """
        with self._write() as connection:
            if connection.scalar(sa.select(t.study.c.id).where(t.study.c.study_instance_uid == uid)) is not None:
                raise LedgerError("this study is here already", uid, "a self-test needs a study of its own")
            connection.execute(
                t.selftest.insert().values(
                    study_instance_uid=uid,
                    expected=expected,
                    alert_port=alert_port,
                    object_port=object_port,
                    begun_at=now(),
                    reason="",
                )
            )

    def selftest(self, study_id: int) -> Selftest | None:
        """The test that a study is of, by all that came of it until now; None if it is a patient's."""
        s = t.study.c
        query = (
            sa.select(t.selftest, s.selftest)
            .join(t.study, s.study_instance_uid == t.selftest.c.study_instance_uid)
            .where(s.id == study_id)
        )
        with self.read() as connection:
            if connection.execute(query).first() is None:
                return None
        with self._write() as connection:
            row = connection.execute(query).mappings().one()
            is_test = self._is_local(connection, study_id, row["begun_at"])
            if is_test != row["selftest"]:
                connection.execute(t.study.update().where(s.id == study_id).values(selftest=is_test))
                name = Event.SELFTEST_RECOGNISED if is_test else Event.SELFTEST_REFUTED
                self._append(connection, name, study_id)
        return _selftest(row) if is_test else None

    @staticmethod
    def _is_local(connection: sa.Connection, study_id: int, begun_at: str) -> bool:
        a, i = t.association.c, t.instance.c
        query = (
            sa.select(a.address, a.calling_ae, i.received_at)
            .distinct()
            .select_from(t.instance.join(t.association))
            .where(i.study_id == study_id)
        )
        rows = connection.execute(query).all()
        return bool(rows) and all(
            row.calling_ae == SELFTEST_AE and is_loopback(row.address) and row.received_at >= begun_at for row in rows
        )

    def was_registered(self, study_id: int) -> bool:
        """Whether a study was announced as a test, whatever it turned out to be."""
        s = t.study.c
        query = sa.select(s.id).join(t.selftest, s.study_instance_uid == t.selftest.c.study_instance_uid)
        with self.read() as connection:
            return connection.execute(query.where(s.id == study_id)).first() is not None

    def end_selftest(self, uid: str, *, passed: bool, seconds: float | None, reason: str = "") -> None:
        """Write down how a test went; what was still to be sent of it is sent no more."""
        c = t.selftest.c
        with self._write() as connection:
            changed = connection.execute(
                t.selftest.update()
                .where(c.study_instance_uid == uid, c.ended_at.is_(None))
                .values(ended_at=now(), passed=passed, seconds=seconds, reason=reason)
            )
            if not changed.rowcount:
                return
            key = connection.scalar(sa.select(t.study.c.id).where(t.study.c.study_instance_uid == uid))
            name = Event.SELFTEST_PASSED if passed else Event.SELFTEST_FAILED
            detail = {"seconds": None if seconds is None else round(seconds, 3), "reason": reason}
            self._append(connection, name, key, **detail)

    def sweep_selftests(self) -> None:
        """End tests whose process is gone, and take back what is still to be sent of any that has ended."""
        c, d, f = t.selftest.c, t.delivery.c, t.finding.c
        lost = sa.select(c.study_instance_uid).where(c.ended_at.is_(None), c.begun_at < later(-LONGEST_SECONDS))
        ended = (
            sa.select(d.id, d.state, d.destination, f.object, t.analysis.c.study_id)
            .select_from(t.delivery.join(t.finding).join(t.verdict).join(t.analysis).join(t.study))
            .join(t.selftest, c.study_instance_uid == t.study.c.study_instance_uid)
            .where(d.destination.in_(SELFTEST_DESTINATIONS), d.state == "pending", c.ended_at.is_not(None))
        )
        with self.read() as connection:
            uids = connection.scalars(lost).all()
            left = connection.execute(ended.limit(1)).first() is not None
        for uid in uids:
            self.end_selftest(uid, passed=False, seconds=None, reason="it did not end")
        if uids or left:
            with self._write() as connection:
                for row in connection.execute(ended).mappings().all():
                    self._move(connection, row, "withdraw", Event.DELIVERY_WITHDRAWN, "the self-test has ended")

    def newest_selftests(self) -> list[Selftest]:
        """The newest ended test of a bleed and of a normal head, as far as there were any."""
        c = t.selftest.c
        found = []
        with self.read() as connection:
            for expected in (True, False):
                query = sa.select(t.selftest).where(c.expected == expected, c.ended_at.is_not(None))
                row = connection.execute(query.order_by(c.id.desc()).limit(1)).mappings().first()
                found += [_selftest(row)] if row else []
        return found


def is_loopback(address: str) -> bool:
    """Whether a peer's address is this machine's loopback."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def of_patients(column: sa.ColumnElement[int]) -> sa.ColumnElement[bool]:
    """That a study's number, or None, is of no self-test."""
    tests = sa.select(t.study.c.id).where(t.study.c.selftest)
    return sa.or_(column.is_(None), column.not_in(tests))


def _selftest(row: sa.RowMapping) -> Selftest:
    return Selftest(
        study_instance_uid=row["study_instance_uid"],
        expected=row["expected"],
        alert_port=row["alert_port"],
        object_port=row["object_port"],
        begun_at=row["begun_at"],
        ended_at=row["ended_at"],
        passed=row["passed"],
        seconds=row["seconds"],
        reason=row["reason"],
    )
