"""What tests need and a machine may lack: test data beside the checkout, programs, libraries that need a compiler."""

from __future__ import annotations

import importlib
import os
import shutil
from pathlib import Path
from typing import Any, NoReturn

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


def shared(*parts: str) -> Path:
    """Return a path of the shared test data: real sequencing data that is used from there and never copied in."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        missing(f"shared test data {'/'.join(parts)} is not beside the checkout")
    return path


def program(name: str) -> str:
    """Return the path of a program of the machine."""
    return shutil.which(name) or missing(f"there is no program {name} here")


def library(name: str) -> Any:
    """Import a library that not every machine can install."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        missing(f"the library {name} is not installed: {error}")


def missing(reason: str) -> NoReturn:
    """Skip the test; fail it where CI must have everything."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)
