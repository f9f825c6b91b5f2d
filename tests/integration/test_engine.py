"""The bundled model through the whole path: card, engine, shard, files, and back again by `reproduce`."""

from pathlib import Path

import numpy as np

from farm.devices import local_device, numerics_for
from farm.engine import Engine
from farm.modelcard import find_card
from farm.provenance import read_picture
from farm.reproduce import reproduce
from farm.settings import Settings
from farm.shard import ShardRunner
from farm.weights import pinned
from tests.drawing import ledger, on_device, plan

PROMPTS = ["a red circle on a white background", "a small blue star left of a green square", "two yellow triangles"]


def test_the_bundled_model_renders_a_shard_and_its_files_reproduce(tmp_path: Path) -> None:
    device = local_device()
    bundled = pinned(find_card("sketch", Settings()))
    numerics = numerics_for(bundled, device=device, renderers=1)
    name = "cuda:0" if device.kind == "cuda" else "cpu"
    planned = plan(PROMPTS).model_copy(update={"card": bundled, "numerics": numerics, "params": bundled.defaults})
    engine = Engine(bundled, numerics, name, 16.0)
    engine.load()
    store = ledger(tmp_path)
    receipt = ShardRunner(store, planned, renderer="r", device=name).run(
        pass_number=1, shard=0, attempt=1, engine=lambda _: engine, on_device=on_device()
    )
    assert [(row.status, row.flag) for row in receipt.rows] == [("ok", None)] * 3
    assert len({row.phash for row in receipt.rows}) == 3
    picture = read_picture(store.store.get(str(receipt.rows[1].object)))
    again = reproduce(picture, bundled, engine=lambda card, numerics: Engine(card, numerics, name, 16.0), device=name)
    assert again.max_difference <= 1
    assert again.differing < 0.01
    assert picture.provenance.model["revision"] == bundled.source.revision
    assert np.ptp(picture.pixels) > 50
