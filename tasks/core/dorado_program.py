"""The stand-alone program `dorado basecaller`: its command line, what its SAM says of a call, what its log counts.

Facts: dorado 1.x, `dorado basecaller --help` and dorado's documentation (SAM.md, SampleSheets.md). It drops, without a
record, reads that give fewer than 5 bases, and counts them in its log; it shows progress only on a terminal.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from tasks.core.alignment import REVERSED, reverse_complement
from tasks.core.calls import Barcode, BasecalledRead, EngineIdentity, ModifiedBases, PolyTail

#: What the program calls with unless told otherwise.
DEFAULT_MODEL = "hac"
#: Reads below this are not called; the same bound as ONT's server has.
MIN_SAMPLES = 100
#: Rough samples/s of one H100, by the model's size.
SPEEDS = {"fast": 3e8, "hac": 1.6e8, "sup": 2.9e7}

_COMPLEX = re.compile(r"(fast|hac|sup)(@(latest|[vV]\d+(\.\d+){0,2}))?")
_SIZE = re.compile(r"(?:^|_)(fast|hac|sup)(?=@|_|$)")
_LOGGED = re.compile(r"> Simplex reads (basecalled|filtered): (\d+)")
#: dorado's text of a barcode is its kit and its name, `SQK-NBD114-24_barcode01`; or an alias.
_ARRANGEMENT = re.compile(r"(?:(?P<kit>.+)_)?(?P<name>barcode\d+\w*)")
_FIELDS = 11


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What the program is asked for, beside the reads."""

    #: `hac`, `sup@v5.2.0`, a model's full name, or the path of its folder.
    model: str
    modified_bases: tuple[str, ...] = ()
    moves: bool = False
    trim: Literal["all", "adapters", "none"] = "all"
    #: The one kit that the program takes; empty: it does not look for barcodes.
    kit: str = ""
    barcode_both_ends: bool = False
    poly_a: bool = False
    poly_a_config: str = ""
    #: FASTA that it aligns to, or its index; empty: it does not align.
    reference: str = ""
    bed: str = ""
    #: `cuda:0`, `cpu`, …; empty: the program finds its devices, among those of CUDA_VISIBLE_DEVICES.
    device: str = ""
    #: Folder in which it looks for models, and into which it loads what it has not.
    models: str = ""
    #: Further arguments, as the site gives them.
    arguments: tuple[str, ...] = ()


def is_complex(model: str) -> bool:
    """Tell whether dorado chooses the model itself, by the data's chemistry: `hac`, `sup@latest`, `hac@v5.2`."""
    return _COMPLEX.fullmatch(model) is not None


def command_line(
    program: str, wanted: Wanted, data: str, *, read_ids: str = "", sample_sheet: str = "", model: str | None = None
) -> list[str]:
    """Return the command that calls a folder of POD5 files and prints SAM.

    Modified bases are part of a model complex, and an option beside a name or path: dorado takes no third way.

    Args:
        data: Folder of POD5 files.
        read_ids: File that lists the reads to call; empty: all of them.
        sample_sheet: Sample sheet that names the barcodes in use; empty: all of the kit.
        model: What to name the model by, where a name stands for a folder.
    """
    named = model or wanted.model
    within = is_complex(wanted.model)
    command = [program, "basecaller", ",".join((named, *wanted.modified_bases)) if within else named, data]
    command += ["--emit-sam"]
    options: Sequence[tuple[str, str | bool]] = (
        ("--read-ids", read_ids),
        ("--models-directory", wanted.models),
        ("--device", wanted.device),
        ("--emit-moves", wanted.moves),
        ("--trim", "" if wanted.trim == "all" else wanted.trim),
        ("--kit-name", wanted.kit),
        ("--sample-sheet", sample_sheet),
        ("--barcode-both-ends", wanted.barcode_both_ends),
        ("--estimate-poly-a", wanted.poly_a),
        ("--poly-a-config", wanted.poly_a_config),
        ("--reference", wanted.reference),
        ("--bed-file", wanted.bed),
    )
    for option, value in options:
        if value:
            command += [option] if value is True else [option, str(value)]
    command += wanted.arguments
    if wanted.modified_bases and not within:
        command += ["--modified-bases", *wanted.modified_bases]  # last: it takes all words that follow
    return command


