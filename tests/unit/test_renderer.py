"""A renderer beside a dispatcher in one process: the real rules, store, engine and receipts; only Ray is left out."""

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from farm.cores import Cores
from farm.dispatch import Dispatch
from farm.drawing import ShardProgress
from farm.errors import (
    CancelledError,
    DeviceLostError,
    FarmUnavailableError,
    NumericsError,
    RendererDiedError,
    StoreUnavailableError,
)
from farm.lease import (
    STAGE_LIMIT_S,
    Ask,
    Beat,
    Check,
    Completion,
    Drop,
    GiveBack,
    Hello,
    Lease,
    Read,
    Renewal,
    Reply,
    Revoke,
)
from farm.ledger import Ledger, Totals
from farm.manifest import Output
from farm.plan import ImageSpec, Plan, PromptTable
from farm.portion import Portion
from farm.provenance import read_picture
from farm.rebuild import completion_of, read_job
from farm.renderer import REPLACED_EXIT, STUCK_EXIT, Renderer
from farm.shard import ShardRunner
from farm.storage.local import LocalStore
from farm.sweep import Template
from farm.tally import Snapshot
from farm.task import Task
from farm.watchdog import Watchdog
from tests.unit.finished_jobs import make_plan


class InProcess:
    """A link to a dispatcher in this process that can go away, and come back having forgotten everything."""

    def __init__(self, ledger: Ledger, job: str):
        self._ledger = ledger
        self._job = job
        self.away = False
        self.restarts = 0
        self.asked: list[Ask] = []
        self.given_back: list[GiveBack] = []
        self.completed: list[Lease] = []
        self.beats: list[Beat] = []
        self.snapshots: list[Snapshot] = []
        self.every_s: float | None = None
        self.renderers: dict[str, Renderer] = {}
        self.restart()

    def restart(self) -> None:
        self.restarts += 1
        self.dispatch = Dispatch(epoch=f"epoch-{self.restarts}")
        self.dispatch.take_up(read_job(self._ledger, self._job), now=self.now)

    @property
    def now(self) -> float:
        return time.monotonic()

    def _answer(self) -> None:
        if self.away:
            raise FarmUnavailableError("away")

    def act(self) -> None:
        """Do what the rules ask for."""
        for effect in self.dispatch.effects():
            match effect:
                case Drop(renderer, token):
                    self.renderers[renderer].drop(token)
                case Revoke(renderer, token):
                    self.renderers[renderer].revoke(token)
                case Check():
                    self.dispatch.checked(effect, completion_of(self._ledger, effect), now=self.now)
                case Read(job):
                    self.dispatch.take_up(read_job(self._ledger, job), now=self.now)

    async def meet(self, hello: Hello) -> tuple[str, ...]:
        self._answer()
        return self.dispatch.meet(hello, now=self.now)

    async def ask(self, question: Ask) -> Reply:
        self._answer()
        self.asked.append(question)
        reply = self.dispatch.ask(question, now=self.now)
        self.act()
        if reply.lease is None:
            await asyncio.sleep(0.01)
        return reply

    async def renew(self, beat: Beat) -> Renewal:
        self._answer()
        self.beats.append(beat)
        renewal = self.dispatch.renew(beat, now=self.now)
        self.act()
        return renewal if self.every_s is None else replace(renewal, every_s=self.every_s)

    async def complete(self, completion: Completion) -> None:
        self._answer()
        self.completed.append(completion.lease)
        self.dispatch.complete(completion, now=self.now)
        self.act()

    async def give_back(self, end: GiveBack) -> None:
        self._answer()
        self.given_back.append(end)
        self.dispatch.give_back(end, now=self.now)
        self.act()

    async def report(self, snapshot: Snapshot) -> None:
        self._answer()
        self.snapshots.append(snapshot)


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """Sixteen images that take 10 ms each, in shards of four; their prompts are a template's."""
    plan = make_plan(rows=8, seeds=2, shard_images=4)
    card = plan.card.model_copy(
        update={"defaults": plan.card.defaults.model_copy(update={"num_inference_steps": 1, "guidance_scale": 0.0})}
    )
    template = Template(text="shape {n}", vary={"n": tuple(str(n) for n in range(8))})
    table = PromptTable(rows=8, parts=0, keyed=False, digest="0" * 64, template=template)
    numerics = plan.numerics.model_copy(update={"versions": {}})
    return plan.model_copy(update={"prompts": table, "card": card, "params": card.defaults, "numerics": numerics})


