"""What a person can choose for a run: the fields of the command line, of settings files and of the Prefect form."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from tasks.core.errors import SettingsError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

#: Environment variables with this prefix set fields; `__` goes one level down: SHOAL_ENGINE__KIND=null.
ENVIRONMENT_PREFIX = "SHOAL_"
#: Names the site to whose roots the paths of all runs are confined.
CONFINED_TO = "SHOAL_CONFINED_TO"
#: Variables that are not of a run's settings.
NOT_FIELDS = frozenset({CONFINED_TO, "SHOAL_DATABASE"})


def _separated(value: object) -> object:
    return tuple(filter(None, map(str.strip, value.split(",")))) if isinstance(value, str) else value


def _in_capitals(value: object) -> object:
    return value.upper() if isinstance(value, str) else value


def nameable(path: Path) -> Path:
    """Return a path from the root on; refuse one that neither tables nor messages can hold."""
    whole = path.absolute()
    try:
        str(whole).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{str(whole)!a} is not UTF-8; rename it, or give another") from None
    return whole


def _there(value: Path) -> Path:
    whole = nameable(value)
    if not value.is_file():
        raise ValueError(f"{value} is not there")
    return whole


def whole_path(value: str) -> str:
    """Return a site's name as it is, and its file's path from the root on."""
    return str(Path(value).absolute()) if value.endswith(".toml") else value


#: Several words; the command line and the environment give them separated by commas.
Words = Annotated[tuple[str, ...], BeforeValidator(_separated)]
#: A file that is there.
File = Annotated[Path, AfterValidator(_there)]

#: A site by its name, or by its file: runs start elsewhere, too, and from there it has the same path.
SiteName = Annotated[str, AfterValidator(whole_path)]

#: Fields of the engine that change nothing but its speed, and those of the output that split writes by; see `decisive`.
NOT_DECISIVE = frozenset({"threads", "rate", "in_flight_samples"})
DECISIVE_OUTPUT = ("min_qscore", "headers", "reference", "sample_sheet", "rna_as_dna")

LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR"]
LOG_LEVELS: tuple[str, ...] = get_args(LogLevel)

#: Engines that hold one of ONT's programs; what only they can do is refused by the others.
DORADO = ("dorado-server", "dorado")


class EngineSettings(BaseModel):
    """What calls the reads."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["cpu", "null", "scrappie", "dorado-server", "dorado"] = Field(
        "cpu",
        title="Engine",
        description="cpu calls real bases on any CPU; dorado-server holds clients of ONT's basecall server; dorado "
        "runs ONT's stand-alone program; scrappie calls R9.4.1 on any CPU; null makes up bases, for rehearsals",
    )
    model: str | None = Field(
        None,
        title="Model",
        min_length=1,
        description="cpu: name of a bundled model, or path of a model directory; dorado: fast, hac, sup, a model's "
        "name or path; dorado-server: a model or config that the server has, or a set simplex|mods|duplex; none: the "
        "engine's own default",
    )
    threads: int = Field(1, title="Threads of the engine per worker", ge=1, le=256)
    chemistry: (
        Literal["dna_r10.4.1_400bps", "dna_r10.4.1_260bps", "dna_r9.4.1_450bps", "rna004_130bps", "rna002_70bps"] | None
    ) = Field(
        None,
        title="Chemistry of runs that do not tell",
        description="what a run is taken for whose metadata names neither flow cell nor kit; none: it is refused",
    )
    int8: bool = Field(
        False,
        title="Calculate in 8 bits",
        description="a model directory of ONT's on the cpu engine: twice as fast where the CPU has VNNI",
    )
    rate: float | None = Field(
        None, title="Rate of the null engine, samples/s", gt=0, description="none: it answers at once"
    )
    in_flight_samples: int = Field(
        40_000_000,
        title="Reads in flight, samples",
        ge=1_000_000,
        le=2_000_000_000,
        description="bounds memory; must be several times the GPU's batch",
    )
    modified_bases: Words = Field(
        (), title="Modified-base models", description="e.g. 5mCG_5hmCG, 6mA; separated by commas; dorado engines only"
    )
    moves: bool = Field(False, title="Write the move table", description="tag mv in BAM")
    trim: Literal["all", "adapters", "none"] = Field(
        "all",
        title="Trim",
        description="adapters and primers, adapters alone, or nothing; engines other than dorado's know one adapter, "
        "that of ligation kits",
    )
    barcode_kits: Words = Field(
        (), title="Barcode kits", description="e.g. SQK-NBD114-24; separated by commas; dorado engines only"
    )
    barcodes: Words = Field((), title="Barcodes in use", description="e.g. barcode01,barcode07; none: all of the kit")
    barcode_both_ends: bool = Field(False, title="Require the barcode at both ends")
    barcode_trim: bool = Field(True, title="Trim barcodes")
    poly_a: bool = Field(False, title="Estimate poly-A tails", description="dorado engines only")
    poly_a_config: File | None = Field(None, title="Poly-A configuration", description="TOML file, as dorado takes it")
    bed: File | None = Field(
        None, title="BED file", description="counts alignments that overlap its regions; needs output.reference"
    )
    duplex: bool = Field(
        False, title="Duplex", description="pair template and complement reads by channel; dorado engines only"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> EngineSettings:
        if self.kind not in DORADO:
            given = ("modified_bases", "barcode_kits", "poly_a", "bed", "duplex")
            for name in given:
                if getattr(self, name):
                    raise ValueError(f"{name}: the {self.kind} engine can't; {' and '.join(DORADO)} can")
        for name in ("barcodes", "barcode_both_ends"):
            if getattr(self, name) and not self.barcode_kits:
                raise ValueError(f"{name}: needs barcode_kits")
        if self.poly_a_config and not self.poly_a:
            raise ValueError("poly_a_config: needs poly_a")
        return self


def _staged(formats: Iterable[str]) -> tuple[Literal["fastq", "bam"], ...]:
    kinds: tuple[Literal["fastq", "bam"], ...] = ("fastq", "bam")
    wanted = {"fastq" if kind == "fastq" else "bam" for kind in formats}
    return tuple(kind for kind in kinds if kind in wanted)


class OutputSettings(BaseModel):
    """What is written."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_qscore: float | None = Field(
        None, title="Minimum mean qscore to pass, Phred", ge=0, le=60, description="none: the model's own default"
    )
    headers: Literal["minknow", "dorado"] = Field("minknow", title="FASTQ headers as written by")
    summary: Literal["minknow-1.1", "dorado-1.4"] = Field("minknow-1.1", title="Columns of the sequencing summary")
    files: Literal["many", "one"] = Field(
        "many", title="Files per folder", description="many: one per batch, linked; one: joined, not recompressed"
    )
    formats: Annotated[tuple[Literal["fastq", "bam", "sam", "cram"], ...], BeforeValidator(_separated)] = Field(
        ("fastq",), title="Formats", min_length=1, description="any of fastq, bam, sam, cram, separated by commas"
    )
    reference: File | None = Field(
        None, title="Reference", description="FASTA that the reads are aligned to; for aligned BAM, and for CRAM"
    )
    sample_sheet: File | None = Field(
        None, title="Sample sheet", description="MinKNOW's CSV; gives barcodes their aliases"
    )
    barcoding_summary: bool = Field(
        False, title="Write barcoding_summary", description="a table of barcode scores beside the sequencing summary"
    )
    rna_as_dna: bool = Field(False, title="Write T for U in FASTQ", description="BAM has T for U always")

    @model_validator(mode="after")
    def _cram_has_a_reference(self) -> OutputSettings:
        if "cram" in self.formats and self.reference is None:
            raise ValueError("cram needs output.reference, the FASTA file to compress against")
        return self

    @property
    def staged(self) -> tuple[Literal["fastq", "bam"], ...]:
        """What split writes: SAM and CRAM are made of BAM by merge."""
        return _staged(self.formats)


class RunSettings(BaseModel):
    """One `shoal run`: input, output, and how."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    input: tuple[Path, ...] = Field(
        title="Input",
        min_length=1,
        description="folders (searched for *.pod5, recursively), POD5 files, and lists of them (*.txt)",
    )
    out: Path = Field(title="Output folder", description="the run folder; a run that was cut off goes on from it")
    site: SiteName = Field("local", title="Site", description="name of a bundled site, or path of a site file (TOML)")
    engine: EngineSettings = Field(default_factory=EngineSettings, title="Engine")
    output: OutputSettings = Field(default_factory=OutputSettings, title="Output")
    batch_samples: int = Field(
        200_000_000, title="Batch, samples", ge=100_000, le=20_000_000_000, description="the unit of work and commit"
    )
    bundle_samples: int = Field(
        20_000_000_000, title="Bundle, samples", ge=100_000, description="what one task run calls: 2 to 20 minutes"
    )
    rounds: int = Field(
        4, title="Rounds", ge=1, le=20, description="how often what was not committed is tried, in smaller bundles"
    )
    log_level: Annotated[LogLevel, BeforeValidator(_in_capitals)] = Field(
        "INFO", title="Log level of the workers", description="each worker writes a log file in OUT/.shoal/logs"
    )
    strict: bool = Field(False, title="Strict", description="refuse to run when any input can't be used")
    accept_missing: bool = Field(
        False,
        title="Accept missing input",
        description="quarantine reads that were planned and are not in the input any more; else such a run is refused",
    )

    @field_validator("input", mode="after")
    @classmethod
    def _absolute(cls, value: tuple[Path, ...]) -> tuple[Path, ...]:
        whole = tuple(map(nameable, value))
        for path in value:
            if not path.exists() and not path.is_symlink():
                raise ValueError(f"{path} is not there")
        return whole

    @field_validator("out", mode="after")
    @classmethod
    def _folder(cls, value: Path) -> Path:
        whole = nameable(value)
        if value.exists() and not value.is_dir():
            raise ValueError(f"{value} is a file; give a folder")
        return whole

    def digest(self) -> str:
        """Return sha256 over what decides the bases and batches, and is not as by default.

        Without the defaults, since a version that has new fields calls by them as the one before did without.
        """
        defaults = decisive({})
        chosen = {key: value for key, value in decisive(self.model_dump(mode="json")).items() if value != defaults[key]}
        return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()


