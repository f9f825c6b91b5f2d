"""Follow a job's events over connections that may break: where to go on, how long to wait, when it has ended. Pure.

A broken stream is opened again behind the last shard that was told whole. The farm tells of a shard begun from its start, so
what came of it before is left out here: no image is lost and none comes twice.
"""

import json

import httpx2

from farm.client.address import Address
from farm.client.answers import Event, strange
from farm.client.attempts import error_of_answer, fault_of, retry_after, unanswered

SILENT_S = 60.0
"""A farm says at least that it lives more often than this; a stream without a byte for so long is taken for broken."""
LONGEST_S = 8.0
FIRST_S = 0.25
MAX_EVENT_BYTES = 4 * 2**20
_Told = tuple[object, object, object]
"""Run, pass and index of an image."""
_AGAIN = frozenset({429, 502, 503, 504})


class Watch:
    """One job, followed. `now` is monotonic, seconds; a farm that is away for `patience_s` is given up."""

    def __init__(self, address: Address, *, patience_s: float, now: float):
        self.ended = False
        self._address = address
        self._patience_s = patience_s
        self._heard = now
        self._tries = 0
        self._last_id = ""
        self._broken: httpx2.TransportError | None = None
        self._told: set[_Told] = set()
        self._told_before: set[_Told] = set()

    @property
    def headers(self) -> dict[str, str]:
        """What the next request carries: where to go on from."""
        going_on = {"last-event-id": self._last_id} if self._last_id else {}
        return {"accept": "text/event-stream", "cache-control": "no-store"} | going_on

    def take(self, sent: httpx2.ServerSentEvent, *, now: float) -> Event | None:
        """Return what an event says; None for one without words."""
        self._heard, self._tries, self._broken = now, 0, None
        if sent.id and sent.id != self._last_id:
            self._last_id = sent.id
            self._told.clear()
        if not sent.data:
            return None
        try:
            data = json.loads(sent.data)
        except ValueError as exc:
            raise strange(self._address.url, "an event that is no JSON") from exc
        if not isinstance(data, dict):
            raise strange(self._address.url, "an event that is no JSON object")
        if sent.event == "error":
            error = data.get("error", data)
            raise error_of_answer(httpx2.Response(500, content=json.dumps({"error": error}).encode()), self._address)
        self.ended = self.ended or sent.event == "end"
        if sent.event == "image" and self._again((data.get("run"), data.get("pass_number"), data.get("index"))):
            return None
        return Event(sent.event, data, sent.id)

    def broke(self, exc: httpx2.TransportError | None, *, now: float, chance: float) -> float:
        """Return the seconds until the stream is opened again. Raises FarmUnavailableError where that is of no use.

        `exc`: None where the farm ended the stream before the job had.
        """
        self._broken = exc or self._broken
        self._told_before |= self._told
        self._told.clear()
        wait = self._pause(chance)
        if (exc is not None and fault_of(exc) is not None) or now + wait - self._heard > self._patience_s:
            gone = self._broken or httpx2.RemoteProtocolError("the stream of events ends again and again")
            raise unanswered(gone, self._address, may_have_happened=False) from exc
        return wait

    def refused(self, response: httpx2.Response, *, now: float, chance: float) -> float:
        """Return the seconds until a refused stream is asked for again, or raise what the farm raised."""
        asked = retry_after(response)
        wait = self._pause(chance) if asked is None else asked
        if response.status_code not in _AGAIN or now + wait - self._heard > self._patience_s:
            raise error_of_answer(response, self._address)
        return wait

    def _again(self, image: "_Told") -> bool:
        """Whether an image was told before the stream broke."""
        if image in self._told_before:
            self._told_before.remove(image)
            return True
        self._told.add(image)
        return False

    def _pause(self, chance: float) -> float:
        self._tries += 1
        return min(LONGEST_S, FIRST_S * 2.0 ** (self._tries - 1)) * (0.5 + 0.5 * chance)
