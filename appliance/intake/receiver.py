"""What intake does with each instance: read what it says it is, make it durable, and only then answer."""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable

from sqlalchemy.exc import SQLAlchemyError

from appliance.intake.spool import Spool
from appliance.ledger.store import Ledger
from dicom_io.errors import HeaderError
from dicom_io.header import read_header
from dicom_io.scp import AssociationClosed, Received

log = logging.getLogger(__name__)

# PS3.4 B.2.3, table B.2-1.
SUCCESS = 0x0000
OUT_OF_RESOURCES = 0xA700
DOES_NOT_MATCH_SOP_CLASS = 0xA900
CANNOT_UNDERSTAND = 0xC000


class Receiver:
    """The storage provider's handlers. Their methods are called from many association threads at once.

    Args:
        ring: wakes the stage behind; called after each instance and each closed association.
        reserve_percent, reserve_bytes: what is left free on the disk, see `Spool.shortage`.
    """

    def __init__(
        self,
        ledger: Ledger,
        spool: Spool,
        ring: Callable[[], None],
        *,
        reserve_percent: float = 0.0,
        reserve_bytes: int = 0,
    ) -> None:
        self._ledger = ledger
        self._spool = spool
        self._ring = ring
        self._reserve = (reserve_percent, reserve_bytes)
        self._associations: dict[int, int] = {}
        self._lock = threading.Lock()

    def opened(self, association: int, calling_ae: str, called_ae: str, address: str) -> None:
        """Write the association down, as evidence for completeness."""
        key = self._ledger.open_association(calling_ae, called_ae, address)
        with self._lock:
            self._associations[association] = key

    def stored(self, received: Received) -> int:
        """Make one instance durable; the DIMSE status to answer with.

        0x0000 is returned only after the file, its folder and the ledger's row are synced to disk.
        """
        association = self._associations[received.association]
        size = len(received.part10)
        try:
            header = read_header(received.part10)
        except HeaderError as error:
            return self._refuse(association, CANNOT_UNDERSTAND, str(error), size)
        if (header.sop_class_uid, header.sop_instance_uid) != (
            received.sop_class_uid,
            received.sop_instance_uid,
        ):
            reason = "the command names another SOP class or instance than the data set"
            return self._refuse(association, DOES_NOT_MATCH_SOP_CLASS, reason, size)
        try:
            if shortage := self._spool.shortage(*self._reserve):
                return self._refuse(association, OUT_OF_RESOURCES, shortage, size)
            digest = self._spool.put(received.part10)
            outcome = self._ledger.record_instance(header, digest, size, association)
        except (OSError, SQLAlchemyError) as error:
            code = getattr(error, "errno", None)
            reason = "the disk is full" if code in (errno.ENOSPC, errno.EDQUOT) else f"cannot store: {error}"
            return self._refuse(association, OUT_OF_RESOURCES, reason.splitlines()[0], size)
        if outcome != "duplicate":
            self._ring()
        return SUCCESS

    def refused(self, association: int, status: int, reason: str, size: int) -> None:
        """Write down what the protocol layer refused by itself."""
        self._refuse(self._associations[association], status, reason, size)

    def closed(self, closed: AssociationClosed) -> None:
        """Write down how the association ended."""
        with self._lock:
            key = self._associations.pop(closed.association, None)
        if key is not None:
            self._ledger.close_association(key, closed.outcome)
            self._ring()

    def _refuse(self, association: int, status: int, reason: str, size: int) -> int:
        log.warning("instance refused with 0x%04X: %s", status, reason)
        try:
            self._ledger.record_refusal(association, status, reason, size)
        except SQLAlchemyError:
            # The sender still gets its status; a ledger that cannot be written is loud by itself.
            log.exception("the refusal could not be written to the ledger")
        return status
