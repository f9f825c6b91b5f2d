import json
import re

import pytest

from farm.cli import jobs
from farm.export import finalise
from farm.records import Tombstone
from tests.unit.cli.conftest import Place
from tests.unit.finished_jobs import commit_shard, make_job, make_ledger, make_plan

CONTROLS = (["pause"], ["resume"], ["cancel"], ["approve"], ["change", "--priority", "80"])
AT = "2026-11-21T10:05:00+00:00"


def test_status_of_nothing_says_how_to_begin(farm: Place) -> None:
    ended = farm("status")
    assert (ended.code, ended.out) == (0, "")
    assert "farm render MANIFEST makes one" in ended.err


def test_status_lists_jobs_and_how_they_stand(farm: Place) -> None:
    make_job(farm.store, job="whole", failed={3})
    make_job(farm.store, job="begun", shards=1)
    rows = [line.split() for line in farm("status").out.splitlines()[2:]]
    stands = {row[0]: row[1:9] for row in rows}
    assert stands["whole"] == ["done", "shapes", "10", "100", "%", "1", "50", "–"]
    assert stands["begun"] == ["open", "shapes", "10", "40", "%", "–", "50", "–"]


def test_a_submission_that_never_came_to_its_plan_hides_no_job(farm: Place) -> None:
    make_job(farm.store, job="whole")
    (farm.store / "jobs" / "ghost" / "1d9da47f" / "prompts").mkdir(parents=True)
    (farm.store / "jobs" / "ghost" / "1d9da47f" / "prompts" / "part-00000.parquet").write_bytes(b"x")
    ended = farm("status")
    assert ended.code == 0
    assert "whole" in ended.out
    assert "ghost" not in ended.out


def test_a_damaged_job_hides_no_other(farm: Place) -> None:
    make_job(farm.store, job="whole")
    make_job(farm.store, job="broken")
    (farm.store / "jobs" / "broken" / "plans" / "0001.json").write_text("{")
    ended = farm("status")
    assert ended.code == 3
    assert ended.out.splitlines()[2].split()[:2] == ["whole", "done"]
    assert ended.error.startswith("broken: ")
    record = json.loads(farm("status", "--json").out)
    assert [one["job"] for one in record["jobs"]] == ["whole"]
    assert [(one["job"], one["code"]) for one in record["damaged"]] == [("broken", "record")]


def test_status_of_one_job_shows_its_failures(farm: Place) -> None:
    make_job(farm.store, failed={3, 7})
    ended = farm("status", "shapes")
    assert ended.out.splitlines()[0] == "shapes: done, 10 of 10 images, 2 failed"
    assert "  failed     2 images: render" in ended.out
    assert "image 3: the pipeline failed" in ended.out
    assert ended.err.strip() == "render the failed images again: farm retry shapes"


def test_status_counts_the_short_last_shard(farm: Place) -> None:
    make_job(farm.store, shards=3)
    record = json.loads(farm("status", "shapes", "--json").out)
    assert (record["state"], record["done"], record["images"]) == ("open", 10, 10)
    assert record["runs"][0]["shards_done"] == 3


def test_an_unknown_job_is_an_error_with_the_nearest_name(farm: Place) -> None:
    make_job(farm.store)
    for command in (["status"], ["retry"], ["verify"], *CONTROLS):
        ended = farm(*command, "shape")
        assert ended.code == 2
        assert "did you mean 'shapes'?" in ended.error
    ended = farm("status", "shape", "--json")
    assert json.loads(ended.out)["error"]["code"] == "unknown_job"


