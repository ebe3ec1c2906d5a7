"""Trains the bundled model: `python -m infra.training.train --help`.

A training goes by steps and a seed, never by the clock: every step draws its chunks from (seed, step), so that a
training that was stopped goes on from its last checkpoint as if it had not been. Learning rate: warm-up, constant, then
a linear descent over the last `--descent` steps; a training can be lengthened, or brought to its end, by `--steps`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from pathlib import Path

import edlib
import numpy as np
import numpy.typing as npt
import torch
import torch.distributed
import torch.multiprocessing
from torch import nn

from infra.training.ctc import Ctc
from infra.training.muon import Muon
from infra.training.native import library
from infra.training.network import Network, widened
from infra.training.prepared import Prepared
from infra.training.reads import CalledRead
from infra.training.squiggles import SAMPLES, Simulator

#: Steps between checkpoints, each with a look at the validation reads.
CHECKPOINT = 250
_WARM_UP = 100


def learning_rate(step: int, options: argparse.Namespace) -> float:
    """Return the learning rate of a step: warm-up, constant, linear descent to a hundredth."""
    left = (options.steps - step) / options.descent
    return float(options.rate * min(1.0, (step + 1) / _WARM_UP) * max(0.01, min(1.0, left)))


def difficulty(step: int, options: argparse.Namespace) -> tuple[float, float]:
    """Return the least and the greatest difficulty of a step: the greatest rises first, the least comes after."""
    done = min(1.0, step / options.ramp)
    return done**2, min(1.0, 8 * done)


def greedy(logits: npt.NDArray[np.float32]) -> str:
    """Decode frames (frames, 5) by the best symbol of each."""
    best = logits.argmax(-1)
    kept = best[np.insert(best[1:] != best[:-1], 0, True)]
    return "".join("NACGT"[i] for i in kept if i)


def identity(network: Network, reads: list[CalledRead]) -> float:
    """Return matches per alignment column of the network's calls against the published ones, globally aligned."""
    network.eval()
    columns = errors = 0
    with torch.no_grad():
        for read in reads:
            length = min(len(read.signal), 60_000) // 6 * 6
            truth = "".join("ACGT"[b] for b in read.bases[: np.searchsorted(read.arrivals, length)])
            call = greedy(network(torch.from_numpy(read.signal[None, None, :length]))[0][0].numpy())
            found = edlib.align(call, truth, "NW", "path") if call else None
            if found is None:
                columns, errors = columns + len(truth), errors + len(truth)
                continue
            alignment = edlib.getNiceAlignment(found, call, truth)["matched_aligned"]
            columns, errors = columns + len(alignment), errors + len(alignment) - alignment.count("|")
    network.train()
    return 1 - errors / columns


def main() -> None:
    """Train until `--steps`, from the last checkpoint in `--out` if there is one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prepared", type=Path, required=True, help="what infra.training.prepare wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoint and curve")
    parser.add_argument("--steps", type=int, default=14_000)
    parser.add_argument("--descent", type=int, default=10_500, help="steps of falling learning rate at the end")
    parser.add_argument("--ramp", type=int, default=10_000, help="steps until all is at full difficulty")
    parser.add_argument("--batch", type=int, default=16, help="chunks per step and process")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="per chunk")
    parser.add_argument("--kept", type=float, default=0.5, help="share of chunks that keep their own sequence")
    parser.add_argument("--rate", type=float, default=8e-3)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--bfloat16", action="store_true", help="for LSTMs: 1.5 times as fast, where the CPU can")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    library()  # compiled once, not by each process
    # Else glibc gives memory back to the system after every step, and a seventh of the time goes into getting it again.
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**31)}
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # numpy's threads wait for each other on cores that are taken
    with tempfile.TemporaryDirectory() as meeting:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # and with it the processes, as they are daemons
        torch.multiprocessing.spawn(train, (options, f"file://{meeting}/place"), options.processes, daemon=True)


def train(rank: int, options: argparse.Namespace, meeting: str) -> None:
    """Train as one of the processes, which see different chunks and share their gradients."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(options.seed)
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=options.processes)
    prepared = Prepared.load(options.prepared)
    made_of = prepared.reads, prepared.states, prepared.sequences, prepared.levels
    simulator = Simulator(*made_of, kept=options.kept, samples=options.samples)
    network = Network(options.width, options.layers)
    network.bfloat16 = options.bfloat16
    optimisers = optimisers_of(network)
    checkpoint = options.out / "checkpoint.pt"
    start = samples = 0
    if checkpoint.exists():
        kept = torch.load(checkpoint, weights_only=True)
        if kept["step"] >= options.steps:
            return
        network.load_state_dict(widened(kept["network"], network))
        if kept["settings"] == network.settings:
            for optimiser, state in zip(optimisers, kept["optimisers"], strict=False):  # none in one that was exported
                optimiser.load_state_dict(state)
        start, samples = kept["step"], kept["samples"]

    losses: list[tuple[float, float]] = []
    for step in range(start, options.steps):
        rng = np.random.default_rng((options.seed, step, rank))
        chunks = simulator.draw(options.batch, difficulty(step, options), rng)
        logits, context = network(torch.from_numpy(chunks.signal[:, None]))
        loss = Ctc.apply(logits, chunks.labels, chunks.lengths)
        bases = torch.from_numpy(chunks.context.reshape(-1)).long()
        asked = nn.functional.cross_entropy(context.reshape(-1, 4), bases)
        network.zero_grad()
        (loss + 0.5 * asked).backward()
        _share_gradients(network)
        nn.utils.clip_grad_norm_(network.parameters(), 2.0)
        rate = learning_rate(step, options)
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = rate
            optimiser.step()
        losses.append((float(loss.detach()), float(asked.detach())))
        done, samples = step + 1, samples + options.batch * options.processes * options.samples
        if rank == 0 and (done % CHECKPOINT == 0 or done == options.steps):
            point = {
                "step": done,
                "samples": samples,
                "difficulty": [round(end, 3) for end in difficulty(step, options)],
                "rate": rate,
                "ctc": round(float(np.mean([x for x, _ in losses])), 4),
                "context": round(float(np.mean([y for _, y in losses])), 4),
                "validation": [round(identity(network, [read]), 4) for read in prepared.validation],
            }
            losses.clear()
            with (options.out / "curve.jsonl").open("a") as curve:
                curve.write(json.dumps(point) + "\n")
            _save(checkpoint, network, optimisers, done, samples)


def optimisers_of(network: Network) -> list[torch.optim.Optimizer]:
    """Return Muon for the recurrent layers' matrices, which are most of the network, and AdamW for the rest."""
    named = dict(network.named_parameters())
    inner = [p for name, p in named.items() if name.startswith("lstm") and p.ndim == 2]
    kernels = [p for name, p in named.items() if not name.startswith("lstm") and p.ndim > 1]
    vectors = [p for p in named.values() if p.ndim == 1]
    rest = [{"params": kernels, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    return [torch.optim.AdamW(rest), Muon(inner)]


def _share_gradients(network: Network) -> None:
    """Set each process's gradients to their mean over the processes."""
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def _save(path: Path, network: Network, optimisers: list[torch.optim.Optimizer], step: int, samples: int) -> None:
    """Write a checkpoint so that a kill leaves the old one or the new one."""
    state = {
        "network": network.state_dict(),
        "optimisers": [optimiser.state_dict() for optimiser in optimisers],
        "step": step,
        "samples": samples,
        "settings": network.settings,
    }
    torch.save(state, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


if __name__ == "__main__":
    main()
