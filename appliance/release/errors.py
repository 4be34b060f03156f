"""The one error of everything here, in three parts like every error of scanside."""

from __future__ import annotations


class ReleaseError(Exception):
    """A bundle, a key or a box that cannot be used.

    Attributes:
        what: what is wrong.
        where: the file, folder, unit or version.
        remedy: what to do.
    """

    def __init__(self, what: str, where: str, remedy: str) -> None:
        super().__init__(f"{what} ({where}): {remedy}")
        self.what = what
        self.where = where
        self.remedy = remedy
