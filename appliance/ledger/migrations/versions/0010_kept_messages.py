"""Messages whose content is old are found without reading all of them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """One step forward."""
    op.create_index(
        "ix_hl7_message_kept", "hl7_message", ["received_at"], unique=False, sqlite_where=sa.text("content IS NOT NULL")
    )
    op.drop_index("ix_hl7_message_received_at", table_name="hl7_message")


def downgrade() -> None:
    """The way back."""
    op.create_index("ix_hl7_message_received_at", "hl7_message", ["received_at"], unique=False)
    op.drop_index("ix_hl7_message_kept", table_name="hl7_message")
