"""scanside's installer; see `python3 scanside_install.py --help`.

It lies in the bundle beside the package that does the work. On a box without the library `cryptography` it takes the
one of the folder `wheels` beside this file, which came the same way as this file and is as much, or as little, to be
trusted.
"""

import atexit
import importlib.util
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent


def bring_cryptography() -> None:
    """Unpack the wheels beside this file for the time of this process."""
    wheels = sorted((HERE / "wheels").glob("*.whl"))
    if importlib.util.find_spec("cryptography") or not wheels:
        return
    folder = tempfile.mkdtemp(prefix="scanside-install-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    sys.path.insert(0, folder)


if __name__ == "__main__":
    if sys.version_info < (3, 11):  # noqa: UP036  # it may be run by any
        sys.exit("scanside-install: Python 3.11 or newer is needed: run it with that one")
    sys.path.insert(0, str(HERE))
    bring_cryptography()
    try:
        from scanside_release.installer import main  # type: ignore[import-not-found]
    except ModuleNotFoundError as error:
        sys.exit(f"scanside-install: {error}: install Debian's python3-cryptography, or copy the whole folder here")
    sys.exit(main())
