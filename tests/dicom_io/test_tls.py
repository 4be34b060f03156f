"""Handshakes over real sockets: what is accepted, what is refused, and renewals while connections run."""

from __future__ import annotations

import logging
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from dicom_io.errors import ScansideError
from dicom_io.tls import CIPHERS, Profile, ServerCertificates, client_subject
from tests.dicom_io.certificates import Authority, Pair


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def pair(authority: Authority) -> Pair:
    return authority.issue("box")


class Echo:
    """Answers each connection with the client's subject, then with what it sends."""

    def __init__(self, certificates: ServerCertificates) -> None:
        self._certificates = certificates
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                plain, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(plain,), daemon=True).start()

    def _serve(self, plain: socket.socket) -> None:
        try:
            with plain, self._certificates.context().wrap_socket(plain, server_side=True) as connection:
                connection.sendall(f"<{client_subject(connection)}>".encode())
                while data := connection.recv(1000):
                    connection.sendall(data)
        except OSError:
            return  # refused, as the client sees

    def close(self) -> None:
        self._listener.close()


@contextmanager
def echo(certificates: ServerCertificates) -> Iterator[int]:
    server = Echo(certificates)
    try:
        yield server.port
    finally:
        server.close()


def trusting(authority: Authority, client: Pair | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(authority.certificate))
    if client is not None:
        context.load_cert_chain(client.certificate, client.key)
    return context


@contextmanager
def connected(port: int, context: ssl.SSLContext) -> Iterator[tuple[ssl.SSLSocket, str]]:
    """A connection, and the subject that the server saw; a refusal of TLS 1.3 shows at the first read."""
    with (
        socket.create_connection(("127.0.0.1", port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as connection,
    ):
        yield connection, connection.recv(1000).decode()


def serial(connection: ssl.SSLSocket) -> str:
    return str((connection.getpeercert() or {})["serialNumber"])


@pytest.mark.parametrize("profile", list(CIPHERS))
@pytest.mark.parametrize("rsa_bits", [0, 2048])
def test_a_client_is_served_by_tls_1_3_and_by_1_2_with_each_suite_of_the_profile(
    authority: Authority, profile: Profile, rsa_bits: int
) -> None:
    pair = authority.issue("box", rsa_bits=rsa_bits)
    with echo(ServerCertificates(pair.certificate, pair.key, profile=profile)) as port:
        with connected(port, trusting(authority)) as (connection, subject):
            assert (connection.version(), subject) == ("TLSv1.3", "<>")
            connection.sendall(b"hello")
            assert connection.recv(1000) == b"hello"
        for suite in CIPHERS[profile]:
            if ("-RSA-" in suite) != bool(rsa_bits):
                continue
            context = trusting(authority)
            context.maximum_version = ssl.TLSVersion.TLSv1_2
            context.set_ciphers(suite)
            with connected(port, context) as (connection, _):
                assert (connection.version(), (connection.cipher() or ("",))[0]) == ("TLSv1.2", suite)


@pytest.mark.parametrize(
    ("version", "ciphers"),
    [
        (ssl.TLSVersion.TLSv1, "ALL:@SECLEVEL=0"),
        (ssl.TLSVersion.TLSv1_1, "ALL:@SECLEVEL=0"),
        (ssl.TLSVersion.TLSv1_2, "AES128-SHA:@SECLEVEL=0"),
        (ssl.TLSVersion.TLSv1_2, "AES256-GCM-SHA384:@SECLEVEL=0"),
        (ssl.TLSVersion.TLSv1_2, "ECDHE-RSA-AES256-SHA384:@SECLEVEL=0"),
        (ssl.TLSVersion.TLSv1_2, "DHE-RSA-AES256-GCM-SHA384:@SECLEVEL=0"),
    ],
)
@pytest.mark.parametrize("profile", list(CIPHERS))
@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_old_versions_and_weak_suites_are_refused(
    authority: Authority, profile: Profile, version: ssl.TLSVersion, ciphers: str
) -> None:
    pair = authority.issue("box", rsa_bits=2048)
    context = trusting(authority)
    context.set_ciphers(ciphers)
    context.minimum_version = context.maximum_version = version
    with (
        echo(ServerCertificates(pair.certificate, pair.key, profile=profile)) as port,
        pytest.raises(ssl.SSLError, match="ALERT"),
        connected(port, context),
    ):
        pytest.fail("it was served")


def test_with_authorities_only_their_clients_are_served(tmp_path: Path, authority: Authority, pair: Pair) -> None:
    (tmp_path / "other").mkdir()
    other = Authority(tmp_path / "other", "others")
    ours = ServerCertificates(pair.certificate, pair.key, authority.certificate)
    refused = {
        "no certificate": None,
        "another authority's": other.issue("scanner", client=True),
        "an expired one": authority.issue("old", client=True, lifetime=timedelta(days=-1)),
        "a server's": authority.issue("server"),
    }
    with echo(ours) as port:
        with connected(port, trusting(authority, authority.issue("ct1", client=True))) as (_, subject):
            assert subject == "<CN=ct1>"
        for client in refused.values():
            with pytest.raises(ssl.SSLError, match="ALERT"), connected(port, trusting(authority, client)):
                pytest.fail("it was served")


def test_a_renewal_is_used_by_the_next_connection_and_disturbs_no_running_one(authority: Authority, pair: Pair) -> None:
    certificates = ServerCertificates(pair.certificate, pair.key)
    with echo(certificates) as port, connected(port, trusting(authority)) as (running, _):
        before, until = serial(running), certificates.expires_at
        authority.issue("renewed", lifetime=timedelta(days=700)).copy_to(pair.certificate, pair.key)
        with connected(port, trusting(authority)) as (connection, _):
            assert serial(connection) != before
        assert certificates.expires_at > until
        running.sendall(b"still here")
        assert running.recv(1000) == b"still here"


@pytest.mark.slow
def test_renewals_under_load_fail_no_handshake(authority: Authority, pair: Pair) -> None:
    # Between the two files of a renewal the pair does not match: the old one must serve then.
    certificates = ServerCertificates(pair.certificate, pair.key)
    renewals = [authority.issue(f"renewal{number}") for number in range(20)]
    context = trusting(authority)
    seen: set[str] = set()
    stop = threading.Event()

    def hammer(port: int) -> int:
        count = 0
        while not stop.is_set():
            with connected(port, context) as (connection, _):
                seen.add(serial(connection))
            count += 1
        return count

    with echo(certificates) as port, ThreadPoolExecutor(4) as pool:
        workers = [pool.submit(hammer, port) for _ in range(4)]
        try:
            for renewal in renewals:
                renewal.copy_to(pair.certificate, pair.key)
                with connected(port, context) as (connection, _):
                    now = serial(connection)
                newest = ssl.PEM_cert_to_DER_cert(renewal.certificate.read_text())
                with connected(port, context) as (connection, _):
                    assert connection.getpeercert(binary_form=True) == newest, now
        finally:
            stop.set()
        assert all(worker.result() > 0 for worker in workers)
    assert len(seen) > 1


@pytest.mark.parametrize(
    ("breakage", "named"),
    [("mismatch", "key"), ("garbage", "certificate"), ("gone", "certificate"), ("gone key", "key")],
)
def test_a_broken_renewal_keeps_the_old_one_and_says_so_once(
    authority: Authority, pair: Pair, caplog: pytest.LogCaptureFixture, breakage: str, named: str
) -> None:
    certificates = ServerCertificates(pair.certificate, pair.key)
    good = certificates.context()
    if breakage == "mismatch":
        pair.certificate.write_bytes(authority.issue("other").certificate.read_bytes())
    elif breakage == "garbage":
        pair.certificate.write_text("not a certificate")
    else:
        getattr(pair, named).unlink()
    with caplog.at_level(logging.ERROR):
        assert [certificates.context() for _ in range(5)] == [good] * 5
    (record,) = (one for one in caplog.records if one.levelno == logging.ERROR)
    assert str(getattr(pair, named)) in record.getMessage()
    with echo(certificates) as port, connected(port, trusting(authority)) as (connection, _):
        assert connection.version() == "TLSv1.3"
    authority.issue("mended").copy_to(pair.certificate, pair.key)
    assert certificates.context() is not good
    assert [one.levelno for one in caplog.records].count(logging.ERROR) == 1


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (lambda a, p: Pair(p.certificate, p.key.with_name("absent.key")), r"absent\.key: No such file"),
        (lambda a, p: Pair(p.certificate.with_name("absent.crt"), p.key), r"absent\.crt: No such file"),
        (lambda a, p: Pair(p.certificate, a.issue("other").key), r"other\.key: the key is not the certificate's"),
        (lambda a, p: Pair(p.key, p.key), r"box\.key: this holds no certificate"),
        (lambda a, p: Pair(p.certificate, p.certificate), r"box\.crt: this cannot be used"),
        (lambda a, p: a.issue("locked", passphrase=b"secret"), r"locked\.key: the key has a passphrase"),
        (lambda a, p: a.issue("weak", rsa_bits=1024), r"weak\.crt: this cannot be used: ee key too small"),
    ],
)
def test_what_cannot_be_used_at_the_start_is_one_sentence(
    authority: Authority, pair: Pair, prepare: Callable[[Authority, Pair], Pair], said: str
) -> None:
    wrong = prepare(authority, pair)
    with pytest.raises(ScansideError, match=said) as caught:
        ServerCertificates(wrong.certificate, wrong.key)
    assert "\n" not in str(caught.value)
    assert caught.value.remedy


