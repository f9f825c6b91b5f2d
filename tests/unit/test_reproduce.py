"""Rendering a picture again from its own provenance."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from farm.engine import Engine
from farm.errors import PictureError
from farm.manifest import Output
from farm.modelcard import ModelCard
from farm.plan import Numerics
from farm.provenance import PictureFile, read_picture
from farm.reproduce import compare, reproduce
from farm.shard import ShardRunner
from tests.drawing import FakeFamily, card, engine, ledger, on_device, plan


def stored_picture(folder: Path, output: Output | None = None, **numerics: Any) -> PictureFile:
    store, planned = ledger(folder), plan(["a red circle"], output=output, **numerics)
    receipt = ShardRunner(store, planned, renderer="r", device="cpu").run(
        pass_number=1, shard=0, attempt=1, engine=lambda _: engine(FakeFamily()), on_device=on_device()
    )
    return read_picture(store.store.get(str(receipt.rows[0].object)))


def fake_engine(card: ModelCard, numerics: Numerics) -> Engine:
    return Engine(card, numerics, "cpu", 16.0, family=FakeFamily())


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
def test_a_picture_is_reproduced_exactly_from_its_file(tmp_path: Path, form: Any) -> None:
    picture = stored_picture(tmp_path, Output(format=form), batch=1)
    result = reproduce(picture, card(), engine=fake_engine)
    assert (result.identical, result.max_difference, result.differing, result.notes) == (True, 0, 0.0, ())


def test_a_difference_is_measured_in_levels_and_share_of_pixels(tmp_path: Path) -> None:
    picture = stored_picture(tmp_path)
    pixels = picture.pixels.copy()
    pixels[:16, 0, 1] ^= 1
    result = compare(picture, pixels)
    assert (result.identical, result.max_difference) == (False, 1)
    assert result.differing == pytest.approx(16 / 4096)


def test_a_lossy_file_is_compared_after_the_same_loss(tmp_path: Path) -> None:
    picture = stored_picture(tmp_path, Output(format="jpeg", quality=50))
    other = reproduce(picture, card(), engine=fake_engine).pixels.copy()
    other[0, 0, 0] ^= 1
    result = compare(picture, other)
    assert not result.identical
    assert result.differing < 0.05


def test_what_is_not_as_it_was_is_said(tmp_path: Path) -> None:
    picture = stored_picture(tmp_path, versions={"torch": "1.0"}, device="cuda")
    result = reproduce(picture, card(max_sequence_length=32), engine=fake_engine)
    assert result.identical
    torch, device, model, batch = result.notes
    assert torch.startswith("torch was 1.0 and is ")
    assert device == "it was rendered on cuda and this is cpu"
    assert model == "the model is not the one it was rendered with: max_sequence_length differ"
    assert batch.startswith("rendered alone; ")


def test_a_resized_file_is_refused(tmp_path: Path) -> None:
    picture = stored_picture(tmp_path)
    small = PictureFile(np.ascontiguousarray(picture.pixels[::2, ::2]), picture.provenance)
    with pytest.raises(PictureError, match="the file is 32x32 and its provenance says 64x64"):
        reproduce(small, card(), engine=fake_engine)
