"""No index of instances by association: nothing asks for it, and every instance waited until it was written."""

from __future__ import annotations

from alembic import op

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """One step forward."""
    op.drop_index("ix_instance_association_id", table_name="instance")


def downgrade() -> None:
    """The way back."""
    op.create_index("ix_instance_association_id", "instance", ["association_id"], unique=False)