def test_authorities_without_a_certificate_are_named(tmp_path: Path, pair: Pair) -> None:
    empty = tmp_path / "nobody.pem"
    empty.write_text("")
    with pytest.raises(ScansideError, match="holds no certificate") as caught:
        ServerCertificates(pair.certificate, pair.key, empty)
    assert caught.value.where == str(empty)


def test_a_certificate_that_expires_soon_is_complained_of_once_a_day(
    authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    pair = authority.issue("short", lifetime=timedelta(days=31))
    at = datetime.now(UTC)

    def clock() -> datetime:
        return at

    certificates = ServerCertificates(pair.certificate, pair.key, clock=clock)
    assert caplog.records == []
    said = []
    for hours in (26, 30, 49, 51, 24 * 32, 24 * 32 + 1):
        at = datetime.now(UTC) + timedelta(hours=hours)
        certificates.context()
        said.append([record.levelname for record in caplog.records])
        caplog.clear()
    assert said == [["WARNING"], [], [], ["WARNING"], ["ERROR"], []]


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl command")
@pytest.mark.parametrize(
    ("options", "served"),
    [
        (["-tls1_3"], True),
        (["-tls1_2"], True),
        (["-tls1_1", "-cipher", "ALL:@SECLEVEL=0"], False),
        (["-tls1_2", "-cipher", "AES128-SHA"], False),
    ],
)
def test_openssl_as_a_peer(authority: Authority, pair: Pair, options: list[str], served: bool) -> None:
    with echo(ServerCertificates(pair.certificate, pair.key)) as port:
        done = subprocess.run(
            ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-CAfile", authority.certificate,
             "-verify_return_error", *options],
            input=b"", capture_output=True, timeout=30,
        )  # fmt: skip
    assert (done.returncode == 0) is served, done.stderr
    assert (b"Verification: OK" in done.stdout and b"Cipher is (NONE)" not in done.stdout) is served
