"""What the README's section "In production" says to type, typed as it stands there, but for what ``OURS`` says."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import gmprpc
from gmprpc.cli import main
from tests.helpers import is_listening, wait_until
from tests.programs import Program

from .haproxy import ADMIN_SOCKET, configuration

Address = tuple[str, int]

README = (Path(__file__).parent.parent.parent / "README.md").read_text(encoding="utf-8")
(SECTION,) = re.findall(r"^## In production\n(.*?)^## ", README, re.MULTILINE | re.DOTALL)

#: What is typed here in place of what an operator types. "{rpc}", "{http}" and "{haproxy}" are addresses of the test's
#: own, "{configuration}" is the example with these in it. Each has to stand in the section.
OURS = {
    "0.0.0.0:4423": "{rpc}",
    "127.0.0.1:4423": "{rpc}",
    "10.0.0.1:4423": "{rpc}",
    "10.0.0.2:4423": "{rpc}",
    "rpc.example.com:4423": "{rpc}",
    "127.0.0.1:9000": "{http}",
    "0.0.0.0:9000": "{http}",
    "--proxy-allow-from 10.0.0.9": "--proxy-allow-from 127.0.0.1",
    "examples/haproxy.cfg": "{configuration}",
    # It is tested that it works, not how long and how quickly: that is the machine's affair.
    "--workers 4": "--workers 2",
    "--drain-delay 5": "--drain-delay 0.5",
    "--duration 10": "--duration 0.5 --warm-up 0",
    "p99>50ms": "p99>20s",
    "1_000_000": "1_000",
}


def commands_in(text: str) -> list[str]:
    """What stands behind the prompts in the console blocks, but for how gmprpc is installed."""
    blocks = re.findall(r"^```console\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    commands = re.findall(r"^\$ (.*)$", re.sub(r"\\\n +", "", "".join(blocks)), re.MULTILINE)
    return [command for command in commands if not command.startswith("pip install ")]


COMMANDS = commands_in(SECTION)
SERVE, BENCH, HAPROXY, CHECK = (
    [command for command in COMMANDS if command.startswith(beginning)]
    for beginning in ("gmprpc serve ", "gmprpc bench ", "haproxy ", "GUNICORN_CMD_ARGS=--check-config gmprpc serve ")
)


class Operator:
    """Who types what the README says."""

    def __init__(self, reserve: Callable[[], Address], directory: Path) -> None:
        #: Where the server, its metrics and HAProxy listen.
        self.rpc, self.http, self.haproxy = reserve(), reserve(), reserve()
        self._configuration = directory / "own.cfg"
        text = configuration(self.haproxy, dict.fromkeys("a", self.rpc))
        text = text.replace(ADMIN_SOCKET, str(directory / "admin.sock"))
        self._configuration.write_text(text, encoding="utf-8")

    def own(self, text: str) -> str:
        """``text`` with what ``OURS`` says."""
        places = {name: "{}:{}".format(*getattr(self, name)) for name in ("rpc", "http", "haproxy")}
        for theirs, ours in OURS.items():
            text = text.replace(theirs, ours.format(**places, configuration=self._configuration))
        return text

    @contextmanager
    def type(self, command: str) -> Iterator[Program]:
        """The program that a shell makes of ``command``."""
        paths = [str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin", "/usr/local/sbin"]
        # Where a server listens that isn't told.
        env = {"PATH": os.pathsep.join(paths), "GMPRPC_BIND": "{}:{}".format(*self.rpc)}
        # The shell gives its place to the command, which is to get the signals.
        command = re.sub(r"(?=\b(gmprpc|haproxy) )", "exec ", self.own(command), count=1)
        with Program("sh", "-c", command, env=env) as program:
            yield program

    @contextmanager
    def serving(self, command: str) -> Iterator[Program]:
        """A server, from the moment on when it listens; stopped at the end, as by a supervisor."""
        with self.type(command) as program:
            program.line_with("listening on {}:{}".format(*self.rpc))
            yield program
            program.terminate()
            assert program.wait() == 0


@pytest.fixture
def operator(reserve: Callable[[], Address], directory: Path) -> Operator:
    return Operator(reserve, directory)


def answer_of(client: gmprpc.Client | gmprpc.Balancer) -> Any:
    with client:
        return client.call("sum", 1, 2, 3)


def status_of(address: Address, path: str) -> int:
    try:
        with urllib.request.urlopen("http://{}:{}/{}".format(*address, path), timeout=20) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def assert_tells_over_http(address: Address) -> None:
    assert status_of(address, "livez") == status_of(address, "metrics") == 200
    # A worker that doesn't serve yet hears within a second that another one does.
    wait_until(lambda: status_of(address, "readyz") == 200)


@pytest.mark.parametrize("command", [command for command in SERVE if "--proxy-protocol" not in command])
def test_a_server_serves_the_demo_and_stops(operator: Operator, command: str) -> None:
    with operator.serving(command):
        assert answer_of(gmprpc.Client(operator.rpc, timeout=20)) == 6
        if "--metrics-bind" in command:
            assert_tells_over_http(operator.http)


def test_haproxy_leads_to_the_servers(operator: Operator, require_peer: Callable[[str, Any], None]) -> None:
    require_peer("HAProxy (haproxy)", shutil.which("haproxy", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin"))
    (serve,) = (command for command in SERVE if "--proxy-protocol" in command)
    (haproxy,) = HAPROXY
    with operator.serving(serve), operator.type(haproxy) as program:
        wait_until(lambda: program.has_ended() or is_listening(operator.haproxy))
        assert not program.has_ended(), program.lines()
        assert answer_of(gmprpc.Client(operator.haproxy, timeout=20, draining=True)) == 6
        assert_tells_over_http(operator.http)
        program.terminate()
        assert program.wait() == -signal.SIGTERM


def test_bench_is_content_with_a_server(operator: Operator) -> None:
    assert BENCH
    with operator.serving(SERVE[0].replace("--access-log ", "")):
        for command in BENCH:
            with operator.type(command) as bench:
                said = bench.lines()
                assert bench.wait() == 0, said


def test_clients_are_answered(operator: Operator) -> None:
    clients, loop = re.findall(r"^```python\n(.*?)^```", SECTION, re.MULTILINE | re.DOTALL)
    made: dict[str, Any] = {}
    with operator.serving(SERVE[0].replace("--access-log ", "")):
        answers = []
        for line in clients.splitlines():
            exec(operator.own(line), made)
            if "stock" in made:
                answers.append(answer_of(made["stock"]))
        assert answers == [6, 6]
        exec(operator.own(loop), made)
        made["client"].close()


@pytest.mark.parametrize("app, exit_code", [("", 0), ("gmprpc.cli.demo:service", 0), ("gmprpc.cli.demo:nothing", 1)])
def test_code_is_tried_before_it_is_deployed(operator: Operator, app: str, exit_code: int) -> None:
    (command,) = CHECK
    with operator.type(f"{command} {app}") as program:
        said = program.lines()
        assert program.wait() == exit_code, said


def test_no_command_and_no_rule_is_left_out() -> None:
    assert set(COMMANDS) == {*SERVE, *BENCH, *HAPROXY, *CHECK}
    assert [theirs for theirs in OURS if theirs not in SECTION] == []


def test_each_option_that_is_named_is_one() -> None:
    options = {
        option
        for name in ("serve", "bench")
        for parameter in main.commands[name].params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", SECTION))
    assert named - options == {"--help", "--check-config"}  # The last one is gunicorn's.


def test_each_link_leads_somewhere() -> None:
    headings = {
        re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    }
    targets = re.findall(r"\]\((?!https?:)([^)]+)\)", README)
    assert {target[1:] for target in targets if target.startswith("#")} - headings == set()
    root = Path(__file__).parent.parent.parent
    assert [target for target in targets if not target.startswith("#") and not (root / target).exists()] == []


@pytest.mark.parametrize("command", [command for command in commands_in(README) if command.startswith("gmprpc ")])
def test_each_command_of_the_readme_is_understood(command: str) -> None:
    """In all sections; it isn't carried out."""
    _, name, *arguments = shlex.split(re.sub(r" > \S+$", "", command), comments=True)
    with main.commands[name].make_context(name, arguments):
        pass