def samples_per_second(model: str) -> float:
    """Return a rough rate, for estimates; of a model whose size is not known, that of hac."""
    size = _SIZE.search(Path(model).name)
    return SPEEDS[size.group(1) if size else "hac"]


def sample_sheet(kit: str, barcodes: Iterable[str], *, flow_cell: str, experiment: str) -> str:
    """Return a sample sheet that keeps dorado to these barcodes, without aliases."""

    def plain(text: str) -> str:  # dorado takes 40 letters, digits, _ and -
        return re.sub(r"[^A-Za-z0-9_-]", "_", text)[:40] or "unknown"

    rows = [f"{plain(flow_cell)},{kit},{plain(experiment)},{barcode}" for barcode in barcodes]
    return "\n".join(("flow_cell_id,kit,experiment_id,barcode", *rows, ""))


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadGroup:
    """An @RG line."""

    model: str = ""
    modified_base_models: tuple[str, ...] = ()
    #: Samples per move; 0 where the line does not say.
    stride: int = 0
    #: None: the group is of no barcode.
    barcode: Barcode | None = None


@dataclass(slots=True)
class Header:
    """The header of the program's SAM, as far as it has come."""

    version: str = ""
    gpu: str = ""
    groups: dict[str, ReadGroup] = field(default_factory=dict)

    def take(self, line: str) -> None:
        """Take in a line of it."""
        kind, *fields = line.rstrip("\n").split("\t")
        values = dict(text.split(":", 1) for text in fields if ":" in text)
        if kind == "@PG" and values.get("PN") == "dorado":
            self.version = values.get("VN", "")
            self.gpu = re.sub(r"\s", "_", values.get("DS", "").removeprefix("gpu:"))
        elif kind == "@RG":
            self.groups[values.get("ID", "")] = _read_group(values)

    def identity(self) -> EngineIdentity | None:
        """Tell what called the reads; None where the header does not name a model and its stride."""
        known = next((group for group in self.groups.values() if group.model and group.stride), None)
        if known is None:
            return None
        return EngineIdentity(
            engine="dorado",
            version=self.version,
            model=known.model,
            model_digest="",
            stride=known.stride,
            gpu=self.gpu,
            modified_base_models=known.modified_base_models,
        )


