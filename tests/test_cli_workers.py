"""`gmprpc serve --workers`, as far as it goes without gunicorn; what it does with it is tested in tests/production."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from .commands import ANY_PORT, assert_fails, assert_misused, run
from .programs import DEADLINE

#: `gmprpc`, in an environment without gunicorn.
WITHOUT_GUNICORN = "import sys; sys.modules['gunicorn'] = None; from gmprpc.cli import main; main()"


def test_without_gunicorn_is_said_in_one_line() -> None:
    command = [sys.executable, "-c", WITHOUT_GUNICORN, "serve", "--workers", "2", "-b", ANY_PORT]
    process = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=DEADLINE, check=False)
    assert_fails(process, 3, "--workers needs gunicorn", "pip install 'gmprpc[gunicorn]'")


@pytest.mark.parametrize("number", ["0", "-1", "two"])
def test_a_number_of_workers_that_is_none_is_misuse(number: str) -> None:
    assert_misused(run("serve", "--workers", number, "-b", ANY_PORT), "--workers")


def test_standard_input_has_no_workers() -> None:
    assert_misused(run("serve", "--stdio", "--workers", "2"), "--stdio", "there can be no --workers")


def test_standard_input_is_served_without_those_of_the_environment() -> None:
    process = run("serve", "--stdio", env={**os.environ, "GMPRPC_WORKERS": "2"})
    assert (process.returncode, process.stderr) == (0, "")


def test_what_is_no_application_is_misuse_before_there_are_workers() -> None:
    assert_fails(run("serve", "--workers", "2", "-b", ANY_PORT, "app.py"), 2, "names a file")
