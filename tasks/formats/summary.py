"""sequencing_summary.txt: the rows of a batch, the joined table of a run, and the check of any such table.

Columns and their values: ONT output specification v1.1, sequencing_summary (`minknow-1.1`), and dorado 1.4's
SummaryFileWriter (`dorado-1.4`, whose times are float32 and whose numbers have six decimals).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Literal

import polars as pl
import pyarrow as pa

from tasks.core.alignment import AlignmentFigures, alignment_figures
from tasks.core.calls import Barcode, BasecalledRead, PolyTail
from tasks.core.errors import InputError
from tasks.core.reads import Read
from tasks.formats.fastq import UNKNOWN, word
from tasks.formats.layout import path_part

Profile = Literal["minknow-1.1", "dorado-1.4"]

UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-[45][0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
#: Of any version: simulators and converters make others than the specification's 4 and 5, and we write what they gave.
READ_ID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_IDENT = r"[^\s\"]+"
_DIGITS = r"\d+"
_DECIMAL = r"\d+(\.\d+)?"
_SIGNED = r"-?\d+(\.\d+)?"
_INDEX = r"-1|\d+"
_END_REASON = (
    "unknown|signal_positive|signal_negative|mux_change|unblock_mux_change|data_service_unblock_mux_change"
    "|analysis_config_change|device_data_error|api_request|paused"
)
_TYPE = "na|test_sample|positive_control|negative_control|no_template_control|positive_control_1|positive_control_2"


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column, and what its values look like."""

    name: str
    #: Of MinKNOW's specification, matched in full.
    regex: str
    #: What dorado writes besides.
    dorado: str = ""
    #: Columns of a group are there together or not at all.
    group: str = "general"

    def pattern(self, profile: Profile) -> re.Pattern[str]:
        """Compile what a value must match in full."""
        extra = f"|{self.dorado}" if profile == "dorado-1.4" and self.dorado else ""
        return re.compile(f"(?:{self.regex}{extra})")


def _group(group: str, names: str, regex: str, dorado: str = "") -> tuple[Column, ...]:
    return tuple(Column(name=name, regex=regex, dorado=dorado, group=group) for name in names.split())


#: All columns, in the one order in which they may come.
COLUMNS = (
    *_group("online", "filename_fastq filename_fast5 filename_pod5 filename_bam", _IDENT),
    *_group("offline", "input_filename", _IDENT),
    *_group("offline", "batch_id", _DIGITS),
    *_group("general", "parent_read_id read_id", READ_ID),
    # Files from converters have no protocol run id; then it is unknown here, where MinKNOW always has one.
    *_group("general", "run_id", f"{UUID}|{UNKNOWN}"),
    *_group("general", "channel", _DIGITS),
    # The specification's 1 to 4; files from converters have others, 0 for one.
    *_group("general", "mux", _DIGITS),
    *_group("general", "minknow_events", _DIGITS),
    *_group("general", "start_time duration", _DECIMAL),
    *_group("general", "passes_filtering", "TRUE|FALSE"),
    *_group("general", "template_start", _DECIMAL),
    *_group("general", "num_events_template", _DIGITS),
    *_group("general", "template_duration", _DECIMAL),
    *_group("general", "sequence_length_template", _DIGITS),
    *_group("general", "mean_qscore_template", _DECIMAL),
    *_group(
        "poly_a",
        "poly_tail_length poly_tail_start poly_tail_end poly_tail2_start poly_tail2_end",
        _INDEX,
        "-2",
    ),
    *_group("general", "pore_type experiment_id", _IDENT),
    *_group("general", "sample_id", _IDENT, "(?:)"),
    *_group("general", "end_reason", _END_REASON),
    *_group("barcoding", "alias", _IDENT),
    *_group("barcoding", "type", f"-|{_TYPE}", UNKNOWN),
    *_group("barcoding", "barcode_arrangement barcode_kit", _IDENT),
    *_group("barcoding", "barcode_variant", "-|n/a|var1|var2", UNKNOWN),
    *_group("barcoding", "barcode_score barcode_front_score", f"-|{_SIGNED}"),
    *_group("barcoding", "barcode_front_foundseq_length barcode_front_begin_index", f"-|{_DIGITS}", "-1"),
    *_group("barcoding", "barcode_rear_score", f"-|{_SIGNED}"),
    *_group("barcoding", "barcode_rear_foundseq_length barcode_rear_end_index", f"-|{_DIGITS}", "-1"),
    *_group("alignment", "alignment_genome", f"-|{_IDENT}"),
    *_group("alignment", "alignment_direction", r"-|\+|\*"),
    *_group(
        "alignment",
        "alignment_genome_start alignment_genome_end alignment_strand_start alignment_strand_end",
        f"-|{_DIGITS}",
        "-1",
    ),
    *_group(
        "alignment",
        "alignment_num_insertions alignment_num_deletions alignment_num_aligned alignment_num_correct",
        f"-|{_DIGITS}",
    ),
    *_group("alignment", "alignment_identity alignment_accuracy", f"-|{_DECIMAL}"),
    *_group("alignment", "alignment_score", f"-|{_SIGNED}"),
    *_group("alignment", "alignment_coverage", f"-|{_DECIMAL}"),
    *_group(
        "alignment",
        "alignment_bed_hits alignment_mapping_quality alignment_num_alignments alignment_num_secondary_alignments "
        "alignment_num_supplementary_alignments",
        f"-|{_DIGITS}",
    ),
    *_group("duplex", "duplex_parent_template duplex_parent_complement", f"-|{READ_ID}"),
)
_BY_NAME = {column.name: column for column in COLUMNS}
#: Groups that are there when the engine was asked for them, in the order of a row's values in SummaryRows.
OPTIONAL = ("poly_a", "barcoding", "alignment", "duplex")


