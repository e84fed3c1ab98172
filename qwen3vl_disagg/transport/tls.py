"""Mutual TLS from three files: a rank may listen or connect whose certificate the job's CA has signed.

The CA is the authority, and names in certificates are not compared: ranks are addressed by IP, every one of them
listens, and one that the CA has signed may do whatever another may. So the CA should sign for ranks alone. TLS 1.3,
because before it certificates cross the wire in the open.
"""

from __future__ import annotations

import logging
import os
import ssl
import time
from dataclasses import dataclass
from pathlib import Path

from qwen3vl_disagg.core.errors import HandshakeError, InputError
from qwen3vl_disagg.core.settings import TlsOptions

logger = logging.getLogger(__name__)
FIELD = "TLS"
SOON_S = 7 * 86400.0
_WORDS = {
    "WRONG_VERSION_NUMBER": "speaks no TLS",
    "HTTP_REQUEST": "speaks no TLS",
    "UNSUPPORTED_PROTOCOL": "speaks no TLS 1.3",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "shows no certificate",
    "TLSV1_ALERT_PROTOCOL_VERSION": "refuses TLS 1.3",
    "TLSV1_ALERT_UNKNOWN_CA": "does not know the CA of this certificate",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "wants a certificate",
    "TLSV1_ALERT_ACCESS_DENIED": "denies access",
    "SSLV3_ALERT_HANDSHAKE_FAILURE": "has no cipher in common",
    "SSLV3_ALERT_BAD_CERTIFICATE": "calls this certificate bad",
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE": "does not support this certificate",
    "SSLV3_ALERT_CERTIFICATE_REVOKED": "says that this certificate was revoked",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "says that this certificate has expired",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "does not take this certificate",
}
"""OpenSSL's reasons, of the peer, that asking again does not change. Whatever else goes wrong is a lost connection."""


@dataclass(frozen=True)
class TlsFiles:
    cert: Path
    key: Path
    ca: Path

    @classmethod
    def of(cls, options: TlsOptions) -> TlsFiles | None:
        """None without any. InputError where one of them is missing."""
        given = {f"--{name.replace('_', '-')}": path for name, path in vars(options).items()}
        missing = [name for name, path in given.items() if path is None]
        if len(missing) == len(given):
            return None
        if missing or options.tls_cert is None or options.tls_key is None or options.tls_ca is None:
            message = f"{', '.join(given)}: all of them or none; there is no {' and no '.join(missing)}"
            raise InputError(message, param=missing[0].removeprefix("--"))
        return cls(options.tls_cert, options.tls_key, options.tls_ca)

    def signature(self) -> list[tuple[int, int, int] | None]:
        """Changes with the files."""
        return [_stat(path) for path in (self.cert, self.key, self.ca)]


class Tls:
    """The contexts of both sides. Files that have changed are read for the next connection; where they are of no use,
    what was read before stays, and the log says why."""

    def __init__(self, files: TlsFiles) -> None:
        """InputError, which names the option, for files that are of no use."""
        self._files, self._seen = files, files.signature()
        self._server, self._client, self._ends_at = _read(files)

    @classmethod
    def of(cls, options: TlsOptions) -> Tls | None:
        """None where no files are given."""
        files = TlsFiles.of(options)
        return None if files is None else cls(files)

    def context(self, *, is_server: bool) -> ssl.SSLContext:
        seen = self._files.signature()
        if seen != self._seen:
            self._seen = seen
            try:
                self._server, self._client, self._ends_at = _read(self._files)
            except InputError as error:
                logger.error("%s; what was read before stays in use", error)
            else:
                logger.info("certificate and CA were read again")
                self.warn_of_end()
        return self._server if is_server else self._client

    def warn_of_end(self) -> None:
        """Say it where the certificate has not long to live."""
        left_s = self._ends_at - time.time()
        if left_s < SOON_S:
            hours = left_s / 3600
            logger.warning("warning: --tls-cert %s expires in %.0f hours; a newer one is read", self._files.cert, hours)


