"""The files of metrics that several processes write: what was counted stays, what has ended does not go on."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, values
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from gmprpc.sharedmetrics import VARIABLE, Relay, SharedCollector, shared_directory, sum_of_live, tidy_up

from .programs import Program

WRITE = """
    import signal
    import sys

    from prometheus_client import Counter, Gauge, Histogram, Summary

    number = int(sys.argv[1])
    Counter("calls", "Calls.", ["method"]).labels("add").inc(number)
    Histogram("seconds", "Seconds.", buckets=[1.0, 2.0]).observe(number)
    Summary("sizes", "Sizes.").observe(number)
    Gauge("serving", "Serving.", multiprocess_mode="livesum").set(number)
    Gauge("most", "Most.", multiprocess_mode="max").set(number)
    print("written", flush=True)
    signal.pause()
"""


@contextmanager
def writing(directory: Path, number: int) -> Iterator[None]:
    """A process that has written ``number`` and lives meanwhile."""
    with Program(sys.executable, "-c", textwrap.dedent(WRITE), str(number), env={VARIABLE: str(directory)}) as program:
        assert program.line() == "written"
        yield


def told(directory: Path) -> dict[str, float]:
    """What all processes together tell, by the names of the samples and the values of their labels."""
    registry = CollectorRegistry()
    registry.register(SharedCollector(directory))
    return {
        ",".join([sample.name, *sample.labels.values()]): sample.value
        for metric in registry.collect()
        for sample in metric.samples
    }


COUNTED_BY_1_AND_2 = {
    "calls_total,add": 3,
    "seconds_bucket,1.0": 1,
    "seconds_bucket,2.0": 2,
    "seconds_bucket,+Inf": 2,
    "seconds_count": 2,
    "seconds_sum": 3,
    "sizes_count": 2,
    "sizes_sum": 3,
}


def test_processes_that_live_add_up(tmp_path: Path) -> None:
    with writing(tmp_path, 1), writing(tmp_path, 2):
        assert told(tmp_path) == {**COUNTED_BY_1_AND_2, "serving": 3, "most": 2}
        assert sum_of_live(tmp_path, "serving") == 3


@pytest.mark.parametrize("pid", [os.getpid(), 2**22])  # There is no process of the second number.
def test_a_file_that_has_only_just_been_made_is_no_trouble(tmp_path: Path, pid: int) -> None:
    with writing(tmp_path, 1), writing(tmp_path, 2):
        for kind in ("counter", "gauge_livesum"):
            (tmp_path / f"{kind}_{pid}.db").touch()
        assert sum_of_live(tmp_path, "serving") == 3
        assert told(tmp_path) == {**COUNTED_BY_1_AND_2, "serving": 3, "most": 2}


def test_what_a_process_has_counted_outlives_it_and_what_it_was_doing_does_not(tmp_path: Path) -> None:
    with writing(tmp_path, 1):
        with writing(tmp_path, 2):
            pass
        assert told(tmp_path) == {**COUNTED_BY_1_AND_2, "serving": 1, "most": 2}
        assert sum_of_live(tmp_path, "serving") == 1
    assert told(tmp_path) == {**COUNTED_BY_1_AND_2, "most": 2}
    assert sum_of_live(tmp_path, "serving") == 0
    assert sum_of_live(tmp_path, "most") == 0


def test_processes_that_have_ended_leave_one_file_of_each_kind(tmp_path: Path) -> None:
    for _ in range(3):
        with writing(tmp_path, 1):
            pass
        tidy_up(tmp_path)
    files = {path.name for path in tmp_path.iterdir() if not path.name.startswith("gauge_max_")}
    assert files == {"counter_0.db", "histogram_0.db", "summary_0.db", "gmprpc.lock"}
    assert told(tmp_path)["calls_total,add"] == 3


def test_many_series_add_up_too(tmp_path: Path) -> None:
    many = """
        from prometheus_client import Counter

        counter = Counter("calls", "Calls.", ["method"])
        for number in range(2000):
            counter.labels(f"method_{number}").inc()
    """
    for _ in range(2):
        program = Program(sys.executable, "-c", textwrap.dedent(many), env={VARIABLE: str(tmp_path)})
        with program:
            assert program.wait() == 0
        tidy_up(tmp_path)
    assert told(tmp_path) == {f"calls_total,method_{number}": 2 for number in range(2000)}


def test_a_summing_up_that_was_broken_off_is_begun_again(tmp_path: Path) -> None:
    (tmp_path / "counter_0.new").write_bytes(b"\0" * 100)
    with writing(tmp_path, 1):
        pass
    assert told(tmp_path)["calls_total,add"] == 1
    assert not (tmp_path / "counter_0.new").exists()


def test_the_files_of_processes_that_are_another_users_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(pid: int, signum: int) -> None:
        raise PermissionError

    with writing(tmp_path, 1):
        pass
    monkeypatch.setattr(os, "kill", kill)
    assert told(tmp_path)["serving"] == 1
    assert sum_of_live(tmp_path, "serving") == 1


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    for name in ("counter_0.db", "notes.txt", "gauge_livesum_x.db", "counter_5.db.bak", "counter_99999999999.db"):
        (tmp_path / name).touch()
    tidy_up(tmp_path)
    assert len(list(tmp_path.iterdir())) == 5


# What is copied there.


class Told:
    """A collector of what the test says."""

    def __init__(self) -> None:
        self.things = 0
        self.buckets = [0, 0]

    def collect(self) -> Iterator[Metric]:
        yield CounterMetricFamily("things", "Things.", self.things)
        yield GaugeMetricFamily("level", "Level.", self.things)
        seconds = HistogramMetricFamily("seconds", "Seconds.", labels=["method"])
        for method in ("add", "sub"):
            buckets = [("0.5", self.buckets[0]), ("+Inf", sum(self.buckets))]
            seconds.add_metric([method], buckets, 10.0 * self.buckets[1])
        yield seconds


@pytest.fixture
def relayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Told, Relay]]:
    """What is told, and what copies it."""
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    # As if it had been set before anything was imported.
    monkeypatch.setattr(values, "ValueClass", values.MultiProcessValue())
    told = Told()
    relay = Relay(told)
    yield told, relay
    for copy in relay._copies.values():  # Else they are closed at the end of the process.
        copy._file.close()


def test_what_is_copied_is_what_is_told(tmp_path: Path, relayed: tuple[Told, Relay]) -> None:
    this, relay = relayed
    for this.things, this.buckets in [(0, [0, 0]), (3, [1, 0]), (5, [1, 3]), (5, [2, 3])]:
        relay.refresh()
        first, second = map(float, this.buckets)
        assert told(tmp_path) == {
            "things_total": this.things,
            "level": this.things,
            **{f"seconds_bucket,{method},0.5": first for method in ("add", "sub")},
            **{f"seconds_bucket,{method},+Inf": first + second for method in ("add", "sub")},
            **{f"seconds_count,{method}": first + second for method in ("add", "sub")},
            **{f"seconds_sum,{method}": 10 * second for method in ("add", "sub")},
        }


def test_what_is_copied_never_goes_down_unless_it_may(tmp_path: Path, relayed: tuple[Told, Relay]) -> None:
    this, relay = relayed
    for this.things, shown in [(3, 3), (5, 5), (4, 5), (5, 5), (6, 6)]:
        relay.refresh()
        assert told(tmp_path)["things_total"] == shown
        assert told(tmp_path)["level"] == this.things


def test_the_directory_is_the_one_of_prometheus_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert shared_directory() is None
    monkeypatch.setenv(VARIABLE, "")
    assert shared_directory() is None
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    assert shared_directory() == tmp_path
