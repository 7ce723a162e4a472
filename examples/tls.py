r"""A server and a client that talk TLS: each takes a context of Python's ``ssl`` module.

Make a certificate for 127.0.0.1, which the client trusts as it stands, then run ``python examples/tls.py``::

    openssl req -x509 -newkey rsa:2048 -nodes -keyout key.pem -out cert.pem \
        -subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1
"""

import ssl
import sys

import gmprpc

certificate, key = sys.argv[1:] or ("cert.pem", "key.pem")

server_context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
server_context.load_cert_chain(certificate, key)
server = gmprpc.Server(("127.0.0.1", 0), ssl_context=server_context)


@server.method
def add(a, b):
    return a + b


client_context = ssl.create_default_context(cafile=certificate)
with server, gmprpc.Client(server.address, ssl_context=client_context) as client:
    print(client.call("add", 1, 2))
