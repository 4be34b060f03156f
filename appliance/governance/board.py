"""The site's Model Review Board: which version of a package may run here, in which mode, until when, and who says so.

Its decisions are events of the ledger, appended and never changed; what holds now is what follows from them in their
order. A package is approved in exactly one version, by the digest of its package.toml. A suspension is of the package,
whatever version lies there; after it every version needs a new approval. Or it is of one version, whether that lies
there or not, as when its maker recalls it: it does not run either where it comes back, by a rollback or another bundle.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from appliance.events import Event
from appliance.governance.indication import BOX, CRITERIA, BoardException, Criterion
from appliance.governance.package import Package
from appliance.ledger.board import BoardRecords
from dicom_io.errors import ScansideError

Mode: TypeAlias = Literal["clinical", "shadow", "evaluation"]
MODES: tuple[Mode, ...] = get_args(Mode)
APPROVAL = "approval"
INTEGRITY = "integrity"


class BoardError(ScansideError):
    """A decision that the board cannot take."""


@dataclass(frozen=True, slots=True)
class Decision:
    """One record of the board.

    Attributes:
        record: its number, by which it is cited: that of its event in the ledger.
        at: when it was recorded (UTC, ISO 8601).
        what: approved, suspended, retired, excepted, revoked.
        package, version, digest: what it is on; the digest of package.toml. The last two are empty for a suspension of
            a package that could not be read, and the last alone for one of a version, whatever lies there.
        who, why: who answers for it, and the reason.
        until: the last day on which an approval or exception holds.
        mode: in which an approved package runs.
        criterion: of an exception.
        revokes: the record that a revocation takes back.
        evidence, evidence_digest: the name of a file that was kept with it, and its SHA-256.
    """

    record: int
    at: str
    what: str
    package: str
    who: str
    why: str
    version: str = ""
    digest: str = ""
    until: date | None = None
    mode: Mode = "evaluation"
    criterion: str = ""
    revokes: int = 0
    evidence: str = ""
    evidence_digest: str = ""

    @property
    def of_version(self) -> bool:
        """Whether it suspends one version, wherever it may come from."""
        return self.what == "suspended" and bool(self.version) and not self.digest

    @property
    def said(self) -> str:
        """What was decided, in words."""
        match self.what:
            case "suspended" if self.of_version:
                return "suspended in this version"
            case "approved":
                return f"approved as {self.mode} until {self.until}"
            case "excepted":
                return f"excepted from {self.criterion} until {self.until}"
            case "revoked":
                return f"exception {self.revokes} revoked"
        return self.what

    def row(self) -> dict[str, Any]:
        """JSON-ready; without what a decision of its kind does not say."""
        said: dict[str, Any] = {name: getattr(self, name) for name in ("record", "at", "what", *_DETAIL[self.what])}
        said["until"] = self.until.isoformat() if self.until else None
        return {key: value for key, value in said.items() if value not in (None, "")}


_COMMON = ("package", "version", "digest", "who", "why", "evidence", "evidence_digest")
_DETAIL: dict[str, tuple[str, ...]] = {
    "approved": (*_COMMON, "mode", "until"),
    "suspended": _COMMON,
    "retired": _COMMON,
    "excepted": (*_COMMON, "criterion", "until"),
    "revoked": (*_COMMON, "revokes"),
}


class Board:
    """What the board decided, as far as the records go; never changes.

    Args:
        decisions: in their order.
        last: the number of the newest record in the ledger.
        fault: why the records are not to be trusted; '' if they are.
    """

    def __init__(self, decisions: Sequence[Decision] = (), last: int = 0, fault: str = "") -> None:
        self.decisions = tuple(decisions)
        self.last = last
        self.fault = fault
        self._approved: dict[tuple[str, str], Decision] = {}
        self._stopped: dict[str, Decision] = {}
        self._recalled: dict[tuple[str, str], Decision] = {}
        self._retired: dict[tuple[str, str], Decision] = {}
        self._excepted: dict[int, Decision] = {}
        for one in self.decisions:
            match one.what:
                case "approved":
                    if (one.package, one.digest) not in self._retired:  # as it was retired for good
                        self._approved[one.package, one.digest] = one
                        self._recalled.pop((one.package, one.version), None)
                case "suspended" if one.of_version:
                    named = (one.package, one.version)
                    self._approved = {
                        key: held for key, held in self._approved.items() if (held.package, held.version) != named
                    }
                    self._recalled[named] = one
                case "suspended":
                    self._approved = {key: held for key, held in self._approved.items() if key[0] != one.package}
                    self._stopped[one.package] = one
                case "retired":
                    self._approved.pop((one.package, one.digest), None)
                    self._retired[one.package, one.digest] = one
                case "excepted":
                    self._excepted[one.record] = one
                case "revoked":
                    self._excepted.pop(one.revokes, None)

    def distrust(self, fault: str) -> Board:
        """The same records, not to be trusted."""
        return Board(self.decisions, self.last, fault)

    def day(self, today: date | None = None) -> date:
        """The day on which what is bounded must hold: never before the newest decision.

        A clock that was set back, or that starts in 1970, revives nothing.

        Args:
            today: what the clock says; asked if omitted.
        """
        decided = [datetime.fromisoformat(one.at).astimezone().date() for one in self.decisions[-1:] if one.at]
        return max([today or date.today(), *decided])

    def approval(self, package: Package) -> Decision | None:
        """The approval of this very version, whether its time is over or not."""
        return self._approved.get((package.name, package.digest))

    def retirement(self, package: Package) -> Decision | None:
        """The record that retired this very version."""
        return self._retired.get((package.name, package.digest))

    def recall(self, name: str, version: str) -> Decision | None:
        """The record that suspended this version, wherever it may come from, if it was not approved since."""
        return self._recalled.get((name, version))

    def exceptions(self, package: Package, today: date | None = None) -> list[BoardException]:
        """The exceptions for this very version whose time is not over; none from records that are not to be trusted."""
        day = self.day(today)
        return [
            BoardException(one.package, one.criterion, f"{one.why} (record {one.record})", one.who, one.until)
            for one in self._excepted.values()
            if not self.fault
            and one.until
            and one.until >= day
            and (one.package, one.digest) == (package.name, package.digest)
        ]

    def exception(self, record: int) -> Decision | None:
        """An exception that was not revoked."""
        return self._excepted.get(record)

    def holds(self, record: int, today: date) -> bool:
        """Whether a decision is in force; a suspension is until a version is approved after it."""
        approved = {one.package for one in self._approved.values()}
        stopped = [one for one in self._stopped.values() if one.package not in approved]
        bounded = [*self._approved.values(), *self._excepted.values()]
        held = [one for one in bounded if one.until and one.until >= self.day(today)]
        gone = (*self._retired.values(), *self._recalled.values())
        return not self.fault and any(one.record == record for one in (*held, *stopped, *gone))

    def judge(self, package: Package, today: date | None = None) -> tuple[Criterion, Mode]:
        """Whether a package may run here, as a criterion of its admissions, and in which mode if it may.

        Args:
            today: the day on which an approval must hold; today if omitted.
        """
        day = self.day(today)
        spoken = [
            one
            for one in self.decisions
            if one.package == package.name
            and one.what not in _OF_STUDIES
            and (not one.of_version or one.version == package.version)  # the recall of another is none of this one
        ]
        rule = "an approval of this version that is in force"
        if self.fault:  # also for what needs no approval: it may have been suspended
            return _criterion(f"the records are not to be trusted: {self.fault}", rule, None), "evaluation"
        if package.mode == "evaluation" and not spoken:
            return _criterion("none is needed: it is only evaluated", rule + ", or none to be only evaluated", True), (
                "evaluation"
            )
        held = self.approval(package)
        if held is None:
            return _criterion(self._why_not(package, spoken), rule, False), "evaluation"
        said = f"approved by {held.who} as {held.mode} until {held.until} (record {held.record})"
        if held.until is None or held.until < day:
            return _criterion(f"{said}: that is over", rule, False), "evaluation"
        if problem := unfit(package, held.mode):
            return _criterion(f"{said}, but {problem}", rule, False), "evaluation"
        return _criterion(said, rule, True), held.mode

    def _why_not(self, package: Package, spoken: Sequence[Decision]) -> str:
        """Why a version without an approval has none, by the record that says most of it."""
        if gone := self._retired.get((package.name, package.digest)):
            return f"retired by {gone.who}: {gone.why} (record {gone.record})"
        if recalled := self._recalled.get((package.name, package.version)):
            return f"this version was suspended by {recalled.who}: {recalled.why} (record {recalled.record})"
        if (stop := self._stopped.get(package.name)) and all(one.record <= stop.record for one in spoken):
            return f"suspended by {stop.who}: {stop.why} (record {stop.record})"
        other = next((one for one in reversed(spoken) if one.what == "approved"), None)
        if other is None:
            return "never approved"
        same = "" if other.version != package.version else f" with another package.toml ({other.digest[:19]}…)"
        return f"approved was {other.version}{same} (record {other.record}), this is {package.version}"


_OF_STUDIES = ("excepted", "revoked")
"""Decisions that say nothing of whether a package runs."""


def _criterion(value: str, rule: str, met: bool | None) -> Criterion:
    outcome: Literal["unknown", "met", "violated"] = "unknown" if met is None else "met" if met else "violated"
    return Criterion(APPROVAL, "board record", value, rule, outcome, clause=BOX)


def unfit(package: Package, mode: Mode) -> str:
    """Why a package can never run in that mode, in part of a sentence; '' if it can."""
    if mode != "clinical":
        return ""
    if package.mode != "clinical":
        return f"its maker made it for {package.mode} only"
    if package.clearance.strip().lower().startswith("none"):
        return f"it is not cleared (clearance: {package.clearance})"
    return ""


def integrity(package: Package | None, problem: str) -> Criterion:
    """The criterion of a package that is, or is not, what was loaded and signed.

    Args:
        package: None where it cannot even be loaded.
        problem: the file that is not, and what differs; '' if all is as it must be.
    """
    said = f"package.toml {package.digest[:19]}… and the {len(package.files)} files that it states" if package else ""
    return Criterion(
        INTEGRITY,
        "SHA-256 of the package's files, Triton's configuration",
        problem or said,
        "what was signed, unchanged",
        "met" if package and not problem else "violated",
        clause=BOX,
    )


# --- records --------------------------------------------------------------------------------------------


def read_board(ledger: BoardRecords, fault: str = "") -> Board:
    """The board as the ledger has it now.

    Args:
        fault: why its records are not to be trusted, if somebody knows.
    """
    rows = ledger.decisions()
    decisions = []
    for row in rows:
        try:
            decisions.append(_read(row))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            fault = fault or f"event {row['id']} ({row['name']}): it cannot be read ({error})"
    return Board(decisions, rows[-1]["id"] if rows else 0, fault)


def _read(row: Mapping[Any, Any]) -> Decision:
    what = row["name"].removeprefix("board.")
    said = {name: row["detail"][name] for name in _DETAIL[what]}
    if "until" in said:
        said["until"] = date.fromisoformat(said["until"])
    return Decision(record=row["id"], at=row["at"], what=what, **said)


def approve(
    ledger: BoardRecords,
    evidence_directory: Path,
    package: Package,
    mode: Mode,
    *,
    who: str,
    why: str,
    until: date,
    evidence: Path | None = None,
) -> Decision:
    """Let this version run here in that mode, until the end of a day.

    Raises:
        BoardError: the package can never run in that mode, was retired, or the day is over.
        OSError: the evidence cannot be read or kept.
    """
    if problem := unfit(package, mode):
        fit = "shadow or evaluation"
        raise BoardError(f"it cannot be approved as clinical: {problem}", package.name, f"approve it as {fit}")
    if gone := read_board(ledger).retirement(package):
        said = f"{package.version} was retired by {gone.who} (record {gone.record})"
        raise BoardError(said, package.name, "install another version and approve that")
    decision = Decision(0, "", "approved", package.name, who, why, package.version, package.digest, until, mode)
    return _record(ledger, evidence_directory, decision, evidence)


def suspend(
    ledger: BoardRecords,
    evidence_directory: Path,
    name: str,
    package: Package | None,
    *,
    who: str,
    why: str,
    evidence: Path | None = None,
) -> Decision:
    """Stop a package at once, in every version; what waits to be sent of it is withdrawn.

    Args:
        package: what lies there under that name; None if it cannot be read.

    Raises:
        BoardError: it is said by nobody, or without a reason.
        OSError: the evidence cannot be read or kept.
    """
    version, digest = (package.version, package.digest) if package else ("", "")
    decision = Decision(0, "", "suspended", name, who, why, version, digest)
    return _record(ledger, evidence_directory, decision, evidence)


def suspend_version(
    ledger: BoardRecords,
    evidence_directory: Path,
    name: str,
    version: str,
    *,
    who: str,
    why: str,
    evidence: Path | None = None,
) -> Decision:
    """Stop one version of a package, also where it comes back; other versions run on. Once is enough.

    Raises:
        BoardError: it is said by nobody, without a reason, or of no version.
        OSError: the evidence cannot be read or kept.
    """
    if not version.strip():  # a record without one would stop every version
        raise BoardError("--version is empty", name, "name the version; without --version all are suspended")
    if held := read_board(ledger).recall(name, version):
        return held
    return _record(ledger, evidence_directory, Decision(0, "", "suspended", name, who, why, version), evidence)


def retire(
    ledger: BoardRecords,
    evidence_directory: Path,
    package: Package,
    *,
    who: str,
    why: str,
    evidence: Path | None = None,
) -> Decision:
    """Stop this version for good; it cannot be approved again.

    Raises:
        BoardError: it is said by nobody, or without a reason.
        OSError: the evidence cannot be read or kept.
    """
    decision = Decision(0, "", "retired", package.name, who, why, package.version, package.digest)
    return _record(ledger, evidence_directory, decision, evidence)


def make_exception(
    ledger: BoardRecords,
    evidence_directory: Path,
    package: Package,
    criterion: str,
    *,
    who: str,
    why: str,
    until: date,
    evidence: Path | None = None,
) -> Decision:
    """Let studies pass of which a criterion of this version's label is unknown, until the end of a day.

    Raises:
        BoardError: there is no such criterion, or the day is over.
        OSError: the evidence cannot be read or kept.
    """
    if criterion not in CRITERIA:
        raise BoardError(f"there is no criterion {criterion!r}", package.name, f"there are {', '.join(CRITERIA)}")
    decision = Decision(
        0, "", "excepted", package.name, who, why, package.version, package.digest, until, criterion=criterion
    )
    return _record(ledger, evidence_directory, decision, evidence)


def revoke(
    ledger: BoardRecords,
    evidence_directory: Path,
    record: int,
    *,
    who: str,
    why: str,
    evidence: Path | None = None,
) -> Decision:
    """Take an exception back.

    Raises:
        BoardError: that record is no exception, or was revoked.
        OSError: the evidence cannot be read or kept.
    """
    held = read_board(ledger).exception(record)
    if held is None:
        remedy = "`scanside models history` lists the records; an approval ends with suspend or retire"
        raise BoardError("it is no exception that holds", f"record {record}", remedy)
    decision = Decision(0, "", "revoked", held.package, who, why, held.version, held.digest, revokes=record)
    return _record(ledger, evidence_directory, decision, evidence)


def _record(ledger: BoardRecords, evidence_directory: Path, decision: Decision, evidence: Path | None) -> Decision:
    """Keep the evidence, then write the decision down."""
    for name, text in (("who", decision.who), ("why", decision.why)):
        if not text.strip():
            raise BoardError(f"--{name} is empty", decision.package, "say who answers for it, and why")
    if decision.until is not None and decision.until < date.today():
        raise BoardError(f"{decision.until} is over", decision.package, "name a day that is to come")
    if evidence is not None:
        digest = _keep(evidence, evidence_directory)
        decision = replace(decision, evidence=evidence.name, evidence_digest=digest)
    detail = {name: getattr(decision, name) for name in _DETAIL[decision.what] if name != "package"}
    if decision.until is not None:
        detail["until"] = decision.until.isoformat()
    record = ledger.record_decision(Event(f"board.{decision.what}"), decision.package, **detail)
    return replace(decision, record=record, at=next(row["at"] for row in ledger.decisions() if row["id"] == record))


def _keep(evidence: Path, directory: Path) -> str:
    """Copy a file under its SHA-256, whole and synced; returns "sha256:…"."""
    content = evidence.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / digest
    part = directory / f".{digest}.part"
    part.unlink(missing_ok=True)  # one that was left behind may be read-only already
    part.write_bytes(content)
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.chmod(0o444)
    part.replace(path)
    folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return f"sha256:{digest}"
