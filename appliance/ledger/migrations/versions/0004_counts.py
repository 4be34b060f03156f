"""What a sender says of how many images there are to come, in the headers kept."""

from __future__ import annotations

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_NAMES = ("number_of_series_related_instances", "images_in_acquisition")


def upgrade() -> None:
    """One step forward."""
    unknown = ", ".join(f"'$.{name}', json('null')" for name in _NAMES)
    op.execute(f"UPDATE instance SET header = json_set(header, {unknown}) WHERE removed_at IS NULL")


def downgrade() -> None:
    """The way back."""
    names = ", ".join(f"'$.{name}'" for name in _NAMES)
    op.execute(f"UPDATE instance SET header = json_remove(header, {names}) WHERE removed_at IS NULL")
