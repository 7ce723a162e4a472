"""What the tests with real peers share: a peer that isn't installed is skipped by name, or must be there."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture(scope="session")
def require_peer() -> Callable[[str, Any], None]:
    """``require_peer(name, found)`` skips the test unless ``found``; with GMPRPC_REQUIRE_INTEROP set it fails."""

    def require_peer(name: str, found: Any) -> None:
        if not found and os.environ.get("GMPRPC_REQUIRE_INTEROP"):
            pytest.fail(f"{name} isn't installed, and GMPRPC_REQUIRE_INTEROP is set")
        elif not found:
            pytest.skip(f"{name} isn't installed")

    return require_peer
