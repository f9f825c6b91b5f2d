"""The dispatcher's rules on jobs: what people say to them, whose turn it is, limits, claims, and the last shards."""

from dataclasses import replace

import numpy as np
import pytest

from farm.lease import LEASE_S, Completion, Lease, Report
from farm.retry import ELSEWHERE_S, ERRORS_BEFORE_ELSEWHERE, WAIT_S
from farm.run import JobView
from tests.unit.dispatch_bench import Bench, entry, view

HOUR = 3600.0


def said(bench: Bench, job: str = "job", **changes: object) -> None:
    """Let the ledger say something else of a job, and the dispatch read it."""
    bench.take_up(replace(bench.views[job], **changes))


def test_pause_ends_leases_at_once_and_resume_goes_on_where_it_was():
    bench = Bench(entry())
    bench.meet("a")
    lease = bench.need("a")
    said(bench, state="paused")
    assert bench.dropped == [("a", lease.token)]
    assert (bench.state(), bench.ask("a"), bench.dispatch.unfinished()) == ("paused", None, ())
    assert bench.dispatch.jobs() == ("job",)
    bench.give_back("a", lease, "cancelled")
    said(bench, state="open")
    assert bench.need("a").shard == 0


def test_a_receipt_that_arrives_after_a_pause_counts():
    bench = Bench(entry(images=4))
    bench.meet("a")
    lease = bench.need("a")
    bench.answers_checks = False
    said(bench, state="paused")
    bench.complete("a", lease)
    said(bench, state="open")
    assert bench.dispatch.progress("job").done == 4
    assert bench.need("a").task == "finalise"


def test_a_deleted_job_is_forgotten_and_one_of_its_name_begins_anew():
    bench = Bench(entry())
    bench.meet("a")
    lease = bench.need("a")
    bench.take_up(JobView("job", state="deleted"))
    assert bench.dropped == [("a", lease.token)]
    assert (bench.state(), bench.dispatch.jobs()) == ("deleted", ())
    bench.complete("a", lease)
    bench.take_up(entry(run="other-run", images=4))
    assert bench.need("a").run == "other-run"
    assert bench.dispatch.progress("job").images == 4


def test_a_changed_priority_moves_a_waiting_job_ahead():
    bench = Bench(entry("old"), entry("new", created_at="2026-05-01"))
    bench.meet("a")
    assert bench.need("a").job == "old"
    said(bench, "new", priority=80)
    assert bench.need("a").job == "new"


def test_the_next_pass_opens_only_when_the_ledger_was_read_after_the_last():
    bench = Bench(entry(images=4, done=np.ones(1)))
    bench.meet("a")
    last = bench.need("a")
    bench.views["job"] = view(entry(pass_number=2, images=2, shard_images=4))
    bench.dispatch.complete(Completion(last, "a", 4, 0), now=bench.now)
    assert bench.state() == "finalising"
    bench.perform()
    progress = bench.dispatch.progress("job")
    assert (progress.state, progress.pass_number) == ("waiting", 2)
    assert bench.need("a").images == 2


def test_a_pilot_that_is_done_waits_for_approval():
    bench = Bench(view(entry(images=4, done=np.ones(1)), awaits_approval=False))
    bench.meet("a")
    last = bench.need("a")
    bench.views["job"] = JobView("job", awaits_approval=True)
    bench.dispatch.complete(Completion(last, "a", 4, 0), now=bench.now)
    bench.perform()
    assert bench.state() == "pilot"
    assert (bench.dispatch.unfinished(), bench.dispatch.jobs()) == ((), ("job",))
    bench.take_up(entry(pass_number=2, images=6, shard_images=4))
    assert bench.need("a").pass_number == 2


def test_a_job_that_was_done_before_is_known_as_done():
    bench = Bench(JobView("job"))
    assert (bench.state(), bench.dispatch.jobs()) == ("done", ())


