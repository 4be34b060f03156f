"""One try at handing a mail to a mail server: SMTP (RFC 5321) with STARTTLS (RFC 3207)."""

from __future__ import annotations

import logging
import smtplib
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from appliance.delivery.outbox import Result, Said
from dicom_io.errors import PeerError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MailServer:
    """A mail server and how it is spoken to.

    Attributes:
        context: for TLS; None only with security "none".
        timeout: seconds that each of its answers may take.
        username: with an empty one nobody logs in.
    """

    host: str
    port: int
    security: Literal["starttls", "tls", "none"]
    context: ssl.SSLContext | None
    timeout: float
    username: str = ""
    password: str = ""

    @property
    def where(self) -> str:
        """The server, as errors and logs name it."""
        return f"{self.host}:{self.port}"

    def open(self) -> smtplib.SMTP:
        """A session that is ready for a mail.

        Raises:
            PeerError: it cannot be reached, does not offer what security asks for, or does not let us in.
        """
        session: smtplib.SMTP | None = None
        try:
            if self.security == "tls":
                session = smtplib.SMTP_SSL(self.host, self.port, timeout=self.timeout, context=self.context)
            else:
                session = smtplib.SMTP(self.host, self.port, timeout=self.timeout)
            if self.security == "starttls":
                session.starttls(context=self.context)
            if self.username:
                session.login(self.username, self.password)
            session.ehlo_or_helo_if_needed()
        except (OSError, smtplib.SMTPException, ValueError) as error:
            if session is not None:
                session.close()
            remedy = "check address, port, security, certificate and password"
            raise PeerError(f"the mail server does not let us in ({_said(error)})", self.where, remedy) from error
        return session


def send_mail(server: MailServer, sender: str, recipients: Sequence[str], message: bytes) -> Result:
    """Hand over one mail; acknowledged once the server has taken it for one recipient at least.

    What it answers with a temporary failure (4yz) is worth another try, with a permanent one (5yz) is not; where it
    takes the mail for some recipients only, the others are named and not tried again, as the first would get it twice.

    Raises:
        PeerError: no session, or it broke before the server answered for the mail; it may have taken it.
    """
    session = server.open()
    try:
        refused = session.sendmail(sender, recipients, message)
    except smtplib.SMTPRecipientsRefused as error:
        codes = [code for code, _ in error.recipients.values()]
        said = Said(*(f"no recipient is taken: {one}" for one in _refused(error.recipients)))
        return ("reject" if all(code >= 500 for code in codes) else "retry"), said
    except smtplib.SMTPResponseException as error:
        return ("reject" if error.smtp_code >= 500 else "retry"), Said(_said(error), str(error.smtp_code))
    except (OSError, smtplib.SMTPException) as error:
        what = f"the mail server did not answer for the mail ({_said(error)})"
        raise PeerError(what, server.where, "the mail will be sent again") from error
    finally:
        _quit(session)
    if refused:
        log.error("mail: %s took the alert, but not for %s", server.where, _refused(refused)[1])
        return "acknowledge", Said(*(f"taken, but not for {one}" for one in _refused(refused)))
    return "acknowledge", "taken"


def _quit(session: smtplib.SMTP) -> None:
    """End the session; what the server says to that changes nothing."""
    try:
        session.quit()
    except (OSError, smtplib.SMTPException):
        session.close()


def _refused(recipients: dict[str, tuple[int, bytes]]) -> tuple[str, str]:
    """Who was not taken and why, with the server's words and without."""
    words = (f"{name} ({code} {text.decode(errors='replace')})" for name, (code, text) in recipients.items())
    return ", ".join(words), ", ".join(f"{name} ({code})" for name, (code, _) in recipients.items())


def _said(error: Exception) -> str:
    if isinstance(error, smtplib.SMTPResponseException):
        text = error.smtp_error.decode(errors="replace") if isinstance(error.smtp_error, bytes) else error.smtp_error
        return f"{error.smtp_code} {text}"
    return str(getattr(error, "verify_message", "") or error) or type(error).__name__
