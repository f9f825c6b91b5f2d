"""Urgent images drawn within a shard's steps, between its batches and on a free device."""

import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from farm.cores import Cores, Place
from farm.cutin import CutIn
from farm.drawing import ShardProgress
from farm.engine import Engine, Picture
from farm.engines import Engines
from farm.errors import (
    CancelledError,
    DeviceLostError,
    ModelCardError,
    OutOfMemoryError,
    PlacementError,
    RendererDiedError,
    RenderError,
)
from farm.manifest import Output
from farm.meters import Meters
from farm.plan import ImageSpec, Plan
from farm.portion import Answer, Portion
from farm.provenance import read_picture
from farm.receipt import Receipt
from farm.shard import ShardRunner
from farm.urgent import Share, UrgentQueue
from tests.drawing import FakeFamily, card, ledger, numerics, on_device, plan, spec

PROMPTS = ["a red circle", "a blue star on the white background", "a green square", "two black stars"]


class Device:
    """A device's places, engines and urgent queue, joined as a renderer joins them. `lost`: its process was to end."""

    def __init__(self, *, cores: int = 1, share: Share | None = None):
        changed = threading.Condition()
        self.meters = Meters("r", "i")
        self.queue = UrgentQueue(changed, share=share)
        self.cores = Cores(cores, changed=changed, urgent=self.queue.may_cut_in)
        self.engines = Engines("cpu", 16.0, meters=self.meters, host_gib=0.0)  # one model at a time, as on a GPU
        self.lost = threading.Event()
        self.cutin = CutIn(
            renderer="r",
            device="a CPU",
            cores=self.cores,
            queue=self.queue,
            engines=self.engines,
            meters=self.meters,
            on_lost=self.lost.set,
        )

    def draw(self, portion: Portion) -> Any:
        return self.queue.put(portion, now=time.monotonic())

    def counted(self, name: str) -> float:
        return sum(sample.value for sample in self.meters.snapshot().samples if sample.name == name)

    def waits(self, kind: str) -> float:
        return sum(
            sample.value
            for sample in self.meters.snapshot().samples
            if sample.name == "farm_urgent_wait_seconds_count" and ("kind", kind) in sample.labels
        )


@pytest.fixture
def device() -> Iterator[Device]:
    made = Device()
    yield made
    made.cutin.close(RendererDiedError("the test is over"))


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> list[FakeFamily]:
    """Every family that is opened, without torch; a test gives them trouble by TROUBLE."""
    opened: list[FakeFamily] = []

    def open_fake(*_: Any, **__: Any) -> FakeFamily:
        opened.append(FakeFamily(_trouble))
        return opened[-1]

    monkeypatch.setattr("farm.engine.open_family", open_fake)
    monkeypatch.setitem(TROUBLE, 0, lambda specs: None)
    return opened


TROUBLE: dict[int, Callable[[Sequence[ImageSpec]], None]] = {0: lambda specs: None}


def _trouble(specs: Sequence[ImageSpec]) -> None:
    TROUBLE[0](specs)


def portion(token: str = "t", images: int = 1, *, owner: str = "ann", **changes: Any) -> Portion:
    made = changes.pop("card", card())
    prompts = changes.pop("prompts", [f"urgent {i}" for i in range(images)])
    output = changes.pop("output", Output())
    specs = tuple(spec(i, prompt, **changes) for i, prompt in enumerate(prompts))
    return Portion(token, owner, made, numerics(), specs, output)


def run_shard(folder: Path, planned: Plan, engine: Engine, *, device: Device | None = None, **options: Any) -> Receipt:
    arguments: dict[str, Any] = {
        "pass_number": 1,
        "shard": 0,
        "attempt": 1,
        "engine": lambda _: engine,
        "on_device": on_device(),
        "aside": device.cutin if device else None,
    }
    return ShardRunner(ledger(folder), planned, renderer="r", device="cpu").run(**arguments | options)


def at_denoise(step: int, do: Callable[[], object]) -> Callable[[ShardProgress], None]:
    """An `on_progress` that does something once, when a shard has been told so often of a denoising step."""
    seen = []

    def on_progress(progress: ShardProgress) -> None:
        if progress.stage == "denoise" and progress.in_hand:
            seen.append(progress)
            if len(seen) == step:
                do()

    return on_progress


