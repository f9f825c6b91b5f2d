import json
from types import SimpleNamespace

import pytest

from farm.cli import upkeep
from farm.cli.exits import Exit
from farm.removal import tombstone_key
from tests.unit.cli.conftest import Place
from tests.unit.finished_jobs import make_job


@pytest.fixture
def somebody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody is at the terminal."""
    terminal = SimpleNamespace(isatty=lambda: True)
    monkeypatch.setattr(upkeep, "sys", SimpleNamespace(stdin=terminal, stderr=terminal))


def test_delete_removes_a_job_and_says_how_much(farm: Place) -> None:
    make_job(farm.store)
    make_job(farm.store, job="kept")
    counted = json.loads(farm("du", "shapes", "--json").out)
    ended = farm("delete", "shapes", "--yes")
    assert ended.code == 0
    assert ended.out.startswith(f"shapes is deleted: {counted['objects']} objects, ")
    assert [line.split()[0] for line in farm("status").out.splitlines()[2:]] == ["kept"]
    again = farm("delete", "shapes", "--yes")
    assert again.code == Exit.INPUT
    assert "no job 'shapes'" in again.error
    assert farm("delete", "kept", "-y", "--json").out.startswith('{\n  "job": "kept",\n  "state": "deleted"')


def test_delete_asks_and_takes_no_for_an_answer(farm: Place, somebody: None, monkeypatch: pytest.MonkeyPatch) -> None:
    make_job(farm.store)
    before = farm.jobs_written()
    answers = iter([False, True])
    monkeypatch.setattr(upkeep.typer, "confirm", lambda *_, **__: next(answers))
    ended = farm("delete", "shapes")
    assert ended.code == 0
    assert f"shapes has {len(before)} objects, " in ended.err
    assert "shapes is kept" in ended.err
    assert farm.jobs_written() == before
    assert "shapes is deleted" in farm("delete", "shapes").out
    assert farm.jobs_written() == []


def test_where_nobody_can_be_asked_delete_wants_yes(farm: Place) -> None:
    make_job(farm.store)
    before = farm.jobs_written()
    ended = farm("delete", "shapes")
    assert ended.code == Exit.INPUT
    assert ended.error == "deleting shapes cannot be undone, and nobody is here to be asked; give --yes"
    assert farm.jobs_written() == before


def test_a_delete_that_was_broken_off_is_ended_by_typing_it_again(farm: Place) -> None:
    ledger, _ = make_job(farm.store)
    ledger.store.create(tombstone_key("shapes"), b"{}")
    assert farm("status", "shapes").out == "shapes: deleted\n"
    assert farm("delete", "shapes", "--yes").code == 0
    assert farm.jobs_written() == []


def test_du_shows_jobs_by_size_and_the_sum(farm: Place) -> None:
    make_job(farm.store, job="small", shards=1)
    make_job(farm.store, job="large", rows=20)
    ended = farm("du")
    lines = ended.out.splitlines()
    assert lines[0].split() == [
        "job",
        "size",
        "objects",
        "pictures",
        "thumbnails",
        "receipts",
        "dataset",
        "prompts",
        "other",
    ]
    assert [line.split()[0] for line in lines[2:4]] == ["large", "small"]
    assert lines[-1].endswith(f" free: {farm.store}")
    record = json.loads(farm("du", "--json").out)
    files = [path for path in farm.store.rglob("*") if path.is_file() and path.parent.name != ".tmp"]
    assert record["objects"] == len(files)
    assert record["bytes"] == sum(path.stat().st_size for path in files)
    assert record["free_bytes"] > 0
    assert [job["job"] for job in record["jobs"]] == ["large", "small"]
    assert record["jobs"][0]["kinds"]["pictures"]["objects"] == 40


def test_du_of_one_job_counts_it_alone(farm: Place) -> None:
    make_job(farm.store)
    make_job(farm.store, job="other")
    record = json.loads(farm("du", "shapes", "--json").out)
    assert [job["job"] for job in record["jobs"]] == ["shapes"]
    assert record["objects"] == record["jobs"][0]["objects"]
    assert "elsewhere" not in record
    assert farm("du", "shape").error.startswith("no job 'shape' in ")


def test_du_of_nothing_is_nothing(farm: Place) -> None:
    ended = farm("du")
    assert ended.code == 0
    assert ended.out.startswith("0 B in 0 objects, ")


def test_gc_says_what_it_would_remove_then_removes_it(farm: Place) -> None:
    ledger, plan = make_job(farm.store)
    ledger.store.put(f"jobs/shapes/{plan.run}/images/000000/000000003.p1a2-0123abcd.png", b"orphan")
    ended = farm("gc", "--dry-run")
    assert (ended.code, ended.out) == (0, "  pictures           1 object, 6 B\nwould remove 1 object, 6 B\n")
    assert json.loads(farm("gc", "-n", "--json").out) == {
        "dry_run": True,
        "objects": 1,
        "bytes": 6,
        "kinds": {"pictures": {"objects": 1, "bytes": 6}},
        "kept": [],
    }
    assert farm("gc").out.endswith("removed 1 object, 6 B\n")
    assert farm("gc").out == f"nothing to remove in {farm.store}\n"
    assert farm("verify", "shapes").code == 0


def test_gc_says_what_it_could_not_judge(farm: Place) -> None:
    _, plan = make_job(farm.store)
    (farm.store / f"jobs/shapes/{plan.run}/receipts/0001/00000001.parquet").write_bytes(b"torn")
    ended = farm("gc")
    assert ended.code == Exit.STORE
    assert f"kept: pictures of job shapes, run {plan.run}: " in ended.err
    assert "not a receipt" in ended.err
