"""The ledger's tables (SQLAlchemy Core). Every change here needs a migration beside it."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy import (
    JSON,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    UniqueConstraint,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# Times are UTC in ISO 8601 with microseconds, so that they sort as text.

selftest = Table(
    "selftest",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("study_instance_uid", String, nullable=False, unique=True),  # written down before the first image came
    Column("expected", Boolean, nullable=False),  # whether it has a bleed
    Column("alert_port", Integer, nullable=False),  # of the loopback
    Column("object_port", Integer, nullable=False),
    Column("begun_at", String, nullable=False),
    Column("ended_at", String),
    Column("passed", Boolean),
    Column("seconds", Float),
    Column("reason", String, nullable=False),
)

association = Table(
    "association",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("calling_ae", String, nullable=False),
    Column("called_ae", String, nullable=False),
    Column("address", String, nullable=False),
    Column("opened_at", String, nullable=False),
    Column("closed_at", String),
    Column("outcome", String),  # released, aborted, broken; lost where intake died with it
)

study = Table(
    "study",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("study_instance_uid", String, nullable=False, unique=True),
    Column("state", String, nullable=False),
    Column("completions", Integer, nullable=False, default=0),
    Column("first_instance_at", String, nullable=False),
    Column("last_instance_at", String, nullable=False),
    Column("completed_at", String),
    Column("evidence", JSON),
    Column("released_at", String),  # when somebody said that its troubles need not hold its files
    Column("removed_at", String),  # when retention removed its files; null again once an instance came since
    # Whether it is one of the box's own tests; see selftest.py. An older scanside does not name it.
    Column("selftest", Boolean, nullable=False, server_default=sa.false()),
    # What senders did last; and the state alone.
    Index(None, "state", "completed_at"),
    # The studies whose files lie on the disk.
    Index("ix_study_kept", "completed_at", sqlite_where=sa.text("removed_at IS NULL")),
    Index("ix_study_selftest", "id", sqlite_where=sa.text("selftest")),
)

instance = Table(
    "instance",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("study_id", ForeignKey("study.id"), nullable=False),
    Column("association_id", ForeignKey("association.id"), nullable=False),
    Column("series_instance_uid", String, nullable=False),
    Column("sop_instance_uid", String, nullable=False),
    Column("digest", String, nullable=False),  # SHA-256 of the Part 10 file; names it in the spool
    Column("size", Integer, nullable=False),
    Column("header", JSON, nullable=False),  # a change of Header's fields needs a migration of these, or a default
    # False once the same SOP Instance UID arrived with other bytes: both stay, the newest counts.
    Column("is_current", Boolean, nullable=False, default=True),
    Column("received_at", String, nullable=False),
    Column("removed_at", String),  # when retention removed the file; the header is {} from then on
    UniqueConstraint("sop_instance_uid", "digest"),
    # Every index is written for every instance while its sender waits.
    Index(None, "study_id", "is_current"),
    Index(None, "digest"),
)

analysis = Table(
    "analysis",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("study_id", ForeignKey("study.id"), nullable=False),
    Column("package", String, nullable=False),
    Column("package_version", String, nullable=False),
    Column("state", String, nullable=False, index=True),
    Column("completion", Integer, nullable=False),  # the completion of the study that it is about
    Column("attempts", Integer, nullable=False, default=0),
    Column("due_at", String, nullable=False),
    Column("admission", JSON, nullable=False),
    Column("selection", JSON, nullable=False),
    # The instances that the gate admitted, [[SOP Instance UID, digest], …] in the volume's order: what is analysed and
    # drawn is this, whatever arrives meanwhile.
    Column("inputs", JSON, nullable=False),
    Column("reason", String, nullable=False, default=""),
    UniqueConstraint("study_id", "package"),
)

verdict = Table(
    "verdict",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("analysis_id", ForeignKey("analysis.id"), nullable=False),
    Column("revision", Integer, nullable=False),
    Column("positive", Boolean, nullable=False),
    Column("probability", Float, nullable=False),
    Column("result", JSON, nullable=False),
    Column("inputs", JSON, nullable=False),  # those of the analysis when it was issued
    Column("issued_at", String, nullable=False),
    Column("late", Boolean, nullable=False, default=False),
    UniqueConstraint("analysis_id", "revision"),
)

finding = Table(
    "finding",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("verdict_id", ForeignKey("verdict.id"), nullable=False),
    Column("object", String, nullable=False),  # alert.DESTINATION, report, capture.1 …
    Column("uid", String, nullable=False, unique=True),  # SOP Instance UID, or MSH-10 of the alert
    Column("path", String),  # below the findings folder; null until it has been rendered
    Column("attempts", Integer, nullable=False, default=0),
    Column("reason", String, nullable=False, default=""),
    Column("removed_at", String),  # when retention removed the file
    UniqueConstraint("verdict_id", "object"),
    Index("ix_finding_unrendered", "id", sqlite_where=sa.text("path IS NULL")),
)

delivery = Table(
    "delivery",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("finding_id", ForeignKey("finding.id"), nullable=False),
    Column("destination", String, nullable=False),
    Column("urgency", Integer, nullable=False),  # 0 first
    Column("state", String, nullable=False),
    Column("attempts", Integer, nullable=False, default=0),
    Column("due_at", String, nullable=False),
    Column("sent_at", String),
    Column("acknowledged_at", String),
    Column("reason", String, nullable=False, default=""),
    Column("transaction_uid", String),  # of the newest request for storage commitment of it
    UniqueConstraint("finding_id", "destination"),
    Index(None, "destination", "state", "urgency"),
    Index(None, "transaction_uid"),
)

commitment = Table(
    "commitment",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("transaction_uid", String, nullable=False),
    Column("calling_ae", String, nullable=False),
    Column("called_ae", String, nullable=False),  # what the peer knows us by
    Column("address", String, nullable=False),
    Column("request", JSON, nullable=False),  # [[SOP Class UID, SOP Instance UID], …] in the order that was asked
    Column("requested_at", String, nullable=False),
    Column("state", String, nullable=False),
    Column("attempts", Integer, nullable=False, default=0),
    Column("due_at", String, nullable=False),
    Column("acknowledged_at", String),
    Column("failed", JSON),  # [[SOP Instance UID, Failure Reason], …] of the report that was acknowledged
    Column("reason", String, nullable=False, default=""),
    UniqueConstraint("calling_ae", "transaction_uid"),
    Index(None, "calling_ae", "state", "due_at"),
)

performed = Table(
    "performed",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("sop_instance_uid", String, nullable=False, unique=True),  # of the step, or of the notification
    Column("calling_ae", String, nullable=False),
    Column("state", String, nullable=False),
    Column("study_instance_uid", String, nullable=False, index=True),  # it may be said before an instance comes
    Column("series", JSON, nullable=False),  # {Series Instance UID: [SOP Instance UID, …], …}
    Column("instances", Integer, nullable=False),  # how many those are
    Column("created_at", String, nullable=False),
    Column("changed_at", String, nullable=False),
)

hl7_message = Table(
    "hl7_message",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("received_at", String, nullable=False),
    Column("peer", String, nullable=False),
    Column("sender", String, nullable=False),  # MSH-3 and MSH-4
    Column("control_id", String, nullable=False),  # MSH-10
    Column("kind", String, nullable=False),
    Column("digest", String, nullable=False),  # SHA-256 of what follows MSH
    Column("code", String, nullable=False),  # AA, AE or AR
    Column("reason", String, nullable=False),
    Column("content", LargeBinary),  # null once it was removed
    Index(None, "control_id", "sender"),
    # Of those whose content is still there: what is old among them is looked for every hour.
    Index("ix_hl7_message_kept", "received_at", sqlite_where=sa.text("content IS NOT NULL")),
)

# Application acknowledgements of our alerts that came as messages of their own, until delivery has read them.
application_answer = Table(
    "application_answer",
    metadata,
    Column("control_id", String, primary_key=True),  # MSH-10 of the alert
    Column("content", LargeBinary, nullable=False),
    Column("received_at", String, nullable=False),
)

imaging_order = Table(
    "imaging_order",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("message_id", ForeignKey("hl7_message.id"), nullable=False),  # the newest that said something of it
    Column("facts_message_id", Integer, nullable=False, index=True),  # that changed what the gate or the queue heeds
    Column("birth_message_id", Integer, nullable=False),  # that gave the birth date
    Column("accession", String, nullable=False, index=True),
    Column("study_instance_uid", String, nullable=False, index=True),
    Column("placer", String, nullable=False),
    Column("cancelled", Boolean, nullable=False),
    Column("patient", JSON, nullable=False),  # [{value, namespace, universal}, …]
    Column("birth_date", String, nullable=False),
    Column("priority", String, nullable=False),
    Column("urgent", Boolean, nullable=False),
    Column("reason", String, nullable=False),
    Column("onset", String, nullable=False),
    Column("onset_earliest", String, nullable=False),
    Column("onset_latest", String, nullable=False),
    Column("changed_at", String, nullable=False),
)

# What came of asking a modality worklist about a study.
order_query = Table(
    "order_query",
    metadata,
    Column("study_id", ForeignKey("study.id"), primary_key=True),
    Column("state", String, nullable=False),  # waiting, found, none or failed
    Column("answered", Boolean, nullable=False),  # whether the last time it answered at all
    Column("due_at", String, nullable=False),
    Column("reason", String, nullable=False),
    Index("ix_order_query_waiting", "due_at", sqlite_where=sa.text("state = 'waiting'")),
)

patient_merge = Table(
    "patient_merge",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("message_id", ForeignKey("hl7_message.id"), nullable=False),
    Column("prior_value", String, nullable=False, index=True),
    Column("prior_namespace", String, nullable=False),
    Column("prior_universal", String, nullable=False),
    Column("value", String, nullable=False),
    Column("namespace", String, nullable=False),
    Column("universal", String, nullable=False),
    Column("merged_at", String, nullable=False),
)

radiology_report = Table(
    "radiology_report",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("message_id", ForeignKey("hl7_message.id"), nullable=False),
    Column("accession", String, nullable=False, index=True),
    Column("study_instance_uid", String, nullable=False, index=True),
    Column("patient", JSON, nullable=False),
    Column("status", String, nullable=False),  # OBR-25
    Column("reported_at", String, nullable=False),  # OBR-22 as it was sent
    Column("text", String, nullable=False),
    Column("received_at", String, nullable=False),
)

# By which accession numbers an order finds a study that was decided on.
study_accession = Table(
    "study_accession",
    metadata,
    Column("study_id", ForeignKey("study.id"), primary_key=True),
    Column("accession", String, primary_key=True, index=True),  # "" where the images have none
    Column("heard", Integer, nullable=False),  # the newest message when the gate decided
    Column("orders", JSON, nullable=False),  # the orders that it heeded
)

workitem = Table(
    "workitem",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("uid", String, nullable=False, unique=True),
    Column("state", String, nullable=False),  # of PS3.4 Table CC.1.1-1
    Column("priority", String, nullable=False),
    Column("rank", Integer, nullable=False),  # of the priority; the highest first
    Column("codes", JSON, nullable=False),  # of what is to be done: ["110005^DCM", …]
    Column("transaction_uid", String),  # the lock of whoever claimed it
    Column("step", JSON, nullable=False),  # the whole item in the DICOM JSON model, without the lock
    Column("created_by", String, nullable=False),
    Column("created_at", String, nullable=False),
    Column("changed_at", String, nullable=False),
    Column("raised_from", String),  # the priority that the box raised it from, while nobody changed it since
    Index("ix_workitem_state_rank", "state", "rank"),
)

workitem_study = Table(
    "workitem_study",
    metadata,
    Column("workitem_id", ForeignKey("workitem.id"), primary_key=True),
    Column("study_instance_uid", String, primary_key=True, index=True),
)

mark = Table(
    "mark",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("study_instance_uid", String, nullable=False),
    Column("package", String, nullable=False),
    Column("uid", String, nullable=False),  # of the finding that was carried out last
    Column("mode", String, nullable=False),  # reprioritise or suggest
    Column("standing", Boolean, nullable=False),
    Column("text", String, nullable=False),
    Column("done", String, nullable=False),  # what it changed, in words
    # Whom the images named; "" of a mark that names nobody, or that an earlier release carried out.
    Column("patient_id", String, nullable=False, server_default=""),
    Column("issuer_of_patient_id", String, nullable=False, server_default=""),
    UniqueConstraint("study_instance_uid", "package"),
)

# Work that the box takes from somebody else's worklist.
task = Table(
    "task",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("uid", String, nullable=False, unique=True),  # of the step
    Column("study_id", ForeignKey("study.id"), nullable=False, index=True),
    Column("transaction_uid", String, nullable=False),  # written down before it is claimed
    Column("state", String, nullable=False, index=True),
    Column("code", JSON, nullable=False),  # by which it is ours
    Column("final", String, nullable=False),  # COMPLETED or CANCELED, once that is decided
    Column("changes", JSON, nullable=False),  # what is written into it before
    Column("reason", String, nullable=False),
    Column("claimed_at", String, nullable=False),
    Column("changed_at", String, nullable=False),
)

# Steps of somebody else's worklist that the box has raised, or is about to.
raised_step = Table(
    "raised_step",
    metadata,
    Column("destination", String, primary_key=True),
    Column("uid", String, primary_key=True),
    Column("package", String, primary_key=True),
    Column("before", String, nullable=False),  # its priority
    Column("mark", String, nullable=False),  # the finding that raised it
)

subscription = Table(
    "subscription",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("ae_title", String, nullable=False),
    Column("uid", String, nullable=False, index=True),  # of a work item, or a well-known one for all of them
    Column("locked", Boolean, nullable=False),
    Column("keys", JSON, nullable=False),  # of a filtered one, what items must match
    UniqueConstraint("ae_title", "uid"),
)

workitem_event = Table(
    "workitem_event",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("ae_title", String, nullable=False, index=True),
    Column("uid", String, nullable=False),
    Column("event_type", Integer, nullable=False),
    Column("information", JSON, nullable=False),
    Column("at", String, nullable=False),
)

event = Table(
    "event",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("at", String, nullable=False),
    Column("monotonic_ns", Integer, nullable=False),  # comparable within one boot
    Column("boot", String, nullable=False),
    Column("name", String, nullable=False, index=True),
    Column("study_id", ForeignKey("study.id"), index=True),
    Column("detail", JSON, nullable=False),
    Column("hash", String, nullable=False),  # SHA-256 over the row and the hash before it
)
