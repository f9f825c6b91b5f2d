"""Deletes and garbage on a real S3 server, by the thousand."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from farm.export import finalise
from farm.garbage import collect
from farm.ledger import Ledger
from farm.plan import Plan
from farm.removal import Removed, delete_job, measure_job, tombstone_key
from farm.storage.s3 import S3Store
from farm.usage import job_usage
from farm.verify import verify
from tests.integration.servers import S3Server
from tests.unit.finished_jobs import commit_shard, make_plan

SAID = {"at": "2026-11-21T10:00:00+00:00", "by": "me@here"}
MANY = 1_200


def render_job(ledger: Ledger, *, job: str) -> Plan:
    """A small job, done."""
    plan = make_plan(job=job)
    ledger.create_plan(plan, 1)
    for shard in range(plan.shards):
        commit_shard(ledger, plan, shard)
    finalise(ledger, plan, 1)
    return plan


@pytest.fixture(params=["moto_server", "s3_server"])
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> S3Store:
    server: S3Server = request.getfixturevalue(request.param)
    return server.store(monkeypatch)


def test_a_job_of_thousands_of_objects_is_deleted_and_its_neighbour_is_not(store: S3Store) -> None:
    ledger = Ledger(store)
    plan = render_job(ledger, job="shapes")
    render_job(ledger, job="shapes-2")
    folder = f"jobs/shapes/{plan.run}/images/000000"
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda number: store.put(f"{folder}/more-{number}", b"x"), range(MANY)))
    neighbour = [info.key for info in store.list("jobs/shapes-2/")]
    doomed = measure_job(ledger, "shapes")
    assert doomed.objects > MANY
    assert job_usage(store, "shapes").total == doomed
    assert delete_job(ledger, "shapes", **SAID) == doomed
    assert ledger.jobs() == ["shapes-2"]
    assert [info.key for info in store.list("") if not info.key.startswith("profiles/")] == neighbour


def test_garbage_goes_and_every_row_keeps_its_picture(store: S3Store) -> None:
    ledger = Ledger(store)
    plan = render_job(ledger, job="shapes")
    render_job(ledger, job="going")
    store.create(tombstone_key("going"), b"{}")
    orphan = f"jobs/shapes/{plan.run}/images/000000/000000003.p1a2-0123abcd.png"
    young = "jobs/shapes/ffffffff/prompts/part-00000.parquet"
    for key in (orphan, young, "open/nobody", "claims/shapes"):
        store.put(key, b"orphan")
    found = collect(ledger, **SAID)
    assert found.kept == []
    assert found.removed["pictures"] == Removed(1, 6)
    assert set(found.removed) == {"pictures", "deleted jobs"}
    assert store.head(young) is not None
    assert verify(ledger, plan).sound
    found = collect(ledger, **SAID, grace_s=-60.0)
    assert {kind: removed.objects for kind, removed in found.removed.items()} == {"runs": 1, "markers": 1, "claims": 1}
    assert verify(ledger, plan).sound
