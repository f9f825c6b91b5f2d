"""The dispatcher's desk for urgent images: seats, quotas, renderers kept for them, and what all processes counted.

Gives answers and writes down what the renderers should be told; knows no Ray. One event loop owns it. A process that starts
anew knows no seats, and nobody's use of this minute: what was given before is drawn all the same.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from functools import partial

from farm import __version__
from farm.crew import Pool
from farm.devices import DeviceInfo
from farm.dispatch import Dispatch
from farm.errors import FarmUnavailableError, ObjectMissingError, RecordError, StoreError
from farm.jobwatch import Threads
from farm.meters import Meters
from farm.overview import Overview, set_gauges
from farm.places import Places, Seated
from farm.portion import SEAT_S, Allowance, Entry, Placing, PoolView, Refusal, SeatEnd
from farm.quota import QuotaDay, Quotas, key_of, read_day
from farm.reserve import Warmable, check, in_force, reserved, to_warm
from farm.settings import Reserve
from farm.singles import Singles
from farm.storage.base import ObjectStore
from farm.tally import Snapshot, Tallies

log = logging.getLogger(__name__)

QUOTAS_S = 5.0
"""How often quotas are written, if something changed."""
QUOTAS_START_S = 2.0
"""How long a start waits at most for what was used of today's quotas."""
WARM_AGAIN_S = 120.0
"""How long a renderer that was told to load a model is taken to be at it."""
SWEEP_S = 6 * 3600.0
"""How often single images that are past their time are removed."""
STOPPING_S = 10.0
"""When asking a farm that is being stopped again may find another."""


