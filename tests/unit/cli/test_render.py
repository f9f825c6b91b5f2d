import json
import re
import sys
from typing import Any

import pytest

from farm.devices import numerics_for
from farm.errors import FarmUnavailableError, OutOfMemoryError, StoreFullError
from farm.plan import Numerics
from farm.records import Action
from farm.storage.local import LocalStore
from tests.unit.cli.conftest import FakeFarm, Place, Somebody


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
        "  GPU time   12 s",
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


@pytest.mark.parametrize(("here", "refused"), [("1", False), ("2", True), (None, False)])
def test_a_version_that_one_card_alone_uses_refuses_where_it_is_another_and_not_where_there_is_none(
    farm: Place, fake_farm: FakeFarm, monkeypatch: pytest.MonkeyPatch, here: str | None, refused: bool
) -> None:
    def have(own: str | None) -> None:
        def planned(*args: Any, **options: Any) -> Numerics:
            found = numerics_for(*args, **options)
            return found.model_copy(update={"versions": found.versions | ({"peft": own} if own else {})})

        monkeypatch.setattr("farm.request.numerics_for", planned)

    have("1")
    fake_farm.stop_after_shards, fake_farm.trouble = 1, KeyboardInterrupt()
    farm("render", keyed(farm, 3))
    fake_farm.stop_after_shards, fake_farm.trouble = None, None
    have(here)
    ended = farm("render", keyed(farm, 3))
    assert ("was planned with other numerics (peft: 1 -> 2)" in ended.err) is refused
    assert (ended.code == 0) is not refused


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
    fake_farm.stop_after_shards, fake_farm.meanwhile = 1, lambda: say(farm, "cancel")
    ended = farm("render", farm.manifest())
    assert (ended.code, ended.error) == (8, "shapes was cancelled with 4 of 10 images; go on with it: farm")
    fake_farm.stop_after_shards = None
    ended = farm("render", farm.manifest())
    assert ended.code == 0
    assert "shapes was cancelled; it goes on" in ended.err
    assert [control.action for control in farm.ledger.controls("shapes")] == ["cancel", "resume"]


def say(farm: Place, action: Action, **values: Any) -> None:
    """What another terminal says to the job."""
    farm.ledger.append_control("shapes", action, at="2026-11-21T10:05:00+00:00", by="ann@desk", **values)


def test_a_pause_ends_the_command_with_code_9_and_who_said_it(farm: Place, fake_farm: FakeFarm) -> None:
    fake_farm.stop_after_shards, fake_farm.meanwhile = 1, lambda: say(farm, "pause")
    ended = farm("render", farm.manifest())
    assert ended.code == 9
    assert re.fullmatch(
        r"shapes is paused \(by ann@desk, .+ ago\), with 4 of 10 images; go on with it: farm resume shapes, then farm",
        ended.error,
    )
    told = farm("render", farm.manifest(), "--json")
    assert (told.code, json.loads(told.out)["error"]["code"]) == (9, "waiting")


def test_a_paused_job_is_not_rendered_before_somebody_resumes_it(farm: Place, fake_farm: FakeFarm) -> None:
    fake_farm.stop_after_shards, fake_farm.meanwhile = 1, lambda: say(farm, "pause")
    farm("render", farm.manifest())
    fake_farm.opened.clear()
    fake_farm.stop_after_shards = None
    for flags in ([], ["--yes"]):
        ended = farm("render", farm.manifest(), *flags)
        assert ended.code == 9
        assert "go on with it: farm resume shapes, then farm" in ended.error
    assert fake_farm.opened == []
    farm("resume", "shapes")
    assert farm("render", farm.manifest()).code == 0


