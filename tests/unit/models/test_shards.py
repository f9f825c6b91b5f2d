"""The three families through a shard, from prompts to a receipt: however a model is placed, whatever is drawn in between."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

from farm.drawing import Cancelled, NoAside
from farm.engine import Engine, OnStep, Picture
from farm.errors import CancelledError, ObjectMissingError
from farm.ledger import Ledger
from farm.models.device import Part, Streamed
from farm.models.diffusion import DiffusionFamily
from farm.models.family import open_family
from farm.placement import ALL, DECODER, DENOISER, DRAWING, ENCODER, Placement
from farm.plan import Plan
from farm.provenance import read_provenance
from farm.receipt import Receipt
from farm.shard import ShardRunner
from tests.drawing import card, ledger, numerics, on_device, plan, spec, write_tiny_zimage
from tests.newbie import write_tiny_newbie
from tests.tiny_qwen import write_tiny_qwen

WRITERS: dict[str, Callable[[Path], Path]] = {
    "z-image": write_tiny_zimage,
    "qwen-image": write_tiny_qwen,
    "newbie": write_tiny_newbie,
}
PROMPTS = [
    "a red circle",
    "a blue star on a white background",
    "a green square",
    "a red circle and " * 12,
    "the",
    "a star",
]


def laid(
    layout: Any, encode: frozenset[str], denoise: frozenset[str], decode: frozenset[str], **changes: Any
) -> Placement:
    return Placement(layout, encode, denoise, decode, 1.0, "a test", host_gib=1.0, **changes)


PLACEMENTS = {
    "resident": laid("resident", ALL, ALL, ALL),
    "the encoder beside the others": laid("phased", ALL, DRAWING, DRAWING),
    "the encoder leaves": laid("phased", ENCODER, DRAWING, DRAWING),
    "the encoder on the CPU": laid("phased", DRAWING, DRAWING, DRAWING, on_cpu=ENCODER),
    "one part at a time": laid("phased", ENCODER, DENOISER, DECODER),
    "block by block": laid("streamed", ENCODER, DENOISER, DECODER, streamed=DENOISER),
    "the encoder block by block": laid("streamed", ENCODER, DRAWING, DRAWING, streamed=ENCODER),
    "encoder and denoiser block by block": laid("streamed", ENCODER, DENOISER, DECODER, streamed=ENCODER | DENOISER),
}


class Tracked(Part):
    """A part that says whether it was brought to the device, which on a CPU is no other place, and computes nowhere else."""

    def __init__(self, module: nn.Module, *, pin: bool = False):
        super().__init__(module)
        self.there, self.anywhere = False, False
        for leaf in module.modules():
            if not list(leaf.children()):
                leaf.register_forward_pre_hook(self._look)

    def move(self, device: torch.device) -> None:
        self.there = device.index is not None  # "cpu:0" is the device, and "cpu" is host memory

    def _look(self, leaf: nn.Module, given: Any) -> None:
        assert self.there or self.anywhere, f"{type(leaf).__name__} computes while it is off the device"


@pytest.fixture(scope="module", params=WRITERS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, WRITERS[request.param](tmp_path_factory.mktemp("model"))


@pytest.fixture
def opened(model: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> Callable[[Placement], Engine]:
    """Opens a loaded engine, placed as said."""
    kind, folder = model
    monkeypatch.setattr("farm.models.zimage.packs", lambda device, dtype: False)  # packed blocks are not streamed

    def open_placed(placement: Placement) -> Engine:
        monkeypatch.setattr("farm.models.diffusion.place", lambda *_, **__: placement)
        monkeypatch.setattr("farm.models.diffusion.Part", Tracked)
        described = card(folder, family=kind)
        family = open_family(described, numerics(), device="cpu:0", vram_gib=16.0)
        engine = Engine(described, numerics(), "cpu:0", 16.0, family=family)
        engine.load()
        assert isinstance(family, DiffusionFamily)
        if placement.on_cpu:
            cast(Tracked, family._parts["encoder"]).anywhere = True
        for part in placement.streamed:
            Streamed(getattr(family._modules, part)).stream_to(torch.device("cpu"))  # `move` streams to GPUs alone
        return engine

    return open_placed


def run(store: Ledger, planned: Plan, engine: Engine, **changes: Any) -> Receipt:
    arguments: dict[str, Any] = {"pass_number": 1, "shard": 0, "attempt": 1, "on_device": on_device()}
    runner = ShardRunner(store, planned, renderer="renderer-1", device="cpu")
    return runner.run(**arguments | {"engine": lambda _: engine} | changes)


def parts_of(engine: Engine) -> dict[str, Part | Streamed]:
    family = engine._family
    assert isinstance(family, DiffusionFamily)
    return family._parts


def digests(receipt: Receipt) -> list[str | None]:
    return [row.sha256 for row in receipt.rows]


class CutIn(NoAside):
    """Draws the same picture after each step of the shard, where that may be."""

    def __init__(self, engine: Engine):
        self.pictures: list[Picture] = []
        self._urgent = engine.batches([spec(99, "a black star", width=96, guidance_scale=3.0)])[0]

    def at_step(self, engine: Engine, on_step: OnStep, cancelled: Cancelled) -> float:
        inner = engine.inside()
        if inner is not None and engine.fits_within_a_step(self._urgent):
            inner.render_batch(self._urgent, on_picture=self.pictures.append, on_step=on_step, cancelled=lambda: False)
        return 0.0


def test_every_placement_ends_in_the_same_pictures_and_a_receipt_that_names_them(
    opened: Callable[[Placement], Engine], tmp_path: Path
) -> None:
    planned = plan(PROMPTS, shard_images=len(PROMPTS))
    found: dict[str, list[str | None]] = {}
    for name, placement in PLACEMENTS.items():
        store = ledger(tmp_path / name)
        engine = opened(placement)
        receipt = run(store, planned, engine)
        assert store.receipt(planned, 1, 0) == receipt
        assert [(row.index, row.status, row.error_code) for row in receipt.rows] == [(i, "ok", None) for i in range(6)]
        for row in receipt.rows:
            assert row.object is not None
            assert read_provenance(store.store.get(row.object)).prompt == PROMPTS[row.index]
        assert min(receipt.seconds[stage] for stage in ("encode", "denoise", "decode")) > 0
        found[name] = digests(receipt)
        parts = {part: tracked for part, tracked in parts_of(engine).items() if isinstance(tracked, Tracked)}
        assert {part for part, tracked in parts.items() if tracked.there} == placement.decode & parts.keys()
    assert {name for name, pictures in found.items() if pictures != found["resident"]} == set()
    assert len(set(found["resident"])) == len(PROMPTS)


@pytest.mark.parametrize("name", ["resident", "the encoder on the CPU", "the encoder leaves", "one part at a time"])
def test_what_is_drawn_within_steps_leaves_a_shard_byte_for_byte_as_it_was(
    opened: Callable[[Placement], Engine], tmp_path: Path, name: str
) -> None:
    planned = plan(PROMPTS, shard_images=len(PROMPTS))
    engine = opened(PLACEMENTS[name])
    undisturbed = run(ledger(tmp_path / "undisturbed"), planned, engine)
    aside = CutIn(engine)
    disturbed = run(ledger(tmp_path / "disturbed"), planned, engine, aside=aside)
    assert digests(disturbed) == digests(undisturbed)
    alone: list[Picture] = []
    engine.render([aside._urgent.specs[0]], on_picture=alone.append)
    may = {"resident": True, "the encoder on the CPU": True}.get(
        name, False
    )  # else it is not encoded, or has no decoder
    assert bool(aside.pictures) is may
    assert all((picture.pixels == alone[0].pixels).all() for picture in aside.pictures)


def test_a_shard_that_is_taken_away_ends_within_a_step_and_leaves_no_receipt(
    opened: Callable[[Placement], Engine], tmp_path: Path
) -> None:
    planned, engine = plan(PROMPTS, shard_images=len(PROMPTS)), opened(PLACEMENTS["the encoder leaves"])
    store, steps = ledger(tmp_path), list[int]()

    class Steps(NoAside):
        def at_step(self, engine: Engine, on_step: OnStep, cancelled: Cancelled) -> float:
            steps.append(len(steps))
            return 0.0

    with pytest.raises(CancelledError):
        run(store, planned, engine, aside=Steps(), cancelled=lambda: len(steps) >= 2)
    assert len(steps) == 2
    with pytest.raises(ObjectMissingError):
        store.receipt(planned, 1, 0)
    again = run(store, planned, engine)
    assert digests(again) == digests(run(ledger(tmp_path / "other"), planned, opened(PLACEMENTS["resident"])))
