"""Claims of two farms on one store, each with a clock of its own."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from farm.claims import CLAIM_RENEW_S, CLAIM_S, Claim, Claims, Hold, claim_of, decide, process_lives
from farm.storage.base import StoreReport
from farm.storage.local import LocalStore

HERE = "boot-1 pid:[1]"


def claim(farm: str, *, machine: str = HERE, pid: int = 10, started: int = 100, host: str = "gpu-1") -> Claim:
    return Claim(farm=farm, host=host, machine=machine, pid=pid, started=started)


class Farm:
    """A farm's claims, its clock, and the processes that live on its machine."""

    def __init__(self, store: LocalStore, me: Claim, *, living: set[tuple[int, int]] | None = None):
        self.now = 0.0
        self.living = {(10, 100), (20, 200)} if living is None else living
        self.claims = Claims(
            store,
            me,
            enforced=True,
            clock=lambda: self.now,
            lives=lambda pid, started: (pid, started) in self.living,
            first=lambda: 0,
        )

    def hold(self, *, after: float = 0.0) -> Hold:
        self.now += after
        return self.claims.hold("job")


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path)


def stored(store: LocalStore) -> Claim:
    return Claim.model_validate_json(store.get("claims/job"))


def test_the_first_farm_holds_a_job_and_the_second_learns_who_does(store):
    one = Farm(store, claim("one"))
    two = Farm(store, claim("two", pid=20, started=200, host="gpu-2"))
    assert one.hold() == Hold(True)
    assert two.hold() == Hold(False, by="gpu-1 (process 10)")
    assert stored(store).farm == "one"


def test_a_claim_that_is_renewed_is_never_taken(store):
    one, two = Farm(store, claim("one")), Farm(store, claim("two", machine="elsewhere"))
    one.hold()
    for _ in range(20):
        assert one.hold(after=CLAIM_RENEW_S).held
        assert not two.hold(after=CLAIM_RENEW_S).held
    assert stored(store).beat == 21


def test_a_claim_that_stays_as_it_was_is_taken_after_its_time_on_the_lookers_own_clock(store):
    one, two = Farm(store, claim("one")), Farm(store, claim("two", machine="elsewhere"))
    one.hold()
    two.now = 1e6
    assert not two.hold().held
    assert not two.hold(after=CLAIM_S - 0.1).held
    assert two.hold(after=0.1).held
    assert stored(store).farm == "two"
    assert one.hold(after=CLAIM_S) == Hold(False, by="gpu-1 (process 10)")


def test_a_dead_process_of_the_same_machine_loses_its_claim_at_once(store):
    one, two = Farm(store, claim("one")), Farm(store, claim("two", pid=20, started=200))
    one.hold()
    assert not two.hold().held
    two.living.discard((10, 100))
    assert two.hold().held


def test_a_process_id_that_was_used_again_is_not_the_process(store):
    one, two = Farm(store, claim("one")), Farm(store, claim("two", pid=20, started=200), living={(10, 999), (20, 200)})
    one.hold()
    assert two.hold().held


@pytest.mark.parametrize("machine", ["boot-2 pid:[1]", "boot-1 pid:[2]", ""])
def test_of_a_process_elsewhere_nothing_is_known_but_that_its_claim_changes(store, machine):
    one, two = Farm(store, claim("one", machine=machine)), Farm(store, claim("two", pid=20, started=200), living=set())
    one.hold()
    assert not two.hold().held


def test_machines_that_are_both_unknown_are_not_the_same():
    found, me = claim("one", machine=""), claim("two", machine="")
    assert decide(found, me, same_for_s=0, lives=lambda pid, started: False) == "leave"


def test_a_farm_that_outlives_every_process_we_know_of_is_waited_for():
    assert decide(claim("one", pid=0), claim("two"), same_for_s=0, lives=lambda pid, started: False) == "leave"


