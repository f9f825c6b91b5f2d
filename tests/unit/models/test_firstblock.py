"""The first-block cache by itself, over blocks that add numbers."""

import math

import pytest
import torch
from torch import nn

from farm.models.firstblock import FirstBlockCache, Streams


class Adds(nn.Module):  # type: ignore[misc]
    """Adds to each stream what it is told, and notes that it was asked."""

    def __init__(self, *amounts: float | torch.Tensor):
        super().__init__()
        self.amounts, self.runs = list(amounts), 0


def block(each: Adds, streams: Streams) -> Streams:
    each.runs += 1
    return tuple(stream + amount for stream, amount in zip(streams, each.amounts, strict=True))


def step(cache: FirstBlockCache, blocks: list[Adds], *starts: float, tokens: int | None = None) -> list[float]:
    """Take streams of one number each through it, and return what comes out."""
    out = cache.through(blocks, tuple(torch.full((2, 3, 4), start) for start in starts), block, tokens=tokens)
    return [float(stream.mean()) for stream in out]


def test_a_first_block_that_changes_little_is_followed_by_what_the_others_added_before() -> None:
    cache, blocks = FirstBlockCache(0.1), [Adds(1.0), Adds(10.0), Adds(100.0)]
    assert step(cache, blocks, 0.0) == [111.0]
    blocks[0].amounts, blocks[1].amounts = [1.09], [20.0]
    assert step(cache, blocks, 5.0) == [pytest.approx(5.0 + 1.09 + 110.0)]
    assert [each.runs for each in blocks] == [2, 1, 1]


def test_what_a_step_is_compared_with_is_the_last_that_took_all_blocks_so_that_small_changes_add_up() -> None:
    cache, blocks = FirstBlockCache(0.1), [Adds(1.0), Adds(10.0)]
    ran = []
    for amount in (1.0, 1.06, 1.12, 1.18, 1.24):
        blocks[0].amounts = [amount]
        step(cache, blocks, 0.0)
        ran.append(blocks[1].runs)
    assert ran == [1, 1, 2, 2, 3]


def test_each_pass_of_a_step_is_compared_with_itself() -> None:
    cache, blocks = FirstBlockCache(0.1), [Adds(1.0), Adds(10.0)]
    cache.forget(passes=2)
    for amount, others in ((1.0, 10.0), (2.0, 30.0)):
        blocks[0].amounts, blocks[1].amounts = [amount], [others]
        step(cache, blocks, 0.0)
    blocks[1].amounts = [0.0]
    for amount, expected in ((1.0, 11.0), (2.0, 32.0), (1.0, 11.0), (5.0, 5.0), (1.0, 11.0), (5.0, 5.0)):
        blocks[0].amounts = [amount]
        assert step(cache, blocks, 0.0) == [expected]
    assert blocks[1].runs == 3


def test_all_streams_go_on_and_the_last_one_decides() -> None:
    cache, blocks = FirstBlockCache(0.1), [Adds(1.0, 1.0), Adds(3.0, 10.0)]
    assert step(cache, blocks, 0.0, 0.0) == [4.0, 11.0]
    blocks[0].amounts = [7.0, 1.0]
    assert step(cache, blocks, 0.0, 0.0) == [10.0, 11.0]
    blocks[0].amounts = [7.0, 2.0]
    step(cache, blocks, 0.0, 0.0)
    assert blocks[1].runs == 2


def test_of_a_stream_that_pictures_share_with_captions_the_pictures_tokens_decide() -> None:
    amounts = torch.ones(2, 3, 4)
    cache, blocks = FirstBlockCache(0.1), [Adds(amounts), Adds(10.0)]
    step(cache, blocks, 0.0, tokens=2)
    blocks[0].amounts = [amounts * torch.tensor([1.0, 1.0, 50.0])[:, None]]
    step(cache, blocks, 0.0, tokens=2)
    assert blocks[1].runs == 1
    blocks[0].amounts = [amounts * torch.tensor([1.0, 1.5, 1.0])[:, None]]
    step(cache, blocks, 0.0, tokens=2)
    assert blocks[1].runs == 2


def test_both_halves_of_a_guided_picture_decide_together() -> None:
    cache, blocks = FirstBlockCache(0.1), [Adds(torch.ones(2, 3, 4)), Adds(10.0)]
    step(cache, blocks, 0.0)
    blocks[0].amounts = [torch.tensor([1.0, 1.18])[:, None, None].expand(2, 3, 4)]  # 0.09 on average
    step(cache, blocks, 0.0)
    assert blocks[1].runs == 1


def test_what_was_kept_can_be_dropped() -> None:
    cache, blocks = FirstBlockCache(1e6), [Adds(1.0), Adds(10.0)]
    for _ in range(3):
        cache.forget()
        step(cache, blocks, 0.0)
        step(cache, blocks, 0.0)
    assert [each.runs for each in blocks] == [6, 3]


@pytest.mark.parametrize("amount", [0.0, math.nan, math.inf])
def test_what_cannot_be_compared_takes_all_blocks(amount: float) -> None:
    cache, blocks = FirstBlockCache(1e6), [Adds(amount), Adds(10.0)]
    step(cache, blocks, 0.0)
    step(cache, blocks, 0.0)
    assert blocks[1].runs == 2
