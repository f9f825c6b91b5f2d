"""The dispatcher's rules, with the clock as an argument."""

import random

import numpy as np
import pytest

from farm.dispatch import Dispatch
from farm.lease import CONFIRM_S, LEASE_S, Ask, Beat, Completion, GiveBack, Hello, Lease, Renewal, Report
from farm.retry import (
    DEATHS_ALONE_BEFORE_SKIP,
    DEATHS_BEFORE_ALONE,
    ERRORS_BEFORE_STALL,
    FINALISE_DEATHS_BEFORE_STALL,
    STORE_PATIENCE_S,
)
from farm.run import FINALISE, RunEntry


def entry(job: str = "job", *, images: int = 10, shard_images: int = 4, **fields: object) -> RunEntry:
    shards = -(-images // shard_images)
    given = {
        "job": job,
        "run": f"{job}-run",
        "model": "sketch",
        "pass_number": 1,
        "images": images,
        "shard_images": shard_images,
        "priority": 50,
        "created_at": "2026-01-01T00:00:00Z",
        "done": np.zeros(shards, dtype=bool),
    }
    return RunEntry(**(given | fields))  # type: ignore[arg-type]


class Bench:
    """A dispatch and the renderers that talk to it."""

    def __init__(self, *entries: RunEntry, epoch: str = "e1"):
        self.dispatch = Dispatch(epoch=epoch)
        for one in entries:
            self.dispatch.add(one)
        self.now = 0.0
        self.sequence: dict[str, int] = {}

    def meet(self, renderer: str, *held: Lease, incarnation: str = "i") -> tuple[str, ...]:
        return self.dispatch.meet(Hello(renderer, incarnation, "cpu", held), now=self.now)

    def ask(self, renderer: str, *, model: str | None = None, repeat: bool = False) -> Lease | None:
        if not repeat:
            self.sequence[renderer] = self.sequence.get(renderer, 0) + 1
        question = Ask(renderer, "i", self.dispatch.epoch, self.sequence[renderer], model)
        return self.dispatch.ask(question, now=self.now).lease

    def need(self, renderer: str) -> Lease:
        lease = self.ask(renderer)
        assert lease is not None
        return lease

    def beat(self, renderer: str, *reports: Report, epoch: str | None = None, whole: bool = True) -> Renewal:
        return self.dispatch.renew(Beat(renderer, "i", epoch or self.dispatch.epoch, reports, whole), now=self.now)

    def report(self, renderer: str, lease: Lease, *, ticks: int = 1, in_hand: tuple[int, ...] = (), stage="denoise"):
        return self.beat(renderer, Report(lease.token, stage, ticks, 0.5, in_hand)).gone

    def complete(self, renderer: str, lease: Lease, *, failed: int = 0) -> tuple[tuple[str, str], ...]:
        done = Completion(lease, renderer, lease.images - failed, failed, {"denoise": 1.0})
        return self.dispatch.complete(done, now=self.now)

    def give_back(self, renderer: str, lease: Lease, code: str) -> None:
        self.dispatch.give_back(GiveBack(lease, renderer, code, f"why: {code}"), now=self.now)


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
    bench.dispatch.lost("a")
    again = bench.need("b")
    assert (again.shard, again.attempt) == (lost.shard, 2)


def test_a_silent_renderer_is_given_up_and_its_late_receipt_still_counts():
    bench = Bench(entry(images=4))
    bench.meet("a")
    silent = bench.need("a")
    for _ in range(int(LEASE_S) + 1):
        bench.now += 1.0
        assert bench.dispatch.tick(now=bench.now) == () or bench.now > LEASE_S
    bench.meet("b")
    twin = bench.need("b")
    assert twin.shard == silent.shard
    assert bench.complete("a", silent) == (("b", twin.token),)
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
            given_up += bench.dispatch.tick(now=bench.now)
        assert given_up == [("a", "silent")]
    bench.meet("a")
    assert bench.need("a").alone == frozenset()


def test_a_dispatcher_that_stood_still_takes_nobody_for_silent():
    bench = Bench(entry())
    bench.meet("a")
    bench.need("a")
    bench.dispatch.tick(now=bench.now)
    bench.now += 10 * LEASE_S
    assert bench.dispatch.tick(now=bench.now) == ()


def test_a_lease_that_is_reported_without_progress_is_stuck_and_its_batch_is_blamed():
    bench = Bench(entry(images=4))
    for hang in range(DEATHS_BEFORE_ALONE):
        bench.meet("a")
        lease = bench.need("a")
        assert (lease.attempt, lease.alone) == (hang + 1, frozenset())
        given_up: tuple[tuple[str, str], ...] = ()
        started = bench.now
        while not given_up and bench.now < started + 5000:
            bench.now += 4
            bench.report("a", lease, ticks=7, in_hand=(0, 1, 2, 3))
            given_up = bench.dispatch.tick(now=bench.now)
        assert given_up == (("a", "stuck"),)
        assert bench.now - started == pytest.approx(604, abs=10)
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
        bench.dispatch.lost("a")
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
    bench.dispatch.add(entry(pass_number=2, images=4, done=np.zeros(1, dtype=bool)))
    bench.dispatch.add(entry())
    assert bench.dispatch.progress("job").pass_number == 2


def test_a_cancelled_job_ends_its_leases_and_resumes_when_added_again():
    bench = Bench(entry())
    bench.meet("a")
    lease = bench.need("a")
    assert bench.dispatch.stop("job", "cancelled") == (("a", lease.token),)
    assert bench.ask("a") is None
    assert bench.dispatch.progress("job").state == "cancelled"
    bench.give_back("a", lease, "cancelled")
    bench.dispatch.add(entry())
    assert bench.need("a").shard == 0


def test_higher_priority_goes_first_then_the_loaded_model_then_age():
    old = entry("old", created_at="2026-01-01", model="sketch")
    other = entry("other", created_at="2026-01-02", model="flux")
    urgent = entry("urgent", created_at="2026-01-03", priority=90, images=4)
    bench = Bench(old, other, urgent)
    bench.meet("a")
    assert bench.ask("a", model="flux").job == "urgent"
    assert bench.ask("a", model="flux").job == "other"
    assert bench.ask("a", model=None).job == "old"


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
                bench.dispatch.lost("a")
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
        bench.dispatch.lost("a")
    assert bench.dispatch.stall_code("job") == "renderer_died"
    assert "without finishing a batch of sketch" in bench.dispatch.progress("job").message
    bench.dispatch.add(entry())
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
    bench.dispatch.add(entry())
    assert bench.need("a").shard == 0


def test_a_job_that_only_a_dead_renderer_could_do_stalls_with_what_the_others_said():
    bench = Bench(entry())
    bench.meet("a")
    bench.meet("b")
    bench.give_back("a", bench.need("a"), "model_card")
    assert bench.dispatch.stall_code("job") is None
    bench.dispatch.lost("b")
    assert bench.dispatch.stall_code("job") == "model_card"


def test_unexplained_errors_are_tried_again_a_few_times():
    bench = Bench(entry(images=4))
    bench.meet("a")
    for attempt in range(1, ERRORS_BEFORE_STALL + 1):
        lease = bench.need("a")
        assert lease.attempt == attempt
        bench.give_back("a", lease, "internal")
    assert bench.ask("a") is None
    assert bench.dispatch.stall_code("job") == "internal"


def test_speed_and_time_left_count_the_steps_of_shards_in_hand():
    bench = Bench(entry(images=100, shard_images=50))
    bench.meet("a")
    lease = bench.need("a")
    for second in range(11):
        bench.now = float(second)
        bench.beat("a", Report(lease.token, "denoise", second, second / 50))
        bench.dispatch.tick(now=bench.now)
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
            bench.dispatch.lost(name)
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
                bench.dispatch.tick(now=bench.now)
                bench.now += 1.0
        alive = [h.lease.shard for h in bench.dispatch._held.values() if h.lease.task == "render"]
        assert len(alive) == len(set(alive))
        if finalised and bench.dispatch.progress("job").state == "done":
            break
    assert receipts == set(range(shards))
    assert finalised
