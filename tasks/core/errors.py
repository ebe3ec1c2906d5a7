"""What can go wrong, by who can help.

ShoalError
├── SettingsError        the person: a setting, a site or a model does not fit; exit status 2
│   └── ChemistryError   the person: a run's chemistry is not the model's
├── InputError           nobody now: a file or read can't be read; it alone is left out
├── EngineError          another try: the engine broke, its reads may still be called
│   └── WorkerError      another worker, if it goes on: tells which one it was
├── SupersededError      nobody: another attempt has committed this batch, ours is dropped
├── StoppedError         the next run: somebody stopped this one
└── LedgerError          the next run: reads are missing or doubled, the run is incomplete

Every class passes all its arguments to `super().__init__`, so that errors survive the pickling between Dask processes.
"""

from __future__ import annotations


class ShoalError(Exception):
    """Anything Shoal raises on purpose; its message says what, which, and what to do next."""


class SettingsError(ShoalError):
    """A setting is wrong, and only a person can choose another."""


class ChemistryError(SettingsError):
    """A run was sequenced with a chemistry that the model was not made for."""


class InputError(ShoalError):
    """An input file can't be used.

    `reason` is a short fixed word for tables (`truncated`, `not_pod5`, …), the message is for people.
    """

    def __init__(self, path: str, reason: str, message: str) -> None:
        super().__init__(path, reason, message)
        self.path = path
        self.reason = reason
        self.message = message

    def __str__(self) -> str:
        return f"{self.path}: {self.message}"


class EngineError(ShoalError):
    """The engine broke; the reads in flight have no answer, and another attempt may give one."""


class WorkerError(EngineError):
    """A bundle failed on a worker."""

    def __init__(self, message: str, worker: str, host: str) -> None:
        super().__init__(message, worker, host)
        self.message = message
        self.worker = worker
        self.host = host

    def __str__(self) -> str:
        return f"{self.message} (worker {self.worker} on {self.host})"


class SupersededError(ShoalError):
    """Another attempt committed this batch first; this one was dropped."""

    def __init__(self, batch_id: str) -> None:
        super().__init__(batch_id)
        self.batch_id = batch_id

    def __str__(self) -> str:
        return f"batch {self.batch_id} was committed by another attempt; this one is dropped"


class LedgerError(ShoalError):
    """The ledger does not prove that every input read has one fate."""


class StoppedError(ShoalError):
    """Somebody stopped the run; what is committed stays, and the same command goes on."""
