"""MessagePack-RPC for gevent: a server and a client in which every call ends exactly once.

See the README for how to use it, https://github.com/msgpack-rpc/msgpack-rpc/blob/master/spec.md for the protocol.
"""

from . import stacks, tls
from .accesslog import AccessLog
from .balancer import Balancer
from .blocking import report_blocking
from .client import Client, Proxy, mprpc_client
from .connection import Call, Connection, current_call
from .exceptions import (
    AlreadyAnswered,
    CallCancelled,
    CallTimeout,
    ConnectFailed,
    ConnectionClosed,
    ErrorResponse,
    MessageTooLarge,
    MethodNotFound,
    ProtocolError,
    RemoteError,
    RPCError,
)
from .log import JSONFormatter
from .observing import Observer
from .outcome import Outcome
from .reply import PendingCall, Reply
from .server import Server, mprpc_server
from .service import Service
from .transport import InetPeer, UnixPeer

__version__ = "0.1.0"

__all__ = [
    "AccessLog",
    "AlreadyAnswered",
    "Balancer",
    "Call",
    "CallCancelled",
    "CallTimeout",
    "Client",
    "ConnectFailed",
    "Connection",
    "ConnectionClosed",
    "ErrorResponse",
    "JSONFormatter",
    "InetPeer",
    "MessageTooLarge",
    "MethodNotFound",
    "Observer",
    "Outcome",
    "PendingCall",
    "ProtocolError",
    "Proxy",
    "RPCError",
    "RemoteError",
    "Reply",
    "Server",
    "Service",
    "UnixPeer",
    "__version__",
    "current_call",
    "mprpc_client",
    "mprpc_server",
    "report_blocking",
    "stacks",
    "tls",
]
