"""The vocabulary of events: the ledger, the log, the metrics and the timeline all use these names."""

from __future__ import annotations

from enum import StrEnum


class Event(StrEnum):
    """What can happen. The value is the name that is written down."""

    ASSOCIATION_OPENED = "association.opened"
    ASSOCIATION_CLOSED = "association.closed"
    INSTANCE_STORED = "instance.stored"
    INSTANCE_DUPLICATE = "instance.duplicate"
    INSTANCE_CONFLICT = "instance.conflict"
    INSTANCE_REFUSED = "instance.refused"
    STUDY_COMPLETED = "study.completed"
    STUDY_REOPENED = "study.reopened"
    STUDY_ADMITTED = "study.admitted"
    STUDY_REFUSED = "study.refused"
    STUDY_LATE = "study.late"
    ANALYSIS_STARTED = "analysis.started"
    ANALYSIS_ATTEMPT_FAILED = "analysis.attempt_failed"
    ANALYSIS_FAILED = "analysis.failed"
    ANALYSIS_PARKED = "analysis.parked"
    ANALYSIS_REQUEUED = "analysis.requeued"
    VERDICT_KEPT = "verdict.kept"
    VERDICT_ISSUED = "verdict.issued"
    ALERT_UNDELIVERABLE = "alert.undeliverable"
    FINDING_RENDERED = "finding.rendered"
    FINDING_FAILED = "finding.failed"
    DELIVERY_SENDING = "delivery.sending"
    DELIVERY_ACKNOWLEDGED = "delivery.acknowledged"
    DELIVERY_RETRIED = "delivery.retried"
    DELIVERY_PARKED = "delivery.parked"
    DELIVERY_REQUEUED = "delivery.requeued"
    DELIVERY_REJECTED = "delivery.rejected"
    DELIVERY_DEAD = "delivery.dead"
    SERVICE_STARTED = "service.started"
    SERVICE_STOPPED = "service.stopped"
