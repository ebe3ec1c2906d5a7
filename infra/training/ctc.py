"""The CTC loss of ctc.c as a torch function."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from infra.training.native import library, pointer


def ctc_loss(logits: torch.Tensor, labels: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Return the mean CTC loss per label, in nats; blank is symbol 0.

    Logits: (batch, frames, 5); labels: (batch, longest), of which the first `lengths` count.
    """
    if not logits.is_cuda:
        loss: torch.Tensor = Ctc.apply(logits, labels.numpy(), lengths.numpy())
        return loss
    batch, frames, _ = logits.shape
    every = torch.full((batch,), frames, dtype=torch.int64)
    found = logits.log_softmax(-1).transpose(0, 1), labels.long(), every, lengths.long()
    return nn.functional.ctc_loss(*found, reduction="sum", zero_infinity=True) / lengths.sum()


class Ctc(torch.autograd.Function):
    """The loss on CPUs."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: npt.NDArray[np.int8], lengths: npt.NDArray[np.int32]
    ) -> torch.Tensor:
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
