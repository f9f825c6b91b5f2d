"""`GET /v1/jobs/{id}/events`: a job as it goes, as server-sent events.

    progress   how it stands, whenever that changed
    state      its state, whenever that changed
    image      a row of an image that landed, failed ones too; in the order in which shards land
    end        nothing follows by itself: the job is done, cancelled or deleted

An id stands behind the last image of each shard; sent back as `Last-Event-ID` it goes on from there, and an image that was
told before its shard was whole is told again. Slow readers cost no memory: nothing is read for them before they took what
came before, they are given up after SEND_S, and a long stream ends in between, to be taken up by the same header.
"""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query, Request
from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from farm.errors import BusyError, FarmError, ObjectMissingError, UnknownJobError
from farm.server.caller import Reader
from farm.server.errors import answers, told
from farm.server.jobroom import ENDED, JobName, JobRoom, LiveRecord, Roomed
from farm.server.landing import Landed, Position
from farm.server.links import base_url
from farm.server.rowrecord import Links, image_record
from farm.server.rows import DONE_S
from farm.server.services import Served

log = logging.getLogger(__name__)

router = APIRouter(tags=["jobs"])

STREAMS = 1000
"""Streams that a gateway has open at a time."""
STREAM_BYTES = 16 * 2**20
"""After so much a stream ends at the next shard; whoever reads it takes it up again."""
SEND_S = 60.0
"""A reader that takes nothing for so long is given up."""
LOOK_S = 0.5
QUIET_LOOK_S = 5.0
"""How often it is looked how the job stands; and for what landed, where nothing seems to have changed."""
HEARTBEAT_S = 15.0
"""After so much silence a comment is sent, so that nobody in between takes the stream for dead."""
SLICE = 100
"""Rows that are sent together."""
SHARDS = 16
"""Shards that are looked up together."""

_EXAMPLE = 'event: state\ndata: {"job": "captions", "state": "running"}\n\n'


@router.get(
    "/v1/jobs/{id}/events",
    summary="Watch a job",
    response_class=StreamingResponse,
    responses={
        **answers(404),
        200: {"description": "server-sent events", "content": {"text/event-stream": {"example": _EXAMPLE}}},
    },
)
async def events(
    id: JobName,
    request: Request,
    _caller: Reader,
    services: Served,
    room: Roomed,
    images: Annotated[
        Literal["all", "new", "none"],
        Query(description="tell of all images, of those that land from now on, or of none"),
    ] = "all",
    last_event_id: Annotated[
        str | None, Header(description="id of the last event that came, to go on after it")
    ] = None,
) -> StreamingResponse:
    """Watch a job until it ends."""
    if room.streams >= STREAMS:
        raise BusyError(f"{STREAMS} streams of events are open here; try again in some seconds", 5.0)
    position = Position.parse((last_event_id or "").strip())
    watched = await room.reading.run(_begin, room, id, position, skip=images == "new" and not last_event_id)
    links = Links(services.ledger.store, base_url(request, services.settings))
    return EventStream(_Watch(id, watched, room, position, links, with_images=images != "none"), room)


class _SlowError(Exception):
    """Raised where a reader takes nothing for SEND_S."""


