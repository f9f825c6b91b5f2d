"""Urgent images at a dispatcher's desk, on virtual time; renderers and gateways are played by hand."""

import asyncio
from datetime import datetime
from pathlib import Path

import pytest

from farm import __version__
from farm.desk import TICK_S, Desk
from farm.devices import DeviceInfo
from farm.errors import (
    FarmUnavailableError,
    RequestError,
    SettingsError,
    StoreUnavailableError,
    UnknownRendererError,
)
from farm.frontdesk import QUOTAS_S, STOPPING_S, SWEEP_S, WARM_AGAIN_S
from farm.lease import Ask, Beat, Hello, Report, Standing
from farm.ledger import Ledger
from farm.meters import Meters
from farm.portion import HOLD_S, SEAT_S, Allowance, Entry, Placing, RendererView
from farm.settings import Reserve
from farm.singles import Singles
from farm.storage.local import LocalStore
from farm.tally import Snapshot
from tests.unit.test_desk import Hand, Processes, make_desk, on_virtual_time, state, submitted
from tests.unit.test_singles import make as image_of
from tests.unit.virtual import settle

NOON = datetime.fromisoformat("2026-11-21T12:00:00+00:00").timestamp()
TODAY = "quotas/2026-11-21.json"
MACHINE = DeviceInfo("cpu", "CPU, 2 cores", (), 2)
FREE = Allowance()
DAILY = Allowance(images_per_day=4)


class Warmed(Processes):
    """Processes that can be told to load a model."""

    def warm(self, renderer: str, model: str) -> None:
        self.told.append(("warm", renderer, model))

    def said(self, word: str) -> list[tuple[str, ...]]:
        """What of a kind was told, which is then forgotten."""
        found = [one for one in self.told if one[0] == word]
        self.told = [one for one in self.told if one[0] != word]
        return found


class Clock:
    """A wall clock that goes with the loop's time, and can be set."""

    def __init__(self, at: float = NOON):
        self.ahead = at

    def __call__(self) -> float:
        return self.ahead + asyncio.get_running_loop().time()


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(LocalStore(tmp_path))


@pytest.fixture
def store(ledger: Ledger) -> LocalStore:
    return ledger.store  # type: ignore[return-value]


def urgent_desk(ledger: Ledger, processes: Processes, **more: object) -> Desk:
    return make_desk(ledger, processes, wall=more.pop("wall", None) or Clock(), **more)  # type: ignore[arg-type]


def entry(token="t", images=1, *, model="shapes", key="k", allowance=FREE, owner="alice", again=False) -> Entry:
    return Entry(token, "gateway-0", owner, key, allowance, model, images, images * 10, again)


def seats(placing: Placing) -> dict[str, int]:
    assert placing.refusal is None
    return {seat.renderer: seat.images for seat in placing.seats}


def refusal(placing: Placing) -> tuple[str, float]:
    assert placing.refusal is not None
    return placing.refusal.code, placing.refusal.retry_after_s


async def met(desk: Desk, *names: str, loaded: str | None = "shapes") -> list[Hand]:
    hands = [Hand(desk, name) for name in names]
    for hand in hands:
        await hand.meet()
        await stands(hand, Standing(loaded))
    return hands


async def stands(hand: Hand, standing: Standing, *reports: Report) -> None:
    await hand.desk.renew(Beat(hand.name, hand.incarnation, hand.epoch, reports, standing))


def heard(process="gateway-0", incarnation="1") -> Snapshot:
    return Meters(process, incarnation, began_at=NOON).snapshot()


def numbers(snapshots: object) -> dict[tuple[str, str], float]:
    """Every sample by name and the values of its labels, those of all snapshots together."""
    return {
        (sample.name, ",".join(value for _, value in sample.labels)): sample.value
        for snapshot in snapshots  # type: ignore[attr-defined]
        for sample in snapshot.samples
    }


@on_virtual_time
async def test_seats_are_given_and_taken_back(ledger):
    desk = urgent_desk(ledger, Warmed())
    await met(desk, "a", "b")
    placing = await desk.enter(entry("t", 3))
    assert seats(placing) == {"a": 2, "b": 1}
    assert [seat.token for seat in placing.seats] == ["t-0", "t-1"]
    assert (await desk.pool()).waiting == 3
    for seat in placing.seats:
        await desk.leave(seat.token, seconds=2.0)
    assert (await desk.pool()).waiting == 0


