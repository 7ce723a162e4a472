"""mprpc's client as it comes, without an option set. It has one socket and one call at a time on it."""

from functools import partial

import mprpc

from .measuring import measure, one_caller, parse_options

options = parse_options()
client = mprpc.RPCClient("127.0.0.1", options.port)
measure(
    options,
    {
        "blocking": one_caller(partial(client.call, "echo")),
        "greenlets": "mprpc's client can't be shared: a call takes whatever it receives next for its answer",
        "async": "mprpc's client has no call that doesn't wait",
    },
)
client.close()
