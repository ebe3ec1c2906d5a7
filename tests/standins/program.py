"""Installs the stand-in for ONT's `dorado`, which is under a licence of its own and needs a GPU."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

HERE = Path(__file__).parent
VERSION = "1.4.0+standin"


def install(folder: Path, name: str = "dorado") -> Path:
    """Put a stand-in into a folder, so that it runs on our Python with our packages; return its path.

    Its shell answers for its version, which each engine asks for: what the stand-in imports takes a second.
    """
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / name
    path = shlex.quote(str(HERE.parents[1]))
    program.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo {VERSION} && exit\n'
        f'PYTHONPATH={path} exec {shlex.quote(sys.executable)} {shlex.quote(str(HERE / name))} "$@"\n'
    )
    program.chmod(0o755)
    return program
