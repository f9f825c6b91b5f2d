"""Urgent images on a free device: the threads that draw and encode them."""

import hashlib
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest

from farm.errors import (
    CancelledError,
    DeviceLostError,
    ModelCardError,
    RendererDiedError,
)
from farm.manifest import Output
from farm.plan import ImageSpec
from farm.urgent import Share
from tests.drawing import FakeFamily, card, numerics
from tests.unit.cutin.cutting_in import TROUBLE, Device, portion


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
