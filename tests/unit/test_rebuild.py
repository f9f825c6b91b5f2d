"""What a dispatcher is told of a job, and what that costs."""

import logging
from pathlib import Path

import numpy as np
import pytest

from farm.errors import NewerVersionError
from farm.export import finalise
from farm.lease import Check
from farm.ledger import Ledger
from farm.rebuild import completion_of, read_job
from farm.records import Profile
from farm.storage.local import LocalStore
from tests.unit.finished_jobs import commit_shard, make_plan, make_totals, render_pass

AT = "2026-11-21T10:00:00+00:00"


class CountingStore(LocalStore):
    """Counts receipts that are read."""

    receipts = 0

    def get(self, key: str) -> bytes:
        self.receipts += "/receipts/" in key
        return super().get(key)


@pytest.fixture
def store(tmp_path: Path) -> CountingStore:
    return CountingStore(tmp_path / "farm-data")


@pytest.fixture
def ledger(store: CountingStore) -> Ledger:
    return Ledger(store)


def say(ledger: Ledger, action: str, **values: object) -> None:
    ledger.append_control("shapes", action, at=AT, by="alice", **values)


def test_an_open_job_is_read_without_its_receipts(ledger: Ledger, store: CountingStore) -> None:
    plan = make_plan(priority=60)
    ledger.open("shapes")
    ledger.create_plan(plan, 1)
    for shard in (0, 2):
        commit_shard(ledger, plan, shard)
    store.receipts = 0
    view = read_job(ledger, "shapes")
    (entry,) = view.runs
    assert (view.state, view.owner, view.priority, view.awaits_approval) == ("open", "", 60, False)
    assert (view.max_images, view.max_gpu_s, view.finish_by, view.images_before, view.gpu_s_before) == (
        None,
        None,
        None,
        0,
        0.0,
    )
    assert (entry.run, entry.pass_number, entry.images, entry.shard_images) == (plan.run, 1, 10, 4)
    assert entry.done.flags().tolist() == [True, False, True]
    assert (entry.failed, entry.seconds_per_image, entry.created_at) == (0, None, plan.created_at)
    assert store.receipts == 0


def test_failures_are_counted_from_the_receipts_that_have_them(ledger: Ledger, store: CountingStore) -> None:
    plan = make_plan(rows=50, seeds=2)
    ledger.create_plan(plan, 1)
    for shard in range(20):
        commit_shard(ledger, plan, shard, failed={5, 6, 41})
    store.receipts = 0
    assert read_job(ledger, "shapes").runs[0].failed == 3
    assert store.receipts == 2


def test_what_was_said_counts(ledger: Ledger) -> None:
    budget = {"gpu_hours": 2.0, "images": 100}
    ledger.create_plan(make_plan(finish_by="2026-12-01T09:00+08:00", budget=budget), 1)
    view = read_job(ledger, "shapes")
    assert (view.max_images, view.max_gpu_s, view.finish_by) == (100, 7200.0, 1796086800.0)
    say(ledger, "pause")
    say(ledger, "change", priority=90, max_images=500)
    view = read_job(ledger, "shapes")
    assert (view.state, view.priority, view.max_images, view.max_gpu_s) == ("paused", 90, 500, 7200.0)
    say(ledger, "cancel")
    assert read_job(ledger, "shapes").state == "cancelled"
    say(ledger, "resume")
    assert read_job(ledger, "shapes").state == "open"


def test_a_budget_is_told_what_all_receipts_came_to(ledger: Ledger, store: CountingStore) -> None:
    plan = make_plan(budget={"images": 1000})
    ledger.create_plan(plan, 1)
    render_pass(ledger, plan, 1, failed={1, 9})
    ledger.open_pass(plan, 2, np.array([1, 3, 4, 5, 9]))
    commit_shard(ledger, plan, 1, pass_number=2)
    store.receipts = 0
    view = read_job(ledger, "shapes")
    assert (view.images_before, view.gpu_s_before, store.receipts) == (11, 0.0, 0)
    ledger.put_totals(
        plan, 1, make_totals(seconds={"load": 1.0, "encode": 2.0, "denoise": 3.0, "decode": 4.0, "write": 50.0})
    )
    say(ledger, "change", gpu_hours=5.0)
    view = read_job(ledger, "shapes")
    assert (view.images_before, view.gpu_s_before, store.receipts) == (11, 14.0, 1)


def test_totals_of_a_closed_pass_stand_for_the_receipts_of_all_before(ledger: Ledger) -> None:
    plan = make_plan(budget={"gpu_hours": 1})
    ledger.create_plan(plan, 1)
    for shard in range(3):
        commit_shard(ledger, plan, shard)
    assert read_job(ledger, "shapes").gpu_s_before == 12.0
    finalise(ledger, plan, 1)
    assert read_job(ledger, "shapes").gpu_s_before == 12.0
    ledger.open_pass(plan, 2, np.array([1, 2]))
    commit_shard(ledger, plan, 0, pass_number=2)
    assert read_job(ledger, "shapes").gpu_s_before == 16.0
    finalise(ledger, plan, 2)
    assert read_job(ledger, "shapes").gpu_s_before == 16.0


def test_a_done_job_loses_its_mark_and_an_open_one_keeps_it(ledger: Ledger) -> None:
    plan = make_plan()
    ledger.open("shapes")
    ledger.create_plan(plan, 1)
    read_job(ledger, "shapes")
    assert ledger.open_jobs() == ["shapes"]
    render_pass(ledger, plan, 1)
    view = read_job(ledger, "shapes")
    assert (view.runs, view.awaits_approval, ledger.open_jobs()) == ((), False, [])


