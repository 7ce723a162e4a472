"""The house: every module has a floor, an import may only point down, and there are no circles."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parent.parent / "gmprpc"

#: The floor of each module. The subpackage ``cli`` is one room: its modules may import each other, without circles.
FLOORS: dict[str, int] = {
    "__main__": 11,
    "__init__": 10,
    "cli": 10,
    "balancer": 9,
    "gunicorn": 9,
    "pool": 8,
    "otel": 8,
    "client": 7,
    "server": 7,
    "service": 6,
    "draining": 6,
    "authentication": 6,
    "link": 6,
    "errand": 5,
    "discovery": 5,
    "connection": 5,
    "builtin": 5,
    "expiry": 5,
    "observing": 6,
    "stacks": 5,
    "blocking": 6,
    "accesslog": 7,
    "threads": 5,
    "requests": 4,
    "entrance": 4,
    "bench": 3,
    "calls": 3,
    "acceptor": 3,
    "admin": 4,
    "prometheus": 8,
    "workermetrics": 3,
    "sharedmetrics": 0,
    "heartbeat": 3,
    "dialing": 3,
    "children": 3,
    "protocol": 2,
    "methods": 2,
    "endpoints": 2,
    "transport": 2,
    "pipes": 2,
    "reply": 1,
    "proxyprotocol": 1,
    "sweeper": 1,
    "succession": 0,
    "deadline": 1,
    "backoff": 1,
    "perhub": 2,
    "streams": 1,
    "log": 0,
    "metrics": 0,
    "tls": 1,
    "options": 0,
    "outcome": 0,
    "exceptions": 0,
}

#: Modules without I/O, clock or greenlets: they can be tested with bytes alone, and used under any event loop.
PURE = {
    "protocol",
    "proxyprotocol",
    "methods",
    "exceptions",
    "options",
    "outcome",
    "metrics",
    "sweeper",
    "deadline",
    "backoff",
    "endpoints",
}

IMPURITIES = {"gevent", "greenlet", "socket", "time"}

#: The one name that a pure module takes from there: CallCancelled has to be a GreenletExit.
PURE_AFTER_ALL = {("exceptions", "greenlet.GreenletExit")}


class Import(NamedTuple):
    """One imported name, written out: ``from .reply import Reply`` is ``gmprpc.reply.Reply``."""

    name: str
    line: int


def imports_of(source: str, package: str) -> Iterator[Import]:
    """Every import in ``source``, a module of ``package``: also those in functions and under TYPE_CHECKING."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = parents[: len(parents) - node.level + 1] if node.level else []
            if node.module:
                base = [*base, *node.module.split(".")]
            for alias in node.names:
                yield Import(".".join(base if alias.name == "*" else [*base, alias.name]), node.lineno)


def modules_of(directory: Path) -> dict[str, Path]:
    """The modules of a package by their dotted name within it; a subpackage goes by its own name."""
    modules = {}
    for path in sorted(directory.rglob("*.py")):
        *parents, name = path.relative_to(directory).with_suffix("").parts
        modules[".".join(parents if parents and name == "__init__" else [*parents, name])] = path
    return modules


def violations_of(directory: Path, floors: Mapping[str, int] = FLOORS) -> list[str]:
    """What is wrong with the imports of the package in ``directory``; nothing, one hopes."""
    root = directory.name
    modules = modules_of(directory)
    violations = []
    within_rooms: dict[str, set[str]] = {}

    for module, path in modules.items():
        where = path.relative_to(directory.parent).as_posix()
        room = module.split(".")[0]
        if room not in floors:
            violations.append(f"{where}: {room!r} has no floor: give it one in FLOORS")
            continue
        package = ".".join([root, *path.relative_to(directory).parent.parts])

        for name, line in imports_of(path.read_text(encoding="utf-8"), package):
            at = f"{where}:{line}: {module}"
            top, _, inner = name.partition(".")
            if top != root:
                if room in PURE and top in IMPURITIES and (module, name) not in PURE_AFTER_ALL:
                    violations.append(f"{at} imports {name}, but it has to do without {top}")
                continue

            # `from gmprpc import x` may mean a module or a name in __init__; `gmprpc.reply.Reply` is the module's.
            target_room = inner.split(".")[0]
            if target_room not in floors and target_room not in modules:
                target_room = "__init__"
            if target_room == room and (directory / room).is_dir():
                target = inner
                while target not in modules:
                    target = target.rpartition(".")[0]
                within_rooms.setdefault(module, set()).add(target)
            elif target_room in floors and floors[target_room] >= floors[room]:
                violations.append(
                    f"{at} (floor {floors[room]}) imports {target_room} (floor {floors[target_room]}), "
                    "but an import may only point down"
                )
            elif room in PURE and target_room not in PURE:
                violations.append(f"{at} imports {target_room}, which may use {' and '.join(sorted(IMPURITIES))}")

    try:
        graphlib.TopologicalSorter(within_rooms).prepare()
    except graphlib.CycleError as exc:
        violations.append(f"{root}: a circle of imports: {' <- '.join(exc.args[1])}")
    return violations


