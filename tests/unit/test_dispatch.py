"""The dispatcher's rules on leases, with the clock as an argument."""

import random

import numpy as np
import pytest

from farm.lease import CONFIRM_S, LEASE_S, STAGE_LIMIT_S, STUCK_GRACE_S, Ask, Beat, Lease, Renewal, Reply, Report
from farm.retry import (
    DEATHS_ALONE_BEFORE_SKIP,
    DEATHS_BEFORE_ALONE,
    ERRORS_BEFORE_ELSEWHERE,
    FINALISE_DEATHS_BEFORE_STALL,
    STORE_PATIENCE_S,
    WAIT_S,
)
from farm.run import FINALISE
from tests.unit.dispatch_bench import Bench, entry, view


def test_every_shard_is_leased_once_then_the_pass_is_finalised_once():
    bench = Bench(entry())
    bench.meet("a")
    bench.meet("b")
    leases = [bench.need("a"), bench.need("b"), bench.need("a")]
    assert [(lease.shard, lease.images) for lease in leases] == [(0, 4), (1, 4), (2, 2)]
    assert bench.ask("b") is None
    for lease in leases:
        bench.complete("a", lease)
    last = bench.need("b")
    assert (last.task, last.shard) == ("finalise", FINALISE)
    assert bench.ask("a") is None
    assert bench.dispatch.progress("job").state == "finalising"
    bench.complete("b", last)
    assert bench.dispatch.progress("job").state == "done"
    assert bench.dispatch.unfinished() == ()


def test_a_shard_with_a_receipt_is_never_leased():
    bench = Bench(entry(done=np.array([True, False, True])))
    bench.meet("a")
    assert bench.need("a").shard == 1
    assert bench.ask("a") is None
    assert bench.dispatch.progress("job").done == 6


def test_asking_twice_with_one_sequence_gives_the_same_lease():
    bench = Bench(entry())
    bench.meet("a")
    first = bench.need("a")
    assert bench.ask("a", repeat=True) == first
    assert bench.need("a").shard == 1


def test_a_renderer_that_is_not_known_or_knows_an_older_dispatcher_is_told_to_meet():
    bench = Bench(entry())
    assert bench.dispatch.ask(Ask("a", "i", "e1", 1, None), now=0).meet
    bench.meet("a")
    assert bench.dispatch.ask(Ask("a", "i", "e0", 1, None), now=0).meet
    assert bench.dispatch.ask(Ask("a", "other", "e1", 1, None), now=0).meet


def test_the_leases_of_a_dead_renderer_go_back_at_once():
    bench = Bench(entry())
    bench.meet("a")
    bench.meet("b")
    lost = bench.need("a")
    bench.need("b")
    bench.lose("a")
    again = bench.need("b")
    assert (again.shard, again.attempt) == (lost.shard, 2)


def test_a_silent_renderer_is_given_up_and_its_late_receipt_still_counts():
    bench = Bench(entry(images=4))
    bench.meet("a")
    silent = bench.need("a")
    for _ in range(int(LEASE_S) + 1):
        bench.now += 1.0
        assert bench.tick() == [] or bench.now > LEASE_S
    bench.meet("b")
    twin = bench.need("b")
    assert twin.shard == silent.shard
    bench.complete("a", silent)
    assert bench.dropped == [("b", twin.token)]
    assert bench.dispatch.progress("job").done == 4
    bench.complete("b", twin)
    assert bench.dispatch.progress("job").done == 4


def test_a_silent_renderer_is_named_once_and_its_silence_blames_no_image():
    bench = Bench(entry())
    for _ in range(10):
        bench.meet("a")
        bench.report("a", bench.need("a"), in_hand=(0, 1, 2, 3))
        given_up = []
        for _ in range(int(LEASE_S) + 2):
            bench.now += 1.0
            given_up += bench.tick()
        assert given_up == [("a", "silent")]
    bench.meet("a")
    assert bench.need("a").alone == frozenset()


