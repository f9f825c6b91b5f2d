import json
import sys

import pytest

from farm.devices import numerics_for
from farm.errors import FarmUnavailableError, OutOfMemoryError, StoreFullError
from farm.storage.local import LocalStore
from tests.unit.cli.conftest import FakeFarm, Place


def test_a_rendered_job_says_what_it_came_to_and_where_it_is(farm: Place, fake_farm: FakeFarm) -> None:
    ended = farm("render", farm.manifest())
    assert ended.code == 0
    lines = ended.out.splitlines()
    assert lines[0].startswith("shapes: 10 of 10 images, ")
    assert " on 1 renderer (" in lines[0]
    run = farm.ledger.plan("shapes").run
    assert lines[1:] == [
        f"  pictures   ./store/jobs/shapes/{run}/images",
        f"  dataset    ./store/jobs/shapes/{run}/dataset",
        f"  sheet      ./store/jobs/shapes/{run}/sheet.png",
    ]


def test_verbose_shows_the_times_of_the_stages(farm: Place, fake_farm: FakeFarm) -> None:
    assert "  times      denoise 12 s · write 1.5 s\n" in farm("render", farm.manifest(), "-v").out


def test_renderers_is_a_setting_of_the_farm_that_is_opened(farm: Place, fake_farm: FakeFarm) -> None:
    farm("render", farm.manifest(), "--renderers", "3")
    assert fake_farm.opened == [3]


def test_a_job_with_failed_images_ends_with_code_5_and_the_way_on(farm: Place, fake_farm: FakeFarm) -> None:
    fake_farm.failed = {3, 7}
    ended = farm("render", farm.manifest())
    assert ended.code == 5
    assert "  failed     2 images: render\n" in ended.out
    assert "             image 3: the pipeline failed: tensor of the wrong shape\n" in ended.out
    assert ended.err.splitlines()[-1] == "2 images failed; render them again: farm retry shapes"


def test_json_has_the_totals_of_every_run(farm: Place, fake_farm: FakeFarm) -> None:
    fake_farm.failed = {3}
    ended = farm("render", farm.manifest(), "--json")
    record = json.loads(ended.out)
    assert (ended.code, record["state"], record["failed"]) == (5, "done", 1)
    assert record["runs"][0]["failures_by_code"] == {"render": 1}
    assert record["runs"][0]["sheet"].endswith("/sheet.png")


def test_a_job_that_is_done_is_not_rendered_again(farm: Place, fake_farm: FakeFarm) -> None:
    farm("render", farm.manifest())
    fake_farm.opened.clear()
    ended = farm("render", farm.manifest())
    assert ended.code == 0
    assert fake_farm.opened == []
    assert "shapes is done; nothing is left to render" in ended.err
    assert ended.out.startswith("shapes: 10 of 10 images")


def test_a_changed_manifest_under_an_old_name_is_refused_with_what_changed(farm: Place, fake_farm: FakeFarm) -> None:
    farm("render", farm.manifest())
    before = farm.jobs_written()
    ended = farm("render", farm.manifest(params={"num_inference_steps": 9}))
    assert ended.code == 2
    assert "params.num_inference_steps: 4 -> 9" in ended.error
    assert "new name" in ended.error
    assert farm.jobs_written() == before


def keyed(farm: Place, rows: int) -> str:
    farm.write("rows.csv", "id,prompt\n" + "".join(f"k{row},shape number {row}\n" for row in range(rows)))
    return farm.manifest(prompts={"file": "rows.csv", "key": "id"})


def test_added_rows_are_offered_and_rendered_as_a_new_run(farm: Place, fake_farm: FakeFarm) -> None:
    farm("render", keyed(farm, 3))
    ended = farm("render", keyed(farm, 5))
    assert ended.code == 2
    assert "2 rows were added" in ended.error
    assert "--append" in ended.error
    assert len(farm.ledger.plans("shapes")) == 1
    ended = farm("render", keyed(farm, 5), "--append")
    assert ended.code == 0
    assert [plan.images for plan in farm.ledger.plans("shapes")] == [6, 4]
    assert [line for line in ended.out.splitlines() if line.startswith("shapes, run ")][1].count("4 of 4 images") == 1


def test_yes_takes_the_offer_of_added_rows(farm: Place, fake_farm: FakeFarm) -> None:
    farm("render", keyed(farm, 3))
    assert farm("render", keyed(farm, 5), "--yes").code == 0
    assert len(farm.ledger.plans("shapes")) == 2