def test_imports_only_point_down() -> None:
    assert "__init__" in modules_of(PACKAGE), f"no package in {PACKAGE}"
    violations = violations_of(PACKAGE)
    assert not violations, "\n".join(["the house is out of order:", *violations])


def build_house(directory: Path, files: Mapping[str, str]) -> Path:
    house = directory / "gmprpc"
    for name, source in files.items():
        path = house / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    return house


SOUND = {
    "__init__.py": "from .server import Server",
    "__main__.py": "from .cli import main",
    "cli/__init__.py": "from .serve import main",
    "cli/serve.py": "from .. import server\nfrom gmprpc.cli.options import option",
    "cli/options.py": "from gmprpc import exceptions",
    "server.py": "import time, gevent.server, gmprpc.connection\nfrom . import exceptions as errors, reply",
    "connection.py": "from .protocol import *\nfrom .reply import Reply",
    "protocol.py": "from .exceptions import RPCError",
    "exceptions.py": "from greenlet import GreenletExit",
    "reply.py": "from gevent.event import AsyncResult",
}


def test_sound_house_passes(tmp_path: Path) -> None:
    assert violations_of(build_house(tmp_path, SOUND)) == []


@pytest.mark.parametrize(
    "file, source, complaint",
    [
        ("reply.py", "from .connection import x", "reply (floor 1) imports connection (floor 5)"),
        ("reply.py", "import gmprpc.connection", "reply (floor 1) imports connection (floor 5)"),
        ("reply.py", "from gmprpc import connection", "reply (floor 1) imports connection (floor 5)"),
        ("reply.py", "def late():\n    from .connection import x", "reply.py:2: reply (floor 1) imports connection"),
        ("reply.py", "if TYPE_CHECKING:\n    from .connection import x", "reply.py:2: reply (floor 1) imports"),
        ("connection.py", "import gmprpc", "connection (floor 5) imports __init__ (floor 10)"),
        ("connection.py", "from . import Server", "connection (floor 5) imports __init__ (floor 10)"),
        ("server.py", "from .cli.serve import x", "server (floor 7) imports cli (floor 10)"),
        ("server.py", "from .cli import not_there_yet", "server (floor 7) imports cli (floor 10)"),
        ("client.py", "from .server import Server", "client (floor 7) imports server (floor 7)"),
        ("cli/serve.py", "from ..__main__ import x", "cli.serve (floor 10) imports __main__ (floor 11)"),
        ("cli/serve.py", "from .. import Server", "cli.serve (floor 10) imports __init__ (floor 10)"),
        ("cli/serve.py", "from gmprpc.cli import main", "circle of imports: cli <- cli.serve <- cli"),
        ("cli/options.py", "from . import serve", "circle of imports: cli."),
        ("attic.py", "", "'attic' has no floor"),
        ("attic/box.py", "", "'attic' has no floor"),
        ("protocol.py", "import gevent.event", "protocol imports gevent.event, but it has to do without gevent"),
        ("methods.py", "from greenlet import getcurrent", "it has to do without greenlet"),
        ("exceptions.py", "import greenlet", "it has to do without greenlet"),
        ("options.py", "import socket", "it has to do without socket"),
        ("metrics.py", "from time import monotonic", "it has to do without time"),
        ("protocol.py", "from .reply import by_the_back_door", "protocol imports reply, which may use gevent"),
    ],
)
def test_each_violation_is_found(tmp_path: Path, file: str, source: str, complaint: str) -> None:
    (violation,) = violations_of(build_house(tmp_path, {**SOUND, file: source}))
    assert complaint in violation
    assert violation.startswith("gmprpc")
