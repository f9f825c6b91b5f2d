"""A job as it goes: what is told, in which order, to readers of all kinds."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest

from farm.errors import StoreUnavailableError
from farm.export import finalise
from farm.ledger import Ledger
from farm.removal import delete_job
from farm.run import JobProgress
from farm.server import events
from farm.storage.local import LocalStore
from tests.unit.finished_jobs import commit_shard, make_job, make_plan, render_pass
from tests.unit.server.farm_at_rest import FarmAtRest, asking
from tests.unit.server.farm_in_process import FarmInProcess

T = TypeVar("T")


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farm.server.events.LOOK_S", 0.005)
    monkeypatch.setattr("farm.server.events.QUIET_LOOK_S", 0.02)
    monkeypatch.setattr("farm.server.events.DONE_S", 0.05)
    monkeypatch.setattr("farm.server.rows.DONE_S", 0.001)
    monkeypatch.setattr("farm.server.jobroom.PROGRESS_S", 0.001)
    monkeypatch.setattr("farm.server.jobroom.STATUS_S", 0.001)


@dataclass(frozen=True)
class Event:
    kind: str
    data: Any
    id: str | None


class Reader:
    """A client of the events of a job, on the app itself: takes what is sent when it likes, and can go away."""

    def __init__(self, farm: FarmAtRest, job: str, *, query: str = "", **headers: str):
        self.status = 0
        self.headers: dict[str, str] = {}
        self.bytes = 0
        self.whole = False
        self.reads = asyncio.Event()
        self.reads.set()
        self._sent: list[bytes] = []
        self._gone = asyncio.Event()
        self._asked = False
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "GET",
            "scheme": "http",
            "path": f"/v1/jobs/{job}/events",
            "raw_path": f"/v1/jobs/{job}/events".encode(),
            "query_string": query.encode(),
            "root_path": "",
            "headers": [(b"host", b"127.0.0.1:8000")]
            + [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 8000),
        }
        self.asking = asyncio.create_task(farm.app(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        await self.reads.wait()
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            self._sent.append(message.get("body", b""))
            self.bytes += len(message.get("body", b""))
            self.whole = not message.get("more_body", False)

    def leave(self) -> None:
        self._gone.set()

    async def ended(self) -> None:
        async with asyncio.timeout(30):
            await self.asking

    @property
    def text(self) -> str:
        return b"".join(self._sent).decode()

    @property
    def events(self) -> list[Event]:
        found = []
        for block in self.text.split("\n\n"):
            fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
            if "event" in fields:
                found.append(Event(fields["event"], json.loads(fields["data"]), fields.get("id")))
        return found

    def of(self, kind: str) -> list[Any]:
        return [event.data for event in self.events if event.kind == kind]

    @property
    def images(self) -> list[int]:
        return [image["index"] for image in self.of("image")]

    async def until(self, true: Callable[["Reader"], object]) -> None:
        async with asyncio.timeout(30):
            while not true(self):  # noqa: ASYNC110  (what it waits for has no event)
                await asyncio.sleep(0.005)


def watched(
    folder: Path, main: Callable[[FarmAtRest], Awaitable[T]], *, farm: FarmAtRest | None = None, **job: Any
) -> T:
    """Make a job, and watch it in an event loop."""
    if farm is None:
        make_job(folder / "store", **job)
        farm = FarmAtRest(folder)
    return asyncio.run(main(farm))  # type: ignore[arg-type]


def progress(state: str = "running", done: int = 0, **fields: Any) -> JobProgress:
    values = {
        "job": "shapes",
        "run": "0a1b2c3d",
        "pass_number": 1,
        "images": 10,
        "failed": 0,
        "fraction": done / 10,
        "images_per_s": 2.0,
        "eta_s": 3.0,
        "renderers": 2,
        "renderers_busy": 1,
        "message": None,
        "seconds": {},
    }
    return JobProgress(**(values | {"state": state, "done": done} | fields))


def test_a_job_that_is_done_is_told_whole_and_ends(tmp_path: Path) -> None:
    async def main(farm: FarmAtRest) -> Reader:
        reader = Reader(farm, "shapes")
        await reader.ended()
        return reader

    reader = watched(tmp_path, main, failed={3})
    assert reader.status == 200
    assert reader.headers["content-type"].startswith("text/event-stream")
    assert reader.headers["cache-control"] == "no-store"
    assert [event.kind for event in reader.events] == ["progress", "state", *["image"] * 10, "end"]
    assert reader.images == list(range(10))
    assert reader.of("state") == [{"job": "shapes", "state": "done", "message": None}]
    assert reader.of("end") == [{"job": "shapes", "state": "done"}]
    assert [event.id for event in reader.events if event.id] == ["0a1b2c3d.1.1", "0a1b2c3d.1.2", "0a1b2c3d.1.3"]
    failed, whole = reader.of("image")[3], reader.of("image")[4]
    assert (failed["status"], failed["url"], failed["error_code"]) == ("failed", None, "render")
    assert whole["url"] == "http://127.0.0.1:8000/v1/jobs/shapes/images/4/content?run=0a1b2c3d"


def test_images_are_told_as_they_land_and_the_end_when_it_comes(tmp_path: Path) -> None:
    async def main(farm: FarmAtRest) -> Reader:
        farm.progresses["shapes"] = progress(done=4)
        plan = farm.ledger.plan("shapes")
        reader = Reader(farm, "shapes")
        await reader.until(lambda one: one.images == [0, 1, 2, 3])
        commit_shard(farm.ledger, plan, 2)  # the last before the one before it
        farm.progresses["shapes"] = progress(done=6)
        await reader.until(lambda one: one.images == [0, 1, 2, 3, 8, 9])
        assert reader.events[-1].id == "0a1b2c3d.1.1-2"
        commit_shard(farm.ledger, plan, 1)
        farm.progresses["shapes"] = progress("finalising", done=10)
        await reader.until(lambda one: len(one.images) == 10)
        finalise(farm.ledger, plan, 1)
        farm.progresses["shapes"] = progress("done", done=10)
        await reader.ended()
        return reader

    reader = watched(tmp_path, main, shards=1)
    assert [state["state"] for state in reader.of("state")] == ["running", "finalising", "done"]
    assert [(one["done"], one["live"]) for one in reader.of("progress")] == [
        (4, True),
        (6, True),
        (10, True),
        (10, False),
    ]
    assert sorted(reader.images) == list(range(10))
    assert reader.of("end") == [{"job": "shapes", "state": "done"}]


def test_a_reader_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    async def main(farm: FarmAtRest) -> tuple[Reader, Reader]:
        first = Reader(farm, "shapes", last_event_id="0a1b2c3d.1.0-1")
        second = Reader(farm, "shapes", last_event_id="0a1b2c3d.1.3")
        await first.ended()
        await second.ended()
        return first, second

    first, second = watched(tmp_path, main)
    assert first.images == [0, 1, 2, 3, 8, 9]
    assert second.images == []
    assert second.of("end") == [{"job": "shapes", "state": "done"}]


def test_a_last_event_id_that_is_none_is_refused(tmp_path: Path) -> None:
    make_job(tmp_path / "store")
    farm = FarmAtRest(tmp_path)
    for value in ("x", "0a1b2c3d", "1", "a" * 5000):
        answer = asking(
            farm,
            lambda client, value=value: client.get("/v1/jobs/shapes/events", headers={"last-event-id": value}),
        )
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "request")
    answer = asking(farm, lambda client: client.get("/v1/jobs/shapes/events", params={"images": "some"}))
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "images")


def test_of_no_images_or_only_new_ones_is_told_where_asked_for(tmp_path: Path) -> None:
    async def main(farm: FarmAtRest) -> tuple[Reader, Reader]:
        farm.progresses["shapes"] = progress(done=4)
        none, new = Reader(farm, "shapes", query="images=none"), Reader(farm, "shapes", query="images=new")
        await none.until(lambda one: one.of("state"))
        await new.until(lambda one: one.of("state"))
        plan = farm.ledger.plan("shapes")
        for shard in (1, 2):
            commit_shard(farm.ledger, plan, shard)
        finalise(farm.ledger, plan, 1)
        farm.progresses["shapes"] = progress("done", done=10)
        await none.ended()
        await new.ended()
        return none, new

    none, new = watched(tmp_path, main, shards=1)
    assert none.images == []
    assert none.of("end")
    assert new.images == [4, 5, 6, 7, 8, 9]


def test_images_of_later_passes_and_runs_are_told_too(tmp_path: Path) -> None:
    async def main(farm: FarmAtRest) -> Reader:
        plan = farm.ledger.plan("shapes")
        farm.ledger.open_pass(plan, 2, farm.ledger.failed_indexes(plan))
        render_pass(farm.ledger, plan, 2)
        second = make_plan(rows=1, run="ffff0000").model_copy(update={"appended_to": plan.run})
        farm.ledger.create_plan(second, 2)
        render_pass(farm.ledger, second, 1)
        reader = Reader(farm, "shapes")
        await reader.ended()
        return reader

    reader = watched(tmp_path, main, failed={3, 9})
    told = [(image["run"], image["pass_number"], image["index"]) for image in reader.of("image")]
    assert told[10:] == [("0a1b2c3d", 2, 3), ("0a1b2c3d", 2, 9), ("ffff0000", 1, 0), ("ffff0000", 1, 1)]
    assert reader.events[-2].id == "0a1b2c3d.2.1;ffff0000.1.1"


def test_a_reader_that_goes_away_ends_its_stream(tmp_path: Path) -> None:
    async def main(farm: FarmAtRest) -> int:
        farm.progresses["shapes"] = progress(done=4)
        reader = Reader(farm, "shapes")
        await reader.until(lambda one: len(one.images) == 4)
        assert farm.app.state.job_room.streams == 1
        reader.leave()
        await reader.ended()
        return int(farm.app.state.job_room.streams)

    assert watched(tmp_path, main, shards=1) == 0


def test_nothing_is_read_for_a_reader_that_does_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farm.server.events.SLICE", 1)

    async def main(farm: FarmAtRest) -> tuple[int, Reader]:
        farm.progresses["shapes"] = progress(done=10)
        reader = Reader(farm, "shapes")
        await reader.until(lambda one: one.of("state"))
        reader.reads.clear()
        await asyncio.sleep(0.05)
        taken = reader.bytes
        await asyncio.sleep(0.1)
        assert reader.bytes == taken
        reader.reads.set()
        farm.progresses["shapes"] = progress("done", done=10)
        await reader.ended()
        return taken, reader

    taken, reader = watched(tmp_path, main)
    assert taken < reader.bytes
    assert reader.images == list(range(10))


def test_a_reader_that_takes_nothing_for_long_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farm.server.events.SEND_S", 0.05)

    async def main(farm: FarmAtRest) -> int:
        farm.progresses["shapes"] = progress(done=4)
        reader = Reader(farm, "shapes")
        await reader.until(lambda one: one.of("state"))
        reader.reads.clear()
        farm.progresses["shapes"] = progress(done=5)
        await reader.ended()
        assert not reader.whole
        return int(farm.app.state.job_room.streams)

    assert watched(tmp_path, main, shards=1) == 0


def test_a_long_stream_ends_between_shards_and_is_taken_up_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("farm.server.events.STREAM_BYTES", 1000)
    monkeypatch.setattr("farm.server.events.SLICE", 3)

    async def main(farm: FarmAtRest) -> tuple[list[int], int]:
        images, rounds, last = [], 0, ""
        while True:
            rounds += 1
            reader = Reader(farm, "shapes", **({"last_event_id": last} if last else {}))
            await reader.ended()
            images += reader.images
            last = [event.id for event in reader.events if event.id][-1] if reader.images else last
            if reader.of("end"):
                return images, rounds
            assert reader.text.endswith(": more follows; ask again with Last-Event-ID\n\n")

    images, rounds = watched(tmp_path, main)
    assert images == list(range(10))
    assert rounds == 4


def test_too_many_streams_are_told_to_come_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farm.server.events.STREAMS", 1)

    async def main(farm: FarmAtRest) -> tuple[Reader, Reader]:
        farm.progresses["shapes"] = progress(done=4)
        first = Reader(farm, "shapes")
        await first.until(lambda one: one.of("state"))
        second = Reader(farm, "shapes")
        await second.ended()
        first.leave()
        await first.ended()
        return first, second

    first, second = watched(tmp_path, main, shards=1)
    assert (first.status, second.status) == (200, 503)
    assert second.headers["retry-after"] == "5"


def test_a_dispatcher_that_is_away_ends_no_stream(tmp_path: Path) -> None:
    async def main(farm: FarmAtRest) -> Reader:
        farm.progresses["shapes"] = progress(done=4)
        reader = Reader(farm, "shapes")
        await reader.until(lambda one: len(one.images) == 4)
        farm.away = True
        await reader.until(lambda one: one.of("progress")[-1]["live"] is False)
        plan = farm.ledger.plan("shapes")
        for shard in (1, 2):
            commit_shard(farm.ledger, plan, shard)
        finalise(farm.ledger, plan, 1)
        await reader.ended()
        return reader

    reader = watched(tmp_path, main, shards=1)
    assert reader.images == list(range(10))
    assert [state["state"] for state in reader.of("state")] == ["running", "open", "done"]


def test_a_store_that_is_away_ends_no_stream(tmp_path: Path) -> None:
    class Shaky(LocalStore):
        away = False

        def list(self, prefix: str, *, after: str = ""):
            if self.away:
                raise StoreUnavailableError("the store\ndoes not answer")
            return super().list(prefix, after=after)

    async def main(farm: FarmAtRest) -> Reader:
        farm.progresses["shapes"] = progress(done=4)
        reader = Reader(farm, "shapes")
        await reader.until(lambda one: len(one.images) == 4)
        store.away = True
        await reader.until(lambda one: ": the store does not answer\n\n" in one.text)
        store.away = False
        plan = farm.ledger.plan("shapes")
        for shard in (1, 2):
            commit_shard(farm.ledger, plan, shard)
        finalise(farm.ledger, plan, 1)
        farm.progresses["shapes"] = progress("done", done=10)
        await reader.ended()
        return reader

    make_job(tmp_path / "store", shards=1)
    store = Shaky(tmp_path / "store")
    reader = watched(tmp_path, main, farm=FarmAtRest(tmp_path, store=store))
    assert reader.images == list(range(10))


def test_a_job_that_is_deleted_meanwhile_ends_its_streams(tmp_path: Path) -> None:
    async def main(farm: FarmAtRest) -> Reader:
        farm.progresses["shapes"] = progress(done=4)
        reader = Reader(farm, "shapes")
        await reader.until(lambda one: len(one.images) == 4)
        delete_job(farm.ledger, "shapes", at="2026-11-18T11:06:40+00:00", by="me", stop_s=0.0)
        farm.progresses.clear()
        await reader.ended()
        return reader

    assert watched(tmp_path, main, shards=1).of("end") == [{"job": "shapes", "state": "deleted"}]


def test_a_job_made_anew_under_its_name_is_another(tmp_path: Path) -> None:
    async def main(farm: FarmAtRest) -> Reader:
        farm.progresses["shapes"] = progress(done=4)
        reader = Reader(farm, "shapes")
        await reader.until(lambda one: len(one.images) == 4)
        delete_job(farm.ledger, "shapes", at="2026-11-18T11:06:40+00:00", by="me", stop_s=0.0)
        Ledger(farm.ledger.store).create_plan(make_plan(run="dddddddd"), 1)
        await reader.ended()
        return reader

    assert watched(tmp_path, main, shards=1).of("end") == [{"job": "shapes", "state": "deleted"}]


def test_silence_is_broken_by_a_comment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farm.server.events.HEARTBEAT_S", 0.01)

    async def main(farm: FarmAtRest) -> Reader:
        farm.progresses["shapes"] = progress("paused", done=4)
        reader = Reader(farm, "shapes")
        await reader.until(lambda one: one.text.count(": \n\n") >= 2)
        reader.leave()
        await reader.ended()
        return reader

    assert [event.kind for event in watched(tmp_path, main, shards=1).events] == ["progress", "state", *["image"] * 4]


def test_many_who_watch_ask_the_farm_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farm.server.jobroom.PROGRESS_S", 60.0)
    asked = 0

    class Counting(FarmAtRest):
        async def progress(self, job: str):
            nonlocal asked
            asked += 1
            await asyncio.sleep(0.01)
            return await super().progress(job)

    async def main(farm: FarmAtRest) -> None:
        farm.progresses["shapes"] = progress(done=4)
        readers = [Reader(farm, "shapes", query="images=none") for _ in range(50)]
        for reader in readers:
            await reader.until(lambda one: one.of("state"))
            reader.leave()
            await reader.ended()

    make_job(tmp_path / "store", shards=1)
    watched(tmp_path, main, farm=Counting(tmp_path))
    assert asked == 1


def test_bounds_are_what_they_should_be() -> None:
    assert events.STREAMS == 1000
    assert events.STREAM_BYTES == 16 * 2**20


def test_a_job_is_submitted_rendered_and_watched_over_a_socket(tmp_path: Path) -> None:
    async def main() -> tuple[list[str], list[int], bytes]:
        async with FarmInProcess(tmp_path) as farm, farm.live() as client:
            manifest = {"model": "sketch", "prompts": ["a red square", "a blue circle"], "seeds": {"count": 2}}
            submitted = await client.put("/v1/jobs/captions", json=manifest)
            assert submitted.status_code == 201, submitted.text
            kinds, images = [], []
            async with client.stream("GET", "/v1/jobs/captions/events") as stream:
                async for line in stream.aiter_lines():
                    if line.startswith("event: "):
                        kinds.append(line.removeprefix("event: "))
                    elif line.startswith("data: ") and kinds[-1] == "image":
                        images.append(json.loads(line.removeprefix("data: ")))
            picture = await client.get(images[0]["url"])
            assert (await client.get("/v1/jobs/captions")).json()["state"] == "done"
            assert (await client.get("/v1/jobs/captions/sheet")).headers["content-type"] == "image/png"
            return kinds, [image["index"] for image in images], picture.content

    kinds, images, picture = asyncio.run(main())
    assert sorted(images) == [0, 1, 2, 3]
    assert kinds[-1] == "end"
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