def test_watching_ends_with_the_job(farm: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    make_job(farm.store, shards=1)
    looks: list[float] = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 2:
            make_job(farm.store)

    monkeypatch.setattr(jobs.time, "sleep", sleep)
    ended = farm("status", "shapes", "-w")
    assert ended.code == 0
    assert [line for line in ended.out.splitlines() if line.startswith("shapes: ")] == [
        "shapes: open, 4 of 10 images, 0 failed",
        "shapes: open, 4 of 10 images, 0 failed",
        "shapes: done, 10 of 10 images, 0 failed",
    ]


def make_pilot(farm: Place, *, done: bool = True) -> None:
    """A job of ten images, the three of its pilot rendered."""
    ledger = make_ledger(farm.store)
    plan = make_plan(
        pilot=3,
        pilot_shard_images=4,
        finish_by="2099-12-01T09:00:00+08:00",
        budget={"gpu_hours": 2.5, "images": 1200},
        priority=60,
    ).model_copy(update={"owner": "ann"})
    ledger.open(plan.job)
    ledger.create_plan(plan, 1)
    if done:
        commit_shard(ledger, plan, 0)
        finalise(ledger, plan, 1)


def test_status_shows_owner_priority_limits_and_a_pilot_that_waits(farm: Place) -> None:
    make_pilot(farm)
    ended = farm("status", "shapes")
    lines = ended.out.splitlines()
    assert lines[0] == "shapes: pilot, 3 of 10 images, 0 failed"
    assert lines[2:4] == ["  owner      ann", "  priority   60"]
    assert re.fullmatch(
        r"  stops at   2099-12-01T09:00:00\+08:00 \(in .+\), 2.5 GPU-hours, 1,200 images rendered", lines[4]
    )
    assert "  pilot      3 images, done, waits for farm approve shapes" in lines
    assert any(line.startswith("  sheet      ./store/jobs/shapes/") for line in lines)
    assert ended.err.strip() == "look at the pilot's sheet; render the other images with: farm approve shapes"
    assert farm("status").out.splitlines()[2].split()[:2] == ["shapes", "pilot"]


def test_status_of_a_pilot_in_hand_and_of_one_approved_beforehand(farm: Place) -> None:
    make_pilot(farm, done=False)
    assert "  pilot      3 images, not done yet\n" in farm("status", "shapes").out
    farm("approve", "shapes")
    assert "  pilot      3 images, approved before it is done\n" in farm("status", "shapes").out


def test_status_as_json_has_what_was_said_last_and_the_limits(farm: Place) -> None:
    make_pilot(farm)
    farm.ledger.append_control("shapes", "change", at=AT, by="ann@desk", gpu_hours=4.0)
    record = json.loads(farm("status", "shapes", "--json").out)
    assert (record["owner"], record["priority"], record["approved"]) == ("ann", 60, False)
    assert (record["gpu_hours"], record["max_images"]) == (4.0, 1200)
    assert record["said_last"] == {"seq": 1, "action": "change", "at": AT, "by": "ann@desk", "gpu_hours": 4.0}
    assert (record["runs"][0]["pilot"], record["runs"][0]["finished"]) == (3, False)


def test_status_says_what_was_said_last_by_whom_and_how_to_go_on(farm: Place) -> None:
    make_job(farm.store, shards=1)
    farm.ledger.append_control("shapes", "change", at=AT, by="ann@desk", priority=80)
    assert "  said last  change priority 80, by ann@desk, " in farm("status", "shapes").out
    farm.ledger.append_control("shapes", "pause", at=AT, by="bo\x1b@desk")
    ended = farm("status", "shapes")
    assert ended.out.startswith("shapes: paused, 4 of 10 images")
    assert "  said last  pause, by bo\ufffd@desk, " in ended.out
    assert ended.err.strip() == "go on with it: farm resume shapes"


def test_status_of_a_job_whose_time_is_over_says_how_to_give_it_more(farm: Place) -> None:
    make_job(farm.store, shards=1)
    farm.ledger.append_control("shapes", "change", at=AT, by="ann@desk", finish_by=AT)
    ended = farm("status", "shapes")
    assert f"  stops at   {AT} (has passed)\n" in ended.out
    assert ended.err.strip() == "its finish_by has passed; give it a later one: farm change shapes --finish-by T"


def test_a_job_in_deletion_is_shown_as_such_and_hears_nothing(farm: Place) -> None:
    ledger, _ = make_job(farm.store, shards=1)
    ledger.store.put("deleted/shapes", Tombstone(job="shapes", at=AT, by="ann@desk").model_dump_json().encode())
    ended = farm("status", "shapes")
    assert ended.out == "shapes: deleted\n"
    assert ended.err.strip() == "what is left of it is swept by: farm delete shapes"
    assert json.loads(farm("status", "shapes", "--json").out)["state"] == "deleted"
    for command in (["retry"], ["verify"], ["pull", "--to", "out"], *CONTROLS):
        ended = farm(*command, "shapes")
        assert ended.code == 2, command
        assert "is being deleted; run farm delete shapes again, which ends it" in ended.error
    assert ledger.controls("shapes") == []


def test_watching_goes_on_while_a_job_is_paused(farm: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, _ = make_job(farm.store, shards=1)
    ledger.append_control("shapes", "pause", at=AT, by="ann@desk")
    said = iter(["resume", "cancel"])
    monkeypatch.setattr(jobs.time, "sleep", lambda _: ledger.append_control("shapes", next(said), at=AT, by="ann@desk"))
    ended = farm("status", "shapes", "-w")
    states = [line.split()[1] for line in ended.out.splitlines() if line.startswith("shapes: ")]
    assert states == ["paused,", "open,", "cancelled,"]


def test_status_says_how_long_the_devices_worked_and_what_was_planned(farm: Place) -> None:
    ledger, plan = make_job(farm.store)
    assert "  GPU time   12 s\n" in farm("status", "shapes").out
    totals = ledger.totals(plan)
    assert totals is not None
    ledger.put_totals(plan, 1, totals.model_copy(update={"planned_gpu_seconds": 90.0}))
    assert "  GPU time   12 s, 1 min 30 s planned\n" in farm("status", "shapes").out
    record = json.loads(farm("status", "shapes", "--json").out)["runs"][0]["totals"]
    assert (record["gpu_seconds"], record["planned_gpu_seconds"]) == (12.0, 90.0)