def test_at_finish_by_no_lease_is_given_and_what_has_not_begun_is_asked_back():
    bench = Bench(view(entry(), finish_by=1_000_010.0))
    bench.meet("a")
    first, second = bench.need("a"), bench.need("a")
    bench.beat("a", Report(first.token, "denoise", 1, 0.2), Report(second.token, "waiting", 0, 0.0))
    bench.tick()
    assert bench.revoked == []
    bench.now = 11.0
    bench.tick()
    assert bench.revoked == [("a", second.token)]
    bench.give_back("a", second, "revoked")
    assert bench.ask("a") is None
    bench.complete("a", first)
    progress = bench.dispatch.progress("job")
    assert (progress.state, progress.message, progress.done) == ("stopped", "its finish_by has passed", 4)
    assert bench.dispatch.unfinished() == ()
    said(bench, finish_by=2_000_000.0)
    assert bench.need("a").shard == 1


def test_a_wall_clock_that_jumps_ahead_and_back_stops_a_job_and_lets_it_go_on():
    bench = Bench(view(entry(), finish_by=1_000_100.0))
    bench.meet("a")
    bench.wall += 1e6
    bench.tick()
    assert (bench.ask("a"), bench.state()) == (None, "stopped")
    bench.wall -= 1e6
    bench.tick()
    assert bench.need("a").shard == 0


def test_a_budget_of_images_is_never_passed_not_even_by_twins_or_lost_leases():
    bench = Bench(view(entry(images=20), max_images=9, images_before=0))
    for name in "abc":
        bench.meet(name)
    first, second = bench.need("a"), bench.need("b")
    assert bench.ask("c") is None
    bench.lose("b")
    again = bench.need("c")
    assert (again.shard, bench.ask("c")) == (second.shard, None)
    bench.complete("a", first)
    bench.complete("c", again)
    progress = bench.dispatch.progress("job")
    assert (progress.state, progress.done) == ("stopped", 8)
    assert progress.message == "8 of the 9 images of its budget are rendered, and the next shard has 4"
    said(bench, max_images=20)
    assert bench.need("a").shard == 2


def test_a_budget_of_gpu_time_counts_what_was_measured_and_what_is_in_hand():
    bench = Bench(view(entry(images=40), max_gpu_s=100.0, gpu_s_before=30.0))
    for name in "abc":
        bench.meet(name)
    first = bench.need("a")
    bench.complete("a", first, denoise=20.0, write=500.0)
    second = bench.need("a")
    third = bench.need("b")
    assert bench.ask("c") is None, "50 spent, 20 and 20 in hand, 20 more would be too much"
    bench.complete("a", second, denoise=1.0)
    assert bench.need("a").shard == 3
    bench.complete("b", third, denoise=20.0)
    assert bench.dispatch.stall_code("job") is None


def test_owners_of_equal_priority_get_gpu_time_by_their_shares():
    slow = entry("slow", images=4000)
    fast = entry("fast", images=40000)
    bench = Bench(view(slow, owner="ann"), view(fast, owner="bob"), shares={"bob": 2.0})
    for name in "abc":
        bench.meet(name)
    spent = {"slow": 0.0, "fast": 0.0}
    for _ in range(900):
        lease = bench.need("abc"[_ % 3])
        seconds = 30.0 if lease.job == "slow" else 3.0
        spent[lease.job] += seconds
        bench.complete("abc"[_ % 3], lease, denoise=seconds)
    assert spent["fast"] / spent["slow"] == pytest.approx(2.0, rel=0.05)


def test_a_claim_is_needed_and_its_loss_ends_the_leases():
    bench = Bench(entry(), claims=True)
    bench.meet("a")
    assert (bench.ask("a"), bench.state()) == (None, "waiting")
    bench.dispatch.claimed("job", True, now=0)
    bench.perform()
    lease = bench.need("a")
    bench.dispatch.claimed("job", False, by="the farm on host lab", now=0)
    bench.perform()
    assert bench.dropped == [("a", lease.token)]
    progress = bench.dispatch.progress("job")
    assert (progress.state, progress.message) == ("elsewhere", "rendered by another farm, the farm on host lab")
    bench.take_up(entry(done=np.array([True, True, False])))
    assert bench.dispatch.progress("job").done == 8
    bench.dispatch.claimed("job", True, now=0)
    bench.perform()
    assert bench.need("a").shard == 2


