"""What the hospital says over HL7: messages, orders, merged patients, reports."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def _text(name: str) -> sa.Column[str]:
    return sa.Column(name, sa.String(), nullable=False)


def upgrade() -> None:
    """One step forward."""
    op.create_table(
        "hl7_message",
        sa.Column("id", sa.Integer(), nullable=False),
        *(_text(name) for name in ("received_at", "peer", "sender", "control_id", "kind", "digest", "code", "reason")),
        sa.Column("content", sa.LargeBinary(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_hl7_message")),
    )
    op.create_index(op.f("ix_hl7_message_received_at"), "hl7_message", ["received_at"], unique=False)
    op.create_index(op.f("ix_hl7_message_control_id_sender"), "hl7_message", ["control_id", "sender"], unique=False)
    op.create_table(
        "imaging_order",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("message_id", sa.Integer(), nullable=False),
        sa.Column("facts_message_id", sa.Integer(), nullable=False),
        sa.Column("birth_message_id", sa.Integer(), nullable=False),
        _text("accession"),
        _text("study_instance_uid"),
        _text("placer"),
        sa.Column("cancelled", sa.Boolean(), nullable=False),
        sa.Column("patient", sa.JSON(), nullable=False),
        _text("birth_date"),
        _text("priority"),
        sa.Column("urgent", sa.Boolean(), nullable=False),
        *(_text(name) for name in ("reason", "onset", "onset_earliest", "onset_latest", "changed_at")),
        sa.ForeignKeyConstraint(
            ["message_id"], ["hl7_message.id"], name=op.f("fk_imaging_order_message_id_hl7_message")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_imaging_order")),
    )
    for column in ("accession", "study_instance_uid", "facts_message_id"):
        op.create_index(op.f(f"ix_imaging_order_{column}"), "imaging_order", [column], unique=False)
    op.create_table(
        "patient_merge",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("message_id", sa.Integer(), nullable=False),
        *(_text(name) for name in ("prior_value", "prior_namespace", "prior_universal")),
        *(_text(name) for name in ("value", "namespace", "universal", "merged_at")),
        sa.ForeignKeyConstraint(
            ["message_id"], ["hl7_message.id"], name=op.f("fk_patient_merge_message_id_hl7_message")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_patient_merge")),
    )
    op.create_index(op.f("ix_patient_merge_prior_value"), "patient_merge", ["prior_value"], unique=False)
    op.create_table(
        "radiology_report",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("message_id", sa.Integer(), nullable=False),
        _text("accession"),
        _text("study_instance_uid"),
        sa.Column("patient", sa.JSON(), nullable=False),
        *(_text(name) for name in ("status", "reported_at", "text", "received_at")),
        sa.ForeignKeyConstraint(
            ["message_id"], ["hl7_message.id"], name=op.f("fk_radiology_report_message_id_hl7_message")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_radiology_report")),
    )
    for column in ("accession", "study_instance_uid"):
        op.create_index(op.f(f"ix_radiology_report_{column}"), "radiology_report", [column], unique=False)
    op.create_table(
        "study_accession",
        sa.Column("study_id", sa.Integer(), nullable=False),
        _text("accession"),
        sa.Column("heard", sa.Integer(), nullable=False),
        sa.Column("orders", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["study_id"], ["study.id"], name=op.f("fk_study_accession_study_id_study")),
        sa.PrimaryKeyConstraint("study_id", "accession", name=op.f("pk_study_accession")),
    )
    op.create_index(op.f("ix_study_accession_accession"), "study_accession", ["accession"], unique=False)


def downgrade() -> None:
    """The way back."""
    for table in ("study_accession", "radiology_report", "patient_merge", "imaging_order", "hl7_message"):
        op.drop_table(table)