def test_a_dispatcher_that_stood_still_takes_nobody_for_silent():
    bench = Bench(entry())
    bench.meet("a")
    bench.need("a")
    bench.tick()
    bench.now += 10 * LEASE_S
    assert bench.tick() == []


def test_a_lease_that_is_reported_without_progress_is_stuck_and_its_batch_is_blamed():
    bench = Bench(entry(images=4))
    for hang in range(DEATHS_BEFORE_ALONE):
        bench.meet("a")
        lease = bench.need("a")
        assert (lease.attempt, lease.alone) == (hang + 1, frozenset())
        given_up: list[tuple[str, str]] = []
        started = bench.now
        while not given_up and bench.now < started + 5000:
            bench.now += 4
            bench.report("a", lease, ticks=7, in_hand=(0, 1, 2, 3))
            given_up = bench.tick()
        assert given_up == [("a", "stuck")]
        assert bench.now - started == pytest.approx(634, abs=10)
    bench.meet("a")
    assert bench.need("a").alone == {0, 1, 2, 3}


def test_a_lease_that_its_renderer_never_heard_of_goes_back():
    bench = Bench(entry(images=4))
    bench.meet("a")
    unheard = bench.need("a")
    bench.now += CONFIRM_S + 1
    assert bench.beat("a") == Renewal("e1")
    assert bench.need("a").shard == unheard.shard


def test_a_question_that_comes_late_is_not_granted_a_lease_that_nobody_awaits():
    bench = Bench(entry())
    bench.meet("a")
    lease = bench.need("a")
    late = Ask("a", "i", "e1", bench.sequence["a"] - 1, None)
    assert bench.dispatch.ask(late, now=0).lease is None
    bench.complete("a", lease)
    assert bench.need("a").shard == 1


def test_writing_a_dataset_that_ends_its_renderers_stalls_the_job():
    bench = Bench(entry(done=np.ones(3, dtype=bool)))
    for _ in range(FINALISE_DEATHS_BEFORE_STALL):
        bench.meet("a")
        assert bench.need("a").task == "finalise"
        bench.lose("a")
    assert bench.dispatch.stall_code("job") == "renderer_died"
    assert "writing the dataset" in bench.dispatch.progress("job").message


def test_a_restarted_dispatcher_takes_over_the_leases_that_renderers_hold():
    bench = Bench(entry())
    bench.meet("a")
    held = bench.need("a")
    restarted = Bench(entry(), epoch="e2")
    before = Report(held.token, "denoise", 9, 0.5)
    assert restarted.beat("a", before, epoch="e1") == Renewal("e2", meet=True)
    assert restarted.meet("a", held) == ()
    restarted.meet("b")
    assert restarted.need("b").shard == 1
    assert restarted.report("a", held) == ()
    restarted.complete("a", held)
    assert restarted.dispatch.progress("job").done == 4


def test_two_renderers_that_hold_one_shard_after_a_restart_keep_one_lease():
    first = Bench(entry())
    first.meet("a")
    held = first.need("a")
    restarted = Bench(entry(), epoch="e2")
    restarted.meet("b")
    assert restarted.need("b").shard == held.shard
    assert restarted.meet("a", held) == (held.token,)


def test_before_the_greeting_is_over_a_renderer_can_meet_but_gets_no_new_lease():
    bench = Bench(entry())
    question = Ask("a", "i", "e1", 1, None)
    assert bench.dispatch.ask(question, now=0, grants=False).meet
    bench.meet("a")
    assert bench.dispatch.ask(question, now=0, grants=False).lease is None
    assert bench.dispatch.ask(question, now=1).lease is not None


def test_a_lease_of_an_earlier_pass_or_of_a_done_shard_is_not_taken_over():
    first = Bench(entry())
    first.meet("a")
    held = [first.need("a"), first.need("a")]
    second = Bench(entry(pass_number=2, images=4, done=np.zeros(1, dtype=bool)), epoch="e2")
    assert second.meet("a", *held) == tuple(lease.token for lease in held)
    assert second.dispatch.progress("job").done == 0
    later = Bench(entry(done=np.array([True, False, False])), epoch="e3")
    assert later.meet("a", *held) == (held[0].token,)