@pytest.fixture
def ledger(tmp_path: Path, plan: Plan) -> Ledger:
    ledger = Ledger(LocalStore(tmp_path / "store"))
    ledger.open(plan.job)
    assert ledger.create_plan(plan, 1)
    return ledger


def make_renderer(
    ledger: Ledger, link: InProcess, name: str = "renderer-0", *, cores: int = 1, **options: Any
) -> Renderer:
    renderer = Renderer(
        name=name,
        incarnation="i",
        device="cpu",
        device_name="a CPU",
        cores=cores,
        vram_gib=16,
        ledger=ledger,
        link=link,
        **options,
    )
    link.renderers[name] = renderer
    return renderer


def slower(plan: Plan, *, steps: int) -> Plan:
    """Another run of the job, with steps of 10 ms an image."""
    params = plan.params.model_copy(update={"num_inference_steps": steps})
    return plan.model_copy(update={"params": params, "run": "11111111"})


async def until(true: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not true():  # noqa: ASYNC110  (what it waits for has no event)
            await asyncio.sleep(0.005)


def run_until(true: Callable[[], object], *renderers: Renderer, meanwhile: Callable[[], object] = lambda: None) -> None:
    """Let renderers work until something is true, then retire them."""

    async def main() -> None:
        works = [asyncio.create_task(renderer.work()) for renderer in renderers]
        meanwhile()
        await until(true)
        for renderer in renderers:
            renderer.retire()
        await asyncio.wait_for(asyncio.gather(*works), 20)

    asyncio.run(main())


def test_a_job_is_rendered_finalised_and_known_as_done(ledger, plan):
    link = InProcess(ledger, plan.job)
    run_until(lambda: link.dispatch.progress(plan.job).state == "done", make_renderer(ledger, link))
    assert ledger.done_shards(plan, 1).all()
    assert [row.index for row in ledger.rows(plan)] == list(range(16))
    assert ledger.totals(plan).ok == 16
    assert [lease.task for lease in link.completed] == ["render"] * 4 + ["finalise"]
    assert link.given_back == []


def test_a_small_model_is_rendered_on_several_cores_side_by_side(ledger, plan):
    link = InProcess(ledger, plan.job)
    renderer = make_renderer(ledger, link, cores=3)
    most = 0

    def done() -> bool:
        nonlocal most
        most = max(most, sum(bool(task.progress.in_hand) for task in list(renderer._tasks.values())))
        return link.dispatch.progress(plan.job).state == "done"

    run_until(done, renderer)
    assert most >= 2
    assert len(renderer._engines) <= 3
    assert ledger.totals(plan).ok == 16


def test_cores_are_taken_all_at_once_or_not_at_all():
    cores = Cores(2)
    assert cores.take(1, timeout=0)
    assert not cores.take(2, timeout=0.01)
    assert cores.take(1, timeout=0)
    cores.give_back(1)
    cores.give_back(1)
    assert cores.take(2, timeout=0)


def test_two_renderers_share_a_job(ledger, plan):
    link = InProcess(ledger, plan.job)
    pair = [make_renderer(ledger, link, "a"), make_renderer(ledger, link, "b")]
    run_until(lambda: link.dispatch.progress(plan.job).state == "done", *pair)
    assert {row.renderer for row in ledger.rows(plan)} == {"a", "b"}
    assert sorted(lease.shard for lease in link.completed) == [-1, 0, 1, 2, 3]


def test_a_dispatcher_that_restarts_in_mid_shard_lets_its_renderer_go_on(ledger, plan, monkeypatch):
    slow = slower(plan, steps=20)
    assert ledger.create_plan(slow, 2)
    ledger.put_totals(plan, 1, _totals())
    link = InProcess(ledger, plan.job)
    link.every_s = 0.02
    renderer = make_renderer(ledger, link)
    renderer._beat_s = 0.02
    rendered: list[str] = []

    def done() -> bool:
        steps = [task.progress.ticks for task in renderer._tasks.values() if task.progress.stage == "denoise"]
        if steps and max(steps) > 5 and link.restarts < 4 and not rendered:
            rendered.extend(renderer._tasks)
            link.restart()
        if rendered and rendered[0] not in renderer._tasks:
            rendered.clear()
        progress = link.dispatch.progress(plan.job)
        return progress is None or progress.state == "done"

    run_until(done, renderer)
    assert link.restarts == 4
    assert link.given_back == []
    pictures = list(ledger.store.list(f"jobs/{plan.job}/{slow.run}/images/"))
    assert len(pictures) == 16


def test_receipts_written_while_the_dispatcher_is_away_are_delivered_when_it_is_back(ledger, plan):
    link = InProcess(ledger, plan.job)

    def done() -> bool:
        link.away = len(link.asked) > 1 and not ledger.done_shards(plan, 1)[0]
        return link.dispatch.progress(plan.job).state == "done"

    run_until(done, make_renderer(ledger, link))
    assert sorted(lease.shard for lease in link.completed) == [-1, 0, 1, 2, 3]
    assert ledger.totals(plan).ok == 16


def test_a_store_error_gives_the_lease_back_with_its_code_and_leaves_no_receipt(ledger, plan, monkeypatch):
    link = InProcess(ledger, plan.job)
    monkeypatch.setattr(
        LocalStore, "create", lambda self, key, data, **_: (_ for _ in ()).throw(StoreUnavailableError("gone away"))
    )
    run_until(lambda: link.given_back, make_renderer(ledger, link))
    assert (link.given_back[0].code, link.given_back[0].message) == ("store_unavailable", "gone away")
    assert not ledger.done_shards(plan, 1).any()


def test_a_dropped_lease_ends_within_a_step_and_blames_nobody(ledger, plan):
    slow = slower(plan, steps=500)
    assert ledger.create_plan(slow, 2)
    ledger.put_totals(plan, 1, _totals())
    link = InProcess(ledger, plan.job)
    renderer = make_renderer(ledger, link)
    dropped = []

    def done() -> bool:
        if not dropped and renderer._tasks and any(t.progress.stage == "denoise" for t in renderer._tasks.values()):
            dropped.append(ledger.append_control(plan.job, "cancel", at="2026-01-01T00:00:00+00:00", by="me"))
            link.dispatch.take_up(read_job(ledger, plan.job), now=link.now)
            link.act()
        return bool(link.given_back)

    run_until(done, renderer)
    assert link.given_back[0].code == "cancelled"
    assert {end.code for end in link.given_back} <= {"cancelled", "retired"}
    assert link.dispatch.progress(plan.job).state == "cancelled"


def test_a_retired_renderer_gives_back_what_it_holds(ledger, plan):
    link = InProcess(ledger, plan.job)
    run_until(lambda: link.asked, make_renderer(ledger, link))
    assert {end.code for end in link.given_back} <= {"retired"}
    assert all(np.isin([lease.shard for lease in link.completed], range(4)))


def test_a_retired_renderer_does_not_wait_for_its_question_to_be_answered(ledger, plan):
    link = InProcess(ledger, plan.job)

    async def parked(question: Ask) -> Reply:
        await asyncio.sleep(3600)
        raise AssertionError

    link.ask = parked
    run_until(lambda: True, make_renderer(ledger, link))


def test_a_device_that_failed_ends_the_process_after_the_lease_went_back(ledger, plan, monkeypatch):
    def fail(self, **_: object) -> None:
        raise DeviceLostError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("farm.shard.ShardRunner.run", fail)
    link = InProcess(ledger, plan.job)
    ended: list[int] = []
    run_until(lambda: ended, make_renderer(ledger, link, end_process=ended.append))
    assert link.given_back[0].code == "device_lost"


def test_a_plan_made_for_other_versions_is_left_to_others_with_both_versions_named(ledger, plan):
    old = plan.model_copy(
        update={"numerics": plan.numerics.model_copy(update={"versions": {"numpy": "0.1"}}), "run": "22222222"}
    )
    assert ledger.create_plan(old, 2)
    ledger.put_totals(plan, 1, _totals())
    link = InProcess(ledger, plan.job)
    run_until(lambda: link.dispatch.stall_code(plan.job), make_renderer(ledger, link))
    assert link.dispatch.stall_code(plan.job) == "numerics"
    assert "numpy 0.1" in link.dispatch.progress(plan.job).message


class Hung:
    """A shard runner that begins and then hangs, as in a driver, until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.begun = threading.Event()
        self.end = threading.Event()
        monkeypatch.setattr("farm.shard.ShardRunner.run", self._run)

    def _run(self, *, on_device: Any, on_progress: Callable[[ShardProgress], None], **_: object) -> None:
        if on_device.acquire(timeout=5):
            on_progress(ShardProgress(stage="denoise", ticks=1, in_hand=(0,)))
            self.begun.set()
            self.end.wait(20)
            on_device.release()
        raise StoreUnavailableError("let go")


def test_a_renderer_on_which_nothing_progresses_ends_its_own_process(ledger, plan, monkeypatch):
    monkeypatch.setattr("farm.renderer.WATCH_S", 0.01)
    hung = Hung(monkeypatch)
    link = InProcess(ledger, plan.job)
    ended: list[int] = []

    def end_process(code: int) -> None:
        ended.append(code)
        hung.end.set()

    watchdog = Watchdog({**STAGE_LIMIT_S, "denoise": 0.1})
    run_until(lambda: ended, make_renderer(ledger, link, watchdog=watchdog, end_process=end_process))
    assert ended == [STUCK_EXIT]


def test_a_receipt_that_no_dispatcher_takes_in_is_nothing_to_be_stuck_on(ledger, plan, monkeypatch):
    monkeypatch.setattr("farm.renderer.WATCH_S", 0.01)
    monkeypatch.setattr("farm.renderer.CALL_AGAIN_S", (0.02,))
    link = InProcess(ledger, plan.job)
    ended: list[int] = []
    told: list[float] = []

    async def away(completion: Completion) -> None:
        told.append(link.now)
        raise FarmUnavailableError("away")

    link.complete = away
    watchdog = Watchdog({**STAGE_LIMIT_S, "write": 0.2, "waiting": 30.0})
    renderer = make_renderer(ledger, link, watchdog=watchdog, end_process=ended.append)
    run_until(lambda: told and told[-1] - told[0] > 0.5, renderer)
    assert ended == []


def test_a_renderer_whose_dispatcher_is_gone_for_good_stores_what_it_holds_and_does_not_spin(ledger, plan, monkeypatch):
    slow = slower(plan, steps=10)
    assert ledger.create_plan(slow, 2)
    ledger.put_totals(plan, 1, _totals())
    monkeypatch.setattr("farm.renderer.CALL_AGAIN_S", (0.05,))
    link = InProcess(ledger, plan.job)
    renderer = make_renderer(ledger, link)
    calls = 0
    gone_at = 0.0

    def answer() -> None:
        nonlocal calls
        calls += link.away
        if link.away:
            raise FarmUnavailableError("away")

    link._answer = answer

    def done() -> bool:
        nonlocal gone_at
        if not link.away and any(task.begun for task in renderer._tasks.values()):
            link.away, gone_at = True, link.now
        return link.away and ledger.done_shards(slow, 1).any() and link.now - gone_at > 1.0

    run_until(done, renderer)
    stored = int(ledger.done_shards(slow, 1).sum())
    assert 1 <= stored <= 2
    assert calls <= 3 * 20 * 1.5


def test_a_revoked_lease_that_has_not_begun_goes_back_and_one_that_has_goes_on(ledger, plan, monkeypatch):
    hung = Hung(monkeypatch)
    link = InProcess(ledger, plan.job)
    renderer = make_renderer(ledger, link)
    revoked: list[str] = []

    def done() -> bool:
        if hung.begun.is_set() and len(renderer._tasks) == 2 and not revoked:
            revoked.extend(renderer._tasks)
            for token in revoked:
                renderer.revoke(token)
            renderer.revoke("never leased")
        waits = [task for task in renderer._tasks.values() if task.lease.token in revoked[1:]]
        if revoked and not waits and not hung.end.is_set():
            begun = renderer._tasks[revoked[0]]
            assert (begun.begun, begun.revoked, begun.stop.is_set()) == (True, False, False)
            hung.end.set()
        return len(link.given_back) >= 2

    monkeypatch.setattr(ShardRunner, "run", _on_device(hung))
    run_until(done, renderer)
    assert [(end.lease.token, end.code) for end in link.given_back[:2]] == [
        (revoked[1], "revoked"),
        (revoked[0], "store_unavailable"),
    ]


def _on_device(hung: Hung) -> Callable[..., None]:
    """A run that waits for the device as a shard does, then hangs."""

    def run(self: ShardRunner, *, on_device: Any, on_progress: Any, cancelled: Callable[[], bool], **_: object) -> None:
        while not on_device.acquire(timeout=0.01):
            if cancelled():
                raise CancelledError("taken away")
        on_progress(ShardProgress(stage="denoise", ticks=1, last_batch=True))
        hung.begun.set()
        hung.end.wait(20)
        on_device.release()
        raise StoreUnavailableError("let go")

    return run


def test_begin_and_revoke_exclude_each_other_whichever_thread_is_first():
    lease = Lease("t", "render", "job", "run", 1, 0, 4, 1)
    for _ in range(200):
        task = Task(lease)
        threads = [threading.Thread(target=task.begin), threading.Thread(target=task.revoke)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert task.begun != task.revoked
        assert task.stop.is_set() == task.revoked


@pytest.mark.parametrize("heard_in", ["a beat", "a question"])
def test_a_renderer_whose_name_another_process_has_ends_its_own(ledger, plan, heard_in):
    slow = slower(plan, steps=500)
    assert ledger.create_plan(slow, 2)
    ledger.put_totals(plan, 1, _totals())
    link = InProcess(ledger, plan.job)
    link.every_s = 0.02
    ended: list[int] = []
    renderer = make_renderer(ledger, link, end_process=ended.append)
    renderer._beat_s = 0.02 if heard_in == "a beat" else 60.0
    link.every_s = renderer._beat_s

    async def main() -> None:
        work = asyncio.create_task(renderer.work())
        await until(lambda: renderer._epoch)
        link.dispatch.meet(Hello("renderer-0", "j", "a CPU"), now=link.now)
        await asyncio.wait_for(work, 20)

    asyncio.run(main())
    assert ended == [REPLACED_EXIT]
    assert not ledger.done_shards(slow, 1).any()


def test_beats_come_at_the_pace_that_the_dispatcher_asks_for(ledger, plan):
    slow = slower(plan, steps=100)
    assert ledger.create_plan(slow, 2)
    ledger.put_totals(plan, 1, _totals())
    link = InProcess(ledger, plan.job)
    link.every_s = 0.01
    renderer = make_renderer(ledger, link)
    renderer._beat_s = 0.01
    run_until(lambda: len(link.beats) >= 10, renderer)
    assert renderer._beat_s == 0.01
    link.every_s = 7.5
    asyncio.run(renderer._renew())
    assert renderer._beat_s == 7.5


def portion(plan: Plan, token: str = "t", images: int = 1, *, steps: int = 1, **changes: Any) -> Portion:
    """Urgent images of a plan's model."""
    params = plan.params.model_copy(update={"num_inference_steps": steps})
    specs = tuple(ImageSpec(i, 0, None, "urgent", 1000 + i, params, {}) for i in range(images))
    fields = {"owner": "ann", "card": plan.card, "numerics": plan.numerics} | changes
    return Portion(token, specs=specs, output=Output(), **fields)


def draw_meanwhile(renderer: Renderer, ready: Callable[[], object], *portions: Portion) -> list[Any]:
    """Let a renderer work, draw portions all at once as soon as something is true, and return answers or errors."""

    async def main() -> list[Any]:
        work = asyncio.create_task(renderer.work())
        await until(ready)
        ends = await asyncio.wait_for(
            asyncio.gather(*(renderer.draw(each) for each in portions), return_exceptions=True), 20
        )
        renderer.retire()
        await asyncio.wait_for(work, 20)
        return ends

    return asyncio.run(main())


def at_work(renderer: Renderer) -> bool:
    return any(task.progress.stage == "denoise" for task in renderer._tasks.values())


def test_an_idle_renderer_draws_what_is_urgent_and_tells_which_model_it_has(ledger, plan):
    link = InProcess(ledger, plan.job)
    link.away = True
    renderer = make_renderer(ledger, link)
    answers = draw_meanwhile(renderer, lambda: True, portion(plan, "a", 2), portion(plan, "b"))
    assert [len(answer.images) for answer in answers] == [2, 1]
    assert {(answer.renderer, answer.device) for answer in answers} == {("renderer-0", "a CPU")}
    found = read_picture(answers[0].images[1].data)
    assert (found.provenance.prompt, found.provenance.seed, found.provenance.index) == ("urgent", 1001, 1)
    assert renderer._engines.loaded_model == plan.card.name


def test_urgent_images_cut_into_a_shard_which_ends_as_it_would_have(ledger, plan):
    slow = slower(plan, steps=30)
    assert ledger.create_plan(slow, 2)
    ledger.put_totals(plan, 1, _totals())
    link = InProcess(ledger, plan.job)
    renderer = make_renderer(ledger, link)
    answers = []

    async def main() -> None:
        work = asyncio.create_task(renderer.work())
        await until(lambda: at_work(renderer))
        for n in range(5):
            answers.append(await asyncio.wait_for(renderer.draw(portion(plan, f"t{n}")), 20))
            assert renderer._tasks
        await until(lambda: link.completed)
        renderer.retire()
        await asyncio.wait_for(work, 20)

    asyncio.run(main())
    samples = renderer._meters.snapshot().samples
    waited = {s.labels[0][1]: s.value for s in samples if s.name == "farm_urgent_wait_seconds_count"}
    assert set(waited) <= {"step", "batch"}
    assert sum(waited.values()) == 5
    assert [row.status for row in ledger.receipt(slow, 1, link.completed[0].shard).rows] == ["ok"] * 4
    assert link.given_back[:-2] == []


def test_a_dropped_portion_ends_within_a_step_and_the_shard_goes_on(ledger, plan):
    link = InProcess(ledger, plan.job)
    renderer = make_renderer(ledger, link)

    async def main() -> None:
        work = asyncio.create_task(renderer.work())
        drawing = asyncio.create_task(renderer.draw(portion(plan, "long", steps=10_000)))
        await until(lambda: renderer._urgent.in_hand)
        renderer.drop("long")
        with pytest.raises(CancelledError, match="the portion was dropped"):
            await asyncio.wait_for(drawing, 20)
        await until(lambda: link.dispatch.progress(plan.job).state == "done")
        renderer.retire()
        await asyncio.wait_for(work, 20)

    asyncio.run(main())
    assert ledger.totals(plan).ok == 16


def test_who_stops_waiting_for_a_portion_drops_it(ledger, plan):
    link = InProcess(ledger, plan.job)
    link.away = True
    renderer = make_renderer(ledger, link)

    async def main() -> None:
        work = asyncio.create_task(renderer.work())
        drawing = asyncio.create_task(renderer.draw(portion(plan, "long", steps=10_000)))
        await until(renderer._cutin.reports)
        drawing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await drawing
        await until(lambda: not renderer._cutin.reports())
        answer = await asyncio.wait_for(renderer.draw(portion(plan, "short")), 20)
        assert answer.images[0].error_code is None
        renderer.retire()
        await asyncio.wait_for(work, 20)

    asyncio.run(main())


def test_a_retired_renderer_fails_its_urgent_images_at_once_and_takes_no_more(ledger, plan):
    link = InProcess(ledger, plan.job)
    link.away = True
    renderer = make_renderer(ledger, link)

    async def main() -> list[BaseException]:
        work = asyncio.create_task(renderer.work())
        waiting = [
            asyncio.create_task(renderer.draw(portion(plan, token, steps=10_000, owner=token))) for token in "abc"
        ]
        await until(renderer._cutin.reports)
        renderer.retire()
        ends = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 5)
        await asyncio.wait_for(work, 20)
        with pytest.raises(RendererDiedError, match="renderer-0 was asked to end"):
            await renderer.draw(portion(plan, "late"))
        return ends

    assert [type(end) for end in asyncio.run(main())] == [RendererDiedError] * 3


