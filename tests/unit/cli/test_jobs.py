import json

import pytest

from farm.cli import jobs
from tests.unit.cli.conftest import FakeFarm, Place
from tests.unit.finished_jobs import make_job


def test_status_of_nothing_says_how_to_begin(farm: Place) -> None:
    ended = farm("status")
    assert (ended.code, ended.out) == (0, "")
    assert "farm render MANIFEST makes one" in ended.err


def test_status_lists_jobs_and_how_they_stand(farm: Place) -> None:
    make_job(farm.store, job="whole", failed={3})
    make_job(farm.store, job="begun", shards=1)
    rows = [line.split() for line in farm("status").out.splitlines()[2:]]
    stands = {row[0]: row[1:7] for row in rows}
    assert stands["whole"][:6] == ["done", "shapes", "10", "100", "%", "1"]
    assert stands["begun"][:6] == ["open", "shapes", "10", "40", "%", "–"]


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
    for command in ("status", "retry", "cancel", "verify"):
        ended = farm(command, "shape")
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


def test_retry_renders_the_failed_images_as_a_new_pass(farm: Place, fake_farm: FakeFarm) -> None:
    ledger, plan = make_job(farm.store, failed={3, 7})
    ended = farm("retry", "shapes")
    assert ended.code == 0
    assert "2 failed images of shapes will be rendered again" in ended.err
    assert ledger.passes(plan) == 2
    assert ledger.pass_indexes(plan, 2).tolist() == [3, 7]
    assert ledger.totals(plan).ok == 10
    assert ended.out.startswith("shapes: 10 of 10 images")


def test_retry_without_render_only_opens_the_pass_and_the_next_goes_on_with_it(
    farm: Place, fake_farm: FakeFarm
) -> None:
    ledger, plan = make_job(farm.store, failed={3})
    assert farm("retry", "shapes", "--no-render").code == 0
    assert fake_farm.opened == []
    assert ledger.open_jobs() == ["shapes"]
    assert json.loads(farm("status", "shapes", "--json").out)["done"] == 9
    assert farm("retry", "shapes").code == 0
    assert ledger.passes(plan) == 2
    assert ledger.failed_indexes(plan).tolist() == []


def test_retry_of_a_job_without_failures_does_nothing(farm: Place, fake_farm: FakeFarm) -> None:
    make_job(farm.store)
    ended = farm("retry", "shapes")
    assert ended.code == 0
    assert "no image of shapes failed" in ended.err
    assert fake_farm.opened == []


def test_retry_of_damaged_images_finds_lost_and_cut_pictures_and_renders_them_again(
    farm: Place, fake_farm: FakeFarm
) -> None:
    ledger, plan = make_job(farm.store, failed={3})
    objects = {row.index: row.object for row in ledger.rows(plan)}
    ledger.store.delete(objects[5])
    ledger.store.put(objects[8], ledger.store.get(objects[8])[:-7])
    ended = farm("retry", "shapes", "--damaged")
    assert ended.code == 0
    assert "3 images of shapes will be rendered again" in ended.err
    assert ledger.pass_indexes(plan, 2).tolist() == [3, 5, 8]
    assert farm("verify", "shapes").code == 0


def test_cancel_is_written_once_and_shows_in_the_status(farm: Place) -> None:
    ledger, _ = make_job(farm.store, shards=1)
    ended = farm("cancel", "shapes")
    assert ended.err.strip() == "shapes is cancelled with 4 of 10 images; farm render goes on with it"
    assert farm("cancel", "shapes").err.strip() == "shapes was cancelled before"
    assert [control.action for control in ledger.controls("shapes")] == ["cancel"]
    assert farm("status", "shapes").out.startswith("shapes: cancelled, 4 of 10 images")


def test_a_job_that_is_done_cannot_be_cancelled(farm: Place) -> None:
    make_job(farm.store)
    ended = farm("cancel", "shapes")
    assert (ended.code, ended.error) == (2, "shapes is done, 10 images; there is nothing to cancel")
