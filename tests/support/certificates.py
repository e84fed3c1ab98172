"""Certificates for tests, made by the `openssl` command: an authority, and what it signs."""

from __future__ import annotations

import secrets
import subprocess
from dataclasses import dataclass
from pathlib import Path

from qwen3vl_disagg.core.settings import TlsOptions
from qwen3vl_disagg.transport.tls import Tls


@dataclass(frozen=True)
class Signed:
    """A certificate, its key, and whom its owner trusts."""

    cert: Path
    key: Path
    ca: Path

    @property
    def options(self) -> TlsOptions:
        return TlsOptions(tls_cert=self.cert, tls_key=self.key, tls_ca=self.ca)

    @property
    def args(self) -> list[str]:
        return ["--tls-cert", str(self.cert), "--tls-key", str(self.key), "--tls-ca", str(self.ca)]

    def tls(self) -> Tls:
        made = Tls.of(self.options)
        assert made is not None
        return made


class Authority:
    """Its files lie in `folder`."""

    def __init__(self, folder: Path, name: str = "ca", days: int = 3650) -> None:
        self.folder, self.name = folder, name
        folder.mkdir(parents=True, exist_ok=True)
        self.cert, self._key = folder / f"{name}.pem", folder / f"{name}.key"
        extensions = ["basicConstraints=critical,CA:TRUE", "keyUsage=critical,keyCertSign"]
        _make(self.cert, self._key, name, days, [], extensions)

    def sign(self, name: str, *, days: int = 365, purposes: str = "serverAuth,clientAuth") -> Signed:
        """With negative `days` one that has expired."""
        signed = Signed(self.folder / f"{name}.pem", self.folder / f"{name}.key", self.cert)
        by = ["-CA", str(self.cert), "-CAkey", str(self._key)]
        _make(signed.cert, signed.key, name, days, by, ["basicConstraints=CA:FALSE", f"extendedKeyUsage={purposes}"])
        return signed


def _make(cert: Path, key: Path, name: str, days: int, by: list[str], extensions: list[str]) -> None:
    """`by`: who signs; nobody: itself."""
    request, wanted = cert.with_suffix(".csr"), cert.with_suffix(".ext")
    wanted.write_text("\n".join(extensions))
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    _openssl("req", "-new", *curve, "-keyout", key, "-out", request, "-subj", f"/CN={name}")
    serial = ["-set_serial", str(secrets.randbits(64))]
    by = [*(by or ["-signkey", str(key)]), *serial]
    _openssl("x509", "-req", "-in", request, *by, "-days", days, "-extfile", wanted, "-out", cert)


def _openssl(*args: object) -> None:
    subprocess.run(["openssl", *map(str, args)], check=True, capture_output=True, text=True, timeout=30)
