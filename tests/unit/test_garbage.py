import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farm.export import finalise
from farm.garbage import GRACE_S, Garbage, collect
from farm.ledger import Ledger
from farm.removal import Removed, tombstone_key
from farm.singles import Single, Singles, single_id
from farm.storage.base import ObjectInfo
from farm.storage.local import LocalStore
from farm.verify import verify
from tests.unit.finished_jobs import CARD, commit_shard, make_job, make_ledger, make_plan
from tests.unit.storage.test_contract import Unconditional

SAID = {"at": "2026-11-21T10:00:00+00:00", "by": "me@here"}
DAY = 24 * 3600.0


class Aged(LocalStore):
    """A folder whose file system says that objects below some prefixes were written so many seconds earlier."""

    def __init__(self, folder: Path, ages: dict[str, float] | None = None):
        super().__init__(folder)
        self.ages = ages or {}

    def _info(self, key: str, path: Path) -> ObjectInfo | None:
        info = super()._info(key, path)
        age = sum(seconds for prefix, seconds in self.ages.items() if key.startswith(prefix))
        return info and replace(info, modified_at=info.modified_at - age)


class AgedUnconditional(Aged, Unconditional):
    pass


def objects(store: LocalStore) -> set[str]:
    return {info.key for info in store.list("")}


def gone(ledger: Ledger, *, dry_run: bool = False) -> tuple[set[str], Garbage]:
    before = objects(ledger.store)
    garbage = collect(ledger, **SAID, dry_run=dry_run)
    return before - objects(ledger.store), garbage


def aged(folder: Path, **ages: float) -> Ledger:
    return Ledger(Aged(folder, ages))


def put_orphan(ledger: Ledger, plan, index: int, name: str, kind: str = "images") -> str:
    key = f"jobs/{plan.job}/{plan.run}/{kind}/{index // 1000:06d}/{index:09d}{name}"
    ledger.store.put(key, b"orphan")
    return key


def test_pictures_that_no_row_points_at_go_and_no_other(tmp_path: Path) -> None:
    ledger, plan = make_job(tmp_path, failed={3})
    orphans = {
        put_orphan(ledger, plan, 0, ".p1a2-00000000.png"),
        put_orphan(ledger, plan, 3, "_some-key.p1a1-0123abcd.webp"),
        put_orphan(ledger, plan, 5, ".p1a2-00000000.webp", kind="thumbnails"),
    }
    kept = {
        put_orphan(ledger, plan, 5, ".p2a1-00000000.png"),  # of a pass that may be open by now
        put_orphan(ledger, plan, 5, ".mine.png"),
        put_orphan(ledger, plan, 5, ".p1a1-00000000.png.part"),
    }
    found, garbage = gone(ledger)
    assert found == orphans
    assert garbage.removed == {"pictures": Removed(3, 18)}
    assert garbage.kept == []
    assert kept <= objects(ledger.store)
    assert verify(ledger, plan).sound
    assert gone(ledger) == (set(), Garbage())


def test_a_thumbnail_that_a_row_names_is_kept(tmp_path: Path) -> None:
    ledger, plan = make_job(tmp_path)
    named, orphan = (put_orphan(ledger, plan, 0, f".p1a{n}-00000000.webp", kind="thumbnails") for n in (1, 2))
    receipt = ledger.receipt(plan, 1, 0)
    rows = (replace(receipt.rows[0], thumbnail=named), *receipt.rows[1:])
    ledger.store.put(f"jobs/shapes/{plan.run}/receipts/0001/00000000.parquet", replace(receipt, rows=rows).to_parquet())
    assert gone(ledger)[0] == {orphan}


def test_a_dry_run_counts_the_same_and_removes_nothing(tmp_path: Path) -> None:
    ledger, plan = make_job(tmp_path)
    make_job(tmp_path, job="going")
    ledger.store.create(tombstone_key("going"), b"{}")
    put_orphan(ledger, plan, 0, ".p1a2-00000000.png")
    found, garbage = gone(ledger, dry_run=True)
    assert found == set()
    assert set(garbage.removed) == {"deleted jobs", "pictures"}
    assert gone(ledger)[1] == garbage


