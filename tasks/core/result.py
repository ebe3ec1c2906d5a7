"""What a run folder holds in the end."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedRun:
    """What a run folder holds in the end; small, and told to people."""

    out: str
    #: Folders of the runs, relative to `out`.
    folders: tuple[str, ...]
    reads: int
    called: int
    skipped: int
    quarantined: int
    #: FASTQ records, and those that pass.
    records: int
    passed: int
    bases: int
    files: int
    files_not_whole: int

    @property
    def flawless(self) -> bool:
        """Whether every read of every file was called."""
        return not (self.skipped or self.quarantined or self.files_not_whole)
