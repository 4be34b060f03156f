"""What has arrived of the studies that are being watched, brought up to date row by row."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field

from appliance.governance.ordered import NOTHING_ORDERED, Ordered, accessions, match_orders
from appliance.ledger.store import Ledger, StoredInstance
from appliance.study.grouping import Series, group
from appliance.study.selection import Selection, considered, select

log = logging.getLogger(__name__)

WATCHED = 256
"""Studies kept in memory, some 2 KB an instance; one that is forgotten is read again."""


@dataclass(slots=True)
class Arrival:
    """The current instances of one study, and what is made of them.

    Attributes:
        rows: their numbers in the ledger.
        instances: by SOP Instance UID.
        accessions: the accession numbers that they carry.
        ordered: what orders say of the study; heard: the newest message when that was read.
    """

    rows: dict[int, StoredInstance] = field(default_factory=dict)
    instances: dict[str, StoredInstance] = field(default_factory=dict)
    series: tuple[Series, ...] = ()
    selection: Selection = field(default_factory=lambda: Selection(None, None, ()))
    accessions: tuple[str, ...] = ()
    ordered: Ordered = NOTHING_ORDERED
    heard: int = 0


class Arrivals:
    """The studies that one thread watches.

    Args:
        authority: who assigns patient IDs where an image does not say; None: no orders are heard.
    """

    def __init__(self, ledger: Ledger, authority: str | None = None) -> None:
        self._ledger = ledger
        self._authority = authority
        self._studies: OrderedDict[int, Arrival] = OrderedDict()

    def look(self, study_id: int) -> Arrival:
        """A study as the ledger has it now. What is returned is brought up to date by the next look."""
        arrival = self._studies.setdefault(study_id, Arrival())
        self._studies.move_to_end(study_id)
        while len(self._studies) > WATCHED:
            self._studies.popitem(last=False)
        new, gone = self._ledger.changes(study_id, arrival.rows.keys())
        if new or gone:
            kept = {row: one for row, one in arrival.rows.items() if row not in gone}
            arrival.rows = kept | new
            arrival.instances = {one.sop_instance_uid: one for one in arrival.rows.values()}
            arrival.series = group(one.header for one in arrival.instances.values())
            arrival.selection = _select(study_id, arrival.series)
            arrival.accessions = accessions(one.header for one in arrival.instances.values())
        if self._authority is not None:
            self._hear(study_id, arrival, self._authority)
        return arrival

    def _hear(self, study_id: int, arrival: Arrival, authority: str) -> None:
        uid, first = self._ledger.begun(study_id)
        candidates, heard = self._ledger.orders_for(arrival.accessions, uid)
        headers = (one.header for one in arrival.instances.values())
        arrival.ordered = match_orders(headers, candidates, self._ledger.names, authority, first)
        arrival.heard = heard

    def selection(self, study_id: int, alerted: str, refused: Mapping[str, str]) -> Selection:
        """What is selected of a study as of the last look.

        Args:
            alerted: the series that the hospital was alerted of.
            refused: the series that may not be read, and why.
        """
        arrival = self._studies[study_id]
        chosen = arrival.selection.series
        if not refused and (not alerted or chosen is None or chosen.series_instance_uid == alerted):
            return arrival.selection
        return _select(study_id, arrival.series, alerted, refused)

    def forget(self, study_id: int) -> None:
        """Nothing more of it is expected for now."""
        self._studies.pop(study_id, None)


def _select(
    study_id: int, series: tuple[Series, ...], alerted: str = "", refused: Mapping[str, str] | None = None
) -> Selection:
    try:
        return select(series, alerted, refused)
    except Exception as error:
        # A geometry that nobody foresaw: the study is refused with the reason, and stuck nowhere.
        log.exception("study %d: the selection failed in a way nobody foresaw", study_id)
        reason = f"the selection failed: {type(error).__name__}: {error}"
        return Selection(None, None, tuple(considered(one, chosen=False, reason=reason) for one in series))