def test_leases_are_kept_over_a_restart_while_the_claim_is_still_being_asked_for():
    first = Bench(entry())
    first.meet("a")
    held = first.need("a")
    bench = Bench(entry(), epoch="e2", claims=True)
    assert bench.meet("a", held) == ()
    other = Bench(epoch="e3", claims=True)
    assert other.meet("a", held) == ()
    other.take_up(entry())
    other.dispatch.claimed("job", True, now=0)
    other.perform()
    other.meet("b")
    assert other.need("b").shard == 1
    assert other.dropped == []


def test_a_shard_that_came_back_waits_until_it_is_known_to_have_no_receipt():
    bench = Bench(entry(images=8))
    bench.answers_checks = False
    bench.meet("a")
    bench.meet("b")
    lost = bench.need("a")
    bench.lose("a")
    assert [check.shard for check in bench.checks] == [lost.shard]
    assert bench.need("b").shard == 1
    assert bench.ask("b") is None
    bench.dispatch.checked(bench.checks[0], Completion(lost, "a", 3, 1, {"denoise": 5.0}), now=0)
    progress = bench.dispatch.progress("job")
    assert (progress.done, progress.failed) == (4, 1)


def run_slowly(bench: Bench, renderer: str, lease: Lease, *, seconds: int, fraction: float) -> None:
    """Let a renderer report slow progress, second by second."""
    for second in range(seconds):
        bench.now += 1.0
        bench.report(renderer, lease, ticks=second, fraction=fraction * (second + 1) / seconds)
        bench.beat("b")
        bench.tick()


def test_an_idle_renderer_gets_a_twin_of_a_slow_shard_and_the_first_receipt_ends_the_other():
    bench = Bench(entry(images=8))
    bench.meet("a")
    bench.meet("b")
    quick = bench.need("b")
    bench.complete("b", quick, denoise=4.0)
    slow = bench.need("a", model="sketch")
    run_slowly(bench, "a", slow, seconds=20, fraction=0.1)
    twin = bench.need("b", model="sketch")
    assert (twin.shard, twin.twin, twin.attempt) == (slow.shard, True, 2)
    assert bench.ask("b") is None, "one twin a shard"
    bench.complete("b", twin, denoise=4.0)
    assert bench.dropped == [("a", slow.token)]
    assert bench.dispatch.progress("job").done == 8


def test_no_twin_where_the_slow_one_is_nearly_done_or_gpu_time_is_limited():
    bench = Bench(entry(images=8))
    bench.meet("a")
    bench.meet("b")
    bench.complete("b", bench.need("b"), denoise=4.0)
    slow = bench.need("a")
    run_slowly(bench, "a", slow, seconds=20, fraction=0.9)
    assert bench.ask("b", model="sketch") is None
    said(bench, max_gpu_s=HOUR)
    run_slowly(bench, "a", slow, seconds=20, fraction=0.1)
    assert bench.ask("b", model="sketch") is None


def test_a_lease_without_progress_gets_a_twin_and_a_lost_primary_leaves_the_shard_to_it():
    bench = Bench(entry(images=8))
    bench.meet("a")
    bench.meet("b")
    bench.complete("b", bench.need("b"), denoise=4.0)
    stuck = bench.need("a")
    for _ in range(40):
        bench.now += 1.0
        bench.report("a", stuck, ticks=1, fraction=0.5)
        bench.beat("b")
        bench.tick()
    twin = bench.need("b", model="sketch")
    assert twin.twin
    bench.lose("a")
    assert bench.checks == []
    bench.complete("b", twin)
    assert bench.dispatch.progress("job").done == 8


def test_what_has_not_begun_is_asked_back_for_an_idle_renderer():
    bench = Bench(entry(images=8, seconds_per_image=2.0))
    bench.meet("a")
    bench.meet("b")
    busy, next_one = bench.need("a"), bench.need("a")
    bench.ask("b", model="sketch")
    for second in range(10):
        bench.now += 1.0
        bench.beat(
            "a",
            Report(busy.token, "denoise", second, 0.02 * (second + 1)),
            Report(next_one.token, "waiting", 0, 0.0),
        )
        bench.beat("b")
        bench.tick()
    assert bench.revoked[0] == ("a", next_one.token)
    bench.give_back("a", next_one, "revoked")
    assert bench.checks == []
    assert bench.need("b").shard == next_one.shard


