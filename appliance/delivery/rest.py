"""One try at a vendor's worklist: the request that was rendered for it, with the site's secret."""

from __future__ import annotations

import json
from pathlib import Path

from appliance.delivery.outbox import Result
from appliance.delivery.webhook import Webhook, exchange
from dicom_io.errors import ScansideError


def send_request(path: Path, identity: str, webhook: Webhook, header: str, secret_file: Path | None) -> Result:
    """Send the request of a finding. ``Idempotency-Key`` is the same at every try.

    Args:
        webhook: how to connect; its address is the request's own.

    Raises:
        PeerError: no connection, or no answer.
        ScansideError: the secret cannot be read.
    """
    request = json.loads(path.read_bytes())
    headers = {"Content-Type": "application/json", "User-Agent": "scanside", "Idempotency-Key": identity}
    if secret_file is not None:
        try:
            secret = secret_file.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            where = str(secret_file)
            raise ScansideError(f"the secret cannot be read: {error}", where, "make it readable for us") from error
        if not secret or not secret.isprintable():
            raise ScansideError("the secret is empty or not one line", str(secret_file), "write it on one line")
        headers[header] = secret
    target = Webhook(request["url"], b"", webhook.context, webhook.timeout)
    return exchange(target, request["method"], request["body"].encode("utf-8"), headers)