def written_columns(profile: Profile, groups: Collection[str], kinds: Collection[str]) -> tuple[str, ...]:
    """Return the columns that Shoal writes.

    Args:
        groups: Those of OPTIONAL that the run has.
        kinds: `fastq` and `bam`, as written.
    """
    online = {"filename_pod5", *(f"filename_{kind}" for kind in kinds)}
    first = {"minknow-1.1": online, "dorado-1.4": {"input_filename", "batch_id"}}[profile]
    return tuple(c.name for c in COLUMNS if c.name in first or c.group == "general" or c.group in groups)


def _names(group: str) -> tuple[str, ...]:
    return tuple(column.name for column in COLUMNS if column.group == group)


def _number_type(name: str) -> Any:
    return pa.float64() if name.endswith(("identity", "accuracy", "coverage")) else pa.int64()


PART = pa.schema(
    [
        ("filename_pod5", pa.string()),
        ("parent_read_id", pa.string()),
        ("read_id", pa.string()),
        ("run_id", pa.string()),
        ("channel", pa.uint32()),
        ("mux", pa.uint8()),
        ("minknow_events", pa.uint64()),
        ("start_time", pa.float64()),
        ("duration", pa.float64()),
        ("passes_filtering", pa.bool_()),
        ("template_start", pa.float64()),
        ("num_events_template", pa.uint64()),
        ("template_duration", pa.float64()),
        ("sequence_length_template", pa.uint64()),
        ("mean_qscore_template", pa.float64()),
        ("pore_type", pa.string()),
        ("experiment_id", pa.string()),
        ("sample_id", pa.string()),
        ("end_reason", pa.string()),
        # Not a column of the summary: the folder of the read's barcode; empty without one.
        ("folder", pa.string()),
    ]
)
#: Columns of the groups of OPTIONAL in a part; null where a call has none of them.
PART_GROUPS = {
    "poly_a": pa.schema([(name, pa.int32()) for name in _names("poly_a")]),
    "barcoding": pa.schema(
        [
            *((name, pa.string()) for name in _names("barcoding")[:5]),
            *((name, pa.float64() if name.endswith("score") else pa.int32()) for name in _names("barcoding")[5:]),
        ]
    ),
    "alignment": pa.schema(
        [
            (name, pa.string() if name.endswith(("genome", "direction")) else _number_type(name))
            for name in _names("alignment")
        ]
    ),
    "duplex": pa.schema([(name, pa.string()) for name in _names("duplex")]),
}
#: What dorado writes where a read has no value.
_DORADO_NONE: Mapping[str, object] = {
    **dict.fromkeys(_names("poly_a"), -1),
    "poly_tail_length": -2,
    **dict.fromkeys(_names("barcoding")[:5], UNKNOWN),
    **dict.fromkeys(_names("barcoding")[5:], -1),
    **dict.fromkeys(_names("alignment"), 0),
    **dict.fromkeys(_names("alignment")[:2], "*"),
    **dict.fromkeys(_names("alignment")[2:6], -1),
    **dict.fromkeys(_names("duplex"), "-"),
}


