"""The plots show what a benchmark's JSON says, to everybody; the figures here are made up, nothing was measured."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from .benchmarks.plots import __main__ as plots
from .benchmarks.plots.drawing import COLOURS, WIDTH, LogScale
from .benchmarks.plots.words import in_bytes, microseconds, short

ROOT = Path(__file__).parent.parent
SVG = "{http://www.w3.org/2000/svg}"

NAMES = list(plots.PLOTS)

# Name -> (its protocol, how fast it is by and large).
SUBJECTS = {
    "c-echo": ("msgpack-rpc", 4.0),
    "floor": ("msgpack-rpc", 2.0),
    "bare-sleep": ("", 1.0),
    "zerorpc": ("zerorpc", 0.05),
    "mprpc": ("msgpack-rpc", 0.9),
    "gmprpc": ("msgpack-rpc", 1.0),
    "aio-msgpack-rpc": ("msgpack-rpc", 0.6),
    "aiorpc": ("msgpack-rpc", 0.5),
    "grpcio-aio": ("grpc", 0.1),
    "rpyc": ("rpyc", 0.12),
}
LOSERS = ("mprpc", "aiorpc")
CLIENTS = ("gmprpc", "mprpc", "zerorpc", "rpyc")
NO_SERVERS = ("c-echo", "floor", "bare-sleep")
PARTICIPANTS = [name for name in SUBJECTS if name not in NO_SERVERS]
BLOCKING = {1: {"connections": 1}, 10: {"connections": 10}, 800: {"in_flight": 16}}
GROWERS = ("gmprpc", "mprpc", "aio-msgpack-rpc", "grpcio-aio")
SHAPES = {
    "1x1": (1, 1, 12, 100_000),
    "1x64": (1, 64, 12, 700_000),
    "50x1": (50, 1, 12, 110_000),
    "50x16": (50, 16, 12, 500_000),
    "4x1-64k": (4, 1, 65536, 26_000),
}

_chance = random.Random(4)


def run(kind: str, name: str, rate: float, **facts: Any) -> dict[str, Any]:
    """One run, as the benchmark writes it."""
    rate *= SUBJECTS[name][1] * _chance.uniform(0.95, 1.05)
    middle = 1e6 / rate * facts.get("connections", 1)
    slowest = middle * (900 if name == "mprpc" else _chance.uniform(3, 6))
    figures: dict[str, Any] = {"calls_per_second": rate, "calls": int(rate), "errors": 0}
    figures |= {"p50_us": middle, "p99_us": slowest / 2, "p999_us": slowest}
    if kind != "client":
        unanswered = 37 if name in LOSERS and facts["in_flight"] > 1 else 0
        figures |= {"unanswered": unanswered, "lost_connections": 0, "silent_connections": 0, "first_error": None}
        figures |= {"is_complete": not unanswered}
    return {"kind": kind, "subject": name, **facts, **figures}


def grown(axis: str, value: int, name: str, rate: float, number: int, **load: int) -> dict[str, Any]:
    """One run of growth."""
    load = {"connections": 50, "in_flight": 1, "payload_bytes": 12, "cores": 1, "round": number} | load
    return run("growth", name, rate, axis=axis, value=value, **load)


def refused(kind: str, **facts: Any) -> dict[str, Any]:
    """A run of what a participant can't do."""
    load = {"connections": 1, "in_flight": 64, "payload_bytes": 12, "cores": 1, "round": 1} | facts
    return {"kind": kind, **load, "failure": "not supported: it has never learnt it"}


