"""A gateway's way to a real dispatcher and a real renderer, and what it hears when either of them dies."""

import asyncio
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from actors.cluster import OBJECT_STORE_BYTES, ray  # Ray from there: what it reads at its import is set first
from actors.dispatcher import DispatcherActor
from actors.link import RayLink
from actors.names import DISPATCHER, NAMESPACE
from farm.devices import local_device, numerics_for
from farm.errors import (
    CancelledError,
    FarmUnavailableError,
    RendererDiedError,
    RequestError,
    UnknownRendererError,
)
from farm.manifest import Output
from farm.meters import Meters
from farm.modelcard import find_card
from farm.plan import ImageSpec
from farm.portion import Allowance, Entry, Placing, PoolView, Portion, Seat
from farm.settings import Reserve, Settings
from farm.weights import pinned

PATIENCE_S = 90.0
CARD = """\
name: sleep
title: Sleeps, ten milliseconds a step
family: sleep
source: {path: .}
licence: none
dtypes: {cpu: [float32]}
batch: {cpu: 4}
defaults: {width: 64, height: 64, num_inference_steps: 5, guidance_scale: 0}
limits: {min_px: 64, max_px: 64, max_pixels: 4096, multiple_of: 64}
max_steps: 10000
"""


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("link")
    (folder / "models").mkdir()
    (folder / "models" / "sleep.yaml").write_text(CARD)
    return Settings(
        store=str(folder / "store"), models=folder / "models", max_waiting=8, reserve=(Reserve(warm=("sleep",)),)
    )


@pytest.fixture(scope="module")
def dispatcher(settings: Settings) -> Iterator[Any]:
    Path(settings.store).mkdir()
    ray.init(
        address="local",
        num_cpus=1,
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        namespace=NAMESPACE,
    )
    yield DispatcherActor.options(name=DISPATCHER, namespace=NAMESPACE, lifetime="detached").remote(
        settings, 1, cores=1, gpu=False, all_open=True, farm="test", pid=os.getpid()
    )
    ray.shutdown()


def entry(token: str, images: int = 1) -> Entry:
    return Entry(token, "gateway-0", "me", "", Allowance(), "sleep", images, 5 * images)


def portion(settings: Settings, seat: Seat, *, steps: int = 5) -> Portion:
    card = pinned(find_card("sleep", settings))
    params = card.defaults.model_copy(update={"num_inference_steps": steps})
    specs = tuple(ImageSpec(index, 0, None, "nothing", index, params, {}) for index in range(seat.images))
    numerics = numerics_for(card, device=local_device(), renderers=1)
    return Portion(seat.token, "me", card, numerics, specs, Output())


async def until(link: RayLink, true: Callable[[PoolView], object]) -> PoolView:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                if true(pool := await link.pool()):
                    return pool
            except FarmUnavailableError:
                pass
            await asyncio.sleep(0.05)


