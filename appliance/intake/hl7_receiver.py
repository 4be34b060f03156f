"""What comes of an HL7 message: it is read, written down with what it changes, and only then answered."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection
from dataclasses import replace

from sqlalchemy.exc import SQLAlchemyError

from appliance.events import Event
from appliance.intake.hl7_answer import accepted, answers, too_long
from appliance.intake.hl7_message import Fault, Message, Rules, read_message
from appliance.ledger.orders import NewMessage
from appliance.ledger.store import Ledger

log = logging.getLogger(__name__)


class OrderReceiver:
    """The handlers of the listener; threads may share it.

    Args:
        box: our name, MSH-3 of what we answer where the peer does not name us.
        maximum: longest message, in bytes.
        ring: wakes the engine; called after each message that changed something.
        shortage: why the disk should take no more, "" if it may.
        answering: names of destinations whose application acknowledgements may come here.
    """

    def __init__(
        self,
        ledger: Ledger,
        rules: Rules,
        box: str,
        maximum: int,
        ring: Callable[[], None],
        shortage: Callable[[], str],
        answering: Collection[str] = (),
    ) -> None:
        self._ledger = ledger
        self._rules = rules
        self._box = box
        self._maximum = maximum
        self._ring = ring
        self._shortage = shortage
        self._answering = answering

    def take(self, block: bytes, peer: str) -> list[str]:
        """Write a message down; what is answered to it."""
        message = read_message(block, self._rules)
        if message.is_answer:
            if self._answered(message, block):
                return accepted(message, self._box)
            log.warning("hl7: an acknowledgement came from %s, where none is waited for; ignored", peer)
            return []
        # A long name stands in the second component of MSH-3.
        if message.changes and self._box in message.header[3].split(message.header[2][:1])[:2]:
            # What this box tells a worklist is no order, though it looks like one.
            message = replace(message, changes=(), ours=True)
        if shortage := self._shortage():
            log.error("hl7: a message from %s is not taken: %s", peer, shortage)
            return answers(message, self._box, unkept=shortage)
        new = NewMessage(
            peer=peer,
            sender=message.sender[:200],
            control_id=message.header[10][:200],
            kind=message.kind[:40],
            digest=message.digest,
            content=block,
            code=message.code,
            reason=message.reason,
            changes=message.changes,
        )
        try:
            taken = self._ledger.take_message(new)
        except (OSError, SQLAlchemyError) as error:
            log.exception("hl7: a message could not be written down")
            return answers(message, self._box, unkept=f"it cannot be written down: {type(error).__name__}")
        if taken == "reused":
            fault = Fault("MSH", 1, 10, "205", "this control id was used for another message")
            message = Message(message.header, message.kind, message.digest, (fault,))
        if taken == "duplicate":
            # It was accepted, whatever the settings say of it by now.
            return answers(replace(message, faults=()), self._box)
        self._say(message, peer)
        if message.changes and taken == "taken":
            self._ring()
        return answers(message, self._box)

    def _answered(self, message: Message, block: bytes) -> bool:
        """Keep an application acknowledgement for the delivery that waits for it; whether one does."""
        if not self._answering:
            return False
        lines = re.split(r"[\r\n]+", block.decode("utf-8", "replace"))
        found = [line.split(message.header[1]) for line in lines if line.startswith("MSA")]
        if not found or len(found[0]) < 3 or found[0][1] not in ("AA", "AE", "AR"):
            return False
        try:
            return self._ledger.take_answer(found[0][2].strip(), block, self._answering)
        except (OSError, SQLAlchemyError):
            # It is not acknowledged, so that it may come again.
            log.exception("hl7: an application acknowledgement could not be written down")
            return False

    def unreadable(self, peer: str, what: str, is_too_long: bool) -> str:
        """Write down what came that was no message; what is answered to it, "" for nothing."""
        log.warning("hl7: from %s came %s", peer, what)
        try:
            self._ledger.log(Event.MESSAGE_UNREADABLE, peer=peer, reason=what)
        except (OSError, SQLAlchemyError):
            log.exception("hl7: that could not be written down")
        return too_long(self._maximum, self._box) if is_too_long else ""

    @staticmethod
    def _say(message: Message, peer: str) -> None:
        if message.faults:
            codes = ", ".join(f"{one.segment}-{one.field} {one.code}" for one in message.faults)
            log.warning("hl7: a message from %s is refused with %s (%s)", peer, message.code, codes)
        elif message.ours:
            log.warning("hl7: a message of this box came back from %s; it changes nothing", peer)
