"""Growth in instructions is told from another build's; the driver that is measured makes every call and checks it."""

from __future__ import annotations

import configparser
import os
from pathlib import Path

import pytest

from tests.benchmarks.instructions import __main__ as command
from tests.benchmarks.instructions import baselines, meter
from tests.benchmarks.instructions.baselines import Baseline, compare
from tests.benchmarks.instructions.driver import CASES
from tests.benchmarks.instructions.meter import Measurement, MeterError

ROOT = Path(__file__).parent.parent

BUILD = {"python": "3.11.7", "compiler": "GCC 12.2.0"}
OTHER_BUILD = {"python": "3.11.2", "compiler": "GCC 12.2.0"}
REFERENCES = {"small": "reference", "large": "reference-large"}
BASELINE = Baseline(BUILD, {"small": 1000.0, "large": 5000.0, "reference": 400.0, "reference-large": 2000.0})


def verdicts(**instructions: float) -> dict[str, str]:
    """What is said of each case when these take so many instructions, and the others as many as before."""
    comparisons = compare({**BASELINE.instructions, **instructions}, BASELINE, REFERENCES)
    return {
        comparison.case: "grown" if comparison.has_grown else "shrunk" if comparison.has_shrunk else "the same"
        for comparison in comparisons
    }


@pytest.mark.parametrize(
    "instructions, verdict",
    [(1000, "the same"), (1049, "the same"), (1051, "grown"), (2000, "grown"), (951, "the same"), (949, "shrunk")],
)
def test_a_call_has_grown_when_it_takes_over_5_percent_more(instructions: float, verdict: str) -> None:
    assert verdicts(small=instructions) == {"small": verdict, "large": "the same"}


def test_another_build_shifts_what_is_allowed_as_it_does_the_reference() -> None:
    assert verdicts(small=1180, reference=480) == {"small": "the same", "large": "the same"}
    assert verdicts(small=1270, reference=480) == {"small": "grown", "large": "the same"}
    assert verdicts(small=1000, reference=360) == {"small": "grown", "large": "the same"}
    assert verdicts(reference=480) == {"small": "shrunk", "large": "the same"}, "the other has a reference of its own"


def test_a_case_or_a_python_without_a_baseline_is_not_judged() -> None:
    (new,) = compare({"new": 1.0, "reference": 400.0}, BASELINE, {"new": "reference"})
    assert (new.expected, new.change, new.has_grown, new.has_shrunk) == (None, None, False, False)
    (small,) = compare({"small": 1.0, "reference": 400.0}, None, {"small": "reference"})
    assert small.expected is None


def test_a_baseline_is_written_beside_those_of_other_pythons(tmp_path: Path) -> None:
    path = tmp_path / "baselines.json"
    newer = Baseline(OTHER_BUILD, {"small": 1.0})
    baselines.write("3.12", BASELINE, path)
    baselines.write("3.11", BASELINE, path)
    baselines.write("3.12", newer, path)
    assert list(baselines.load(path).items()) == [("3.11", BASELINE), ("3.12", newer)]


# The baselines in the repository.


def environments() -> dict[str, str]:
    """The version of Python of each environment that tox counts in, with the versions that are pinned there."""
    tox = configparser.RawConfigParser()
    tox.read(ROOT / "tox.ini")
    return dict(line.split("==") for line in tox["testenv:py3{11,12,13}-instructions"]["deps"].split())


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_baseline_has_each_case_and_the_versions_that_tox_pins(python: str) -> None:
    baseline = baselines.load()[python]
    assert set(baseline.instructions) == set(CASES)
    pins = environments()
    assert pins
    assert {name: baseline.fingerprint[name] for name in pins} == pins


def test_each_case_has_a_reference_that_gmprpc_has_no_part_in() -> None:
    for name, case in CASES.items():
        if case.reference is None:
            assert name.startswith("reference-")
        else:
            assert CASES[case.reference].reference is None


# The command, with numbers that were made up.


@pytest.fixture
def on_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """A user's machine with valgrind, where each case takes as much as the baseline has."""
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("GMPRPC_REQUIRE_INTEROP", raising=False)
    monkeypatch.setattr(meter, "is_installed", lambda: True)
    monkeypatch.setattr(command, "REFERENCES", REFERENCES)
    monkeypatch.setattr(baselines, "FILE", tmp_path / "baselines.json")
    baselines.write("3.11", BASELINE, baselines.FILE)
    counts(monkeypatch)
    return monkeypatch


def counts(monkeypatch: pytest.MonkeyPatch, build: dict[str, str] = BUILD, **instructions: float) -> None:
    """Have these numbers counted, and for the rest those of the baseline."""

    def measure(cases: list[str]) -> Measurement:
        return Measurement("here", build, {case: {**BASELINE.instructions, **instructions}[case] for case in cases})

    monkeypatch.setattr(meter, "measure", measure)


