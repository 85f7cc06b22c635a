"""Modules that no library has.

Tensors of every kind, a convolution, and one that takes as much memory as it is told.

Saved with their file as code, so this imports nothing but torch.
"""

from __future__ import annotations

import torch


class Odd(torch.nn.Module):
    """Tensors in every place of a module, tied and in views, and one island of float64."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(8, 8)
        self.tied = torch.nn.Linear(8, 8, bias=False)
        self.tied.weight = self.first.weight
        self.counted: torch.Tensor
        self.passing: torch.Tensor
        self.fine: torch.Tensor
        self.register_buffer("counted", torch.linspace(0, 1, 8))
        self.register_buffer("passing", torch.linspace(1, 2, 8), persistent=False)
        self.register_buffer("fine", torch.linspace(0, 1, 8, dtype=torch.float64))
        self.register_buffer("untouched", torch.ones(2))
        self.unused = torch.nn.Linear(2, 2)
        self.plain = torch.linspace(2, 3, 8)
        self.places = torch.arange(8).flip(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, 8) → (rows, 8)."""
        hidden = torch.tanh(self.first(x)) * self.counted + self.passing
        return (self.tied(hidden) + self.plain + self.fine.to(hidden.dtype))[:, self.places]


class Convolution(torch.nn.Module):
    """What cuDNN computes in TF32 unless somebody says otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(8, 64, 3, padding=1),
            torch.nn.ReLU(),
            torch.nn.Conv2d(64, 64, 3, padding=1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, 8, 16, 16) → (rows, 64)."""
        return self.layers(x).mean((2, 3))


class Greedy(torch.nn.Module):
    """Takes 4 MiB for each 8 tokens of a row, padding included, while it runs; 16 MiB at rest."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.linspace(-1, 1, 1000)[:, None].repeat(1, 4))
        self.weight = torch.nn.Parameter(torch.ones(1 << 22))

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """(rows, tokens) → (rows, tokens, 4)."""
        hidden = self.table[input_ids]
        hidden.mean(2)[:, ::8, None] * self.weight[: 1 << 20]
        return {"last_hidden_state": hidden}