def test_urgent_work_that_hangs_is_seen_by_the_watchdog_and_urgent_work_that_goes_on_is_not(ledger, plan, monkeypatch):
    monkeypatch.setattr("farm.renderer.WATCH_S", 0.01)
    link = InProcess(ledger, plan.job)
    link.away = True
    ended: list[int] = []
    watchdog = Watchdog({**STAGE_LIMIT_S, "denoise": 0.5})
    renderer = make_renderer(ledger, link, watchdog=watchdog, end_process=ended.append)
    draw_meanwhile(renderer, lambda: True, portion(plan, steps=100))
    assert ended == []

    hung, let_go = make_renderer(ledger, link, watchdog=watchdog, end_process=ended.append), threading.Event()

    def hang(*_: Any, on_step: Callable[[int, int], None], **__: Any) -> None:
        on_step(1, 2)
        let_go.wait(20)
        raise RuntimeError("let go")

    monkeypatch.setattr("farm.models.sleep.SleepFamily.denoise", hang)

    async def main() -> None:
        work = asyncio.create_task(hung.work())
        drawing = asyncio.create_task(hung.draw(portion(plan)))
        await until(lambda: ended)
        let_go.set()
        assert (await asyncio.wait_for(drawing, 20)).images[0].error_code == "render"
        hung.retire()
        await asyncio.wait_for(work, 20)

    asyncio.run(main())
    assert ended == [STUCK_EXIT]