def test_command_succeeds_when_nothing_has_grown(
    on_this_machine: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([]) == 0
    output = capsys.readouterr().out
    assert [line.split()[:4] for line in output.splitlines()[-4:-2]] == [
        ["small", "1,000", "1,000", "+0.0%"],
        ["large", "5,000", "5,000", "+0.0%"],
    ]
    assert "but" not in output


def test_command_fails_when_a_call_has_grown(
    on_this_machine: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    counts(on_this_machine, small=1060)
    assert command.main([]) == 1
    assert "has grown by more than 5%" in capsys.readouterr().out
    assert command.main(["--case", "large"]) == 0


def test_command_asks_for_a_new_baseline_when_a_call_has_shrunk(
    on_this_machine: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    counts(on_this_machine, small=900)
    assert command.main([]) == 0
    assert "has shrunk: renew the baseline" in capsys.readouterr().out


def test_command_tells_in_what_the_build_is_another(
    on_this_machine: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    counts(on_this_machine, build=OTHER_BUILD, reference=440, small=1100)
    assert command.main(["--case", "small"]) == 0
    output = capsys.readouterr().out
    assert "but the baseline has python 3.11.7\n" in output
    assert "1,100     1,100    +0.0%" in output


def test_written_baseline_is_the_next_one_to_compare_with(
    on_this_machine: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    counts(on_this_machine, small=1200)
    assert command.main([]) == 1
    assert command.main(["--write"]) == 0
    assert command.main([]) == 0
    assert baselines.load(baselines.FILE)["3.11"].instructions["small"] == 1200


def test_a_python_without_a_baseline_is_skipped_by_name(
    on_this_machine: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    counts(on_this_machine, build={"python": "3.14.1"})
    assert command.main([]) == 0
    assert "skipped: Python 3.14 has no baseline" in capsys.readouterr().err


def test_a_case_without_a_baseline_is_skipped_by_name(
    on_this_machine: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    on_this_machine.setattr(command, "REFERENCES", {**REFERENCES, "new": "reference"})
    counts(on_this_machine, new=1)
    assert command.main([]) == 0
    assert "skipped: no baseline for new" in capsys.readouterr().err


def test_missing_valgrind_is_skipped_by_name(
    on_this_machine: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    on_this_machine.setattr(meter, "is_installed", lambda: False)
    assert command.main([]) == 0
    assert "skipped: valgrind isn't installed" in capsys.readouterr().err


@pytest.mark.parametrize("variable, value", [("CI", "true"), ("GMPRPC_REQUIRE_INTEROP", "1")])
def test_what_is_skipped_elsewhere_fails_in_continuous_integration(
    on_this_machine: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], variable: str, value: str
) -> None:
    on_this_machine.setenv(variable, value)
    assert command.main([]) == 0
    counts(on_this_machine, build={"python": "3.14.1"})
    assert command.main([]) == 1
    on_this_machine.setattr(meter, "is_installed", lambda: False)
    assert command.main([]) == 1
    assert capsys.readouterr().err.count("failed: ") == 2


# The driver, without valgrind.


def test_driver_makes_the_calls_of_every_case_in_every_layout(tmp_path: Path) -> None:
    heading, runs = meter.play(tmp_path, list(CASES))
    assert Path(heading["gmprpc"]).name == "gmprpc"
    assert heading["fingerprint"].keys() >= {"python", "compiler", "machine", "gevent", "greenlet", "msgpack"}
    assert {run["case"] for run in runs} == set(CASES)
    assert len(runs) == 3 * len(CASES)
    assert len({run["pid"] for run in runs}) == len(runs)
    for run in runs:
        assert 0 < run["few"] < run["many"]
        assert run["many"] % CASES[run["case"]].calls_at_once == 0


@pytest.mark.parametrize(
    "case, right, wrong, complaint",
    [
        (
            "server-1x1",
            "            return value",
            "            return [value]",
            r"heard 18 bytes and not 17: b'\x94\x01\x00\xc0\x91\xactwelve",
        ),
        (
            "server-1x64",
            "            return value",
            "            return value.upper()",
            r"heard b'\x94\x01\x00\xc0\xacTWELVE BYTES",
        ),
        ("client-blocking", "msgid, None, payload]", "msgid, None, 'else']", "wrong answer: 'else'"),
        ("client-async-64", "msgid, None, payload]", "msgid, None, 'else']", "wrong answer: 'else'"),
        ("client-100-greenlets", "msgid, None, payload]", "msgid, 'error', payload]", "RemoteError"),
        ("client-blocking", "[0, msgid, method", "[0, msgid + 1, method", r"heard b'\x94\x00\x00\xa4echo"),
    ],
)
def test_driver_fails_when_an_answer_or_a_request_is_wrong(
    tmp_path: Path, case: str, right: str, wrong: str, complaint: str
) -> None:
    source = meter.DRIVER.read_text()
    assert right in source
    driver = tmp_path / "driver.py"
    driver.write_text(source.replace(right, wrong))
    with pytest.raises(MeterError) as caught:
        meter.play(tmp_path, [case], driver=driver)
    assert complaint in str(caught.value)
    assert f"{case} failed" in str(caught.value)


def test_a_driver_that_hangs_is_ended_with_what_it_has_forked_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    driver = tmp_path / "driver.py"
    driver.write_text(f"import os, signal\nwriter = open({str(fifo)!r}, 'w')\nos.fork()\nsignal.pause()\n")
    monkeypatch.setattr(meter, "_PATIENCE", 1.0)
    with open(reader, "rb") as both:
        with pytest.raises(MeterError, match="no end after 1 s"):
            meter.play(tmp_path, ["server-1x1"], driver=driver)
        os.set_blocking(reader, True)
        assert both.read() == b"", "returns when nobody has it open any more"


def test_output_of_callgrind_without_a_total_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "counts.1.2"
    path.write_text("version: 1\nevents: Ir\ntotals: 4711\n")
    assert meter._total(path) == 4711
    path.write_text("version: 1\n")
    with pytest.raises(MeterError, match=r"counts\.1\.2 has no total"):
        meter._total(path)


def test_nothing_is_counted_without_valgrind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not meter.is_installed()
    with pytest.raises(MeterError, match="valgrind isn't installed"):
        meter.measure(["server-1x1"])
