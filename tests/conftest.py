"""Fixtures that every test may use."""

from __future__ import annotations

import logging
import os
import socketserver
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes says how busy the machine is, and nothing of what is tested.
settings.register_profile("scanside", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("scanside")

# A server of the standard library, and so one of pynetdicom, looks this often whether it is to end: half a second by
# default, which would be most of what the tests that start one take.
socketserver.BaseServer.serve_forever.__defaults__ = (0.02,)

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_finish(session: pytest.Session) -> None:
    """Stop where `--dist loadgroup` would keep no group together: pytest-xdist says nothing of it.

    It writes the group behind a test's name, which not every pytest takes; what shares a machine would be torn apart.
    """
    if getattr(session.config.option, "loadgroup", False):
        for item in session.items:
            if item.get_closest_marker("xdist_group") and "@" not in item.nodeid.rpartition("]")[2]:
                raise pytest.UsageError(f"{item.nodeid}: pytest-xdist cannot group tests with this pytest")


@pytest.fixture(autouse=True)
def _log_as_before() -> Iterator[None]:
    """A command that ran in this process set up the log for itself: the next test must not read or write there."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield
    root.setLevel(level)
    for one in list(root.handlers):
        if one not in handlers and not type(one).__module__.startswith("_pytest"):
            root.removeHandler(one)


def _data(name: str) -> Path:
    folder = Path(os.environ.get("SCANSIDE_TEST_DATA", ROOT.parent / "shared" / "data")) / name
    if not folder.is_dir():
        pytest.skip(f"test data {name} is absent (set SCANSIDE_TEST_DATA)")
    return folder


@pytest.fixture(scope="session")
def ge_head() -> Path:
    """A real head CT: 28 slices, tilted gantry, no birth date, sex or study date."""
    return _data("ge_head_28")


@pytest.fixture(scope="session")
def philips_phantom() -> Path:
    """A scanner's whole study of a hollow skull: scout, 5 mm, 1 mm, captures, files that are no images."""
    return _data("philips_skull_phantom")


@pytest.fixture(scope="session")
def malformed() -> Path:
    """Hostile DICOM files by category, with one valid baseline."""
    return _data("malformed_dicom")
