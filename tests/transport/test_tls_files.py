"""The three files of TLS between ranks: what is of no use is said by name, at the start, on every rank."""

from __future__ import annotations

import dataclasses
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from qwen3vl_disagg.cluster import slots
from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.core.settings import TlsOptions
from qwen3vl_disagg.transport.tls import Tls
from recipes import encode, serve
from tests.support.certificates import Authority, Signed


@pytest.fixture(scope="module")
def authority(tmp_path_factory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="module")
def ours(authority) -> Signed:
    return authority.sign("rank")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> Signed:
    return Authority(tmp_path_factory.mktemp("theirs")).sign("rank")


def bad_files(name: str, folder: Path, authority: Authority, ours: Signed, theirs: Signed) -> tuple[TlsOptions, str]:
    fine, change = ours.options, dataclasses.replace
    match name:
        case "one missing":
            return change(fine, tls_ca=None), "all of them or none; there is no --tls-ca"
        case "no file":
            return change(fine, tls_key=folder / "no"), f"--tls-key {folder / 'no'}: No such file or directory"
        case "a folder":
            return change(fine, tls_cert=folder), f"--tls-cert {folder}: Is a directory"
        case "empty":
            (folder / "empty").touch()
            return change(fine, tls_ca=folder / "empty"), "holds no certificate in PEM form"
        case "the key as certificate":
            return change(fine, tls_cert=ours.key), "--tls-cert .*: holds no certificate in PEM form"
        case "the certificate as key":
            return change(fine, tls_key=ours.cert), "--tls-key .*: holds no private key in PEM form"
        case "another key":
            return change(fine, tls_key=theirs.key), "--tls-key .*: is not the key of --tls-cert"
        case "another CA":
            return change(fine, tls_ca=theirs.ca), "is not confirmed by --tls-ca .*: unable to get local issuer"
        case "expired":
            return authority.sign("old", days=-1).options, "is not confirmed by --tls-ca .*: certificate has expired"
        case "an expired CA":
            return Authority(folder, days=-1).sign("x").options, "certificate has expired"
        case "not for both":
            return authority.sign("half", purposes="serverAuth").options, "unsuitable certificate purpose"
        case "with a password":
            locked = folder / "locked"
            command = ["openssl", "ec", "-in", ours.key, "-aes256", "-passout", "pass:abcd", "-out", locked]
            subprocess.run(command, check=True, capture_output=True)
            return change(fine, tls_key=locked), "--tls-key .*: is encrypted: a key without a password is needed"
    raise AssertionError(name)


BAD = ["one missing", "no file", "a folder", "empty", "the key as certificate", "the certificate as key"]
BAD += ["another key", "another CA", "expired", "an expired CA", "not for both", "with a password"]


@pytest.mark.parametrize("name", BAD)
def test_files_of_no_use_are_named_with_what_is_wrong(name, tmp_path, authority, ours, theirs):
    options, words = bad_files(name, tmp_path, authority, ours, theirs)
    with pytest.raises(InputError, match=words) as caught:
        Tls.of(options)
    assert str(caught.value.param).startswith("tls-")


@pytest.mark.parametrize("script", [serve, encode])
@pytest.mark.parametrize("rank", [0, 1])
def test_they_end_every_rank_with_2_before_anything_is_bound(script, rank, theirs, ours, monkeypatch, capsys):
    where = {"TORCHELASTIC_RUN_ID": "a", "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    where |= {"LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1", "Q3VL_TOKEN": "t"}
    for key, value in where.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(slots, "die_with_parent", lambda parent: None)
    monkeypatch.setattr(slots, "_EXIT_LAST_S", 0.0)
    for listening in ("listen", "create_server", "bind"):
        monkeypatch.setattr(socket, listening, lambda *_, **__: pytest.fail("bound"), raising=False)
    to = ["--join", "127.0.0.1:9"] if script is encode else []
    args = dataclasses.replace(ours, key=theirs.key).args
    monkeypatch.setattr(sys, "argv", ["script", *to, *args])
    assert script.main() == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("at ")]
    assert [f"--tls-key {theirs.key}: is not the key of" in line for line in lines] == [True] * (rank == 0)


def test_a_certificate_that_ends_soon_is_said(authority, caplog):
    authority.sign("long", days=30).tls().warn_of_end()
    assert caplog.text == ""
    authority.sign("short", days=2).tls().warn_of_end()
    assert "expires in 48 hours" in caplog.text


def test_without_files_there_is_no_tls():
    assert Tls.of(TlsOptions()) is None