#: Rows gathered before they are packed.
PACKED = 4096


class SummaryRows:
    """The rows of one run in one batch, in the order in which they come."""

    def __init__(self) -> None:
        self._rows: list[tuple[Any, ...]] = []
        self._packed: list[Any] = []

    def add(self, row: tuple[Any, ...]) -> None:
        """Add a row made by `row_of`."""
        self._rows.append(row)
        if len(self._rows) == PACKED:
            self._pack()

    @staticmethod
    def row_of(read: Read, call: BasecalledRead, passes: bool) -> tuple[Any, ...]:
        """Return the row of a call."""
        run = read.run
        rate = run.sample_rate
        start = (read.start_sample + call.split_point) / rate
        called = call.num_samples - call.trimmed_samples
        return (
            read.file,
            call.parent_read_id,
            call.read_id,
            run,
            read.channel,
            read.mux,
            read.minknow_events,
            start,
            call.num_samples / rate,
            passes,
            start + call.trimmed_samples / rate,
            called // call.stride,
            called / rate,
            len(call.sequence),
            call.mean_qscore,
            read.pore_type,
            run,
            run,
            call.end_reason(read),
            path_part(call.barcode.folder) if call.barcode else "",
            call.poly_tail,
            call.barcode,
            None if call.alignments is None else (alignment_figures(call.alignments),),
            call.duplex_parents or ((None, None) if call.duplex else None),
        )

    def table(self) -> Any:
        """Return the rows as a table of schema PART, and of PART_GROUPS as far as any call has them."""
        if self._rows:
            self._pack()
        return pa.concat_tables(self._packed, promote_options="default")

    def _pack(self) -> None:
        """Turn rows into a table, a tenth of their size: a batch of short reads has a hundred thousand."""
        named = (*PART.names, *OPTIONAL)
        columns = dict(zip(named, map(list, zip(*self._rows, strict=True)), strict=True))
        run = columns["run_id"][0]
        known = re.fullmatch(UUID, run.protocol_run_id)
        count = len(self._rows)
        columns["run_id"] = [run.protocol_run_id if known else UNKNOWN] * count
        columns["experiment_id"] = [word(run.experiment_name) or UNKNOWN] * count
        columns["sample_id"] = [word(run.sample_id) or UNKNOWN] * count
        files = {file: word(Path(file).name) for file in set(columns["filename_pod5"])}
        columns["filename_pod5"] = [files[file] for file in columns["filename_pod5"]]
        pores = {pore: word(pore) or "not_set" for pore in set(columns["pore_type"])}
        columns["pore_type"] = [pores[pore] for pore in columns["pore_type"]]
        fields = list(PART)
        for group in OPTIONAL:
            if any(value is not None for value in columns[group]):
                fields += PART_GROUPS[group]
                rows = [_GROUP_VALUES[group](value) for value in columns[group]]
                columns |= dict(zip(PART_GROUPS[group].names, map(list, zip(*rows, strict=True)), strict=True))
        self._packed.append(
            pa.table([pa.array(columns[field.name], field.type) for field in fields], pa.schema(fields))
        )
        self._rows.clear()


