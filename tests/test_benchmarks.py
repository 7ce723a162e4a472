"""The benchmark measures what it says and names whom it can't measure; how fast anything is doesn't matter here."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from .benchmarks import __main__ as command
from .benchmarks import environments, rounds
from .benchmarks.environments import Absence, Environments
from .benchmarks.participants import GMPRPC, PARTICIPANTS, Participant
from .benchmarks.processes import ROOT, BenchmarkError, Shape
from .benchmarks.report import report
from .benchmarks.results import Series, ratio
from .benchmarks.rounds import Plan

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler (cc)")


def run(directory: Path, *options: Any) -> tuple[int, dict[str, Any]]:
    """The exit status of the benchmark on one core, in its short form, and the JSON that it has written."""
    file = directory / "runs.json"
    shared = ["--short", "--cores", 1, "--environments", directory / "peers", "--json", file]
    status = command.main([*map(str, shared), *map(str, options)])
    return status, json.loads(file.read_text())


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Participant:
    """A peer that takes part, and whose server is out of order."""
    program = tmp_path / "server.py"
    program.write_text("raise SystemExit('out of order')\n")
    peer = Participant("some-peer", str(program), is_peer=True)
    monkeypatch.setitem(PARTICIPANTS, peer.name, peer)
    return peer


# ---- The command ----


@needs_compiler
def test_servers_are_measured_and_every_figure_is_written_down(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = ["1x64", "4x1-64k"]
    subjects = ["gmprpc", "floor", "c-echo"]
    status, document = run(tmp_path, "--kinds", "server", "--shapes", *shapes, "--subjects", *subjects)
    assert status == 0
    assert document["machine"].keys() >= {"processor", "cores", "system"}
    assert document["options"].items() >= {"rounds": 1, "seconds": 0.05, "cores": [1]}.items()
    assert list(document["subjects"]) == subjects
    assert document["subjects"]["gmprpc"]["versions"].keys() >= {"gmprpc", "gevent", "greenlet", "msgpack"}
    taken = document["runs"]
    assert sorted((run["subject"], run["shape"]) for run in taken) == sorted((s, h) for s in subjects for h in shapes)
    for run_ in taken:
        assert run_["kind"] == "server"
        assert run_["cores"] == run_["round"] == 1
        assert run_["calls"] > 0
        assert run_["is_complete"]
        faults = ("errors", "unanswered", "lost_connections", "silent_connections", "first_error")
        assert not any(run_[fault] for fault in faults)
        assert 0 < run_["p50_us"] <= run_["p99_us"] <= run_["p999_us"]
        for figure in ("calls_per_second", "server_cpu_ms_per_1000_calls", "resident_before", "resident_under_load"):
            assert run_[figure] > 0, figure
    printed = capsys.readouterr().out
    assert report(document) in printed
    assert all(text in printed for text in ("1x64", "4x1-64k", "only copies bytes", "no peer answers every call"))


@needs_compiler
def test_memory_of_idle_connections_is_measured(tmp_path: Path) -> None:
    status, document = run(tmp_path, "--kinds", "idle", "--subjects", "gmprpc")
    assert status == 0
    (idle,) = document["runs"]
    assert idle["kind"] == "idle"
    assert idle["connections"] == 10
    assert min(idle[f"resident_{state}"] for state in ("before", "in_use", "quiet")) > 0
    assert "Idle connections" in report(document)


@needs_compiler
def test_idle_connections_that_a_peer_closes_are_a_failure(peer: Participant, tmp_path: Path) -> None:
    Path(peer.server).write_text(
        """
import msgpack, socket
with socket.create_server(("127.0.0.1", 0)) as listener:
    print(listener.getsockname()[1], flush=True)
    while True:
        with listener.accept()[0] as connection:
            _, msgid, _, (value,) = msgpack.unpackb(connection.recv(4096))
            # The end goes out together with the answer, and not some time after it.
            connection.sendall(msgpack.packb([1, msgid, None, value]), socket.MSG_MORE)
