"""Models by name: the bundled ones, or a folder with a description of the same form."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from tasks.core.chemistry import Fits
from tasks.core.dorado import default_min_qscore, fits_of
from tasks.core.errors import SettingsError
from tasks.engines import bonito
from tasks.engines.torch_weights import find_weights
from tasks.settings import checked, read_toml

BUNDLED = Path(__file__).parent / "models"
#: What the embedded engine calls with unless told otherwise.
DEFAULT = "minnow-v6"
#: Samples per CPU second of a hac model in fp32 (tests/benchmarks/speed.py: 19,500 with AVX2, 28,600 with AVX512), and
#: the size of its weights: others cost about as much more as they have more of them.
_HAC_RATE, _HAC_BYTES = 25_000, 25_700_000


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
    qscore: tuple[float, float] = (1.0, 0.0)
    quality: str = ""
    fits: _Fits


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model that is there to be loaded."""

    name: str
    #: `ctc`: an ONNX file with CTC output; `crf`: a model directory of ONT's.
    form: Literal["ctc", "crf"] = "ctc"
    #: The file, or the directory.
    weights: Path
    #: sha256 of the weights, hex.
    digest: str
    #: Mean qscore from which a read passes unless the settings say otherwise.
    min_qscore: float
    #: Samples per output frame, at `sample_rate`.
    stride: int
    #: Hz of the signal the model takes; other rates are resampled to it. None: signal is taken as it is.
    sample_rate: int | None
    #: A rough figure per CPU core, for estimates.
    samples_per_second: float
    #: Phred score of a base from the network's own error estimate: slope and offset of a line.
    qscore: tuple[float, float] = (1.0, 0.0)
    #: How signal is scaled (`tasks.engines.cpu.middle_and_spread`).
    scaling: tuple[str, tuple[float, ...]] = ("quantile", (0.2, 0.9, 0.51, 0.53))
    #: Score of staying in a state, of a CRF.
    stay: float = 0.0
    #: What may be expected of its calls, in words.
    quality: str = ""
    fits: Fits

    @property
    def bytes(self) -> int:
        """Size of the weights."""
        files = self.weights.iterdir() if self.weights.is_dir() else [self.weights]
        return sum(file.stat().st_size for file in files)


@lru_cache(maxsize=8)
def find_model(name: str | None) -> Model:
    """Look up a model by the name of a bundled one, or by the path of its `*.toml` or of the folder with only that one.

    A folder may also be a model directory of ONT's (config.toml and weights). None is the default model.

    Raises:
        SettingsError: there is no such model; names those there are.
    """
    name = name or DEFAULT
    description = BUNDLED / f"{name}.toml"
    folder = Path(name)
    if folder.suffix == ".toml" and folder.is_file():
        description = folder
    elif bonito.is_model_directory(folder):
        return _model_directory(folder)
    elif not description.is_file():
        found = sorted(folder.glob("*.toml")) if folder.is_dir() else []
        if len(found) != 1:
            bundled = ", ".join(sorted(path.stem for path in BUNDLED.glob("*.toml")))
            raise SettingsError(
                f"engine.model: {name!r} is no bundled model ({bundled}), no model directory of ONT's (config.toml and "
                "weights), and no folder with one *.toml that describes a model"
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
        qscore=described.qscore,
        quality=described.quality,
        fits=Fits(**described.fits.model_dump()),
    )


def list_models(folders: Sequence[Path]) -> list[Model | SettingsError]:
    """Return the bundled models and those found in folders and their subfolders; what can't be used, as its error.

    Raises:
        SettingsError: a folder is not there.
    """
    places = sorted(BUNDLED.glob("*.toml"))
    for folder in folders:
        if not folder.is_dir():
            raise SettingsError(f"{str(folder)!r} is no folder")
        inside = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]
        places += [path for path in inside if bonito.is_model_directory(path)]
    found: list[Model | SettingsError] = []
    for place in places:
        try:
            found.append(find_model(str(place)))
        except SettingsError as error:
            found.append(error)
    return found


def _model_directory(folder: Path) -> Model:
    """Describe a model directory of ONT's; its name tells its chemistry."""
    configuration = bonito.read_configuration(folder)
    weights = find_weights(folder)
    if find_spec("onnx") is None:
        raise SettingsError(f"engine.model: {folder} needs the package onnx: pip install 'shoal[models]'")
    name = folder.resolve().name
    fits = fits_of(name)
    if fits is None:
        raise SettingsError(
            f"engine.model: the name of the model directory {name!r} does not tell its chemistry; name it as ONT does, "
            "e.g. dna_r10.4.1_e8.2_400bps_hac@v4.2.0"
        )
    if fits.molecule != "dna":
        raise SettingsError(f"engine.model: {name} calls RNA, which the cpu engine can't; {bonito.WAY_OUT}")
    if configuration.sample_rate is None and fits.sample_rates == (4000,) and fits.pores == ("R10.4.1",):
        # Measured: models of 4 kHz call 5 kHz signal best as it is, not resampled. Of R9.4.1 there is none.
        fits = replace(fits, sample_rates=(4000, 5000))
    return Model(
        name=name,
        form="crf",
        weights=folder,
        digest=bonito.directory_digest(folder),
        min_qscore=default_min_qscore(name),
        stride=configuration.stride,
        sample_rate=None,
        samples_per_second=_HAC_RATE * _HAC_BYTES / max(sum(file.stat().st_size for file in weights), 1),
        qscore=configuration.qscore,
        scaling=configuration.scaling,
        stay=configuration.stay,
        quality="a model of ONT's, under ONT's licence",
        fits=fits,
    )
