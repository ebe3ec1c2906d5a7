"""The CTC loss of ctc.c as a torch function."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from infra.training.native import library, pointer


class Ctc(torch.autograd.Function):
    """Mean CTC loss per label, in nats; blank is symbol 0."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: npt.NDArray[np.int8], lengths: npt.NDArray[np.int32]
    ) -> torch.Tensor:
        """Take logits (batch, frames, 5) and labels (batch, longest), of which the first `lengths` count."""
        p = torch.softmax(logits.detach(), -1).contiguous().numpy()
        batch, frames, _ = p.shape
        joined = np.ascontiguousarray(labels[np.arange(labels.shape[1]) < lengths[:, None]], np.int32)
        gradient = np.zeros_like(p)
        loss = np.zeros(batch)
        arrays = pointer(p), pointer(joined), pointer(lengths), pointer(gradient), pointer(loss)
        failed = library().ctc(arrays[0], batch, frames, *arrays[1:])
        if failed < 0:
            raise MemoryError("CTC lattice")
        ctx.gradient = torch.from_numpy(gradient / np.float32(lengths.sum()))
        return torch.tensor(loss.sum() / lengths.sum(), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.gradient * outer[0], None, None
