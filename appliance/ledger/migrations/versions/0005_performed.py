"""What modalities say that they performed, and archives that they have."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """One step forward."""
    op.create_table(
        "performed",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("sop_instance_uid", sa.String(), nullable=False),
        sa.Column("calling_ae", sa.String(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("study_instance_uid", sa.String(), nullable=False),
        sa.Column("series", sa.JSON(), nullable=False),
        sa.Column("instances", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.String(), nullable=False),
        sa.Column("changed_at", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_performed")),
        sa.UniqueConstraint("sop_instance_uid", name=op.f("uq_performed_sop_instance_uid")),
    )
    op.create_index(op.f("ix_performed_study_instance_uid"), "performed", ["study_instance_uid"], unique=False)


def downgrade() -> None:
    """The way back."""
    op.drop_index(op.f("ix_performed_study_instance_uid"), table_name="performed")
    op.drop_table("performed")
