"""What may be said to a job in each of its states, and what is written down for it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from farm import controls
from farm.controls import Said, approve, cancel, change, parse_indexes, pause, resume, retry
from farm.errors import ControlError, UnknownJobError
from farm.ledger import Indexes, Ledger
from farm.limits import Changes
from farm.passes import Everything
from farm.plan import Plan
from farm.removal import delete_job
from tests.unit.finished_jobs import commit_shard, make_ledger, make_plan, render_pass

AT = "2026-11-21T10:00:00+00:00"
WHO = {"at": AT, "by": "alice@desk"}


def job(folder: Path, *, done: bool = False, failed: tuple[int, ...] = (), **fields: Any) -> tuple[Ledger, Plan]:
    """A job with its first shard rendered, or all of its first pass."""
    ledger, plan = make_ledger(folder), make_plan(**fields)
    ledger.create_plan(plan, 1)
    if done:
        render_pass(ledger, plan, 1, failed=failed)
    else:
        ledger.open("shapes")
        commit_shard(ledger, plan, 0, failed=failed)
    return ledger, plan


def actions(ledger: Ledger) -> list[str]:
    return [control.action for control in ledger.controls("shapes")]


def test_pause_resume_and_cancel_are_written_once_and_hold(tmp_path: Path) -> None:
    ledger, _ = job(tmp_path)
    said = pause(ledger, "shapes", **WHO)
    assert (said.state, said.message) == ("paused", "shapes is paused; farm resume shapes goes on with it")
    assert said.control == ledger.controls("shapes")[0]
    assert (said.control.by, said.control.at) == ("alice@desk", AT)
    assert pause(ledger, "shapes", **WHO) == Said("shapes", "paused", None, "shapes was paused before")
    assert resume(ledger, "shapes", **WHO).message == "shapes goes on"
    again = resume(ledger, "shapes", **WHO)
    assert (again.state, again.control, again.message) == ("open", None, "shapes was neither paused nor cancelled")
    assert cancel(ledger, "shapes", **WHO).message == "shapes is cancelled; farm resume shapes goes on with it"
    assert cancel(ledger, "shapes", **WHO).message == "shapes was cancelled before"
    with pytest.raises(
        ControlError, match="shapes is cancelled, so nothing of it is rendered; farm resume shapes goes on"
    ):
        pause(ledger, "shapes", **WHO)
    assert resume(ledger, "shapes", **WHO).state == "open"
    assert actions(ledger) == ["pause", "resume", "cancel", "resume"]


@pytest.mark.parametrize(
    ("say", "nothing"),
    [
        (pause, "nothing to pause"),
        (resume, "nothing to go on with"),
        (cancel, "nothing to cancel"),
        (lambda *a, **k: change(*a, Changes(priority=3), **k), "nothing to change"),
    ],
)
def test_a_job_that_is_done_takes_no_more_words(tmp_path: Path, say: Callable[..., Said], nothing: str) -> None:
    ledger, _ = job(tmp_path, done=True)
    with pytest.raises(ControlError) as caught:
        say(ledger, "shapes", **WHO)
    assert caught.value.message == f"shapes is done, 10 images; there is {nothing}"
    assert ledger.controls("shapes") == []


@pytest.mark.parametrize(
    "say", [pause, resume, cancel, approve, retry, lambda *a, **k: change(*a, Changes(priority=3), **k)]
)
def test_unknown_and_deleted_jobs_are_refused(tmp_path: Path, say: Callable[..., Any]) -> None:
    ledger, _ = job(tmp_path)
    with pytest.raises(UnknownJobError, match="did you mean 'shapes'"):
        say(ledger, "shape", **WHO)
    ledger.store.put("deleted/shapes", b"")
    with pytest.raises(ControlError, match="shapes is being deleted; run farm delete shapes again, which ends it"):
        say(ledger, "shapes", **WHO)
    assert list(ledger.store.list("jobs/shapes/control/")) == []


@pytest.mark.parametrize("when", ["before it is written", "after it is written"])
@pytest.mark.parametrize("then", ["is gone", "is being deleted", "was made anew", "was made anew and spoken to"])
@pytest.mark.parametrize("say", [pause, resume, cancel, retry, lambda *a, **k: change(*a, Changes(priority=3), **k)])
def test_a_word_that_comes_too_late_for_a_deletion_holds_for_no_later_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, say: Callable[..., Any], then: str, when: str
) -> None:
    ledger, _ = job(tmp_path)
    if say in (resume, retry):
        pause(ledger, "shapes", **WHO)
    create, other = ledger.store.create, make_ledger(tmp_path)

    def delete() -> None:
        delete_job(other, "shapes", at=AT, by="bob")
        if then == "is being deleted":
            other.store.put("deleted/shapes", b"")
        if "anew" in then:
            other.create_plan(make_plan(run="99999999"), 1)
        if "spoken to" in then:
            other.append_control("shapes", "pause", at=AT, by="bob")

    def overtaken(key: str, data: bytes, **options: str) -> bool:
        monkeypatch.setattr(ledger.store, "create", create)
        if when == "before it is written":
            delete()
        created = create(key, data, **options)
        if when == "after it is written":
            delete()
        return created

    monkeypatch.setattr(ledger.store, "create", overtaken)
    with pytest.raises(
        ControlError, match=r"shapes was deleted meanwhile, so [a-z]+ was taken back; see farm status, and say"
    ):
        say(ledger, "shapes", **WHO)
    left = [info.key for info in other.store.list("jobs/shapes/control/")]
    assert left == (["jobs/shapes/control/000001.json"] if "spoken to" in then else [])
    assert [control.by for control in other.controls("shapes")] == ["bob"] * len(left)


@pytest.mark.parametrize("anew", [False, True])
def test_a_word_is_taken_back_and_never_anothers_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, anew: bool
) -> None:
    ledger, _ = job(tmp_path)
    create, get, other = ledger.store.create, ledger.store.get, make_ledger(tmp_path)

    def deleted_meanwhile(key: str) -> bytes:
        if "/plans/" in key:
            monkeypatch.setattr(ledger.store, "get", get)
            delete_job(other, "shapes", at=AT, by="bob")
            if anew:
                other.create_plan(make_plan(run="99999999"), 1)
                other.append_control("shapes", "pause", at=AT, by="bob")
        return get(key)

    def created(key: str, data: bytes, **options: str) -> bool:
        monkeypatch.setattr(ledger.store, "get", deleted_meanwhile)
        return create(key, data, **options)

    monkeypatch.setattr(ledger.store, "create", created)
    with pytest.raises(ControlError, match="shapes was deleted meanwhile, so cancel was taken back"):
        cancel(ledger, "shapes", **WHO)
    assert [(control.action, control.by) for control in other.controls("shapes")] == [("pause", "bob")] * anew


def test_approve_lets_the_others_follow(tmp_path: Path) -> None:
    ledger, plan = job(tmp_path, done=True, pilot=3)
    ledger.close("shapes")
    with pytest.raises(
        ControlError, match="waits with its pilot done: farm approve shapes lets the other images follow"
    ):
        retry(ledger, "shapes", which="all", **WHO)
    assert resume(ledger, "shapes", **WHO).message == (
        "shapes was neither paused nor cancelled; after its pilot it waits for farm approve shapes"
    )
    said = approve(ledger, "shapes", **WHO)
    assert (said.state, said.message) == ("open", "shapes is approved; its other 7 images follow")
    assert ledger.open_jobs() == ["shapes"]
    assert approve(ledger, "shapes", **WHO).message == "shapes was approved before"
    ledger.open_pass(plan, 2, None)
    render_pass(ledger, plan, 2)
    assert approve(ledger, "shapes", **WHO).state == "done"
    assert actions(ledger) == ["approve"]


def test_approve_may_be_said_before_the_pilot_is_done_and_while_it_is_paused(tmp_path: Path) -> None:
    ledger, _ = job(tmp_path, pilot=5)
    assert approve(ledger, "shapes", **WHO).message == (
        "shapes is approved; its other 5 images follow when the pilot is done"
    )
    ledger, _ = job(tmp_path / "other", pilot=5)
    pause(ledger, "shapes", **WHO)
    said = approve(ledger, "shapes", **WHO)
    assert (said.state, said.message) == (
        "paused",
        "shapes is approved; its other 5 images follow, once farm resume shapes goes on: it is paused",
    )


def test_there_is_nothing_to_approve_without_a_pilot(tmp_path: Path) -> None:
    ledger, _ = job(tmp_path)
    with pytest.raises(ControlError, match="shapes has no pilot, so there is nothing to approve"):
        approve(ledger, "shapes", **WHO)


def test_a_change_says_what_was_and_writes_only_what_differs(tmp_path: Path) -> None:
    ledger, _ = job(tmp_path, budget={"images": 100}, finish_by="2026-12-01T09:00+08:00")
    wanted = Changes(priority=80, finish_by="2026-12-01T01:00Z", max_images=200, gpu_hours=1.5)
    said = change(ledger, "shapes", wanted, **WHO)
    assert said.message == "shapes: priority: 50 -> 80; budget.gpu_hours: none -> 1.5; budget.images: 100 -> 200"
    assert said.control is not None
    assert (said.control.priority, said.control.finish_by, said.control.max_images) == (80, None, 200)
    again = change(ledger, "shapes", wanted, **WHO)
    assert (again.control, again.message) == (None, "shapes has these values already")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (Changes(), "nothing to change of shapes is given; give a priority, finish_by, gpu_hours or images"),
        (Changes(priority=101), "priority must be 0 to 100, got 101; higher goes first"),
        (Changes(priority=-1), "priority must be 0 to 100, got -1; higher goes first"),
        (Changes(gpu_hours=0.0), "gpu_hours must be above 0, got 0.0; to stop the job: farm cancel shapes"),
        (Changes(gpu_hours=float("nan")), "gpu_hours must be above 0, got nan; to stop the job: farm cancel shapes"),
        (Changes(max_images=0), "images must be above 0, got 0; to stop the job: farm cancel shapes"),
        (
            Changes(finish_by="2026-12-01 09:00"),
            "finish_by needs an offset from UTC, got '2026-12-01 09:00'; write 2026-12-01 09:00Z for UTC, or an offset of "
            "yours as 2026-12-01 09:00+08:00",
        ),
        (
            Changes(finish_by="2026-11-21T17:00+08:00"),
            "finish_by 2026-11-21T17:00+08:00 has passed; give a later one, or farm cancel shapes",
        ),
    ],
)
def test_values_that_cannot_be_are_refused(tmp_path: Path, changes: Changes, message: str) -> None:
    ledger, _ = job(tmp_path)
    with pytest.raises(ControlError) as caught:
        change(ledger, "shapes", changes, **WHO)
    assert caught.value.message == message
    assert ledger.controls("shapes") == []


def test_a_job_that_goes_on_past_its_time_is_told_so(tmp_path: Path) -> None:
    ledger, _ = job(tmp_path, finish_by="2026-11-01T09:00Z")
    assert resume(ledger, "shapes", **WHO).message == (
        "shapes was neither paused nor cancelled, but its finish_by 2026-11-01T09:00:00+00:00 has passed: give it a later "
        "one with farm change shapes"
    )


def test_retry_opens_a_pass_over_what_failed(tmp_path: Path) -> None:
    ledger, plan = job(tmp_path, done=True, failed=(3, 7))
    found = retry(ledger, "shapes", **WHO)
    assert (found.opened, found.unfinished, found.resumed) == (2, False, False)
    assert found.message == "2 failed images of shapes will be rendered again"
    assert ledger.selection(plan, 2).indexes.tolist() == [3, 7]
    assert ledger.open_jobs() == ["shapes"]
    waiting = retry(ledger, "shapes", **WHO)
    assert (waiting.opened, waiting.unfinished) == (0, True)
    assert waiting.message == "shapes is not done yet; it goes on, and failed images can be retried after it"
    assert ledger.passes(plan) == 2


def test_retry_of_a_list_of_all_and_of_damaged_images(tmp_path: Path) -> None:
    ledger, plan = job(tmp_path, done=True, failed=(3,))
    found = retry(ledger, "shapes", which=parse_indexes("8, 0-2,1"), **WHO)
    assert (found.opened, found.message) == (4, "4 images of shapes will be rendered again")
    assert ledger.selection(plan, 2).indexes.tolist() == [0, 1, 2, 8]
    render_pass(ledger, plan, 2)
    row = next(row for row in ledger.rows(plan) if row.index == 5)
    ledger.store.delete(row.object)
    assert retry(ledger, "shapes", damaged=True, **WHO).opened == 2
    assert ledger.selection(plan, 3).indexes.tolist() == [3, 5]
    render_pass(ledger, plan, 3)
    assert retry(ledger, "shapes", which="all", **WHO).message == "10 images of shapes will be rendered again"
    assert ledger.selection(plan, 4) == Everything(10)


def test_nothing_failed_and_nothing_is_opened(tmp_path: Path) -> None:
    ledger, plan = job(tmp_path, done=True)
    assert retry(ledger, "shapes", **WHO).message == "no image of shapes failed; there is nothing to render again"
    assert retry(ledger, "shapes", damaged=True, **WHO).message == (
        "no image of shapes failed or is damaged; there is nothing to render again"
    )
    assert (ledger.passes(plan), ledger.open_jobs()) == (1, [])


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ([10], "shapes has no image 10: its indexes are 0 to 9; write indexes as 7,9,20-29"),
        ([2, -1], "shapes has no image -1: its indexes are 0 to 9; write indexes as 7,9,20-29"),
        ([2**70], "what is listed of shapes are not its indexes, 0 to 9; write indexes as 7,9,20-29"),
        ([], "no image of shapes is listed; write indexes as 7,9,20-29"),
    ],
)
def test_indexes_out_of_range_are_refused(tmp_path: Path, which: list[int], message: str) -> None:
    ledger, plan = job(tmp_path, done=True)
    with pytest.raises(ControlError) as caught:
        retry(ledger, "shapes", which=which, **WHO)
    assert caught.value.message == message
    assert ledger.passes(plan) == 1


def test_a_list_of_an_unfinished_job_is_refused(tmp_path: Path) -> None:
    ledger, _ = job(tmp_path)
    for which in ("all", [1, 2]):
        with pytest.raises(ControlError) as caught:
            retry(ledger, "shapes", which=which, **WHO)
        assert caught.value.message == "shapes is not done yet; images of it can be rendered again when it is done"


def test_a_list_of_a_job_of_several_runs_needs_the_run(tmp_path: Path) -> None:
    ledger, plan = job(tmp_path, done=True)
    second = make_plan(run="99999999", rows=1)
    ledger.create_plan(second, 2)
    render_pass(ledger, second, 1)
    with pytest.raises(
        ControlError, match="has 2 runs, each with images from 0: say which is meant, of 0a1b2c3d, 99999999"
    ):
        retry(ledger, "shapes", which=[0], **WHO)
    with pytest.raises(ControlError, match="shapes has no run 'x'; it has 0a1b2c3d, 99999999"):
        retry(ledger, "shapes", which=[0], run="x", **WHO)
    with pytest.raises(ControlError, match="shapes has no image 5: its indexes are 0 to 1"):
        retry(ledger, "shapes", which=[5], run="99999999", **WHO)
    assert retry(ledger, "shapes", which=[1], run="99999999", **WHO).opened == 1
    assert (ledger.passes(plan), ledger.passes(second)) == (1, 2)


def test_retry_resumes_what_was_held_back(tmp_path: Path) -> None:
    ledger, _ = job(tmp_path)
    cancel(ledger, "shapes", **WHO)
    found = retry(ledger, "shapes", **WHO)
    assert (found.opened, found.unfinished, found.resumed) == (0, True, True)
    assert actions(ledger) == ["cancel", "resume"]


@pytest.mark.parametrize("before", ["open", "paused"])
def test_retry_resumes_what_is_held_back_once_the_passes_are_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    ledger, _ = job(tmp_path, done=True, failed=(3,))
    first, then = ("cancel", "resume") if before == "paused" else ("resume", "pause")
    ledger.append_control("shapes", first, **WHO)

    def damaged(ledger: Ledger, plan: Plan) -> Indexes:
        ledger.append_control("shapes", then, at=AT, by="bob")
        return np.array([5])

    monkeypatch.setattr(controls, "damaged_images", damaged)
    found = retry(ledger, "shapes", damaged=True, **WHO)
    assert (found.opened, found.resumed) == (2, before == "open")
    assert actions(ledger) == [first, then] + ["resume"] * (before == "open")


def test_a_retry_that_is_refused_names_the_passes_it_opened_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger, plan = job(tmp_path, done=True, failed=(3,))
    second = make_plan(run="99999999")
    ledger.create_plan(second, 2)
    render_pass(ledger, second, 1, failed=(4, 5))
    real = ledger.open_pass

    def late(plan: Plan, number: int, indexes: Any) -> bool:
        if plan.run == second.run:
            real(plan, number, np.array([4]))
        return real(plan, number, indexes)

    monkeypatch.setattr(ledger, "open_pass", late)
    with pytest.raises(ControlError) as caught:
        retry(ledger, "shapes", **WHO)
    assert caught.value.message == (
        "pass 2 of shapes was just opened by somebody else; look at it: farm status shapes. What was opened before stays "
        "open: pass 2 of run 0a1b2c3d, 1 image"
    )
    assert ledger.selection(plan, 2).indexes.tolist() == [3]
    assert ledger.open_jobs() == ["shapes"]


def test_a_pass_that_another_opened_meanwhile_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, plan = job(tmp_path, done=True, failed=(3,))
    real = ledger.open_pass

    def late(plan: Plan, number: int, indexes: Any) -> bool:
        real(plan, number, np.array([3]))
        return real(plan, number, indexes)

    monkeypatch.setattr(ledger, "open_pass", late)
    with pytest.raises(ControlError) as caught:
        retry(ledger, "shapes", **WHO)
    assert caught.value.message == ("pass 2 of shapes was just opened by somebody else; look at it: farm status shapes")
    assert ledger.selection(plan, 2).indexes.tolist() == [3]


def test_indexes_are_read_as_people_write_them() -> None:
    assert parse_indexes("7,9,20-22, 9").tolist() == [7, 9, 20, 21, 22]
    for text, message in (
        ("", "'' is no image index and no range of them; write indexes as 7,9,20-29"),
        ("1,,2", "'' is no image index and no range of them; write indexes as 7,9,20-29"),
        ("-3", "'-3' is no image index and no range of them; write indexes as 7,9,20-29"),
        ("1..3", "'1..3' is no image index and no range of them; write indexes as 7,9,20-29"),
        ("9-7", "'9-7' ends before it begins; write indexes as 7,9,20-29"),
        ("0-99999999", "more than 10,000,000 images are listed; retry all of them, or in several lists"),
    ):
        with pytest.raises(ControlError) as caught:
            parse_indexes(text)
        assert caught.value.message == message
