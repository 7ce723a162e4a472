"""Answers later: whoever calls ``next_event`` waits until somebody publishes one. No greenlet waits with them.

Run ``python examples/deferred_reply.py``; in a second terminal ``python -m gmprpc call 127.0.0.1:4423 next_event``, and
in a third ``python -m gmprpc call 127.0.0.1:4423 publish hello``.
"""

import sys

import gmprpc

server = gmprpc.Server(sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:4423")
waiting: list[gmprpc.Reply] = []


@server.method(deferred=True)
def next_event(reply):
    if reply is not None:  # None stands for a notification: nobody waits for its answer.
        waiting.append(reply)


@server.method
def publish(event):
    told = len(waiting)
    while waiting:
        waiting.pop().result(event)  # Callers that have gone by now don't matter: their answer is dropped.
    return told


server.start()
print(f"listening on {server.server_host}:{server.server_port}", flush=True)
server.serve_forever()
