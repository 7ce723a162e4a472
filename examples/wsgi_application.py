"""A monkey-patched web application that speaks MessagePack-RPC as well: one process, one state, two listeners.

Run ``python examples/wsgi_application.py``, open http://127.0.0.1:8080/ a few times, then
``python -m gmprpc call 127.0.0.1:4423 visits``.
"""

from gevent import monkey

monkey.patch_all()

import sys

from gevent.pywsgi import WSGIServer

import gmprpc

web_address, rpc_address = sys.argv[1:] or ("127.0.0.1:8080", "127.0.0.1:4423")
visitors: list[str] = []


def application(environ, start_response):
    visitors.append(environ["REMOTE_ADDR"])
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"Welcome!\n"]


web = WSGIServer(web_address, application)
rpc = gmprpc.Server(rpc_address)
rpc.register(lambda: len(visitors), "visits")

web.start()
rpc.start()
print(f"listening on {web.server_host}:{web.server_port} and {rpc.server_host}:{rpc.server_port}", flush=True)
rpc.serve_forever()
