"""Application acknowledgements of alerts that came as messages of their own."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """One step forward."""
    op.create_table(
        "application_answer",
        sa.Column("control_id", sa.String(), nullable=False),
        sa.Column("content", sa.LargeBinary(), nullable=False),
        sa.Column("received_at", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("control_id", name=op.f("pk_application_answer")),
    )


def downgrade() -> None:
    """The way back. What was not read yet is lost, and the alert is sent again."""
    op.drop_table("application_answer")
