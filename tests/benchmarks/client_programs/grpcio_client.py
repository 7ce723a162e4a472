"""grpcio's client as it comes, in threads: under gevent it hangs.

What it sends are the bare bytes of the payload. Messages of protobuf, as most users have, cost more.
"""

from operator import methodcaller

import grpc

from .measuring import callers_in_threads, calls_ahead, measure, one_caller, parse_options

options = parse_options()
with grpc.insecure_channel(f"127.0.0.1:{options.port}") as channel:
    echo = channel.unary_unary("/Echo/echo", str.encode, bytes.decode)
    measure(
        options,
        {
            "blocking": one_caller(echo),
            "greenlets": callers_in_threads(echo),
            "async": calls_ahead(echo.future, methodcaller("result")),
        },
    )