def loaded(**changes: Any) -> Engine:
    engine = Engine(card(), numerics(**changes), "cpu", 16.0)
    engine.load()
    return engine


# Bit-identity, on the bundled model


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


# Within a step and between batches, without torch


def test_the_seconds_of_urgent_images_are_in_none_of_the_shards(tmp_path: Path, device: Device, fakes: Any) -> None:
    futures: list[Any] = []

    def slow(specs: Sequence[ImageSpec]) -> None:
        if specs[0].prompt.startswith("urgent"):
            time.sleep(0.3)

    TROUBLE[0] = slow
    started = time.perf_counter()
    receipt = run_shard(
        tmp_path,
        plan(["p"] * 4),
        loaded(),
        device=device,
        on_progress=at_denoise(1, lambda: futures.append(device.draw(portion()))),
    )
    took = time.perf_counter() - started
    assert futures[0].result(10).engine_s >= 0.3
    seconds = receipt.seconds
    assert seconds["total"] <= took - 0.3
    drawn = seconds["encode"] + seconds["denoise"] + seconds["decode"]
    assert 0 < drawn <= seconds["total"]
    assert sum(row.seconds for row in receipt.rows) == pytest.approx(drawn)


def test_a_shard_shows_progress_while_urgent_images_are_drawn_and_its_own_stage_afterwards(
    tmp_path: Path, device: Device, fakes: Any
) -> None:
    shown: list[ShardProgress] = []
    cut = at_denoise(1, lambda: device.draw(portion()))

    def on_progress(progress: ShardProgress) -> None:
        shown.append(progress)
        cut(progress)

    run_shard(tmp_path, plan(["p"]), loaded(), device=device, on_progress=on_progress)
    ticks = [progress.ticks for progress in shown]
    assert ticks == sorted(set(ticks))
    stages = [progress.stage for progress in shown if progress.in_hand == (0,)]
    assert stages == [
        *("load", "encode", "denoise"),  # its own, the first as it is announced
        *("encode", "denoise", "denoise", "denoise", "decode"),  # the urgent image
        *("denoise", "denoise", "denoise", "decode"),  # back, and on
    ]


def test_images_of_one_shape_are_drawn_as_one_batch_and_captions_of_two_lengths_are_not(
    tmp_path: Path, device: Device, fakes: list[FakeFamily]
) -> None:
    device.draw(portion("a", 2))
    device.draw(portion("b", 3, owner="bob"))
    device.draw(portion("c", prompts=["a long prompt of more than thirty-two bytes in all"], owner="cid"))
    run_shard(tmp_path, plan(["p"] * 2), loaded(), device=device)
    assert [len(batch) for batch in fakes[0].denoised] == [4, 1, 1, 2]
    assert device.waits("batch") == 3


def test_a_failing_batch_is_drawn_image_by_image_and_what_fails_alone_says_why(
    tmp_path: Path, device: Device, fakes: list[FakeFamily]
) -> None:
    def trouble(specs: Sequence[ImageSpec]) -> None:
        if any(image.prompt == "bad" for image in specs):
            raise IndexError("too bad")

    TROUBLE[0] = trouble
    futures = [device.draw(portion("a", prompts=["good", "bad"])), device.draw(portion("b", owner="bob"))]
    receipt = run_shard(tmp_path, plan(["p"] * 2), loaded(), device=device)
    assert {row.status for row in receipt.rows} == {"ok"}
    first, second = (future.result(10).images for future in futures)
    assert [image.error_code for image in (*first, *second)] == [None, "render", None]
    assert "IndexError: too bad" in first[1].error_message
    assert fakes[0].recovered == 2  # after the batch, and after the bad one
    assert device.counted("farm_failures_total") == 1


def test_a_picture_of_no_numbers_is_a_failed_image(device: Device, fakes: Any, tmp_path: Path) -> None:
    future = device.draw(portion(prompts=["nan", "sound"]))
    run_shard(tmp_path, plan(["p"]), loaded(), device=device)
    assert [image.error_code for image in future.result(10).images] == ["nan_picture", None]


