"""Events over connections that break: none is lost, none comes twice, and a farm that stays away is given up."""

import httpx2
import pytest

from farm.client.address import checked
from farm.client.answers import Event
from farm.client.watching import Watch
from farm.errors import BusyError, FarmUnavailableError, UnknownJobError

ADDRESS = checked("http://127.0.0.1:8000", None)


def sent(kind: str, data: str, id: str = "") -> httpx2.ServerSentEvent:
    return httpx2.ServerSentEvent(event=kind, data=data, id=id)


def image(index: int, id: str = "") -> httpx2.ServerSentEvent:
    return sent("image", f'{{"run": "a", "pass_number": 1, "index": {index}}}', id)


def watch() -> Watch:
    return Watch(ADDRESS, patience_s=60.0, now=0.0)


def indexes(events: list[Event | None]) -> list[int]:
    return [event.data["index"] for event in events if event is not None]


def test_a_stream_goes_on_behind_the_last_shard_that_was_whole() -> None:
    watching = watch()
    assert "last-event-id" not in watching.headers
    watching.take(sent("message", "", "a.1.3"), now=1.0)
    watching.broke(httpx2.ReadError("reset"), now=2.0, chance=1.0)
    assert watching.headers["last-event-id"] == "a.1.3"


def test_images_of_a_shard_that_broke_off_come_once() -> None:
    watching = watch()
    before = [watching.take(image(index), now=1.0) for index in (0, 1)]
    watching.broke(None, now=1.0, chance=1.0)
    other = [watching.take(image(8), now=2.0), watching.take(sent("message", "", "a.1.0-4"), now=2.0)]
    again = [watching.take(image(index, "a.1.0-4"), now=2.0) for index in (0, 1, 2)]
    assert indexes(before) == [0, 1]
    assert indexes(other) == [8]
    assert indexes(again) == [2]


def test_an_image_of_a_later_pass_is_another_one() -> None:
    watching = watch()
    watching.take(image(0), now=1.0)
    later = watching.take(sent("image", '{"run": "a", "pass_number": 2, "index": 0}'), now=1.0)
    assert later is not None


def test_the_end_ends_it_and_a_state_alone_does_not() -> None:
    watching = watch()
    watching.take(sent("state", '{"state": "done"}'), now=1.0)
    assert not watching.ended
    assert watching.take(sent("end", '{"state": "done"}'), now=1.0) == Event("end", {"state": "done"})
    assert watching.ended


def test_a_farm_that_stays_away_is_given_up() -> None:
    watching = watch()
    assert watching.broke(httpx2.ConnectError("refused"), now=10.0, chance=1.0) == 0.25
    assert watching.broke(httpx2.ConnectError("refused"), now=59.0, chance=1.0) == 0.5
    with pytest.raises(FarmUnavailableError, match=r"no farm answers at http://127\.0\.0\.1:8000"):
        watching.broke(httpx2.ConnectError("refused"), now=60.0, chance=1.0)


def test_whatever_is_heard_renews_the_patience() -> None:
    watching = watch()
    watching.take(sent("progress", "{}"), now=100.0)
    assert watching.broke(None, now=150.0, chance=1.0) == 0.25


def test_a_refusal_is_waited_out_or_raised() -> None:
    watching = watch()
    busy = httpx2.Response(503, headers={"retry-after": "4"}, json={"error": {"message": "full", "code": "busy"}})
    assert watching.refused(busy, now=1.0, chance=1.0) == 4.0
    with pytest.raises(BusyError, match="full"):
        watching.refused(busy, now=59.0, chance=1.0)
    unknown = httpx2.Response(404, json={"error": {"message": "no job named x", "code": "unknown_job"}})
    with pytest.raises(UnknownJobError, match="no job named x"):
        watching.refused(unknown, now=1.0, chance=1.0)


@pytest.mark.parametrize("data", ["{", "[1]", "3"])
def test_an_event_that_is_none_of_ours_is_an_error(data: str) -> None:
    with pytest.raises(FarmUnavailableError, match="answered with an event that is no JSON"):
        watch().take(sent("progress", data), now=1.0)