def made_up() -> dict[str, Any]:
    """A whole JSON."""
    _chance.seed(4)
    runs = []
    for number in range(1, 4):
        for name in [name for name in SUBJECTS if name != "bare-sleep"]:
            for shape, (connections, in_flight, size, rate) in SHAPES.items():
                load = {"connections": connections, "in_flight": in_flight, "payload_bytes": size, "round": number}
                runs += [run("server", name, rate, shape=shape, cores=cores, **load) for cores in (1, 2)]
        for name in CLIENTS:
            for mode, callers in [("blocking", 1), ("greenlets", 100), ("async", 64)][: 1 if name == "mprpc" else 3]:
                rate = 80_000 * callers**0.3
                runs.append(run("client", name, rate, cores=1, mode=mode, callers=callers, round=number))
            runs.append(run("client", name, 60_000, cores=2, mode="blocking", callers=1, round=number))
        for name in GROWERS:
            for value in (1, 10, 100, 1000):
                runs.append(grown("connections", value, name, 1e5 / (1 + value / 3e3), number, connections=value))
                if name != "mprpc":
                    runs.append(grown("methods", value, name, 1e5, number))
            for value in (10, 1024, 10_000, 1 << 20, 10 << 20):
                runs.append(grown("payload", value, name, 1e8 / (1e3 + value), number, payload_bytes=value))
            for value, load in BLOCKING.items():
                # A handler for each connection: that is the only way in which mprpc can have so many.
                load = {"connections": value} if name == "mprpc" else load
                runs.append(grown("blocking", value, name, 200 * value, number, **load))
        runs += [grown("connections", value, "floor", 1e5, number, connections=value) for value in (1, 10, 100, 1000)]
        runs += [
            grown("blocking", value, "bare-sleep", 300 * value, number, **load) for value, load in BLOCKING.items()
        ]
    runs.append(refused("growth", subject="mprpc", axis="methods", value=1))
    runs.append(refused("growth", subject="floor", axis="payload", value=10 << 20))
    runs.append(refused("client", subject="mprpc", cores=1, mode="async", callers=64))
    for name, (_, speed) in SUBJECTS.items():
        for count in (1000, 10_000):
            sizes = {"resident_before": 30 << 20, "resident_in_use": 1 << 30}
            sizes["resident_quiet"] = sizes["resident_before"] + int(count * 12 * 1024 / speed)
            runs.append({"kind": "idle", "subject": name, "connections": count, **sizes})
    subjects: dict[str, Any] = {
        name: {"versions": {"CPython": "3.11.7", name: "1.2.3"}, "dialect": dialect, "absence": None}
        for name, (dialect, _) in SUBJECTS.items()
    }
    subjects["mprpc"]["versions"]["CPython"] = "3.8.18"
    subjects["grpcio"] = {"versions": {}, "dialect": "grpc", "absence": "there is no wheel & no compiler"}
    for name, subject in subjects.items():
        subject["is_peer"] = name not in ("gmprpc", *NO_SERVERS)
    machine = {"processor": "Abacus <4> & sons", "cores": 2, "system": "Linux 0.0"}
    return {"machine": machine, "options": {"rounds": 3, "seconds": 1.0}, "subjects": subjects, "runs": runs}


def draw(document: Any, directory: Path) -> dict[str, str]:
    """The plots of ``document``: those that could be drawn, by name."""
    path = directory / "bench.json"
    path.write_text(json.dumps(document))
    assert plots.main([str(path), "--to", str(directory / "plots")]) == 0
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted((directory / "plots").iterdir())}


def texts(svg: str) -> list[str]:
    """What can be read in a plot."""
    return [element.text or "" for element in ET.fromstring(svg).iter(f"{SVG}text")]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return draw(made_up(), tmp_path_factory.mktemp("drawn"))


def test_every_plot_is_drawn(drawn: dict[str, str]) -> None:
    assert sorted(drawn) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_plot_can_be_read_aloud(drawn: dict[str, str], name: str) -> None:
    root = ET.fromstring(drawn[name])
    assert root.get("role") == "img"
    ids = {element.get("id"): element for element in root if element.get("id")}
    title, description = (ids[name].text or "" for name in (root.get("aria-labelledby") or "").split())
    assert title in texts(drawn[name])
    assert re.search(r"gmprpc:? [^\n]*\d", description)
    assert len(description.splitlines()) > 2


@pytest.mark.parametrize("name", NAMES)
def test_a_plot_follows_the_colour_scheme_of_its_reader(drawn: dict[str, str], name: str) -> None:
    style = ET.fromstring(drawn[name]).findtext(f"{SVG}style") or ""
    light, dark = style.split("@media (prefers-color-scheme: dark)")
    for colour, (in_light, in_dark) in COLOURS.items():
        assert f".{colour} {{ color: {in_light} }}" in light
        assert f".{colour} {{ color: {in_dark} }}" in dark
    for element in ET.fromstring(drawn[name]).iter():
        assert element.get("fill") is element.get("stroke") is element.get("style") is None
        if element.tag in (f"{SVG}text", f"{SVG}path"):
            assert set((element.get("class") or "").split()) & set(COLOURS), "else it is black in the dark"


