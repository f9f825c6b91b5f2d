"""The process of a renderer: what it tells and remembers, and what makes it end."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from farm.drawing import ShardProgress
from farm.errors import (
    CancelledError,
    FarmUnavailableError,
    StoreUnavailableError,
)
from farm.lease import (
    STAGE_LIMIT_S,
    Beat,
    Completion,
    Hello,
    Lease,
    Renewal,
)
from farm.renderer import REPLACED_EXIT, STUCK_EXIT
from farm.shard import ShardRunner
from farm.task import Task
from farm.watchdog import Watchdog
from tests.unit.finished_jobs import make_totals
from tests.unit.renderer.in_process import InProcess, make_renderer, run_until, slower, until


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
    ledger.put_totals(plan, 1, make_totals(images=16))
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
    ledger.put_totals(plan, 1, make_totals(images=16))
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
    ledger.put_totals(plan, 1, make_totals(images=16))
    link = InProcess(ledger, plan.job)
    link.every_s = 0.01
    renderer = make_renderer(ledger, link)
    renderer._beat_s = 0.01
    run_until(lambda: len(link.beats) >= 10, renderer)
    assert renderer._beat_s == 0.01
    link.every_s = 7.5
    asyncio.run(renderer._renew())
    assert renderer._beat_s == 7.5


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
