"""Weights in host memory, laid out so that copies to a GPU are quick: pinned, in blocks without waste.

Torch's allocator of pinned memory rounds every block up to a power of two: 33 MiB take 64. Here many tensors share blocks that
are powers of two themselves.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

log = logging.getLogger(__name__)

BLOCK_BYTES = 2**30
"""The largest block, where no single tensor is larger."""
SMALLEST_BLOCK_BYTES = 2**20
ALIGNMENT = 512
"""Where a tensor begins, as torch's own allocators have it."""


@dataclass(frozen=True, slots=True)
class Layout:
    """`blocks`: their sizes in bytes; `places`: for each tensor its block and its offset there."""

    blocks: tuple[int, ...]
    places: tuple[tuple[int, int], ...]


def layout(sizes: Sequence[int]) -> Layout:
    """Lay tensors of these bytes out in blocks that are powers of two, the largest first, each where it first fits."""
    blocks: list[int] = []
    used: list[int] = []
    places: dict[int, tuple[int, int]] = {}
    left = sum(_aligned(size) for size in sizes)
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        size = _aligned(sizes[index])
        found = next((b for b, block in enumerate(blocks) if used[b] + size <= block), None)
        if found is None:
            found = len(blocks)
            wanted = min(BLOCK_BYTES, max(SMALLEST_BLOCK_BYTES, 1 << (left.bit_length() - 1)))
            blocks.append(max(wanted, 1 << (size - 1).bit_length()))
            used.append(0)
        places[index] = found, used[found]
        used[found] += size
        left -= size
    return Layout(tuple(blocks), tuple(places[index] for index in range(len(sizes))))


def packed(tensors: Sequence[torch.Tensor], *, pin: bool) -> list[torch.Tensor]:
    """Return equal tensors with the same strides in shared blocks; a tensor with gaps is returned as it is.

    `pin`: in pinned memory. Where the system gives no more of that, the tensors come back as they are.
    """
    dense = [place for place, tensor in enumerate(tensors) if _is_dense(tensor)]
    laid = layout([tensors[place].nbytes for place in dense])
    try:
        blocks = [torch.empty(size, dtype=torch.uint8, pin_memory=pin) for size in laid.blocks]
    except RuntimeError as exc:
        log.warning("weights are not pinned, copies are slower", extra={"reason": " ".join(str(exc).split())[:200]})
        return list(tensors)
    result = list(tensors)
    for place, (block, offset) in zip(dense, laid.places, strict=True):
        tensor = tensors[place]
        flat = blocks[block][offset : offset + tensor.nbytes].view(tensor.dtype)
        result[place] = flat.as_strided(tensor.size(), tensor.stride(), flat.storage_offset()).copy_(tensor)
    return result


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether its elements, in some order of its sides, fill one stretch of memory."""
    sides = sorted(zip(tensor.stride(), tensor.size(), strict=True))
    expected = 1
    for stride, size in sides:
        if size != 1 and stride != expected:
            return False
        expected *= size
    return bool(tensor.numel() > 0)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