@pytest.mark.parametrize(
    ("limit", "why", "flag"),
    [
        ({"budget": {"images": 5}}, "4 of the 5 images of its budget are rendered", "--max-images N"),
        ({"budget": {"gpu_hours": 1}}, "1.00 of the 1 GPU-hours of its budget are spent", "--gpu-hours H"),
        ({"finish_by": "2099-01-01T00:00Z"}, "its finish_by has passed", "--finish-by T"),
    ],
)
def test_a_limit_that_is_reached_ends_with_code_9_and_names_its_flag(
    farm: Place, fake_farm: FakeFarm, limit: dict[str, object], why: str, flag: str
) -> None:
    fake_farm.stop_after_shards, fake_farm.says = 1, [("running", None), ("stopped", why)]
    ended = farm("render", farm.manifest(**limit))
    assert ended.code == 9
    assert ended.error == f"shapes stopped: {why}; raise it: farm change shapes {flag}, then farm retry shapes"


def test_a_finish_by_that_has_passed_is_found_before_a_farm_is_started(farm: Place, fake_farm: FakeFarm) -> None:
    fake_farm.stop_after_shards, fake_farm.trouble = 1, KeyboardInterrupt()
    farm("render", farm.manifest())
    say(farm, "change", finish_by="2026-01-01T00:00:00+00:00")
    fake_farm.opened.clear()
    ended = farm("render", farm.manifest())
    assert (ended.code, ended.error) == (
        9,
        "shapes stopped: its finish_by 2026-01-01T00:00:00+00:00 has passed; give it a later one: farm change shapes "
        "--finish-by T, then farm retry shapes",
    )
    assert fake_farm.opened == []


def test_a_job_that_is_deleted_meanwhile_ends_with_code_8(farm: Place, fake_farm: FakeFarm) -> None:
    fake_farm.stop_after_shards, fake_farm.says = 1, [("deleted", None)]
    ended = farm("render", farm.manifest())
    assert ended.code == 8
    assert ended.error.startswith("shapes was deleted; what was rendered of it is swept")


def test_a_job_that_another_farm_renders_is_followed_to_its_end(farm: Place, fake_farm: FakeFarm) -> None:
    fake_farm.says = [("elsewhere", "rendered by another farm, desk (process 7)")] * 3
    ended = farm("render", farm.manifest())
    assert ended.code == 0
    assert ended.err.count("note: rendered by another farm, desk (process 7); ") == 1
    assert ended.out.startswith("shapes: 10 of 10 images")


def test_what_the_manifest_changes_of_a_job_that_exists_is_said(farm: Place, fake_farm: FakeFarm) -> None:
    fake_farm.stop_after_shards, fake_farm.trouble = 1, KeyboardInterrupt()
    farm("render", farm.manifest(budget={"images": 100}))
    fake_farm.stop_after_shards, fake_farm.trouble = None, None
    ended = farm("render", farm.manifest(priority=80))
    assert "the manifest changes shapes: priority: 50 -> 80\n" in ended.err
    assert "note: what was said to shapes holds, unlike the manifest: budget.images: 100; " in ended.err


