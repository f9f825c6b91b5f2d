from collections.abc import Iterable
from pathlib import Path

import pytest

from farm.errors import StoreUnavailableError, UnknownJobError
from farm.ledger import Ledger
from farm.records import Tombstone
from farm.removal import Removed, delete_job, measure_job, tombstone_key
from farm.storage.local import LocalStore
from tests.unit.finished_jobs import make_job, make_ledger

SAID = {"at": "2026-11-21T10:00:00+00:00", "by": "me@here"}


class Breaking(LocalStore):
    """A folder whose process dies at its `left`-th write from now."""

    left = 1_000_000

    def _count(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise StoreUnavailableError("killed")

    def create(self, key: str, data: bytes, **options: str) -> bool:
        self._count()
        return super().create(key, data, **options)

    def delete(self, key: str) -> None:
        self._count()
        super().delete(key)

    def delete_many(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._count()
            super().delete_many([key])


def everything(folder: Path) -> list[str]:
    ours = (path.relative_to(folder) for path in folder.rglob("*"))
    return sorted(str(path) for path in ours if path.parts[0] not in (".tmp", "profiles"))


def test_a_deleted_job_leaves_nothing_behind(tmp_path: Path) -> None:
    ledger, _ = make_job(tmp_path)
    other, _ = make_job(tmp_path, job="shapes-2")
    kept = [name for name in everything(tmp_path) if name.startswith("jobs/shapes-2")]
    (tmp_path / "jobs/shapes/0a1b2c3d/images/000007").mkdir()  # as a writer that died leaves it
    doomed = measure_job(ledger, "shapes")
    assert doomed.objects > 10
    assert doomed.size_bytes > 1000
    assert delete_job(ledger, "shapes", **SAID) == doomed
    assert everything(tmp_path) == ["jobs", *kept]
    assert other.jobs() == ["shapes-2"]
    assert other.plans("shapes") == []


def test_a_job_of_the_same_name_can_be_made_right_after(tmp_path: Path) -> None:
    ledger, _ = make_job(tmp_path)
    delete_job(ledger, "shapes", **SAID)
    again, plan = make_job(tmp_path, failed={3})
    assert again.totals(plan) is not None
    assert again.jobs() == ["shapes"]


def test_killed_anywhere_the_same_call_ends_it_and_the_job_is_never_seen_half(tmp_path: Path) -> None:
    for writes in range(100):
        folder = tmp_path / str(writes)
        make_job(folder, rows=2)
        store = Breaking(folder)
        store.left = writes
        ledger = Ledger(store)
        try:
            delete_job(ledger, "shapes", **SAID)
            ended = True
        except StoreUnavailableError:
            ended = False
        store.left = 1_000_000
        if writes:
            assert ledger.plans("shapes") == []
            assert ledger.jobs() == []
        if not ended:
            delete_job(ledger, "shapes", **SAID)
        assert everything(folder) == []
        if ended:
            break
    assert writes > 10


def test_it_waits_until_the_farm_at_work_lets_go(tmp_path: Path) -> None:
    ledger, _ = make_job(tmp_path, shards=1)
    store = ledger.store
    store.put("claims/shapes", b"{}")
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        assert store.head(tombstone_key("shapes")) is not None
        assert ledger.plans("shapes") == []
        assert next(store.list("jobs/shapes/"), None) is not None
        slept.append(seconds)
        if len(slept) == 3:
            store.delete("claims/shapes")

    delete_job(ledger, "shapes", **SAID, sleep=sleep)
    assert slept == [0.2] * 3
    assert everything(tmp_path) == []


def test_a_claim_that_nobody_lets_go_of_holds_nothing_up(tmp_path: Path) -> None:
    ledger, _ = make_job(tmp_path, shards=1)
    ledger.store.put("claims/shapes", b"{}")
    slept: list[float] = []
    delete_job(ledger, "shapes", **SAID, sleep=slept.append)
    assert 4.9 < sum(slept) < 5.3
    assert everything(tmp_path) == []


def test_what_a_farm_writes_meanwhile_goes_too(tmp_path: Path) -> None:
    make_job(tmp_path)

    class WrittenTo(LocalStore):
        late = 3

        def delete_many(self, keys: Iterable[str]) -> None:
            super().delete_many(keys)
            if self.late:
                self.late -= 1
                self.put(f"jobs/shapes/0a1b2c3d/images/000000/late-{self.late}", b"x")

    delete_job(Ledger(WrittenTo(tmp_path)), "shapes", **SAID)
    assert everything(tmp_path) == []


def test_a_call_that_comes_late_leaves_the_next_job_of_that_name_alone(tmp_path: Path) -> None:
    make_job(tmp_path)
    made: list[list[str]] = []

    class Overtaken(LocalStore):
        def head(self, key: str):
            if key == tombstone_key("shapes") and self.armed:
                self.armed = False
                delete_job(make_ledger(tmp_path), "shapes", **SAID)
                make_job(tmp_path)
                made.append(everything(tmp_path))
            return super().head(key)

        armed = False

        def list(self, prefix: str, *, after: str = ""):
            yield from super().list(prefix, after=after)
            self.armed = not made and prefix.endswith("/shapes/")

    removed = delete_job(Ledger(Overtaken(tmp_path)), "shapes", **SAID)
    assert made
    assert everything(tmp_path) == made[0]
    assert removed.objects < len(made[0])


def test_a_job_whose_records_are_damaged_can_be_deleted(tmp_path: Path) -> None:
    ledger, _ = make_job(tmp_path)
    (tmp_path / "jobs/shapes/plans/0001.json").write_text("{")
    delete_job(ledger, "shapes", **SAID)
    assert everything(tmp_path) == []


def test_a_mark_without_a_plan_is_a_job_to_delete(tmp_path: Path) -> None:
    ledger = make_ledger(tmp_path)
    ledger.open("begun")
    assert delete_job(ledger, "begun", **SAID) == Removed()
    assert everything(tmp_path) == []


@pytest.mark.parametrize("job", ["shape", "shapes/0a1b2c3d", "", ".", "..", "nul\0"])
def test_only_a_jobs_name_is_deleted(tmp_path: Path, job: str) -> None:
    ledger, _ = make_job(tmp_path)
    before = everything(tmp_path)
    with pytest.raises(UnknownJobError, match=r"no job"):
        delete_job(ledger, job, **SAID)
    assert everything(tmp_path) == before


def test_the_tombstone_says_who_and_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, plan = make_job(tmp_path)
    told: list[bytes] = []
    real = ledger.store.delete_many

    def delete_many(keys: Iterable[str]) -> None:
        told.append(ledger.store.get(tombstone_key("shapes")))
        real(keys)

    monkeypatch.setattr(ledger.store, "delete_many", delete_many)
    delete_job(ledger, "shapes", **SAID)
    stone = Tombstone.model_validate_json(told[0])
    assert (stone.job, stone.at, stone.by, stone.runs) == ("shapes", SAID["at"], "me@here", (plan.run,))