@on_virtual_time
async def test_asking_twice_gives_the_same_seats_and_counts_once(ledger):
    desk = urgent_desk(ledger, Warmed())
    await met(desk, "a", "b")
    asked = entry("t", 3, allowance=DAILY)
    assert await desk.enter(asked) == await desk.enter(asked)
    assert (await desk.pool()).waiting == 3
    assert refusal(await desk.enter(entry("u", 2, allowance=DAILY))) == ("quota", 12 * 3600)
    assert seats(await desk.enter(entry("v", 1, allowance=DAILY))) == {"b": 1}


@on_virtual_time
async def test_a_silent_gateways_renderers_are_told_to_drop_its_portions(ledger):
    processes = Warmed()
    desk = urgent_desk(ledger, processes)
    hands = await met(desk, "a", "b")
    await desk.enter(entry("t", 2))
    for _ in range(8):
        await asyncio.sleep(HOLD_S)
        await desk.hold("gateway-0", ["t-0"], heard())
        for hand in hands:
            await hand.beat()
    assert processes.said("drop") == [("drop", "b", "t-1")]
    assert (await desk.pool()).waiting == 1
    assert numbers(await desk.metrics())["farm_seats_expired_total", ""] == 1
    assert numbers(await desk.metrics())["farm_gateways", ""] == 1
    await asyncio.sleep(SEAT_S + 2 * TICK_S)
    assert processes.said("drop") == [("drop", "a", "t-0")]
    assert numbers(await desk.metrics())["farm_gateways", ""] == 0
    await desk.leave("t-0", seconds=1.0)


@on_virtual_time
async def test_a_lost_renderers_seats_are_free_and_its_images_go_elsewhere(ledger):
    processes = Warmed()
    desk = urgent_desk(ledger, processes)
    await met(desk, "a", "b")
    assert seats(await desk.enter(entry("t"))) == {"a": 1}
    processes.die("a")
    await settle()
    assert (await desk.pool()).waiting == 0
    assert seats(await desk.enter(entry("u", again=True))) == {"b": 1}
    assert numbers(await desk.metrics())["farm_renderer_losses_total", ""] == 1


@on_virtual_time
async def test_a_renderers_next_process_starts_without_seats(ledger):
    desk = urgent_desk(ledger, Warmed(), names=("a",))
    await met(desk, "a")
    old = await desk.enter(entry("t"))
    await Hand(desk, "a", incarnation="j").meet()
    assert (await desk.pool()).waiting == 0
    assert (old.seats[0].incarnation, (await desk.enter(entry("u"))).seats[0].incarnation) == ("i", "j")


@on_virtual_time
async def test_a_replaced_process_that_says_hello_again_takes_no_seats_from_its_successor(ledger):
    desk = urgent_desk(ledger, Warmed(), names=("a",))
    await Hand(desk, "a", incarnation="2").meet()
    await desk.enter(entry("t"))
    await Hand(desk, "a", incarnation="1").meet()
    assert (await desk.pool()).waiting == 1


@on_virtual_time
async def test_a_full_farm_is_busy_and_says_so_honestly(ledger):
    desk = urgent_desk(ledger, Warmed(), max_waiting=2)
    await met(desk, "a")
    await desk.enter(entry("t", 2))
    assert refusal(await desk.enter(entry("u"))) == ("busy", 10.0), "20 steps of a model that was not measured yet"
    with pytest.raises(RequestError, match="3 images at once are more than this farm takes, which is 2"):
        await desk.enter(entry("v", 3))
    assert numbers(await desk.metrics())["farm_refusals_total", "busy"] == 1
    assert (await desk.pool()).capacity == 2


@on_virtual_time
async def test_a_refused_request_costs_no_quota(ledger):
    desk = urgent_desk(ledger, Warmed(), max_waiting=2)
    await met(desk, "a")
    await desk.enter(entry("t", 2, key="other"))
    for number in range(5):
        assert refusal(await desk.enter(entry(f"u{number}", 2, allowance=DAILY)))[0] == "busy"
    await desk.leave("t", seconds=1.0)
    assert seats(await desk.enter(entry("v", 2, allowance=DAILY))) == {"a": 2}