def test_added_rows_with_other_numerics_than_the_run_before_are_noted(
    farm: Place, fake_farm: FakeFarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    farm("render", keyed(farm, 3))
    monkeypatch.setattr(
        "farm.request.numerics_for",
        lambda *args, **options: numerics_for(*args, **options).model_copy(update={"batch": 3}),
    )
    ended = farm("render", keyed(farm, 5), "--append")
    assert ended.code == 0
    first = farm.ledger.plans("shapes")[0].numerics.batch
    assert f"rendered with other numerics than the run before them: batch: {first} -> 3\n" in ended.err


def test_added_rows_wait_for_the_run_in_hand_and_follow_it(farm: Place, fake_farm: FakeFarm) -> None:
    fake_farm.stop_after_shards, fake_farm.trouble = 1, KeyboardInterrupt()
    farm("render", keyed(farm, 3))
    fake_farm.stop_after_shards, fake_farm.trouble = None, None
    ended = farm("render", keyed(farm, 5), "--append")
    assert ended.code == 0
    assert "2 added rows wait until the run in hand has ended" in ended.err
    assert [farm.ledger.totals(plan).images for plan in farm.ledger.plans("shapes")] == [6, 4]


def test_ctrl_c_leaves_a_job_that_the_same_command_goes_on_with(
    farm: Place, fake_farm: FakeFarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_farm.stop_after_shards = 1
    fake_farm.trouble = KeyboardInterrupt()
    monkeypatch.setattr(sys, "argv", ["farm", "render", farm.manifest(), "--append"])
    ended = farm("render", farm.manifest(), "--append")
    assert ended.code == 130
    assert ended.error == "interrupted: shapes is not done; go on with it: farm render job.yaml"
    assert farm.ledger.open_jobs() == ["shapes"]
    fake_farm.stop_after_shards, fake_farm.trouble = None, None
    assert farm("render", farm.manifest()).code == 0


def test_ctrl_c_beside_a_running_farm_leaves_the_job_to_it(farm: Place, fake_farm: FakeFarm) -> None:
    fake_farm.stop_after_shards, fake_farm.trouble, fake_farm.started_here = 1, KeyboardInterrupt(), False
    ended = farm("render", farm.manifest())
    assert ended.error == (
        "interrupted: the farm goes on with shapes; look: farm status shapes -w; stop it: farm cancel shapes"
    )


@pytest.mark.parametrize(
    ("trouble", "code"),
    [
        (OutOfMemoryError("no memory left for one image; lower the size"), 4),
        (StoreFullError("the disk is full; free some space"), 3),
        (FarmUnavailableError("no renderer can be started"), 6),
    ],
)
def test_what_stalls_a_job_is_the_commands_error(
    farm: Place, fake_farm: FakeFarm, trouble: Exception, code: int
) -> None:
    fake_farm.stop_after_shards, fake_farm.trouble = 1, trouble
    ended = farm("render", farm.manifest())
    assert ended.code == code
    assert ended.error == f"{trouble} (what is stored stays; farm goes on)"


def test_a_cancelled_job_ends_with_code_8_and_goes_on_when_rendered_again(farm: Place, fake_farm: FakeFarm) -> None:
    fake_farm.stop_after_shards, fake_farm.cancelled = 1, True
    assert farm("render", farm.manifest()).code == 8
    farm("cancel", "shapes")
    fake_farm.stop_after_shards, fake_farm.cancelled = None, False
    ended = farm("render", farm.manifest())
    assert ended.code == 0
    assert "shapes was cancelled; it goes on" in ended.err
    assert [control.action for control in farm.ledger.controls("shapes")] == ["cancel", "resume"]


def test_other_library_versions_are_refused_before_anything_starts(
    farm: Place, fake_farm: FakeFarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_farm.stop_after_shards, fake_farm.trouble = 1, KeyboardInterrupt()
    farm("render", farm.manifest())
    fake_farm.opened.clear()
    monkeypatch.setattr("farm.devices.version", lambda package: "9.9.9")
    ended = farm("render", farm.manifest())
    assert ended.code == 4
    assert "torch: " in ended.error
    assert "-> 9.9.9" in ended.error
    assert "or give the manifest a new name" in ended.error
    assert fake_farm.opened == []


def test_a_store_that_cannot_be_written_is_found_before_any_work(farm: Place, fake_farm: FakeFarm) -> None:
    farm.store.write_text("a file where the folder should be")
    ended = farm("render", farm.manifest())
    assert ended.code == 3
    assert str(farm.store) in ended.error
    assert fake_farm.opened == []


def test_a_disk_that_is_full_while_planning_leaves_nothing_that_reads_as_a_job(
    farm: Place, fake_farm: FakeFarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = LocalStore.create

    def create(store: LocalStore, key: str, data: bytes, **options: str) -> bool:
        if "/plans/" in key:
            raise StoreFullError("the disk is full; free some space, then start the job again")
        return real(store, key, data, **options)

    with monkeypatch.context() as patched:
        patched.setattr(LocalStore, "create", create)
        ended = farm("render", farm.manifest())
    assert (ended.code, ended.error) == (3, "the disk is full; free some space, then start the job again")
    assert farm.ledger.plans("shapes") == []
    assert farm("render", farm.manifest()).code == 0
