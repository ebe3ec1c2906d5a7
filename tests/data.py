"""Test data beside the checkout: real sequencing data that is used from there and never copied in."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


def shared(*parts: str) -> Path:
    """Return a path of the shared test data; skip the test where it is absent, fail where CI must have it."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        reason = f"shared test data {'/'.join(parts)} is not beside the checkout"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return path