def test_the_owner_is_the_setting_or_the_users_name(
    farm: Place, fake_farm: FakeFarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("getpass.getuser", lambda: "ann")
    farm("render", farm.manifest())
    monkeypatch.setenv("FARM_OWNER", "atelier")
    farm("render", farm.manifest(name="others"))
    assert [farm.ledger.plan(job).owner for job in ("shapes", "others")] == ["ann", "atelier"]


# Pilots


def test_after_its_pilot_a_job_shows_the_sheet_and_waits(farm: Place, fake_farm: FakeFarm) -> None:
    ended = farm("render", farm.manifest(pilot=3))
    assert ended.code == 9
    lines = ended.out.splitlines()
    assert lines[0].startswith("shapes, pilot: 3 of 3 images, ")
    assert lines[3].startswith("  sheet ")
    assert ended.err.splitlines()[-1] == (
        "look at the pilot's sheet; the other 7 images follow with: farm approve shapes, then farm"
    )
    assert farm.ledger.open_jobs() == ["shapes"]
    assert fake_farm.submitted == ["shapes"]


def test_a_pilot_that_waits_is_shown_again_without_starting_a_farm(farm: Place, fake_farm: FakeFarm) -> None:
    farm("render", farm.manifest(pilot=3))
    fake_farm.opened.clear()
    ended = farm("render", farm.manifest(pilot=3))
    assert (ended.code, fake_farm.opened) == (9, [])
    assert ended.out.startswith("shapes, pilot: 3 of 3 images, ")


def test_an_approved_job_goes_on_to_the_rest(farm: Place, fake_farm: FakeFarm) -> None:
    farm("render", farm.manifest(pilot=3))
    farm("approve", "shapes")
    ended = farm("render", farm.manifest(pilot=3))
    assert ended.code == 0
    assert ended.out.startswith("shapes: 10 of 10 images, ")


def test_a_pilot_that_was_approved_beforehand_does_not_wait(farm: Place, fake_farm: FakeFarm) -> None:
    fake_farm.stop_after_shards, fake_farm.trouble = 0, KeyboardInterrupt()
    farm("render", farm.manifest(pilot=3))
    farm("approve", "shapes")
    fake_farm.stop_after_shards, fake_farm.trouble = None, None
    ended = farm("render", farm.manifest(pilot=3))
    assert (ended.code, ended.out.splitlines()[0][:24]) == (0, "shapes: 10 of 10 images,")
    assert "pilot" not in ended.out


def test_an_approval_while_the_pilots_end_is_told_is_taken(farm: Place, fake_farm: FakeFarm) -> None:
    fake_farm.meanwhile = lambda: say(farm, "approve")
    fake_farm.says = [("pilot", None)]
    assert farm("render", farm.manifest(pilot=3)).code == 0
    assert fake_farm.submitted == ["shapes", "shapes"]


def test_yes_approves_the_pilot(farm: Place, fake_farm: FakeFarm) -> None:
    ended = farm("render", farm.manifest(pilot=3), "--yes")
    assert ended.code == 0
    assert [line.split(":")[0] for line in ended.out.splitlines() if line.startswith("shapes")] == [
        "shapes, pilot",
        "shapes",
    ]
    assert [control.action for control in farm.ledger.controls("shapes")] == ["approve"]
    assert len(fake_farm.opened) == 1


def test_yes_and_json_give_one_value(farm: Place, fake_farm: FakeFarm) -> None:
    record = json.loads(farm("render", farm.manifest(pilot=3), "--yes", "--json").out)
    assert (record["state"], record["runs"][0]["images"], record["runs"][0]["left"]) == ("done", 10, 0)


def test_a_person_at_the_terminal_is_asked_and_the_farm_stays_up_for_the_answer(
    farm: Place, fake_farm: FakeFarm, somebody: Somebody
) -> None:
    ended = farm("render", farm.manifest(pilot=3))
    assert ended.code == 0
    assert somebody.asked == ["Look at the sheet. Render the other 7 images?"]
    assert len(fake_farm.opened) == 1
    assert fake_farm.submitted == ["shapes", "shapes"]


def test_a_no_leaves_the_job_waiting(farm: Place, fake_farm: FakeFarm, somebody: Somebody) -> None:
    somebody.answer = False
    assert farm("render", farm.manifest(pilot=3)).code == 9
    assert farm.ledger.controls("shapes") == []


def test_a_pilot_as_json_says_what_is_left(farm: Place, fake_farm: FakeFarm, somebody: Somebody) -> None:
    ended = farm("render", farm.manifest(pilot=3), "--json")
    record = json.loads(ended.out)
    assert (ended.code, record["state"], somebody.asked) == (9, "pilot", [])
    assert (record["runs"][0]["images"], record["runs"][0]["left"]) == (3, 7)


def test_other_library_versions_are_refused_before_anything_starts(
    farm: Place, fake_farm: FakeFarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_farm.stop_after_shards, fake_farm.trouble = 1, KeyboardInterrupt()
    farm("render", farm.manifest())
    fake_farm.opened.clear()
    monkeypatch.setattr("farm.versions.version", lambda package: "9.9.9")
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
