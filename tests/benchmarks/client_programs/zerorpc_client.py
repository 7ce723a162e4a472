"""zerorpc's client as it comes, without an option set; it has heartbeats on, then."""

from functools import partial

import zerorpc
from gevent.event import AsyncResult

from .measuring import callers_in_greenlets, calls_ahead, measure, one_caller, parse_options

options = parse_options()
client = zerorpc.Client(f"tcp://127.0.0.1:{options.port}")
call = partial(client, "echo")
measure(
    options,
    {
        "blocking": one_caller(call),
        "greenlets": callers_in_greenlets(call),
        "async": calls_ahead(partial(call, **{"async": True}), AsyncResult.get),
    },
)
client.close()