def test_a_later_pass_replaces_an_earlier_one_and_never_the_other_way_round():
    bench = Bench(entry())
    bench.take_up(entry(pass_number=2, images=4, done=np.zeros(1, dtype=bool)))
    bench.take_up(entry(), again=True)
    assert bench.dispatch.progress("job").pass_number == 2


def test_a_job_that_waits_for_another_says_so():
    bench = Bench(entry("first"), entry("second", created_at="2026-02-01"))
    bench.meet("a")
    bench.need("a")
    waiting = bench.dispatch.progress("second")
    assert (waiting.state, waiting.message) == ("waiting", "waits behind first")
    assert (waiting.renderers_busy, waiting.renderers) == (1, 1)


def test_a_batch_that_ends_its_renderer_again_and_again_is_narrowed_to_one_image():
    """Image 2 kills every renderer; the others of its shard must survive it."""
    bench = Bench(entry(images=4))
    deaths = 0
    while deaths < 50:
        bench.meet("a")
        lease = bench.need("a")
        alone = [i for i in range(4) if i in lease.alone and i not in lease.skip]
        batch = tuple(i for i in range(4) if i not in lease.alone and i not in lease.skip)
        hands = ([batch] if batch else []) + [(i,) for i in alone]
        for number, hand in enumerate(hands):
            bench.report("a", lease, ticks=number + 1, in_hand=hand)
            if 2 in hand:
                bench.lose("a")
                deaths += 1
                break
        else:
            break
    assert lease.skip == {2}
    assert lease.alone == {0, 1, 2, 3}
    assert deaths == DEATHS_BEFORE_ALONE + DEATHS_ALONE_BEFORE_SKIP


def test_renderers_that_die_before_any_batch_stall_the_job_with_the_reason():
    bench = Bench(entry())
    for _ in range(4):
        bench.meet("a")
        lease = bench.need("a")
        bench.report("a", lease, stage="load")
        bench.now += 11.0
        bench.lose("a")
    assert bench.dispatch.stall_code("job") == "renderer_died"
    assert "without finishing a batch of sketch" in bench.dispatch.progress("job").message
    bench.take_up(entry(), again=True)
    assert bench.dispatch.stall_code("job") is None


def test_a_store_that_is_away_is_tried_again_with_pauses_and_stalls_when_patience_ends():
    bench = Bench(entry())
    bench.meet("a")
    bench.give_back("a", bench.need("a"), "store_unavailable")
    assert bench.ask("a") is None
    assert bench.dispatch.progress("job").message == "why: store_unavailable"
    bench.now += 1.5
    lease = bench.need("a")
    bench.complete("a", lease)
    assert bench.dispatch.progress("job").message is None
    start = bench.now
    while bench.dispatch.stall_code("job") is None:
        bench.now += 31
        bench.give_back("a", bench.need("a"), "store_unavailable")
    assert STORE_PATIENCE_S <= bench.now - start <= STORE_PATIENCE_S + 62


@pytest.mark.parametrize("code", ["store_denied", "store_full", "bucket_missing"])
def test_a_store_error_that_only_a_person_can_mend_stalls_at_once(code):
    bench = Bench(entry())
    bench.meet("a")
    bench.give_back("a", bench.need("a"), code)
    assert bench.dispatch.stall_code("job") == code


def test_a_renderer_that_cannot_run_a_plan_leaves_it_to_the_others():
    bench = Bench(entry())
    bench.meet("a")
    bench.meet("b")
    bench.give_back("a", bench.need("a"), "numerics")
    assert bench.ask("a") is None
    lease = bench.need("b")
    assert bench.dispatch.stall_code("job") is None
    bench.give_back("b", lease, "numerics")
    assert bench.dispatch.stall_code("job") == "numerics"
    bench.take_up(entry(), again=True)
    assert bench.need("a").shard == 0