def test_a_portion_planned_for_other_versions_is_refused_with_both_named(ledger, plan):
    link = InProcess(ledger, plan.job)
    link.away = True
    old = plan.numerics.model_copy(update={"versions": {"numpy": "0.1"}})
    end = draw_meanwhile(make_renderer(ledger, link), lambda: True, portion(plan, numerics=old))[0]
    assert isinstance(end, NumericsError)
    assert "numpy 0.1" in end.message


def test_a_beat_says_what_is_loaded_and_how_many_urgent_images_there_are(ledger, plan):
    link = InProcess(ledger, plan.job)
    link.away = True
    renderer = make_renderer(ledger, link)
    draw_meanwhile(renderer, lambda: True, portion(plan))
    link.away = False
    asyncio.run(renderer._renew())
    standing = link.beats[-1].standing
    assert (standing.loaded_model, standing.loading, standing.urgent) == (plan.card.name, False, 0)
    assert standing.load_s > 0


def test_steps_and_pictures_of_urgent_images_show_in_the_beats(ledger, plan):
    link = InProcess(ledger, plan.job)
    link.away = True
    renderer = make_renderer(ledger, link)
    draw_meanwhile(renderer, lambda: True, portion(plan, "a", steps=3))
    before = renderer._urgent.ticks
    link.away = False
    asyncio.run(renderer._renew())
    assert link.beats[-1].standing.urgent_ticks == before >= 1 + 3 + 1  # load, steps, picture


