"""Steps of somebody else's worklist that the box has raised."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """One step forward."""
    op.create_table(
        "raised_step",
        sa.Column("destination", sa.String(), nullable=False),
        sa.Column("uid", sa.String(), nullable=False),
        sa.Column("package", sa.String(), nullable=False),
        sa.Column("before", sa.String(), nullable=False),
        sa.Column("mark", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("destination", "uid", "package", name=op.f("pk_raised_step")),
    )


def downgrade() -> None:
    """The way back. What was raised stays so."""
    op.drop_table("raised_step")
