"""The command `shoal`.

A module of its own, for processes that multiprocessing starts import a command's first module once more: Dask's workers
would each spend a second of CPU on a command line that they don't have.
"""

from __future__ import annotations

from typing import NoReturn


def main() -> NoReturn:
    """Run the command line."""
    from deployments import cli

    cli.main()
