from __future__ import annotations

import re
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicom_io.errors import ScansideError
from dicom_io.objects.uids import derived_uid

PARTS = st.lists(st.text(max_size=12), min_size=1, max_size=4)
ROOTS = st.sampled_from(["2.25", "1.2.826.0.1.3680043.8.498", "1.2.3", "1.2.826.0.1.3680043.10.12345.67890.12"])
VALID = re.compile(r"[0-2](\.(0|[1-9][0-9]*))+")


@given(ROOTS, PARTS)
def test_a_uid_is_valid_under_its_root_and_always_the_same(root: str, parts: list[str]) -> None:
    uid = derived_uid(root, *parts)
    assert VALID.fullmatch(uid) and len(uid) <= 64 and uid.startswith(root + ".")
    assert derived_uid(root, *parts) == uid


@given(ROOTS, PARTS, PARTS)
def test_different_parts_have_different_uids(root: str, one: list[str], other: list[str]) -> None:
    assert (derived_uid(root, *one) == derived_uid(root, *other)) == (one == other)


def test_parts_are_not_run_together() -> None:
    assert derived_uid("2.25", "ab", "c") != derived_uid("2.25", "a", "bc")


def test_under_2_25_it_is_a_version_5_uuid() -> None:
    number = int(derived_uid("2.25", "study", "report").removeprefix("2.25."))
    assert uuid.UUID(int=number).version == 5


@pytest.mark.parametrize("root", ["", "1", "1.2.", "1.02.3", "9.1", "1.2.x", "1." + "1" * 50])
def test_a_root_that_cannot_be_used_is_refused_by_name(root: str) -> None:
    with pytest.raises(ScansideError, match="UID root"):
        derived_uid(root, "study")
