from pathlib import Path

import numpy as np
import pytest

from farm.errors import UnknownJobError
from farm.export import finalise
from farm.status import failed_rows, failure_groups, job_status
from tests.unit.finished_jobs import commit_shard, make_job, make_ledger, make_plan, render_pass


def test_a_job_is_done_when_every_run_is(tmp_path: Path) -> None:
    ledger, plan = make_job(tmp_path, failed={3})
    found = job_status(ledger, plan.job)
    assert (found.state, found.images, found.done, found.failed) == ("done", 10, 10, 1)
    assert found.finished_at == "2026-11-21T10:02:10+00:00"
    ledger.create_plan(make_plan(run="99999999", rows=1), 2)
    found = job_status(ledger, plan.job)
    assert (found.state, found.images, found.done, found.finished_at) == ("open", 12, 10, None)


def test_an_open_pass_counts_its_own_images_as_not_done(tmp_path: Path) -> None:
    ledger, plan = make_job(tmp_path, failed={0, 1, 2, 3, 7})
    ledger.open_pass(plan, 2, np.array([0, 1, 2, 3, 7]))
    assert job_status(ledger, plan.job).done == 5
    commit_shard(ledger, plan, 1, pass_number=2)
    found = job_status(ledger, plan.job)
    assert (found.done, found.failed, found.runs[0].pass_number) == (6, 4, 2)


def test_failed_rows_are_those_of_the_latest_pass(tmp_path: Path) -> None:
    ledger, plan = make_job(tmp_path, failed={3, 7, 9})
    ledger.open_pass(plan, 2, np.array([3, 7, 9]))
    commit_shard(ledger, plan, 0, pass_number=2, failed={7})
    finalise(ledger, plan, 2)
    assert [(row.index, row.pass_number) for row in failed_rows(ledger, plan)] == [(7, 2)]
    assert [(group.code, group.images, group.example.index) for group in failure_groups(ledger, plan)] == [
        ("render", 1, 7)
    ]


def test_failed_rows_of_an_unfinished_retry_are_still_those_of_the_pass_before(tmp_path: Path) -> None:
    ledger, plan = make_job(tmp_path, failed={0, 1, 2, 3, 7})
    ledger.open_pass(plan, 2, np.array([0, 1, 2, 3, 7]))
    commit_shard(ledger, plan, 1, pass_number=2)
    assert sorted((row.index, row.pass_number) for row in failed_rows(ledger, plan)) == [(0, 1), (1, 1), (2, 1), (3, 1)]


def test_an_unknown_job_is_an_error(tmp_path: Path) -> None:
    ledger, _ = make_job(tmp_path)
    with pytest.raises(UnknownJobError, match="did you mean 'shapes'"):
        job_status(ledger, "shaped")


def test_a_pilot_counts_all_images_and_says_when_it_waits(tmp_path: Path) -> None:
    ledger, plan = make_ledger(tmp_path), make_plan(pilot=4, pilot_shard_images=2)
    ledger.create_plan(plan, 1)
    commit_shard(ledger, plan, 0, failed={0})
    found = job_status(ledger, "shapes")
    assert (found.state, found.images, found.done, found.failed) == ("open", 10, 2, 1)
    assert (found.runs[0].shards, found.runs[0].shards_done, found.runs[0].pilot) == (2, 1, 4)
    render_pass(ledger, plan, 1, failed={0})
    found = job_status(ledger, "shapes")
    assert (found.state, found.images, found.done, found.failed, found.approved) == ("pilot", 10, 4, 1, False)
    assert (found.runs[0].finished, found.finished_at) == (False, None)
    assert found.runs[0].totals is not None
    ledger.append_control("shapes", "approve", at="2026-11-21T12:00:00+00:00", by="alice")
    found = job_status(ledger, "shapes")
    assert (found.state, found.approved, found.done) == ("open", True, 4)
    ledger.open_pass(plan, 2, None)
    commit_shard(ledger, plan, 1, pass_number=2, failed={8})
    found = job_status(ledger, "shapes")
    assert (found.state, found.done, found.failed, found.runs[0].pass_number) == ("open", 6, 2, 2)
    assert sorted(row.index for row in failed_rows(ledger, plan)) == [0, 8]
    assert [(group.code, group.images) for group in failure_groups(ledger, plan)] == [("render", 2)]
    render_pass(ledger, plan, 2, failed={8})
    found = job_status(ledger, "shapes")
    assert (found.state, found.done, found.runs[0].finished) == ("done", 10, True)


def test_who_said_what_last_is_told_and_what_holds_since(tmp_path: Path) -> None:
    ledger, _ = make_job(tmp_path, shards=1)
    found = job_status(ledger, "shapes")
    assert (found.last, found.owner, found.priority) == (None, "", 50)
    ledger.append_control("shapes", "pause", at="2026-11-21T12:00:00+00:00", by="alice")
    ledger.append_control("shapes", "change", at="2026-11-21T13:00:00+00:00", by="bob", priority=70, max_images=9)
    found = job_status(ledger, "shapes")
    assert found.last is not None
    assert (found.state, found.last.action, found.last.by) == ("paused", "change", "bob")
    assert (found.priority, found.limits.max_images, found.limits.gpu_hours) == (70, 9, None)
    ledger.append_control("shapes", "cancel", at="2026-11-21T14:00:00+00:00", by="bob")
    assert job_status(ledger, "shapes").state == "cancelled"


def test_a_done_job_is_done_whatever_was_said(tmp_path: Path) -> None:
    ledger, _ = make_job(tmp_path)
    ledger.append_control("shapes", "cancel", at="2026-11-21T12:00:00+00:00", by="alice")
    assert job_status(ledger, "shapes").state == "done"


def test_a_deleted_job_has_no_runs(tmp_path: Path) -> None:
    ledger, _ = make_job(tmp_path)
    ledger.store.put("deleted/shapes", b"")
    found = job_status(ledger, "shapes")
    assert (found.state, found.runs, found.images, found.created_at, found.finished_at) == ("deleted", (), 0, "", None)
