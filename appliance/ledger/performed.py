"""The ledger's queries of what modalities and archives say that there is of a study."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa

from appliance.events import Event
from appliance.ledger import schema as t
from appliance.ledger.database import Database, Row, now
from appliance.ledger.states import PERFORMED, step
from dicom_io.performed import COMPLETED, DISCONTINUED, IN_PROGRESS, Availability, Named, NewStep, StepChange

MAXIMUM_NAMED = 50_000
"""More instances of one study are not written down: the engine reads them at each look at it."""

Refused = Literal["", "duplicate", "unknown", "ended", "no series", "too many"]
"""Why a request changes nothing; '' if it was written down."""

_EVENTS = {
    IN_PROGRESS: ("update", Event.STEP_UPDATED),
    COMPLETED: ("complete", Event.STEP_COMPLETED),
    DISCONTINUED: ("discontinue", Event.STEP_DISCONTINUED),
}


@dataclass(frozen=True, slots=True)
class Said:
    """What was said of one study.

    Attributes:
        steps: state (see `appliance.ledger.states.PERFORMED`) → how many there are.
        expected: Series Instance UID → SOP Instance UIDs that completed steps and notifications name.
    """

    steps: dict[str, int]
    expected: Mapping[str, frozenset[str]]


NOTHING_SAID = Said({}, {})

_SAID_OF = (
    sa.select(t.performed.c.state, t.performed.c.series)
    .join(t.study, t.study.c.study_instance_uid == t.performed.c.study_instance_uid)
    .where(t.study.c.id == sa.bindparam("study"))
)


class Performed(Database):
    """The part of the ledger that performed procedure steps and availability notifications are in."""

    def create_performed(self, request: NewStep | Availability, calling_ae: str) -> Refused:
        """Write down a step that was begun, or a notification; "duplicate" if its UID is there, whoever sent it."""
        what, name, detail = "create", Event.STEP_CREATED, {}
        if isinstance(request, Availability):
            what, name, detail = "announce", Event.AVAILABILITY_NOTIFIED, {"unavailable": request.unavailable}
        with self._write() as connection:
            if self._performed(connection, request.sop_instance_uid) is not None:
                return "duplicate"
            if _is_too_much(connection, request.study_instance_uid, request.series):
                return "too many"
            at = now()
            result = connection.execute(
                t.performed.insert().values(
                    sop_instance_uid=request.sop_instance_uid,
                    calling_ae=calling_ae,
                    state=step(PERFORMED, "", what),
                    study_instance_uid=request.study_instance_uid,
                    created_at=at,
                    changed_at=at,
                    **_named(request.series),
                )
            )
            key = int(result.inserted_primary_key[0])  # type: ignore[index]
            self._tell(connection, name, request.study_instance_uid, key, calling_ae, request.series, **detail)
            return ""

    def change_performed(self, request: StepChange, calling_ae: str) -> Refused:
        """Write down what became of a step that is in progress."""
        with self._write() as connection:
            row = self._performed(connection, request.sop_instance_uid)
            if row is None or row["state"] == "announced":
                return "unknown"
            if row["state"] != "in_progress":
                return "ended"
            what, name = _EVENTS[request.status or IN_PROGRESS]
            series = row["series"] if request.series is None else request.series
            if what != "update" and not series:
                return "no series"
            if _is_too_much(connection, row["study_instance_uid"], series, row["id"]):
                return "too many"
            connection.execute(
                t.performed.update()
                .where(t.performed.c.id == row["id"])
                .values(state=step(PERFORMED, row["state"], what), changed_at=now(), **_named(series))
            )
            self._tell(connection, name, row["study_instance_uid"], row["id"], calling_ae, series)
            return ""

    def said_of(self, study_id: int) -> Said:
        """What has been said of a study so far, whether before or after its first instance came."""
        with self.read() as connection:
            rows = connection.execute(_SAID_OF, {"study": study_id}).all()
        if not rows:
            return NOTHING_SAID
        words = [row.series for row in rows if row.state in ("completed", "announced")]
        expected: dict[str, frozenset[str]] = {}
        for series, uids in (named for word in words for named in word.items()):
            expected[series] = expected.get(series, frozenset()) | frozenset(uids)
        return Said(dict(Counter(row.state for row in rows)), expected)

    @staticmethod
    def _performed(connection: sa.Connection, uid: str) -> Row | None:
        query = sa.select(t.performed).where(t.performed.c.sop_instance_uid == uid)
        return connection.execute(query).mappings().first()

    def _tell(
        self,
        connection: sa.Connection,
        name: Event,
        study_instance_uid: str,
        key: int,
        calling_ae: str,
        series: Named,
        **detail: int,
    ) -> None:
        query = sa.select(t.study.c.id).where(t.study.c.study_instance_uid == study_instance_uid)
        self._append(
            connection,
            name,
            connection.scalar(query),
            performed=key,
            calling_ae=calling_ae,
            series=len(series),
            instances=_count(series),
            **detail,
        )


def _count(series: Named) -> int:
    return sum(map(len, series.values()))


def _named(series: Named) -> dict[str, Any]:
    return {"series": {uid: list(instances) for uid, instances in series.items()}, "instances": _count(series)}


def _is_too_much(connection: sa.Connection, study_instance_uid: str, series: Named, key: int = 0) -> bool:
    c = t.performed.c
    query = sa.select(sa.func.coalesce(sa.func.sum(c.instances), 0))
    others = connection.scalar(query.where(c.study_instance_uid == study_instance_uid, c.id != key)) or 0
    return int(others) + _count(series) > MAXIMUM_NAMED
