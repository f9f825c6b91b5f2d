"""The Muon optimizer: momentum whose matrices are made orthogonal before each step.

After Keller Jordan's Muon (https://kellerjordan.github.io/posts/muon/). Matrices of one shape are treated as one stack,
because a small model has many small matrices.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

# The quintic of the reference implementation, which pushes all singular values near 1 in five rounds.
_QUINTIC = (3.4445, -4.7750, 2.0315)
_ROUNDS = 5


class Muon(torch.optim.Optimizer):  # type: ignore[misc]  # torch is untyped here
    """For the hidden matrices of a network; embeddings, biases, norms and outer layers belong to AdamW."""

    def __init__(self, matrices: Iterable[Tensor], *, lr: float = 0.02, momentum: float = 0.95) -> None:
        super().__init__(list(matrices), {"lr": lr, "momentum": momentum})

    def step(self) -> None:
        for group in self.param_groups:
            with torch.no_grad():
                self._step_group(group["params"], rate=group["lr"], momentum=group["momentum"])

    def _step_group(self, matrices: list[Tensor], *, rate: float, momentum: float) -> None:
        stacks: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for matrix in matrices:
            if matrix.grad is None:
                continue
            memory = self.state[matrix].setdefault("momentum", torch.zeros_like(matrix))
            memory.lerp_(matrix.grad, 1 - momentum)
            stacks[tuple(matrix.shape)].append((matrix, matrix.grad.lerp(memory, momentum)))
        for (rows, columns), members in stacks.items():
            directions = orthogonal(torch.stack([direction for _, direction in members]))
            scale = max(1.0, rows / columns) ** 0.5
            for (matrix, _), direction in zip(members, directions, strict=True):
                matrix.add_(direction.to(matrix.dtype), alpha=-rate * scale)


def orthogonal(matrices: Tensor) -> Tensor:
    """The nearest (semi-)orthogonal matrices to a stack of matrices, roughly, by Newton-Schulz rounds."""
    first, second, third = _QUINTIC
    wide = matrices.shape[-2] <= matrices.shape[-1]
    current = (matrices if wide else matrices.mT).to(torch.bfloat16)
    current = current / (current.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(_ROUNDS):
        gram = current @ current.mT
        current = first * current + (second * gram + third * gram @ gram) @ current
    return current if wide else current.mT
