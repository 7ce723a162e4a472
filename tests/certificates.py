"""Certificates, for tests: of an authority that everybody trusts, and of others."""

from __future__ import annotations

import datetime
import ssl
from pathlib import Path
from typing import Any

import trustme
from cryptography.hazmat.primitives import serialization
from gevent import socket

LONG_AGO = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)


class Certificates:
    """PEM files, made as they are asked for."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._ours = trustme.CA()
        self._strangers = trustme.CA()
        #: The authority that everybody trusts.
        self.authority = directory / "authority.pem"
        self._ours.cert_pem.write_to_path(self.authority)
        self.server = self.issue("server", "localhost")
        self.client = self.issue("client", "client.test")

    def issue(self, name: str, identity: str, *, by_stranger: bool = False, is_expired: bool = False) -> Path:
        """A certificate for ``identity``, with those above it and its key, in one file."""
        path = self.directory / f"{name}.pem"
        dates: Any = {"not_before": LONG_AGO, "not_after": LONG_AGO + datetime.timedelta(days=1)} if is_expired else {}
        authority = self._strangers if by_stranger else self._ours
        authority.issue_cert(identity, **dates).private_key_and_cert_chain_pem.write_to_path(path)
        return path

    def self_signed(self) -> Path:
        """The certificate of an authority that nobody knows, with its key."""
        path = self.directory / "self-signed.pem"
        authority = trustme.CA()
        authority.cert_pem.write_to_path(path)
        authority.private_key_pem.write_to_path(path, append=True)
        return path

    def encrypted(self, password: bytes) -> Path:
        """The key of the server's certificate, encrypted."""
        path = self.directory / "encrypted.pem"
        key = serialization.load_pem_private_key(self.server.read_bytes(), None)
        encryption = serialization.BestAvailableEncryption(password)
        path.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption))
        return path


def serial_number_at(address: str, context: ssl.SSLContext) -> str:
    """That of the certificate, for localhost, that a new connection to ``address`` gets."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port))) as sock:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
        while True:
            try:
                tls.do_handshake()
            except ssl.SSLWantReadError:
                sock.sendall(outgoing.read())
                incoming.write(sock.recv(65536))
            else:
                return str((tls.getpeercert() or {})["serialNumber"])