def test_a_run_with_an_open_pass_is_not_touched(tmp_path: Path) -> None:
    ledger, plan = make_job(tmp_path, failed={3})
    put_orphan(ledger, plan, 0, ".p1a2-00000000.png")
    ledger.open_pass(plan, 2, np.array([3]))
    assert gone(ledger) == (set(), Garbage())
    commit_shard(ledger, plan, 0, pass_number=2)
    assert gone(ledger) == (set(), Garbage())
    finalise(ledger, plan, 2)
    assert len(gone(ledger)[0]) == 1


def test_a_picture_that_a_later_pass_replaced_is_still_pointed_at(tmp_path: Path) -> None:
    ledger, plan = make_job(tmp_path)
    ledger.open_pass(plan, 2, np.array([3]))
    commit_shard(ledger, plan, 0, pass_number=2)
    finalise(ledger, plan, 2)
    assert len(list(ledger.store.list(f"jobs/shapes/{plan.run}/images/000000/000000003"))) == 2
    assert gone(ledger) == (set(), Garbage())


@pytest.mark.parametrize("damage", ["torn", "gone", "astray"])
def test_where_receipts_are_damaged_pictures_are_kept(tmp_path: Path, damage: str) -> None:
    ledger, plan = make_job(tmp_path)
    make_job(tmp_path, job="sound")
    put_orphan(ledger, plan, 0, ".p1a2-00000000.png")
    orphan = put_orphan(ledger, replace_job(plan, "sound"), 0, ".p1a2-00000000.png")
    receipt = tmp_path / f"jobs/shapes/{plan.run}/receipts/0001/00000001.parquet"
    if damage == "torn":
        receipt.write_bytes(receipt.read_bytes()[:-9])
    else:
        receipt.unlink()
    if damage == "astray":
        moved = ledger.receipt(plan, 1, 0)
        rows = tuple(replace(row, index=row.index + 4) for row in moved.rows)
        receipt.write_bytes(replace(moved, shard=1, rows=(*rows[:3], replace(rows[3], object="jobs/x"))).to_parquet())
    found, garbage = gone(ledger)
    assert found == {orphan}
    assert [one.what for one in garbage.kept] == [f"pictures of job shapes, run {plan.run}"]
    said = {"torn": "not a receipt", "gone": "pass 1 is closed and lacks receipts; farm verify", "astray": "elsewhere"}
    assert said[damage] in garbage.kept[0].reason


def replace_job(plan, job: str):
    return plan.model_copy(update={"job": job})


def test_a_job_whose_plan_cannot_be_read_is_kept_whole(tmp_path: Path) -> None:
    make_job(tmp_path)
    ledger = aged(tmp_path, **{"": 0.0, "jobs/": 2 * DAY, "open/": 2 * DAY})
    ledger.store.put("jobs/shapes/ffffffff/prompts/part-00000.parquet", b"x")
    ledger.open("shapes")
    path = tmp_path / "jobs/shapes/plans/0001.json"
    path.write_text(path.read_text().replace('"version":', '"version":9'))
    found, garbage = gone(ledger)
    assert found == set()
    assert garbage.kept[0].what == "job shapes"
    assert "newer farm" in garbage.kept[0].reason


def test_what_has_no_plan_goes_when_it_is_a_day_old(tmp_path: Path) -> None:
    ledger = aged(tmp_path)
    make_job(tmp_path, job="planned", shards=1)
    old = {
        "jobs/planned/ffffffff/prompts/part-00000.parquet",
        "jobs/never/ffffffff/prompts/part-00000.parquet",
        "jobs/never/ffffffff/prompts/part-00001.parquet",
        "jobs/never/control/000001.json",
        "open/nobody",
        "claims/planned",
        "probe/dead/plain",
    }
    kept = {"jobs/never/notes.txt", "jobs/never/mine/x", "jobs/planned/control/000001.json", "mine/x"}
    for key in old | kept:
        ledger.store.put(key, b"{}")
    ledger.store.ages = dict.fromkeys(("jobs/", "open/", "claims/", "probe/dead", "mine/"), GRACE_S - 60)
    assert gone(ledger) == (set(), Garbage())
    ledger.store.ages = dict.fromkeys(("jobs/", "open/", "claims/", "probe/dead", "mine/"), GRACE_S + 60)
    found, garbage = gone(ledger)
    assert found == old
    assert garbage.removed == {
        "runs": Removed(4, 8),
        "markers": Removed(1, 2),
        "claims": Removed(1, 2),
        "probes": Removed(1, 2),
    }