def test_a_device_lost_within_a_step_fails_the_portion_and_the_shard(
    tmp_path: Path, device: Device, fakes: Any
) -> None:
    def trouble(specs: Sequence[ImageSpec]) -> None:
        if specs[0].prompt.startswith("urgent"):
            raise DeviceLostError("Xid 79")

    TROUBLE[0] = trouble
    futures: list[Any] = []
    with pytest.raises(DeviceLostError, match="Xid 79"):
        run_shard(
            tmp_path,
            plan(["p"]),
            loaded(),
            device=device,
            on_progress=at_denoise(1, lambda: futures.append(device.draw(portion()))),
        )
    assert isinstance(futures[0].exception(10), RendererDiedError)


def test_another_model_is_drawn_between_batches_and_the_shards_own_comes_back(
    tmp_path: Path, device: Device, fakes: list[FakeFamily]
) -> None:
    engine = loaded()
    future = []
    receipt = run_shard(
        tmp_path,
        plan([f"p{i}" for i in range(8)]),
        engine,
        device=device,
        on_progress=at_denoise(
            1, lambda: future.append(device.draw(portion(card=card(name="other", max_sequence_length=32))))
        ),
    )
    assert [len(family.denoised) for family in fakes] == [2, 1]
    assert [family.loaded for family in fakes] == [True, False]
    assert {row.status for row in receipt.rows} == {"ok"}
    assert device.engines.loaded_model == "sketch"
    assert future[0].result(10).load_s > 0
    assert (device.waits("batch"), device.waits("step")) == (1, 0)


