"""Shards of a renderer, drawn, given back and left to others."""

import asyncio

import numpy as np

from farm.cores import Cores
from farm.errors import (
    DeviceLostError,
    StoreUnavailableError,
)
from farm.lease import (
    Ask,
    Reply,
)
from farm.rebuild import read_job
from farm.storage.local import LocalStore
from tests.unit.finished_jobs import make_totals
from tests.unit.renderer.in_process import InProcess, make_renderer, run_until, slower


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
    ledger.put_totals(plan, 1, make_totals(images=16))
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
    ledger.put_totals(plan, 1, make_totals(images=16))
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
    ledger.put_totals(plan, 1, make_totals(images=16))
    link = InProcess(ledger, plan.job)
    run_until(lambda: link.dispatch.stall_code(plan.job), make_renderer(ledger, link))
    assert link.dispatch.stall_code(plan.job) == "numerics"
    assert "numpy 0.1" in link.dispatch.progress(plan.job).message
