"""The first-block cache: a step whose first block does nearly what it did before takes from then what the others did.

By ParaAttention (github.com/chengzeyi/ParaAttention), as diffusers has it in hooks that know neither Z-Image's blocks nor
another picture between two steps. Here what is kept is one drawing's, from its first step to its last, and nothing of it is in
the model. One decision is for all that passes the denoiser at once, and rounding may turn it: hence one picture at a
time, with guidance both of its halves, so that no other picture has a part in it.
"""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Streams = tuple[torch.Tensor, ...]
"""What goes through the blocks, each images x tokens x features; the picture is in the last."""
Through = Callable[[Any, Streams], Streams]
"""Takes streams through one block."""


@dataclass(frozen=True, slots=True)
class _Kept:
    """Of the last step that took all blocks: what the first one added to the picture, and the others to each stream."""

    first: torch.Tensor
    others: Streams


class FirstBlockCache:
    """What one drawing keeps between its steps.

    `threshold`: the others are left out where the first block adds what it then did but for less than this share of it, both on
    average over the picture.
    """

    def __init__(self, threshold: float):
        self._threshold = threshold
        self.forget()

    def forget(self, *, passes: int = 1) -> None:
        """Drop what was kept of the last batch. `passes`: how often a step of the next one goes through the denoiser."""
        self._kept: deque[_Kept] = deque()
        self._passes = passes

    def through(
        self, blocks: Iterable[nn.Module], streams: Streams, block: Through, *, tokens: int | None = None
    ) -> Streams:
        """Take streams through all blocks or the first alone. `tokens`: of the last stream are the picture's, the first ones."""
        first, *others = blocks
        after = block(first, streams)
        added = after[-1][:, :tokens] - streams[-1][:, :tokens]
        kept = self._kept.popleft() if len(self._kept) == self._passes else None  # of this pass, a step ago
        if kept is not None and _change(kept.first, added) < self._threshold:
            self._kept.append(kept)
            return tuple(one + more for one, more in zip(after, kept.others, strict=True))
        del kept  # the others need the room
        ends = after
        for each in others:
            ends = block(each, ends)
        self._kept.append(_Kept(added, tuple(end - one for end, one in zip(ends, after, strict=True))))
        return ends


def _change(before: torch.Tensor, now: torch.Tensor) -> float:
    """Return the mean difference over the mean of what was; where that was nothing NaN or infinite, and so below nothing."""
    differs = (now - before).abs().mean(dtype=torch.float32)
    return float(differs / before.abs().mean(dtype=torch.float32))
