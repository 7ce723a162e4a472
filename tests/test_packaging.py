"""What pyproject.toml promises about dependencies is what gets tested."""

from __future__ import annotations

import configparser
import os
import re
import tomllib
from importlib.metadata import version
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def lower_bounds() -> dict[str, str]:
    """The lowest version that pyproject.toml allows of each dependency, those of the extras among them."""
    bounds = {}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in [*project["dependencies"], *chain(*project["optional-dependencies"].values())]:
        match = re.fullmatch(r"([\w.-]+)>=([\d.]+)", requirement)
        assert match, f"{requirement!r} is not a plain lower bound"
        bounds[match[1]] = match[2]
    return bounds


def test_lowest_environment_pins_the_lower_bounds() -> None:
    tox = configparser.RawConfigParser()
    tox.read(ROOT / "tox.ini")
    pins = dict(line.split("==") for line in tox["testenv:lowest"]["deps"].split())
    # That of the tests would bring a newer API with it.
    assert pins.pop("opentelemetry-sdk") == pins["opentelemetry-api"]
    assert pins == lower_bounds(), "tox.ini's [testenv:lowest] and pyproject.toml's dependencies have drifted apart"


@pytest.mark.skipif(os.environ.get("TOX_ENV_NAME") != "lowest", reason="for `tox -e lowest`")
def test_lowest_environment_runs_on_the_lower_bounds() -> None:
    assert {name: version(name) for name in lower_bounds()} == lower_bounds()