@on_virtual_time
async def test_a_key_has_three_limits_and_images_that_were_lost_are_counted_once(ledger):
    desk = urgent_desk(ledger, Warmed())
    await met(desk, "a", "b")
    allowance = Allowance(images_per_minute=6, images_at_once=3, images_per_day=8)
    assert seats(await desk.enter(entry("t0", 3, allowance=allowance)))
    assert refusal(await desk.enter(entry("t1", 1, allowance=allowance)))[0] == "at_once"
    await desk.leave("t0", seconds=0.0)
    assert seats(await desk.enter(entry("t0-again", 3, allowance=allowance, again=True)))
    await desk.leave("t0-again", seconds=1.0)
    assert seats(await desk.enter(entry("t2", 3, allowance=allowance)))
    await desk.leave("t2", seconds=1.0)
    assert refusal(await desk.enter(entry("t3", 1, allowance=allowance))) == ("rate", 10.0)
    await asyncio.sleep(10)
    assert seats(await desk.enter(entry("t3", 1, allowance=allowance)))
    await desk.leave("t3", seconds=1.0)
    assert refusal(await desk.enter(entry("t4", 2, allowance=allowance)))[0] == "quota"
    assert seats(await desk.enter(entry("t5", 1, key="another", allowance=allowance)))


@on_virtual_time
async def test_a_question_that_was_given_up_before_it_is_heard_takes_neither_seats_nor_quota(ledger):
    desk = urgent_desk(ledger, Warmed())
    await met(desk, "a")
    await desk.leave("t", seconds=0.0)
    assert refusal(await desk.enter(entry("t", 4, allowance=DAILY)))[0] == "busy"
    assert (await desk.pool()).waiting == 0
    assert ("farm_refusals_total", "busy") not in numbers(await desk.metrics())
    assert seats(await desk.enter(entry("u", 4, allowance=DAILY))) == {"a": 4}


@on_virtual_time
async def test_images_that_lost_their_renderer_go_to_another_and_those_of_a_client_that_left_do_not(ledger):
    desk = urgent_desk(ledger, Warmed())
    await met(desk, "a", "b")
    assert seats(await desk.enter(entry("t"))) == {"a": 1}
    await desk.leave("t-0", seconds=0.0)
    assert seats(await desk.enter(entry("u", again=True))) == {"a": 1}
    await desk.leave("u-0", seconds=0.0, end="lost")
    assert seats(await desk.enter(entry("v", again=True))) == {"b": 1}


@on_virtual_time
@pytest.mark.parametrize("stage", ["waiting", "denoise"])
async def test_a_renderer_whose_urgent_images_get_on_does_not_hang_though_its_shard_stands_still(ledger, stage):
    submitted(ledger)
    desk = urgent_desk(ledger, Warmed())
    await desk.submit("shapes")
    a, b = await met(desk, "a", "b")
    lease = await a.need()

    async def open_after(seconds: int, *, ticks: int = 0, **at: bool) -> list[str]:
        """To whom an urgent image may go after so many seconds, in which `ticks` were added up bit by bit."""
        before = desk._dispatch.board.renderers["a"].standing.urgent_ticks
        for second in range(1, seconds + 1):
            await asyncio.sleep(1)
            done = before + ticks * second // seconds
            report = Report(lease.token, stage, 0, 0.0, aside=at.get("aside", False))
            await stands(a, Standing("shapes", at.get("loading", False), 1, urgent_ticks=done), report)
            await stands(b, Standing("shapes"))
        return [one.renderer for one in desk._front.overview.open_places("shapes", now=desk._now())]

    assert await open_after(100, loading=True, aside=True) == ["a", "b"], "a model is loaded for urgent images"
    assert await open_after(1) == ["b"]
    assert await open_after(100, ticks=5) == ["a", "b"], "urgent images show progress every 20 s"
    assert await open_after(29) == ["a", "b"]
    assert await open_after(3) == ["b"]


@on_virtual_time
async def test_an_at_once_limit_says_when_images_in_hand_are_drawn(ledger):
    desk = urgent_desk(ledger, Warmed(), names=("a",))
    await met(desk, "a")
    await desk.enter(entry("t", 2, allowance=Allowance(images_at_once=2)))
    await asyncio.sleep(4)
    assert refusal(await desk.enter(entry("u", 1, allowance=Allowance(images_at_once=2)))) == ("at_once", 6.0)


