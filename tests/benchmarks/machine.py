"""Where this runs, and on what: the conditions without which no figure says anything."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """The machine, as the JSON has it."""
    processor = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
        if line.startswith("model name"):
            processor = line.partition(":")[2].strip()
            break
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        # What a builder of kernels has added to the version says nothing to others.
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
        "load_average_before": round(os.getloadavg()[0], 2),
    }


def own_versions() -> dict[str, str]:
    """The interpreter that runs this, and what gmprpc is made of there."""
    packages = ("gmprpc", "gevent", "greenlet", "msgpack")
    return {platform.python_implementation(): platform.python_version()} | {
        package: importlib.metadata.version(package) for package in packages
    }


def machine_line(machine: Mapping[str, Any]) -> str:
    """The machine in a line."""
    return (
        f"{machine['processor']}, {machine['cores']} cores, {machine['system']}; "
        f"load average before: {machine['load_average_before']}"
    )


def versions_line(versions: Mapping[str, str]) -> str:
    """The versions in a line."""
    return ", ".join(f"{name} {version}" for name, version in versions.items())
