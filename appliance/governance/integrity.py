"""Drift: whether a package's folder still is what was loaded, and which packages can be loaded at all."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from appliance.governance.package import Package, load, load_configured, trusted_keys
from appliance.governance.signature import Keyring
from appliance.settings import Settings, SettingsError
from dicom_io.errors import ScansideError

REHASH_SECONDS = 300.0
"""So often everything is read again although nothing looks changed: a disk can lie, and a clock be set back."""


class Files:
    """Files that must stay as they are: looked at by their stat, read only where that changed, and now and then.

    Args:
        folders: all below them is looked at.
        check: reads them; what is wrong, in one line that names the file, '' if nothing is.
    """

    def __init__(
        self, folders: Sequence[Path], check: Callable[[], str], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._folders = folders
        self._check = check
        self._clock = clock
        self._seen: dict[str, tuple[int, ...]] | None = None
        self._read_at = 0.0
        self._problem = ""

    def look(self) -> str:
        """What is wrong now; '' if nothing is."""
        # First, so that what changes while it is read is seen the next time.
        seen = _stats(self._folders)
        if seen != self._seen or self._clock() - self._read_at >= REHASH_SECONDS:
            self._problem = self._check()
            self._seen, self._read_at = seen, self._clock()
        return self._problem


def _stats(folders: Sequence[Path]) -> dict[str, tuple[int, ...]]:
    """Every file and folder below these: what changes when it is written to, replaced, or given an old date again."""
    found: dict[str, tuple[int, ...]] = {}
    for path in (one for folder in folders for one in (folder, *folder.rglob("*"))):
        try:
            one = path.lstat()
        except OSError:
            continue
        found[str(path)] = (one.st_mtime_ns, one.st_ctime_ns, one.st_size, one.st_ino, one.st_mode)
    return found


def package_files(package: Package, trusted: Keyring, *, allow_unsigned: bool) -> Files:
    """The folder of a package that was loaded: its signature, package.toml, every file that it lists, and no other."""

    def check() -> str:
        try:
            found = load(package.folder, trusted=trusted, allow_unsigned=allow_unsigned)
        except ScansideError as error:
            return f"{error.where}: {error.what}"
        if found.digest != package.digest:
            where = package.folder / "package.toml"
            return f"{where}: it is version {found.version}, and {package.version} runs; restart to run what lies there"
        return ""

    return Files([package.folder], check)


def watched(settings: Settings, packages: Sequence[Package]) -> dict[str, Files]:
    """The folder of each package, by its name.

    Raises:
        SettingsError: a key that is to be trusted cannot be read.
    """
    trusted, unsigned = trusted_keys(settings), settings.models.allow_unsigned
    return {package.name: package_files(package, trusted, allow_unsigned=unsigned) for package in packages}


def load_sound(settings: Settings) -> tuple[tuple[Package, ...], dict[str, str]]:
    """The configured packages that can be loaded, and of each of the others what is wrong.

    Raises:
        SettingsError: as `load_configured`.
        ScansideError: each by itself is sound, but they cannot run together.
    """
    sound: list[str] = []
    broken: dict[str, str] = {}
    for name in dict.fromkeys(settings.models.packages):
        try:
            load_configured(settings, [name])
        except SettingsError:
            raise
        except ScansideError as error:
            broken[name] = f"{error.where}: {error.what}"
        else:
            sound.append(name)
    packages = load_configured(settings, None if not broken else sound)
    return packages, broken
