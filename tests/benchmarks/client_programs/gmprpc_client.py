"""gmprpc's client as it comes, without an option set."""

from functools import partial

import gmprpc

from .measuring import callers_in_greenlets, calls_ahead, measure, one_caller, parse_options

options = parse_options()
with gmprpc.Client(("127.0.0.1", options.port)) as client:
    call = partial(client.call, "echo")
    measure(
        options,
        {
            "blocking": one_caller(call),
            "greenlets": callers_in_greenlets(call),
            "async": calls_ahead(partial(client.call_async, "echo"), gmprpc.PendingCall.get),
        },
    )
