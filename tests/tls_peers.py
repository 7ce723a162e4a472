"""TLS by hand, for tests: the test decides which bytes leave, and which of them in one piece."""

from __future__ import annotations

import hashlib
import hmac
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM


class RecordPeer:
    """TLS on a socket that blocks its greenlet, where the test decides what leaves in one piece.

    Once it has shaken hands, it may stand for a socket of its own, too.
    """

    def __init__(
        self, sock: Any, context: ssl.SSLContext, *, server_side: bool, server_hostname: str | None = None
    ) -> None:
        self.socket = sock
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.first_received = b""
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_side, server_hostname)

    def handshake(self) -> None:
        """Shake hands, but hold the last piece back."""
        self.wait_for(self.tls.do_handshake)

    def flush(self, size: int | None = None) -> None:
        """Let out what is held back, or its first bytes."""
        self.socket.sendall(self.outgoing.read() if size is None else self.outgoing.read(size))

    def unwrap(self) -> None:
        """Say that nothing more will come."""
        with pytest.raises(ssl.SSLWantReadError):
            self.tls.unwrap()

    def read(self) -> bytes:
        """What the other side has said."""
        data: bytes = self.wait_for(lambda: self.tls.read(65536))
        return data

    def wait_for(self, function: Callable[[], Any]) -> Any:
        """What ``function`` returns when all has arrived that it wants to read."""
        while True:
            try:
                return function()
            except ssl.SSLWantReadError:
                self.flush()
                if data := self.socket.recv(65536):
                    self.first_received = self.first_received or data
                    self.incoming.write(data)
                else:
                    self.incoming.write_eof()

    # As a socket.

    def sendall(self, data: bytes) -> None:
        """Encrypt ``data`` and send it."""
        self.tls.write(data)
        self.flush()

    def recv(self, size: int) -> bytes:
        """At most ``size`` bytes; ``b""`` after a proper goodbye."""
        try:
            data: bytes = self.wait_for(lambda: self.tls.read(size))
        except ssl.SSLZeroReturnError:
            return b""
        return data

    def shutdown(self, how: int) -> None:
        """Say goodbye and listen on."""
        self.unwrap()
        self.flush()
        self.socket.shutdown(how)

    def close(self) -> None:
        """Close the socket, without a goodbye."""
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def client_hello() -> bytes:
    """A client's first message of TLS 1.2, without its record."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    outgoing = ssl.MemoryBIO()
    tls = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="gmprpc.test")
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()[5:]


#: What a record may hold.
ALERT, HANDSHAKE, APPLICATION_DATA = 21, 22, 23


class Forger:
    """Encrypts records with the keys of a client that has shaken hands, so that they hold what no library would say.

    The client's context has to write its secrets to a file, for this client only; and the client must not write any
    more. Knows the ciphers with AES-GCM.
    """

    def __init__(self, peer: RecordPeer, keylog: Path) -> None:
        name, version, bits = peer.tls.cipher() or pytest.fail("the handshake comes first")
        self._is_new = version == "TLSv1.3"
        self._hash = "sha384" if name.endswith("SHA384") else "sha256"
        self._key_size = bits // 8
        secrets = {line.split()[0]: line.split()[1:] for line in keylog.read_text("ascii").splitlines()}
        if self._is_new:
            self._use(bytes.fromhex(secrets["CLIENT_TRAFFIC_SECRET_0"][1]))
        else:
            client_random, master = map(bytes.fromhex, secrets["CLIENT_RANDOM"])
            # RFC 5246, section 6.3, and RFC 5288, section 3: two keys, two halves of nonces.
            seed = b"key expansion" + peer.first_received[11:43] + client_random
            block = a = b""
            while len(block) < 2 * self._key_size + 4:
                a = hmac.digest(master, a or seed, self._hash)
                block += hmac.digest(master, a + seed, self._hash)
            self._cipher = AESGCM(block[: self._key_size])
            self._iv = block[2 * self._key_size :][:4]
            self._number = 1  # The first one was the handshake's last word.

    def record(self, content: bytes, kind: int = APPLICATION_DATA) -> bytes:
        """The next record: RFC 8446, section 5.2, or RFC 5246, section 6.2.3.3."""
        number = self._number.to_bytes(8, "big")
        self._number += 1
        if self._is_new:
            header = b"\x17\x03\x03" + (len(content) + 17).to_bytes(2, "big")
            nonce = bytes(a ^ b for a, b in zip(self._iv, b"\0" * 4 + number, strict=True))
            return header + self._cipher.encrypt(nonce, content + bytes([kind]), header)
        header = bytes([kind]) + b"\x03\x03"
        associated = number + header + len(content).to_bytes(2, "big")
        data = number + self._cipher.encrypt(self._iv + number, content, associated)
        return header + len(data).to_bytes(2, "big") + data

    def key_update(self, *, is_requested: bool) -> bytes:
        """The record after which this side's keys are new ones; ``is_requested`` wants the same of the other side."""
        record = self.record(b"\x18\x00\x00\x01" + bytes([is_requested]), HANDSHAKE)
        self._use(self._expanded("traffic upd", hashlib.new(self._hash).digest_size))
        return record

    def _use(self, secret: bytes) -> None:
        self._secret = secret
        self._cipher = AESGCM(self._expanded("key", self._key_size))
        self._iv = self._expanded("iv", 12)
        self._number = 0

    def _expanded(self, label: str, size: int) -> bytes:
        """RFC 8446's HKDF-Expand-Label, without a context, and of one block, which is enough here."""
        name = b"tls13 " + label.encode("ascii")
        info = size.to_bytes(2, "big") + bytes([len(name)]) + name + b"\0"
        return hmac.digest(self._secret, info + b"\x01", self._hash)[:size]
