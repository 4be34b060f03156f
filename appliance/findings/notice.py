"""What a mail and a webhook are told of a verdict: the alert's words, and of the patient only what the site names."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from email import policy
from email.message import EmailMessage
from typing import Any

from pydicom.dataset import Dataset

from appliance.findings import wording
from appliance.findings.alert import Kind, value_of
from appliance.ledger.records import Verdict

_KEYWORDS = {
    "accession": "AccessionNumber",
    "study_uid": "StudyInstanceUID",
    "patient_id": "PatientID",
    "patient_name": "PatientName",
    "birth_date": "PatientBirthDate",
}
_HEADLINES: dict[Kind, str] = {
    "provisional": "Provisional alert: intracranial haemorrhage suspected in a study that is still arriving",
    "alert": "Alert: intracranial haemorrhage suspected",
    "confirmation": "Alert confirmed on the whole study: intracranial haemorrhage suspected",
    "correction": "Correction: intracranial haemorrhage suspected again",
    "withdrawal": "The earlier alert is withdrawn",
}
TEST = "EVALUATION ONLY, NOT FOR CARE"
"""Begins every subject and text on a verdict of a package that is not in clinical mode."""


@dataclass(frozen=True, slots=True)
class Notice:
    """What is told, whatever carries it.

    Attributes:
        id: the same at every try, as MSH-10 is.
        box: name of this box.
        study: number of the study on this box.
        named: what the site allows to be named, in its order; empty values are left out.
    """

    id: str
    kind: Kind
    box: str
    study: int
    verdict: Verdict
    revision: int
    issued_at: datetime
    named: tuple[tuple[str, str], ...]

    @property
    def is_test(self) -> bool:
        """The package is not in clinical mode."""
        return self.verdict.mode != "clinical"

    @property
    def headline(self) -> str:
        """What it says, in one line that names nobody."""
        return f"{TEST}: {_HEADLINES[self.kind]}" if self.is_test else _HEADLINES[self.kind]

    @property
    def sentences(self) -> Sequence[str]:
        """What the verdict says, and the notices that go with it."""
        lines = [wording.impression(self.verdict), wording.TRIAGE_ONLY, self.verdict.notice]
        return [*lines, *(f"Limitation: {one}" for one in self.verdict.limitations)]

    @property
    def nameless(self) -> Sequence[str]:
        """The same for whoever may not know the patient: why a study was refused quotes ages and free text, in which
        people write names."""
        if not self.verdict.withdrawn:
            return self.sentences
        why = replace(self.verdict, withdrawn=f"on {self.box}, study {self.study} says why")
        return replace(self, verdict=why).sentences


def named(source: Dataset, include: Collection[str]) -> tuple[tuple[str, str], ...]:
    """The values of these identifiers that the study has, printable and on one line each."""
    found = ((name, value_of(source, keyword)) for name, keyword in _KEYWORDS.items() if name in include)
    clean = ((name, "".join(c if c.isprintable() else " " for c in value).strip()) for name, value in found)
    return tuple((name, value) for name, value in clean if value)


def render_mail(notice: Notice, sender: str, recipients: Sequence[str]) -> bytes:
    """The message (RFC 5322, UTF-8) with a Message-ID that is the same at every try."""
    mail = EmailMessage(policy=policy.SMTP.clone(cte_type="7bit"))
    mail["Date"] = notice.issued_at
    mail["From"] = sender
    mail["To"] = ", ".join(recipients)
    mail["Subject"] = f"{notice.headline} (study {notice.study})"
    mail["Message-ID"] = f"<{notice.id}@{sender.rpartition('@')[2]}>"
    mail["Auto-Submitted"] = "auto-generated"  # RFC 3834: an absent reader's machine must not answer
    mail["Importance"] = "high"
    facts = [
        f"study number on {notice.box}: {notice.study}",
        *(f"{name.replace('_', ' ')}: {value}" for name, value in notice.named),
        f"revision: {notice.revision}",
        f"verdict at: {notice.issued_at.isoformat(timespec='seconds')}",
        f"message: {notice.id}",
    ]
    mail.set_content("\n".join([notice.headline, "", *notice.nameless, "", *facts]) + "\n")
    return mail.as_bytes()


def render_webhook(notice: Notice) -> bytes:
    """The body of the request: a JSON object in UTF-8; docs/conformance.md lists its members."""
    verdict = notice.verdict
    said: dict[str, Any] = {
        "id": notice.id,
        "kind": notice.kind,
        "test": notice.is_test,
        "positive": verdict.positive,
        "box": notice.box,
        "study": notice.study,
        **dict(notice.named),
        "revision": notice.revision,
        "issued_at": notice.issued_at.isoformat(timespec="microseconds"),
        "package": verdict.package,
        "package_version": verdict.package_version,
        "text": [notice.headline, *notice.nameless],
    }
    if not verdict.withdrawn:
        said["probability"] = round(verdict.probability, 4)
        said["volume_ml"] = round(verdict.volume_ml, 2)
    return json.dumps(said, ensure_ascii=False).encode("utf-8")
