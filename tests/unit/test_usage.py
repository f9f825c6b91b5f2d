from collections.abc import Iterator
from pathlib import Path

from farm.removal import Removed
from farm.storage.base import ObjectInfo
from farm.storage.local import LocalStore
from farm.usage import Usage, job_usage, job_usages, other_usage
from tests.unit.finished_jobs import make_job


def sizes_below(folder: Path) -> Removed:
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return Removed(len(sizes), sum(sizes))


def test_a_jobs_bytes_are_told_by_kind(tmp_path: Path) -> None:
    ledger, plan = make_job(tmp_path, failed={3})
    run = tmp_path / "jobs" / "shapes" / plan.run
    ledger.store.put(f"jobs/shapes/{plan.run}/prompts/part-00000.parquet", b"12345")
    ledger.store.put(f"jobs/shapes/{plan.run}/thumbnails/000000/x.webp", b"123")
    usage = job_usage(ledger.store, "shapes")
    assert usage.kinds["pictures"] == sizes_below(run / "images")
    assert usage.kinds["pictures"].objects == 9
    assert usage.kinds["thumbnails"] == Removed(1, 3)
    assert usage.kinds["receipts"] == sizes_below(run / "receipts")
    assert usage.kinds["dataset"] == sizes_below(run / "dataset")
    assert usage.kinds["prompts"] == Removed(1, 5)
    assert usage.total == sizes_below(tmp_path / "jobs" / "shapes")


def test_every_object_of_the_store_is_counted_once(tmp_path: Path) -> None:
    ledger, _ = make_job(tmp_path)
    make_job(tmp_path, job="begun", shards=1)
    store = ledger.store
    for key in ("readme", "mine/x/y", "jobs/unplanned/ffffffff/prompts/part-00000.parquet", "jobs/shapes/note"):
        store.put(key, b"1234")
    jobs = list(job_usages(store))
    assert [usage.job for usage in jobs] == ["begun", "shapes", "unplanned"]
    elsewhere = other_usage(store)
    assert elsewhere.kinds["other"] == Removed(1, 4)
    assert elsewhere.kinds["mine"] == Removed(1, 4)
    assert elsewhere.kinds["open"] == Removed(1, 0)
    every = [usage.total for usage in (*jobs, elsewhere)]
    found = sizes_below(tmp_path)
    temporary = sizes_below(tmp_path / ".tmp")
    total = sum(every, Removed())
    assert total == Removed(found.objects - temporary.objects, found.size_bytes - temporary.size_bytes)


def test_a_large_job_is_counted_without_holding_its_keys() -> None:
    """Many objects; what is in hand at a time is a folder of a thousand per thread and those that wait."""
    blocks, per_block = 200, 1000
    most = alive = 0

    class Info(ObjectInfo):
        __slots__ = ()

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    class Large(LocalStore):
        def folders(self, prefix: str) -> Iterator[str]:
            parts = {"jobs/big/": ["0a1b2c3d"], "jobs/big/0a1b2c3d/": ["images"]}
            yield from parts.get(prefix, [f"{block:06d}" for block in range(blocks)])

        def list(self, prefix: str, *, after: str = "") -> Iterator[ObjectInfo]:
            nonlocal most, alive
            if "images/" not in prefix:
                return
            for number in range(per_block):
                alive += 1
                most = max(most, alive)
                yield Info(f"{prefix}{number}", 10, "")

    assert job_usage(Large("/nowhere"), "big") == Usage("big", {"pictures": Removed(200_000, 2_000_000)})
    assert most < 1000
