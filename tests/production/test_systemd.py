"""The units among the examples, as far as they can be tried where systemd doesn't run."""

from __future__ import annotations

import configparser
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import gevent
import pytest

import gmprpc
from tests.helpers import listening
from tests.programs import Program

from .load import PROGRAMS, Load

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
SERVICE, SOCKET = (EXAMPLES / name for name in ("gmprpc.service", "gmprpc.socket"))

#: Hands over what listens as systemd does, as the descriptor 3.
ACTIVATE = "import os, sys; os.dup2(int(sys.argv[1]), 3); os.execv(sys.argv[2], sys.argv[2:])"


def setting(unit: Path, section: str, name: str) -> str:
    parser = configparser.ConfigParser(strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # Names keep their capitals.
    parser.read(unit, encoding="utf-8")
    return parser[section][name]


def test_systemd_finds_nothing_wrong_with_the_units(require_peer: Callable[[str, Any], None], directory: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    require_peer("systemd (systemd-analyze)", analyze)
    program, *_ = shlex.split(setting(SERVICE, "Service", "ExecStart"))
    units = [directory / unit.name for unit in (SERVICE, SOCKET)]
    for unit, example in zip(units, (SERVICE, SOCKET), strict=True):
        # The program has to be there.
        unit.write_text(example.read_text(encoding="utf-8").replace(program, sys.executable), encoding="utf-8")
    with Program(str(analyze), "verify", *units) as verify:
        # It may complain of units that have nothing to do with these.
        assert [line for line in verify.lines() if "gmprpc" in line] == []
        assert verify.wait() == 0


@pytest.fixture
def listener() -> Iterator[Any]:
    """What listens, whether a server runs or not."""
    with listening(("127.0.0.1", 0)) as listener:
        yield listener


@pytest.fixture
def load(directory: Path) -> Iterator[Load]:
    load = Load(directory)
    yield load
    load.close()


def start(listener: Any, load: Load) -> Program:
    """The command of the unit, with the counting service for the module that it names."""
    _, *arguments, app = shlex.split(setting(SERVICE, "Service", "ExecStart"))
    assert app == "module:service"
    fd = listener.fileno()
    command = (sys.executable, "-m", "gmprpc", *arguments, "--app-dir", str(PROGRAMS), "counted:service")
    return Program(sys.executable, "-c", ACTIVATE, str(fd), *command, env=load.env, pass_fds=[fd])


def test_no_call_fails_while_a_server_that_systemd_listens_for_is_restarted(listener: Any, load: Load) -> None:
    with ExitStack() as stack:
        program = stack.enter_context(start(listener, load))
        clients = [stack.enter_context(gmprpc.Client(listener.getsockname(), draining=True)) for _ in range(5)]
        with load.by(clients):
            for _ in range(3):
                enough = len(load.made) + 200
                while len(load.made) < enough:
                    gevent.sleep(0.01)
                program.terminate()
                assert program.wait() == 0
                program = stack.enter_context(start(listener, load))
    assert load.failed == []
    assert load.executions(load.made) == {1}