@on_virtual_time
async def test_a_jobs_images_count_for_the_day_alone(ledger):
    desk = urgent_desk(ledger, Warmed())
    await met(desk, "a", "b")
    allowance = Allowance(images_per_day=10, images_per_minute=2, images_at_once=2)
    assert await desk.charge("k", allowance, 9) is None
    assert (await desk.charge("k", allowance, 2)).code == "quota"
    assert seats(await desk.enter(entry("t", 1, allowance=allowance)))
    assert refusal(await desk.enter(entry("u", 1, allowance=allowance)))[0] == "quota"
    with pytest.raises(RequestError, match="11 images are more than this key may have per day, which is 10"):
        await desk.charge("k", allowance, 11)


@on_virtual_time
async def test_a_day_is_over_at_midnight_utc(ledger, store):
    clock = Clock(NOON + 12 * 3600 - 60)
    desk = urgent_desk(ledger, Warmed(), wall=clock)
    hands = await met(desk, "a", "b")
    assert seats(await desk.enter(entry("t", 4, allowance=DAILY)))
    assert refusal(await desk.enter(entry("u", 1, allowance=DAILY))) == ("quota", 60.0)
    for _ in range(60):
        await asyncio.sleep(1)
        for hand in hands:
            await hand.beat()
    assert seats(await desk.enter(entry("u", 1, allowance=DAILY)))
    await asyncio.sleep(QUOTAS_S)
    assert b'"k":4' in store.get(TODAY)
    assert b'"k":1' in store.get("quotas/2026-11-22.json")
    clock.ahead -= 3600
    assert refusal(await desk.enter(entry("v", 1, allowance=DAILY)))[0] == "quota", "the clock was set back"


@on_virtual_time
async def test_a_restarted_dispatcher_knows_what_was_used_of_the_day(ledger, store):
    desk = urgent_desk(ledger, Warmed())
    await met(desk, "a", "b")
    await desk.enter(entry("t", 3, allowance=DAILY))
    await asyncio.sleep(QUOTAS_S + 1)
    again = urgent_desk(ledger, Warmed(), farm="two")
    await met(again, "a", "b")
    assert refusal(await again.enter(entry("u", 2, allowance=DAILY)))[0] == "quota"
    assert seats(await again.enter(entry("v", 1, allowance=DAILY)))
    await again.stop()
    assert b'"k":4' in store.get(TODAY), "a stop writes what was used last"


@pytest.mark.parametrize(
    "damage",
    [b"", b"{", b'{"day": "2026-11-20", "images": {"k": 9}}', b'{"version": 99, "day": "2026-11-21", "images": {}}'],
)
def test_a_damaged_or_foreign_record_of_quotas_is_passed_over_and_written_anew(ledger, store, damage, caplog):
    @on_virtual_time
    async def main() -> None:
        store.put(TODAY, damage)
        desk = urgent_desk(ledger, Warmed())
        await met(desk, "a", "b")
        assert seats(await desk.enter(entry("t", 4, allowance=DAILY)))
        assert refusal(await desk.enter(entry("u", 1, allowance=DAILY)))[0] == "quota"
        await asyncio.sleep(QUOTAS_S + 1)
        assert b'"k":4' in store.get(TODAY)

    main()
    assert [one.message for one in caplog.records if one.levelname == "ERROR"] == ["quotas are counted anew"]


@on_virtual_time
async def test_while_the_store_is_away_quotas_are_kept_in_memory_and_added_later(ledger, store, monkeypatch):
    store.put(TODAY, b'{"day": "2026-11-21", "images": {"k": 1}}')
    away = [True]

    def failing(method: str):
        real = getattr(LocalStore, method)

        def call(self: LocalStore, key: str, *arguments: object, **options: object) -> object:
            if away[0] and key.startswith("quotas/"):
                raise StoreUnavailableError("away")
            return real(self, key, *arguments, **options)

        monkeypatch.setattr(LocalStore, method, call)

    failing("get")
    failing("put")
    desk = urgent_desk(ledger, Warmed())
    hands = await met(desk, "a", "b")
    assert seats(await desk.enter(entry("t", 2, allowance=DAILY)))
    await asyncio.sleep(3 * QUOTAS_S)
    away[0] = False
    assert b'"k": 1' in store.get(TODAY), "nothing was written over what was not read"
    await asyncio.sleep(QUOTAS_S)
    for hand in hands:
        await hand.beat()
    assert b'"k":3' in store.get(TODAY)
    assert refusal(await desk.enter(entry("u", 2, allowance=DAILY)))[0] == "quota"


