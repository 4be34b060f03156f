"""Group commit: instances that several associations wait for become durable together."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from appliance.intake.spool import Incoming, Spool
from appliance.ledger.ingest import NewInstance, Stored
from appliance.ledger.store import Ledger
from appliance.operations.metrics import IntakeMetrics


@dataclass(slots=True, eq=False)
class _Waiting:
    incoming: Incoming
    row: NewInstance
    outcome: Stored | Exception | None = None


class Committer:
    """Names the files of instances and writes their rows, as many as wait in one transaction.

    There is no thread of its own: whoever comes while nobody commits does it for all that have come so far. With one
    association nobody waits for anybody; with many, one sync serves them all.

    Args:
        ring: called after each transaction that brought something new.
        metrics: where each batch is counted.
    """

    def __init__(
        self, ledger: Ledger, spool: Spool, ring: Callable[[], None], metrics: IntakeMetrics | None = None
    ) -> None:
        self._ledger = ledger
        self._spool = spool
        self._ring = ring
        self._metrics = metrics or IntakeMetrics()
        self._turn = threading.Lock()
        self._queue: list[_Waiting] = []
        self._queue_lock = threading.Lock()
        self._unrecorded: set[str] = set()  # digests of files that got their name, and no row

    def commit(self, incoming: Incoming, row: NewInstance) -> Stored:
        """Make one synced file an instance; it is durable on return.

        Raises:
            OSError, SQLAlchemyError: it is not; its file may lie in the spool without a row.
        """
        waiting = _Waiting(incoming, row)
        with self._queue_lock:
            self._queue.append(waiting)
        with self._turn:
            if waiting.outcome is None:
                with self._queue_lock:
                    batch, self._queue = self._queue, []
                self._commit(batch)
        if isinstance(waiting.outcome, Exception):
            raise waiting.outcome
        assert waiting.outcome is not None
        return waiting.outcome

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing is committed meanwhile: for whoever removes files that an instance might bring again."""
        with self._turn:
            yield

    def _commit(self, batch: list[_Waiting]) -> None:
        began = time.monotonic()
        named = []
        for one in batch:
            try:
                self._spool.publish(one.incoming)
            except OSError as error:
                one.outcome = error
            else:
                named.append(one)
        if named:
            self._record(named)
        durable = [(one.outcome, one.row.size) for one in named if isinstance(one.outcome, str)]
        if durable:
            self._metrics.committed(durable, time.monotonic() - began)

    def _record(self, batch: list[_Waiting]) -> None:
        for one in batch:
            mends = one.incoming.published or one.row.digest in self._unrecorded
            one.row = replace(one.row, mends=mends)
        try:
            outcomes = self._ledger.record_instances([one.row for one in batch])
        except Exception as error:
            if len(batch) == 1:
                batch[0].outcome = error
                if batch[0].row.mends:
                    self._unrecorded.add(batch[0].row.digest)
                return
            # One that cannot be written must not take the others with it.
            for one in batch:
                self._record([one])
            return
        for one, outcome in zip(batch, outcomes, strict=True):
            self._spool.recorded(one.incoming)
            self._unrecorded.discard(one.row.digest)
            one.outcome = outcome
        if any(one.outcome != "duplicate" or one.row.mends for one in batch):
            self._ring()