def test_one_process_may_start_a_farm_after_another():
    assert decide(claim("one"), claim("two"), same_for_s=0, lives=lambda pid, started: True) == "take"


def test_a_restarted_dispatcher_of_the_same_farm_goes_on_with_its_claim(store):
    Farm(store, claim("one")).hold()
    again = Farm(store, claim("one"))
    assert again.hold().held
    assert stored(store).beat == 2


def test_a_released_claim_is_free_at_once_and_only_its_holder_can_release_it(store):
    one, two = Farm(store, claim("one")), Farm(store, claim("two", machine="elsewhere"))
    one.hold()
    two.claims.release("job")
    assert stored(store).farm == "one"
    one.claims.release("job")
    one.claims.release("job")
    assert store.head("claims/job") is None
    assert two.hold().held


def test_a_write_that_was_answered_with_a_refusal_and_happened_is_not_lost(store, monkeypatch):
    one = Farm(store, claim("one"))
    one.hold()
    real = LocalStore.replace
    answers = iter([False, True])

    def replace(self: LocalStore, key: str, data: bytes, etag: str) -> bool:
        return real(self, key, data, etag) and next(answers)

    monkeypatch.setattr(LocalStore, "replace", replace)
    assert one.hold().held
    assert stored(store).beat == 3


def test_of_two_farms_that_take_over_at_once_one_wins(store, monkeypatch):
    Farm(store, claim("gone", machine="far")).hold()
    one, two = Farm(store, claim("one")), Farm(store, claim("two", machine="elsewhere"))
    one.hold()
    two.hold()
    real = LocalStore.replace
    first = []

    def replace(self: LocalStore, key: str, data: bytes, etag: str) -> bool:
        if not first:
            first.append(True)
            assert two.hold(after=CLAIM_S).held
        return real(self, key, data, etag)

    monkeypatch.setattr(LocalStore, "replace", replace)
    assert not one.hold(after=CLAIM_S).held
    assert stored(store).farm == "two"


@pytest.mark.parametrize("text", [json.dumps({"version": 9, "who": "a newer farm"}), "{", "[]"])
def test_a_claim_that_is_not_understood_holds_as_long_as_it_changes(store, text):
    store.put("claims/job", text.encode())
    one = Farm(store, claim("one"))
    assert one.hold() == Hold(False, by="another farm")
    store.put("claims/job", (text + " ").encode())
    assert not one.hold(after=CLAIM_S).held
    assert one.hold(after=CLAIM_S).held


def test_a_store_without_conditional_replaces_gives_every_job_to_everyone_and_says_so_once(store, monkeypatch, caplog):
    monkeypatch.setattr(LocalStore, "probe", lambda self: StoreReport(self.url, True, False, None))
    one, two = Claims(store, claim("one")), Claims(store, claim("two"))
    with caplog.at_level(logging.WARNING):
        assert [one.hold("job"), one.hold("other"), two.hold("job")] == [Hold(True)] * 3
    one.release("job")
    assert len(caplog.records) == 2
    assert list(store.list("claims/")) == []


def test_a_process_is_known_by_its_start_and_a_zombie_is_dead():
    mine = claim_of("one", pid=os.getpid())
    assert mine.machine
    assert process_lives(mine.pid, mine.started)
    assert not process_lives(mine.pid, mine.started + 1)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    theirs = claim_of("two", pid=child.pid)
    assert process_lives(theirs.pid, theirs.started)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not process_lives(theirs.pid, theirs.started)
    child.communicate()
    assert not process_lives(theirs.pid, theirs.started)


def test_without_a_process_a_claim_names_none():
    assert (claim_of("one").pid, claim_of("one").started) == (0, 0)


def test_a_claim_that_was_let_go_and_made_again_never_looks_like_the_one_before(store):
    one = Claims(store, claim("one"), enforced=True)
    versions = []
    for _ in range(3):
        one.hold("job")
        versions.append(store.get("claims/job"))
        one.release("job")
    assert len(set(versions)) == 3
