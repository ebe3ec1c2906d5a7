"""How fast the embedded engine calls, and in what memory: samples per CPU second of one thread.

    python -m tests.benchmarks.speed [--samples 2e6]

Calls one simulated read of that length with the bundled model, and with random weights in the shape of ONT's hac models
(LSTM-CRF of 384 features and 256 states, stride 5) at fp32 and int8. Peak memory is that of a process for each. int8 is
fast on CPUs with VNNI; the last lines say whether this is one, and what its arithmetic allows at fp32. Accuracy is
tests/benchmarks/accuracy.py's.
"""

from __future__ import annotations

import argparse
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from rich.console import Console
from rich.table import Table

from tasks.engines.catalogue import find_model
from tasks.engines.cpu import CpuEngine
from tests.engines.bonito_form import config_of, random_weights, write_model
from tests.engines.squiggles import squiggle
from tests.making import run_info

#: Multiplications with an addition that a network of hac's shape needs per sample: LSTMs, linear layer and last
#: convolution at every fifth sample, two small convolutions at each.
HAC_PRODUCTS = (5 * 2 * 4 * 384**2 + 384 * 1024 + 384 * 16 * 19) / 5 + 16 * 4 * 5 + 4 * 5


def matrix_products() -> float:
    """Return multiplications with an addition per CPU second in large fp32 matrices, numpy's BLAS."""
    matrix = np.random.default_rng(0).normal(size=(1024, 1024)).astype(np.float32)
    best = np.inf
    for _ in range(10):
        began = time.process_time()
        matrix @ matrix
        best = min(best, time.process_time() - began)
    return len(matrix) ** 3 / best


def measure(name: str | None, samples: int, int8: bool) -> tuple[float, float]:
    """Return samples per CPU second, and peak memory in MB."""
    engine = CpuEngine(find_model(name), int8=int8)
    read = squiggle(samples, run=run_info(sample_rate=4000))
    began = time.process_time()
    ((_, outcome),) = engine.basecall([read])
    spent = time.process_time() - began
    assert outcome.calls, outcome
    return samples / spent, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=float, default=2e6)
    samples = int(parser.parse_args().samples)
    table = Table("model", "samples", "samples per CPU second", "peak memory, MB")
    with TemporaryDirectory() as folder:
        hac = str(write_model(Path(folder), random_weights(1, 384, 4), form="bonito", config=config_of(384, 4)))
        for title, name, int8 in (
            ("bundled", None, False),
            ("hac's shape", hac, False),
            ("hac's shape, int8", hac, True),
        ):
            with ProcessPoolExecutor(1, get_context("spawn")) as alone:
                speed, memory = alone.submit(measure, name, samples, int8).result()
            table.add_row(title, f"{samples:,}", f"{speed:,.0f}", f"{memory:,.0f}")
    console = Console()
    console.print(table)
    cpu = Path("/proc/cpuinfo")
    if cpu.exists():
        console.print(f"VNNI: {'yes' if 'vnni' in cpu.read_text() else 'no'}")
    products = matrix_products()
    console.print(
        f"fp32 matrix products: {2 * products / 1e9:.0f} GFLOPS; all of it would give {products / HAC_PRODUCTS:,.0f} "
        "samples of hac's shape per CPU second"
    )


if __name__ == "__main__":
    main()
