"""A dispatcher's desk on virtual time, over a real ledger in a folder; renderers are played by hand."""

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from farm.claims import CLAIM_S, Claim, Claims
from farm.desk import GREETING_S, RELEASE_S, STOP_S, TICK_S, Desk
from farm.errors import FarmUnavailableError, RecordError, RendererDiedError, StoreDeniedError, StoreUnavailableError
from farm.jobwatch import CONTROLS_S, ELSEWHERE_S, LISTINGS_PER_S, OPEN_S
from farm.lease import LEASE_S, POLL_S, Ask, Beat, Completion, GiveBack, Hello, Lease, Reply, Report, beat_s
from farm.ledger import Ledger
from farm.plan import Plan
from farm.portion import Allowance
from farm.storage.local import LocalStore
from tests.unit.finished_jobs import commit_shard, make_plan, make_totals, render_pass
from tests.unit.virtual import inline, run, settle

NOW = "2026-11-21T12:00:00+00:00"


class Processes:
    """A pool that starts nothing and writes down what it is told; `die` ends one of its processes."""

    def __init__(self, *alive: str):
        self.alive = set(alive)
        self.told: list[tuple[str, ...]] = []
        self.refuse: str | None = None
        self._ends: dict[str, asyncio.Future[None]] = {}

    def find(self) -> tuple[str, ...]:
        return tuple(sorted(self.alive))

    async def work(self, renderer: str) -> None:
        self.told.append(("work", renderer))
        if self.refuse:
            raise FarmUnavailableError(self.refuse)
        self.alive.add(renderer)
        self._ends[renderer] = asyncio.get_running_loop().create_future()
        await self._ends[renderer]

    def die(self, renderer: str) -> None:
        self.alive.discard(renderer)
        self._ends[renderer].set_exception(RendererDiedError("killed"))

    def drop(self, renderer: str, token: str) -> None:
        self.told.append(("drop", renderer, token))

    def revoke(self, renderer: str, token: str) -> None:
        self.told.append(("revoke", renderer, token))

    def retire(self, renderer: str) -> None:
        self.told.append(("retire", renderer))
        if renderer in self._ends:
            self._ends[renderer].set_result(None)

    def end(self, renderer: str) -> None:
        self.told.append(("end", renderer))
        self.die(renderer)


class Hand:
    """A renderer played by hand."""

    def __init__(self, desk: Desk, name: str, *, incarnation: str = "i"):
        self.desk = desk
        self.name = name
        self.incarnation = incarnation
        self.sequence = 0
        self.epoch = ""

    async def meet(self, *held: Lease) -> tuple[str, ...]:
        reply = await self.desk.ask(Ask(self.name, self.incarnation, "", self.sequence, None))
        self.epoch = reply.epoch
        return await self.desk.meet(Hello(self.name, self.incarnation, "a CPU", held))

    def park(self) -> asyncio.Task[Reply]:
        self.sequence += 1
        return asyncio.create_task(self.desk.ask(Ask(self.name, self.incarnation, self.epoch, self.sequence, "shapes")))

    async def need(self) -> Lease:
        reply = await self.park()
        assert reply.lease is not None
        return reply.lease

    async def beat(self, *leases: Lease, ticks: int = 1) -> tuple[str, ...]:
        reports = tuple(Report(lease.token, "denoise", ticks, 0.1) for lease in leases)
        return (await self.desk.renew(Beat(self.name, self.incarnation, self.epoch, reports))).gone

    async def finish(self, plan: Plan, lease: Lease) -> None:
        """Store a receipt, or close the pass, and tell of it."""
        if lease.task == "render":
            commit_shard(Ledger(self.desk._ledger.store), plan, lease.shard)
        else:
            self.desk._ledger.put_totals(plan, lease.pass_number, make_totals())
        await self.desk.complete(Completion(lease, self.name, lease.images, 0, {"denoise": 1.0}))


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(LocalStore(tmp_path))