def _poly_a_values(tail: PolyTail | None) -> tuple[Any, ...]:
    return (None,) * 5 if tail is None else (tail.length, tail.start, tail.end, tail.start_2, tail.end_2)


def _barcoding_values(barcode: Barcode | None) -> tuple[Any, ...]:
    """Return a row of the group; what is not known is null. Readers look at alias or arrangement: both are filled."""
    if barcode is None:
        return (None,) * 12

    def known(number: float) -> float | None:
        return None if number == -1 else number

    return (
        word(barcode.folder),
        word(barcode.type) or None,
        word(barcode.arrangement),
        word(barcode.kit) or None,
        word(barcode.variant) or ("n/a" if barcode.kit else None),
        known(barcode.score),
        known(barcode.front_score),
        known(barcode.front_foundseq_length),
        known(barcode.front_begin_index),
        known(barcode.rear_score),
        known(barcode.rear_foundseq_length),
        known(barcode.rear_end_index),
    )


def _alignment_values(aligned: tuple[AlignmentFigures | None] | None) -> tuple[Any, ...]:
    return (None,) * len(_names("alignment")) if aligned is None or aligned[0] is None else astuple(aligned[0])


def _duplex_values(parents: tuple[str | None, str | None] | None) -> tuple[Any, ...]:
    return parents or (None, None)


_GROUP_VALUES: Mapping[str, Callable[[Any], tuple[Any, ...]]] = {
    "poly_a": _poly_a_values,
    "barcoding": _barcoding_values,
    "alignment": _alignment_values,
    "duplex": _duplex_values,
}


def groups_of(schema: Any) -> tuple[str, ...]:
    """Return the optional groups that a part's schema has."""
    return tuple(group for group in OPTIONAL if PART_GROUPS[group].names[0] in schema.names)


#: Batches whose rows are joined by one query: its plan takes 30 kB for each file that it names.
PARTS_AT_ONCE = 500


@dataclass(frozen=True, slots=True)
class Part:
    """The rows of one batch of a run: a parquet file of schema PART."""

    path: Path
    #: Names of the files that its reads are in, by kind (`fastq`, `bam`), verdict and barcode folder.
    names: Mapping[tuple[str, bool, str], str]


def scan_parts(parts: Sequence[Part], groups: Collection[str]) -> pl.LazyFrame:
    """Read the parts of a run, in order; what a part has not of a group is null. `part` is the path of each row's."""
    schema = pa.schema([field for fields in (PART, *(PART_GROUPS[group] for group in groups)) for field in fields])
    types = pl.DataFrame(schema.empty_table()).schema
    return pl.scan_parquet(
        [part.path for part in parts],
        schema=types,
        missing_columns="insert",
        include_file_paths="part",
        glob=False,
    )


def write_summary(
    parts: Sequence[Part], profile: Profile, target: Path, *, groups: Collection[str] = (), kinds: Collection[str]
) -> None:
    """Join the parts of a run, in order, into its sequencing summary. Streams: memory does not grow with the rows.

    Args:
        parts: Whose rows.
        profile: Which columns, in whose manner.
        target: Replaced as a whole.
        groups: Those of OPTIONAL that any part has.
        kinds: Of the files that the reads are in: `fastq`, `bam`.
    """
    write_joined(parts, target, lambda some: _summary_rows(some, profile, groups=groups, kinds=kinds), null_value="-")


def write_joined(
    parts: Sequence[Part], target: Path, rows_of: Callable[[Sequence[Part]], pl.LazyFrame], *, null_value: str
) -> None:
    """Write one table of tab-separated values, of rows of all parts, a few parts at a time.

    Args:
        rows_of: Makes rows of parts; the columns are the same for all.
        null_value: Stands for what is not known.
    """
    new = target.with_name(f".{target.name}.new")
    with new.open("wb") as file:
        for first in range(0, len(parts), PARTS_AT_ONCE) or (0,):
            rows_of(parts[first : first + PARTS_AT_ONCE]).sink_csv(
                file,
                include_header=first == 0,
                separator="\t",
                line_terminator="\n",
                float_precision=6,
                quote_style="never",
                null_value=null_value,
            )
        file.flush()
        os.fsync(file.fileno())
    new.replace(target)


