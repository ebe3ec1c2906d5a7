"""The CTC loss of ctc.c as a torch function; compiled on first use, into the training's own folder."""

from __future__ import annotations

import ctypes
import os
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch


@cache
def _library() -> ctypes.CDLL:
    source = Path(__file__).with_name("ctc.c")
    built = source.with_name("libctc.so")
    if not built.exists() or built.stat().st_mtime < source.stat().st_mtime:
        flags = ["-O3", "-march=native", "-ffast-math", "-fno-finite-math-only", "-shared", "-fPIC"]
        subprocess.run([os.environ.get("CC", "cc"), *flags, source, "-o", built, "-lm"], check=True)
    return ctypes.CDLL(str(built))


class Ctc(torch.autograd.Function):
    """Mean CTC loss per label, in nats; blank is symbol 0."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: list[npt.NDArray[np.int32]]) -> torch.Tensor:
        """Take logits (batch, frames, 5) and one array of labels per chunk."""
        p = torch.softmax(logits.detach(), -1).contiguous().numpy()
        batch, frames, _ = p.shape
        lengths = np.array([len(label) for label in labels], np.int32)
        joined = np.ascontiguousarray(np.concatenate(labels), np.int32)
        gradient = np.zeros_like(p)
        loss = np.zeros(batch)
        arrays = [a.ctypes.data_as(ctypes.c_void_p) for a in (p, joined, lengths, gradient, loss)]
        failed = _library().ctc(arrays[0], batch, frames, arrays[1], arrays[2], arrays[3], arrays[4])
        if failed < 0:
            raise MemoryError("CTC lattice")
        ctx.gradient = torch.from_numpy(gradient / np.float32(lengths.sum()))
        return torch.tensor(loss.sum() / lengths.sum(), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.gradient * outer[0], None