def submitted(ledger: Ledger, job: str = "shapes", *, shards: int = 3) -> Plan:
    plan = make_plan(job=job, rows=2 * shards, seeds=2, shard_images=4)
    ledger.open(job)
    assert ledger.create_plan(plan, 1)
    return plan


def make_desk(ledger: Ledger, processes: Processes, *, names: tuple[str, ...] = ("a", "b"), farm: str = "one", **more):
    loop = asyncio.get_running_loop()
    me = Claim(farm=farm, host=f"host-{farm}", machine=farm, pid=1, started=1)
    claims = Claims(ledger.store, me, enforced=True, clock=loop.time, lives=lambda pid, started: True)
    return Desk(
        epoch=f"epoch-{farm}", pool=processes, ledger=ledger, claims=claims, names=names, threads=inline, **more
    )


def on_virtual_time(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    @functools.wraps(test)
    def sync(**fixtures: object) -> None:
        run(test(**fixtures))

    return sync


async def state(desk: Desk, job: str = "shapes") -> str:
    progress, _ = await desk.progress(job)
    assert progress is not None
    return progress.state


@on_virtual_time
async def test_a_job_is_claimed_leased_finalised_and_let_go_of(ledger):
    plan = submitted(ledger)
    desk = make_desk(ledger, Processes())
    a = Hand(desk, "a")
    await a.meet()
    await desk.submit("shapes")
    await settle()
    assert ledger.store.head("claims/shapes") is not None
    for expected in ("render", "render", "render", "finalise"):
        lease = await a.need()
        assert lease.task == expected
        await a.finish(plan, lease)
    await settle()
    assert await state(desk) == "done"
    assert await desk.unfinished() == ()
    assert ledger.open_jobs() == []
    await asyncio.sleep(3)
    assert ledger.store.head("claims/shapes") is None


@on_virtual_time
async def test_a_new_job_wakes_as_many_parked_questions_as_it_has_shards(ledger):
    names = tuple(f"r{n}" for n in range(300))
    desk = make_desk(ledger, Processes(), names=names)
    hands = [Hand(desk, name) for name in names]
    for hand in hands:
        await hand.meet()
    parked = [hand.park() for hand in hands]
    await settle()
    assert not any(task.done() for task in parked)
    submitted(ledger, shards=3)
    await desk.submit("shapes")
    await settle()
    assert [task.done() for task in parked] == [True] * 3 + [False] * 297
    assert sorted(task.result().lease.shard for task in parked[:3]) == [0, 1, 2]
    await asyncio.sleep(POLL_S + 2 * TICK_S)
    assert all(task.done() for task in parked)
    assert all(task.result().lease is None for task in parked[3:])


@on_virtual_time
async def test_a_dead_renderers_question_is_forgotten_and_its_shard_goes_to_another(ledger):
    submitted(ledger, shards=1)
    processes = Processes()
    desk = make_desk(ledger, processes)
    await desk.submit("shapes")
    a, b = Hand(desk, "a"), Hand(desk, "b")
    await a.meet()
    await b.meet()
    lease = await a.need()
    again, other = a.park(), b.park()
    await settle()
    assert not again.done()
    processes.die("a")
    await settle()
    assert again.result() == Reply("epoch-one")
    assert (other.result().lease.shard, other.result().lease.attempt) == (0, 2)
    assert lease.attempt == 1


@on_virtual_time
async def test_a_shard_whose_renderer_died_after_its_receipt_is_done_and_not_leased_again(ledger):
    plan = submitted(ledger, shards=2)
    processes = Processes()
    desk = make_desk(ledger, processes)
    await desk.submit("shapes")
    a, b = Hand(desk, "a"), Hand(desk, "b")
    await a.meet()
    await b.meet()
    lease = await a.need()
    commit_shard(ledger, plan, lease.shard)
    processes.die("a")
    await settle()
    other = await b.need()
    assert other.shard != lease.shard
    await b.finish(plan, other)
    assert (await b.need()).task == "finalise"
    progress, _ = await desk.progress("shapes")
    assert (progress.done, progress.images) == (8, 8)


@on_virtual_time
async def test_a_check_is_asked_again_until_the_store_answers(ledger, monkeypatch):
    submitted(ledger, shards=1)
    processes = Processes()
    desk = make_desk(ledger, processes)
    await desk.submit("shapes")
    a, b = Hand(desk, "a"), Hand(desk, "b")
    await a.meet()
    await b.meet()
    await a.need()
    away = [True]

    def plans(self: Ledger, job: str, real: Callable[[Ledger, str], list[Plan]] = Ledger.plans) -> list[Plan]:
        if away[0]:
            raise StoreUnavailableError("away")
        return real(self, job)

    monkeypatch.setattr(Ledger, "plans", plans)
    processes.die("a")
    waits = b.park()
    await asyncio.sleep(5)
    assert not waits.done()
    away[0] = False
    await asyncio.sleep(2)
    assert waits.result().lease is not None


@on_virtual_time
async def test_a_control_is_seen_within_about_a_second_and_its_leases_are_dropped(ledger):
    submitted(ledger)
    processes = Processes()
    desk = make_desk(ledger, processes)
    await desk.submit("shapes")
    a = Hand(desk, "a")
    await a.meet()
    lease = await a.need()
    ledger.append_control("shapes", "pause", at=NOW, by="me")
    await asyncio.sleep(CONTROLS_S + 0.1)
    assert ("drop", "a", lease.token) in processes.told
    assert await state(desk) == "paused"
    waits = a.park()
    ledger.append_control("shapes", "resume", at=NOW, by="me")
    await asyncio.sleep(CONTROLS_S + 0.1)
    assert waits.result().lease is not None


@on_virtual_time
async def test_a_deleted_jobs_leases_are_dropped_and_its_claim_let_go_of(ledger):
    submitted(ledger)
    processes = Processes()
    desk = make_desk(ledger, processes)
    await desk.submit("shapes")
    a = Hand(desk, "a")
    await a.meet()
    lease = await a.need()
    ledger.store.put("deleted/shapes", b"{}")
    await asyncio.sleep(2 * CONTROLS_S + 0.1)
    assert ("drop", "a", lease.token) in processes.told
    assert await state(desk) == "deleted"
    assert ledger.store.head("claims/shapes") is None


@on_virtual_time
async def test_controls_of_many_jobs_are_listed_at_a_bounded_pace(ledger, monkeypatch):
    desk = make_desk(ledger, Processes())
    for number in range(100):
        submitted(ledger, f"job-{number:03d}", shards=1)
        await desk.submit(f"job-{number:03d}")
    await settle()
    looked: list[str] = []
    monkeypatch.setattr(Ledger, "last_control", lambda self, job: looked.append(job) or 0)
    await asyncio.sleep(10)
    assert 0.8 * 10 * LISTINGS_PER_S <= len(looked) <= 10 * LISTINGS_PER_S + 1
    assert len(set(looked)) == 100


@on_virtual_time
async def test_a_control_that_cannot_be_read_is_shown_and_holds_up_nothing(ledger, caplog):
    plan = submitted(ledger)
    submitted(ledger, "other")
    desk = make_desk(ledger, Processes())
    await desk.submit("shapes")
    await desk.submit("other")
    a = Hand(desk, "a")
    await a.meet()
    await settle()
    ledger.store.put("jobs/shapes/control/000001.json", b"{")
    with caplog.at_level(logging.ERROR):
        await asyncio.sleep(10)
    assert len(caplog.records) == 1
    progress, _ = await desk.progress("shapes")
    assert "control/000001.json" in progress.message
    await a.finish(plan, await a.need())
    with pytest.raises(RecordError, match=r"control/000001\.json"):
        await desk.submit("shapes")
    ledger.store.delete("jobs/shapes/control/000001.json")
    await desk.submit("shapes")
    progress, _ = await desk.progress("shapes")
    assert progress.message is None or "control" not in progress.message


@on_virtual_time
async def test_a_job_that_another_farm_renders_is_followed_to_its_end(ledger):
    plan = submitted(ledger)
    one, two = make_desk(ledger, Processes()), make_desk(ledger, Processes(), farm="two")
    await one.submit("shapes")
    await two.submit("shapes")
    hand = Hand(two, "a")
    await hand.meet()
    waits = hand.park()
    progress, _ = await two.progress("shapes")
    assert progress.state == "elsewhere"
    assert "host-one (process 1)" in progress.message
    a = Hand(one, "a")
    await a.meet()
    await a.finish(plan, await a.need())
    await asyncio.sleep(ELSEWHERE_S + 2)
    progress, _ = await two.progress("shapes")
    assert (progress.state, progress.done) == ("elsewhere", 4)
    for _ in range(3):
        await a.finish(plan, await a.need())
    await asyncio.sleep(ELSEWHERE_S + 2)
    assert await state(two) == "done"
    assert waits.result().lease is None


@on_virtual_time
async def test_a_farm_that_is_gone_loses_its_jobs_to_one_that_waits_and_its_receipts_stay(ledger):
    plan = submitted(ledger)
    one = make_desk(ledger, Processes())
    await one.submit("shapes")
    a = Hand(one, "a")
    await a.meet()
    await a.finish(plan, await a.need())
    for task in one._rounds:
        task.cancel()
    two = make_desk(ledger, Processes(), farm="two")
    await two.submit("shapes")
    assert await state(two) == "elsewhere"
    await asyncio.sleep(CLAIM_S + 5)
    b = Hand(two, "b")
    await b.meet()
    assert {(await b.need()).shard, (await b.need()).shard} == {1, 2}


@on_virtual_time
async def test_a_farm_that_stops_retires_its_renderers_and_frees_its_jobs_at_once(ledger):
    submitted(ledger)
    processes = Processes()
    one = make_desk(ledger, processes)
    await one.submit("shapes")
    await settle()
    await one.stop()
    assert [words for words in processes.told if words[0] == "retire"] == [("retire", "a"), ("retire", "b")]
    two = make_desk(ledger, Processes(), farm="two")
    await two.submit("shapes")
    await settle()
    assert await state(two) == "waiting"
    hand = Hand(two, "a")
    await hand.meet()
    assert (await hand.need()).shard == 0


@on_virtual_time
async def test_a_renderer_that_falls_silent_is_ended_and_started_anew_and_its_late_receipt_counts(ledger):
    plan = submitted(ledger, shards=1)
    processes = Processes()
    desk = make_desk(ledger, processes)
    await desk.submit("shapes")
    a, b = Hand(desk, "a"), Hand(desk, "b")
    await a.meet()
    await b.meet()
    lease = await a.need()
    for _ in range(int(LEASE_S) + 5):
        await b.beat()
        await asyncio.sleep(1)
    assert ("end", "a") in processes.told
    assert processes.told.count(("work", "a")) == 2
    other = await b.need()
    assert other.shard == lease.shard
    await a.finish(plan, lease)
    assert ("drop", "b", other.token) in processes.told
    progress, _ = await desk.progress("shapes")
    assert (progress.state, progress.done) == ("finalising", 4)


@on_virtual_time
async def test_after_a_restart_nothing_is_leased_until_all_that_live_have_told_what_they_hold(ledger):
    submitted(ledger)
    first = make_desk(ledger, Processes())
    await first.submit("shapes")
    a = Hand(first, "a")
    await a.meet()
    held = await a.need()
    again = make_desk(ledger, Processes("a", "b"))
    await again.submit("shapes")
    b, a = Hand(again, "b"), Hand(again, "a")
    await b.meet()
    waits = b.park()
    await settle()
    assert not waits.done()
    assert await a.meet(held) == ()
    await settle()
    assert waits.result().lease.shard != held.shard
    assert await a.beat(held) == ()


@on_virtual_time
async def test_a_renderer_that_lives_and_says_nothing_holds_up_leases_for_a_beat_only(ledger):
    submitted(ledger)
    desk = make_desk(ledger, Processes("a", "b"))
    await desk.submit("shapes")
    b = Hand(desk, "b")
    await b.meet()
    waits = b.park()
    await asyncio.sleep(beat_s(2) + GREETING_S - 0.5)
    assert not waits.done()
    await asyncio.sleep(TICK_S + 1)
    assert waits.done()


@on_virtual_time
async def test_a_wall_clock_that_jumps_harms_nobody(ledger):
    submitted(ledger)
    wall = [1e9]
    processes = Processes()
    desk = make_desk(ledger, processes, wall=lambda: wall[0])
    await desk.submit("shapes")
    a = Hand(desk, "a")
    await a.meet()
    lease = await a.need()
    for jump in (1e8, -1e9, 5e8):
        wall[0] += jump
        await asyncio.sleep(2)
        assert await a.beat(lease) == ()
    assert await state(desk) == "running"
    assert [words for words in processes.told if words[0] != "work"] == []


@on_virtual_time
async def test_a_farm_that_serves_a_whole_store_finds_jobs_that_nobody_told_it_of(ledger):
    submitted(ledger, "first")
    desk = make_desk(ledger, Processes(), all_open=True)
    await desk.progress("first")
    await settle()
    assert await state(desk, "first") == "waiting"
    submitted(ledger, "second")
    await asyncio.sleep(OPEN_S + 1)
    assert await desk.unfinished() == ("first", "second")


@on_virtual_time
async def test_a_job_that_cannot_be_read_does_not_keep_a_farm_from_the_others(ledger):
    submitted(ledger, "sound")
    ledger.open("broken")
    ledger.store.put("jobs/broken/plans/0001.json", b"{")
    desk = make_desk(ledger, Processes(), all_open=True)
    await desk.progress("sound")
    await asyncio.sleep(1)
    assert await desk.unfinished() == ("sound",)
    with pytest.raises(RecordError, match=r"plans/0001\.json"):
        await desk.submit("broken")


@on_virtual_time
async def test_why_no_renderer_starts_is_told_and_forgotten_when_one_does(ledger):
    submitted(ledger)
    processes = Processes()
    processes.refuse = "GPU 0 is held by another farm"
    desk = make_desk(ledger, processes)
    await desk.submit("shapes")
    assert (await desk.progress("shapes"))[1] is None
    await asyncio.sleep(15)
    assert (await desk.progress("shapes"))[1] == "renderers: GPU 0 is held by another farm"
    processes.refuse = None
    await asyncio.sleep(11)
    await Hand(desk, "a").meet()
    assert (await desk.progress("shapes"))[1] is None


@on_virtual_time
async def test_renderers_that_are_slow_to_start_are_said_to_be(ledger):
    submitted(ledger)
    desk = make_desk(ledger, Processes(), free="GPU")
    await desk.submit("shapes")
    await asyncio.sleep(61)
    progress, _ = await desk.progress("shapes")
    assert progress.message == "no renderer has started yet: Ray has no free GPU for one, or starts slowly"


@on_virtual_time
async def test_a_part_that_fails_for_a_reason_of_its_own_ends_the_process(ledger, monkeypatch, caplog):
    ended: list[int] = []
    desk = make_desk(ledger, Processes(), end_process=ended.append)
    await desk.unfinished()
    monkeypatch.setattr(desk._dispatch, "tick", lambda **_: 1 / 0)
    await asyncio.sleep(2 * TICK_S)
    assert ended == [1]
    assert "the dispatcher cannot go on" in caplog.text


@on_virtual_time
async def test_a_start_that_failed_is_tried_again_by_the_next_call(ledger):
    processes = Processes()
    desk = make_desk(ledger, processes)
    real, processes.find = processes.find, lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        await desk.unfinished()
    processes.find = real
    assert await desk.unfinished() == ()


@on_virtual_time
async def test_a_lease_given_back_unbegun_goes_to_the_next_at_once(ledger):
    submitted(ledger, shards=1)
    desk = make_desk(ledger, Processes())
    await desk.submit("shapes")
    a, b = Hand(desk, "a"), Hand(desk, "b")
    await a.meet()
    await b.meet()
    lease = await a.need()
    waits = b.park()
    await desk.give_back(GiveBack(lease, "a", "revoked", "asked back"))
    await settle()
    assert waits.result().lease.shard == lease.shard


@on_virtual_time
async def test_a_finished_job_that_is_asked_for_is_done_and_never_claimed(ledger):
    plan = submitted(ledger)
    render_pass(ledger, plan, 1)
    desk = make_desk(ledger, Processes())
    await desk.submit("shapes")
    assert await state(desk) == "done"
    assert ledger.store.head("claims/shapes") is None


@on_virtual_time
async def test_a_job_whose_read_was_refused_once_is_read_again_and_goes_on(ledger, monkeypatch):
    plan = submitted(ledger)
    desk = make_desk(ledger, Processes())
    await desk.submit("shapes")
    a = Hand(desk, "a")
    await a.meet()
    real, refusals = Ledger.plans, [StoreDeniedError("token expired")]

    def plans(self, job):
        if refusals:
            raise refusals.pop()
        return real(self, job)

    monkeypatch.setattr(Ledger, "plans", plans)
    last = None
    for _ in range(3):
        await a.finish(plan, await a.need())
    await asyncio.sleep(3 * ELSEWHERE_S)
    last = await a.need()
    assert last.task == "finalise"
    refusals.append(StoreDeniedError("token expired"))
    await a.finish(plan, last)
    await asyncio.sleep(3 * ELSEWHERE_S)
    progress, _ = await desk.progress("shapes")
    assert progress.state == "done"


@on_virtual_time
async def test_after_stop_nothing_is_started_or_claimed_again(ledger):
    submitted(ledger)
    processes = Processes()
    desk = make_desk(ledger, processes)
    await desk.submit("shapes")
    await settle()
    stopping = asyncio.create_task(desk.stop())
    await stopping
    before = list(processes.told)
    await asyncio.sleep(60)
    assert processes.told == before
    assert ledger.store.head("claims/shapes") is None
    other = make_desk(ledger, Processes("a"), farm="two")
    await other.stop()
    assert ("retire", "a") in other._pool.told
    with pytest.raises(FarmUnavailableError, match="is being stopped"):
        await other.progress("shapes")


@on_virtual_time
async def test_a_farm_stops_in_bounded_time_though_its_store_and_its_renderers_do_not_answer(
    ledger, monkeypatch, caplog
):
    away = asyncio.Event()

    def threads(count: int, name: str):
        async def call(work):
            if away.is_set():
                await asyncio.sleep(3600)
            return work()

        return call

    monkeypatch.setattr("tests.unit.test_desk.inline", threads)
    processes = Processes()
    processes.retire = lambda renderer: None  # it is loading a model
    submitted(ledger)
    desk = make_desk(ledger, processes)
    await desk.submit("shapes")
    await settle()
    await desk.charge("k", Allowance(images_per_day=9), 1)
    away.set()
    before = asyncio.get_running_loop().time()
    await desk.stop()
    assert asyncio.get_running_loop().time() - before == STOP_S + RELEASE_S
    assert [record.getMessage() for record in caplog.records if record.name == "farm.desk"] == [
        "quotas not written: what was used in the last seconds is forgotten",
        "claims not let go of: another farm waits until they time out",
    ]


@on_virtual_time
async def test_many_who_ask_for_a_job_wait_for_one_read(ledger, monkeypatch):
    submitted(ledger)
    desk = make_desk(ledger, Processes())
    reads = []
    real = Ledger.plans
    monkeypatch.setattr(Ledger, "plans", lambda self, job: reads.append(job) or real(self, job))
    await asyncio.gather(*(desk.submit("shapes") for _ in range(100)))
    assert len(reads) < 20