async def entered(link: RayLink, asked: Entry) -> Placing:
    """Ask until a renderer is there."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                placing = await link.enter(asked)
                if placing.refusal is None:
                    return placing
                assert placing.refusal.code == "no_renderer"
            except FarmUnavailableError:
                pass
            await asyncio.sleep(0.1)


def is_ready(pool: PoolView) -> bool:
    return pool.renderers[0].state == "idle"


def test_a_model_that_is_kept_warm_is_loaded_before_anybody_asks(dispatcher):
    async def main() -> None:
        link = RayLink()
        await link.hold("gateway-0", (), Meters("gateway-0", "1").snapshot())  # a first call starts the farm
        await until(link, lambda pool: pool.renderers[0].loaded == "sleep")

    asyncio.run(main())


def test_images_are_drawn_and_the_farm_shows_it(dispatcher, settings):
    async def main() -> None:
        link = RayLink()
        (seat,) = (await entered(link, entry("first", 2))).seats
        assert (await link.pool()).waiting == 2
        answer = await link.draw(seat.renderer, portion(settings, seat))
        assert [(drawn.index, drawn.seed, drawn.error_code) for drawn in answer.images] == [(0, 0, None), (1, 1, None)]
        await link.leave(seat.token, seconds=answer.engine_s)
        meters = Meters("gateway-0", "1")
        meters.count("farm_http_requests_total", method="POST", route="/v1/images/generations", status="200")
        await link.hold("gateway-0", (), meters.snapshot())
        pool = await link.pool()
        assert (pool.waiting, pool.capacity, pool.machine) == (0, 8, local_device())
        farm, own = await link.metrics()
        assert "farm_http_requests_total" in {sample.name for sample in farm.samples}
        assert own.process == "dispatcher"

    asyncio.run(main())


def test_errors_come_as_they_were_raised(dispatcher, settings):
    async def main() -> None:
        link = RayLink()
        await until(link, is_ready)
        with pytest.raises(UnknownRendererError, match="no renderer is called 'nobody'"):
            await link.drain("nobody", True)
        with pytest.raises(RequestError, match="9 images at once are more than this farm takes, which is 8"):
            await link.enter(entry("many", 9))
        with pytest.raises(RendererDiedError, match="nobody ended while it drew"):
            await link.draw("nobody", portion(settings, Seat("t", "nobody", 1)))
        await link.drop("nobody", "t")
        assert await link.progress("nothing") == (None, None)

    asyncio.run(main())


def test_questions_that_are_asked_at_once_are_answered_each_for_itself(dispatcher, settings):
    async def main() -> None:
        link = RayLink()
        await until(link, is_ready)
        entries = [entry(f"at-once-{number}") for number in range(4)]
        *placings, much, again = await asyncio.gather(
            *(link.enter(one) for one in entries),
            link.enter(entry("too-much", images=9)),
            link.enter(entries[0]),
            return_exceptions=True,
        )
        seats = [seat for placing in placings for seat in placing.seats]
        assert [seat.token for seat in seats] == [f"at-once-{number}-0" for number in range(4)]
        assert isinstance(much, RequestError)
        assert again == placings[0]
        assert (await link.pool()).waiting == 4
        gone = asyncio.create_task(link.enter(entry("gone")))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.gather(*(link.leave(seat.token, seconds=0.1) for seat in seats), link.leave("gone", seconds=0.0))
        assert (await link.pool()).waiting == 0

    asyncio.run(main())


def test_a_dropped_portion_ends_within_a_step(dispatcher, settings):
    async def main() -> None:
        link = RayLink()
        (seat,) = (await entered(link, entry("dropped"))).seats
        drawing = asyncio.create_task(link.draw(seat.renderer, portion(settings, seat, steps=10_000)))
        await until(link, lambda pool: pool.renderers[0].state == "rendering")
        await link.drop(seat.renderer, seat.token)
        with pytest.raises(CancelledError):
            await asyncio.wait_for(drawing, 10)
        await link.leave(seat.token, seconds=0.0)

    asyncio.run(main())


def test_a_killed_renderers_images_are_lost_and_its_successor_draws_them(dispatcher, settings):
    async def main() -> None:
        link = RayLink()
        (seat,) = (await entered(link, entry("lost"))).seats
        drawing = asyncio.create_task(link.draw(seat.renderer, portion(settings, seat, steps=10_000)))
        await until(link, lambda pool: pool.renderers[0].state == "rendering")
        ray.kill(ray.get_actor(seat.renderer, NAMESPACE))
        with pytest.raises(RendererDiedError, match=f"{seat.renderer} ended while it drew"):
            await asyncio.wait_for(drawing, PATIENCE_S)
        assert (await link.pool()).waiting == 0
        (again,) = (await entered(link, entry("found"))).seats
        assert (again.renderer, again.incarnation != seat.incarnation) == (seat.renderer, True)
        answer = await link.draw(again.renderer, portion(settings, again))
        assert answer.images[0].error_code is None
        await link.leave(again.token, seconds=answer.engine_s)

    asyncio.run(main())


def test_a_killed_dispatcher_comes_back_and_a_drained_renderer_stays_drained(dispatcher, settings):
    async def main() -> None:
        link = RayLink()
        (seat,) = (await entered(link, entry("drawn-meanwhile"))).seats
        drawing = asyncio.create_task(link.draw(seat.renderer, portion(settings, seat, steps=500)))
        await link.drain(seat.renderer, True)
        await until(link, lambda pool: pool.renderers[0].state == "draining")
        await asyncio.sleep(2.5)  # two beats: the renderer has heard of it
        ray.kill(dispatcher, no_restart=False)
        answer = await drawing
        assert answer.images[0].error_code is None, "what is drawn needs no dispatcher"
        await until(link, lambda pool: pool.renderers[0].state == "drained")
        await link.leave(seat.token, seconds=answer.engine_s)
        await link.drain(seat.renderer, False)
        (again,) = (await entered(link, entry("after"))).seats
        answer = await link.draw(again.renderer, portion(settings, again))
        await link.leave(again.token, seconds=answer.engine_s)

    asyncio.run(main())


def test_without_a_dispatcher_the_farm_is_unavailable(dispatcher, settings):
    async def main() -> None:
        link = RayLink()
        await until(link, is_ready)
        ray.kill(dispatcher)

        async def gone() -> None:
            while True:
                await link.pool()
                await asyncio.sleep(0.05)

        with pytest.raises(FarmUnavailableError, match="the dispatcher does not answer pool: "):
            await asyncio.wait_for(gone(), PATIENCE_S)
        with pytest.raises(FarmUnavailableError, match="the dispatcher does not answer turn: "):
            await link.enter(entry("nobody-there"))

    asyncio.run(main())