def test_an_urgent_image_in_a_shards_place_is_announced_and_does_not_wait_for_an_answer(ledger, plan):
    slow = slower(plan, steps=200)
    assert ledger.create_plan(slow, 2)
    ledger.put_totals(plan, 1, _totals())
    link = InProcess(ledger, plan.job)
    renderer = make_renderer(ledger, link)
    renderer._beat_s = 3600
    heard: list[Beat] = []

    async def silent(beat: Beat) -> Renewal:
        heard.append(beat)
        await asyncio.sleep(3600)
        raise AssertionError

    link.renew = silent

    async def main() -> float:
        work = asyncio.create_task(renderer.work())
        await until(lambda: at_work(renderer))
        started = time.monotonic()
        for n in range(2):
            answer = await asyncio.wait_for(renderer.draw(portion(plan, f"t{n}", steps=10)), 20)
            assert answer.images[0].error_code is None
        took = time.monotonic() - started
        renderer.retire()
        await asyncio.wait_for(work, 20)
        return took

    assert asyncio.run(main()) < 4
    assert [[report.aside for report in beat.reports if report.in_hand] for beat in heard] == [[True]]


def test_what_was_counted_is_told_again_and_again(ledger, plan, monkeypatch):
    monkeypatch.setattr("farm.renderer.REPORT_S", 0.01)
    link = InProcess(ledger, plan.job)
    renderer = make_renderer(ledger, link)
    run_until(lambda: link.dispatch.progress(plan.job).state == "done" and len(link.snapshots) > 3, renderer)
    last = link.snapshots[-1]
    assert (last.process, last.incarnation) == ("renderer-0", "i")
    drawn = sum(s.value for s in renderer._meters.snapshot().samples if s.name == "farm_images_total")
    assert drawn == 16


def test_that_a_person_drained_it_is_remembered_for_the_next_dispatcher(ledger, plan):
    link = InProcess(ledger, plan.job)
    renderer = make_renderer(ledger, link)
    hellos: list[Hello] = []
    drained = [True]

    async def meet(hello: Hello) -> tuple[str, ...]:
        hellos.append(hello)
        return ()

    async def renew(beat: Beat) -> Renewal:
        return Renewal("e", drained=drained[0])

    link.meet, link.renew = meet, renew
    asyncio.run(renderer._renew())
    asyncio.run(renderer._meet())
    drained[0] = False
    asyncio.run(renderer._renew())
    asyncio.run(renderer._meet())
    assert [hello.drained for hello in hellos] == [True, False]


def _totals() -> Totals:
    return Totals(
        images=16,
        ok=16,
        failed=0,
        flagged=0,
        failures_by_code={},
        bytes=0,
        seconds={},
        renderers=1,
        started_at="2026-01-01T00:00:00+00:00",
        finished_at="2026-01-01T00:00:01+00:00",
        wall_seconds=1.0,
    )
