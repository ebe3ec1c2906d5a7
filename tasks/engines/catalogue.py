"""Models by name: the bundled ones, or a folder with a description of the same form."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from tasks.core.chemistry import Fits
from tasks.core.errors import SettingsError
from tasks.settings import checked, read_toml

BUNDLED = Path(__file__).parent / "models"
#: What the embedded engine calls with unless told otherwise.
DEFAULT = "minnow-v0"


class _Fits(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    molecule: str
    pores: tuple[str, ...]
    speeds: tuple[int, ...]
    sample_rates: tuple[int, ...]


class _Description(BaseModel):
    """A model's TOML file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    weights: str
    min_qscore: float
    stride: int
    sample_rate: int
    samples_per_second: float
    fits: _Fits


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model that is there to be loaded."""

    name: str
    weights: Path
    #: sha256 of the weights, hex.
    digest: str
    #: Mean qscore from which a read passes unless the settings say otherwise.
    min_qscore: float
    #: Samples per output frame, at `sample_rate`.
    stride: int
    #: Hz of the signal the model takes.
    sample_rate: int
    #: A rough figure per CPU core, for estimates.
    samples_per_second: float
    fits: Fits


@lru_cache(maxsize=8)
def find_model(name: str | None) -> Model:
    """Look up a model by the name of a bundled one, or by the path of its `*.toml` or of the folder with only that one.

    None is the default model.

    Raises:
        SettingsError: there is no such model; names those there are.
    """
    name = name or DEFAULT
    description = BUNDLED / f"{name}.toml"
    folder = Path(name)
    if folder.suffix == ".toml" and folder.is_file():
        description = folder
    elif not description.is_file():
        found = sorted(folder.glob("*.toml")) if folder.is_dir() else []
        if len(found) != 1:
            bundled = ", ".join(sorted(path.stem for path in BUNDLED.glob("*.toml")))
            raise SettingsError(
                f"engine.model: {name!r} is no bundled model ({bundled}), "
                "and no folder with one *.toml that describes a model"
            )
        description = found[0]
    described: _Description = checked(_Description, read_toml(description))
    weights = description.parent / described.weights
    try:
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    except OSError as error:
        raise SettingsError(f"{description}: weights {str(weights)!r} can't be read: {error.strerror}") from error
    return Model(
        name=described.name,
        weights=weights,
        digest=digest,
        min_qscore=described.min_qscore,
        stride=described.stride,
        sample_rate=described.sample_rate,
        samples_per_second=described.samples_per_second,
        fits=Fits(**described.fits.model_dump()),
    )
