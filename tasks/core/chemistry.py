"""A run's chemistry, from what its metadata says, and whether a model fits it.

Product codes and their pores: ONT's public product pages and dorado's tables of flow cells and kits (names only).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tasks.core.reads import RunInfo

#: Pore by flow cell product code; the first pattern that matches counts. Endings (M, HD) do not matter.
_FLOW_CELLS = (
    (r"FLO-(MIN|PRO|FLG)004RA", "RNA004"),
    (r"FLO-(MIN|PRO|FLG)114", "R10.4.1"),
    (r"FLO-(MIN|PRO|FLG)112", "R10.4"),
    (r"FLO-(MIN|PRO|FLG)111", "R10.3"),
    (r"FLO-(MIN10[67]|FLG001|PRO00[12]|MINSP6)", "R9.4.1"),
)
#: Pore by sequencing kit, where the flow cell does not tell.
_KITS = (
    (r".*RNA004", "RNA004"),
    (r".*RNA00[12]", "R9.4.1"),
    (r".*114(?!\d)", "R10.4.1"),
    (r".*(112(?!\d)|Q20EA)", "R10.4"),
    (r".*(108|109|110|111)(?!\d)", "R9.4.1"),
)
_RNA_KIT = re.compile(r".*(RNA00\d|DRS|DRB00\d|RPB-RNA)")
_RNA_EXPERIMENT = re.compile(r"(?<![a-z])rna")
#: MinKNOW names a protocol `…:FLO-PRO114M:SQK-LSK114:400`.
_PROTOCOL = re.compile(r":(FLO-[^:]+):([^:]*)")
#: Bases per second, where neither a tag nor the kit's name tells.
_SPEEDS = {"R9.4.1": 450, "R10.3": 400, "R10.4": 400, "R10.4.1": 400}


@dataclass(frozen=True, slots=True, kw_only=True)
class Chemistry:
    """What a run was sequenced with; None where the metadata does not say."""

    molecule: str
    pore: str | None
    #: Bases per second.
    speed: int | None
    #: Hz.
    sample_rate: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fits:
    """The chemistries that a model was made for."""

    molecule: str
    pores: tuple[str, ...]
    speeds: tuple[int, ...]
    sample_rates: tuple[int, ...]


#: Names for what a user may say of runs that do not tell: molecule, pore, bases per second.
ASSUMED = {
    "dna_r10.4.1_400bps": ("dna", "R10.4.1", 400),
    "dna_r10.4.1_260bps": ("dna", "R10.4.1", 260),
    "dna_r9.4.1_450bps": ("dna", "R9.4.1", 450),
    "rna004_130bps": ("rna", "RNA004", 130),
    "rna002_70bps": ("rna", "R9.4.1", 70),
}


def chemistry_of(run: RunInfo, assumed: str | None = None) -> Chemistry:
    """Read a run's chemistry off flow cell, kit, protocol name and tags; the flow cell wins over the kit.

    Args:
        assumed: Of ASSUMED; what a run is taken for that tells neither.
    """
    flow_cell, kit = _codes(run)
    pore = _lookup(_FLOW_CELLS, flow_cell) or _lookup(_KITS, kit)
    if pore is None and assumed is not None:
        molecule, pore, speed = ASSUMED[assumed]
        return Chemistry(molecule=molecule, pore=pore, speed=speed, sample_rate=run.sample_rate)
    if pore == "RNA004" or _RNA_KIT.match(kit):
        molecule = "rna"
    elif _RNA_EXPERIMENT.search(run.tag("experiment_type").lower()) and not (pore or "").startswith("R10"):
        molecule = "rna"  # on an R10 pore it is cDNA: there is no direct RNA
    else:
        molecule = "dna"
    return Chemistry(molecule=molecule, pore=pore, speed=_speed(run, kit, molecule, pore), sample_rate=run.sample_rate)


def mismatch(run: RunInfo, fits: Fits, model: str, assumed: str | None = None) -> str | None:
    """Say in a sentence, with the run's name, why a model does not fit; None when it does. `assumed` as above."""
    chemistry = chemistry_of(run, assumed)
    flow_cell, kit = _codes(run)
    name = f"run {run.acquisition_id[:8]} ({flow_cell or 'no flow cell code'}, {kit or 'no kit'})"
    if chemistry.molecule != fits.molecule:
        return f"{name} is {chemistry.molecule.upper()}; model {model} calls {fits.molecule.upper()}"
    if chemistry.pore is None:
        return (
            f"{name} does not tell its pore, by flow cell code or kit; model {model} calls {_listed(fits.pores)}; "
            "if you know what it is, say so with --chemistry"
        )
    if chemistry.pore not in fits.pores:
        return f"{name} has pore {chemistry.pore}; model {model} calls {_listed(fits.pores)}"
    if chemistry.speed is not None and chemistry.speed not in fits.speeds:
        return f"{name} ran at {chemistry.speed} bases/s; model {model} calls {_listed(fits.speeds)}"
    if chemistry.sample_rate not in fits.sample_rates:
        return f"{name} was sampled at {chemistry.sample_rate} Hz; model {model} takes {_listed(fits.sample_rates)}"
    return None


def _lookup(table: tuple[tuple[str, str], ...], code: str) -> str | None:
    return next((pore for pattern, pore in table if code and re.match(pattern, code)), None)


def _codes(run: RunInfo) -> tuple[str, str]:
    """Return flow cell code and kit, in capitals, from wherever the run tells them; empty where it does not."""
    protocol = _PROTOCOL.search(run.tag("exp_script_name").upper())
    told = protocol.groups() if protocol else ("", "")
    flow_cell = run.flow_cell_product_code or run.tag("flow_cell_product_code") or told[0]
    kit = run.sequencing_kit or run.tag("sequencing_kit") or told[1]
    return flow_cell.upper().replace("_", "-"), kit.upper().replace("_", "-")


def _speed(run: RunInfo, kit: str, molecule: str, pore: str | None) -> int | None:
    selected = run.tag("selected_speed_bases_per_second")
    if selected.isdigit() and int(selected):
        return int(selected)
    if kit.endswith("-260"):
        return 260
    if molecule == "rna":
        return 130 if pore == "RNA004" else 70
    return _SPEEDS.get(pore or "")


def _listed(values: tuple[object, ...]) -> str:
    return " or ".join(map(str, values))
