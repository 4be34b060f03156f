"""Stages that take longer than they may, written down while they still do."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import sqlalchemy as sa

from appliance.events import Event
from appliance.ledger import schema as t
from appliance.ledger.database import Database, has_waited, later, now, waited

FORGET_SECONDS = 2 * 86_400.0
"""So long after its last instance a study whose analysis was set aside counts as late."""


@dataclass(frozen=True, slots=True)
class Overdue:
    """A stage of a study that is past its deadline.

    Attributes:
        stage: completion, analysis, or alert.
        subject: what is waited for: "" of completion, the package of an analysis, the destination of an alert.
        since: when the stage began, UTC.
    """

    study_id: int
    stage: str
    subject: str
    since: str


class Deadlines(Database):
    """The part of the ledger that holds stages against their deadlines."""

    def mark_overdue(
        self,
        packages: Collection[str],
        destinations: Collection[str],
        *,
        completion: float,
        analysis: float,
        alert: float,
    ) -> list[Overdue]:
        """Append an event for each stage that is past its deadline and has none yet; returns those.

        A stage that begins anew, as when a study is reopened, may be overdue once more.

        Args:
            packages: those that are configured.
            destinations: those that are configured.
            completion: seconds from the last instance until the study is complete.
            analysis: from there until its verdict or refusal.
            alert: from the verdict until each destination has acknowledged the alert.
        """
        at = now()
        # By destination, as the index has it: there are many more deliveries than open ones.
        alerted = _ALERTED.where(_D.destination.in_(destinations))
        undecided = [(analysis, _undecided(package)) for package in packages]
        with self.read() as connection:
            found = [
                one
                for limit, query in ((completion, _ARRIVING), (analysis, _ANALYSED), *undecided, (alert, alerted))
                for one in (Overdue(*row) for row in connection.execute(query))
                if waited(one.since, at) > limit
            ]
        if not found:
            return []
        with self._write() as connection:
            known = self._marked(connection, {one.study_id for one in found})
            new = [one for one in found if one not in known]
            for one in new:
                self._append(
                    connection, Event.STAGE_OVERDUE, one.study_id, stage=one.stage, subject=one.subject, since=one.since
                )
        return new

    def late_studies(self, packages: Collection[str], seconds: float) -> dict[str, str]:
        """Studies without an answer so long after their last instance: Study Instance UID → when that came.

        One whose analysis was set aside has none, until somebody has it tried again; of old ones nobody waits for it.

        Args:
            packages: those that are configured.
        """
        failed = sa.select(_S.id).select_from(t.analysis.join(t.study)).where(
            _A.state == "failed", _A.completion == _S.completions, ~_S.selftest,
            _S.last_instance_at > later(-FORGET_SECONDS),
        )  # fmt: skip
        waiting = (_ARRIVING, _ANALYSED, *map(_undecided, packages))
        with self.read() as connection:
            keys = {row[0] for query in (*waiting, failed) for row in connection.execute(query)}
            query = sa.select(_S.study_instance_uid, _S.last_instance_at).where(
                _S.id.in_(keys), has_waited(_S.last_instance_at, seconds)
            )
            return {row.study_instance_uid: row.last_instance_at for row in connection.execute(query)}

    def mark_degraded(self, seconds: float, plan: str) -> tuple[list[Overdue], list[Overdue]]:
        """Append an event for each analysis that has been due for so long, so that something is left out for it.

        Args:
            plan: what is left out.

        Returns:
            All of them, and those that had no such event yet.
        """
        at = now()
        with self.read() as connection:
            rows = [Overdue(*row) for row in connection.execute(_ANALYSED)]
        found = [one for one in rows if waited(one.since, at) > seconds]
        if not found:
            return [], []
        with self._write() as connection:
            known = self._marked(connection, {one.study_id for one in found}, Event.STAGE_DEGRADED)
            new = [one for one in found if one not in known]
            for one in new:
                detail = {"stage": one.stage, "subject": one.subject, "since": one.since, "plan": plan}
                self._append(connection, Event.STAGE_DEGRADED, one.study_id, **detail)
        return found, new

    @staticmethod
    def _marked(connection: sa.Connection, studies: set[int], event: Event = Event.STAGE_OVERDUE) -> set[Overdue]:
        c = t.event.c
        query = sa.select(c.study_id, c.detail).where(c.name == event, c.study_id.in_(studies))
        return {
            Overdue(row.study_id, row.detail["stage"], row.detail["subject"], row.detail["since"])
            for row in connection.execute(query)
        }


_S, _A, _D, _F, _V = t.study.c, t.analysis.c, t.delivery.c, t.finding.c, t.verdict.c
_ARRIVING = sa.select(_S.id, sa.literal("completion"), sa.literal(""), _S.last_instance_at).where(
    _S.state.in_(("receiving", "reopened")), ~_S.selftest
)
_ANALYSED = (
    sa.select(_S.id, sa.literal("analysis"), _A.package, _S.completed_at)
    .select_from(t.analysis.join(t.study))
    .where(_A.state.in_(("admitted", "running")), _S.state == "complete", ~_S.selftest)
)


def _undecided(package: str) -> sa.Select[tuple[int, str, str, str]]:
    """Complete studies on which the gate has not decided: whoever should, may fail at it each time."""
    decided = sa.exists().where(_A.study_id == _S.id, _A.package == package, _A.completion == _S.completions)
    return sa.select(_S.id, sa.literal("analysis"), sa.literal(package), _S.completed_at).where(
        _S.state == "complete", _S.removed_at.is_(None), ~_S.selftest, ~decided
    )


_ALERTED = (
    sa.select(_A.study_id, sa.literal("alert"), _D.destination, _V.issued_at)
    .select_from(t.delivery.join(t.finding).join(t.verdict).join(t.analysis))
    .where(_D.state.in_(("pending", "sending")), _F.object.startswith("alert."))
)
