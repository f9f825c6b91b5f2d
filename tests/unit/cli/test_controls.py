import json

import pytest

from tests.unit.cli.conftest import FakeFarm, Place
from tests.unit.finished_jobs import make_job, make_ledger, make_plan

GOES_ON = "a farm that runs goes on with it; where none runs: farm retry shapes, or farm render of its manifest"


def make_pilot(farm: Place) -> None:
    """A job of ten images that begins with a pilot of three."""
    ledger, plan = make_ledger(farm.store), make_plan(pilot=3, pilot_shard_images=4)
    ledger.open(plan.job)
    ledger.create_plan(plan, 1)


def said(farm: Place) -> list[str]:
    return [control.action for control in farm.ledger.controls("shapes")]


def test_a_pause_is_written_once_and_resume_lifts_it(farm: Place) -> None:
    make_job(farm.store, shards=1)
    ended = farm("pause", "shapes")
    assert (ended.code, ended.out, ended.err) == (0, "", "shapes is paused; farm resume shapes goes on with it\n")
    assert farm("pause", "shapes").err == "shapes was paused before\n"
    assert farm("resume", "shapes").err.splitlines() == ["shapes goes on", GOES_ON]
    assert said(farm) == ["pause", "resume"]


def test_resume_of_a_job_that_nobody_stopped_says_so_and_writes_nothing(farm: Place) -> None:
    make_job(farm.store, shards=1)
    ended = farm("resume", "shapes")
    assert ended.code == 0
    assert ended.err.splitlines() == [
        "shapes was neither paused nor cancelled",
        "a farm that had stopped it tries again with: farm retry shapes, or farm render of its manifest",
    ]
    assert said(farm) == []


def test_cancel_is_written_once_and_resume_lifts_it(farm: Place) -> None:
    make_job(farm.store, shards=1)
    assert farm("cancel", "shapes").err == "shapes is cancelled; farm resume shapes goes on with it\n"
    assert farm("cancel", "shapes").err == "shapes was cancelled before\n"
    assert farm("status", "shapes").out.startswith("shapes: cancelled, 4 of 10 images")
    assert farm("resume", "shapes").code == 0
    assert said(farm) == ["cancel", "resume"]
    assert farm.ledger.open_jobs() == ["shapes"]


def test_who_said_it_and_when_is_written_down(farm: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("getpass.getuser", lambda: "ann")
    monkeypatch.setattr("socket.gethostname", lambda: "desk")
    make_job(farm.store, shards=1)
    record = json.loads(farm("pause", "shapes", "--json").out)
    assert (record["job"], record["state"]) == ("shapes", "paused")
    assert (record["control"]["action"], record["control"]["by"]) == ("pause", "ann@desk")
    assert record["control"]["at"].endswith("+00:00")
    assert json.loads(farm("pause", "shapes", "--json").out)["control"] is None


@pytest.mark.parametrize(
    ("command", "what"),
    [
        (["pause"], "there is nothing to pause"),
        (["resume"], "there is nothing to go on with"),
        (["cancel"], "there is nothing to cancel"),
        (["change", "--priority", "80"], "there is nothing to change"),
    ],
)
def test_a_job_that_is_done_hears_nothing_more(farm: Place, command: list[str], what: str) -> None:
    make_job(farm.store)
    ended = farm(*command, "shapes")
    assert (ended.code, ended.error) == (2, f"shapes is done, 10 images; {what}")
    assert said(farm) == []


def test_a_job_without_a_pilot_cannot_be_approved(farm: Place) -> None:
    make_job(farm.store, shards=1)
    ended = farm("approve", "shapes", "--json")
    assert ended.code == 2
    error = json.loads(ended.out)["error"]
    assert error["code"] == "control"
    assert error["message"].startswith("shapes has no pilot, so there is nothing to approve")


def test_approval_before_the_pilot_is_done_says_that_it_will_not_wait(farm: Place) -> None:
    make_pilot(farm)
    ended = farm("approve", "shapes")
    assert ended.err.splitlines()[0] == "shapes is approved; its other 7 images follow when the pilot is done"
    assert farm("approve", "shapes").err.splitlines()[0] == "shapes was approved before"
    assert said(farm) == ["approve"]


def test_approval_of_a_paused_job_says_that_it_is_held_all_the_same(farm: Place) -> None:
    make_pilot(farm)
    farm("pause", "shapes")
    assert farm("approve", "shapes").err == (
        "shapes is approved; its other 7 images follow, once farm resume shapes goes on: it is paused\n"
    )


def test_change_says_what_changed_and_the_status_shows_it(farm: Place) -> None:
    make_job(farm.store, shards=1)
    flags = ["--priority", "80", "--max-images", "500", "--gpu-hours", "1.5", "--finish-by", "2099-12-01T09:00+08:00"]
    ended = farm("change", "shapes", *flags)
    assert ended.code == 0
    for part in (
        "priority: 50 -> 80",
        "finish_by: none -> 2099-12-01T09:00",
        "budget.gpu_hours: none -> 1.5",
        "budget.images: none -> 500",
    ):
        assert part in ended.err
    assert ended.err.splitlines()[-1] == GOES_ON
    record = json.loads(farm("status", "shapes", "--json").out)
    assert (record["priority"], record["max_images"], record["gpu_hours"]) == (80, 500, 1.5)
    assert farm("change", "shapes", "--priority", "80").err == "shapes has these values already\n"
    assert said(farm) == ["change"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give --priority, --max-images, --gpu-hours or --finish-by"),
        (["--priority", "101"], "priority must be 0 to 100, got 101; higher goes first"),
        (["--priority", "high"], "Invalid value for '--priority'"),
        (["--max-images", "0"], "images must be above 0, got 0; to stop the job: farm cancel shapes"),
        (["--gpu-hours", "-1"], "gpu_hours must be above 0, got -1.0; to stop the job: farm cancel shapes"),
        (["--gpu-hours", "nan"], "gpu_hours must be above 0, got nan"),
        (["--finish-by", "tomorrow"], "finish_by must be a moment such as 2026-12-01T09:00+08:00, got 'tomorrow'"),
        (["--finish-by", "2099-12-01T09:00"], "finish_by needs an offset from UTC, got '2099-12-01T09:00'"),
        (["--finish-by", "2020-01-01T00:00Z"], "finish_by 2020-01-01T00:00Z has passed; give a later one"),
    ],
)
def test_a_change_that_cannot_be_is_one_line_and_writes_nothing(farm: Place, flags: list[str], message: str) -> None:
    make_job(farm.store, shards=1)
    ended = farm("change", "shapes", *flags)
    assert ended.code == 2
    assert message in ended.error
    assert said(farm) == []


def test_no_control_needs_a_farm(farm: Place, fake_farm: FakeFarm) -> None:
    make_pilot(farm)
    for command in (["pause"], ["resume"], ["approve"], ["change", "--priority", "3"], ["cancel"]):
        assert farm(*command, "shapes").code == 0
    assert fake_farm.opened == []
    assert said(farm) == ["pause", "resume", "approve", "change", "cancel"]


def test_a_store_that_cannot_be_written_is_said_and_nothing_else(farm: Place) -> None:
    make_job(farm.store, shards=1)
    control = farm.store / "jobs" / "shapes" / "control"
    control.write_text("a file where the folder should be")
    ended = farm("pause", "shapes")
    assert ended.code == 3
    assert "is paused" not in ended.err