def test_a_job_that_only_a_dead_renderer_could_do_stalls_with_what_the_others_said():
    bench = Bench(entry())
    bench.meet("a")
    bench.meet("b")
    bench.give_back("a", bench.need("a"), "model_card")
    assert bench.dispatch.stall_code("job") is None
    bench.lose("b")
    assert bench.dispatch.stall_code("job") == "model_card"


def test_unexplained_errors_are_tried_again_a_few_times():
    bench = Bench(entry(images=4))
    bench.meet("a")
    for attempt in range(1, ERRORS_BEFORE_ELSEWHERE + 1):
        lease = bench.need("a")
        assert lease.attempt == attempt
        bench.give_back("a", lease, "internal")
        assert bench.ask("a") is None, "it rests"
        bench.now += WAIT_S[-1]
    assert bench.ask("a") is None
    assert bench.dispatch.stall_code("job") == "internal"


def test_speed_and_time_left_count_the_steps_of_shards_in_hand():
    bench = Bench(entry(images=100, shard_images=50))
    bench.meet("a")
    lease = bench.need("a")
    for second in range(11):
        bench.now = float(second)
        bench.beat("a", Report(lease.token, "denoise", second, second / 50))
        bench.tick()
    progress = bench.dispatch.progress("job")
    assert progress.fraction == pytest.approx(0.10)
    assert progress.images_per_s == pytest.approx(1.0)
    assert progress.eta_s == pytest.approx(90.0)
    assert (progress.renderers, progress.renderers_busy) == (1, 1)


@pytest.mark.parametrize("seed", range(200))
def test_whatever_fails_each_shard_is_done_once_and_no_two_live_leases_share_one(seed):
    """Renderers die, go silent, complete twice or unheard, give back; the dispatcher restarts.

    Receipts are the only truth, and a shard whose receipt the dispatcher has heard of is never leased again.
    """
    rng = random.Random(seed)
    shards = rng.randint(1, 12)
    receipts: set[int] = set()
    known: set[int] = set()
    finalised = False

    def rebuilt(epoch: str) -> Bench:
        known.update(receipts)
        done = np.array([s in receipts for s in range(shards)])
        return Bench(entry(images=shards * 4, done=done), epoch=epoch)

    bench = rebuilt("e0")
    held: dict[str, list[Lease]] = {name: [] for name in "abc"}
    for name in held:
        bench.meet(name)
    strangers: set[str] = set()
    for step in range(6000):
        bench.now += rng.choice([0.1, 1.0, 5.0])
        name = rng.choice("abc")
        deed = rng.random()
        if deed < 0.35 and len(held[name]) < 2 and name not in strangers:
            lease = bench.ask(name)
            if lease:
                assert lease.shard not in known
                held[name].append(lease)
        elif deed < 0.6 and held[name]:
            lease = held[name].pop()
            if lease.task == "finalise":
                assert len(receipts) == shards
                finalised = True
            else:
                receipts.add(lease.shard)
            if rng.random() < 0.8:
                known.update({lease.shard} - {FINALISE})
                for _ in range(rng.choice([1, 2])):
                    bench.complete(name, lease)
        elif deed < 0.7 and held[name]:
            bench.give_back(name, held[name].pop(), "cancelled")
        elif deed < 0.75:
            held[name].clear()
            bench.lose(name)
            bench.meet(name)
        elif deed < 0.77:
            bench = rebuilt(f"e{step}")
            strangers |= set(held)
        elif deed < 0.9:
            epoch = f"old-{step}" if name in strangers else None
            renewal = bench.beat(name, *(Report(one.token, "denoise", step, 0.1) for one in held[name]), epoch=epoch)
            gone = renewal.gone
            if renewal.meet:
                strangers.discard(name)
                gone = bench.meet(name, *held[name])
            held[name] = [lease for lease in held[name] if lease.token not in gone]
        else:
            for _ in range(rng.choice([1, 1, 1, 40])):
                bench.tick()
                bench.now += 1.0
        alive = [h.lease for h in bench.dispatch._board.held.values() if h.lease.task == "render"]
        own = [lease.shard for lease in alive if not lease.twin]
        assert len(own) == len(set(own))
        assert len(alive) <= 2 * len({lease.shard for lease in alive})
        if finalised and bench.dispatch.progress("job").state == "done":
            break
    assert receipts == set(range(shards))
    assert finalised