def test_done_jobs_are_forgotten_in_the_end_and_waiting_ones_never():
    bench = Bench(JobView("pilot", awaits_approval=True), view(entry("paused"), state="paused"))
    for number in range(600):
        bench.take_up(JobView(f"job-{number}"))
    assert bench.dispatch.progress("job-0") is None
    assert bench.state("job-599") == "done"
    assert (bench.state("pilot"), bench.state("paused")) == ("pilot", "paused")


def test_one_renderer_that_fails_again_and_again_leaves_the_run_to_the_others():
    bench = Bench(entry(images=400))
    bench.meet("good")
    bench.meet("bad")
    good = bench.need("good")
    for _ in range(ERRORS_BEFORE_ELSEWHERE):
        bench.give_back("bad", bench.need("bad"), "device_lost")
        bench.now += WAIT_S[-1]
        bench.report("good", good, ticks=int(bench.now))
    assert bench.ask("bad") is None
    assert (bench.state(), bench.dispatch.stall_code("job")) == ("running", None)
    bench.now += ELSEWHERE_S
    assert bench.ask("bad") is not None, "what it had may have passed"


def test_what_refused_renderers_stalled_is_tried_by_one_that_comes_later():
    bench = Bench(entry())
    bench.meet("old-card")
    bench.give_back("old-card", bench.need("old-card"), "numerics")
    assert bench.dispatch.stall_code("job") == "numerics"
    bench.meet("new-card")
    assert bench.dispatch.stall_code("job") is None
    assert bench.need("new-card").shard == 0


def test_a_stalled_run_does_not_stop_the_jobs_other_run():
    bench = Bench(view(entry(), entry(run="second-run", created_at="2026-02-01T00:00:00Z", model="flux")))
    bench.meet("a")
    bench.give_back("a", bench.need("a", model="sketch"), "record")
    assert bench.dispatch.stall_code("job") is None
    assert bench.need("a").run == "second-run"
    assert bench.dispatch.unfinished() == ("job",)


def test_finalising_goes_before_everything_and_asks_for_no_model():
    bench = Bench(entry("first", images=4, model="flux"), view(entry("second", images=400), priority=90))
    bench.meet("a")
    bench.complete("a", bench.need("a", model="sketch"))
    done = Completion(Lease("late", "render", "first", "first-run", 1, 0, 4, 1), "zombie", 4, 0)
    bench.dispatch.complete(done, now=0)
    assert bench.need("a", model="sketch").task == "finalise"
    assert bench.need("a", model="sketch").job == "second"


def test_receipts_that_a_budget_knows_of_already_are_not_counted_again():
    bench = Bench(view(entry(images=40), max_images=40))
    bench.meet("a")
    done = np.zeros(10, dtype=bool)
    done[:9] = True
    bench.take_up(view(entry(images=40, done=done), max_images=40, images_before=36))
    assert bench.need("a").shard == 9


def test_a_budget_of_gpu_time_waits_for_the_first_shard_before_it_gives_out_more():
    bench = Bench(view(entry(images=400), max_gpu_s=1000.0))
    for name in "abc":
        bench.meet(name)
    first = bench.need("a")
    assert (bench.ask("b"), bench.state()) == (None, "running")
    bench.complete("a", first, denoise=300.0)
    assert [bench.need(name).shard for name in "ab"] == [1, 2]
    assert bench.ask("c") is None


def test_after_a_restart_a_lease_of_a_job_that_was_deleted_meanwhile_is_dropped():
    first = Bench(entry())
    first.meet("a")
    held = first.need("a")
    bench = Bench(epoch="e2")
    bench.views["job"] = JobView("job", state="deleted")
    assert bench.meet("a", held) == ()
    assert bench.dropped == [("a", held.token)]