def decisive(values: Mapping[str, Any]) -> dict[str, Any]:
    """Pick what decides the bases and batches out of dumped settings, by key: two runs into one folder agree on it.

    Settings of an earlier version may lack fields; it called by what is their default now.
    """
    engine = {**EngineSettings().model_dump(mode="json"), **values.get("engine", {})}
    output = {**OutputSettings().model_dump(mode="json"), **values.get("output", {})}
    return {
        **{f"engine.{name}": engine[name] for name in EngineSettings.model_fields if name not in NOT_DECISIVE},
        **{f"output.{name}": output[name] for name in DECISIVE_OUTPUT},
        "output.formats": ",".join(_staged(output["formats"])),
        "batch_samples": values.get("batch_samples", RunSettings.model_fields["batch_samples"].default),
    }


def resolve_settings(
    *,
    file: Path | None,
    environment: Mapping[str, str],
    command_line: Mapping[str, Any],
    defaults: Mapping[str, Any] | None = None,
) -> RunSettings:
    """Merge settings, defaults < file < environment < command line, and check them.

    Raises:
        SettingsError: names the key's path, the value and what is allowed, one line per mistake.
    """
    read = read_toml(file) if file is not None else {}
    return merged(RunSettings, defaults or {}, read, _from_environment(environment), command_line)


