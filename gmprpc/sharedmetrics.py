"""The metrics of several processes that are one service, as prometheus_client's multiprocess mode has them: in files.

Each process writes its own numbers into files of its own, in the directory that ``PROMETHEUS_MULTIPROC_DIR`` names, and
whoever is asked reads them all. This module looks after the files; it knows no server.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections import Counter as Sums
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from prometheus_client import mmap_dict, multiprocess, values
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

# Their methods have no annotations.
_MultiProcessCollector: Any = multiprocess.MultiProcessCollector
_MmapedDict: Any = mmap_dict.MmapedDict

#: Names the directory; it has to be set before anything imports prometheus_client.
VARIABLE: Final = "PROMETHEUS_MULTIPROC_DIR"

# counter_17.db, gauge_livesum_17.db: what is in it, and the process that writes it.
_FILE = re.compile(r"(?P<kind>counter|histogram|summary|gauge_live\w+)_(?P<pid>[1-9]\d{0,6})\.db")
# What processes have counted that have ended is summed up in the file of this one, which there isn't.
_PAST = 0
_LOCK = "gmprpc.lock"
# That of gauges: the sum of what they are in the processes that live.
_MODE = "livesum"


def shared_directory() -> Path | None:
    """The directory in which the processes of this service have their metrics; None if there is only one process."""
    path = os.environ.get(VARIABLE)
    return Path(path) if path else None


class SharedCollector:
    """What all processes together tell, for a registry of prometheus_client."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def collect(self) -> Iterable[Metric]:
        """The metrics; called by the registry."""
        tidy_up(self._directory)
        with _locked(self._directory, fcntl.LOCK_SH):
            return list(_merged(self._directory, "*.db"))


class Relay:
    """Copies what ``collector`` tells of this process to where the others can read it.

    To write each number there as it changes would take long. So what a process has counted since it was copied last is
    lost if it is killed.
    """

    def __init__(self, collector: Collector) -> None:
        self._collector = collector
        self._copies: dict[tuple[str, ...], Any] = {}
        self._counted: dict[tuple[str, ...], float] = {}

    def refresh(self) -> None:
        """Bring the copies up to date."""
        for metric in self._collector.collect():
            below = 0.0
            for name, labels, value, *_ in metric.samples:
                if metric.type == "gauge":
                    self._copy_of(metric, name, labels).set(value)
                elif name.endswith("_bucket"):
                    self._count(metric, name, labels, value - below)  # There each has only its own.
                    below = value
                elif metric.type == "histogram" and name.endswith("_count"):
                    below = 0.0  # The sum of the buckets. The next ones have other labels.
                else:
                    self._count(metric, name, labels, value)

    def _count(self, metric: Metric, name: str, labels: dict[str, str], value: float) -> None:
        key = (name, *labels.values())
        copy = self._copy_of(metric, name, labels)  # Also of 0: a histogram needs all of its buckets.
        # Never less than nothing: threads may lose a count between them, and others take it for a new beginning.
        if (more := value - self._counted.get(key, 0)) > 0:
            copy.inc(more)
            self._counted[key] = value

    def _copy_of(self, metric: Metric, name: str, labels: dict[str, str]) -> Any:
        key = (name, *labels.values())
        if (copy := self._copies.get(key)) is None:
            # What the metrics of prometheus_client have their values in.
            copy = self._copies[key] = values.ValueClass(
                metric.type,
                metric.name,
                name,
                [*labels],
                [*labels.values()],
                metric.documentation,
                multiprocess_mode=_MODE,
            )
        return copy


def sum_of_live(directory: Path, name: str) -> float:
    """What the gauge ``name``, of the mode ``livesum`` and without labels, is in all processes that live."""
    tidy_up(directory)
    with _locked(directory, fcntl.LOCK_SH):
        metrics = _merged(directory, f"gauge_{_MODE}_*.db")
    return sum(sample.value for metric in metrics if metric.name == name for sample in metric.samples)


def _merged(directory: Path, pattern: str) -> Iterable[Metric]:
    metrics: Iterable[Metric] = _MultiProcessCollector.merge(map(str, _begun(directory.glob(pattern))))
    return metrics


def _begun(files: Iterable[Path]) -> Iterator[Path]:
    """Those of ``files`` that can be read: prometheus_client makes one, and only then gives it a size."""
    for file in files:
        with suppress(FileNotFoundError):
            if file.stat().st_size:
                yield file


def tidy_up(directory: Path) -> None:
    """Forget what processes that have ended are doing, and keep what they have done in one file of each kind.

    Whatever ended them: gunicorn tells when a worker has ended, but not who starts the next gunicorn. And without this
    each worker that there ever was would leave its files, to be read whenever the metrics are asked for.
    """
    if not _left_behind(directory):
        return
    with _locked(directory, fcntl.LOCK_EX):
        by_kind: dict[str, list[Path]] = {}
        for kind, file in _left_behind(directory):  # Anew: another process may have been quicker.
            by_kind.setdefault(kind, []).append(file)
        for kind, files in by_kind.items():
            if not kind.startswith("gauge_"):
                _add_to_past(directory / f"{kind}_{_PAST}.db", files)
            for file in files:
                file.unlink(missing_ok=True)


def _left_behind(directory: Path) -> list[tuple[str, Path]]:
    found = []
    for file in directory.iterdir():
        if (match := _FILE.fullmatch(file.name)) and not _is_alive(int(match["pid"])):
            found.append((match["kind"], file))
    return found


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _add_to_past(past: Path, files: Iterable[Path]) -> None:
    sums: Sums[str] = Sums()
    for file in _begun([past, *files]):
        with suppress(FileNotFoundError):
            for key, value, *_ in _MmapedDict.read_all_values_from_file(str(file)):
                sums[key] += value
    new = past.with_suffix(".new")
    new.unlink(missing_ok=True)
    written = _MmapedDict(str(new))
    for key, value in sums.items():
        written.write_value(key, value, 0.0)
    written.close()
    new.replace(past)


@contextmanager
def _locked(directory: Path, mode: int) -> Iterator[None]:
    """Hold off who wants to change what is read, or to read what is changed."""
    with open(directory / _LOCK, "ab") as file:
        fcntl.flock(file, mode)  # Blocks the hub, for the time that others need for a few small files.
        yield