def test_a_question_that_was_answered_before_is_told_so_and_not_left_waiting():
    bench = Bench(entry(images=8))
    bench.meet("a")
    unheard = bench.need("a")
    bench.now += CONFIRM_S + 1
    bench.beat("a")
    question = Ask("a", "i", "e1", bench.sequence["a"], None)
    assert bench.dispatch.ask(question, now=bench.now).late
    assert bench.need("a").shard == unheard.shard


def test_a_process_that_gave_its_name_to_another_is_told_to_drop_all_and_what_it_completes_counts():
    bench = Bench(entry(images=12))
    bench.meet("a", incarnation="earlier")
    question = Ask("a", "earlier", "e1", 1, None)
    zombie = bench.dispatch.ask(question, now=0).lease
    assert zombie is not None
    bench.meet("a")
    lease = bench.need("a")
    assert bench.meet("a", zombie, incarnation="earlier") == (zombie.token,)
    reports = (Report(zombie.token, "denoise", 3, 0.5, (0, 1)),)
    assert bench.dispatch.renew(Beat("a", "earlier", "e1", reports), now=0) == Renewal(
        "e1", (zombie.token,), replaced=True
    )
    assert bench.dispatch.ask(Ask("a", "earlier", "e1", 2, None), now=0) == Reply("e1", replaced=True)
    assert bench.report("a", lease) == (), "the newer one keeps what it has"
    bench.complete("a", zombie)
    assert bench.dispatch.progress("job").done == 4


def test_a_process_that_was_born_later_takes_the_name_and_what_the_other_held_without_blame():
    bench = Bench(entry(images=4))
    bench.meet("a", incarnation="earlier")
    lease = bench.dispatch.ask(Ask("a", "earlier", "e1", 1, None), now=0).lease
    assert lease is not None
    for _ in range(5):
        bench.dispatch.renew(Beat("a", "earlier", "e1", (Report(lease.token, "denoise", 1, 0.1, (0, 1)),)), now=0)
    bench.meet("a")
    assert (bench.need("a").shard, bench.dispatch._board.runs["job-run"].blame) == (0, {})


def test_a_silent_process_that_comes_back_is_let_in_when_nobody_took_its_name():
    bench = Bench(entry(images=4))
    bench.meet("a")
    lease = bench.need("a")
    bench.wait(LEASE_S + 2)
    assert bench.ended == [("a", "silent")]
    assert bench.meet("a", lease) == ()
    bench.complete("a", lease)
    assert bench.dispatch.progress("job").done == 4


def test_no_twin_begins_after_finish_by():
    bench = Bench(view(entry(images=8), finish_by=1_000_045.0))
    bench.meet("a")
    bench.meet("b")
    bench.complete("b", bench.need("b"), denoise=4.0)
    slow = bench.need("a")
    for second in range(44):
        bench.now += 1.0
        bench.report("a", slow, ticks=second, fraction=0.001 * second)
        bench.beat("b")
        bench.tick()
    bench.now = 46.0
    assert bench.ask("b", model="sketch") is None


def test_a_renderer_that_lives_holds_nothing_and_asks_for_nothing_is_stuck():
    bench = Bench(entry())
    bench.meet("a")
    lease = bench.need("a")
    bench.report("a", lease, stage="load")
    bench.take_up(view(entry(), state="paused"))
    started = bench.now
    while not bench.ended and bench.now < started + 4000:
        bench.now += 4.0
        bench.beat("a")
        bench.tick()
    assert bench.ended == [("a", "stuck")]
    assert bench.now - started == pytest.approx(STAGE_LIMIT_S["load"] + STUCK_GRACE_S, abs=10)