Checked = TypeVar("Checked", bound=BaseModel)


def checked(model: type[Checked], values: Mapping[str, Any]) -> Checked:
    """Make a settings model, turning pydantic's complaints into one SettingsError in plain words."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise SettingsError("\n".join(_complaint(model, complaint) for complaint in error.errors())) from error


def merged(model: type[Checked], *sources: Mapping[str, Any]) -> Checked:
    """Merge settings, later ones over earlier ones and tables field by field, and check them."""
    values: dict[str, Any] = {}
    for source in sources:
        for name, value in source.items():
            before = values.get(name, {})
            if not _is_table(model, name):
                values[name] = value
            elif isinstance(before, Mapping):  # what is none is left, for the check to complain of
                values[name] = {**before, **value} if isinstance(value, Mapping) else value
    return checked(model, values)


def _is_table(model: type[BaseModel], name: str) -> bool:
    field = model.model_fields.get(name)
    return field is not None and isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


def read_toml(file: Path) -> dict[str, Any]:
    """Read a TOML file; SettingsError names it and the place of a mistake."""
    try:
        read: dict[str, Any] = tomllib.loads(file.read_text("utf-8"))
        return read
    except OSError as error:
        raise SettingsError(f"settings file {str(file)!r} can't be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"settings file {str(file)!r} is not TOML: {error}") from error


def _complaint(model: type[BaseModel], complaint: Any) -> str:
    path = ".".join(str(part) for part in complaint["loc"])
    if complaint["type"] == "extra_forbidden":
        known = _model_at(model, complaint["loc"][:-1]).model_fields
        return f"{path}: unknown key; known here: {', '.join(known)}"
    if complaint["type"] == "missing":
        return f"{path}: is needed"
    if complaint["type"] == "model_type":
        field = next(iter(_model_at(model, complaint["loc"]).model_fields))
        return f"{path}: {complaint['input']!r} should be a table, [{path}] {field} = …"
    message = complaint["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return f"{path}: {complaint['input']!r} {message}" if complaint["type"] != "value_error" else f"{path}: {message}"


def _model_at(model: type[BaseModel], path: Iterable[str | int]) -> type[BaseModel]:
    here = model
    for part in path:
        if isinstance(part, str):  # the number of a table in a list says nothing about what it may hold
            here = _model_in(here.model_fields[part].annotation)
    return here


def _model_in(annotation: Any) -> Any:
    """Find the model in a field's type: in `Model`, `Model | None`, `tuple[Model, ...]`."""
    inner = (arg for arg in get_args(annotation) if isinstance(arg, type) and issubclass(arg, BaseModel))
    return next(inner, annotation)


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    """Read SHOAL_* variables; lists are separated like PATH."""
    values: dict[str, Any] = {}
    for name, text in sorted(environment.items()):  # a table's own comes before its fields
        if not name.startswith(ENVIRONMENT_PREFIX) or name in NOT_FIELDS or not text:
            continue
        *parents, key = name.removeprefix(ENVIRONMENT_PREFIX).lower().split("__")
        here = values
        for parent in parents:
            here = here.setdefault(parent, {})
            if not isinstance(here, dict):
                raise SettingsError(f"{parent}: {here!r} should be a table, since {name} is set; unset one of them")
        here[key] = text.split(os.pathsep) if (parents, key) == ([], "input") else text
    return values