@on_virtual_time
async def test_a_restarted_dispatcher_waits_for_its_renderers_words_before_it_refuses(ledger):
    desk = urgent_desk(ledger, Warmed("a", "b"))
    with pytest.raises(FarmUnavailableError, match="its renderers have not said hello yet"):
        await desk.enter(entry("t"))
    await met(desk, "b")
    assert seats(await desk.enter(entry("t"))) == {"b": 1}
    await desk.leave("given-by-the-one-before", seconds=3.0)
    await desk.hold("gateway-0", ["given-by-the-one-before"], heard())


@on_virtual_time
async def test_without_a_renderer_the_refusal_says_why(ledger):
    processes = Warmed()
    desk = urgent_desk(ledger, processes)
    placing = await desk.enter(entry("t"))
    assert (refusal(placing)[0], placing.refusal.message) == (
        "no_renderer",
        "no renderer is there yet; one is being started",
    )
    await met(desk, "a", "b")
    await desk.drain("a", True)
    await desk.drain("b", True)
    assert (await desk.enter(entry("t"))).refusal.message == "every renderer is drained; resume one"


@on_virtual_time
async def test_a_farm_whose_renderers_do_not_start_says_what_stops_them(ledger):
    processes = Warmed()
    processes.refuse = "GPU 0 is held by another farm"
    desk = urgent_desk(ledger, processes)
    await desk.unfinished()
    await asyncio.sleep(30)
    placing = await desk.enter(entry("t"))
    assert placing.refusal.message == "no renderer can be started: GPU 0 is held by another farm"


@on_virtual_time
async def test_a_stopping_farm_gives_no_seats(ledger):
    desk = urgent_desk(ledger, Warmed())
    await met(desk, "a", "b")
    await desk.stop()
    assert refusal(await desk.enter(entry("t"))) == ("stopping", STOPPING_S)


@on_virtual_time
async def test_images_go_to_the_renderer_with_the_model_and_not_to_a_silent_one(ledger):
    desk = urgent_desk(ledger, Warmed(), names=("a", "b", "c"))
    a, b, _ = await met(desk, "a", "b", "c")
    await stands(a, Standing("other"))
    await stands(b, Standing("shapes"))
    assert seats(await desk.enter(entry("t0"))) == {"b": 1}
    for _ in range(12):
        await asyncio.sleep(1)
        await a.beat()
    assert seats(await desk.enter(entry("t1"))) == {"a": 1}, "b and c were not heard of for long"


@on_virtual_time
async def test_device_time_is_charged_to_its_owners_share(ledger):
    desk = urgent_desk(ledger, Warmed(), shares={"alice": 2.0})
    await met(desk, "a", "b")
    await desk.enter(entry("t"))
    await desk.leave("t-0", seconds=6.0)
    await desk.leave("t-0", seconds=6.0)
    assert desk._dispatch.board.queue.share.used("alice") == 3.0


@on_virtual_time
async def test_a_drained_renderer_gets_nothing_more_and_ends_what_it_has_begun(ledger):
    plan = submitted(ledger, shards=3)
    processes = Warmed()
    desk = urgent_desk(ledger, processes)
    await desk.submit("shapes")
    a, b = await met(desk, "a", "b")
    begun, unbegun = await a.need(), await a.need()
    await a.beat(begun)
    await desk.renew(
        Beat("a", "i", a.epoch, (Report(begun.token, "denoise", 2, 0.2), Report(unbegun.token, "waiting", 0, 0.0)))
    )
    await desk.drain("a", True)
    assert processes.said("revoke") == [("revoke", "a", unbegun.token)]
    renewal = await desk.renew(
        Beat("a", "i", a.epoch, (Report(begun.token, "denoise", 3, 0.3), Report(unbegun.token, "waiting", 0, 0.0)))
    )
    assert (renewal.gone, renewal.drained) == ((), True)
    parked = a.park()
    await settle()
    assert not parked.done()
    assert seats(await desk.enter(entry("t", 2))) == {"b": 2}
    views = {view.name: view.state for view in (await desk.pool()).renderers}
    assert views == {"a": "draining", "b": "rendering"}
    await a.finish(plan, begun)
    await a.finish(plan, unbegun)
    assert {view.name: view.state for view in (await desk.pool()).renderers}["a"] == "drained"
    await desk.drain("a", False)
    await settle()
    assert parked.done()
    assert (await b.park()).lease is None
    assert not (await desk.renew(Beat("a", "i", a.epoch, ()))).drained


