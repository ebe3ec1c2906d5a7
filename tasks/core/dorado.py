"""Rules about ONT's basecall server and its models: what its codes mean, how long to wait, what to ask of it.

Codes are those of the published client library, by name; nothing here imports it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from pathlib import Path
from typing import Any

from tasks.core.chemistry import Fits
from tasks.core.reads import Read


class Verdict(Enum):
    """What to do about a code."""

    GO_ON = "go on"
    #: On a fresh connection; what was not answered is submitted again.
    RECONNECT = "reconnect"
    #: No other try can help: a person has to change something.
    FAIL = "fail"
    #: This read alone is left out.
    QUARANTINE = "quarantine"


#: `BasecallClient.result`, `.pass_read_result` and `.status`, by name.
VERDICTS = {
    "success": Verdict.GO_ON,
    "no_connection": Verdict.RECONNECT,
    "already_connected": Verdict.GO_ON,
    "not_ready": Verdict.RECONNECT,
    "timed_out": Verdict.RECONNECT,
    "invalid_response": Verdict.RECONNECT,
    "basecall_config_unavailable": Verdict.FAIL,
    "barcode_kit_unavailable": Verdict.FAIL,
    "align_index_unavailable": Verdict.FAIL,
    "bed_file_unavailable": Verdict.FAIL,
    "file_load_timeout": Verdict.RECONNECT,
    "failed": Verdict.RECONNECT,
    "bad_request": Verdict.FAIL,
    "bad_reply": Verdict.RECONNECT,
    "invalid_aligner_options": Verdict.FAIL,
    "read_accepted": Verdict.GO_ON,
    "not_accepting_reads": Verdict.RECONNECT,
    "queue_full": Verdict.GO_ON,
    "bad_read": Verdict.QUARANTINE,
    "disconnected": Verdict.RECONNECT,
    "preparing_connection": Verdict.RECONNECT,
    "loading_config": Verdict.RECONNECT,
    "loading_alignment_index": Verdict.RECONNECT,
    "loading_bed_file": Verdict.RECONNECT,
    "connecting": Verdict.RECONNECT,
    "connected": Verdict.GO_ON,
    "error_state": Verdict.RECONNECT,
}

#: What a person can do about the codes that no other try can help.
_REMEDIES = {
    "basecall_config_unavailable": "the server has no such model or config: see engine.model and dorado.models",
    "barcode_kit_unavailable": "the server knows no such kit: see engine.barcode_kits",
    "align_index_unavailable": "the server can't read the reference: output.reference must be readable on its machine",
    "bed_file_unavailable": "the server can't read the BED file: engine.bed must be readable on its machine",
    "bad_request": "the server does not understand the client: their versions must be the same",
    "invalid_aligner_options": "the server refuses the aligner's options",
}


def verdict(code: str) -> Verdict:
    """Say what to do about a code; one that nobody knows ends the engine, for guessing loses reads."""
    return VERDICTS.get(code, Verdict.FAIL)


def remedy(code: str) -> str:
    """Say in words what a code means for the person."""
    return _REMEDIES.get(code, f"the client library answered {code!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long we wait before we act."""

    #: Seconds of a read's deadline that do not depend on its length.
    base: float = 300.0
    #: Samples/s of the slowest caller that still counts as one, for all that is ahead of a read and for itself.
    slowest: float = 200_000.0
    #: Seconds without any read coming out of the server, or without a word of it, that make a stall. Some versions wait
    #: 30 s to fill a GPU batch.
    stall: float = 120.0
    #: How often a read is submitted in all, and how often one stream may mend its connection.
    attempts: int = 3

    def deadline(self, samples: int, ahead: int) -> float:
        """Return the seconds a read may take that has so many samples, with `ahead` samples in flight before it."""
        return self.base + (samples + ahead) / self.slowest

    def stall_after(self, longest: int) -> float:
        """Return the seconds of silence that make a stall, when the longest read in flight has so many samples."""
        return self.stall + longest / self.slowest