def _read_group(values: Mapping[str, str]) -> ReadGroup:
    described = dict(word.split("=", 1) for word in values.get("DS", "").split() if "=" in word)
    barcode = None
    if "bk" in values and "SM" in values:
        alias = values.get("al", "")
        barcode = Barcode(
            arrangement=values["SM"], kit=values["bk"], alias="" if alias in ("", values["SM"]) else alias
        )
    stride = described.get("model_stride", "")
    return ReadGroup(
        model=described.get("basecall_model", ""),
        modified_base_models=tuple(filter(None, described.get("modbase_models", "").split(","))),
        stride=int(stride) if stride.isdigit() else 0,
        barcode=barcode,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A record of the program's SAM: a call, or a further alignment of one."""

    read_id: str
    #: Id of the read that was given to the program.
    parent_read_id: str
    #: None for secondary and supplementary alignments.
    call: BasecalledRead | None
    #: The line, without its end.
    line: str


def parse_record(line: str, header: Header, *, barcoded: bool) -> Record:
    """Take a record of dorado's apart.

    Tags without a place in a call (`TS`, `RX`) are left out; start time, channel, mux, file and the like are the
    read's own.

    Args:
        barcoded: The program was asked to look for barcodes, so what has none is unclassified.

    Raises:
        ValueError: it is no whole record; says what is wrong.
    """
    line = line.rstrip("\n")
    fields = line.split("\t")
    if len(fields) < _FIELDS:
        raise ValueError(f"a record has {_FIELDS} fields or more, not {len(fields)}: {line[:80]!r}")
    read_id, flag, sequence, qualities = fields[0], int(fields[1]), fields[9], fields[10]
    tags = {text[:2]: text[5:] for text in fields[_FIELDS:]}
    parent = tags.get("pi", read_id)
    if flag & 0x900:
        return Record(read_id=read_id, parent_read_id=parent, call=None, line=line)
    if len(sequence) != len(qualities) or sequence == "*":
        raise ValueError(f"{len(sequence)} bases and {len(qualities)} qualities in the record of {read_id}")
    try:
        call = _call(read_id, parent, flag, sequence.encode(), qualities.encode(), tags, header, barcoded=barcoded)
    except KeyError as error:
        raise ValueError(f"the record of {read_id} has no tag {error.args[0]}") from error
    return Record(read_id=read_id, parent_read_id=parent, call=call, line=line)


def _call(
    read_id: str,
    parent: str,
    flag: int,
    sequence: bytes,
    qualities: bytes,
    tags: Mapping[str, str],
    header: Header,
    *,
    barcoded: bool,
) -> BasecalledRead:
    if flag & REVERSED:
        sequence, qualities = reverse_complement(sequence), qualities[::-1]
    group = header.groups.get(tags.get("RG", ""), ReadGroup())
    moves, stride = None, group.stride
    if "mv" in tags:
        table = _numbers(tags["mv"])
        stride, moves = int(table[0]), table[1:].astype(np.uint8)
    if not stride:
        raise ValueError(f"neither tag mv nor read group of {read_id} tells the model's stride; set engine.moves")
    modified = None
    if "MM" in tags:
        modified = ModifiedBases(positions=tags["MM"], probabilities=_numbers(tags.get("ML", "C")).astype(np.uint8))
    return BasecalledRead(
        read_id=read_id,
        parent_read_id=parent,
        sequence=sequence,
        qstring=qualities,
        mean_qscore=float(tags["qs"]),
        stride=stride,
        trimmed_samples=int(tags["ts"]),
        split_point=int(tags.get("sp", 0)),
        num_samples=int(tags["ns"]),
        moves=moves,
        scaling_midpoint=float(tags["sm"]),
        scaling_dispersion=float(tags["sd"]),
        scaling_version=tags["sv"],
        modified=modified,
        barcode=_barcode(tags, group) if barcoded else None,
        poly_tail=_poly_tail(tags),
        duplex=int(tags.get("dx", 0)),
    )


def _numbers(array: str) -> npt.NDArray[np.int64]:
    """Return the values of an array of whole numbers, `c,6,1,0`."""
    _, _, values = array.partition(",")
    return np.array(values.split(",") if values else [], np.int64)


def _barcode(tags: Mapping[str, str], group: ReadGroup) -> Barcode:
    known = group.barcode
    label = tags.get("BC", "")
    if known is None and label:
        named = _ARRANGEMENT.fullmatch(label)
        known = Barcode(arrangement=named["name"], kit=named["kit"] or "") if named else Barcode(arrangement=label)
    found = known or Barcode(arrangement="unclassified")
    figures = [float(text) for text in tags.get("bi", "").split(",")[1:]]
    if len(figures) != 7:
        return found
    return Barcode(
        arrangement=found.arrangement,
        kit=found.kit,
        alias=found.alias,
        variant=tags.get("bv", "").removeprefix("n/a"),
        score=figures[0],
        front_begin_index=int(figures[1]),
        front_foundseq_length=int(figures[2]),
        front_score=figures[3],
        rear_end_index=int(figures[4]),
        rear_foundseq_length=int(figures[5]),
        rear_score=figures[6],
    )


def _poly_tail(tags: Mapping[str, str]) -> PolyTail | None:
    if "pt" not in tags:
        return None
    anchor, start, end, start_2, end_2 = map(int, _numbers(tags.get("pa", "i,-1,-1,-1,-1,-1")))
    return PolyTail(length=int(tags["pt"]), anchor=anchor, start=start, end=end, start_2=start_2, end_2=end_2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """What the program says at its end that it has done; None where it does not say."""

    #: Reads written, parts of split reads one by one.
    basecalled: int | None = None
    #: Reads that it dropped, for they gave too few bases.
    filtered: int | None = None


def counted(log: str) -> Counted:
    """Read the program's own count off its log."""
    return Counted(**{kind: int(number) for kind, number in _LOGGED.findall(log)})


def unexplained(missing: Sequence[tuple[str, int]], count: Counted) -> tuple[str, ...]:
    """Return the reads that the program left out and does not account for.

    A read under 100 samples is too short. Of the longer ones, the program has dropped as many as it says; when more are
    missing than that, none of them is taken as dropped.

    Args:
        missing: Id and samples of each read without a record.
    """
    longer = tuple(read_id for read_id, samples in missing if samples >= MIN_SAMPLES)
    return () if len(longer) <= (count.filtered or 0) else longer
