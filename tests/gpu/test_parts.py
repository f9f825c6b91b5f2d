"""Parts that come and go, and blocks that are streamed, on a real GPU; skipped where there is none."""

import pytest
import torch

from farm.models.device import Part, Streamed
from tests.unit.models.test_device import Blocks, Nested

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")


def test_pinned_weights_come_go_and_compute_the_same() -> None:
    module, given = Blocks().to(CUDA), torch.randn(2, 4, device=CUDA)
    expected = module(given)
    module.to(CPU)
    part = Part(module, pin=True)
    for _ in range(2):
        part.move(CUDA)
        assert torch.equal(module(given), expected)
        part.move(CPU)
        assert all(tensor.is_pinned() for tensor in module.parameters())


@pytest.mark.parametrize("pin", [True, False])
def test_streamed_blocks_compute_what_resident_ones_do_and_leave_nothing_behind(pin: bool) -> None:
    module, given = Nested().to(CUDA), torch.tensor([[1, 2, 3]], device=CUDA)
    with torch.inference_mode():
        expected = module(given)
        module.to(CPU)
    streamed = Streamed(module, pin=pin)
    streamed.move(CUDA)
    for _ in range(3):  # the first traces the order, the others prefetch
        with torch.inference_mode():
            assert torch.equal(module(given), expected)
    streamed.move(CPU)
    torch.cuda.synchronize()
    assert {tensor.device.type for tensor in module.parameters()} == {"cpu"}
