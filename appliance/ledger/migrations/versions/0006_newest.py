"""The newest complete studies are found without reading all of them."""

from __future__ import annotations

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """One step forward."""
    op.create_index("ix_study_state_completed_at", "study", ["state", "completed_at"], unique=False)
    op.drop_index("ix_study_state", table_name="study")


def downgrade() -> None:
    """The way back."""
    op.create_index("ix_study_state", "study", ["state"], unique=False)
    op.drop_index("ix_study_state_completed_at", table_name="study")
