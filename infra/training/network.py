"""The network: convolutions that take the rate down six-fold, recurrent layers that look both ways in turn."""

from __future__ import annotations

import torch
from torch import nn

from infra.training.squiggles import AUX


class Network(nn.Module):
    """Signal (batch, 1, samples) to logits (batch, samples / 3, 5) of the symbols NACGT, N the blank.

    `width` channels in `layers` LSTM layers. The auxiliary head, which asks each frame for the bases in the pore, only
    serves training.
    """

    def __init__(self, width: int = 96, layers: int = 4) -> None:
        super().__init__()
        self.settings = {"width": width, "layers": layers}
        self.bfloat16 = False
        self.conv1 = nn.Conv1d(1, 16, 5, padding=2, bias=False)
        self.norm1 = nn.BatchNorm1d(16)
        self.conv2 = nn.Conv1d(16, 48, 13, stride=3, padding=6, bias=False)
        self.norm2 = nn.BatchNorm1d(48)
        self.conv3 = nn.Conv1d(48, width, 10, stride=2, padding=4, bias=False)
        self.norm3 = nn.BatchNorm1d(width)
        self.lstm = nn.ModuleList([nn.LSTM(width, width) for _ in range(layers)])
        self.out = nn.Linear(width, 2 * 5)
        self.aux = nn.Linear(width, 2 * 4 * AUX)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits, and the auxiliary logits of shape (batch, samples / 3, AUX, 4)."""
        x = nn.functional.silu(self.norm1(self.conv1(x)))
        x = nn.functional.silu(self.norm2(self.conv2(x)))
        x = nn.functional.silu(self.norm3(self.conv3(x)))
        x = x.permute(2, 0, 1)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.training and self.bfloat16):
            for lstm in self.lstm:
                x, _ = lstm(x.flip(0))
        x = x.float()
        if len(self.lstm) % 2:
            x = x.flip(0)
        x = x.transpose(0, 1)
        batch, frames, _ = x.shape
        return self.out(x).reshape(batch, 2 * frames, 5), self.aux(x).reshape(batch, 2 * frames, AUX, 4)


def widened(state: dict[str, torch.Tensor], network: Network) -> dict[str, torch.Tensor]:
    """Return a narrower network's weights in the shapes of `network`, which then computes what the narrower one did.

    What is new listens to all channels, old and new; nothing old listens to what is new, yet. `network` holds the new
    weights to begin with.
    """
    old = state["norm3.weight"].shape[0]
    width = network.settings["width"]
    wide = {name: value.clone() for name, value in network.state_dict().items()}
    for name, value in state.items():
        into, gates = wide[name], 4 if name.startswith("lstm") else 1
        if into.shape == value.shape:
            into.copy_(value)
        elif name.startswith(("out.", "aux.")):
            into[:, :old], into[:, old:] = value, 0
        else:
            rows = into.view(gates, width, *into.shape[1:])
            if name.startswith("lstm") and value.ndim == 2:
                rows[:, :old, old:] = 0
                rows[:, :old, :old] = value.view(gates, old, old)
            else:
                rows[:, :old] = value.view(gates, old, *value.shape[1:])
    return wide
