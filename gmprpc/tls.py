"""Contexts for TLS with safe defaults, for ``ssl_context`` of a server and of a client; knows no sockets.

They are the same on every version of Python, so that a certificate which is good today is good after the next upgrade.
Each is an ordinary :class:`ssl.SSLContext`, which its owner may change before it is used.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Path = str | os.PathLike[str]
#: What opens a key that is encrypted, or a function that returns it.
Password = str | bytes | Callable[[], str | bytes]


def server_context(
    certfile: Path,
    keyfile: Path | None = None,
    *,
    client_cafile: Path | None = None,
    password: Password | None = None,
) -> ssl.SSLContext:
    """A context for ``gmprpc.Server(..., ssl_context=...)``.

    ``certfile`` is a PEM file with the server's certificate, followed by those that lead to its authority, and with the
    key, if that isn't in ``keyfile``. With ``client_cafile``, the certificates of authorities, every client has to show
    a certificate of one of them (mutual TLS).

    The files are read once. A renewed certificate is taken into use by the context's ``load_cert_chain``, for
    connections from then on.

    Raises:
        OSError: a file can't be read; :exc:`ssl.SSLError`, which is one, if it isn't what it should be, or if the key
            isn't the certificate's.
        ValueError: the key is encrypted and there is no ``password``. (OpenSSL would ask for it on the terminal.)
    """
    context = _context(ssl.PROTOCOL_TLS_SERVER)
    # A client of ours never resumes a session: its connections live long. Tickets that nobody wants do harm: a client
    # which says something and closes hasn't read them, so its system resets the connection, and what it said is lost.
    # This is TLS 1.3's number; those of TLS 1.2 stay, since without them OpenSSL remembers each session itself, up to
    # 20,480 of them, which with the clients' certificates were 12 KiB each, and Python can't tell it not to.
    context.num_tickets = 0
    _load_certificate(context, certfile, keyfile, password)
    if client_cafile is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        _load_authorities(context, client_cafile)
    return context


def client_context(
    cafile: Path | None = None,
    *,
    certfile: Path | None = None,
    keyfile: Path | None = None,
    password: Password | None = None,
) -> ssl.SSLContext:
    """A context for ``gmprpc.Client(..., ssl_context=...)``, which insists on a good certificate for the right name.

    The name is the address's host, or the client's ``server_hostname``, which a unix socket needs. The authorities are
    the system's, or only those in ``cafile``, for a private one. ``certfile``, ``keyfile`` and ``password`` are as in
    :func:`server_context`, for a server that demands a certificate (mutual TLS).

    Raises:
        OSError: a file can't be read; :exc:`ssl.SSLError`, which is one, if it isn't what it should be, or if the key
            isn't the certificate's.
        ValueError: the key is encrypted and there is no ``password``, or there is a ``keyfile`` and no ``certfile``.
    """
    if certfile is None and keyfile is not None:
        raise ValueError("a keyfile needs its certfile")
    context = _context(ssl.PROTOCOL_TLS_CLIENT)  # Verifies the certificate and its name unless told otherwise.
    # RFC 9525: a name counts only as a subjectAltName; what the common name holds is a text for people.
    context.hostname_checks_common_name = False
    if cafile is None:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    else:
        _load_authorities(context, cafile)
    if certfile is not None:
        _load_certificate(context, certfile, keyfile, password)
    return context


def _context(protocol: int) -> ssl.SSLContext:
    """What both sides have in common.

    (Not `ssl.create_default_context`: its settings differ between Python 3.11 and 3.13, and it lets SSLKEYLOGFILE, a
    variable of the environment, write every session's secrets to a file. Who has to look into his own traffic sets
    `keylog_filename`.)

    The ciphers are the interpreter's own: whoever builds it keeps them up to date, which a list here would not be.

    No ALPN: the protocol has no registered name that other implementations would offer or expect, and a server of
    Python's can't refuse who offers another. What it is for (ALPACA: a browser that is led here with a request for
    another server) ends at the first byte, as that is no MessagePack-RPC.
    """
    context = ssl.SSLContext(protocol)
    # RFC 8996 forbids what came before. The system may demand still more, and keeps its say.
    context.minimum_version = max(context.minimum_version, ssl.TLSVersion.TLSv1_2)
    # RFC 9325, sections 3.3 and 3.5: compression gives secrets away (CRIME), and a renegotiation is work for the server
    # at the client's command, which OpenSSL 1.1.1 still does.
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    # An end without a goodbye may be an attacker's doing and has to be noticed.
    context.options &= ~getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
    # What `ssl.create_default_context` does since Python 3.13: chains have to keep to RFC 5280, and every certificate
    # that is given as an authority is one, also where another authority has signed it.
    context.verify_flags |= ssl.VERIFY_X509_STRICT | ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


def _load_certificate(context: ssl.SSLContext, certfile: Path, keyfile: Path | None, password: Password | None) -> None:
    with _naming(certfile, keyfile):
        context.load_cert_chain(certfile, keyfile, _no_password if password is None else password)


def _load_authorities(context: ssl.SSLContext, cafile: Path) -> None:
    with _naming(cafile):
        context.load_verify_locations(cafile)


def _no_password() -> str:
    raise ValueError("the key is encrypted: give its password")


@contextmanager
def _naming(*paths: Path | None) -> Iterator[None]:
    """Have errors say which file they are about: OpenSSL's don't."""
    given = [path for path in paths if path is not None]
    for path in given:
        with open(path, "rb"):
            pass
    try:
        yield
    except ssl.SSLError as exc:
        raise ssl.SSLError(exc.errno, f"{' and '.join(map(str, given))}: {exc.strerror}") from exc