def test_another_model_that_does_not_load_fails_its_images_and_not_the_shard(
    tmp_path: Path, device: Device, fakes: list[FakeFamily], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, real = loaded(), FakeFamily.load

    def load(self: FakeFamily) -> None:
        if self is not fakes[0]:
            raise ModelCardError("model other: no weights")
        real(self)

    monkeypatch.setattr(FakeFamily, "load", load)
    wrong = device.draw(portion("a", card=card(name="other", max_sequence_length=32)))
    right = device.draw(portion("b", owner="bob"))
    receipt = run_shard(tmp_path, plan(["p"]), engine, device=device)
    assert isinstance(wrong.exception(10), ModelCardError)
    assert right.result(10).images[0].error_code is None
    assert (receipt.rows[0].status, engine.loaded) == ("ok", True)


def test_another_model_that_fits_nowhere_makes_the_shards_own_not_leave(
    tmp_path: Path, device: Device, fakes: list[FakeFamily], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, left = loaded(), list[FakeFamily]()

    def place(self: FakeFamily) -> None:
        if self is not fakes[0]:
            raise PlacementError("too big")

    def unload(self: FakeFamily) -> None:
        left.append(self)

    monkeypatch.setattr(FakeFamily, "place", place)
    monkeypatch.setattr(FakeFamily, "unload", unload)
    wrong = device.draw(portion("a", card=card(name="other", max_sequence_length=32)))
    receipt = run_shard(tmp_path, plan(["p"]), engine, device=device)
    assert isinstance(wrong.exception(10), PlacementError)
    assert (receipt.rows[0].status, engine.loaded, left) == ("ok", True, [])


def test_what_needs_the_encoder_waits_for_the_end_of_the_batch_and_what_is_encoded_does_not(
    tmp_path: Path, device: Device, fakes: list[FakeFamily]
) -> None:
    engine = loaded()
    fakes[0].within = "encoded"
    engine.render([spec(0, "known")], on_picture=lambda picture: None)

    def cut() -> None:
        device.draw(portion("a", prompts=["new"]))
        device.draw(portion("b", prompts=["known"], owner="bob"))

    run_shard(tmp_path, plan(["p"] * 8), engine, device=device, on_progress=at_denoise(1, cut))
    assert (device.waits("step"), device.waits("batch")) == (1, 1)
    assert [len(batch) for batch in fakes[0].denoised] == [1, 4, 1, 1, 4]


def test_nothing_cuts_into_a_model_that_shares_no_device_between_its_phases(
    tmp_path: Path, device: Device, fakes: list[FakeFamily]
) -> None:
    engine = loaded()
    fakes[0].within = "nothing"
    run_shard(
        tmp_path, plan(["p"] * 8), engine, device=device, on_progress=at_denoise(1, lambda: device.draw(portion()))
    )
    assert (device.waits("step"), device.waits("batch")) == (0, 1)


def test_urgent_images_beyond_their_share_wait_while_the_shard_works(tmp_path: Path, fakes: list[FakeFamily]) -> None:
    device = Device(share=Share(bulk=0.999, burst_s=1e-9))
    for n in range(3):
        device.draw(portion(str(n), owner=str(n), width=64 + 16 * n))

    TROUBLE[0] = lambda specs: time.sleep(0.05 if specs[0].prompt.startswith("urgent") else 0.0)
    run_shard(tmp_path, plan(["p"] * 16, shard_images=16), loaded(), device=device)
    # One batch was begun in the burst; what the shard's work brings back is far less than that took.
    assert len(device.queue) == 2
    device.cutin.close(RendererDiedError("over"))


def test_an_error_in_the_queue_of_pictures_is_the_images_own(
    tmp_path: Path, device: Device, fakes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> bytes:
        raise OSError("encoder error")

    future = device.draw(portion())
    monkeypatch.setattr("farm.urgentdrawing.encode_picture", broken)
    run_shard(tmp_path, plan(["p"]), loaded(), device=device)
    image = future.result(10).images[0]
    assert (image.error_code, image.error_message) == (
        "not_written",
        "the image could not be encoded: OSError: encoder error",
    )


def test_a_shard_tells_when_urgent_images_have_its_place_and_announces_the_first(
    tmp_path: Path, device: Device, fakes: Any
) -> None:
    shown: list[ShardProgress] = []
    cuts = [at_denoise(n, lambda: device.draw(portion(str(len(shown))))) for n in (1, 3)]
    TROUBLE[0] = lambda specs: time.sleep(0.05 if specs[0].prompt.startswith("urgent") else 0.0)

    def on_progress(progress: ShardProgress) -> None:
        shown.append(progress)
        for cut in cuts:
            cut(progress)

    run_shard(tmp_path, plan(["p"] * 8), loaded(), device=device, on_progress=on_progress)
    aside = [progress for progress in shown if progress.aside]
    assert [progress.announce for progress in aside] == [True] + [False] * (len(aside) - 1)
    assert (aside[0].stage, aside[0].in_hand, aside[0].aside_s) == ("encode", (0, 1, 2, 3), 0.0)
    seconds = [progress.aside_s for progress in shown]
    assert seconds == sorted(seconds)
    assert any(progress.aside_s >= 0.05 for progress in aside)
    assert not shown[-1].aside
    assert shown[-1].aside_s >= 0.1


def test_a_device_that_fails_the_batch_in_hand_before_an_urgent_image_is_taken_leaves_that_waiting(
    tmp_path: Path, device: Device, fakes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    armed: list[str] = ["no memory left"]
    futures: list[Any] = []

    def synchronize(self: FakeFamily) -> None:
        if futures and armed:
            raise OutOfMemoryError(armed.pop())

    monkeypatch.setattr(FakeFamily, "synchronize", synchronize)
    run_shard(
        tmp_path,
        plan(["p"] * 4),
        loaded(),
        device=device,
        on_progress=at_denoise(1, lambda: futures.append(device.draw(portion()))),
    )
    assert futures[0].result(10).images[0].error_code is None


@pytest.mark.parametrize("where", ["at a step", "between batches", "by itself"])
def test_whatever_is_raised_on_the_way_to_an_urgent_image_fails_that_and_no_shard(
    tmp_path: Path, device: Device, fakes: Any, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise IndexError("a fault of the farm's own")

    monkeypatch.setattr(device.cutin._drawing, "_cut", broken)
    if where == "by itself":
        device.cutin.start()
    futures = [] if where == "at a step" else [device.draw(portion())]
    if where != "by itself":
        cut = at_denoise(1, lambda: futures.append(device.draw(portion("at a step"))))
        receipt = run_shard(tmp_path, plan(["p"]), loaded(), device=device, on_progress=cut)
        assert (receipt.rows[0].status, receipt.rows[0].alone) == ("ok", False)
    for future in futures:
        with pytest.raises(RenderError, match="could not draw the image: IndexError: a fault of the farm's own"):
            future.result(10)
    assert device.queue.in_hand == 0


def test_a_picture_that_no_thread_can_encode_is_a_failed_image_and_holds_up_nothing(
    tmp_path: Path, device: Device, fakes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawing = device.cutin._drawing
    later: list[Any] = []

    def submit(*work: Any) -> None:
        later.append(work)  # as the real pool does, which puts it in its queue first
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(drawing._encoders, "submit", submit)
    future = device.draw(portion(images=2))
    receipt = run_shard(tmp_path, plan(["p"]), loaded(), device=device)
    assert receipt.rows[0].status == "ok"
    for encode, *arguments in later:
        encode(*arguments)
    assert [(image.error_code, image.error_message) for image in future.result(10).images] == [
        ("not_written", "the image could not be encoded: can't start new thread")
    ] * 2
    assert drawing._pending_bytes == 0


def test_urgent_images_are_let_in_after_the_last_batch_is_decoded_too(
    tmp_path: Path, device: Device, fakes: Any
) -> None:
    futures: list[Any] = []

    def on_progress(progress: ShardProgress) -> None:
        if progress.stage == "decode" and not futures:
            futures.append(device.draw(portion()))

    receipt = run_shard(tmp_path, plan(["p"]), loaded(), device=device, on_progress=on_progress)
    assert futures[0].result(10).images[0].error_code is None
    assert device.waits("step") == 1
    assert receipt.rows[0].status == "ok"


def test_a_cancelled_shard_begins_no_urgent_image_and_does_not_load_its_model_again(
    tmp_path: Path, device: Device, fakes: list[FakeFamily]
) -> None:
    stop = threading.Event()

    def cut() -> None:
        for n in range(3):
            device.draw(portion(str(n), owner=str(n), width=64 + 16 * n))

    TROUBLE[0] = lambda specs: stop.set() if specs[0].prompt.startswith("urgent") else None
    with pytest.raises(CancelledError):
        run_shard(
            tmp_path,
            plan(["p"]),
            loaded(),
            device=device,
            on_progress=at_denoise(1, cut),
            cancelled=stop.is_set,
        )
    assert len(device.queue) == 2

    stop.clear()
    for token in "012":
        device.queue.drop(token)
    device.draw(portion("other", card=card(name="other", max_sequence_length=32)))
    engine = loaded()
    with pytest.raises(CancelledError):
        run_shard(tmp_path, plan(["p"]), engine, device=device, cancelled=stop.is_set)
    assert not engine.loaded
    assert (len(device.engines), device.engines.loaded_model) == (1, "other")
    assert device.engines.was_displaced(engine)


def test_a_load_that_an_urgent_image_brings_on_a_shard_is_taken_from_the_urgent_share(
    tmp_path: Path, fakes: list[FakeFamily], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device(share=Share(bulk=0.999, burst_s=0.1))
    monkeypatch.setattr(FakeFamily, "load", lambda self: time.sleep(0.1))

    def shard(folder: str) -> None:
        place = Place(device.cores, 1, begin=lambda: True, engine_back=device.engines.give_back)
        ShardRunner(ledger(tmp_path / folder), plan(["p"]), renderer="r", device="cpu").run(
            pass_number=1,
            shard=0,
            attempt=1,
            engine=lambda _: place.use(device.engines.take(card(), numerics())),
            on_device=place,
            aside=device.cutin,
        )

    shard("a")
    device.draw(portion("a"))
    assert device.queue.may_cut_in()  # the first load was nobody's fault
    device.queue.drop("a")
    other = card(name="other", max_sequence_length=32), numerics()
    device.engines.give_back(device.engines.take_weights(*other))
    shard("b")
    device.draw(portion("b"))
    assert not device.queue.may_cut_in()
    device.cutin.close(RendererDiedError("over"))


def test_a_shards_model_that_came_back_draws_its_own_urgent_images_before_another_takes_its_place(
    tmp_path: Path, device: Device, fakes: list[FakeFamily], monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[FakeFamily] = []

    def load(self: FakeFamily) -> None:
        loads.append(self)

    monkeypatch.setattr(FakeFamily, "load", load)
    engine, other = loaded(), card(name="other", max_sequence_length=32)
    monkeypatch.setattr("farm.cutin.LOOK", 1)
    futures = [device.draw(portion("b0", 4, owner="bob", card=other))]
    for n in range(4):
        futures.append(device.draw(portion(f"a{n}", 4, owner="ann")))
    late: list[Any] = []
    order: list[str] = []

    def trouble(specs: Sequence[ImageSpec]) -> None:
        # When the shard's own model is back, bob's second one waits longest.
        if len(loads) == 3 and not late:
            late.append(device.draw(portion("b1", prompts=["urgent late"], owner="bob", card=other)))
        order.append(specs[0].prompt)

    TROUBLE[0] = trouble
    run_shard(tmp_path, plan(["p"]), engine, device=device)
    for future in (*futures, *late):
        assert future.result(10).images[0].error_code is None
    assert order == ["urgent 0"] * 5 + ["urgent late", "p"]  # bob's first, all of ann's, bob's second, the shard
    assert len(loads) == 5


# Its own threads


def test_an_idle_device_loads_the_model_draws_and_keeps_it(device: Device, fakes: list[FakeFamily]) -> None:
    device.cutin.start()
    first = device.draw(portion("a", output=Output(format="webp", quality=80))).result(10)
    second = device.draw(portion("b")).result(10)
    assert (first.renderer, first.device, first.load_s > 0, second.load_s) == ("r", "a CPU", True, 0.0)
    assert 0 <= first.load_s <= first.waited_s
    image = first.images[0]
    assert image.data[8:12] == b"WEBP"
    assert image.sha256 == hashlib.sha256(image.data).hexdigest()
    assert (image.seed, image.index, image.flag, image.error_code) == (1000, 0, None, None)
    assert (len(fakes), len(device.engines), device.engines.loaded_model) == (1, 1, "sketch")
    assert device.waits("idle") == 2
    assert device.counted("farm_images_total") == 2


def test_one_image_at_a_time_needs_one_engine_however_many_cores_there_are(fakes: list[FakeFamily]) -> None:
    device = Device(cores=4)
    device.cutin.start()
    for n in range(20):
        device.draw(portion(str(n))).result(10)
    assert len(fakes) == 1
    device.cutin.close(RendererDiedError("over"))


def test_images_that_wait_are_spread_over_the_cores_of_a_cpu(fakes: list[FakeFamily]) -> None:
    device = Device(cores=2)
    both = threading.Barrier(2, timeout=10)

    def meet(specs: Sequence[ImageSpec]) -> None:
        both.wait()

    TROUBLE[0] = meet
    device.cutin.start()
    device.draw(portion("a", 4)).result(10)
    assert sorted(len(batch) for family in fakes for batch in family.denoised) == [2, 2]
    device.cutin.close(RendererDiedError("over"))


def test_who_comes_back_after_a_batch_is_drawn_together_with_who_waited(
    device: Device, fakes: list[FakeFamily], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("farm.urgent.GATHER_S", 60.0)
    monkeypatch.setattr("farm.urgent.GATHER_SHARE", 1e6)
    drawing, go_on = threading.Event(), threading.Event()

    def hold(specs: Sequence[ImageSpec]) -> None:
        drawing.set()
        go_on.wait(10)

    TROUBLE[0] = hold
    device.cutin.start()
    first = device.draw(portion("a", 2))
    assert drawing.wait(10)
    waiting = device.draw(portion("b"))
    go_on.set()
    first.result(10)
    device.draw(portion("c", 2)).result(10)
    waiting.result(10)
    assert [len(batch) for batch in fakes[0].denoised] == [2, 3]


def test_encoding_keeps_no_device(device: Device, fakes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from farm.urgentdrawing import encode_picture as real

    go, drawn = threading.Event(), threading.Event()

    def slow(*arguments: Any) -> bytes:
        go.wait(10)
        return real(*arguments)

    monkeypatch.setattr("farm.urgentdrawing.encode_picture", slow)
    TROUBLE[0] = lambda specs: drawn.set() if specs[0].prompt == "second" else None
    device.cutin.start()
    first = device.draw(portion("a"))
    second = device.draw(portion("b", prompts=["second"], width=96))
    assert drawn.wait(10)
    assert not first.done()
    go.set()
    first.result(10)
    second.result(10)


def test_pictures_that_wait_to_be_encoded_hold_up_the_next_ones(
    device: Device, fakes: list[FakeFamily], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("farm.urgentdrawing.MAX_PENDING_BYTES", 1)
    from farm.urgentdrawing import encode_picture as real

    go = threading.Event()

    def slow(*arguments: Any) -> bytes:
        go.wait(10)
        return real(*arguments)

    monkeypatch.setattr("farm.urgentdrawing.encode_picture", slow)
    device.cutin.start()
    futures = [device.draw(portion("a"))]
    while device.queue.next() is not None:
        time.sleep(0.001)
    futures.append(device.draw(portion("b")))
    time.sleep(0.1)
    assert len(device.queue) == 1
    go.set()
    for future in futures:
        future.result(10)


def test_dropping_frees_the_device_within_a_step_and_others_in_the_batch_are_drawn(
    device: Device, fakes: list[FakeFamily]
) -> None:
    begun, go = threading.Event(), threading.Event()

    def hold(specs: Sequence[ImageSpec]) -> None:
        begun.set()
        go.wait(10)

    TROUBLE[0] = hold
    device.cutin.start()
    # The device is kept until both wait, so that they share a batch.
    assert device.cores.take(1, timeout=1)
    futures = [device.draw(portion("a", num_inference_steps=100)), device.draw(portion("b", num_inference_steps=100))]
    device.cores.give_back(1)
    assert begun.wait(10)
    device.queue.drop("a")
    go.set()
    assert isinstance(futures[0].exception(10), CancelledError)
    assert futures[1].result(10).images[0].error_code is None

    begun.clear()
    go.clear()
    alone = device.draw(portion("c", num_inference_steps=100_000_000))
    assert begun.wait(10)
    device.queue.drop("c")
    go.set()
    assert isinstance(alone.exception(10), CancelledError)
    assert device.draw(portion("d")).result(10).images[0].error_code is None


def test_a_model_that_does_not_load_fails_all_that_wait_for_it_with_its_own_error(
    device: Device, fakes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: FakeFamily) -> None:
        raise ModelCardError("model sketch: no weights")

    with monkeypatch.context() as patched:
        patched.setattr(FakeFamily, "load", broken)
        device.cutin.start()
        with pytest.raises(ModelCardError, match="no weights"):
            device.draw(portion("a", 2)).result(10)
    assert device.draw(portion("b")).result(10).images[0].error_code is None


def test_a_device_lost_by_urgent_work_ends_the_process(device: Device, fakes: Any) -> None:
    def trouble(specs: Sequence[ImageSpec]) -> None:
        raise DeviceLostError("Xid 79")

    TROUBLE[0] = trouble
    device.cutin.start()
    with pytest.raises(RendererDiedError, match="r lost its device: Xid 79"):
        device.draw(portion()).result(10)
    assert device.lost.wait(10)


def test_a_model_asked_for_ahead_is_loaded_when_the_device_is_free_and_not_before(
    device: Device, fakes: list[FakeFamily]
) -> None:
    assert device.cores.take(1, timeout=1)
    device.cutin.start()
    device.cutin.warm(card(name="first"), numerics())
    device.cutin.warm(card(), numerics())
    time.sleep(0.05)
    assert fakes == []
    device.cores.give_back(1)
    while device.engines.loaded_model is None:
        time.sleep(0.001)
    assert device.engines.loaded_model == "sketch"
    assert device.draw(portion()).result(10).load_s == 0.0
    assert len(fakes) == 1


def test_a_model_loaded_ahead_on_one_core_keeps_no_image_from_the_others(
    fakes: list[FakeFamily], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device(cores=2)
    begun, go = threading.Event(), threading.Event()

    def load(self: FakeFamily) -> None:
        begun.set()
        go.wait(10)

    monkeypatch.setattr(FakeFamily, "load", load)
    device.cutin.start()
    device.cutin.warm(card(), numerics())
    assert begun.wait(10)
    future = device.draw(portion())
    try:
        for _ in range(1000):
            if len(device.cutin.reports()) == 2:
                break
            time.sleep(0.001)
        assert len(device.cutin.reports()) == 2
    finally:
        go.set()
    assert future.result(10).images[0].error_code is None
    device.cutin.close(RendererDiedError("over"))


def test_urgent_work_is_charged_for_the_time_that_a_shard_waited_for_it_alone(fakes: Any) -> None:
    device = Device(share=Share(burst_s=0.2))
    begun, go = threading.Event(), threading.Event()

    def hold(specs: Sequence[ImageSpec]) -> None:
        begun.set()
        go.wait(10)

    TROUBLE[0] = hold
    device.cutin.start()
    first = device.draw(portion("a"))
    assert begun.wait(10)
    time.sleep(0.3)
    shard = threading.Thread(target=device.cores.take, args=(1,), kwargs={"timeout": 10})
    shard.start()
    while not device.cores.wanted:
        time.sleep(0.001)
    go.set()
    first.result(10)
    shard.join(10)
    device.draw(portion("b"))
    assert device.queue.may_cut_in()
    device.cutin.close(RendererDiedError("over"))


def test_a_model_that_cannot_be_loaded_ahead_is_left(device: Device, fakes: Any, monkeypatch: Any) -> None:
    tried = threading.Event()

    def broken(self: FakeFamily) -> None:
        tried.set()
        raise ModelCardError("model sketch: no weights")

    with monkeypatch.context() as patched:
        patched.setattr(FakeFamily, "load", broken)
        device.cutin.start()
        device.cutin.warm(card(), numerics())
        assert tried.wait(10)
    assert device.draw(portion()).result(10).images[0].error_code is None


def test_urgent_work_shows_the_watchdog_where_it_stands_and_nothing_once_it_is_done(device: Device, fakes: Any) -> None:
    seen: list[Any] = []
    TROUBLE[0] = lambda specs: seen.append(device.cutin.reports())
    device.cutin.start()
    for token in "ab":
        device.draw(portion(token)).result(10)
    assert [(reports[0].token, reports[0].stage) for reports in seen] == [("urgent-0", "encode")] * 2
    assert seen[1][0].ticks > seen[0][0].ticks
    while device.cutin.reports():
        time.sleep(0.001)


def test_urgent_images_go_before_the_next_shard_and_after_it_once_their_share_is_spent(fakes: Any) -> None:
    device = Device(share=Share(bulk=0.2, burst_s=0.05))
    order: list[str] = []

    def note(specs: Sequence[ImageSpec]) -> None:
        order.append(specs[0].prompt)
        time.sleep(0.1)

    TROUBLE[0] = note
    assert device.cores.take(1, timeout=1)
    device.cutin.start()
    futures = [device.draw(portion(str(n), prompts=[f"urgent {n}"], width=64 + 16 * n)) for n in range(2)]

    def shard() -> None:
        assert device.cores.take(1, timeout=10)
        order.append("shard")
        device.queue.credit(10.0)
        device.cores.give_back(1)

    waiting = threading.Thread(target=shard)
    waiting.start()
    while not device.cores.wanted:
        time.sleep(0.001)
    device.cores.give_back(1)
    for future in futures:
        future.result(10)
    waiting.join(10)
    assert order == ["urgent 0", "shard", "urgent 1"]
    device.cutin.close(RendererDiedError("over"))


def test_closing_fails_what_is_in_hand_at_once_and_ends_the_threads(device: Device, fakes: Any) -> None:
    begun, go = threading.Event(), threading.Event()

    def hold(specs: Sequence[ImageSpec]) -> None:
        begun.set()
        go.wait(10)

    TROUBLE[0] = hold
    device.cutin.start()
    drawing, waiting = device.draw(portion("a")), device.draw(portion("b", width=96))
    assert begun.wait(10)
    device.cutin.close(RendererDiedError("it was retired"))
    for future in (drawing, waiting):
        assert str(future.exception(0)) == "it was retired"
    go.set()
    for thread in device.cutin._threads:
        thread.join(10)
        assert not thread.is_alive()