@pytest.mark.parametrize("name", NAMES)
def test_a_plot_needs_nothing_from_elsewhere_and_is_small(drawn: dict[str, str], name: str) -> None:
    assert "href" not in drawn[name]
    assert "url(" not in drawn[name]
    assert "<script" not in drawn[name]
    assert len(drawn[name]) < 40_000


@pytest.mark.parametrize("name", NAMES)
def test_nothing_leaves_the_paper(drawn: dict[str, str], name: str) -> None:
    root = ET.fromstring(drawn[name])
    height = float(root.get("height", "0"))
    for element in root.iter():
        if "x" in element.keys():  # noqa: SIM118  An element isn't a mapping.
            assert 0 <= float(element.get("x", "nan")) <= WIDTH
            assert 0 <= float(element.get("y", "nan")) <= height
        if element.tag == f"{SVG}rect":
            assert float(element.get("x", "0")) + float(element.get("width", "nan")) <= WIDTH


def test_the_same_json_makes_the_same_files(drawn: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(made_up()))
    command = [sys.executable, "-m", "tests.benchmarks.plots", str(path), "--to", str(tmp_path / "plots")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{tmp_path}/plots/{name}.svg" for name in NAMES]
    assert {path.stem: path.read_text(encoding="utf-8") for path in (tmp_path / "plots").iterdir()} == drawn


@pytest.mark.parametrize(
    "name, participants",
    [
        ("calls-shared-core", {*PARTICIPANTS}),
        ("calls-core-each", {*PARTICIPANTS}),
        ("latency", {*PARTICIPANTS}),
        ("growth", {*GROWERS}),
        ("clients", {*CLIENTS}),
        ("memory", {*PARTICIPANTS}),
    ],
)
def test_a_plot_names_who_took_part_and_who_did_not(drawn: dict[str, str], name: str, participants: set[str]) -> None:
    read = texts(drawn[name])
    assert participants == {*SUBJECTS, "grpcio"} & {*read}
    (missing,) = [text for text in read if text.startswith("Not measured here: ")]
    missing_names = set(missing.removeprefix("Not measured here: ").rstrip(".").split(", "))
    assert missing_names == {*PARTICIPANTS, "grpcio"} - participants
    assert "mprpc runs on CPython 3.8.18." in read
    assert any("Medians of 3 rounds, Abacus <4> & sons, Linux 0.0" in text for text in read) == (name != "memory")


def test_gmprpc_comes_first_and_other_protocols_come_last(drawn: dict[str, str]) -> None:
    names = [text for text in texts(drawn["calls-shared-core"]) if text in {*SUBJECTS, "other protocols"}]
    assert names == ["gmprpc", "mprpc", "aio-msgpack-rpc", "aiorpc", "other protocols", "zerorpc", "grpcio-aio", "rpyc"]


def test_who_loses_calls_has_words_in_place_of_a_bar(drawn: dict[str, str]) -> None:
    for name in ("calls-shared-core", "calls-core-each"):
        # Two of them, in the two shapes with calls in flight together.
        assert texts(drawn[name]).count("loses calls") == 4
        bars = [element for element in ET.fromstring(drawn[name]).iter(f"{SVG}rect") if element.get("height") == "12"]
        assert len(bars) == 7 * len(SHAPES) - 4
    assert "loses calls" not in texts(drawn["latency"])


@pytest.mark.parametrize(
    "change, words",
    [
        ({"failure": "it fell over"}, "failed"),
        ({"errors": 1}, "wrong answers"),
        ({"unanswered": 1, "is_complete": False}, "loses calls"),
        ({"lost_connections": 1}, "drops connections"),
        ({"silent_connections": 1}, "starves connections"),
        ({"is_complete": False}, "cut short"),
        ({"calls": 0, "calls_per_second": 0.0}, "answers too late"),
    ],
)
def test_one_bad_round_is_enough_for_words(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    document = made_up()
    bad = next(run for run in document["runs"] if run["subject"] == "rpyc" and run.get("shape") == "50x1")
    bad |= change
    if "failure" in change:
        for key in [key for key in bad if key.endswith(("_us", "_per_second", "calls"))]:
            del bad[key]
    svgs = draw(document, tmp_path)
    assert words in texts(svgs["calls-shared-core"])
    assert words in texts(svgs["latency"])
    assert f"rpyc: {words}" in svgs["latency"]
    assert texts(svgs["calls-core-each"]).count(words) == (4 if words == "loses calls" else 0)


def test_growth_shows_how_far_one_could_get(drawn: dict[str, str]) -> None:
    read = texts(drawn["growth"])
    assert read.count("gevent alone") == read.count("sleep alone") == 1
    assert any("Gevent alone: a loop without greenlets" in text for text in read)
    for name in {*NAMES} - {"growth"}:
        assert not {"gevent alone", "sleep alone", "floor", "bare-sleep", "c-echo"} & {*texts(drawn[name])}


def test_growth_says_who_was_under_another_load(drawn: dict[str, str]) -> None:
    other_loads = [text for text in texts(drawn["growth"]) if text.startswith("At ")]
    assert other_loads == ["At 800 calls in flight mprpc has 800 connections with 1 in flight each."]


def test_what_someone_cannot_do_is_said(drawn: dict[str, str]) -> None:
    assert "mprpc: not supported" in texts(drawn["growth"])
    assert not any("floor" in text for text in texts(drawn["growth"]))
    clients = texts(drawn["clients"])
    assert clients.count("not supported") == clients.count("not measured") == 1


def test_what_is_missing_on_a_line_is_named_and_not_bridged(tmp_path: Path) -> None:
    def is_kept(run: dict[str, Any]) -> bool:
        return run["kind"] == "growth" and run["axis"] == "connections" and run["subject"] == "gmprpc"

    document = made_up()
    document["runs"] = list(filter(is_kept, document["runs"]))
    lines = re.findall(r'class="line series0 thick" d="([^"]*)"', draw(document, tmp_path)["growth"])
    assert [line.count("L") for line in lines] == [3]
    for run in document["runs"]:
        if run["value"] == 10:
            run["lost_connections"] = 3
    svg = draw(document, tmp_path)["growth"]
    lines = re.findall(r'class="line series0 thick" d="([^"]*)"', svg)
    assert [line.count("L") for line in lines] == [0, 1]
    assert "gmprpc: drops connections at 10" in texts(svg)


def test_names_beside_lines_that_end_together_do_not_overlap(tmp_path: Path) -> None:
    document = made_up()
    for run in document["runs"]:
        if run["kind"] == "growth" and "failure" not in run:
            run["calls_per_second"] = 1000.0
    root = ET.fromstring(draw(document, tmp_path)["growth"])
    places: dict[str, list[float]] = {}
    for element in root.iter(f"{SVG}text"):
        if element.text in {*GROWERS, "gevent alone", "sleep alone"}:
            places.setdefault(element.get("x", ""), []).append(float(element.get("y", "nan")))
    assert sum(map(len, places.values())) == 4 * len(GROWERS) - 1 + 2
    for column in places.values():
        ordered = sorted(column)
        assert all(below - above >= 14 for above, below in pairwise(ordered))


def test_a_short_run_admits_that_it_says_nothing(tmp_path: Path) -> None:
    document = made_up()
    document["options"]["is_short"] = True
    for svg in draw(document, tmp_path).values():
        assert any("it says nothing about speed" in text for text in texts(svg))


def test_bars_are_as_long_as_medians_are_large(tmp_path: Path) -> None:
    document = made_up()
    document["runs"] = [
        run("server", name, 1000, shape="1x1", cores=1, connections=1, in_flight=1, payload_bytes=12, round=number)
        | {"calls_per_second": rate}
        for name, rates in {"gmprpc": (50_000, 40_000, 10_000), "mprpc": (20_000, 10_000, 30_000)}.items()
        for number, rate in enumerate(rates)
    ]
    svg = draw(document, tmp_path)["calls-shared-core"]
    bars = [element for element in ET.fromstring(svg).iter(f"{SVG}rect") if element.get("height") == "12"]
    ours, theirs = (float(bar.get("width", "nan")) for bar in bars)
    assert ours == pytest.approx(2 * theirs, abs=0.1)
    assert {"40.0k", "20.0k"} <= {*texts(svg)}
    assert "gmprpc 40.0k, mprpc 20.0k" in svg


@pytest.mark.parametrize(
    "is_kept, expected",
    [
        (lambda run: run["kind"] == "idle", {"memory"}),
        (lambda run: run["kind"] == "client", {"clients"}),
        (lambda run: run["kind"] == "growth", {"growth"}),
        (lambda run: run["kind"] == "growth" and run["axis"] == "blocking" and run["in_flight"] == 16, {"growth"}),
        (lambda run: run["kind"] == "growth" and run["subject"] in LOSERS and run["in_flight"] > 1, set()),
        (lambda run: run["kind"] == "server" and run["cores"] == 2, {"calls-core-each", "latency"}),
        (lambda run: run["kind"] == "server" and run["shape"] == "1x1", {"calls-core-each", "calls-shared-core"}),
        (lambda run: run["subject"] == "mprpc", {*NAMES}),
        (lambda run: run["subject"] == "c-echo", set()),
        (lambda run: False, set()),
    ],
)
def test_a_plot_of_which_nothing_was_measured_is_skipped_by_name(
    is_kept: Callable[[dict[str, Any]], bool], expected: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = made_up()
    document["runs"] = list(filter(is_kept, document["runs"]))
    assert set(draw(document, tmp_path)) == expected
    skipped = [line for line in capsys.readouterr().out.splitlines() if "isn't drawn: nothing was measured" in line]
    assert {Path(line.split()[0]).stem for line in skipped} == {*NAMES} - expected


def test_a_plot_that_is_skipped_leaves_an_older_one_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = made_up()
    before = draw(document, tmp_path)
    document["runs"] = [run for run in document["runs"] if run["kind"] != "idle"]
    assert draw(document, tmp_path) == before
    assert "memory.svg isn't drawn: nothing was measured for it; the older one stays" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content, complaint",
    [
        (None, "can't read"),
        ("{", "can't read"),
        ("[]", "isn't what `python -m tests.benchmarks` writes"),
        (
            '{"machine": {}, "options": {}, "runs": []}',
            "isn't what `python -m tests.benchmarks` writes: KeyError('subjects')",
        ),
    ],
)
def test_a_file_that_no_benchmark_wrote_is_an_error(
    content: str | None, complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bench.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit) as exit_:
        plots.main([str(path), "--to", str(tmp_path / "plots")])
    assert exit_.value.code == 2
    error = " ".join(capsys.readouterr().err.split())
    assert complaint in error
    assert str(path) in error
    assert not (tmp_path / "plots").exists()


def test_a_directory_that_cannot_be_made_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(made_up()))
    with pytest.raises(SystemExit) as exit_:
        plots.main([str(path), "--to", str(path)])
    assert exit_.value.code == 2
    assert "--to: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "value, words",
    [(0.5, "0.500"), (14.06, "14.1"), (950, "950"), (999.7, "1.00k"), (57_234, "57.2k"), (1_280_000, "1.28M")],
)
def test_a_figure_has_three_digits(value: float, words: str) -> None:
    assert short(value) == words


def test_units_are_those_that_people_use() -> None:
    assert [microseconds(value) for value in (42, 996, 213_000, 1.5e6)] == ["42.0 µs", "996 µs", "213 ms", "1.50 s"]
    assert [in_bytes(size) for size in (10, 1000, 1024, 10 << 20)] == ["10 B", "1,000 B", "1 KiB", "10 MiB"]


@pytest.mark.parametrize("values", [[1.0], [0.03, 2000], [97_000, 103_000], [10, 100], [5, 5000]])
def test_a_logarithmic_scale_holds_its_values_between_ticks(values: list[float]) -> None:
    scale = LogScale.over(values, 0, 100)
    ticks = scale.ticks()
    assert 3 <= len(ticks) <= 8
    assert scale.high / scale.low >= 9.99
    assert all(0 <= round(scale(value), 6) <= 100 for value in [*values, *ticks])
    assert scale(scale.low) == 0
    assert scale(scale.high) == 100
