import json

import pytest

from tests.unit.cli.conftest import FakeFarm, Place
from tests.unit.finished_jobs import make_job


def test_retry_renders_the_failed_images_as_a_new_pass(farm: Place, fake_farm: FakeFarm) -> None:
    ledger, plan = make_job(farm.store, failed={3, 7})
    ended = farm("retry", "shapes")
    assert ended.code == 0
    assert "2 failed images of shapes will be rendered again" in ended.err
    assert ledger.passes(plan) == 2
    assert ledger.selection(plan, 2).indexes.tolist() == [3, 7]
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
    assert ledger.selection(plan, 2).indexes.tolist() == [3, 5, 8]
    assert farm("verify", "shapes").code == 0


def test_retry_of_all_images_renders_every_one_again(farm: Place, fake_farm: FakeFarm) -> None:
    ledger, plan = make_job(farm.store)
    ended = farm("retry", "shapes", "--all")
    assert ended.code == 0
    assert "10 images of shapes will be rendered again" in ended.err
    assert ledger.pass_images(plan, 2) == 10
    assert {row.pass_number for row in ledger.rows(plan)} == {2}


def test_retry_of_listed_images(farm: Place, fake_farm: FakeFarm) -> None:
    ledger, plan = make_job(farm.store, failed={3})
    ended = farm("retry", "shapes", "--images", "0, 7-9", "--no-render", "--json")
    assert json.loads(ended.out) == {"job": "shapes", "reopened": 4, "unfinished": False, "resumed": False}
    assert ledger.selection(plan, 2).indexes.tolist() == [0, 7, 8, 9]
    assert fake_farm.opened == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--images", "3,x"], "'x' is no image index and no range of them; write indexes as 7,9,20-29"),
        (["--images", "9-3"], "'9-3' ends before it begins"),
        (["--images", "10"], "shapes has no image 10: its indexes are 0 to 9"),
        (["--images", ""], "'' is no image index"),
        (["--images", "1", "--all"], "--all and --images exclude each other; leave one of them out"),
        (["--run", "ffffffff"], "shapes has no run 'ffffffff'; it has 0a1b2c3d"),
    ],
)
def test_images_that_cannot_be_rendered_again(farm: Place, fake_farm: FakeFarm, flags: list[str], said: str) -> None:
    ledger, plan = make_job(farm.store, failed={3})
    ended = farm("retry", "shapes", *flags)
    assert ended.code == 2
    assert said in ended.error
    assert ledger.passes(plan) == 1
    assert fake_farm.opened == []


def test_retry_resumes_a_paused_job_and_goes_on_with_it_first(farm: Place, fake_farm: FakeFarm) -> None:
    ledger, plan = make_job(farm.store, shards=1)
    farm("pause", "shapes")
    ended = farm("retry", "shapes")
    assert ended.code == 0
    assert "shapes is not done yet; it goes on, and failed images can be retried after it" in ended.err
    assert ledger.finished(plan)
    assert [control.action for control in ledger.controls("shapes")] == ["pause", "resume"]


def test_other_images_of_a_job_that_is_not_done_are_refused(farm: Place, fake_farm: FakeFarm) -> None:
    make_job(farm.store, shards=1)
    ended = farm("retry", "shapes", "--all")
    assert (ended.code, ended.error) == (
        2,
        "shapes is not done yet; images of it can be rendered again when it is done",
    )
    assert fake_farm.opened == []


def test_what_goes_on_with_a_retry_opens_no_second_pass(
    farm: Place, fake_farm: FakeFarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_job(farm.store, failed={3})
    fake_farm.stop_after_shards, fake_farm.trouble = 0, KeyboardInterrupt()
    command = ["retry", "shapes", "--images", "3-5", "--damaged", "--store", "store"]
    monkeypatch.setattr("sys.argv", ["farm", *command])
    ended = farm(*command)
    assert ended.error == "interrupted: shapes is not done; go on with it: farm retry shapes --store store"
