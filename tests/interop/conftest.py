"""One box for all tests that share it, in a process of pytest of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.interop.box import Box, running_box


@pytest.fixture(scope="session")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    """A running box with Orthanc and an HL7 listener that acknowledges."""
    with running_box(tmp_path_factory.mktemp("box")) as one:
        yield one
