from pathlib import Path

import numpy as np
import pytest

from farm.errors import UnknownJobError
from farm.export import finalise
from farm.status import failed_rows, failure_groups, job_status
from tests.unit.finished_jobs import commit_shard, make_job, make_plan


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
