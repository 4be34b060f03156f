"""What retention removed."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """One step forward."""
    op.add_column("study", sa.Column("released_at", sa.String(), nullable=True))
    op.add_column("study", sa.Column("removed_at", sa.String(), nullable=True))
    op.add_column("instance", sa.Column("removed_at", sa.String(), nullable=True))
    op.add_column("finding", sa.Column("removed_at", sa.String(), nullable=True))
    op.create_index(
        "ix_study_kept", "study", ["completed_at"], unique=False, sqlite_where=sa.text("removed_at IS NULL")
    )


def downgrade() -> None:
    """The way back."""
    op.drop_index("ix_study_kept", table_name="study", sqlite_where=sa.text("removed_at IS NULL"))
    with op.batch_alter_table("finding") as batch:
        batch.drop_column("removed_at")
    with op.batch_alter_table("instance") as batch:
        batch.drop_column("removed_at")
    with op.batch_alter_table("study") as batch:
        batch.drop_column("removed_at")
        batch.drop_column("released_at")
