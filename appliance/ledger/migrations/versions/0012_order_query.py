"""What came of asking a modality worklist about a study."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """One step forward."""
    op.create_table(
        "order_query",
        sa.Column("study_id", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("answered", sa.Boolean(), nullable=False),
        sa.Column("due_at", sa.String(), nullable=False),
        sa.Column("reason", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(["study_id"], ["study.id"], name=op.f("fk_order_query_study_id_study")),
        sa.PrimaryKeyConstraint("study_id", name=op.f("pk_order_query")),
    )
    op.create_index(
        "ix_order_query_waiting", "order_query", ["due_at"], unique=False, sqlite_where=sa.text("state = 'waiting'")
    )


def downgrade() -> None:
    """The way back. What the worklist said stays, as an order."""
    op.drop_index("ix_order_query_waiting", table_name="order_query", sqlite_where=sa.text("state = 'waiting'"))
    op.drop_table("order_query")