@pytest.mark.parametrize("young", ["jobs/new/ffffffff/prompts/part-00001", "open/new"])
def test_a_submission_under_way_keeps_its_run_however_old_its_first_part_is(tmp_path: Path, young: str) -> None:
    ledger = aged(tmp_path, **{"jobs/new/": 3 * DAY, "open/new": 3 * DAY, young: -3 * DAY})
    for key in ("jobs/new/ffffffff/prompts/part-00000", "jobs/new/ffffffff/prompts/part-00001", "open/new"):
        ledger.store.put(key, b"{}")
    found, _ = gone(ledger)
    assert not any(key.startswith("jobs/") for key in found)


def test_a_plan_written_while_it_looks_keeps_the_run(tmp_path: Path) -> None:
    ledger = aged(tmp_path, **{"jobs/": 3 * DAY})
    plan = make_plan()
    ledger.store.put(f"jobs/shapes/{plan.run}/prompts/part-00000.parquet", b"x")
    real = ledger.store.list

    def list_and_plan(prefix: str, *, after: str = "") -> Iterator[ObjectInfo]:
        yield from real(prefix, after=after)
        if prefix == f"jobs/shapes/{plan.run}/":
            ledger.create_plan(plan, 1)

    ledger.store.list = list_and_plan  # type: ignore[method-assign]
    assert gone(ledger) == (set(), Garbage())


def test_this_machines_clock_decides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = make_ledger(tmp_path)
    ledger.store.put("jobs/new/ffffffff/prompts/part-00000", b"x")
    ledger.open("new")
    ahead = time.time_ns() + int(3 * DAY * 1e9)
    monkeypatch.setattr(time, "time_ns", lambda: ahead)
    monkeypatch.setattr(time, "time", lambda: ahead / 1e9)
    assert gone(ledger) == (set(), Garbage())


def test_a_delete_that_was_broken_off_is_ended(tmp_path: Path) -> None:
    ledger, _ = make_job(tmp_path)
    make_job(tmp_path, job="kept")
    ledger.store.create(tombstone_key("shapes"), b"{}")
    ledger.store.put("claims/shapes", b"{}")
    found, garbage = gone(ledger)
    assert ledger.jobs() == ["kept"]
    assert not any("shapes" in key for key in objects(ledger.store) if not key.startswith("profiles/"))
    assert garbage.removed["deleted jobs"].objects == len(found) - 2  # all but the claim and the tombstone


def test_an_empty_store_stays_empty(tmp_path: Path) -> None:
    assert collect(make_ledger(tmp_path / "none"), **SAID) == Garbage()
    assert not (tmp_path / "none").exists()