"""
    )
    status, document = run(tmp_path, "--kinds", "idle", "--subjects", "gmprpc", peer.name)
    assert status == 0
    assert [run.get("failure") for run in document["runs"]] == [None, "1 of 1 idle connections lost"]


@needs_compiler
def test_a_peer_that_does_not_start_is_named_and_ends_nothing(peer: Participant, tmp_path: Path) -> None:
    options = ["--kinds", "server", "--shapes", "1x1", "--subjects", "gmprpc", peer.name]
    status, document = run(tmp_path, *options)
    assert status == 0
    assert "out of order" in document["subjects"][peer.name]["absence"]
    assert [run["subject"] for run in document["runs"]] == ["gmprpc"]
    assert f"{peer.name} is not measured: {peer.name} didn't start (it wrote: out of order)" in report(document)


@needs_compiler
def test_a_peer_that_cannot_be_installed_is_named_and_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ancient = Participant("ancient", "ancient.py", requirements=("ancient==1",), pythons=("1.5",), is_peer=True)
    refused = Participant("refused", "refused.py", requirements=("refused==1",), is_peer=True)
    for participant in (ancient, refused):
        monkeypatch.setitem(PARTICIPANTS, participant.name, participant)
    install_in_vain(monkeypatch)
    options = ["--kinds", "server", "--shapes", "1x1", "--subjects", "gmprpc", "ancient", "refused"]
    status, document = run(tmp_path, *options)
    assert status == 0
    absences = {name: subject["absence"] for name, subject in document["subjects"].items()}
    assert absences == {
        "gmprpc": None,
        "ancient": "there is no Python 1.5",
        "refused": "ERROR: No matching distribution found for refused==1",
    }
    assert "refused is not measured: ERROR: No matching distribution" in report(document)


@needs_compiler
def test_the_exit_status_tells_that_gmprpc_failed(
    monkeypatch: pytest.MonkeyPatch, peer: Participant, tmp_path: Path
) -> None:
    broken = Participant("gmprpc", peer.server)
    monkeypatch.setitem(PARTICIPANTS, "gmprpc", broken)
    options = ["--kinds", "server", "--shapes", "1x1", "--subjects"]
    assert run(tmp_path, *options, "gmprpc", "floor")[0] == 1
    assert run(tmp_path, *options, "gmprpc")[0] == 2  # Then nothing was measured at all.


# ---- Rounds ----


class Workshop:
    """Measures nothing, but remembers what it was asked to."""

    def __init__(self, outcomes: Mapping[str, dict[str, Any] | BenchmarkError]) -> None:
        self._outcomes = outcomes
        self.measured: list[str] = []

    def measure(self, participant: Participant, shape: Shape, *_: Any, **__: Any) -> dict[str, Any]:
        self.measured.append(participant.name)
        outcome = self._outcomes[participant.name]
        if isinstance(outcome, BenchmarkError):
            raise outcome
        return outcome


def measured(workshop: Workshop, participants: Sequence[Participant], number: int) -> list[dict[str, Any]]:
    plan = Plan(rounds=number, cores=(1,))
    return list(rounds.measure(workshop, participants, [Shape(1, 64)], plan, lambda text: None))  # type: ignore[arg-type]


GOOD = {"unanswered": 0, "lost_connections": 0}


def test_participants_take_turns_at_coming_first() -> None:
    participants = [Participant(name, f"{name}.py") for name in "abc"]
    workshop = Workshop(dict.fromkeys("abc", GOOD))
    runs = measured(workshop, participants, 3)
    assert "".join(workshop.measured) == "bcacababc"
    assert [run["round"] for run in runs] == [1, 1, 1, 2, 2, 2, 3, 3, 3]


@pytest.mark.parametrize("outcome", [{**GOOD, "unanswered": 63}, BenchmarkError("it ended")])
def test_a_peer_that_fails_or_loses_calls_is_not_waited_for_again(outcome: Any) -> None:
    peer = Participant("peer", "peer.py", is_peer=True)
    workshop = Workshop({"peer": outcome, "gmprpc": GOOD})
    runs = measured(workshop, [GMPRPC, peer], 3)
    assert workshop.measured.count("peer") == 1
    assert workshop.measured.count("gmprpc") == 3
    assert sum(run.get("failure") == "it ended" or run.get("unanswered") == 63 for run in runs) == 1


def test_gmprpc_is_measured_again_however_it_did() -> None:
    workshop = Workshop({"gmprpc": BenchmarkError("it ended")})
    assert [run["failure"] for run in measured(workshop, [GMPRPC], 2)] == ["it ended"] * 2


# ---- The report ----


def document(rates: Mapping[tuple[str, str], Sequence[float]], **subjects: dict[str, Any]) -> dict[str, Any]:
    """The JSON of a benchmark that has found these calls per second, in each round, for (subject, shape)."""
    names = dict.fromkeys(name for name, _ in rates)
    fields = {"versions": {"CPython": "3.11.7"}, "dialect": "msgpack-rpc", "remark": None, "absence": None}
    runs = []
    for (name, shape), of_rounds in rates.items():
        connections, _, in_flight = shape.partition("x")
        for number, rate in enumerate(of_rounds, start=1):
            shared = {"kind": "server", "subject": name, "cores": 1, "shape": shape, "round": number}
            sizes = {"connections": int(connections), "in_flight": int(in_flight), "payload_bytes": 12}
            latencies = {"p50_us": 1e6 / rate, "p99_us": 2e6 / rate, "p999_us": 3e6 / rate}
            counts = {"calls": 100, "errors": 0, "unanswered": 0, "lost_connections": 0, "silent_connections": 0}
            costs = {
                "server_cpu_ms_per_1000_calls": 1e6 / rate,
                "resident_before": 2**25,
                "resident_under_load": 2**26,
                "generator_cpu": 0.5,
            }
            end = {"first_error": "", "is_complete": True, "calls_per_second": rate}
            runs.append(shared | sizes | latencies | counts | costs | end)
    return {
        "machine": {"processor": "abacus", "cores": 2, "system": "Linux", "load_average_before": 0.0},
        "options": {
            "rounds": 3,
            "seconds": 0.5,
            "is_fresh": False,
            "pinned": {"1": {"server": 0, "other": 0}},
        },
        "subjects": {name: {**fields, "is_peer": name != "gmprpc", **subjects.get(name, {})} for name in names},
        "runs": runs,
    }


def line_with(text: str, *words: str) -> str:
    (line,) = (line for line in text.splitlines() if all(word in line for word in words))
    return line


@pytest.mark.parametrize("rate, verdict", [(100, "reached"), (99.9, "not reached")])
def test_a_bar_is_reached_from_its_very_figure_on(rate: float, verdict: str) -> None:
    text = report(document({("gmprpc", "1x1"): [rate] * 3, ("mprpc", "1x1"): [90, 100, 110]}))
    line = line_with(text, "1x1", "at least 1 x mprpc")
    assert line.endswith(f"  {verdict}")
    assert f"{rate / 100:.2f} ({rate / 110:.2f}-{rate / 90:.2f})" in line


def test_a_low_p99_has_a_bar_of_its_own() -> None:
    found = document({("gmprpc", "50x1"): [1000, 1000], ("mprpc", "50x1"): [100, 99]})
    assert line_with(report(found), "50x1, p99", "at most 0.1 x mprpc").endswith(" reached")
    found = document({("gmprpc", "50x1"): [1000, 1000], ("mprpc", "50x1"): [101, 102]})
    assert line_with(report(found), "50x1, p99", "at most 0.1 x mprpc").endswith("not reached")


def test_whoever_loses_calls_is_counted_and_not_compared() -> None:
    found = document(
        {("gmprpc", "1x64"): [600], ("mprpc", "1x1"): [100], ("mprpc", "1x64"): [9999], ("slow", "1x64"): [100]},
        mprpc={"remark": "answers one message per read"},
    )
    found["runs"][2]["unanswered"] = 63
    text = report(found)
    remark = "not compared: 63 calls unanswered (mprpc answers one message per read)"
    assert line_with(text, "1x64", "mprpc", "not compared").endswith(remark)
    assert "9,999" not in text
    assert line_with(text, "the best Python peer (slow)").endswith(" reached")
    assert line_with(text, "mprpc's own 1x1").split()[-1] == "reached"


def test_a_peer_that_failed_is_named_with_the_reason() -> None:
    found = document({("gmprpc", "1x1"): [100], ("mprpc", "1x1"): [100]}, mprpc={"versions": {}})
    found["runs"][1] = {**found["runs"][1], "failure": "mprpc ended with status 1\nand a traceback"}
    text = report(found)
    assert line_with(text, "1x1", "mprpc", "not compared").endswith("not compared: mprpc ended with status 1")
    assert line_with(text, "at least 1 x mprpc").endswith("not measured")


def test_an_old_file_is_printed(tmp_path: Path) -> None:
    file = tmp_path / "old.json"
    found = document({("gmprpc", "1x1"): [100], ("mprpc", "1x1"): [50]})
    file.write_text(json.dumps(found))
    code = [sys.executable, "-m", "tests.benchmarks.report", str(file)]
    done = subprocess.run(code, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == report(found) + "\n"


def test_ratios_pair_what_was_measured_in_one_round() -> None:
    found = ratio(Series({1: 10, 2: 20, 3: 90}), Series({1: 10, 2: 10, 4: 1}))
    assert found is not None
    assert (found.value, found.low, found.high) == (2, 1, 2)
    assert ratio(Series({1: 10}), Series({2: 10})) is None
    assert ratio(Series({1: 10}), Series({1: 10}, "it loses calls")) is None


# ---- Environments ----


def install_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*command: Any) -> str:
        if "pip" in command:
            raise Absence(f"ERROR: No matching distribution found for {command[-1]}")
        return original(*command)

    original = without_pip(monkeypatch)
    monkeypatch.setattr(environments, "_run", fail)


def without_pip(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Have environments made without anything in them; returns what runs a command then."""
    original = environments._run

    def run(*command: Any) -> str:
        return original(*command, *(["--without-pip"] if "venv" in command else []))

    monkeypatch.setattr(environments, "_run", run)
    return run


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What has been installed, one after the other, in name only."""
    installed: list[str] = []

    def install(*command: Any) -> str:
        if "pip" not in command:
            return str(original(*command))
        installed.append(command[-1])
        return ""

    original = without_pip(monkeypatch)
    monkeypatch.setattr(environments, "_run", install)
    return installed


def test_an_environment_is_used_again_while_it_is_what_is_wanted(tmp_path: Path, installed: list[str]) -> None:
    old, new = (Participant("peer", "peer.py", requirements=(f"peer=={version}",)) for version in (1, 2))
    python = Environments(tmp_path).python(old)
    assert python.is_relative_to(tmp_path)
    assert subprocess.check_output([python, "-c", "print(1)"]) == b"1\n"
    assert Environments(tmp_path).python(old) == python
    assert installed == ["peer==1"]
    assert Environments(tmp_path).python(new) == python
    assert installed == ["peer==1", "peer==2"]
    assert Environments(tmp_path).versions(new)["peer"] == "2"


def test_an_environment_that_was_broken_off_is_made_anew(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, installed: list[str]
) -> None:
    peer = Participant("peer", "peer.py", requirements=("peer==1",))
    with monkeypatch.context() as patch:
        install_in_vain(patch)
        with pytest.raises(Absence, match="No matching distribution"):
            Environments(tmp_path).python(peer)
    assert installed == []
    Environments(tmp_path).python(peer)
    assert installed == ["peer==1"]


def test_what_is_built_from_source_finds_its_tools_first(tmp_path: Path, installed: list[str]) -> None:
    peer = Participant("peer", "peer.py", requirements=("peer==1",), build_requirements=("tool==1",))
    Environments(tmp_path).python(peer)
    assert installed == ["tool==1", "peer==1"]


def test_a_python_that_pyenv_has_is_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, installed: list[str]
) -> None:
    version = "{}.{}".format(*sys.version_info)
    home = tmp_path / "pyenv" / "versions" / f"{version}.99" / "bin"
    home.mkdir(parents=True)
    (home / f"python{version}").symlink_to(Path(sys.executable).resolve())
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    monkeypatch.setenv("PATH", "")
    peer = Participant("peer", "peer.py", requirements=("peer==1",), pythons=("1.5", version))
    assert Environments(tmp_path / "peers").python(peer).exists()


def test_every_requirement_is_exact() -> None:
    for participant in PARTICIPANTS.values():
        for requirement in (*participant.requirements, *participant.build_requirements):
            name, _, version = requirement.partition("==")
            assert name, requirement
            assert version, requirement
