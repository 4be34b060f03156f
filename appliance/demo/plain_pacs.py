"""An archive of plain files, for machines where Orthanc cannot be installed."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from pydicom import dcmread
from pynetdicom import AE, ALL_TRANSFER_SYNTAXES, AllStoragePresentationContexts, evt
from pynetdicom.sop_class import Verification

from dicom_io.errors import PeerError

log = logging.getLogger(__name__)

_UID = re.compile(r"[0-9.]{1,64}")
SUCCESS, OUT_OF_RESOURCES, INVALID_INSTANCE = 0x0000, 0xA700, 0x0117


class FallbackPacs:
    """A storage and verification SCP in this process that writes ``<study>/<instance>.dcm`` and takes every kind of
    object. It has no query, no viewer and no REST interface.

    Raises:
        PeerError: the port cannot be bound.
    """

    name = "plain storage SCP (Orthanc is not installed)"

    def __init__(self, folder: Path, *, ae_title: str = "PACS", host: str = "127.0.0.1", port: int = 0) -> None:
        self.folder = folder
        self.ae_title = ae_title
        self.host = host
        self._stopped = False
        folder.mkdir(parents=True, exist_ok=True)
        ae = AE(ae_title=ae_title)
        ae.require_called_aet = True
        ae.add_supported_context(Verification)
        for context in AllStoragePresentationContexts:
            ae.add_supported_context(str(context.abstract_syntax), ALL_TRANSFER_SYNTAXES)
        try:
            self._server: Any = ae.start_server(
                (host, port), block=False, evt_handlers=[(evt.EVT_C_STORE, self._store)]
            )
        except OSError as error:
            raise PeerError(
                f"the PACS cannot listen ({error.strerror or error})", f"{host}:{port}", "choose another port"
            ) from error

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return int(self._server.server_address[1])

    def _store(self, event: Any) -> int:
        study, instance = str(event.dataset.get("StudyInstanceUID", "")), str(event.request.AffectedSOPInstanceUID)
        if not (_UID.fullmatch(study) and _UID.fullmatch(instance)):
            return INVALID_INSTANCE
        path = self._study(study) / f"{instance}.dcm"
        try:
            path.parent.mkdir(exist_ok=True)
            whole = path.with_suffix(".part")
            whole.write_bytes(event.encoded_dataset())
            whole.rename(path)
        except OSError:
            log.exception("the PACS cannot write %s", path)
            return OUT_OF_RESOURCES
        return SUCCESS

    def _study(self, study_uid: str) -> Path:
        # The prefix keeps "." and ".." from being folders of their own.
        return self.folder / f"study-{study_uid}"

    def holds(self, study_uid: str) -> list[tuple[str, str]]:
        """(SOPClassUID, SOPInstanceUID) of every instance of the study that it keeps; sorted."""
        if not _UID.fullmatch(study_uid):
            return []
        found = []
        for path in self._study(study_uid).glob("*.dcm"):
            header = dcmread(path, stop_before_pixels=True, specific_tags=["SOPClassUID", "SOPInstanceUID"])
            found.append((str(header.SOPClassUID), str(header.SOPInstanceUID)))
        return sorted(found)

    def stop(self) -> None:
        """Stop it; open associations are aborted."""
        for association in self._server.active_associations:
            association.abort()
        if not self._stopped:
            self._stopped = True
            self._server.shutdown()
