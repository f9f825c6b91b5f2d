"""Many processes' numbers as one view, whatever ends, is late or comes twice."""

from farm.tally import FORGOTTEN_S, PAST_KEPT, SILENT_S, Sample, Snapshot, Tallies, added

IMAGES = "farm_images_total"
BUSY = "farm_seats"


def snapshot(process: str, incarnation: str, images: float, *, busy: float = 0.0, began_at: float = 0.0) -> Snapshot:
    return Snapshot(process, incarnation, (Sample(IMAGES, (), images), Sample(BUSY, (), busy)), began_at)


def sums(tallies: Tallies, now: float = 0.0) -> dict[str, float]:
    return {sample.name: sample.value for sample in tallies.samples(now=now)}


def test_processes_are_added_up():
    tallies = Tallies()
    tallies.put(snapshot("renderer-1", "a", 10, busy=1), now=0)
    tallies.put(snapshot("renderer-2", "b", 5, busy=1), now=0)
    tallies.put(snapshot("renderer-1", "a", 12), now=5)
    assert sums(tallies, 5) == {IMAGES: 17, BUSY: 1}


def test_labels_are_kept_apart():
    tallies = Tallies()
    for status in ("ok", "failed"):
        tallies.put(Snapshot(status, "a", (Sample(IMAGES, (("status", status),), 3.0),)), now=0)
    assert set(tallies.samples(now=0)) == {
        Sample(IMAGES, (("status", "ok"),), 3.0),
        Sample(IMAGES, (("status", "failed"),), 3.0),
    }


def test_a_counter_does_not_fall_when_its_process_ends_and_begins_anew():
    tallies = Tallies()
    tallies.put(snapshot("renderer-1", "a", 10, busy=1), now=0)
    tallies.gone("renderer-1")
    tallies.gone("renderer-1")
    assert sums(tallies) == {IMAGES: 10}
    tallies.put(snapshot("renderer-1", "b", 2, busy=1), now=9)
    assert sums(tallies, 9) == {IMAGES: 12, BUSY: 1}


def test_a_new_life_that_nobody_announced_takes_the_old_ones_place():
    tallies = Tallies()
    tallies.put(snapshot("renderer-1", "a", 10, busy=1), now=0)
    tallies.put(snapshot("renderer-1", "b", 1, busy=3), now=1)
    assert sums(tallies, 1) == {IMAGES: 11, BUSY: 3}


def test_a_snapshot_that_is_late_or_comes_twice_changes_nothing():
    tallies = Tallies()
    tallies.put(snapshot("renderer-1", "a", 10), now=0)
    tallies.put(snapshot("renderer-1", "a", 10), now=0)
    tallies.put(snapshot("renderer-1", "a", 8), now=1)
    tallies.put(snapshot("renderer-1", "b", 1, busy=3), now=2)
    tallies.put(snapshot("renderer-1", "a", 11, busy=1), now=3)  # its last words, after its successor's first
    assert sums(tallies, 3) == {IMAGES: 12, BUSY: 3}


def test_a_process_that_was_only_cut_off_goes_on():
    tallies = Tallies()
    tallies.put(snapshot("gateway-1", "a", 10, busy=1), now=0)
    assert sums(tallies, SILENT_S + 1) == {IMAGES: 10}, "what it measured last is true no more"
    tallies.gone("gateway-1")
    tallies.put(snapshot("gateway-1", "a", 13, busy=2), now=60)
    assert sums(tallies, 60) == {IMAGES: 13, BUSY: 2}


def test_many_lives_take_no_more_memory_and_lose_no_count():
    tallies = Tallies()
    lives = 3 * PAST_KEPT
    for life in range(lives):
        tallies.put(snapshot("renderer-1", f"{life:04}", 2), now=life)
        tallies.put(snapshot("renderer-2", "steady", life), now=life)
    assert len(tallies._lives) == PAST_KEPT + 2
    assert sums(tallies)[IMAGES] == 2 * lives + lives - 1
    tallies.put(snapshot("renderer-1", "0000", 2), now=999)  # closed long ago
    assert sums(tallies)[IMAGES] == 2 * lives + lives - 1


def test_processes_that_fall_silent_for_good_take_no_more_memory_either():
    tallies, lives = Tallies(), 3 * PAST_KEPT
    for life in range(lives):
        tallies.put(snapshot(f"gateway-{life}", "a", 2), now=life * FORGOTTEN_S)
    assert len(tallies._lives) <= PAST_KEPT + 2
    assert sums(tallies)[IMAGES] == 2 * lives


def test_what_was_counted_before_this_sum_began_is_not_counted_again():
    tallies = Tallies(began_at=1000.0)
    tallies.put(snapshot("renderer-1", "a", 500, began_at=400.0), now=0)
    tallies.put(snapshot("renderer-2", "b", 3, began_at=1001.0), now=0)
    assert sums(tallies)[IMAGES] == 3
    tallies.put(snapshot("renderer-1", "a", 504, began_at=400.0), now=5)
    assert sums(tallies)[IMAGES] == 7


def test_gone_processes_that_were_never_known_are_nothing():
    tallies = Tallies()
    tallies.gone("renderer-9")
    assert tallies.samples(now=0) == ()


def test_snapshots_are_added():
    assert added([snapshot("a", "1", 1), snapshot("b", "1", 2, busy=1)]) == {(IMAGES, ()): 3, (BUSY, ()): 1}
