"""What the hospital's orders say of a study, for the gate; with whom they agree, and with whom not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta

from appliance.ledger.orders import Identifier, Order, Patient
from dicom_io.header import Header


@dataclass(frozen=True, slots=True)
class Ordered:
    """The orders of one study.

    Attributes:
        orders: those of its patient, but for what was cancelled.
        others: those that have its number and are of another patient: one of the two is wrong.
        first_instance_at: when the first image came (UTC, ISO 8601).
    """

    orders: tuple[Order, ...] = ()
    others: tuple[Order, ...] = ()
    first_instance_at: str = ""

    @property
    def urgent(self) -> bool:
        """An order asks for it to go before all others."""
        return any(one.urgent for one in self.orders)

    @property
    def births(self) -> tuple[tuple[str, str], ...]:
        """Birth dates (YYYYMMDD), each with where it stands."""
        return tuple((one.birth_date, one.birth_source) for one in self.orders if one.birth_date)


NOTHING_ORDERED = Ordered()


def accessions(headers: Iterable[Header]) -> tuple[str, ...]:
    """The accession numbers of a study's images, each once."""
    found = dict.fromkeys(header.accession_number.strip() for header in headers)
    return tuple(one for one in found if one)


def patient_of(headers: Iterable[Header], authority: str) -> Patient:
    """The identifiers of a study's patient; the authority is that of images which do not say."""
    found = dict.fromkeys(
        Identifier(header.patient_id.strip(), header.issuer_of_patient_id.strip() or authority) for header in headers
    )
    return tuple(one for one in found if one.value)


def match_orders(
    headers: Iterable[Header],
    candidates: Iterable[Order],
    names: Callable[[Patient], Patient],
    authority: str,
    first_instance_at: str,
) -> Ordered:
    """Which of the orders that have a study's number are its own.

    An order is the study's if one of its patient's identifiers is that of the images, of one authority where both say
    one, merges followed. It is another hospital's, and nothing to this study, if every authority is another one. What
    is left contradicts the images. Images without a patient ID have no order.

    Args:
        names: all identifiers that stand for a patient after merges.
        authority: who assigned the patient ID of images that do not say.
    """
    said = patient_of(headers, authority)
    placed = [one for one in candidates if not one.cancelled]
    if not said or not placed:
        return Ordered(first_instance_at=first_instance_at)
    patient = names(said)
    ours, others = [], []
    for order in placed:
        theirs = names(order.patient)
        if any(one.names(other) for one in patient for other in theirs):
            ours.append(order)
        elif any(one.same_authority(other) is not False for one in patient for other in theirs):
            others.append(order)
    return Ordered(tuple(ours), tuple(others), first_instance_at)


def onset_said(ordered: Ordered, maximum_hours: float) -> tuple[str, bool | None]:
    """What the orders say of the hours between onset and the first image, and whether they are few enough.

    A time that is only known to the day, or the minute, may be any of it: it is few enough if the earliest is, too
    many if the latest is, else unknown. So is one after the first image.
    """
    told: list[str] = []
    answers: set[bool | None] = set()
    for order in ordered.orders:
        if not order.onset:
            continue
        if not order.onset_earliest:
            told.append(f"not readable in order {order.id}")
            answers.add(None)
            continue
        came = datetime.fromisoformat(ordered.first_instance_at)
        most = came - datetime.fromisoformat(order.onset_earliest)
        least = max(came - datetime.fromisoformat(order.onset_latest), timedelta(0))
        if most < timedelta(0):
            told.append(f"after the images by OBX-5 of order {order.id}")
            answers.add(None)
            continue
        hours = (least.total_seconds() / 3600, most.total_seconds() / 3600)
        span = f"{hours[1]:.1f}" if hours[1] - hours[0] < 0.1 else f"{hours[0]:.1f} to {hours[1]:.1f}"
        told.append(f"{span} hours by OBX-5 of order {order.id}")
        answers.add(True if hours[1] <= maximum_hours else False if hours[0] > maximum_hours else None)
    met = False if False in answers else None if None in answers or not answers else True
    return ", ".join(told), met
