"""The fault proxy of `tests.chaos` between the farm's own S3 store and real servers: each fault once, and what became of it."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from farm.errors import StoreUnavailableError
from farm.storage.s3 import S3Store
from tests.chaos.proxy import FAULTS, Fault, FaultProxy
from tests.integration.servers import S3Server

DATA = bytes(range(256)) * 400


@pytest.fixture
def proxy(moto_server: S3Server) -> Iterator[FaultProxy]:
    proxy = FaultProxy(moto_server.endpoint, seed=1)
    yield proxy
    proxy.close()


@pytest.fixture
def store(proxy: FaultProxy, moto_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Store:
    return replace(moto_server, endpoint=proxy.endpoint).store(monkeypatch)


def seen(proxy: FaultProxy, method: str) -> list[tuple[Fault | None, int | None]]:
    return [(exchange.fault, exchange.status) for exchange in proxy.journal if exchange.method == method]


def test_without_faults_everything_goes_through(store: S3Store, proxy: FaultProxy) -> None:
    report = store.probe()
    assert (report.conditional_create, report.conditional_replace) == (True, True)
    store.put("a b/ü", DATA)
    assert store.get("a b/ü") == DATA
    assert [info.size_bytes for info in store.list("")] == [len(DATA)]
    assert all(exchange.fault is None and exchange.status is not None for exchange in proxy.journal)


def test_signatures_hold_behind_the_proxy(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = FaultProxy(s3_server.endpoint, seed=1)
    try:
        store = replace(s3_server, endpoint=proxy.endpoint).store(monkeypatch)
        assert store.probe().conditional_create
    finally:
        proxy.close()


@pytest.mark.parametrize("fault", ["refuse", "slow_down", "reset", "cut_upload"])
def test_a_put_that_did_not_happen_is_made_again(store: S3Store, proxy: FaultProxy, fault: Fault) -> None:
    proxy.next_faults.append(fault)
    store.put("key", DATA)
    assert store.get("key") == DATA
    assert seen(proxy, "PUT") == [(fault, None), (None, 200)]


@pytest.mark.parametrize("fault", ["swallow", "deny", "break_head"])
def test_a_create_whose_answer_was_lost_knows_its_own_object(store: S3Store, proxy: FaultProxy, fault: Fault) -> None:
    store.head("key")
    proxy.next_faults.extend([None, fault])  # the look before it goes through
    assert store.create("key", DATA) is True
    assert store.get("key") == DATA
    assert seen(proxy, "PUT") == [(fault, 200), (None, 412)]
    assert store.create("key", b"another's") is False


def test_an_upload_cut_in_the_middle_leaves_nothing(store: S3Store, proxy: FaultProxy) -> None:
    store.head("key")
    proxy.next_faults.extend([None, *["cut_upload"] * 5])
    with pytest.raises(StoreUnavailableError):
        store.create("key", DATA)
    assert store.head("key") is None


@pytest.mark.parametrize("fault", ["break_off", "break_head"])
def test_an_answer_cut_in_the_middle_is_asked_for_again(store: S3Store, proxy: FaultProxy, fault: Fault) -> None:
    store.put("key", DATA)
    proxy.next_faults.append(fault)
    assert store.get("key") == DATA
    assert seen(proxy, "GET") == [(fault, 200), (None, 200)]
    proxy.next_faults.append(fault)
    assert [info.key for info in store.list("")] == ["key"]
    proxy.next_faults.append("break_head")
    info = store.head("key")
    assert info is not None
    assert info.size_bytes == len(DATA)


def test_receipts_of_one_machine_are_held(store: S3Store, proxy: FaultProxy) -> None:
    proxy.hold_receipts("127.0.0.1", 0.5)
    store.put("jobs/a/run/receipts/0001/1.parquet", DATA)
    store.put("jobs/a/run/images/1.png", DATA)
    held, passed = (exchange.at for exchange in proxy.journal)
    assert passed - held < 0.4
    assert store.get("jobs/a/run/receipts/0001/1.parquet") == DATA


def test_one_seed_draws_the_same_faults(moto_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    for _ in range(2):
        proxy = FaultProxy(moto_server.endpoint, seed=7, rate=0.5, faults=tuple(set(FAULTS) - {"delay"}))
        proxy._faults = tuple(sorted(proxy._faults))
        store = replace(moto_server, endpoint=proxy.endpoint).store(monkeypatch, attempts=1)
        for number in range(12):
            try:
                store.put(f"{number}", DATA)
            except StoreUnavailableError:
                continue
        drawn.append([exchange.fault for exchange in proxy.journal])
        proxy.close()
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) > 4
