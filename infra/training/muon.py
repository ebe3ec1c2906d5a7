"""Muon: momentum whose every step is brought near an orthogonal matrix (Keller Jordan and others, 2024).

It learns faster here than AdamW does (README.md). torch's own computes in bfloat16, which takes CPUs without it longer
than the network itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

#: Coefficients of the quintic Newton-Schulz iteration, and how often it is done.
_A, _B, _C, _ITERATIONS = 3.4445, -4.7750, 2.0315, 5


class Muon(torch.optim.Optimizer):
    """For matrices inside a network; `lr` is AdamW's, as steps are scaled to AdamW's usual size."""

    def __init__(self, parameters: Iterable[Any], lr: float = 1e-3, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def step(self, closure: None = None) -> None:
        """Take a step."""
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    self._step(parameter, group)

    def _step(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        gradient, state = parameter.grad, self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"].lerp_(gradient, 1 - group["momentum"])
        update = orthogonal(torch.lerp(gradient, momentum, group["momentum"]))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-0.2 * max(parameter.shape) ** 0.5 * group["lr"])


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Return about the orthogonal matrix next to `matrix`: all singular values between 0.7 and 1.2."""
    x = matrix if len(matrix) <= matrix.shape[1] else matrix.T
    x = x / (x.norm() + 1e-7)
    for _ in range(_ITERATIONS):
        square = x @ x.T
        x = _A * x + (_B * square + _C * square @ square) @ x
    return x if len(matrix) <= matrix.shape[1] else x.T
