"""Host memory for weights, laid out in blocks that torch does not round up."""

from itertools import pairwise

import pytest
import torch

from farm.models.hostcopy import BLOCK_BYTES, layout, packed

MIB = 2**20


def test_blocks_are_powers_of_two_and_no_two_tensors_overlap() -> None:
    layer = [20 * MIB, 5 * MIB, 5 * MIB, 20 * MIB, 47 * MIB + 300, 47 * MIB, 47 * MIB, 5120, 5120, 256, 256]
    sizes = [742 * MIB, *layer * 36, 5120]  # as a text encoder of four billion weights has them
    laid = layout(sizes)
    assert all(block & (block - 1) == 0 for block in laid.blocks)
    stretches = sorted((*place, size) for place, size in zip(laid.places, sizes, strict=True))
    for (block, offset, size), (later_block, later, _) in pairwise(stretches):
        assert block != later_block or offset + size <= later
    assert all(offset + size <= laid.blocks[block] for block, offset, size in stretches)
    assert sum(laid.blocks) < 1.05 * sum(sizes)


def test_a_tensor_beyond_the_largest_block_shares_its_own_with_others() -> None:
    laid = layout([BLOCK_BYTES + 40 * MIB, *[100 * MIB] * 9])
    assert laid.blocks == (2 * BLOCK_BYTES,)
    assert layout([]).blocks == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_packed_tensors_are_equal_and_keep_their_strides(dtype: torch.dtype) -> None:
    across = torch.arange(24).to(dtype).reshape(4, 6).T
    picture = torch.arange(96).to(dtype).reshape(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    gaps = torch.arange(20).to(dtype)[::2]
    single = torch.tensor(3).to(dtype)
    given = [across, picture, gaps, single, torch.empty(0, dtype=dtype)]
    found = packed(given, pin=False)
    for one, other in zip(found, given, strict=True):
        assert torch.equal(one, other)
        assert (one.stride(), one.dtype) == (other.stride(), other.dtype)
    assert found[2] is gaps
    assert found[0].untyped_storage()._cdata == found[1].untyped_storage()._cdata


def test_weights_stay_as_they_are_where_no_memory_can_be_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("CUDA error: out of memory")

    given = [torch.ones(4)]
    monkeypatch.setattr("farm.models.hostcopy.torch.empty", refuses)
    assert packed(given, pin=True)[0] is given[0]
