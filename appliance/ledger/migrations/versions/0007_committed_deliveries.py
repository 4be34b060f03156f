"""A delivery remembers by which request its peer was asked to commit itself to keeping it."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """One step forward."""
    op.add_column("delivery", sa.Column("transaction_uid", sa.String(), nullable=True))
    op.create_index(op.f("ix_delivery_transaction_uid"), "delivery", ["transaction_uid"], unique=False)


def downgrade() -> None:
    """The way back."""
    op.drop_index(op.f("ix_delivery_transaction_uid"), table_name="delivery")
    op.drop_column("delivery", "transaction_uid")
