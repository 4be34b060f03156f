"""The preloaded library and the folders that tests of power cuts and kills share."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("shim.c")


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """shim.c, compiled."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler (cc), which the recording of a power cut needs")
    library = tmp_path_factory.mktemp("shim") / "shim.so"
    command = [compiler, "-shared", "-fPIC", "-O2", "-Wall", "-Werror", "-o", library, SOURCE, "-ldl", "-lpthread"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0 and "No such file or directory" in done.stderr:
        pytest.skip(f"the C compiler has no C library to compile against (libc6-dev): {done.stderr.splitlines()[0]}")
    assert done.returncode == 0, done.stderr
    return library


@pytest.fixture
def quick() -> Iterator[Path]:
    """A folder in memory where there is one: what is laid out there only has to be read again."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="powercut-", dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)
