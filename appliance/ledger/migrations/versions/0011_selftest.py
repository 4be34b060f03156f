"""The box's own tests, and which studies are of one."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

_MINE = "(SELECT id FROM study WHERE selftest)"
_ANALYSES = f"(SELECT id FROM analysis WHERE study_id IN {_MINE})"
_VERDICTS = f"(SELECT id FROM verdict WHERE analysis_id IN {_ANALYSES})"
_FINDINGS = f"(SELECT id FROM finding WHERE verdict_id IN {_VERDICTS})"


def upgrade() -> None:
    """One step forward."""
    op.create_table(
        "selftest",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("study_instance_uid", sa.String(), nullable=False),
        sa.Column("expected", sa.Boolean(), nullable=False),
        sa.Column("alert_port", sa.Integer(), nullable=False),
        sa.Column("object_port", sa.Integer(), nullable=False),
        sa.Column("begun_at", sa.String(), nullable=False),
        sa.Column("ended_at", sa.String(), nullable=True),
        sa.Column("passed", sa.Boolean(), nullable=True),
        sa.Column("seconds", sa.Float(), nullable=True),
        sa.Column("reason", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_selftest")),
        sa.UniqueConstraint("study_instance_uid", name=op.f("uq_selftest_study_instance_uid")),
    )
    op.add_column("study", sa.Column("selftest", sa.Boolean(), server_default=sa.false(), nullable=False))
    op.create_index("ix_study_selftest", "study", ["id"], unique=False, sqlite_where=sa.text("selftest"))


def downgrade() -> None:
    """The way back. An older scanside would take a test for a patient: of tests only their events stay, and an empty
    study for each, of which nothing can be analysed or sent."""
    op.execute(
        """UPDATE study SET selftest = study_instance_uid IN
        (SELECT study_instance_uid FROM selftest WHERE study.first_instance_at >= selftest.begun_at)
        AND NOT EXISTS (SELECT 1 FROM instance JOIN association ON association.id = instance.association_id
        WHERE instance.study_id = study.id AND (association.calling_ae != 'SCANSIDE-TEST'
        OR NOT (association.address LIKE '127.%' OR association.address = '::1')))"""
    )
    op.execute(f"DELETE FROM delivery WHERE finding_id IN {_FINDINGS}")
    op.execute(f"DELETE FROM finding WHERE id IN {_FINDINGS}")
    op.execute(f"DELETE FROM verdict WHERE id IN {_VERDICTS}")
    op.execute(f"DELETE FROM analysis WHERE id IN {_ANALYSES}")
    op.execute(f"DELETE FROM instance WHERE study_id IN {_MINE}")
    op.execute(
        f"""UPDATE study SET state = 'complete', completions = completions + 1,
        completed_at = coalesce(completed_at, last_instance_at), removed_at = last_instance_at WHERE id IN {_MINE}"""
    )
    op.drop_index("ix_study_selftest", table_name="study", sqlite_where=sa.text("selftest"))
    with op.batch_alter_table("study") as batch:
        batch.drop_column("selftest")
    op.drop_table("selftest")
