"""A shard that is cut into stores the same bytes, by the bundled model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from farm.engine import Engine, Picture
from farm.errors import (
    CancelledError,
    OutOfMemoryError,
    RenderError,
)
from farm.plan import Plan
from farm.portion import Answer
from farm.provenance import read_picture
from tests.drawing import plan
from tests.unit.cutin.cutting_in import PROMPTS, Device, at_denoise, loaded, portion, run_shard


@pytest.fixture(scope="module")
def sketch() -> Engine:
    return loaded(batch=2)


def sketch_plan(**params: Any) -> Plan:
    planned = plan(PROMPTS, batch=2)
    return planned.model_copy(update={"params": planned.params.model_copy(update=params)})


@pytest.mark.parametrize("guidance", [2.0, 0.0], ids=["guided", "unguided"])
@pytest.mark.parametrize(
    "inner",
    [
        {"images": 1},
        {"images": 3, "guidance_scale": 4.0, "width": 96, "num_inference_steps": 5},
        {"images": 2, "guidance_scale": 0.0},
    ],
    ids=["alike", "another shape, guided", "unguided"],
)
def test_a_shard_with_urgent_images_within_its_steps_stores_the_same_bytes(
    tmp_path: Path, device: Device, sketch: Engine, inner: dict[str, Any], guidance: float
) -> None:
    planned = sketch_plan(guidance_scale=guidance)
    undisturbed = run_shard(tmp_path / "a", planned, sketch)
    futures: list[Any] = []

    def cut() -> None:
        futures.append(device.draw(portion(f"t{len(futures)}", **inner)))

    cuts = (at_denoise(1, cut), at_denoise(4, cut))
    disturbed = run_shard(
        tmp_path / "b",
        planned,
        sketch,
        device=device,
        on_progress=lambda progress: [each(progress) for each in cuts],
    )
    assert [row.sha256 for row in disturbed.rows] == [row.sha256 for row in undisturbed.rows]
    answers: list[Answer] = [future.result(10) for future in futures]
    assert [len(answer.images) for answer in answers] == [inner["images"]] * 2
    assert device.waits("step") == 2


def test_an_urgent_image_drawn_within_a_step_is_the_one_that_the_engine_draws_by_itself(
    tmp_path: Path, device: Device, sketch: Engine
) -> None:
    asked = portion(prompts=["a red circle"], seed=42)
    alone: list[Picture] = []
    sketch.render(asked.specs, on_picture=alone.append)
    futures: list[Any] = []
    run_shard(
        tmp_path,
        sketch_plan(),
        sketch,
        device=device,
        on_progress=at_denoise(2, lambda: futures.append(device.draw(asked))),
    )
    found = read_picture(futures[0].result(10).images[0].data)
    assert np.array_equal(found.pixels, alone[0].pixels)
    assert (found.provenance.seed, found.provenance.plan, found.provenance.prompt) == (42, "", "a red circle")


def test_a_shard_whose_urgent_image_was_dropped_or_failed_midway_stores_the_same_bytes(
    tmp_path: Path, device: Device, sketch: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = sketch_plan()
    undisturbed = run_shard(tmp_path / "a", planned, sketch)
    inner = sketch.inside()
    assert inner is not None
    real, calls = inner.render_batch, []

    def meddled(batch: Any, *, on_step: Any, **options: Any) -> Any:
        calls.append(batch.specs[0].prompt)

        def trouble(step: Any) -> None:
            on_step(step)
            if step.stage == "denoise" and step.step == 2:
                match batch.specs[0].prompt:
                    case "dropped":
                        device.queue.drop("t1")
                    case "broken":
                        raise RenderError("it cannot be drawn")
                    case _:
                        raise OutOfMemoryError("none left")

        return real(batch, on_step=trouble, **options)

    monkeypatch.setattr(inner, "render_batch", meddled)
    futures: list[Any] = []

    def cut() -> None:
        futures.append(device.draw(portion("t1", prompts=["dropped"])))
        futures.append(device.draw(portion("t2", prompts=["broken"], owner="bob", width=96)))
        futures.append(device.draw(portion("t3", prompts=["large"], owner="cid", width=128)))

    disturbed = run_shard(tmp_path / "b", planned, sketch, device=device, on_progress=at_denoise(1, cut))
    assert [row.sha256 for row in disturbed.rows] == [row.sha256 for row in undisturbed.rows]
    assert isinstance(futures[0].exception(10), CancelledError)
    failed = futures[1].result(10).images[0]
    assert (failed.error_code, failed.error_message, failed.data) == ("render", "it cannot be drawn", b"")
    # What has no memory beside the batch in hand is drawn after it.
    assert futures[2].result(10).images[0].error_code is None
    assert calls == ["dropped", "broken", "large"]
