"""Urgent images within a shard's steps and between its batches, without torch."""

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from farm.cores import Place
from farm.drawing import ShardProgress
from farm.errors import (
    CancelledError,
    DeviceLostError,
    ModelCardError,
    OutOfMemoryError,
    PlacementError,
    RendererDiedError,
    RenderError,
)
from farm.plan import ImageSpec
from farm.shard import ShardRunner
from farm.urgent import Share
from tests.drawing import FakeFamily, card, ledger, numerics, plan, spec
from tests.unit.cutin.cutting_in import TROUBLE, Device, at_denoise, loaded, portion, run_shard


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
