r"""A server and a client that talk TLS, and each of which demands a certificate of the other (mutual TLS).

Make a certificate for 127.0.0.1, which both show and both trust, then run ``python examples/tls.py``::

    openssl req -x509 -newkey rsa:2048 -nodes -keyout key.pem -out cert.pem -subj /CN=127.0.0.1 \
        -addext subjectAltName=IP:127.0.0.1 -addext keyUsage=critical,digitalSignature,keyCertSign
"""

import sys

import gmprpc

certificate, key = sys.argv[1:] or ("cert.pem", "key.pem")

server = gmprpc.Server(
    ("127.0.0.1", 0), ssl_context=gmprpc.tls.server_context(certificate, key, client_cafile=certificate)
)


@server.method
def add(a, b):
    return a + b


context = gmprpc.tls.client_context(certificate, certfile=certificate, keyfile=key)
with server, gmprpc.Client(server.address, ssl_context=context) as client:
    print(client.call("add", 1, 2))
