"""What both training stages share: a budget of minutes, a running average of weights, checkpoints.

Knows nothing of models or data. A stage that is stopped and resumed continues its schedule where it stood, because
schedules are functions of the share of the budget that is spent and the spent seconds are part of the checkpoint.
"""

import math
import os
import time
from pathlib import Path

import torch
from torch import nn


class Budget:
    """Counts the seconds that a stage has trained against the seconds it may."""

    def __init__(self, minutes: float, *, spent_s: float = 0.0) -> None:
        self._budget_s = minutes * 60
        self._start = time.monotonic() - spent_s

    @property
    def spent_s(self) -> float:
        return time.monotonic() - self._start

    @property
    def share(self) -> float:
        """The spent share of the budget, from 0 to 1."""
        return min(1.0, self.spent_s / self._budget_s)

    @property
    def over(self) -> bool:
        return self.spent_s >= self._budget_s


def hold_then_cosine(share: float, *, hold: float, warm_up: float = 0.01) -> float:
    """A learning-rate factor: a short linear start, 1 until `hold`, then half a cosine to 0."""
    if share < warm_up:
        return max(0.05, share / warm_up)
    if share < hold:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (share - hold) / (1 - hold))))


class Average:
    """An exponential moving average of the floating-point parameters of modules."""

    def __init__(self, modules: dict[str, nn.Module], *, decay: float) -> None:
        self._decay = decay
        self._modules = modules
        self._steps = 0
        self._mean = {
            name: {key: value.detach().clone() for key, value in module.state_dict().items()}
            for name, module in modules.items()
        }

    def update(self) -> None:
        # A young average leans on recent weights, or it would carry the random start along.
        self._steps += 1
        decay = min(self._decay, (1 + self._steps) / (10 + self._steps))
        for name, module in self._modules.items():
            mean = self._mean[name]
            for key, value in module.state_dict().items():
                if value.is_floating_point():
                    mean[key].lerp_(value.detach(), 1 - decay)

    def state_dict(self) -> dict[str, dict[str, torch.Tensor]]:
        return self._mean

    def load_state_dict(self, state: dict[str, dict[str, torch.Tensor]], *, steps: int) -> None:
        self._mean = state
        self._steps = steps


def save_checkpoint(path: Path, state: dict[str, object]) -> None:
    """Write a checkpoint so that a reader sees either the previous or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)
