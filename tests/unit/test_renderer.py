"""A renderer beside a dispatcher in one process: the real rules, store, engine and receipts; only Ray is left out."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from farm.dispatch import Dispatch
from farm.errors import DeviceLostError, FarmUnavailableError, StoreUnavailableError
from farm.lease import Ask, Beat, Completion, GiveBack, Hello, Lease, Renewal, Reply
from farm.ledger import Ledger, Totals
from farm.plan import Plan, PromptTable
from farm.rebuild import open_runs
from farm.renderer import Cores, Renderer
from farm.storage.local import LocalStore
from farm.sweep import Template
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
        self.restart()

    def restart(self) -> None:
        self.restarts += 1
        self.dispatch = Dispatch(epoch=f"epoch-{self.restarts}")
        for entry in open_runs(self._ledger, self._job):
            self.dispatch.add(entry)

    @property
    def now(self) -> float:
        return asyncio.get_running_loop().time()

    def _answer(self) -> None:
        if self.away:
            raise FarmUnavailableError("away")

    async def meet(self, hello: Hello) -> tuple[str, ...]:
        self._answer()
        return self.dispatch.meet(hello, now=self.now)

    async def ask(self, question: Ask) -> Reply:
        self._answer()
        self.asked.append(question)
        reply = self.dispatch.ask(question, now=self.now)
        if reply.lease is None:
            await asyncio.sleep(0.01)
        return reply

    async def renew(self, beat: Beat) -> Renewal:
        self._answer()
        return self.dispatch.renew(beat, now=self.now)

    async def complete(self, completion: Completion) -> None:
        self._answer()
        self.completed.append(completion.lease)
        self.dispatch.complete(completion, now=self.now)

    async def give_back(self, end: GiveBack) -> None:
        self._answer()
        self.given_back.append(end)
        self.dispatch.give_back(end, now=self.now)


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


def make_renderer(ledger: Ledger, link: InProcess, name: str = "renderer-0") -> Renderer:
    return Renderer(
        name=name, incarnation="i", device="cpu", device_name="a CPU", cores=1, vram_gib=16, ledger=ledger, link=link
    )


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
    renderer = Renderer(
        name="a", incarnation="i", device="cpu", device_name="a CPU", cores=3, vram_gib=16, ledger=ledger, link=link
    )
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
    monkeypatch.setattr("farm.renderer.RENEW_S", 0.02)
    slow = slower(plan, steps=20)
    assert ledger.create_plan(slow, 2)
    ledger.put_totals(plan, 1, _totals())
    link = InProcess(ledger, plan.job)
    renderer = make_renderer(ledger, link)
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
            dropped.extend(link.dispatch.stop(plan.job, "cancelled"))
            for _, token in dropped:
                renderer.drop(token)
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
    for shard in range(4):
        link.dispatch._runs[plan.run].done[shard] = True

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
    renderer = Renderer(
        name="a",
        incarnation="i",
        device="cpu",
        device_name="a CPU",
        cores=1,
        vram_gib=16,
        ledger=ledger,
        link=link,
        end_process=ended.append,
    )
    run_until(lambda: ended, renderer)
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