class EventStream(StreamingResponse):
    """A stream that counts while it is open, and gives its reader up when nothing is taken for SEND_S."""

    media_type = "text/event-stream"

    def __init__(self, watch: "_Watch", room: JobRoom):
        super().__init__(watch.events(), headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        self._room = room

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._room.streams += 1
        try:
            await super().__call__(scope, receive, send)
        except _SlowError:
            # Without its end the answer is broken off, by which the reader knows that there is more.
            log.info("a reader of events took nothing for too long and is given up")
        finally:
            self._room.streams -= 1

    async def stream_response(self, send: Send) -> None:
        async def sent(message: Message) -> None:
            try:
                async with asyncio.timeout(SEND_S):
                    await send(message)
            except TimeoutError:
                raise _SlowError from None

        await super().stream_response(sent)


def _begin(room: JobRoom, job: str, position: Position, *, skip: bool) -> str:
    """The job's first run, which tells it from a later one of its name. Raises UnknownJobError."""
    plans = room.rows.plans(job)
    for plan in plans if skip else ():
        for landed in room.rows.landed([plan], position, most=2**31):
            position.tell(landed)
    return plans[0].run


@dataclass(slots=True)
class _Watch:
    """One reader's way through a job. Holds no rows while the reader takes some."""

    job: str
    first_run: str
    room: JobRoom
    position: Position
    links: Links
    with_images: bool
    _told: LiveRecord | None = None
    _sent: int = 0
    _between_shards: bool = True
    _quiet_since: float = 0.0
    _look_until: float = 0.0
    _looked: float = field(default=-QUIET_LOOK_S)

    async def events(self) -> AsyncIterator[bytes]:
        clock = asyncio.get_running_loop().time
        self._quiet_since = clock()
        yield b"retry: 1000\n\n"
        while True:
            try:
                found = await self.room.standings.of(self.job)
                changed = found != self._told
                ended = found.state in ENDED
                for event in self._standing(found):
                    self._quiet_since = clock()
                    yield event
                if changed:
                    self._look_until = clock() + 2 * DONE_S
                if self.with_images and (ended or clock() < self._look_until or clock() > self._looked + QUIET_LOOK_S):
                    self._looked = clock()
                    async for event in self._images(ended=ended):
                        self._quiet_since = clock()
                        yield event
                        self._sent += len(event)
                        if self._sent > STREAM_BYTES and self._between_shards:
                            yield b": more follows; ask again with Last-Event-ID\n\n"
                            return
                if ended:
                    yield _event("end", {"job": self.job, "state": found.state})
                    return
            except (UnknownJobError, ObjectMissingError):
                yield _event("end", {"job": self.job, "state": "deleted"})
                return
            except FarmError as exc:
                # The store or the farm may be back in a moment; the reader learns why it hears nothing.
                said = told(exc, store=self.links.store.url)
                yield f": {' '.join(said.split())[:500]}\n\n".encode()
                await asyncio.sleep(QUIET_LOOK_S)
            if clock() > self._quiet_since + HEARTBEAT_S:
                self._quiet_since = clock()
                yield b": \n\n"
            await asyncio.sleep(LOOK_S)

    def _standing(self, found: LiveRecord) -> list[bytes]:
        """What is to be told of how the job stands."""
        if found == self._told:
            return []
        before, self._told = self._told, found
        told = [_event("progress", {"job": self.job, **found.model_dump()})]
        if before is None or before.state != found.state:
            told.append(_event("state", {"job": self.job, "state": found.state, "message": found.message}))
        return told

    async def _images(self, *, ended: bool) -> AsyncIterator[bytes]:
        """Tell of the shards that landed, some rows at a time."""
        while True:
            landed = await self.room.reading.run(self._landed, ended)
            for one in landed:
                start: int | None = 0
                while start is not None:
                    told, start = await self.room.reading.run(self._slice, one, start)
                    self._between_shards = start is None
                    yield b"".join(told)
            if len(landed) < SHARDS:
                return

    def _slice(self, one: Landed, start: int) -> tuple[list[bytes], int | None]:
        """Some rows of a shard as events, and where the next ones begin, None after the last; that one has the id."""
        plan = self.room.rows.plan(self.job, one.run)
        rows = self.room.rows.receipt(plan, one.pass_number, one.shard).rows
        told = [
            _event("image", image_record(plan, row, self.links).model_dump()) for row in rows[start : start + SLICE]
        ]
        if start + SLICE < len(rows):
            return told, start + SLICE
        self.position.tell(one)
        told[-1] = f"id: {self.position}\n".encode() + told[-1]
        return told, None

    def _landed(self, ended: bool) -> list[Landed]:
        plans = self.room.rows.plans(self.job)
        if plans[0].run != self.first_run:
            raise UnknownJobError(f"{self.job} was deleted, and made anew")
        return self.room.rows.landed(plans, self.position, most=SHARDS, fresh=ended)


def _event(kind: str, data: dict[str, Any]) -> bytes:
    return f"event: {kind}\ndata: {json.dumps(data)}\n\n".encode()
