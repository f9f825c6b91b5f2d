"""The engine on a real GPU, with a tiny model; skipped where there is none."""

from pathlib import Path

import numpy as np
import pytest
import torch

from farm.engine import Engine, Picture
from farm.errors import OutOfMemoryError
from farm.models.device import GIB, Device, Part
from farm.models.zimage import ZImageFamily
from farm.placement import DRAWING, Placement
from tests.drawing import card, numerics, spec, write_tiny_zimage

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")

CUDA_CARD = {"dtypes": {"cuda": ("float32",)}, "batch": {"cuda": 4}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_zimage(tmp_path_factory.mktemp("tiny"))


def draw(engine: Engine) -> list[Picture]:
    pictures: list[Picture] = []
    engine.render([spec(i, f"a {word} circle") for i, word in enumerate(["red", "blue"])], on_picture=pictures.append)
    return pictures


def test_the_gpu_draws_what_the_cpu_draws(folder: Path) -> None:
    gpu = Engine(card(folder, **CUDA_CARD), numerics(device="cuda"), "cuda:0", 16.0)
    cpu = Engine(card(folder), numerics(), "cpu", 16.0)
    gpu.load()
    cpu.load()
    for one, other in zip(draw(gpu), draw(cpu), strict=True):
        assert np.abs(one.pixels.astype(int) - other.pixels.astype(int)).max() <= 4


def test_phases_change_no_pixel_and_leave_nothing_behind(folder: Path) -> None:
    resident = ZImageFamily(card(folder, **CUDA_CARD), numerics(device="cuda"), device="cuda:0", vram_gib=16.0)
    resident.load()
    phased = ZImageFamily(card(folder, **CUDA_CARD), numerics(device="cuda"), device="cuda:0", vram_gib=16.0)
    phased.load()
    phased.placement = Placement("phased", frozenset({"encoder"}), DRAWING, DRAWING, 1.0, "a test")
    phased.encodes_ahead = True
    modules = phased._modules
    phased._parts = {name: Part(getattr(modules, name).to("cpu")) for name in ("encoder", "denoiser", "decoder")}
    engines = [
        Engine(card(folder), numerics(device="cuda"), "cuda:0", 16.0, family=family) for family in (resident, phased)
    ]
    ours, theirs = (draw(engine) for engine in engines)
    assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(ours, theirs, strict=True))
    assert next(modules.encoder.parameters()).device.type == "cpu"


def test_a_batch_drawn_within_each_step_changes_no_pixel_on_the_gpu(folder: Path) -> None:
    engine = Engine(card(folder, **CUDA_CARD), numerics(device="cuda"), "cuda:0", 16.0)
    engine.load()
    inner = engine.inside()
    assert inner is not None
    undisturbed, within, disturbed = draw(engine), list[Picture](), list[Picture]()
    urgent = inner.batches([spec(7, "green", width=96, guidance_scale=4.0)])[0]

    def between_steps() -> float:
        engine.synchronize()
        inner.render_batch(urgent, on_picture=within.append, on_step=lambda step: None, cancelled=lambda: False)
        return 0.001

    engine.render_batch(
        engine.batches([picture.spec for picture in undisturbed])[0],
        on_picture=disturbed.append,
        on_step=lambda step: None,
        cancelled=lambda: False,
        between_steps=between_steps,
    )
    alone: list[Picture] = []
    engine.render(urgent.specs, on_picture=alone.append)
    assert len(within) == 4  # the last one after decoding
    pairs = (*zip(disturbed, undisturbed, strict=True), *((each, alone[0]) for each in within))
    assert all(np.array_equal(one.pixels, other.pixels) for one, other in pairs)


def test_torch_is_held_to_the_budget() -> None:
    device = Device("cuda:0", vram_gib=3.0)
    device.hold_to_budget()
    with pytest.raises(OutOfMemoryError, match="no memory left on cuda:0 to fill it"), device.errors("fill it"):
        torch.empty(int(2.5 * GIB), dtype=torch.uint8, device="cuda:0")
    torch.empty(int(1.5 * GIB), dtype=torch.uint8, device="cuda:0")
    torch.cuda.set_per_process_memory_fraction(1.0)
