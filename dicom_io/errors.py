"""The errors a person can meet: what happened, where, and what to do about it."""

from __future__ import annotations


class ScansideError(Exception):
    """An error with three parts, shown as one line.

    Args:
        what: what happened, in a sentence without its full stop.
        where: the file, setting, peer or attribute that it happened at.
        remedy: what the reader can do now.
    """

    def __init__(self, what: str, where: str = "", remedy: str = "") -> None:
        super().__init__(what, where, remedy)
        self.what = what
        self.where = where
        self.remedy = remedy

    def __str__(self) -> str:
        line = f"{self.where}: {self.what}" if self.where else self.what
        return f"{line}; {self.remedy}" if self.remedy else line


class HeaderError(ScansideError):
    """Bytes that are no DICOM instance, or one without the UIDs that identify it."""


class HeaderCutOff(HeaderError):
    """Bytes that end before the header does; with more of the instance it might be read."""


class DecodeError(ScansideError):
    """Pixel data that cannot be turned into trustworthy Hounsfield units."""


class GeometryError(ScansideError):
    """Slices that do not form one volume."""


class PeerError(ScansideError):
    """Another system that refused, did not answer, or broke the protocol."""


class NotAccepted(PeerError):
    """A peer that takes an association, and nothing of what was proposed in it."""