def words_of(error: ssl.SSLError) -> str:
    """What is wrong with the peer, or what it says of this side."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"shows a certificate that the CA does not confirm: {error.verify_message}"
    reason = error.reason or type(error).__name__
    return _WORDS.get(reason) or reason.lower().replace("_", " ")


def failure(peer: str, error: ssl.SSLError) -> HandshakeError | ConnectionError:
    """The first where asking again changes nothing."""
    text = f"{peer} {words_of(error)}"
    if isinstance(error, ssl.SSLCertVerificationError) or error.reason in _WORDS:
        return HandshakeError(FIELD, "certificates of one CA on both sides", text)
    return ConnectionError(f"TLS broke: {text}")


def _stat(path: Path) -> tuple[int, int, int] | None:
    try:
        info = os.stat(path)
    except OSError:
        return None
    return info.st_mtime_ns, info.st_size, info.st_ino


def _read(files: TlsFiles) -> tuple[ssl.SSLContext, ssl.SSLContext, float]:
    """Contexts of server and client, and when the certificate ends (POSIX time). InputError."""
    texts = {name: _text(name, path) for name, path in vars(files).items()}
    for name in ("cert", "ca"):
        _context(ssl.PROTOCOL_TLS_CLIENT, name, getattr(files, name), texts[name])
    server = _context(ssl.PROTOCOL_TLS_SERVER, "ca", files.ca, texts["ca"])
    client = _context(ssl.PROTOCOL_TLS_CLIENT, "ca", files.ca, texts["ca"])
    server.verify_mode, server.num_tickets = ssl.CERT_REQUIRED, 0
    for context in (server, client):
        _use_key(context, files)
    return server, client, _meet_itself(server, client, files)


def _text(name: str, path: Path) -> str:
    try:
        return path.read_bytes().decode("ascii", errors="ignore")  # there may be comments
    except OSError as error:
        raise _wrong(name, path, error.strerror or str(error)) from None


def _context(protocol: int, name: str, path: Path, text: str) -> ssl.SSLContext:
    """One that trusts the certificates of this text."""
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    try:
        context.load_verify_locations(cadata=text)
    except (ssl.SSLError, ValueError):
        raise _wrong(name, path, "holds no certificate in PEM form") from None
    return context


def _use_key(context: ssl.SSLContext, files: TlsFiles) -> None:
    def no_password() -> str:
        raise _wrong("key", files.key, "is encrypted: a key without a password is needed")

    try:
        context.load_cert_chain(files.cert, files.key, no_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise _wrong("key", files.key, f"is not the key of --tls-cert {files.cert}") from None
        raise _wrong("key", files.key, "holds no private key in PEM form") from None
    except OSError as error:
        raise _wrong("key", files.key, error.strerror or str(error)) from None


def _meet_itself(server: ssl.SSLContext, client: ssl.SSLContext, files: TlsFiles) -> float:
    """A handshake within this process: what is wrong with the files for a peer that has the same CA is seen before one
    comes."""
    ways = ssl.MemoryBIO(), ssl.MemoryBIO()
    near, far = client.wrap_bio(*ways), server.wrap_bio(*ways[::-1], server_side=True)
    waits = True
    try:
        while waits:
            waits = _waits(near)
            waits = _waits(far) or waits
    except ssl.SSLError as error:
        message = error.verify_message if isinstance(error, ssl.SSLCertVerificationError) else words_of(error)
        raise _wrong("cert", files.cert, f"is not confirmed by --tls-ca {files.ca}: {message}") from None
    return ssl.cert_time_to_seconds(str((far.getpeercert() or {})["notAfter"]))


def _waits(side: ssl.SSLObject) -> bool:
    try:
        side.do_handshake()
    except ssl.SSLWantReadError:
        return True
    return False


def _wrong(name: str, path: Path, problem: str) -> InputError:
    return InputError(f"--tls-{name} {path}: {problem}", param=f"tls-{name}")
