"""What each destination is told of a verdict: by HL7, mail and webhook, and in which order of time."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from email import message_from_bytes, policy
from pathlib import Path
from typing import Any

import pydicom
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from appliance import init
from appliance.cli import app
from appliance.events import Event
from appliance.findings.alert import render_alert
from appliance.findings.notice import TEST
from appliance.findings.validate import fault
from appliance.governance.indication import Admission
from appliance.governance.package import load_configured
from appliance.ledger.database import LedgerError
from appliance.ledger.records import ALERT_STANDS, Verdict
from appliance.ledger.store import Ledger
from appliance.ledger.views import event_counts, study_report, unreached_alerts
from appliance.services.issuing import Issuer
from appliance.services.telling import try_template
from appliance.settings import Hl7Destination, Settings, SettingsError, load_settings
from dicom_io.header import read_header
from tests.appliance.intake.test_retention import Box
from tests.findings_support import ISSUED, Series, ct_series, verdict_on

ER: dict[str, Any] = {"kind": "hl7", "name": "er", "host": "h", "port": 1}
MAIL: dict[str, Any] = {
    "kind": "mail", "name": "mail", "host": "h", "sender": "box@site.example", "after_seconds": 60.0,
    "recipients": ["a@b.example", "c@d.example"],
}  # fmt: skip
HOOK: dict[str, Any] = {
    "kind": "webhook", "name": "hook", "url": "https://h/x", "secret_file": "secret", "after_seconds": 120.0,
}  # fmt: skip


class Issued:
    """A box with these destinations of alerts and a study."""

    def __init__(
        self,
        folder: Path,
        destinations: list[dict[str, Any]],
        odd: Callable[[pydicom.Dataset], None] = lambda ds: None,
    ) -> None:
        self.box = Box(folder)
        self.settings = Settings(
            box={"state_directory": folder, "name": "BOX"},
            destination=destinations,  # type: ignore[arg-type]
        )
        self.settings.run_directory.mkdir(exist_ok=True)
        (folder / "series").mkdir()

        def change(ds: pydicom.Dataset) -> None:
            ds.PatientID, ds.AccessionNumber = "PID-7", "ACC-1"
            odd(ds)

        self.series: Series = ct_series(folder / "series", change=change)
        self.issuer = Issuer(self.settings, self.box.ledger, load_configured(Settings()))
        for path in list(self.series.files.values())[:3]:
            assert self.box.store(read_header(path), path.read_bytes()) == "stored"
        self.study = 0

    @property
    def ledger(self) -> Ledger:
        return self.box.ledger

    def issue(self, positive: bool = True, *, stands: bool = False, **changes: Any) -> Verdict:
        if not self.study:
            (arriving,) = self.ledger.arriving_studies()
            self.study = arriving.id
            self.ledger.complete_study(arriving.id, arriving.last_instance_at, {"by": "test", "confidence": "high"})
        verdict = replace(verdict_on(self.series), positive=positive, slabs=(), key_slabs=(), **changes)
        stored = self.ledger.instances(self.study)
        self.ledger.decide(
            self.study, verdict.package, verdict.package_version, admitted=True, reason="", admission=[], selection=[],
            inputs=[[one.sop_instance_uid, one.digest] for one in stored],
        )  # fmt: skip
        row = self.ledger.take_analysis([verdict.package])
        assert row is not None
        self.issuer.issue(row, verdict, Admission(()), stored[0], stands=stands)
        return verdict

    def alerts(self) -> dict[str, tuple[str, int]]:
        """Destination → state and revision of the newest delivery of an alert."""
        report = study_report(self.ledger, self.study)
        revisions = {one["id"]: one["revision"] for one in report["verdicts"]}
        rows = sorted(report["deliveries"], key=lambda one: one["id"])
        return {
            one["destination"]: (one["state"], revisions[one["verdict_id"]])
            for one in rows
            if one["object"].startswith("alert.")
        }

    def content(self, name: str) -> bytes:
        """Of the newest file for that destination."""
        rows = [one for one in study_report(self.ledger, self.study)["findings"] if one["object"] == f"alert.{name}"]
        return (self.settings.findings_directory / rows[-1]["path"]).read_bytes()

    def settle(self, name: str, outcome: Any) -> None:
        row = self.ledger.take_delivery(name)
        assert row is not None
        self.ledger.settle_delivery(row, outcome, steps=self.settings.escalation)


@pytest.fixture
def issued(tmp_path: Path) -> Iterator[Issued]:
    made = Issued(tmp_path, [MAIL, HOOK, ER])
    yield made
    made.ledger.close()


def test_a_positive_verdict_is_told_at_once_and_held_for_the_steps(issued: Issued) -> None:
    issued.issue(mode="clinical")
    assert issued.alerts() == {"er": ("pending", 1), "mail": ("held", 1), "hook": ("held", 1)}


def test_a_negative_verdict_and_one_in_shadow_tell_nobody(issued: Issued) -> None:
    issued.issue(False)
    issued.issue(mode="shadow")
    assert issued.alerts() == {}


def test_a_step_that_was_spared_is_not_told_of_what_follows(issued: Issued) -> None:
    issued.issue(mode="clinical", provisional=True)
    issued.settle("er", "acknowledge")
    issued.issue(mode="clinical")
    assert issued.alerts() == {"er": ("pending", 2), "mail": ("held", 2), "hook": ("held", 2)}, "the confirmation"
    issued.settle("er", "acknowledge")
    issued.issue(False)
    assert issued.alerts() == {"er": ("pending", 3), "mail": ("spared", 2), "hook": ("spared", 2)}


def test_where_those_told_at_once_hear_nothing_new_no_step_is_told(issued: Issued) -> None:
    issued.issue(mode="clinical")
    issued.settle("er", "acknowledge")
    issued.issue(mode="clinical")
    assert issued.alerts() == {"er": ("acknowledged", 1), "mail": ("spared", 1), "hook": ("spared", 1)}


def test_a_step_that_was_told_hears_at_once_of_the_withdrawal(issued: Issued) -> None:
    issued.issue(mode="clinical")
    issued.settle("er", "reject")
    issued.ledger.escalate(["er", "mail", "hook"], 120.0, 300.0)
    issued.settle("mail", "acknowledge")
    issued.issue(False)
    assert issued.alerts() == {"er": ("rejected", 1), "mail": ("pending", 2), "hook": ("spared", 1)}
    assert b"withdrawn" in issued.content("mail")


def test_a_mail_names_the_study_and_nobody_beyond_what_the_site_allows(issued: Issued) -> None:
    verdict = issued.issue(mode="clinical")
    mail = message_from_bytes(issued.content("mail"), policy=policy.default)
    text = mail.get_content()
    assert "ACC-1" in text
    assert f"study number on BOX: {issued.study}" in text
    for secret in ("PID-7", str(issued.series.header().PatientName), verdict.study_instance_uid):
        assert secret and secret not in issued.content("mail").decode()
        assert secret not in issued.content("hook").decode()
    assert TEST not in mail["Subject"]
    assert "ACC-1" not in mail["Subject"]
    assert mail["To"] == "a@b.example, c@d.example"
    (row,) = [one for one in study_report(issued.ledger, issued.study)["findings"] if one["object"] == "alert.mail"]
    assert mail["Message-ID"] == f"<{row['uid']}@site.example>"
    assert mail["Auto-Submitted"] == "auto-generated"
    assert "radiologist must read" in text and "haemorrhage suspected" in text.lower()


def test_a_mail_and_a_webhook_do_not_say_why_a_study_was_refused(tmp_path: Path) -> None:
    """The reason quotes what technicians write into descriptions; HL7, which names the patient, says it."""
    mail = {**MAIL, "after_seconds": 0}
    issued = Issued(tmp_path, [ER, mail, {**HOOK, "after_seconds": 0}])
    issued.issue(mode="clinical", provisional=True)
    for name in ("er", "mail", "hook"):
        issued.settle(name, "acknowledge")
    issued.issue(False, mode="clinical", withdrawn="body_part is Kopf MUELLER HANS, label: head")
    assert issued.alerts() == {"er": ("pending", 2), "mail": ("pending", 2), "hook": ("pending", 2)}
    assert b"MUELLER" in issued.content("er")
    mailed = message_from_bytes(issued.content("mail"), policy=policy.default).get_content()
    for told in (mailed, " ".join(json.loads(issued.content("hook"))["text"])):
        assert "MUELLER" not in told and "withdrawn" in told
        assert f"was not analysed: on BOX, study {issued.study} says why. Nothing is said of haemorrhage." in told
    issued.ledger.close()


def test_a_webhook_is_json_with_what_the_site_allows(tmp_path: Path) -> None:
    everything = ["accession", "study_uid", "patient_id", "patient_name", "birth_date"]
    issued = Issued(tmp_path, [{**HOOK, "after_seconds": 0, "include": everything}])
    verdict = issued.issue(mode="clinical")
    said = json.loads(issued.content("hook"))
    header = issued.series.header()
    assert said["accession"] == "ACC-1"
    assert (said["patient_id"], said["patient_name"]) == ("PID-7", str(header.PatientName))
    assert said["study_uid"] == verdict.study_instance_uid
    assert (said["kind"], said["positive"], said["test"], said["study"]) == ("alert", True, False, issued.study)
    assert said["probability"] == pytest.approx(verdict.probability, abs=1e-4)
    assert any("radiologist must read" in line for line in said["text"])
    issued.ledger.close()


def test_a_backslash_in_a_value_is_told_as_it_stands_there(tmp_path: Path) -> None:
    def odd(dataset: pydicom.Dataset) -> None:
        dataset.PatientID, dataset.AccessionNumber = "AB\\12", "A\\1"

    hook = {**HOOK, "after_seconds": 0, "include": ["accession", "patient_id"]}
    list_ = {
        "kind": "rest", "name": "list", "mode": "suggest", "url": "https://h/${accession}",
        "body": '{"patient": "${patient_id}"}',
    }  # fmt: skip
    issued = Issued(tmp_path, [hook, list_], odd)
    issued.issue(mode="clinical")
    said = json.loads(issued.content("hook"))
    assert (said["patient_id"], said["accession"]) == ("AB\\12", "A\\1")
    (row,) = [one for one in study_report(issued.ledger, issued.study)["findings"] if one["object"] == "worklist.list"]
    request = json.loads((issued.settings.findings_directory / row["path"]).read_bytes())
    assert request["url"] == "https://h/A%5C1" and json.loads(request["body"]) == {"patient": "AB\\12"}
    issued.ledger.close()


@pytest.mark.parametrize("mode", ["evaluation", ""])
def test_what_is_only_evaluated_says_so_everywhere(issued: Issued, mode: str) -> None:
    issued.issue(mode=mode)
    mail = message_from_bytes(issued.content("mail"), policy=policy.default)
    assert mail["Subject"].startswith(TEST)
    assert mail.get_content().startswith(TEST)
    assert json.loads(issued.content("hook"))["test"] is True
    assert json.loads(issued.content("hook"))["text"][0].startswith(TEST)
    assert issued.content("er").split(b"|")[10] == b"T"


def said_to_er(issued: Issued) -> tuple[str, str]:
    """Kind and processing id of the newest message."""
    text = issued.content("er").decode()
    (kind,) = re.findall(r"\|\|(provisional|alert|confirmation|correction|withdrawal)\|", text)
    return kind, text.split("|")[10]


def test_a_test_is_no_alert_to_who_is_alerted_once_the_package_is_clinical(issued: Issued) -> None:
    issued.issue(mode="evaluation")
    issued.settle("er", "acknowledge")
    assert said_to_er(issued) == ("alert", "T")
    issued.issue(mode="clinical")
    assert issued.alerts() == {"er": ("pending", 2), "mail": ("held", 2), "hook": ("held", 2)}
    assert said_to_er(issued) == ("alert", "P")
    assert issued.ledger.escalate(["er", "mail", "hook"], 120.0, 0.0).unreached == [issued.study]
    issued.settle("er", "acknowledge")
    issued.issue(mode="clinical")
    issued.issue(mode="evaluation")
    assert issued.alerts()["er"] == ("acknowledged", 2), "it knows"
    issued.issue(False, mode="clinical")
    assert said_to_er(issued) == ("withdrawal", "P")
    issued.settle("er", "acknowledge")
    issued.issue(False, mode="clinical")
    assert issued.alerts()["er"] == ("acknowledged", 5), "nor does the test stand any more"


@pytest.mark.parametrize(("before", "after"), [("clinical", "evaluation"), ("evaluation", "clinical")])
def test_a_withdrawal_is_as_real_as_what_it_takes_back(tmp_path: Path, before: str, after: str) -> None:
    at_once = [{**one, "after_seconds": 0} for one in (MAIL, HOOK)]
    issued = Issued(tmp_path, [*at_once, ER])
    issued.issue(mode=before)
    for name in ("er", "mail", "hook"):
        issued.settle(name, "acknowledge")
    first = issued.content("er").decode().split("|")[9]
    notice = "A notice." if after == "clinical" else "Evaluation only, no basis for care. A notice."
    issued.issue(False, mode=after, notice=notice)
    test = before == "evaluation"
    assert said_to_er(issued) == ("withdrawal", "T" if test else "P")
    assert f"||{first}|" in issued.content("er").decode()
    mail = message_from_bytes(issued.content("mail"), policy=policy.default)
    hook = json.loads(issued.content("hook"))
    assert (TEST in mail["Subject"]) is test and hook["test"] is test
    for said in (issued.content("er").decode(), mail.get_content(), " ".join(hook["text"])):
        assert ("Evaluation only, no basis for care." in said) is test
    assert issued.ledger.verdicts(1)[-1]["result"]["mode"] == after, "the verdict itself stays what it is"
    # And what was taken back is told anew as what it is then.
    for name in ("er", "mail", "hook"):
        issued.settle(name, "acknowledge")
    issued.issue(mode="clinical")
    assert said_to_er(issued) == ("alert" if test else "correction", "P")
    issued.ledger.close()


def test_what_a_test_says_after_an_alert_takes_nothing_from_it(issued: Issued) -> None:
    issued.issue(mode="clinical", provisional=True)
    issued.settle("er", "acknowledge")
    issued.issue(mode="evaluation")
    assert issued.ledger.take_delivery("er") is None, "the alert stands, and a step that waits tells of it"
    issued.issue(False, mode="evaluation")
    assert said_to_er(issued) == ("withdrawal", "P")
    issued.settle("er", "acknowledge")
    issued.issue(mode="evaluation")
    assert said_to_er(issued) == ("correction", "T")
    issued.settle("er", "acknowledge")
    issued.issue(False, mode="clinical")
    assert said_to_er(issued) == ("withdrawal", "T")


def test_to_issue_anew_is_owed_only_where_somebody_would_hear_of_it(issued: Issued) -> None:
    """A step is told only beside those that are told at once: these have it, so it would be issued for ever."""
    issued.issue(mode="clinical")
    issued.ledger.escalate(["er", "mail", "hook"], 120.0, 300.0)
    standing = issued.ledger.verdicts(1)[-1]
    row = issued.ledger.take_delivery("er")
    assert row is not None
    assert not issued.issuer.owes(standing, "clinical")
    issued.ledger.record_decision(Event.BOARD_SUSPENDED, standing["result"]["package"], who="Dr A")
    assert issued.alerts() == {"er": ("sending", 1), "mail": ("withdrawn", 1), "hook": ("withdrawn", 1)}
    assert not issued.issuer.owes(standing, "clinical"), "it is on its way"
    issued.ledger.settle_delivery(row, "acknowledge", steps=issued.settings.escalation)
    assert not issued.issuer.owes(standing, "clinical")


def test_an_alert_that_was_withdrawn_before_it_left_is_owed_but_not_in_shadow(issued: Issued) -> None:
    issued.issue(mode="clinical")
    standing = issued.ledger.verdicts(1)[-1]
    issued.ledger.record_decision(Event.BOARD_SUSPENDED, standing["result"]["package"], who="Dr A")
    assert issued.issuer.owes(standing, "clinical") and not issued.issuer.owes(standing, "shadow")
    issued.issue(mode="clinical")
    assert issued.alerts() == {"er": ("pending", 2), "mail": ("held", 2), "hook": ("held", 2)}
    assert not issued.issuer.owes(issued.ledger.verdicts(1)[-1], "clinical")


def killed(*arguments: Any, **options: Any) -> None:
    raise RuntimeError("it is killed")


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("mode", ["clinical", "evaluation"])
def test_a_provisional_alert_gets_its_word_although_the_whole_study_is_read_in_shadow(
    issued: Issued, monkeypatch: pytest.MonkeyPatch, mode: str, positive: bool
) -> None:
    """Once, though the engine dies after that; what was read in shadow is told to nobody."""
    issued.issue(mode=mode, provisional=True)
    issued.settle("er", "acknowledge")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(issued.ledger, "issue_verdict", killed)
        issued.issue(positive, mode="shadow")
    issued.ledger.park_analyses(3)
    issued.issue(positive, mode="shadow")
    verdicts = issued.ledger.verdicts(1)
    assert [one["result"]["mode"] for one in verdicts] == [mode, mode, "shadow"]
    assert issued.alerts() == {"er": ("pending", 2), "mail": ("spared", 1), "hook": ("spared", 1)}
    assert said_to_er(issued) == ("withdrawal", "P" if mode == "clinical" else "T")
    text = issued.content("er").decode()
    assert "put in shadow" in text and "what the provisional alert said is not disproved" in text
    issued.settle("er", "acknowledge")
    issued.issue(positive, mode="shadow")
    assert issued.alerts()["er"] == ("acknowledged", 2)
    # Once the package may alert again, it is told anew.
    issued.issue(mode="clinical")
    assert said_to_er(issued) == ("correction" if mode == "clinical" else "alert", "P")


def test_what_a_whole_study_said_stands_when_the_package_is_put_in_shadow(issued: Issued) -> None:
    issued.issue(mode="clinical")
    issued.settle("er", "acknowledge")
    issued.issue(False, mode="shadow")
    issued.issue(mode="shadow", provisional=True)
    issued.issue(False, mode="shadow")
    assert (issued.alerts()["er"], len(issued.ledger.verdicts(1))) == (("acknowledged", 1), 4)


def test_an_invalid_message_is_never_sent_and_the_next_step_is_told(
    issued: Issued, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any, **options: Any) -> str:
        return render_alert(*arguments, **options).replace("|2.5.1|", "|9.9|", 1)

    monkeypatch.setattr("appliance.services.telling.render_alert", broken)
    issued.issue(mode="clinical")
    assert issued.ledger.take_delivery("er") is None
    issued.issuer.render()
    assert issued.alerts()["er"] == ("dead", 1)
    (row,) = [one for one in study_report(issued.ledger, issued.study)["deliveries"] if one["destination"] == "er"]
    assert "invalid" in row["reason"]
    steps = issued.ledger.escalate(["er", "mail", "hook"], 120.0, 300.0).steps
    assert [name for _, name, _ in steps] == ["mail"]


def test_who_rejected_an_alert_is_alerted_by_the_next_positive_revision(issued: Issued) -> None:
    issued.issue(mode="clinical")
    issued.settle("er", "reject")
    issued.issue(mode="clinical")
    assert issued.alerts()["er"] == ("pending", 2)
    assert b"MESSAGE-KIND" in issued.content("er") and b"||alert|" in issued.content("er")
    issued.settle("er", "reject")
    issued.issue(False)
    assert issued.alerts()["er"] == ("rejected", 2), "it is not told of the end of what it never had"


def lose_the_answer(issued: Issued, how: str) -> None:
    """The emergency team may have the message and no answer came; it is to be sent again."""
    if how == "the box died":
        assert issued.ledger.take_delivery("er") is not None
        assert issued.ledger.park_deliveries() == 1
    elif how == "no more tries":
        issued.settle("er", "give_up")
        again(issued, "er")
    else:
        issued.settle("er", "retry")


LOST = ["no answer", "no more tries", "the box died"]


@pytest.mark.parametrize("how", LOST)
def test_who_rejects_what_an_earlier_try_may_have_brought_hears_what_became_of_it(issued: Issued, how: str) -> None:
    """A receiver that has the message refuses the same again as a duplicate."""
    issued.issue(mode="clinical")
    first = issued.content("er").decode().split("|")[9]
    lose_the_answer(issued, how)
    issued.settle("er", "reject")
    issued.issue(mode="clinical")
    assert issued.alerts()["er"] == ("pending", 2), "to who has it no second alert, to who has not the first"
    assert said_to_er(issued) == ("correction", "P") and f"||{first}|" in issued.content("er").decode()
    issued.settle("er", "reject")
    issued.issue(False, mode="clinical")
    assert issued.alerts()["er"] == ("pending", 3)
    assert said_to_er(issued) == ("withdrawal", "P") and f"||{first}|" in issued.content("er").decode()
    issued.settle("er", "acknowledge")
    issued.issue(False, mode="clinical")
    assert issued.alerts()["er"] == ("acknowledged", 3), "it knows now"


@pytest.mark.parametrize("how", LOST)
def test_a_withdrawal_that_may_have_arrived_before_it_was_rejected_is_put_right(issued: Issued, how: str) -> None:
    issued.issue(mode="clinical")
    issued.settle("er", "acknowledge")
    issued.issue(False, mode="clinical")
    lose_the_answer(issued, how)
    issued.settle("er", "reject")
    issued.issue(mode="clinical")
    assert issued.alerts()["er"] == ("pending", 3)
    assert said_to_er(issued) == ("correction", "P")


def test_who_rejected_every_try_never_had_it(issued: Issued) -> None:
    issued.issue(mode="clinical")
    for _ in range(3):
        issued.settle("er", "reject")
        again(issued, "er")
    issued.settle("er", "reject")
    issued.issue(mode="clinical")
    assert said_to_er(issued) == ("alert", "P")
    issued.settle("er", "reject")
    issued.issue(False, mode="clinical")
    assert issued.alerts()["er"] == ("rejected", 2)


def test_who_never_got_an_invalid_alert_is_alerted_by_the_next_revision(
    issued: Issued, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("appliance.services.telling.fault", lambda text: "it is odd")
        issued.issue(mode="clinical")
        issued.issuer.render()
    assert issued.alerts()["er"] == ("dead", 1)
    issued.issue(mode="clinical")
    assert issued.alerts()["er"] == ("pending", 2) and b"||alert|" in issued.content("er")


def test_an_alert_that_may_have_arrived_is_replaced_and_not_sent_twice(issued: Issued) -> None:
    issued.issue(mode="clinical")
    first = issued.content("er").decode().split("|")[9]
    issued.settle("er", "give_up")
    issued.issue(mode="clinical")
    text = issued.content("er").decode()
    assert issued.alerts()["er"] == ("pending", 2)
    assert "||correction|" in text and f"||{first}|" in text and "|AA|" in text
    issued.settle("er", "acknowledge")
    issued.issue(mode="clinical")
    assert issued.alerts()["er"] == ("acknowledged", 2), "it knows now"
    issued.issue(False)
    issued.settle("er", "give_up")
    issued.issue(False)
    assert issued.alerts()["er"] == ("pending", 5) and b"||withdrawal|" in issued.content("er")
    issued.settle("er", "acknowledge")
    issued.issue(False)
    assert issued.alerts()["er"] == ("acknowledged", 5)


def test_a_step_that_may_have_been_told_waits_again_and_only_with_the_others(issued: Issued) -> None:
    issued.issue(mode="clinical")
    issued.settle("er", "reject")
    issued.ledger.escalate(["er", "mail", "hook"], 120.0, 300.0)
    issued.settle("mail", "give_up")
    issued.issue(mode="clinical")
    assert issued.alerts() == {"er": ("pending", 2), "mail": ("held", 2), "hook": ("held", 1)}
    issued.settle("er", "acknowledge")
    issued.issue(mode="clinical")
    assert issued.alerts() == {"er": ("acknowledged", 2), "mail": ("spared", 2), "hook": ("held", 1)}
    issued.issue(False)
    assert issued.alerts()["mail"] == ("pending", 4), "it may have the first"


def again(issued: Issued, name: str, place: int = -1) -> None:
    """Somebody asks for the delivery at that place, in order of time, to be sent once more."""
    rows = [one for one in study_report(issued.ledger, issued.study)["deliveries"] if one["destination"] == name]
    key = sorted(one["id"] for one in rows)[place]
    issued.ledger.requeue_delivery(key, [one.name for one in issued.settings.destination])


def test_a_rejected_withdrawal_is_not_sent_again_once_the_study_is_positive_anew(issued: Issued) -> None:
    issued.issue(mode="clinical")
    issued.settle("er", "acknowledge")
    issued.issue(False, mode="clinical")
    issued.settle("er", "reject")
    issued.issue(mode="clinical")
    assert issued.alerts()["er"] == ("rejected", 2), "who rejected the withdrawal has the alert"
    with pytest.raises(LedgerError, match="revision 3 is positive"):
        again(issued, "er")
    assert issued.ledger.take_delivery("er") is None


def test_a_rejected_alert_is_not_sent_again_once_the_study_is_negative(issued: Issued) -> None:
    issued.issue(mode="clinical")
    issued.settle("er", "reject")
    issued.issue(mode="clinical", provisional=True)
    issued.settle("er", "reject")
    again(issued, "er")
    issued.settle("er", "reject")
    issued.issue(False, mode="clinical")
    with pytest.raises(LedgerError, match="revision 3 is negative"):
        again(issued, "er")
    assert issued.ledger.take_delivery("er") is None


def test_a_rejected_provisional_alert_that_was_withdrawn_without_an_answer_is_not_called_disproved(
    issued: Issued,
) -> None:
    issued.issue(mode="clinical", provisional=True)
    issued.settle("er", "reject")
    issued.issue(False, mode="clinical", withdrawn="its images cannot be a CT")
    with pytest.raises(LedgerError, match="revision 2 withdrew it: its images cannot be a CT"):
        again(issued, "er")


def test_a_rejected_alert_is_sent_again_where_a_negative_verdict_leaves_it_standing(issued: Issued) -> None:
    issued.issue(mode="clinical")
    issued.settle("er", "reject")
    issued.issue(False, stands=True, mode="clinical", limitations=(ALERT_STANDS,))
    again(issued, "er")
    row = issued.ledger.take_delivery("er")
    assert row is not None and (row["revision"], row["positive"]) == (1, True)


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        (lambda text: text.replace("Limitation:", "Limitation^:"), "Doe^Jane^^^^^L^A"),
        (lambda text: text.replace("Doe^Jane", "x" * 200) if "Limitation:" in text else text, "Doe^Jane^^^^^L^A"),
        (lambda text: text.replace("PID|1||", "PID|1|") if "HOSP" in text else text, "Doe^Jane^^^^^L^A"),
    ],
    ids=["a note", "a name", "an issuer"],
)
def test_where_the_whole_message_is_invalid_a_reduced_one_is_sent_and_somebody_hears_of_it(
    tmp_path: Path,
    wrong: Callable[[str], str],
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(*arguments: Any, **options: Any) -> str:
        return wrong(render_alert(*arguments, **options))

    def odd(ds: pydicom.Dataset) -> None:
        ds.IssuerOfPatientID = "HOSP=1"

    monkeypatch.setattr("appliance.services.telling.render_alert", broken)
    made = Issued(tmp_path, [ER], odd)
    made.issue(mode="clinical")
    made.issuer.render()
    assert made.alerts() == {"er": ("pending", 1)}
    text = made.content("er").decode()
    assert fault(text) == ""
    assert "\rPID|1||PID-7" in text and f"|{name}|" in text and "|ACC-1|" in text and "|AA|" in text
    assert "REDUCED" in text and "research use, not cleared" in text and "Limitation:" not in text
    assert "er gets a reduced message" in caplog.text
    assert event_counts(made.ledger)["alert.reduced"] == 1
    made.ledger.close()


def test_a_withdrawal_whose_reason_cannot_be_written_is_sent_without_it(
    issued: Issued, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(verdict: Verdict, *arguments: Any, **options: Any) -> str:
        if "odd" in verdict.withdrawn:
            raise ValueError("odd")
        return render_alert(verdict, *arguments, **options)

    issued.issue(mode="clinical", provisional=True)
    monkeypatch.setattr("appliance.services.telling.render_alert", broken)
    issued.issue(False, withdrawn="an odd reason")
    assert issued.alerts()["er"] == ("pending", 2)
    assert b"a reason that cannot be written here" in issued.content("er")


def test_what_cannot_be_told_to_one_destination_is_told_to_the_others(
    issued: Issued, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*arguments: Any, **options: Any) -> bytes:
        raise ValueError("DOE^JANE")

    monkeypatch.setattr("appliance.services.telling.render_mail", broken)
    issued.issue(mode="clinical")
    issued.issuer.render()
    assert issued.alerts() == {"er": ("pending", 1), "mail": ("dead", 1), "hook": ("held", 1)}
    assert "DOE" not in caplog.text
    (row,) = [one for one in study_report(issued.ledger, issued.study)["deliveries"] if one["destination"] == "mail"]
    assert "cannot be made" in row["reason"] and "DOE" not in row["reason"]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("|ORU^R01^ORU_R01|", "|ORU^R01^ADT_A01|"),
        ("PID|1||", "PID|1|"),
        ("|2.5.1|", "|9.9|"),
        ("|20260304050607.8910+0000||ORU", "|yesterday||ORU"),
        ("OBR|1|", "OBQ|1|"),
        ("MSH|", "MSA|"),
    ],
)
def test_what_is_no_hl7_is_found_out(tmp_path: Path, before: str, after: str) -> None:
    series = ct_series(tmp_path, count=3)
    text = render_alert(
        verdict_on(series), series.header(), control_id="M1", kind="alert", issued_at=ISSUED, processing_id="P",
        sending_application="A", sending_facility="B", receiving_application="C", receiving_facility="D",
        acknowledgement="application",
    )  # fmt: skip
    assert fault(text) == ""
    assert text.split("|")[14:16] == ["AL", "AL"]
    assert before in text
    assert fault(text.replace(before, after, 1)) != ""


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Series:
    return ct_series(tmp_path_factory.mktemp("series"), count=3)


def withdrawal(series: Series, reason: str) -> str:
    return render_alert(
        replace(verdict_on(series), positive=False, withdrawn=reason), series.header(), control_id="M1",
        kind="withdrawal", issued_at=ISSUED, processing_id="P", sending_application="A", sending_facility="B",
        receiving_application="C", receiving_facility="D",
    )  # fmt: skip


@pytest.mark.slow
@hypothesis_settings(deadline=None)
@given(reason=st.text(st.characters(exclude_categories=["Cs"]), max_size=900))
def test_no_reason_however_long_makes_a_message_that_is_never_sent(reason: str, plain: Series) -> None:
    assert fault(withdrawal(plain, reason)) == ""


@pytest.mark.parametrize("place", ["OBX|2|TX|59776-5^Procedure Findings^LN||", "NTE|3|L|"])
def test_a_text_that_no_receiver_needs_to_take_is_found_out(plain: Series, place: str) -> None:
    text = withdrawal(plain, "a reason")
    assert text.count(place) == 1
    assert fault(text.replace(place, f"{place}{'x' * 65_000}")) == ""
    assert "longer than 65536" in fault(text.replace(place, f"{place}{'x' * 65_536}"))


@pytest.mark.parametrize("place", ["OBX|2|TX|59776-5^Procedure Findings^LN||", "NTE|3|L|"])
@pytest.mark.parametrize("broken", ["|x||||||||||||||||||||||||", "\r", "^", "&", "\\E", "\\Q\\"])
def test_what_is_wrong_within_a_text_is_found_out(plain: Series, broken: str, place: str) -> None:
    text = withdrawal(plain, "x" * 500)
    assert fault(text) == "" and text.count(place) == 1
    assert fault(text.replace(place, f"{place}x{broken}x")) != ""


def test_of_a_text_that_is_too_long_the_beginning_is_told_and_that_there_was_more(plain: Series) -> None:
    text = withdrawal(plain, "\n" * 70_000)
    assert fault(text) == "" and "characters)" in text


def test_what_is_wrong_with_a_message_is_said_without_a_word_of_it(plain: Series) -> None:
    text = withdrawal(plain, "a reason")
    name = str(plain.header().PatientName)
    for wrong in ("N" * 200, "DOE^JANE^^^^^L^A&B&C&D^^^^^^^^^^^^^"):
        said = fault(text.replace(name, wrong, 1))
        assert said and "NNN" not in said and "JANE" not in said
    assert "yesterday" not in fault(text.replace("|19610203|", "|yesterday|", 1))


# Settings


def settings_with(folder: Path, *destinations: dict[str, Any], **delivery: Any) -> Settings:
    return load_settings(init.write(folder, {"delivery": delivery} if delivery else {}, destinations))


def test_paths_start_at_the_file_and_the_order_is_that_of_time(tmp_path: Path) -> None:
    tls = {"authorities": "ca.pem", "certificate": "/x/box.pem", "key": "box.key"}
    path = init.write(tmp_path, {}, [HOOK, ER, MAIL])
    path.write_text(path.read_text() + "\n[destination.tls]\n" + "".join(f'{k} = "{v}"\n' for k, v in tls.items()))
    settings = load_settings(path)
    assert [one.name for one in settings.alert_destinations] == ["er", "mail", "hook"]
    assert settings.escalation == {"mail", "hook"}
    er, mail, hook = settings.alert_destinations
    assert hook.secret_file == tmp_path / "secret"  # type: ignore[union-attr]
    assert mail.tls is not None and er.tls is None
    assert (mail.tls.authorities, mail.tls.certificate) == (tmp_path / "ca.pem", Path("/x/box.pem"))


@pytest.mark.parametrize(
    ("destinations", "said"),
    [
        ([MAIL], "one must be told at once"),
        ([ER, {**MAIL, "after_seconds": 300.0}], "alarm_seconds"),
        ([ER, {**HOOK, "url": "http://elsewhere/x"}], "url"),
        ([ER, {**MAIL, "recipients": []}], "recipients"),
        ([ER, {**MAIL, "sender": "nobody"}], "sender"),
        ([ER, {**MAIL, "include": ["diagnosis"]}], "include"),
    ],
)
def test_settings_that_could_not_escalate_are_refused(
    tmp_path: Path, destinations: list[dict[str, Any]], said: str
) -> None:
    with pytest.raises(SettingsError, match=said):
        settings_with(tmp_path, *destinations)


# scanside hl7 preview


def preview(folder: Path, *arguments: str) -> Result:
    return CliRunner().invoke(
        app, ["--config", str(folder / "scanside.toml"), "hl7", "preview", *arguments], env={"COLUMNS": "200"}
    )


def test_preview_shows_each_message_by_the_settings_of_now_and_sends_nothing(tmp_path: Path) -> None:
    init.write(tmp_path, {"box": {"name": "BOX"}}, [ER, MAIL, HOOK])
    issued = Issued(tmp_path, [])
    uid = issued.series.study_uid
    early = preview(tmp_path, uid)
    assert early.exit_code == 1
    assert "no verdict yet" in early.stderr
    issued.issue(mode="clinical")
    told = json.loads(preview(tmp_path, uid, "--json").stdout)
    (one,) = told
    assert [(m["destination"], m["channel"], m["kind"], m["after_seconds"]) for m in one["messages"]] == [
        ("er", "hl7", "alert", 0.0), ("mail", "mail", "alert", 60.0), ("hook", "webhook", "alert", 120.0),
    ]  # fmt: skip
    assert one["messages"][0]["content"].startswith("MSH|")
    shown = preview(tmp_path, str(issued.study))
    assert shown.exit_code == 0
    assert "OBX|1|ST|113014^DICOM Study^DCM" in shown.stdout
    assert issued.alerts() == {}
    issued.issue(False)
    assert json.loads(preview(tmp_path, uid, "--json").stdout)[0]["messages"][0]["kind"] == "withdrawal"
    issued.issue(False)
    assert "nothing new" in preview(tmp_path, uid).stdout or "nobody anything new" in preview(tmp_path, uid).stdout
    assert preview(tmp_path, "9.9").exit_code == 1
    issued.ledger.close()


# A site's own form, and the first message


def form(folder: Path, text: str) -> dict[str, Any]:
    (folder / "alert.j2").write_text(text, encoding="utf-8")
    return {**ER, "template": folder / "alert.j2"}


WHOLE = """
{{ MSH }}
{{ PID }}
{{ PV1 }}
{{ ORC }}
{{ OBR | field(4, "CTHEAD", "CT head", "L") }}
{% for one in NTE %}
{{ one }}
{% endfor %}
NTE||L|Station {{ dicom("StationName") }}: {{ probability | round(2) }}
{% for one in OBX if one.code != "274100004" %}
{{ one }}
{% endfor %}
"""


def test_a_template_writes_the_message_and_is_read_anew_for_each(tmp_path: Path) -> None:
    made = Issued(tmp_path, [form(tmp_path, WHOLE)])
    made.issue()
    text = made.content("er").decode()
    assert "|CTHEAD^CT head^L|" in text and re.search(r"\rNTE\|\d+\|L\|Station", text)
    assert fault(text) == ""
    (tmp_path / "alert.j2").write_text(WHOLE.replace("CTHEAD", "CCT"), encoding="utf-8")
    made.issue(False)
    assert "|CCT^CT head^L|" in made.content("er").decode()
    made.ledger.close()


@pytest.mark.parametrize("text", ["{{ MSH }}", "{% if", "{{ nothing }}", WHOLE.replace("{{ PV1 }}", "ZZZ|1")])
def test_where_a_template_fails_the_standard_message_is_sent_and_somebody_hears_of_it(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    made = Issued(tmp_path, [form(tmp_path, text)])
    made.issue()
    plain = made.content("er").decode()
    assert plain.count("\rOBX|") >= 11 and made.alerts() == {"er": ("pending", 1)}
    assert "er gets the standard message, its template failed" in caplog.text
    assert event_counts(made.ledger)["mapping.failed"] == 1
    made.ledger.close()


def test_a_template_is_tried_on_every_kind_of_message(tmp_path: Path) -> None:
    settings = Settings(destination=[form(tmp_path, WHOLE)])  # type: ignore[list-item]
    (er,) = settings.destination
    assert isinstance(er, Hl7Destination)
    assert try_template(settings, er) == {}
    (tmp_path / "alert.j2").write_text(WHOLE.replace("in NTE %}", "in NTE[1:] %}"), encoding="utf-8")
    assert set(try_template(settings, er)) == {
        "alert", "provisional", "confirmation", "correction", "withdrawal", "refusal",
    }  # fmt: skip


def test_a_withdrawal_names_the_first_message_on_the_study(tmp_path: Path) -> None:
    made = Issued(tmp_path, [ER])
    made.issue()
    first = made.content("er").decode().split("|")[9]
    assert "FIRST-MESSAGE" not in made.content("er").decode()
    made.issue(False)
    assert f"FIRST-MESSAGE^Message control id of the first message on this study^99SCANSIDE||{first}|" in (
        made.content("er").decode()
    )
    made.issue()
    assert f"||{first}|" in made.content("er").decode() and "CORRECTION" in made.content("er").decode()
    made.ledger.close()


def test_a_rejected_alert_is_sent_again_though_a_later_verdict_in_shadow_was_negative(issued: Issued) -> None:
    issued.issue(mode="clinical")
    issued.settle("er", "reject")
    issued.issue(False, mode="shadow")
    again(issued, "er")
    assert issued.alerts()["er"] == ("pending", 1)
    issued.settle("er", "reject")
    issued.issue(False, mode="clinical")
    with pytest.raises(LedgerError, match="is negative, which contradicts it"):
        again(issued, "er")


def test_an_alert_that_reached_nobody_is_shown_still_after_a_negative_verdict_in_shadow(issued: Issued) -> None:
    issued.issue(mode="clinical")
    for name in ("er", "mail", "hook"):
        issued.settle(name, "reject")
        issued.ledger.escalate(["er", "mail", "hook"], 120.0, 300.0)
    assert len(unreached_alerts(issued.ledger)) == 1
    issued.issue(False, mode="shadow")
    assert len(unreached_alerts(issued.ledger)) == 1
    issued.issue(False, mode="clinical")
    assert unreached_alerts(issued.ledger) == []
