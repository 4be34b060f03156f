"""Instances of a study, grouped into series."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dicom_io.header import Header


@dataclass(frozen=True, slots=True)
class Series:
    """The instances of one series that have arrived, ordered by InstanceNumber and then by UID."""

    series_instance_uid: str
    headers: tuple[Header, ...]

    @property
    def first(self) -> Header:
        """The header that speaks for the series."""
        return self.headers[0]


def group(headers: Iterable[Header]) -> tuple[Series, ...]:
    """Group by SeriesInstanceUID, ordered by SeriesNumber and then by UID; any order of arrival gives the same."""
    found: dict[str, list[Header]] = {}
    for header in headers:
        found.setdefault(header.series_instance_uid, []).append(header)
    series = [
        Series(uid, tuple(sorted(members, key=lambda h: (_number(h.instance_number), h.sop_instance_uid))))
        for uid, members in found.items()
    ]
    return tuple(sorted(series, key=lambda s: (_number(s.first.series_number), s.series_instance_uid)))


def _number(value: int | None) -> tuple[bool, int]:
    return value is None, value or 0