class FrontDesk:
    """Urgent images of the slots `names`. `capacity`: how many may wait at a time; `wall`: Unix seconds.

    Raises SettingsError for a rule of `reserve` that names an unknown time zone.
    """

    def __init__(
        self,
        dispatch: Dispatch,
        pool: Pool,
        store: ObjectStore,
        *,
        names: Sequence[str],
        capacity: int,
        reserve: Sequence[Reserve],
        meters: Meters,
        threads: Threads,
        wall: Callable[[], float],
    ):
        check(reserve)
        self.places = Places(capacity)
        self.overview = Overview(dispatch.board, self.places, names)
        self.stopping = False
        self._dispatch = dispatch
        self._pool = pool
        self._store = store
        self._names = names
        self._reserve = reserve
        self._meters = meters
        self._threads = threads
        self._wall = wall
        self._quotas = Quotas()
        self._tallies = Tallies(began_at=wall())
        self._gateways: dict[str, float] = {}
        self._machine: DeviceInfo | None = None
        self._warmed: dict[str, tuple[str, str, float]] = {}

    # Gateways

    def enter(self, entry: Entry, *, now: float, greeting: bool, trouble: str | None) -> Placing:
        """Give seats, or refuse. Raises RequestError where the images can never fit, and FarmUnavailableError while renderers
        that live have still to say hello (`greeting`). `trouble`: why no renderer can be started."""
        known = self.places.answer_to(entry.token)
        if known is not None:
            return known
        placing = self._placed(entry, now=now, greeting=greeting, trouble=trouble)
        if placing.refusal is not None:
            self._meters.count("farm_refusals_total", code=placing.refusal.code)
        elif not entry.again:
            self._quotas.take(entry.key, entry.allowance, entry.images, now=now, wall=self._wall())
        return placing

    def leave(self, token: str, *, seconds: float, end: SeatEnd = "done", now: float) -> None:
        """Take a seat back, and charge the device time to its owner."""
        for seated in self.places.leave(token, seconds=seconds, end=end, now=now)[:1]:
            self._dispatch.charge(seated.entry.owner, max(seconds, 0.0))

    def hold(self, gateway: str, tokens: Sequence[str], snapshot: Snapshot, *, now: float) -> None:
        """Keep a gateway's seats, and what it counted."""
        self._gateways[gateway] = now
        self.places.hold(tokens, now=now)
        self.report(snapshot, now=now)

    def charge(self, key: str, allowance: Allowance, images: int) -> Refusal | None:
        """Count a job's images for the day."""
        refusal = self._quotas.day_refusal(key, allowance, images, wall=self._wall())
        if refusal is None:
            self._quotas.take_day(key, images, wall=self._wall())
        else:
            self._meters.count("farm_refusals_total", code=refusal.code)
        return refusal

    # Renderers

    def report(self, snapshot: Snapshot, *, now: float) -> None:
        """Take in what a process counted."""
        self._tallies.put(snapshot, now=now)

    def met(self, renderer: str, incarnation: str, *, now: float) -> None:
        """A renderer said hello: seats with another process of its name are gone, unless that one replaced it."""
        known = self._dispatch.board.renderers.get(renderer)
        if known is not None and known.incarnation == incarnation:
            self.places.lost(renderer, incarnation=incarnation, now=now)

    def lost(self, renderer: str, *, now: float) -> None:
        """A renderer's process ended: its seats go, and their gateways hear of it by themselves."""
        self.places.lost(renderer, now=now)
        self._tallies.gone(renderer)
        self._warmed.pop(renderer, None)

    def tick(self, *, now: float, late: float) -> None:
        """Let go of silent gateways' seats, keep renderers free and models loaded by the time of day.

        `late`: seconds for which this process stood still.
        """
        for seated in self.places.expire(now=now, late=late):
            self._expired(seated)
        for name in [name for name, heard_at in self._gateways.items() if now - heard_at > SEAT_S + late]:
            del self._gateways[name]
        self._quotas.forget(now=now)
        rule = in_force(self._reserve, self._wall())
        self._dispatch.reserve(reserved(rule, self._names), now=now)
        self._warm(rule, now)

    # Looking

    def pool(self, *, now: float) -> PoolView:
        """How the farm stands. What machine it has is remembered when no renderer is left to tell."""
        board, places = self._dispatch.board, self.places
        self._machine = next((one.machine for one in board.renderers.values() if one.machine), self._machine)
        return PoolView(
            version=__version__,
            store=self._store.url,
            renderers=self.overview.renderers(),
            machine=self._machine,
            waiting=places.waiting,
            capacity=places.capacity,
            load_s=board.queue.load_s(),
            wait_s=self.overview.wait_s(now=now),
        )

    def snapshots(self, own: Meters, *, now: float) -> tuple[Snapshot, ...]:
        """What all processes counted together, and the dispatcher's own."""
        gateways = len(self._gateways)
        set_gauges(own, self._dispatch, self.overview, gateways=gateways, now=now, wall=self._wall())
        farm = Snapshot("farm", own.incarnation, self._tallies.samples(now=now))
        return farm, own.snapshot()

    # Single images in the store

    async def sweep_singles(self) -> None:
        """Remove single images that are past their time, every SWEEP_S; pictures without a record are `farm gc`'s."""
        singles = Singles(self._store)
        while True:
            await asyncio.sleep(SWEEP_S)
            try:
                swept = await self._threads(partial(singles.sweep, now=self._wall(), before=0.0))
            except StoreError as exc:
                log.warning("single images not swept", extra={"reason": exc.message})
            else:
                log.info("single images swept", extra={"objects": swept.removed.objects})

    # Quotas in the store

    async def keep_quotas(self) -> None:
        """Write what keys used, every QUOTAS_S, for as long as this process lives."""
        while True:
            await asyncio.sleep(QUOTAS_S)
            await self.save_quotas()

    async def recall_quotas(self) -> None:
        """Read what was used of the day before this process."""
        for day in self._quotas.to_recall(self._wall()):
            try:
                used = read_day(await self._threads(lambda day=day: self._store.get(key_of(day))), day)  # type: ignore[misc]
            except ObjectMissingError:
                used = {}
            except RecordError as exc:
                log.error("quotas are counted anew", extra={"reason": exc.message})
                used = {}
            except StoreError as exc:
                log.warning("quotas not read", extra={"day": day, "reason": exc.message})
                continue
            self._quotas.recall(day, used)

    async def save_quotas(self) -> None:
        """Write the days that changed; where the store is away, the next round does."""
        await self.recall_quotas()
        for record in self._quotas.to_save():
            try:
                await self._threads(lambda record=record: self._put(record))  # type: ignore[misc]
            except StoreError as exc:
                log.warning("quotas not written", extra={"day": record.day, "reason": exc.message})
                return
            self._quotas.saved(record)

    # Inside

    def _placed(self, entry: Entry, *, now: float, greeting: bool, trouble: str | None) -> Placing:
        if self.stopping:
            return Placing(refusal=Refusal("stopping", "the farm is being stopped", STOPPING_S))
        refusal = None if entry.again else self._over_quota(entry, now)
        if refusal is not None:
            return Placing(refusal=refusal)
        places = self.overview.open_places(entry.model, now=now)
        if not places and greeting:
            raise FarmUnavailableError("the dispatcher has just started, and its renderers have not said hello yet")
        placing = self.places.enter(entry, places, now=now)
        if placing.refusal is not None and placing.refusal.code == "no_renderer":
            return Placing(refusal=self._no_renderer(placing.refusal, trouble))
        return placing

    def _over_quota(self, entry: Entry, now: float) -> Refusal | None:
        held = self.places.images_by(entry.key) if entry.allowance.images_at_once is not None else 0
        over = held + entry.images - (entry.allowance.images_at_once or 0)
        return self._quotas.refusal(
            entry.key,
            entry.allowance,
            entry.images,
            at_once=held,
            freed_s=self.places.freed_s(entry.key, over, now=now) if over > 0 else 0.0,
            now=now,
            wall=self._wall(),
        )

    def _no_renderer(self, refusal: Refusal, trouble: str | None) -> Refusal:
        board = self._dispatch.board
        if trouble is not None:
            why = f"no renderer can be started: {trouble}"
        elif board.renderers and all(name in board.drained for name in board.renderers):
            why = "every renderer is drained; resume one"
        else:
            why = "no renderer is there yet; one is being started"
        return Refusal("no_renderer", why, refusal.retry_after_s)

    def _expired(self, seated: Seated) -> None:
        seat = seated.seat
        log.warning(
            "seat given up, its gateway is silent", extra={"gateway": seated.entry.gateway, "token": seat.token}
        )
        self._meters.count("farm_seats_expired_total")
        self._pool.drop(seat.renderer, seat.token)

    def _warm(self, rule: Reserve | None, now: float) -> None:
        """Have models loaded where they should be; each renderer is told once in a while."""
        if rule is None or not rule.warm:
            return
        board = self._dispatch.board
        views = []
        for name in self._names:
            known = board.renderers.get(name)
            if known is None or name in board.drained:
                continue
            loaded = known.loaded
            model, incarnation, told_at = self._warmed.get(name, ("", "", 0.0))
            if incarnation == known.incarnation and now - told_at < WARM_AGAIN_S:
                loaded = model
            views.append(Warmable(name, loaded, not (known.held or self.overview.urgent(name))))
        for name, model in to_warm(rule, views, board.reserved):
            self._warmed[name] = (model, board.renderers[name].incarnation, now)
            self._pool.warm(name, model)

    def _put(self, record: QuotaDay) -> None:
        data = record.model_dump_json().encode()
        self._store.put(key_of(record.day), data, content_type="application/json")