def test_after_a_restart_a_twin_that_reports_first_does_not_cost_the_original_its_work():
    own = Lease("e1-1", "render", "job", "job-run", 1, 0, 4, 1)
    bench = Bench(entry(), epoch="e2")
    assert bench.meet("b", replace(own, token="e1-2", twin=True, attempt=2)) == ()
    assert bench.meet("a", own) == ()
    assert bench.meet("c", replace(own, token="e1-3")) == ("e1-3",)


def test_after_standing_still_a_dispatcher_notices_silence_in_its_usual_time():
    bench = Bench(entry())
    bench.meet("a")
    bench.tick()
    bench.now += 600.0
    bench.tick()
    bench.wait(LEASE_S + 2)
    assert bench.ended == [("a", "silent")]


def test_a_shard_that_ends_renderers_with_nothing_in_hand_is_drawn_with_caution_and_stalls_in_the_end():
    bench = Bench(entry(images=4))
    leases = []
    for _ in range(6):
        bench.meet("a")
        leases.append(bench.need("a"))
        bench.report("a", leases[-1], stage="write")
        bench.now += 60.0
        bench.lose("a")
    assert [lease.cautious for lease in leases] == [False] * 3 + [True] * 3
    assert bench.dispatch.stall_code("job") == "renderer_died"
    assert (
        "shard 0 ended 6 renderers with no image in hand, the last in stage write"
        in bench.dispatch.progress("job").message
    )


@pytest.mark.parametrize("in_hand", [(), (0,)])
def test_deaths_with_an_urgent_image_in_a_leases_place_are_blamed_on_nobody(in_hand):
    bench = Bench(entry(images=1))
    for _ in range(8):
        bench.meet("a")
        lease = bench.need("a")
        assert (lease.alone, lease.skip, lease.cautious) == (frozenset(), frozenset(), False)
        bench.report("a", lease, in_hand=in_hand, stage="denoise" if in_hand else "encode", aside=True)
        bench.now += 60.0
        bench.lose("a")
    assert bench.dispatch.stall_code("job") is None


def test_a_death_with_an_urgent_image_on_the_device_is_not_blamed_on_the_renderers_other_lease():
    bench = Bench(entry(images=8))
    bench.meet("a")
    for _ in range(8):
        writing, drawing = bench.need("a"), bench.need("a")
        bench.beat(
            "a", Report(writing.token, "write", 9, 0.9), Report(drawing.token, "denoise", 1, 0.1, (4, 5, 6, 7), True)
        )
        bench.now += 60.0
        bench.lose("a")
        bench.meet("a")
    assert bench.dispatch.stall_code("job") is None


def test_an_image_that_ends_its_renderers_is_found_though_urgent_images_come_all_the_time():
    bench = Bench(entry(images=1))
    for _ in range(20):
        bench.meet("a")
        lease = bench.need("a")
        if lease.skip:
            break
        bench.report("a", lease, ticks=1, in_hand=(0,), aside=True)
        bench.report("a", lease, ticks=2, in_hand=(0,))
        bench.now += 60.0
        bench.lose("a")
    assert lease.skip == {0}


