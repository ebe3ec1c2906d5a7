"""Run a stage in this process, and die as by kill -9 just before the n-th change to the file system's names.

python -m tests.crash STAGE N SETTINGS.json; exit status 9 when it died, 0 when the stage made fewer changes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tasks.launch import launch
from tasks.merge import merge
from tasks.settings import RunSettings

STAGES: dict[str, Callable[[RunSettings], object]] = {"launch": launch, "merge": merge}
CHANGES = ("rename", "replace", "link", "unlink", "mkdir", "fsync")


def main(stage: str, deadly: int, settings: RunSettings) -> None:
    """Count the changes, and die at the deadly one."""
    left = deadly

    def counted(change: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                os._exit(9)
            return change(*arguments, **named)

        return wrapped

    for name in CHANGES:
        setattr(os, name, counted(getattr(os, name)))
    STAGES[stage](settings)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), RunSettings.model_validate_json(Path(sys.argv[3]).read_text()))
