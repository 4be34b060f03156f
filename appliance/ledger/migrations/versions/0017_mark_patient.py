"""Which patient the images named that a mark on the worklist rests on."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """One step forward. Of marks that are there nobody knows it."""
    for name in ("patient_id", "issuer_of_patient_id"):
        op.add_column("mark", sa.Column(name, sa.String(), server_default="", nullable=False))


def downgrade() -> None:
    """The way back."""
    for name in ("issuer_of_patient_id", "patient_id"):
        op.drop_column("mark", name)