@dataclass(frozen=True, slots=True)
class ServerCounts:
    """Reads that have gone into a server and come out of it, in its lifetime."""

    reads_in: int
    reads_out: int

    @classmethod
    def of(cls, statistics: Mapping[str, Any]) -> ServerCounts | None:
        """Take them from the server's statistics; None when it does not tell."""
        try:
            return cls(int(statistics["lifetime_reads_in"]), int(statistics["lifetime_reads_out"]))
        except (KeyError, TypeError, ValueError):
            return None


#: Times the silence of a stall, after which a server that works on others' reads only has lost ours.
_HOPELESS = 4


class Pulse(Enum):
    """How a server does that owes us answers."""

    FINE = "fine"
    #: It works, only not on ours.
    SLOW = "slow"
    #: It answers our reads, and one is past its deadline: that one is submitted again.
    OVERDUE = "overdue"
    #: It has answered all that it was sent, or goes on with others' reads, and ours never come: a fresh connection.
    LOST = "lost"
    #: It has work, and nothing comes out of it; or it does not speak: a fresh server.
    STALLED = "stalled"


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """What one client waits for, at one time."""

    #: Seconds since it last heard an answer to any of its reads, or since it began to wait.
    silent: float
    #: Seconds since the number of reads out of the server last rose, or since the server last spoke at all.
    server_silent: float
    #: The last figures; None: the server did not answer.
    counts: ServerCounts | None
    #: The longest read in flight, samples.
    longest: int
    #: Whether a read's deadline has passed.
    overdue: bool


def judge(waiting: Waiting, patience: Patience) -> Pulse:
    """Judge a server by what comes out of it, against what went in."""
    limit = patience.stall_after(waiting.longest)
    if waiting.silent >= limit and waiting.server_silent >= limit:
        idle = waiting.counts is not None and waiting.counts.reads_in <= waiting.counts.reads_out
        return Pulse.LOST if idle else Pulse.STALLED
    if not waiting.overdue:
        return Pulse.FINE
    if waiting.silent < limit:
        return Pulse.OVERDUE
    return Pulse.LOST if waiting.silent >= _HOPELESS * limit else Pulse.SLOW


Version = tuple[int, ...]
_NUMBERS = re.compile(r"\d+")


def parse_version(text: str) -> Version:
    """Return the first three numbers of a version: `7.13.6+a1b2c3d` gives (7, 13, 6)."""
    return tuple(int(number) for number in _NUMBERS.findall(text.partition("+")[0])[:3])


def version_mismatch(*, library: Version, library_protocol: Version, server: str, server_protocol: str) -> str | None:
    """Say why library and server can't talk, and how to mend it; None when they can.

    Versions are compared whole: ONT's release notes promise nothing but equality.
    """
    there, there_protocol = parse_version(server), parse_version(server_protocol)
    if there == library and (there_protocol == library_protocol or not there_protocol):
        return None
    wanted = _dotted(there) if there else "VERSION"
    return (
        f"ont-pybasecall-client-lib {_dotted(library)} (protocol {_dotted(library_protocol)}) can't talk to the "
        f"server's version {server or 'unknown'} (protocol {server_protocol or 'unknown'}); they must be the same: "
        f"pip install 'ont-pybasecall-client-lib=={wanted}'"
    )


def _dotted(numbers: Version) -> str:
    return ".".join(map(str, numbers))


#: Samples in one batch of one GPU where the server's arguments do not tell: 12,288 x 224 on a V100, 10,000 x 1,152 on
#: an A100 have been reported; this is the larger.
GPU_BATCH = 12_000_000
_CHUNK_SIZE = ("--chunk_size", "--chunksize")
_BATCH_SIZE = ("--batch_size", "--batchsize", "--chunks_per_runner")
_RUNNERS = ("--gpu_runners_per_device", "--num_runners")


def gpu_batch(arguments: Sequence[str], gpus: int) -> int:
    """Return the samples that all GPUs of a server take at once, from its arguments where they say."""

    def given(names: tuple[str, ...]) -> int:
        words = [word for argument in arguments for word in argument.split("=", 1)]
        values = [value for name, value in pairwise(words) if name in names and value.isdigit()]
        return int(values[-1]) if values else 0

    chunk, batch = given(_CHUNK_SIZE), given(_BATCH_SIZE)
    one = chunk * batch if chunk and batch else GPU_BATCH
    return one * max(given(_RUNNERS), 1) * max(gpus, 1)