@on_virtual_time
async def test_a_drain_outlives_the_dispatcher_and_a_resume_is_not_undone_by_a_late_hello(ledger):
    desk = urgent_desk(ledger, Warmed())
    a = Hand(desk, "a")
    await a.meet()
    await desk.meet(Hello("a", "j", "a CPU", machine=MACHINE, drained=True))
    assert (await desk.pool()).renderers[0].state == "drained"
    await desk.drain("a", False)
    await desk.meet(Hello("a", "k", "a CPU", machine=MACHINE, drained=True))
    assert (await desk.pool()).renderers[0].state == "idle"


@on_virtual_time
async def test_a_renderer_that_is_not_there_cannot_be_drained(ledger):
    desk = urgent_desk(ledger, Warmed())
    with pytest.raises(UnknownRendererError, match="no renderer is called 'c'; there are a to b"):
        await desk.drain("c", True)


@on_virtual_time
async def test_kept_renderers_take_no_shards_in_their_hours_and_do_after_them(ledger):
    submitted(ledger, shards=3)
    rule = Reserve(renderers=1, hours="08:00-12:01")
    desk = urgent_desk(ledger, Warmed(), reserve=(rule,))
    a, b = await met(desk, "a", "b")
    await asyncio.sleep(2 * TICK_S)
    await desk.submit("shapes")
    kept = a.park()
    assert (await b.need()).shard == 0
    assert not kept.done()
    assert [view.reserved for view in (await desk.pool()).renderers] == [True, False]
    assert seats(await desk.enter(entry("t"))) == {"a": 1}
    kept.cancel()
    for _ in range(60):
        await asyncio.sleep(1)
        await a.beat()
        await b.beat()
    assert (await a.need()).task == "render"
    assert [view.reserved for view in (await desk.pool()).renderers] == [False, False]


@on_virtual_time
async def test_a_kept_renderer_finalises_and_a_job_that_nobody_may_render_says_so(ledger):
    plan = submitted(ledger, shards=1)
    desk = urgent_desk(ledger, Warmed(), reserve=(Reserve(renderers=2),))
    (a,) = await met(desk, "a")
    await desk.submit("shapes")
    await settle()
    lease = await a.need()
    await asyncio.sleep(2 * TICK_S)
    await a.finish(plan, lease)
    assert (await a.need()).task == "finalise"
    submitted(ledger, "later")
    await desk.submit("later")
    await settle()
    progress, _ = await desk.progress("later")
    assert (progress.state, progress.message) == (
        "waiting",
        "waits: every renderer is drained, or kept for urgent images",
    )


@on_virtual_time
async def test_models_are_kept_loaded_by_telling_each_renderer_once_in_a_while(ledger):
    processes = Warmed()
    desk = urgent_desk(ledger, processes, reserve=(Reserve(renderers=1, warm=("shapes",)),))
    a, b = await met(desk, "a", "b", loaded=None)

    async def beats(seconds: int, loaded: str | None) -> None:
        for _ in range(seconds):
            await asyncio.sleep(1)
            await stands(a, Standing(loaded))
            await b.beat()

    await beats(60, None)
    assert processes.said("warm") == [("warm", "a", "shapes")]
    await beats(int(WARM_AGAIN_S), "shapes")
    assert processes.said("warm") == []
    await beats(5, "other")
    assert processes.said("warm") == [("warm", "a", "shapes")], "an urgent image of another model took its place"


@on_virtual_time
async def test_a_rule_with_an_unknown_zone_starts_no_dispatcher(ledger):
    with pytest.raises(SettingsError, match="there is no time zone 'Nowhere'"):
        urgent_desk(ledger, Warmed(), reserve=(Reserve(zone="Nowhere"),))


@on_virtual_time
async def test_the_pool_shows_every_slot(ledger, store):
    plan = submitted(ledger, shards=3)
    desk = urgent_desk(ledger, Warmed(), names=("a", "b", "c", "d"))
    await desk.submit("shapes")
    a, b, _ = await met(desk, "a", "b", "c", loaded=None)
    assert (await desk.pool()).machine is None
    await desk.meet(Hello("c", "i", "a CPU", machine=MACHINE))
    lease = await a.need()
    await desk.renew(Beat("a", "i", a.epoch, (Report(lease.token, "load", 1, 0.0),), Standing(None, loading=True)))
    await stands(b, Standing("shapes", urgent=2, load_s=4.0))
    found = await desk.pool()
    assert found.renderers == (
        RendererView("a", "loading", "a CPU", None, plan.job, 0, False),
        RendererView("b", "rendering", "a CPU", "shapes", None, 2, False),
        RendererView("c", "idle", "a CPU", None, None, 0, False),
        RendererView("d", "starting", "", None, None, 0, False),
    )
    assert (found.version, found.store, found.machine) == (__version__, store.url, MACHINE)
    assert (found.load_s, found.wait_s) == ({"shapes": 4.0}, {"shapes": 0.0})


