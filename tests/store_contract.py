"""What every store keeps to, as tests. A test module subclasses `StoreContract` and gives it a `store` fixture."""

import multiprocessing
import pickle
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import pytest

from farm.errors import ObjectMissingError, StoreError
from farm.storage.base import Leftovers, ObjectStore

MIB = 1024 * 1024
RACERS = 16
ODD_KEYS = [
    "grüße/日本語/🎨 bild.png",
    "a b+c%20d&e=f?g#h.txt",
    "quote'\"<angle>\\back",
    "dots/.hidden/..name/...",
    "long/" + "x" * 255,
]
REFUSED_KEYS = {
    "": "is empty",
    "/absolute": "starts with '/'",
    "a//b": "has the part ''",
    "a/../b": "has the part '..'",
    "a/.": "has the part '.'",
    "folder/": "has the part ''",
    "nul\0": "has a NUL character",
    "half \ud83c": "has half of a surrogate pair",
    ".tmp/x": "starts with .tmp",
    "x" * 256: "has a part of 256 bytes, the limit is 255",
    "x/" * 600 + "x": "is 1201 bytes long, the limit is 1024",
}


def create_in_process(store: ObjectStore, key: str, content: bytes) -> bool:
    return store.create(key, content)


class StoreContract:
    """`conditional`: racing creates have exactly one winner. `dates_uploads`: it says truly when an upload began.

    `leave_unfinished`: begin a write of four bytes and die.
    """

    conditional = True
    dates_uploads = True

    def leave_unfinished(self, store: ObjectStore) -> None:
        raise NotImplementedError

    def test_what_was_put_reads_back(self, store: ObjectStore) -> None:
        store.put("a/b.bin", b"\0\xff content", content_type="image/png")
        assert store.get("a/b.bin") == b"\0\xff content"
        info = store.head("a/b.bin")
        assert info is not None
        assert (info.key, info.size_bytes) == ("a/b.bin", 10)
        assert list(store.list("a/")) == [info]

    def test_an_empty_object_is_an_object(self, store: ObjectStore) -> None:
        store.put("empty", b"")
        assert store.get("empty") == b""
        info = store.head("empty")
        assert info is not None
        assert info.size_bytes == 0
        assert store.create("empty", b"x") is False

    @pytest.mark.parametrize("key", ODD_KEYS)
    def test_odd_names_are_kept_as_they_are(self, store: ObjectStore, key: str) -> None:
        store.put(key, key.encode())
        assert store.get(key) == key.encode()
        assert [info.key for info in store.list("")] == [key]
        assert store.create(key, b"") is False
        store.delete(key)
        assert store.head(key) is None

    @pytest.mark.parametrize(("key", "reason"), REFUSED_KEYS.items(), ids=range(len(REFUSED_KEYS)))
    def test_names_that_no_store_can_hold_are_refused(self, store: ObjectStore, key: str, reason: str) -> None:
        for use in (
            lambda: store.put(key, b""),
            lambda: store.get(key),
            lambda: store.create(key, b""),
            lambda: store.head(key),
            lambda: store.delete(key),
        ):
            with pytest.raises(StoreError) as caught:
                use()
            assert reason in caught.value.message

    def test_what_is_not_there_is_missing(self, store: ObjectStore) -> None:
        store.put("folder/object", b"x")
        for key in ("absent", "folder/absent", "folder", "folder/object/below"):
            assert store.head(key) is None
            with pytest.raises(ObjectMissingError) as caught:
                store.get(key)
            assert key in caught.value.message
            store.delete(key)
        assert store.get("folder/object") == b"x"
        assert list(store.list("absent/")) == []
        assert list(store.folders("absent/")) == []

    def test_put_replaces_and_changes_the_etag(self, store: ObjectStore) -> None:
        seen = set()
        for number in range(5):
            store.put("k", str(number).encode())
            info = store.head("k")
            assert info is not None
            seen.add(info.etag)
        assert len(seen) == 5
        assert store.get("k") == b"4"

    def test_deleted_is_gone_and_may_be_made_anew(self, store: ObjectStore) -> None:
        store.put("deep/down/k", b"1")
        store.delete("deep/down/k")
        store.delete("deep/down/k")
        assert store.head("deep/down/k") is None
        assert list(store.list("")) == []
        assert list(store.folders("")) == []
        assert store.create("deep/down/k", b"2") is True
        assert store.get("deep/down/k") == b"2"

    def test_many_are_deleted_at_once_and_no_other(self, store: ObjectStore) -> None:
        keys = [f"many/{number % 3}/{number:05d}" for number in range(1_010)]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda key: store.put(key, b"x"), [*keys, *ODD_KEYS, "many/kept", "many/0-kept"]))
        store.delete_many(key for key in ["absent", *keys, *ODD_KEYS, "many/absent", keys[0]])
        assert [info.key for info in store.list("")] == ["many/0-kept", "many/kept"]
        store.delete_many(["many/kept", "many/0-kept"])
        assert list(store.folders("")) == []
        store.delete_many([])

    @pytest.mark.parametrize("key", ["", "a/../b", ".tmp/lock"])
    def test_names_that_no_store_can_hold_are_not_deleted(self, store: ObjectStore, key: str) -> None:
        with pytest.raises(StoreError, match="keys are names joined by"):
            store.delete_many([key])

    def test_objects_know_when_they_were_written_by_one_clock(self, store: ObjectStore) -> None:
        store.put("first", b"1")
        time.sleep(1.1)  # servers keep seconds
        store.put("second", b"2")
        first, second = list(store.list(""))
        assert 1.0 <= second.modified_at - first.modified_at < 60
        for info in (first, second):
            head = store.head(info.key)
            assert head is not None
            assert abs(head.modified_at - info.modified_at) < 1.0
        store.put("first", b"3")
        again, _ = list(store.list(""))
        assert again.modified_at >= second.modified_at

    def test_writes_that_never_ended_are_swept_when_they_are_old_enough(self, store: ObjectStore) -> None:
        store.put("k", b"whole")
        begun = store.head("k")
        assert begun is not None
        self.leave_unfinished(store)
        later, earlier = begun.modified_at + 60, begun.modified_at - 60
        assert not self.dates_uploads or store.sweep(earlier) == Leftovers(0, 0)
        assert store.sweep(later, remove=False) == Leftovers(1, 4)
        assert store.sweep(later) == Leftovers(1, 4)
        assert store.sweep(later) == Leftovers(0, 0)
        assert [info.key for info in store.list("")] == ["k"]

    def test_room_is_a_number_or_not_known(self, store: ObjectStore) -> None:
        assert (store.free_bytes() or 1) > 0

    def test_create_leaves_what_is_there(self, store: ObjectStore) -> None:
        assert store.create("k", b"first") is True
        assert store.create("k", b"second") is False
        assert store.create("k", b"first") is False
        assert store.get("k") == b"first"

    def test_replace_needs_the_etag_of_now(self, store: ObjectStore) -> None:
        assert store.replace("k", b"0", "no-such-etag") is False
        assert store.head("k") is None
        store.create("k", b"1")
        first = store.head("k")
        assert first is not None
        assert store.replace("k", b"2", first.etag) is True
        assert store.replace("k", b"3", first.etag) is False
        second = store.head("k")
        assert second is not None
        assert store.get("k") == b"2"
        assert store.replace("k", b"3", second.etag) is True
        third = store.head("k")
        assert third is not None
        store.delete("k")
        assert store.replace("k", b"4", third.etag) is False
        assert store.head("k") is None

    def test_racing_creates_in_threads_have_one_winner(self, store: ObjectStore) -> None:
        for round_number in range(3):
            key = f"race/{round_number}"
            start = threading.Barrier(RACERS)

            def racer(number: int, key: str = key, start: threading.Barrier = start) -> bool:
                start.wait()
                return store.create(key, f"racer {number}".encode() * 1000)

            with ThreadPoolExecutor(RACERS) as pool:
                self.check_race(
                    store, key, list(pool.map(racer, range(RACERS))), lambda n: f"racer {n}".encode() * 1000
                )

    def test_racing_creates_in_processes_have_one_winner(self, store: ObjectStore) -> None:
        keys = [f"race/{number}" for number in range(4)]
        with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
            futures = {
                key: [pool.submit(create_in_process, store, key, f"racer {n}".encode()) for n in range(3)]
                for key in keys
            }
            for key, racers in futures.items():
                self.check_race(store, key, [racer.result() for racer in racers], lambda n: f"racer {n}".encode())

    def check_race(self, store: ObjectStore, key: str, won: list[bool], content: Callable[[int], bytes]) -> None:
        if self.conditional:
            assert won.count(True) == 1
            assert store.get(key) == content(won.index(True))
        else:
            assert won.count(True) >= 1
            assert store.get(key) in [content(number) for number, true in enumerate(won) if true]

    def test_racing_replaces_have_one_winner(self, store: ObjectStore) -> None:
        store.put("claim", b"start")
        for _ in range(3):
            info = store.head("claim")
            assert info is not None
            start = threading.Barrier(RACERS)

            def racer(number: int, etag: str = info.etag, start: threading.Barrier = start) -> bool:
                start.wait()
                return store.replace("claim", f"{number} after {etag}".encode(), etag)

            with ThreadPoolExecutor(RACERS) as pool:
                won = list(pool.map(racer, range(RACERS)))
            self.check_race(store, "claim", won, lambda n, etag=info.etag: f"{n} after {etag}".encode())

    def test_large_objects_are_whole(self, store: ObjectStore) -> None:
        content = bytes(range(256)) * (20 * MIB // 256) + b"end"
        store.put("large", content)
        assert store.get("large") == content
        info = store.head("large")
        assert info is not None
        assert info.size_bytes == len(content)
        assert store.create("large-created", content) is True
        assert store.get("large-created") == content
        assert store.replace("large", b"small", info.etag) is True
        assert store.get("large") == b"small"

    def test_parts_of_an_object_are_read_as_long_as_it_is_the_same(self, store: ObjectStore) -> None:
        content = bytes(range(256)) * 4
        store.put("k", content)
        info = store.head("k")
        assert info is not None
        for start, size in ((0, 1), (10, 100), (0, 1024), (1023, 1), (5, 0)):
            assert store.read("k", start, size, etag=info.etag) == content[start : start + size]
        with pytest.raises(StoreError, match=r"k: 10 bytes were asked for|k has changed since it was looked at"):
            store.read("k", 1020, 10, etag=info.etag)
        store.put("k", content[::-1])
        with pytest.raises(StoreError, match=r"k has changed since it was looked at; do it again"):
            store.read("k", 0, 10, etag=info.etag)
        store.delete("k")
        with pytest.raises(ObjectMissingError, match="k is not there"):
            store.read("k", 0, 10, etag=info.etag)

    def test_lists_in_order_of_bytes(self, store: ObjectStore) -> None:
        keys = ["a-", "a.txt", "a/1", "a/b/c", "a/b-", "a0", "ab", "b", "B", "é", "z", "日"]
        for key in keys:
            store.put(key, b"x")
        ordered = sorted(keys, key=str.encode)
        assert [info.key for info in store.list("")] == ordered
        for prefix in ("a", "a/", "a/b", "a/b/", "x", "é"):
            assert [info.key for info in store.list(prefix)] == [key for key in ordered if key.startswith(prefix)]
        for after in [*ordered, "a/", "a/a", "a/b/", "a/z", "A", "zz", "~"]:
            assert [info.key for info in store.list("", after=after)] == [key for key in ordered if key > after]
            assert [info.key for info in store.list("a/", after=after)] == [
                key for key in ordered if key > after and key.startswith("a/")
            ]

    def test_lists_more_than_one_page(self, store: ObjectStore) -> None:
        keys = [f"many/{number:05d}" for number in range(1_010)]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda key: store.put(key, b""), keys))
        assert [info.key for info in store.list("many/")] == keys
        assert [info.key for info in store.list("many/", after="many/00049")] == keys[50:]
        assert next(iter(store.list("many/", after="many/01008"))).key == "many/01009"

    def test_folders_are_those_with_objects_below(self, store: ObjectStore) -> None:
        for key in ("jobs/a/1", "jobs/a/2/3", "jobs/b-1/x", "jobs/é/x", "jobs/file", "open/a"):
            store.put(key, b"x")
        assert list(store.folders("jobs/")) == ["a", "b-1", "é"]
        assert list(store.folders("")) == ["jobs", "open"]
        assert list(store.folders("jobs/a/")) == ["2"]

    def test_a_pickled_copy_is_the_same_store(self, store: ObjectStore) -> None:
        copy = pickle.loads(pickle.dumps(store))
        store.put("k", b"1")
        assert copy.get("k") == b"1"
        assert copy.url == store.url

    def test_probe_finds_what_the_store_can_do_and_cleans_up(self, store: ObjectStore) -> None:
        report = store.probe()
        assert report.url == store.url
        assert report.conditional_create is self.conditional
        assert report.conditional_replace is self.conditional
        assert list(store.list("")) == []
        assert store.create("k", b"first") is True
        assert store.create("k", b"second") is False
        assert store.get("k") == b"first"
