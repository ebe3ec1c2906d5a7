"""Trains the bundled model: `python -m infra.training.train --help`.

A training goes by steps and a seed, never by the clock: every step draws its chunks from (seed, step), so that a
training that was stopped goes on from its last checkpoint as if it had not been. Learning rate: warm-up, constant, then
a linear descent over the last `--descent` steps; a training can be lengthened, or brought to its end, by `--steps`.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import edlib
import numpy as np
import numpy.typing as npt
import torch

from infra.training.ctc import Ctc
from infra.training.network import Network
from infra.training.reads import HELD_OUT, VALIDATION, CalledRead, Sampler, sq_f5c
from infra.training.squiggles import Chunks, Simulator

#: Steps between checkpoints, each with a look at the validation reads.
CHECKPOINT = 500
_WARM_UP = 100


class Drawing:
    """What each step sees: simulated chunks of rising difficulty, later real ones among them."""

    def __init__(self, reads: list[CalledRead], table: Path, options: argparse.Namespace) -> None:
        sequences = [r.bases for r in reads] + [(3 - r.bases[::-1]).astype(np.int8) for r in reads]
        self._simulator = Simulator(
            table,
            sequences,
            real_sequence=options.real_sequence,
            table_error=options.table_error,
            noise_spread=options.noise_spread,
        )
        self._real = Sampler(reads)
        self._options = options

    def difficulty(self, step: int) -> float:
        """Return the difficulty at a step, 0 to 1."""
        return min(1.0, step / self._options.ramp)

    def __call__(self, step: int) -> Chunks:
        """Draw the chunks of a step."""
        rng = np.random.default_rng((self._options.seed, step))
        difficulty = self.difficulty(step)
        real = round(self._options.batch * self._options.real * max(0.0, (difficulty - 0.4) / 0.6))
        parts = [self._simulator.draw(self._options.batch - real, difficulty, rng)]
        if real:
            parts.append(self._real.draw(real, rng))
        return Chunks(
            np.concatenate([p.signal for p in parts]),
            [label for p in parts for label in p.labels],
            np.concatenate([p.context for p in parts]),
        )


def learning_rate(step: int, options: argparse.Namespace) -> float:
    """Return the learning rate of a step: warm-up, constant, linear descent to a hundredth."""
    left = (options.steps - step) / options.descent
    return float(options.rate * min(1.0, (step + 1) / _WARM_UP) * max(0.01, min(1.0, left)))


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
    parser.add_argument("--data", type=Path, required=True, help="folder of sq_f5c's reads, calls and moves")
    parser.add_argument("--table", type=Path, required=True, help="uncalled4's dna_r10.4.1_400bps_9mer.npz")
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints and curve")
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--until", type=int, help="stop at this step, as if --steps were to come; default: --steps")
    parser.add_argument("--descent", type=int, default=4_000, help="steps of falling learning rate at the end")
    parser.add_argument("--ramp", type=int, default=2_000, help="steps to full difficulty")
    parser.add_argument("--batch", type=int, default=32, help="chunks per step")
    parser.add_argument("--real", type=float, default=0.4, help="share of real chunks, once all is mixed in")
    parser.add_argument("--real-sequence", type=float, default=0.15, help="share of simulated chunks of real sequence")
    parser.add_argument("--table-error", type=float, default=0.05, help="error of levels, per place and base")
    parser.add_argument("--noise-spread", type=float, default=0.3)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    reads = sq_f5c(options.data)
    validation = [r for r in reads if r.read_id.startswith(VALIDATION)]
    draw = Drawing([r for r in reads if not r.read_id.startswith(HELD_OUT + VALIDATION)], options.table, options)
    network = Network(options.width, options.layers)
    matrices = [p for p in network.parameters() if p.ndim > 1]
    vectors = [p for p in network.parameters() if p.ndim <= 1]
    optimiser = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0}])
    options.out.mkdir(parents=True, exist_ok=True)
    checkpoint = options.out / "checkpoint.pt"
    start = 0
    if checkpoint.exists():
        kept = torch.load(checkpoint, weights_only=True)
        network.load_state_dict(kept["network"])
        optimiser.load_state_dict(kept["optimiser"])
        start = kept["step"]

    losses: list[tuple[float, float]] = []
    with ThreadPoolExecutor(1) as drawer, (options.out / "curve.jsonl").open("a") as curve:
        coming = drawer.submit(draw, start)
        for step in range(start, options.until or options.steps):
            chunks = coming.result()
            coming = drawer.submit(draw, step + 1)
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(step, options)
            logits, context = network(torch.from_numpy(chunks.signal[:, None]))
            loss = Ctc.apply(logits, chunks.labels)
            asked = torch.nn.functional.cross_entropy(
                context.reshape(-1, 4), torch.from_numpy(chunks.context.reshape(-1)), ignore_index=-100
            )
            optimiser.zero_grad()
            (loss + 0.5 * asked).backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 2.0)
            optimiser.step()
            losses.append((float(loss.detach()), float(asked.detach())))
            done = step + 1
            if done % CHECKPOINT == 0 or done == (options.until or options.steps):
                point = {
                    "step": done,
                    "samples": done * options.batch * chunks.signal.shape[1],
                    "difficulty": round(draw.difficulty(step), 3),
                    "rate": learning_rate(step, options),
                    "ctc": round(float(np.mean([x for x, _ in losses])), 4),
                    "context": round(float(np.mean([y for _, y in losses])), 4),
                    "validation": round(identity(network, validation), 4),
                }
                losses.clear()
                curve.write(json.dumps(point) + "\n")
                curve.flush()
                _save(checkpoint, network, optimiser, done)


def _save(path: Path, network: Network, optimiser: torch.optim.Optimizer, step: int) -> None:
    """Write a checkpoint so that a kill leaves the old one or the new one."""
    state = {
        "network": network.state_dict(),
        "optimiser": optimiser.state_dict(),
        "step": step,
        "settings": network.settings,
    }
    torch.save(state, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


if __name__ == "__main__":
    main()
