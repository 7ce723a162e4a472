"""Who takes part: each one's server, the protocol it speaks, what has to be installed for it, and what it can't do.

This is a table; it starts nothing and installs nothing. Requirements are complete and exact, so that what is measured
today is measured tomorrow: each list is all that its environment has.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Participant:
    """A program that has a method ``echo`` and prints the port on which it listens."""

    name: str
    #: The server's file: in ``servers/``, if the path isn't absolute.
    server: str
    #: The protocol, as the load generator knows it.
    dialect: str = "msgpack-rpc"
    #: All that is installed for it, in an environment of its own; who needs none of it runs where the benchmark does.
    requirements: tuple[str, ...] = ()
    #: What has to be there before, for what is built from source.
    build_requirements: tuple[str, ...] = ()
    #: Versions of Python that it works with, best first; none: the one that runs the benchmark.
    pythons: tuple[str, ...] = ()
    #: Not of this project: it may lose calls, as long as that is said.
    is_peer: bool = False
    #: Why some of its calls stay unanswered where several are in flight on a connection.
    loses_pipelined_calls: str | None = None

    @property
    def has_environment(self) -> bool:
        """Whether it runs in an environment of its own."""
        return bool(self.requirements)


_BUILD = ("setuptools==56.0.0", "wheel==0.37.1")
_MSGPACK = "msgpack==1.2.4"
_GEVENT = ("gevent==26.9.0", "greenlet==3.5.6", "zope.event==6.2", "zope.interface==8.7")

GMPRPC = Participant("gmprpc", "gmprpc_server.py")
FLOOR = Participant("floor", "floor.py")
C_ECHO = Participant("c-echo", "c_echo.c")

PEERS = (
    Participant(
        "mprpc",
        "mprpc_server.py",
        # Its own choice, msgpack-python 0.5.6, can't be compiled for this Python and would be slow without anybody
        # noticing. This msgpack is the last one that knows the options that mprpc sets.
        requirements=(
            "mprpc==0.1.17",
            "gsocketpool==0.1.6",
            "gevent==24.2.1",
            "greenlet==3.1.1",
            "zope.event==5.0",
            "zope.interface==7.2",
            "msgpack==0.6.2",
        ),
        build_requirements=(*_BUILD, "Cython==3.2.9"),
        pythons=("3.8",),
        is_peer=True,
        loses_pipelined_calls="answers one message per read",
    ),
    Participant(
        "aio-msgpack-rpc",
        "aio_msgpack_rpc_server.py",
        requirements=("aio-msgpack-rpc==0.2.0", _MSGPACK),
        is_peer=True,
    ),
    Participant(
        "py-msgpack-rpc",
        "py_msgpack_rpc_server.py",
        requirements=("py-msgpack-rpc==0.1.0a2", _MSGPACK),
        is_peer=True,
    ),
    Participant(
        "aiorpc",
        "aiorpc_server.py",
        requirements=("aiorpc==0.1.7", "uvloop==0.23.0", _MSGPACK),
        is_peer=True,
        loses_pipelined_calls="answers one message per read",
    ),
    Participant(
        "msgpack-rpc-python",
        "msgpack_rpc_python_server.py",
        # As with mprpc, this msgpack is the last one that knows the options.
        requirements=("msgpack-rpc-python==0.4.1", "tornado==4.5.3", "msgpack==0.6.2"),
        build_requirements=_BUILD,
        pythons=("3.9", "3.8", "3.7", "3.6"),
        is_peer=True,
    ),
    Participant(
        "zerorpc",
        "zerorpc_server.py",
        dialect="zerorpc",
        requirements=("zerorpc==0.6.3", "future==1.0.0", "pyzmq==27.3.0", *_GEVENT, _MSGPACK),
        is_peer=True,
    ),
    Participant(
        "grpcio",
        "grpcio_server.py",
        dialect="grpc",
        requirements=("grpcio==1.85.3", "typing_extensions==4.16.0"),
        is_peer=True,
    ),
    Participant(
        "grpcio-aio",
        "grpcio_aio_server.py",
        dialect="grpc",
        requirements=("grpcio==1.85.3", "typing_extensions==4.16.0"),
        is_peer=True,
    ),
    Participant(
        "rpyc",
        "rpyc_server.py",
        dialect="rpyc",
        requirements=("rpyc==6.0.2", "plumbum==2.0.2", "typing_extensions==4.16.0", *_GEVENT),
        is_peer=True,
    ),
)

PARTICIPANTS = {participant.name: participant for participant in (GMPRPC, *PEERS, FLOOR, C_ECHO)}
