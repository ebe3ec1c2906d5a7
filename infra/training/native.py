"""What is written in C, compiled on first use into the training's own folder."""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy.typing as npt

_SOURCES = ("ctc.c", "segment.c")
#: As -ffast-math, but for what that would do to the floating point of the whole process.
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math")


@cache
def library() -> ctypes.CDLL:
    """Return the library with `ctc` and `segment`."""
    folder = Path(__file__).parent
    sources = [folder / name for name in _SOURCES]
    built = folder / "libtraining.so"
    if not built.exists() or built.stat().st_mtime < max(source.stat().st_mtime for source in sources):
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            new = Path(scratch) / "new.so"
            compiler = os.environ.get("CC", "cc")
            subprocess.run([compiler, *_FLAGS, "-shared", "-fPIC", *sources, "-o", new, "-lm"], check=True)
            new.replace(built)
    return ctypes.CDLL(str(built))


def pointer(array: npt.NDArray[Any]) -> ctypes.c_void_p:
    """Point to an array's values."""
    return array.ctypes.data_as(ctypes.c_void_p)
