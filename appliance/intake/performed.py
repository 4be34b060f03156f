"""What modalities and archives say that there is: written down before it is answered, and the engine is woken."""

from __future__ import annotations

import logging
from collections.abc import Callable

from sqlalchemy.exc import SQLAlchemyError

from appliance.events import Event
from appliance.ledger.performed import MAXIMUM_NAMED, Refused
from appliance.ledger.store import Ledger
from dicom_io.handlers import Answer, Session
from dicom_io.performed import (
    DUPLICATE_INSTANCE,
    MAY_NOT_BE_UPDATED,
    MISSING_VALUE,
    NO_SUCH_INSTANCE,
    PROCESSING_FAILURE,
    RESOURCE_LIMITATION,
    Request,
    StepChange,
)

log = logging.getLogger(__name__)

SUCCESS = 0x0000

_REFUSED: dict[Refused, Answer] = {
    "duplicate": Answer(DUPLICATE_INSTANCE, "this SOP Instance UID is there already"),
    "unknown": Answer(NO_SUCH_INSTANCE, "no performed procedure step has this SOP Instance UID"),
    "ended": Answer(MAY_NOT_BE_UPDATED[0], MAY_NOT_BE_UPDATED[2], error_id=MAY_NOT_BE_UPDATED[1]),
    "no series": Answer(MISSING_VALUE, "a step does not end without a PerformedSeriesSequence"),
    "too many": Answer(RESOURCE_LIMITATION, f"more than {MAXIMUM_NAMED} instances of one study"),
}


class PerformedProvider:
    """The provider's handlers of performed steps and notifications. Called from many association threads at once.

    Args:
        ring: wakes the engine; called after each request that was written down.
        shortage: why the disk should take no more, '' if it may.
    """

    def __init__(self, ledger: Ledger, ring: Callable[[], None], shortage: Callable[[], str]) -> None:
        self._ledger = ledger
        self._ring = ring
        self._shortage = shortage

    def performed(self, session: Session, request: Request) -> Answer:
        """Write a request down; what to answer it with (PS3.4 F.7.2 and R.3.2)."""
        try:
            if shortage := self._shortage():
                return self.refused(session, Answer(RESOURCE_LIMITATION, shortage))
            if isinstance(request, StepChange):
                refused = self._ledger.change_performed(request, session.calling_ae)
            else:
                refused = self._ledger.create_performed(request, session.calling_ae)
            if refused:
                return self.refused(session, _REFUSED[refused])
        except (OSError, SQLAlchemyError) as error:
            log.exception("what %s says was performed could not be written down", session.calling_ae)
            return Answer(PROCESSING_FAILURE, f"cannot be written down: {type(error).__name__}")
        self._ring()
        return Answer(SUCCESS)

    def refused(self, session: Session, answer: Answer) -> Answer:
        """Write down that a request is answered with that failure."""
        log.warning("a performed step or notification refused with 0x%04X: %s", answer.status, answer.comment)
        self._ledger.log(
            Event.PERFORMED_REFUSED,
            calling_ae=session.calling_ae,
            status=f"0x{answer.status:04X}",
            reason=answer.comment,
        )
        return answer