def test_urgent_images_in_a_shards_place_are_not_charged_to_its_job():
    bench = Bench(view(entry(images=12), max_gpu_s=500.0))
    bench.meet("a")
    lease = bench.need("a")
    for second in range(101):
        bench.now += 1.0
        # Urgent images have 4 of 5 seconds, and are counted when they are done.
        bench.report("a", lease, ticks=second, in_hand=(0, 1, 2, 3), aside_s=second // 10 * 8.0)
    job = bench.dispatch.board.jobs["job"]
    assert job.gpu_s == pytest.approx(20.0)
    bench.complete("a", lease, denoise=19.0)
    assert job.gpu_s == pytest.approx(19.0)


def test_a_machine_that_takes_many_renderers_with_it_stalls_no_job():
    bench = Bench(entry(images=400))
    names = [f"r{number}" for number in range(8)]
    for name in names:
        bench.meet(name)
        bench.report(name, bench.need(name), stage="load")
    for name in names:
        bench.lose(name)
    assert bench.dispatch.stall_code("job") is None


def test_the_oldest_run_of_an_owner_is_not_kept_waiting_for_ever_by_newer_ones_with_the_loaded_model():
    bench = Bench(entry("old", images=400), entry("new", images=40000, model="flux", created_at="2026-05-01"))
    bench.meet("a")
    jobs = []
    for _ in range(40):
        lease = bench.need("a", model="flux" if "old" not in jobs else "sketch")
        jobs.append(lease.job)
        bench.complete("a", lease, denoise=10.0)
    assert jobs[0] == "new"
    assert "old" in jobs
    assert set(jobs[jobs.index("old") :]) == {"old"}


def test_what_waits_behind_a_hung_shard_goes_to_an_idle_renderer_and_not_back():
    bench = Bench(entry(images=8, seconds_per_image=2.0))
    bench.meet("a")
    bench.meet("b")
    hung, behind = bench.need("a"), bench.need("a")
    for _ in range(40):
        bench.now += 1.0
        bench.beat("a", Report(hung.token, "denoise", 1, 0.0), Report(behind.token, "waiting", 0, 0.0))
        bench.beat("b")
        bench.tick()
    assert bench.revoked[0] == ("a", behind.token)
    assert bench.ask("b", model="sketch") is None, "it is for what was asked back"
    bench.give_back("a", behind, "revoked")
    assert bench.ask("a", model="sketch") is None
    assert bench.need("b", model="sketch").shard == behind.shard


def test_what_waits_behind_a_shard_that_was_dropped_and_hangs_on_is_asked_back():
    bench = Bench(entry(images=8, seconds_per_image=2.0))
    bench.meet("a")
    bench.meet("b")
    hung = bench.need("a", model="sketch")
    bench.report("a", hung)
    bench.dispatch.complete(Completion(replace(hung, token="twin"), "b", 4, 0, {"denoise": 8.0}), now=0)
    bench.perform()
    assert bench.dropped == [("a", hung.token)]
    behind = bench.need("a", model="sketch")
    for _ in range(40):
        bench.now += 1.0
        bench.beat("a", Report(behind.token, "waiting", 0, 0.0))
        bench.beat("b")
        bench.tick()
    assert bench.revoked[0] == ("a", behind.token)


def test_what_is_said_stops_a_job_before_it_is_read_again():
    bench = Bench(entry())
    bench.meet("a")
    lease = bench.need("a")
    bench.dispatch.said("job", "cancelled", now=0)
    bench.perform()
    assert bench.dropped == [("a", lease.token)]
    assert (bench.ask("a"), bench.state()) == (None, "cancelled")
    bench.dispatch.said("nobody", "cancelled", now=0)


def test_a_view_that_was_read_before_the_claim_lets_nothing_be_leased():
    bench = Bench(entry(), claims=True)
    bench.meet("a")
    bench.dispatch.claimed("job", True, now=0)
    bench.dispatch.take_up(view(entry()), again_soon=True, now=0)
    assert bench.ask("a") is None
    bench.dispatch.take_up(view(entry(done=np.array([True, False, True]))), now=0)
    assert bench.need("a").shard == 1


def test_a_job_made_anew_under_a_known_name_begins_with_its_own_budget():
    bench = Bench(view(entry(images=8), max_images=8))
    bench.meet("a")
    for _ in range(2):
        bench.complete("a", bench.need("a"))
    bench.take_up(view(entry(run="other-run", images=8), max_images=8))
    assert bench.need("a").run == "other-run"


def test_a_lease_that_waits_behind_one_that_gets_on_is_not_stuck():
    bench = Bench(entry(images=8))
    bench.meet("a")
    busy, behind = bench.need("a"), bench.need("a")
    for second in range(0, 8000, 4):
        bench.now = float(second)
        bench.beat("a", Report(busy.token, "denoise", second // 400, 0.1), Report(behind.token, "waiting", 0, 0.0))
        bench.tick()
    assert bench.ended == []


def test_a_dispatcher_whose_ticks_are_always_late_notices_silence_all_the_same():
    bench = Bench(entry())
    bench.meet("a")
    for _ in range(12):
        bench.now += 6.0
        bench.tick()
    assert bench.ended == [("a", "silent")]
