"""Thousands of simulated farms, and dispatchers broken on purpose, each of which the audit must catch."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from farm.board import Board
from farm.dispatch import Dispatch
from farm.lease import Ask, Beat, Completion, GiveBack, Lease, Renewal, Reply
from farm.queue import FairShare, Queue
from farm.retry import Blame
from farm.run import JobState, RunState
from farm.simulation.audit import Violation
from farm.simulation.book import footprint
from farm.simulation.scenario import Small
from farm.simulation.steady import Steady
from farm.simulation.world import CALM, Faults

SEEDS = 2000
AT_ONCE = 100


@pytest.mark.parametrize("first", range(0, SEEDS, AT_ONCE))
def test_every_rule_holds_in_every_world(first: int):
    failed = {}
    for seed in range(first, first + AT_ONCE):
        try:
            Small(seed).run()
        except Violation as violation:
            failed[seed] = str(violation)
    assert failed == {}, f"replay: python -m farm.simulation --seed {next(iter(failed))} --trace"


@pytest.mark.parametrize("seed", range(6))
def test_owners_with_work_get_their_shares_and_swaps_are_few(seed: int):
    world = Steady(seed)
    world.run()
    assert all(0.95 < part < 1.05 for part in world.shares_got().values())
    assert world.audit.swap_s <= world.most_swap_s


def test_a_seed_tells_the_same_story_whatever_python_hashes_strings_to():
    stories = {
        subprocess.run(
            [sys.executable, "-m", "farm.simulation", "--seed", "108", "--trace"],
            env=os.environ | {"PYTHONHASHSEED": salt},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for salt in ("1", "2")
    }
    assert len(stories) == 1
    assert "leases" in stories.pop()


def test_a_world_without_faults_ends_and_every_image_has_its_row():
    world = Small(1, faults=CALM)
    world.run()
    for job in world.people.jobs:
        current = world.books.job(job.name)
        if current is not None and world.books.finished(current):
            for run in current.runs:
                assert sorted(world.books.rows(run)) == list(range(run.images))


def test_a_store_that_answers_412_to_every_write_of_its_own_loses_nothing():
    for seed in range(20):
        Small(seed, faults=Faults(store_412=1.0)).run()


# Dispatchers broken on purpose


def violations(make: Callable[..., Dispatch], seeds: range, faults: Faults | None) -> Iterator[str]:
    """What the audit finds in world after world."""
    for seed in seeds:
        try:
            Small(seed, make=make, faults=faults).run()
        except Violation as violation:
            yield str(violation)


def assert_caught(
    words: str,
    make: Callable[..., Dispatch] = Dispatch,
    seeds: range = range(400),
    faults: Faults | None = None,
) -> None:
    seen = []
    for found in violations(make, seeds, faults):
        if words in found:
            return
        seen.append(found[:120])
    raise AssertionError(f"nothing with {words!r} was found, but {seen[:5]}")


def test_a_lease_before_the_renderers_have_reported_is_caught():
    class Hasty(Dispatch):
        def ask(self, question: Ask, *, now: float, grants: bool = True) -> Reply:
            return super().ask(question, now=now)

    assert_caught("before its renderers have reported", Hasty)


def test_a_lease_of_a_shard_whose_receipt_is_known_is_caught():
    class Forgetful(Dispatch):
        def complete(self, completion: Completion, *, now: float) -> None:
            lease = completion.lease
            super().give_back(GiveBack(lease, completion.renderer, "cancelled", ""), now=now)

    assert_caught("whose receipt it knows", Forgetful)


def test_a_lease_of_a_shard_that_came_back_unchecked_is_caught(monkeypatch: pytest.MonkeyPatch):
    real = Board._let_go

    def sure(self: Board, *given: object, back: bool, sure: bool) -> None:
        real(self, *given, back=back, sure=True)

    monkeypatch.setattr(Board, "_let_go", sure)
    assert_caught("before it knows whether it has a receipt")


def test_one_shard_leased_to_two_is_caught(monkeypatch: pytest.MonkeyPatch):
    def advance(self: RunState) -> None:
        self.cursor = 0
        while self.cursor < self.done.size and self.done[self.cursor]:
            self.cursor += 1

    monkeypatch.setattr(RunState, "_advance", advance)
    assert_caught(" stand")


def test_a_twin_that_is_not_marked_is_caught(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("farm.dispatch.Lease", lambda **fields: Lease(**(fields | {"twin": False})))
    assert_caught(" stand", seeds=range(1500))


def test_two_renderers_that_keep_one_shard_after_a_restart_are_caught(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("farm.dispatch.may_keep", lambda job, run, lease: lease.shard < 0 or not run.done[lease.shard])
    assert_caught("hold too", seeds=range(1500))


@pytest.mark.parametrize("state", ["paused", "cancelled"])
def test_a_lease_of_a_job_that_somebody_stopped_is_caught(state: str):
    class Deaf(Dispatch):
        def take_up(self, view, *, again: bool = False, now: float) -> None:
            super().take_up(replace(view, state="open") if view.state == state else view, again=again, now=now)

    assert_caught(f"whose job is {state}", Deaf)


def test_a_lease_of_a_job_that_another_farm_has_claimed_is_caught():
    class Grabbing(Dispatch):
        def claimed(self, job: str, held: bool, *, by: str = "", now: float) -> None:
            super().claimed(job, True, now=now)

    assert_caught("whose job it has not claimed", Grabbing)


@pytest.mark.parametrize(
    ("limit", "words"), [("finish_by", "past the job's finish_by"), ("max_images", "images are done")]
)
def test_a_lease_beyond_a_limit_is_caught(monkeypatch: pytest.MonkeyPatch, limit: str, words: str):
    real = JobState.over

    def over(self: JobState, images: int, seconds: float, wall: float) -> str | None:
        view, self.view = self.view, replace(self.view, **{limit: None})
        try:
            return real(self, images, seconds, wall)
        finally:
            self.view = view

    monkeypatch.setattr(JobState, "over", over)
    assert_caught(words, seeds=range(1500))


def test_finalising_while_a_shard_has_no_receipt_is_caught(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(RunState, "rendered", property(lambda self: self.done.count >= self.done.size - 1))
    assert_caught("have no receipt")


def test_an_innocent_image_that_is_skipped_is_caught():
    class Harsh(Dispatch):
        def _lease(self, job, run, shard, *given, **named) -> Lease:
            run.blame.setdefault(shard, Blame()).skip.add(0)
            return super()._lease(job, run, shard, *given, **named)

    assert_caught("failed, and nothing was wrong with it", Harsh)


def test_an_image_without_a_row_is_caught():
    world = Small(1, faults=CALM)
    world.run()
    del world.store.objects[next(key for key in world.store.objects if key[0] == "receipt")]
    with pytest.raises(Violation, match="have no row"):
        world.audit.at_the_end(world.people.jobs, world.farms)


def test_a_renderer_that_gets_nothing_while_work_waits_is_caught():
    class Unfriendly(Dispatch):
        def _grant(self, renderer, now: float) -> Lease | None:
            return None if renderer.name == "a0" else super()._grant(renderer, now)

    assert_caught("asks a for work and gets none", Unfriendly)


def test_a_lease_that_waits_behind_a_hung_one_is_caught(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("farm.dispatch.unstarted", lambda *given, **named: [])
    assert_caught("while another has not begun", faults=Faults(hangs=3))


def test_two_processes_that_push_each_other_out_are_caught():
    class Polite(Dispatch):
        def _is_replaced(self, renderer: str, incarnation: str) -> bool:
            return False

    assert_caught("says hello to", Polite, range(1500))


def test_a_job_that_never_ends_is_caught(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(RunState, "came_back", lambda self, shard: self.unsure.discard(shard))
    monkeypatch.setattr("farm.simulation.audit.IDLE_S", 1e9)
    assert_caught("not all has ended", seeds=range(60))


def test_a_pass_that_is_closed_and_not_read_again_is_caught():
    class Content(Dispatch):
        def effects(self):
            return tuple(effect for effect in super().effects() if type(effect).__name__ != "Read")

    assert_caught("not all has ended", Content, range(20))


def test_memory_that_only_grows_is_caught():
    class Hoarding(Dispatch):
        def __init__(self, **given: object):
            super().__init__(**given)
            self._all: list[Beat] = []

        def renew(self, beat: Beat, *, now: float) -> Renewal:
            self._all.append(beat)
            return super().renew(beat, now=now)

    assert_caught("things when all is done", Hoarding)


def test_unfair_shares_are_caught(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(FairShare, "weight", lambda self, owner: 1.0)
    with pytest.raises(Violation, match="of its share"):
        Steady(1).run()


def test_swaps_for_nothing_are_caught(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Queue, "_is_worth_a_swap", lambda *given: True)
    with pytest.raises(Violation, match="s of swaps are more than"):
        Steady(3).run()


def test_the_audit_counts_what_containers_hold_all_the_way_down():
    assert footprint({"a": [1, 2, 3], "b": {4: (5, 6)}}) == 2 + 3 + 1 + 2