def batch_warning(*, clients: int, window: int, batch: int) -> str | None:
    """Warn when all clients of a server together keep less in flight than its GPUs take at once.

    From version 7.4.12 a server waits up to 30 s for a batch to fill before it calls an incomplete one.
    """
    in_flight = clients * window
    if in_flight >= 2 * batch:
        return None
    wanted = -(-2 * batch // clients)
    return (
        f"{clients} clients with {window:,} samples in flight each keep {in_flight:,} with the server, whose GPUs take "
        f"{batch:,} at once; below twice that it may wait 30 s for each batch: set engine.in_flight_samples to "
        f"{wanted:,} or more, or use more slots, or on one machine more workers"
    )


_STARTED = "Starting server on port:"


def started_on(line: str) -> str | None:
    """Return the port or socket in the line that a server prints when it is ready; None when it is another line."""
    _, found, port = line.partition(_STARTED)
    port = port.strip()
    return port if found and port and port != "ERROR" else None


def address_of(port: str) -> str:
    """Return the address at which the client finds a port or socket of this machine."""
    if port.isdigit():
        return f"127.0.0.1:{port}"
    return f"ipc://{port}" if port.startswith("/") else port


def fixed_port(port: str) -> int | Path | None:
    """Return the number or the socket at which all servers of a site are to listen; None: each chooses its own."""
    if port == "auto":
        return None
    return int(port) if port.isdigit() else Path(port.removeprefix("ipc://"))


def port_warning(port: str, *, servers: int) -> str | None:
    """Warn of a port that is named for several servers, of which a machine can run one."""
    if fixed_port(port) is None or servers < 2:
        return None
    return (
        f"dorado.port in the site, {port}, is that of each of up to {servers} servers, and of jobs that share a node "
        "only one can start its server; leave it out, and each takes a port that is free"
    )


def server_name(*, run: str, environment: Mapping[str, str], started_as: Sequence[str]) -> str:
    """Return a name that all have in common who share a server of a machine.

    They are of one run and, on Slurm, of one job: what a job starts ends with it, and each job may see its GPUs counted
    from 0. Without Slurm they see the same GPUs; and each would start the same server.
    """
    seen = (environment.get(name, "") for name in ("SLURM_JOB_ID", "CUDA_VISIBLE_DEVICES"))
    return hashlib.sha256("\0".join((run, *seen, *started_as)).encode(errors="surrogateescape")).hexdigest()[:16]


def log_suffix(host: str, environment: Mapping[str, str]) -> str:
    """Return what the names of a server's logs end with: the host and, on Slurm, the job."""
    return ".".join(filter(None, (host, environment.get("SLURM_JOB_ID"))))


def devices_of(visible: str | None) -> str:
    """Return the server's devices by CUDA_VISIBLE_DEVICES: those that it shows are counted from 0."""
    if visible is None:
        return "cuda:all"
    shown = [name for name in map(str.strip, visible.split(",")) if name and name not in ("-1", "NoDevFiles")]
    return f"cuda:{','.join(map(str, range(len(shown))))}" if shown else "cpu"


def gpus_of(device: str) -> int:
    """Return how many GPUs a server's devices are, as far as they tell: `cuda:all` counts as one."""
    kind, _, listed = device.partition(":")
    return len(listed.split(",")) if kind == "cuda" and listed else 1


@dataclass(frozen=True, slots=True)
class ModelSet:
    """What to call with: `simplex|mods|duplex`."""

    simplex: str
    mods: tuple[str, ...] = ()
    duplex: str = ""

    @classmethod
    def parse(cls, model: str, mods: Sequence[str] = ()) -> ModelSet:
        """Take apart the model of the settings, and add its modified-base models.

        Short names (`5mCG_5hmCG@v1`) belong to the simplex model and get its name in front; the version is needed.

        Raises:
            ValueError: a name is not whole; says what is missing.
        """
        simplex, bar, rest = model.partition("|")
        listed, second, duplex = rest.partition("|")
        if bar and not second:
            raise ValueError(f"engine.model: {model!r} has one bar; a set is simplex|mods|duplex, with two")
        named = tuple(filter(None, map(str.strip, listed.split(","))))
        return cls(simplex.strip(), (*named, *(_whole(simplex.strip(), mod) for mod in mods)), duplex.strip())

    @property
    def is_config(self) -> bool:
        """Whether it names one of the server's config files: those have no version, and are no path."""
        bare = not self.mods and not self.duplex and "/" not in self.simplex
        return self.simplex.endswith(".cfg") or (bare and "@" not in self.simplex)

    @property
    def config(self) -> str:
        """What the client library takes as `config`."""
        if self.is_config and not self.mods and not self.duplex:
            return self.simplex.removesuffix(".cfg")
        return f"{self.simplex}|{','.join(self.mods)}|{self.duplex}"

    @property
    def name(self) -> str:
        """The simplex model's name, without folders."""
        return self.simplex.rstrip("/").rpartition("/")[2].removesuffix(".cfg")

    @property
    def mod_names(self) -> tuple[str, ...]:
        """Names of the modified-base models, without folders."""
        return tuple(mod.rstrip("/").rpartition("/")[2] for mod in self.mods)

    @property
    def server_arguments(self) -> tuple[str, ...]:
        """What a server of our own is started with."""
        if self.is_config:
            return ("--config", f"{self.simplex.removesuffix('.cfg')}.cfg")
        mods = ("--modbase_models", ",".join(self.mods)) if self.mods else ()
        return ("--model", self.simplex, *mods)


def _whole(simplex: str, mod: str) -> str:
    if "/" in mod or mod.startswith(("dna_", "rna")):
        return mod
    if "@" not in mod:
        raise ValueError(
            f"engine.modified_bases: {mod!r} lacks its version; the basecall server wants it whole, e.g. {mod}@v1 or "
            f"{simplex}_{mod}@v1"
        )
    return f"{simplex}_{mod}"


#: Parameters of the client library that are files on the server's machine, kits or switches.
Parameters = dict[str, str | int | bool | list[str]]


def client_parameters(
    *,
    name: str,
    moves: bool,
    mods: bool,
    trim: str,
    barcode_kits: Sequence[str],
    barcodes: Sequence[str],
    barcode_both_ends: bool,
    barcode_trim: bool,
    poly_a: bool,
    poly_a_config: str | None,
    reference: str | None,
    bed: str | None,
    duplex: bool,
    file_load_timeout: int = 900,
) -> Parameters:
    """Return what `set_params` is given before connecting; the priority comes on top: the library has a type for it.

    Timeouts are short, since we mend connections ourselves: with the library's own 300 s for `reconnect_timeout`,
    connecting to where nobody listens takes minutes.
    """
    chosen: Parameters = {
        "client_name": name,
        "query_timeout": 5000,
        "connection_timeout": 5000,
        "reconnect_timeout": 5,
        "server_file_load_timeout": file_load_timeout,
        "move_enabled": moves or mods,
        "trim_adapters": trim in ("all", "adapters"),
        "trim_primers": trim == "all",
    }
    if barcode_kits:
        chosen["barcode_kits"] = list(barcode_kits)
        chosen["require_barcodes_both_ends"] = barcode_both_ends
        chosen["enable_trim_barcodes"] = barcode_trim
        if barcodes:
            chosen["barcode_list"] = list(barcodes)
    if reference:
        chosen["align_ref"] = reference
        if bed:
            chosen["bed_file"] = bed
    if poly_a:
        chosen["estimate_poly_a"] = True
        if poly_a_config:
            chosen["poly_a_config"] = poly_a_config
    if duplex:
        chosen["pair_by_channel"] = True
    return chosen


def unfit(read: Read) -> str | None:
    """Say why a read can't be given to the library; None when it can."""
    if read.signal.ndim != 1 or read.signal.dtype != "int16":
        return f"signal is {read.signal.dtype} with {read.signal.ndim} dimensions, not int16 with one"
    if not read.read_id:
        return "has no id"
    for figure, value in (("offset", read.calibration_offset), ("scale", read.calibration_scale)):
        if value != value or value in (float("inf"), float("-inf")):
            return f"calibration {figure} is {value}"
    if read.run.sample_rate <= 0:
        return f"sample rate is {read.run.sample_rate} Hz"
    if read.start_sample < 0:
        return f"starts at sample {read.start_sample}"
    return None


def packaged(read: Read, tag: int) -> dict[str, Any]:
    """Return a read as the library takes it. Floats must be floats and texts not empty, else it is a bad read."""
    optional = {
        "run_id": read.run.acquisition_id,
        "sequencing_kit": read.run.sequencing_kit,
        "end_reason": read.end_reason,
    }
    return {
        "read_tag": tag,
        "read_id": read.read_id,
        "raw_data": read.signal,
        "daq_offset": float(read.calibration_offset),
        "daq_scaling": float(read.calibration_scale),
        "sampling_rate": float(read.run.sample_rate),
        "start_time": int(read.start_sample),
        "duration": read.num_samples,
        "channel": int(read.channel),
        "mux": int(read.mux),
        **{key: value for key, value in optional.items() if value},
    }


_MODEL = re.compile(
    r"(?P<molecule>dna|rna)(?P<kit>00[24])?(_(?P<pore>r9\.4\.1|r10\.4\.1|r10\.4))?(_e8(\.\d)?)?(_(?P<speed>\d+)bps)?"
    r"(_modbases[^_]*)?(_(?P<khz>[45])khz)?_(?P<size>fast|hac|sup)(?P<rest>.*)"
)
_MODEL_VERSION = re.compile(r"@v(\d+)\.(\d+)")
_MIN_QSCORES = {"fast": 8.0, "hac": 9.0, "sup": 10.0}
_PORES = {"r9.4.1": "R9.4.1", "r10.4": "R10.4", "r10.4.1": "R10.4.1"}


def default_min_qscore(model: str) -> float:
    """Return ONT's default by the model's size, told by its name; that of hac where the name does not tell."""
    return _MIN_QSCORES[_size(model)]


def _size(model: str) -> str:
    found = re.search(r"(?<![a-z])(fast|hac|sup)(?![a-z])", model)
    return found[1] if found else "hac"


#: Samples/s that one large GPU calls, by the model's size: rough figures for estimates.
_RATES = {"fast": 3e8, "hac": 1.5e8, "sup": 2e7}


def usual_rate(model: str) -> float:
    """Return a rough rate of one large GPU, samples/s, by the model's size; hac's where the name does not tell."""
    return _RATES[_size(model)]


def fits_of(model: str) -> Fits | None:
    """Return the chemistries that a model of ONT's was made for, by its name; None when the name does not tell."""
    found = _MODEL.match(model)
    if found is None:
        return None
    speed = int(found["speed"]) if found["speed"] else None
    if found["molecule"] == "rna":
        if found["kit"] == "004":
            return Fits(molecule="rna", pores=("RNA004",), speeds=(speed or 130,), sample_rates=(4000,))
        return Fits(molecule="rna", pores=("R9.4.1",), speeds=(speed or 70,), sample_rates=(3000, 3012, 4000))
    pore = _PORES.get(found["pore"] or "")
    if pore is None:
        return None
    if pore == "R9.4.1":
        return Fits(molecule="dna", pores=(pore,), speeds=(speed or 450,), sample_rates=(4000,))
    return Fits(
        molecule="dna", pores=(pore,), speeds=(speed or 400,), sample_rates=(_rate(found["khz"], found["rest"], speed),)
    )


def _rate(khz: str | None, rest: str, speed: int | None) -> int:
    """Return the sample rate, Hz: named in config files; models are of 5 kHz from version 4.2, but those of 260 bps."""
    if khz:
        return int(khz) * 1000
    version = _MODEL_VERSION.match(rest)
    new = version is not None and (int(version[1]), int(version[2])) >= (4, 2)
    return 5000 if new and speed != 260 else 4000
