"""The worklist: work items, what the box marked, who listens and what they have yet to hear."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """One step forward."""
    op.create_table(
        "workitem",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("uid", sa.String(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("priority", sa.String(), nullable=False),
        sa.Column("rank", sa.Integer(), nullable=False),
        sa.Column("codes", sa.JSON(), nullable=False),
        sa.Column("transaction_uid", sa.String(), nullable=True),
        sa.Column("step", sa.JSON(), nullable=False),
        sa.Column("created_by", sa.String(), nullable=False),
        sa.Column("created_at", sa.String(), nullable=False),
        sa.Column("changed_at", sa.String(), nullable=False),
        sa.Column("raised_from", sa.String(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_workitem")),
        sa.UniqueConstraint("uid", name=op.f("uq_workitem_uid")),
    )
    op.create_index("ix_workitem_state_rank", "workitem", ["state", "rank"], unique=False)
    op.create_table(
        "workitem_study",
        sa.Column("workitem_id", sa.Integer(), nullable=False),
        sa.Column("study_instance_uid", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(["workitem_id"], ["workitem.id"], name=op.f("fk_workitem_study_workitem_id_workitem")),
        sa.PrimaryKeyConstraint("workitem_id", "study_instance_uid", name=op.f("pk_workitem_study")),
    )
    op.create_index(op.f("ix_workitem_study_study_instance_uid"), "workitem_study", ["study_instance_uid"])
    op.create_table(
        "mark",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("study_instance_uid", sa.String(), nullable=False),
        sa.Column("package", sa.String(), nullable=False),
        sa.Column("uid", sa.String(), nullable=False),
        sa.Column("mode", sa.String(), nullable=False),
        sa.Column("standing", sa.Boolean(), nullable=False),
        sa.Column("text", sa.String(), nullable=False),
        sa.Column("done", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_mark")),
        sa.UniqueConstraint("study_instance_uid", "package", name=op.f("uq_mark_study_instance_uid_package")),
    )
    op.create_table(
        "subscription",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("ae_title", sa.String(), nullable=False),
        sa.Column("uid", sa.String(), nullable=False),
        sa.Column("locked", sa.Boolean(), nullable=False),
        sa.Column("keys", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_subscription")),
        sa.UniqueConstraint("ae_title", "uid", name=op.f("uq_subscription_ae_title_uid")),
    )
    op.create_index(op.f("ix_subscription_uid"), "subscription", ["uid"], unique=False)
    op.create_table(
        "workitem_event",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("ae_title", sa.String(), nullable=False),
        sa.Column("uid", sa.String(), nullable=False),
        sa.Column("event_type", sa.Integer(), nullable=False),
        sa.Column("information", sa.JSON(), nullable=False),
        sa.Column("at", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_workitem_event")),
    )
    op.create_index(op.f("ix_workitem_event_ae_title"), "workitem_event", ["ae_title"], unique=False)


def downgrade() -> None:
    """The way back."""
    op.drop_index(op.f("ix_workitem_event_ae_title"), table_name="workitem_event")
    op.drop_table("workitem_event")
    op.drop_index(op.f("ix_subscription_uid"), table_name="subscription")
    op.drop_table("subscription")
    op.drop_table("mark")
    op.drop_index(op.f("ix_workitem_study_study_instance_uid"), table_name="workitem_study")
    op.drop_table("workitem_study")
    op.drop_index("ix_workitem_state_rank", table_name="workitem")
    op.drop_table("workitem")
