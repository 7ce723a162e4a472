"""rpyc's client as it comes, in threads: it knows no greenlets.

The method is looked up once: each ``root.echo`` would be another call to the server.
"""

from operator import attrgetter

import rpyc

from .measuring import callers_in_threads, calls_ahead, measure, one_caller, parse_options

options = parse_options()
connection = rpyc.connect("127.0.0.1", options.port)
echo = connection.root.echo
measure(
    options,
    {
        "blocking": one_caller(echo),
        "greenlets": callers_in_threads(echo),
        "async": calls_ahead(rpyc.async_(echo), attrgetter("value")),
    },
)
connection.close()