@on_virtual_time
async def test_what_a_renderer_says_of_its_model_is_newer_than_its_parked_question(ledger):
    desk = urgent_desk(ledger, Warmed())
    (a,) = await met(desk, "a")
    parked = a.park()  # says that it has `shapes`
    await settle()
    await stands(a, Standing("other"))
    submitted(ledger, "cancelled")
    await desk.submit("cancelled")
    await settle()
    assert parked.done()
    assert (await desk.pool()).renderers[0].loaded == "other"


@on_virtual_time
async def test_metrics_show_the_farm_and_what_its_processes_counted(ledger):
    submitted(ledger, shards=3)
    desk = urgent_desk(ledger, Warmed())
    a, _ = await met(desk, "a", "b")
    await desk.submit("shapes")
    await a.need()
    assert await state(desk) == "running"
    await desk.enter(entry("t", 2))
    await asyncio.sleep(3)
    for process, count in (("a", 3), ("gateway-0", 0)):
        meters = Meters(process, "1", began_at=NOON)
        if count:
            meters.count("farm_images_total", count, model="shapes", status="ok", **{"class": "urgent"})
            await desk.report(meters.snapshot())
        else:
            meters.count("farm_http_requests_total", method="GET", route="/healthz", status="200")
            await desk.hold(process, (), meters.snapshot())
    farm, own = await desk.metrics()
    assert (farm.process, own.process, own.incarnation) == ("farm", "dispatcher", "epoch-one")
    assert numbers([farm]) == {
        ("farm_images_total", "shapes,urgent,ok"): 3,
        ("farm_http_requests_total", "GET,/healthz,200"): 1,
    }
    found = numbers([own])
    assert found["farm_renderers", "rendering"] == 2
    assert found["farm_renderers", "starting"] == 0
    assert found["farm_gateways", ""] == 1
    assert found["farm_seats", ""] == 2
    assert found["farm_queue_images", "bulk"] == 12
    assert found["farm_queue_images", "urgent"] == 2
    assert found["farm_queue_age_seconds", "urgent"] == 3
    assert found["farm_jobs", "running"] == 1
    assert found["farm_jobs", "stalled"] == 0


@on_virtual_time
async def test_counters_do_not_fall_when_a_renderer_is_replaced(ledger):
    processes = Warmed()
    desk = urgent_desk(ledger, processes, names=("a",))
    await met(desk, "a")
    for incarnation, count in (("1", 5), ("2", 2)):
        meters = Meters("a", incarnation, began_at=NOON)
        meters.count("farm_images_total", count, model="shapes", status="ok", **{"class": "bulk"})
        meters.gauge("farm_gpu_memory_used_bytes", 7.0, renderer="a")
        await desk.report(meters.snapshot())
        if incarnation == "1":
            processes.die("a")
            await settle()
            assert ("farm_gpu_memory_used_bytes", "a") not in numbers(await desk.metrics())
    assert numbers(await desk.metrics())["farm_images_total", "shapes,bulk,ok"] == 7


@on_virtual_time
async def test_gateways_before_the_first_renderer_start_the_farm(ledger):
    processes = Warmed()
    desk = urgent_desk(ledger, processes)
    await desk.hold("gateway-0", (), heard())
    await settle()
    assert [one for one in processes.told if one[0] == "work"] == [("work", "a"), ("work", "b")]
    reply = await desk.ask(Ask("a", "i", "", 0, None))
    assert reply.meet


@on_virtual_time
async def test_a_farm_that_stays_removes_images_that_are_past_their_time(ledger, store):
    for days in (0.1, None):
        single = image_of(NOON, days=days)
        Singles(store).put(single, b"picture")
    desk = urgent_desk(ledger, Warmed(), all_open=True)
    await met(desk, "a")
    await asyncio.sleep(SWEEP_S + 1)
    await settle()
    left = [info.key for info in store.list("singles/")]
    assert [key for key in left if single.id in key] == left
    assert len(left) == 2
