"""Stand-ins for ONT's programs and library, for tests alone.

`pybasecall_client_lib` here has the published names, signatures and return codes of the real client class (a test
compares them), `dorado_basecall_server` plays the server. Between them they speak a protocol of their own that has
nothing to do with ONT's.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
SERVER = FOLDER / "dorado_basecall_server"
#: Environment variable: a folder with `control.json`, the faults that the server is to show.
CONTROL = "DORADO_STANDIN_CONTROL"
MODEL = "dna_r10.4.1_e8.2_400bps_hac@v4.1.0"


def control(folder: Path, **faults: Any) -> Path:
    """Tell servers that look at this folder what to do wrong, from now on. Each `once` fault is shown once."""
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / "control.new"
    new.write_text(json.dumps(faults))
    new.replace(folder / "control.json")
    return folder


def environment(folder: Path) -> dict[str, str]:
    """Return the environment in which the stand-in is imported and obeys a folder."""
    return {
        **os.environ,
        "PYTHONPATH": f"{FOLDER}{os.pathsep}{FOLDER.parents[1]}",
        # The server is a script that asks for python3: ours, with what it imports.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        CONTROL: str(folder),
    }


@contextmanager
def imported() -> Iterator[None]:
    """Make `import pybasecall_client_lib` find the stand-in in this process, and the real one again afterwards."""
    real = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "pybasecall_client_lib"}
    for name in real:
        del sys.modules[name]
    sys.path.insert(0, str(FOLDER))
    try:
        yield
    finally:
        sys.path.remove(str(FOLDER))
        for name in [name for name in sys.modules if name.split(".")[0] == "pybasecall_client_lib"]:
            del sys.modules[name]
        sys.modules.update(real)