def _summary_rows(
    parts: Sequence[Part], profile: Profile, *, groups: Collection[str], kinds: Collection[str]
) -> pl.LazyFrame:
    table = scan_parts(parts, groups)
    if profile == "minknow-1.1":
        # A column of the one string that tells the file: part, verdict and folder.
        key = pl.concat_str("part", pl.col("passes_filtering").cast(pl.String), "folder", separator="|")
        for kind in kinds:
            names = {
                f"{part.path}|{str(passes).lower()}|{folder}": name
                for part in parts
                for (of, passes, folder), name in part.names.items()
                if of == kind
            }
            table = table.with_columns(
                key.replace_strict(names, default="", return_dtype=pl.String).alias(f"filename_{kind}")
            )
        if "poly_a" in groups:
            table = table.with_columns(pl.col(PART_GROUPS["poly_a"].names).fill_null(-1))
    else:
        table = table.with_columns(
            pl.col(name).fill_null(_DORADO_NONE[name]) for group in groups for name in PART_GROUPS[group].names
        )
        single = pl.Float32
        milliseconds = (pl.col("start_time") * 1000).round()
        start = milliseconds.cast(single) / pl.lit(1000, single)
        trimmed = (pl.col("template_start") - pl.col("start_time")).cast(single)
        table = table.with_columns(
            input_filename="filename_pod5",
            batch_id=pl.lit(0),
            start_time=start,
            duration=pl.col("duration").cast(single),
            template_start=start + trimmed,
            template_duration=pl.col("template_duration").cast(single),
            mean_qscore_template=pl.col("mean_qscore_template").cast(single),
        )
    verdict = pl.when("passes_filtering").then(pl.lit("TRUE")).otherwise(pl.lit("FALSE"))
    return table.with_columns(passes_filtering=verdict).select(written_columns(profile, groups, kinds))


@dataclass(frozen=True, slots=True)
class Violation:
    """A value that is not what its column allows."""

    line: int
    column: str
    value: str
    expected: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.column} is {self.value!r}, expected {self.expected}"


def validate_summary(path: Path) -> Iterator[Violation]:
    """Check a sequencing summary, ours or another's, value by value; yields what is wrong.

    The header tells the profile: a table that begins with `input_filename` is held to dorado's manner.

    Raises:
        InputError: the file is empty.
    """
    with path.open(encoding="utf-8", newline="\n") as file:
        header = file.readline().rstrip("\n").split("\t")
        if header == [""]:
            raise InputError(str(path), "empty", "has no header line")
        profile: Profile = "dorado-1.4" if header[0] == "input_filename" else "minknow-1.1"
        yield from _header_violations(header)
        patterns = [_BY_NAME[name].pattern(profile) if name in _BY_NAME else None for name in header]
        for line, text in enumerate(file, start=2):
            values = text.rstrip("\n").split("\t")
            if len(values) != len(header):
                yield Violation(line, "", text.rstrip("\n"), f"{len(header)} values, not {len(values)}")
                continue
            for name, pattern, value in zip(header, patterns, values, strict=True):
                if pattern is not None and pattern.fullmatch(value) is None:
                    yield Violation(line, name, value, pattern.pattern)


def _header_violations(header: list[str]) -> Iterator[Violation]:
    """Check that columns are known, in order, and their groups whole."""
    order = {column.name: i for i, column in enumerate(COLUMNS)}
    for name in header:
        if name not in order:
            yield Violation(1, name, name, "a column of the specification")
    known = [name for name in header if name in order]
    if known != sorted(known, key=order.__getitem__):
        yield Violation(1, "", " ".join(header), "the columns in the specification's order")
    groups = {_BY_NAME[name].group for name in known} - {"online"}
    for column in COLUMNS:
        if column.group in groups | {"general"} and column.name not in known:
            yield Violation(1, column.name, "", f"the column: its group {column.group!r} is there in part")
