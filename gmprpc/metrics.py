"""What happened, in numbers; this module knows no socket and no greenlet.

Only what is out of the ordinary is counted as it happens, so that an ordinary call pays nothing for it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, NoReturn


@dataclass(slots=True)
class Counters:
    """Counted since the owner, a server, service or client, was made."""

    #: Connections accepted or made.
    connections: int = 0
    #: Connections closed as soon as they were accepted: there were ``max_connections`` or ``max_connections_per_peer``
    #: already, or one told of somebody else by the PROXY protocol and isn't among ``proxy_allow_from``.
    refused_connections: int = 0
    #: Connections that were accepted and got no further than their PROXY header or their TLS handshake.
    failed_handshakes: int = 0
    #: Connections that ``authenticate`` didn't let in.
    denied_connections: int = 0
    #: Connections that ended with an error: lost, reset, or not MessagePack-RPC.
    failed_connections: int = 0
    #: Of these, the ones whose peer broke the protocol.
    protocol_errors: int = 0
    #: Requests and notifications whose handler raised, was killed, or gave a result that can't be packed.
    handler_errors: int = 0
    #: Requests and notifications that were well framed, but held a value that can't be decoded or no valid params.
    invalid_messages: int = 0
    #: Requests and notifications for a method that isn't registered.
    unknown_methods: int = 0
    #: Requests and notifications beyond ``max_concurrency`` that couldn't be left unread.
    refused_messages: int = 0
    #: Requests that were answered with an error because their handlers took longer than ``reply_timeout``.
    expired_requests: int = 0
    #: Requests that their callers have cancelled while they were at work.
    cancelled_requests: int = 0
    #: Answers that came for a call that nobody waits for: timed out, cancelled, or never made.
    late_answers: int = 0
    #: Requests that had left when their connection was lost, and were to be sent again, since they were ``idempotent``.
    resent_requests: int = 0
    #: Answers that a handler gave after its connection had gone, or its time was over.
    dropped_answers: int = 0
    #: Bytes that came from peers and that went to them, without those of TLS; only where a server's ``counts_bytes`` is
    #: set.
    received_bytes: int = 0
    sent_bytes: int = 0

    def snapshot(self) -> dict[str, int]:
        """The counters as they are now."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


class Statistics(dict[str, int]):
    """Numbers by their names, as they were at one moment: they don't change, and can't be changed.

    Still a dict, and not a view of one, so that they can be packed, written as JSON and sent to whoever asks.
    """

    __slots__ = ()

    def _refuse(self, *_args: Any, **_options: Any) -> NoReturn:
        raise TypeError("statistics can't be changed: make a dict of them")

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> tuple[type[Statistics], tuple[dict[str, int]]]:
        # As it is it would be made empty first, and filled then.
        return Statistics, (dict(self),)