def test_without_conditional_puts_a_picture_goes_when_it_is_old_and_the_dataset_does_not_name_it(
    tmp_path: Path,
) -> None:
    store = AgedUnconditional(tmp_path)
    ledger = Ledger(store)
    plan = make_plan()
    ledger.create_plan(plan, 1)
    for shard in range(plan.shards):
        commit_shard(ledger, plan, shard)
    finalise(ledger, plan, 1)
    in_dataset = next(store.list(f"jobs/shapes/{plan.run}/images/")).key
    receipt = ledger.receipt(plan, 1, 0)
    twins = replace(receipt.rows[0], object=in_dataset.replace(".p1a1-", ".p1a2-"))
    store.put(twins.object or "", store.get(in_dataset))
    orphan = put_orphan(ledger, plan, 0, ".p1a3-00000000.png")
    late = replace(receipt, rows=(twins, *receipt.rows[1:])).to_parquet()
    store.put(f"jobs/shapes/{plan.run}/receipts/0001/00000000.parquet", late)
    assert gone(ledger)[0] == set()
    store.ages = {"jobs/": 2 * DAY}
    assert gone(ledger)[0] == {orphan}


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_after_any_history_every_row_still_finds_its_picture(
    tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    """A pilot or none, passes, late twins before and after the end, interrupted shards, another run: gc leaves a sound job."""
    draw = random.Random(seed)
    folder = tmp_path_factory.mktemp("history")
    ledger = make_ledger(folder)
    pilot, shard_images = draw.choice([None, 1, 3]), draw.choice([1, 2, 4])
    plan = make_plan(rows=draw.randint(1, 6), seeds=draw.randint(1, 3), shard_images=shard_images, pilot=pilot)
    ledger.create_plan(plan, 1)
    littered: Counter[str] = Counter()

    def litter(number: int) -> None:
        for _ in range(draw.randint(0, 4)):
            index, attempt = draw.randrange(plan.images), draw.randint(1, 3)
            kind = draw.choice(["images", "thumbnails"])
            littered[put_orphan(ledger, plan, index, f".p{number}a{attempt}-{draw.getrandbits(32):08x}.png", kind)] = (
                number
            )

    closed = 0
    for number in range(1, draw.randint(1, 4) + 1):
        if number > 1:
            size = draw.randint(1, plan.images)
            again = sorted(draw.sample(range(plan.images), size))
            rest = plan.pilot is not None and number == 2
            ledger.open_pass(plan, number, None if rest else np.array(again))
        litter(number)
        for shard in range(ledger.pass_shards(plan, number)):
            failed = draw.sample(range(plan.images), draw.randint(0, plan.images))
            commit_shard(ledger, plan, shard, pass_number=number, failed=failed)
            litter(number)
        if draw.random() < 0.15:
            break
        finalise(ledger, plan, number)
        closed = number
        litter(number)
    open_pass = ledger.passes(plan) > closed
    pointed = {
        key
        for number in range(1, ledger.passes(plan) + 1)
        for receipt in ledger.receipts(plan, number)
        for row in receipt.rows
        for key in (row.object, row.thumbnail)
        if key
    }
    before = objects(ledger.store)
    garbage = collect(ledger, **SAID)
    after = objects(ledger.store)
    assert garbage.kept == []
    assert pointed <= after
    assert before - after == (set() if open_pass else set(littered) - pointed)
    if not open_pass:
        assert verify(ledger, plan).sound


def test_single_images_past_their_time_go_and_others_stay(tmp_path: Path) -> None:
    ledger = make_ledger(tmp_path)
    singles = Singles(ledger.store)
    made = {}
    for number, keep_until in enumerate(("2026-11-20T00:00:00+00:00", "2026-12-20T00:00:00+00:00", None)):
        single = Single(
            id=single_id(1_795_000_000.0, lambda bits, number=number: number),
            created_at="2026-11-18T11:06:40+00:00",
            keep_until=keep_until,
            owner="ann",
            model="shapes",
            prompt="a shape",
            seed=number,
            params=CARD.defaults,
            format="png",
            size_bytes=7,
            sha256="0" * 64,
            seconds=0.5,
            renderer="renderer-0",
            device="CPU",
        )
        singles.put(single, b"picture")
        made[number] = single
    counted = gone(ledger, dry_run=True)
    assert counted[0] == set()
    found, garbage = gone(ledger)
    assert found == {f"singles/20261118/{made[0].id}.json", made[0].picture_key}
    assert garbage.removed["singles"] == counted[1].removed["singles"]
    assert garbage.removed["singles"].objects == 2
    assert gone(ledger) == (set(), Garbage())


def test_a_single_image_that_cannot_be_read_is_kept_and_named(tmp_path: Path) -> None:
    ledger = make_ledger(tmp_path)
    key = "singles/20261118/20261118-46400000-000000000000.json"
    ledger.store.put(key, b"{}")
    found, garbage = gone(ledger)
    assert found == set()
    assert [one.what for one in garbage.kept] == [f"image {key}"]