def test_a_pass_opened_while_the_mark_is_taken_away_puts_it_back(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan()
    ledger.open("shapes")
    ledger.create_plan(plan, 1)
    render_pass(ledger, plan, 1)
    close = ledger.close

    def overtaken(job: str) -> None:
        ledger.open_pass(plan, 2, np.array([1]))
        close(job)

    monkeypatch.setattr(ledger, "close", overtaken)
    read_job(ledger, "shapes")
    assert ledger.open_jobs() == ["shapes"]


def test_a_pilot_waits_and_its_approval_opens_the_rest(ledger: Ledger) -> None:
    plan = make_plan(pilot=3, pilot_shard_images=2)
    ledger.open("shapes")
    ledger.create_plan(plan, 1)
    (entry,) = read_job(ledger, "shapes").runs
    assert (entry.images, entry.shard_images, entry.done.size) == (3, 2, 2)
    render_pass(ledger, plan, 1)
    view = read_job(ledger, "shapes")
    assert (view.runs, view.awaits_approval, ledger.open_jobs()) == ((), True, ["shapes"])
    say(ledger, "approve")
    view = read_job(ledger, "shapes")
    (entry,) = view.runs
    assert (view.awaits_approval, entry.pass_number, entry.images, entry.shard_images) == (False, 2, 7, 4)
    assert entry.done.flags().tolist() == [False, False]
    render_pass(ledger, plan, 2)
    view = read_job(ledger, "shapes")
    assert (view.runs, view.awaits_approval, ledger.open_jobs()) == ((), False, [])


def test_a_pilot_approved_beforehand_never_waits(ledger: Ledger) -> None:
    plan = make_plan(pilot=3)
    ledger.create_plan(plan, 1)
    say(ledger, "approve")
    assert read_job(ledger, "shapes").runs[0].pass_number == 1
    render_pass(ledger, plan, 1)
    assert read_job(ledger, "shapes").runs[0].pass_number == 2


def test_a_deleted_job_and_one_without_a_plan_are_deleted(ledger: Ledger, store: CountingStore) -> None:
    assert read_job(ledger, "shapes").state == "deleted"
    ledger.create_plan(make_plan(), 1)
    assert read_job(ledger, "shapes").state == "open"
    store.put("deleted/shapes", b"")
    view = read_job(ledger, "shapes")
    assert (view.state, view.runs) == ("deleted", ())
    assert completion_of(ledger, Check("shapes", "0a1b2c3d", 1, 0)) is None


def test_a_receipt_that_does_not_parse_keeps_nothing_from_going_on(
    ledger: Ledger, store: CountingStore, caplog: pytest.LogCaptureFixture
) -> None:
    plan = make_plan(budget={"gpu_hours": 1})
    ledger.create_plan(plan, 1)
    commit_shard(ledger, plan, 0, failed={1})
    commit_shard(ledger, plan, 1)
    store.put(f"jobs/shapes/{plan.run}/receipts/0001/00000000.parquet", b"garbage")
    with caplog.at_level(logging.ERROR, "farm.rebuild"):
        view = read_job(ledger, "shapes")
        found = completion_of(ledger, Check("shapes", plan.run, 1, 0))
    assert (view.runs[0].done.count, view.runs[0].failed, view.gpu_s_before) == (2, 0, 4.0)
    assert found is not None
    assert (found.ok, found.failed, found.seconds) == (4, 0, {})
    assert {record.message for record in caplog.records} == {"receipt not read"}


def test_a_control_of_a_newer_farm_leaves_the_job_as_it_is(ledger: Ledger, store: CountingStore) -> None:
    ledger.open("shapes")
    ledger.create_plan(make_plan(), 1)
    store.put("jobs/shapes/control/000001.json", b'{"version": 99}')
    with pytest.raises(NewerVersionError, match="upgrade this farm"):
        read_job(ledger, "shapes")
    assert ledger.open_jobs() == ["shapes"]


def test_a_check_is_answered_by_the_receipt(ledger: Ledger) -> None:
    plan = make_plan()
    ledger.create_plan(plan, 1)
    check = Check("shapes", plan.run, 1, 2)
    assert completion_of(ledger, check) is None
    assert completion_of(ledger, Check("shapes", "ffffffff", 1, 2)) is None
    commit_shard(ledger, plan, 2, failed={9})
    found = completion_of(ledger, check)
    assert found is not None
    assert (found.lease.token, found.lease.shard, found.lease.images, found.lease.attempt) == ("", 2, 2, 1)
    assert (found.renderer, found.ok, found.failed) == ("renderer-0", 1, 1)
    assert found.seconds == {"denoise": 4.0, "write": 0.5, "total": 5.0}


def test_a_measured_model_tells_how_long_an_image_takes(ledger: Ledger) -> None:
    plan = make_plan()
    ledger.create_plan(plan, 1)
    for device, seconds, measured_at in (("a CPU", 8.0, "2026-01-01"), ("a GPU", 0.5, "2026-02-01")):
        ledger.put_profile(
            Profile(
                model="shapes",
                device=device,
                seconds_per_image=seconds,
                width=128,
                height=64,
                num_inference_steps=8,
                batch=4,
                images=100,
                measured_at=measured_at,
            )
        )
    assert read_job(ledger, "shapes").runs[0].seconds_per_image == 0.125
