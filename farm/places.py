"""Where urgent images are drawn: which renderers draw a request's portions, how long they wait, when there is no room.

Rules and bookkeeping without clock, network or storage: `now` is monotonic seconds. A seat lasts until it is left, its
renderer ends, or its gateway falls silent; all of it is forgotten with the process, and renderers draw on regardless.
"""

import heapq
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from farm.errors import RequestError
from farm.portion import SEAT_S, Entry, Placing, Refusal, Seat, SeatEnd

UNKNOWN_STEP_S = 0.5
"""What a denoising step is taken to take before one of the model was measured."""
STEP_MEMORY = 0.3
"""Weight of the newest portion in a model's mean seconds a step."""
URGENT_SHARE = 0.8
"""Share of a device that urgent images get beside a shard; the rest keeps the shard going."""
ENTRIES_KEPT_S = 60.0
"""How long a given answer is kept after its last seat was left, for a question that is repeated late; and for how long one
that was given up before it was heard gets no seats."""
ENTRIES_KEPT = 20_000
"""With so many of them kept, what is left and not known is not remembered."""
RETRY_S = 1.0
"""The shortest time after which asking again is worth while."""
UNFIT_S = 300.0
"""For how long images of a model are kept from a renderer that cannot draw it; its card may change meanwhile."""
DOUBT_S = 5.0
"""For how long images that lost their renderer are kept from one that lost a seat."""
RENDERER_START_S = 15.0
"""What a renderer is taken to need until it has started."""


@dataclass(frozen=True, slots=True)
class Place:
    """A renderer that urgent images may go to. `busy`: it has a shard; `load_s`: seconds until it has the model."""

    renderer: str
    incarnation: str
    busy: bool
    load_s: float


@dataclass(slots=True)
class Seated:
    """A seat that was given out. `due_at`: when its images should be drawn; `held_at`: when its gateway last needed it."""

    seat: Seat
    entry: Entry
    steps: float
    given_at: float
    held_at: float
    due_at: float


@dataclass(slots=True)
class _Answered:
    """`open`: the tokens of its seats that are not left."""

    placing: Placing
    open: set[str]
    left_at: float = 0.0


class Places:
    """The seats of a farm that takes up to `capacity` urgent images at a time."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.waiting = 0
        self._seats: dict[str, Seated] = {}
        self._answers: dict[str, _Answered] = {}
        self._left: OrderedDict[str, None] = OrderedDict()
        self._of: dict[str, set[str]] = {}
        self._doubted_at: dict[str, float] = {}
        self._step_s: dict[str, float] = {}
        self._unfit_at: dict[tuple[str, str, str], float] = {}

    # Coming and going

    def answer_to(self, token: str) -> Placing | None:
        """The answer that a question with this token was given, if it was given seats lately; a refusal, if it was left
        before it was heard."""
        known = self._answers.get(token)
        return known.placing if known else None

    def enter(self, entry: Entry, places: Sequence[Place], *, now: float) -> Placing:
        """Give seats for all images of an entry that has none, or refuse. Raises RequestError where they can never fit.

        Images that were accepted before (`again`) are not refused for want of room.
        """
        if entry.images > self.capacity:
            raise RequestError(
                f"{entry.images} images at once are more than this farm takes, which is {self.capacity}; ask for fewer"
            )
        over = self.waiting + entry.images - self.capacity
        if over > 0 and not entry.again:
            after = self._freed_s(self._seats.values(), over, now)
            return Placing(
                refusal=Refusal("busy", f"{self.waiting} images wait already, of {self.capacity} that may", after)
            )
        if not places:
            return Placing(refusal=Refusal("no_renderer", "no renderer is there to draw it", RENDERER_START_S))
        places = [one for one in places if not self._is_unfit(one, entry.model, now)] or places
        if entry.again:
            places = [one for one in places if now - self._doubted_at.get(one.renderer, -DOUBT_S) >= DOUBT_S] or places
        waits = {place.renderer: self.backlog_s(place.renderer) for place in places}
        has = {place.renderer for place in places if self._will_have(place, entry.model)}
        shares = split(
            entry.images, places, waits=waits, has=has, image_s=self.steps_s(entry.model, entry.steps) / entry.images
        )
        seats = []
        for number, (place, images) in enumerate(shares):
            seat = Seat(f"{entry.token}-{number}", place.renderer, images, place.incarnation)
            steps = entry.steps * images / entry.images
            draw_s = _draw_s(place, self.steps_s(entry.model, steps))
            due_at = now + _start_s(place, waits, has) + draw_s
            self._put(Seated(seat, entry, steps, given_at=now, held_at=now, due_at=due_at))
            seats.append(seat)
        placing = Placing(tuple(seats), wait_s=min(_start_s(place, waits, has) for place, _ in shares))
        self._answers[entry.token] = _Answered(placing, {seat.token for seat in seats})
        return placing

    def leave(self, token: str, *, seconds: float, end: SeatEnd = "done", now: float) -> tuple[Seated, ...]:
        """Give a seat back, or all of an entry's; returns what was given back.

        `seconds`: measured on the device. What is not known may be an entry that was given up while the dispatcher was away, and
        whose question is still on its way here.
        """
        left = [seated for one in self._tokens(token) if (seated := self._take(one, now)) is not None]
        for seated in left:
            seat = seated.seat
            if end == "lost":
                self._doubted_at[seat.renderer] = now
            elif end == "unfit":
                self._unfit_at[seat.renderer, seat.incarnation, seated.entry.model] = now
            elif seconds > 0 and len(left) == 1:
                self._measured(seated, seconds)
        if not left and token not in self._answers and len(self._left) < ENTRIES_KEPT:
            gone = Refusal("busy", "this was given up before it was heard", RETRY_S)
            self._answers[token] = _Answered(Placing(refusal=gone), set(), left_at=now)
            self._left[token] = None
        return tuple(left)

    def hold(self, tokens: Iterable[str], *, now: float) -> None:
        """Keep seats, or all of an entry's; those that are not known are passed over."""
        for token in tokens:
            for one in self._tokens(token):
                self._seats[one].held_at = now

    def expire(self, *, now: float, late: float = 0.0) -> tuple[Seated, ...]:
        """End the seats whose gateway is silent. `late`: seconds for which this process stood still, and heard nobody."""
        gone = []
        for seated in self._seats.values():
            seated.held_at = min(seated.held_at + late, now)
            if now - seated.held_at > SEAT_S:
                gone.append(seated)
        for seated in gone:
            self._take(seated.seat.token, now)
        while self._left and now - self._answers[token := next(iter(self._left))].left_at > ENTRIES_KEPT_S:
            del self._left[token], self._answers[token]
        return tuple(gone)

    def lost(self, renderer: str, *, incarnation: str | None = None, now: float) -> tuple[Seated, ...]:
        """End a renderer's seats, its process being gone; with `incarnation` only those of others of its processes."""
        for known in [key for key in self._unfit_at if key[0] == renderer and key[1] != incarnation]:
            del self._unfit_at[known]
        tokens = [
            token
            for token in self._of.get(renderer, ())
            if incarnation is None or self._seats[token].seat.incarnation != incarnation
        ]
        return tuple(seated for token in tokens if (seated := self._take(token, now)) is not None)

    # Looking

    @property
    def seats(self) -> int:
        """How many seats are given out."""
        return len(self._seats)

    def images_of(self, renderer: str) -> int:
        """Images that a renderer has seats for."""
        return sum(self._seats[token].seat.images for token in self._of.get(renderer, ()))

    def images_by(self, key: str) -> int:
        """Images that a key has seats for."""
        return sum(seated.seat.images for seated in self._seats.values() if seated.entry.key == key)

    def freed_s(self, key: str, images: int, *, now: float) -> float:
        """Seconds until so many of a key's images should be drawn."""
        return self._freed_s((one for one in self._seats.values() if one.entry.key == key), images, now)

    def age_s(self, *, now: float) -> float:
        """For how long the oldest seat has been given out; 0 without any."""
        return max((now - seated.given_at for seated in self._seats.values()), default=0.0)

    def backlog_s(self, renderer: str) -> float:
        """Device seconds that a renderer's seats are expected to take, from their beginning."""
        seats = (self._seats[token] for token in self._of.get(renderer, ()))
        return sum(self.steps_s(seated.entry.model, seated.steps) for seated in seats)

    def wait_s(self, place: Place, model: str) -> float:
        """Seconds until a renderer should begin an image of a model that is asked for now."""
        has = {place.renderer} if self._will_have(place, model) else set()
        wait = _start_s(place, {place.renderer: self.backlog_s(place.renderer)}, has)
        return wait + (self._step_s.get(model, 0.0) if place.busy else 0.0)

    def steps_s(self, model: str, steps: float) -> float:
        """Device seconds that so many steps of a model are expected to take."""
        return self._step_s.get(model, UNKNOWN_STEP_S) * max(steps, 1.0)

    # Inside

    def _will_have(self, place: Place, model: str) -> bool:
        """Whether a renderer has a model, or loads it for a seat."""
        return place.load_s == 0 or any(
            self._seats[token].entry.model == model for token in self._of.get(place.renderer, ())
        )

    def _is_unfit(self, place: Place, model: str, now: float) -> bool:
        """Whether this very process could not draw a model lately."""
        found = self._unfit_at.get((place.renderer, place.incarnation, model))
        return found is not None and now - found < UNFIT_S

    def _put(self, seated: Seated) -> None:
        seat = seated.seat
        self._seats[seat.token] = seated
        self._of.setdefault(seat.renderer, set()).add(seat.token)
        self.waiting += seat.images

    def _take(self, token: str, now: float) -> Seated | None:
        seated = self._seats.pop(token, None)
        if seated is None:
            return None
        of = self._of[seated.seat.renderer]
        of.discard(token)
        if not of:
            del self._of[seated.seat.renderer]
        self.waiting -= seated.seat.images
        answered = self._answers[seated.entry.token]
        answered.open.discard(token)
        if not answered.open:
            answered.left_at = now
            self._left[seated.entry.token] = None
        return seated

    def _tokens(self, token: str) -> tuple[str, ...]:
        """The open seats that a token names: one, or all of an entry."""
        if token in self._seats:
            return (token,)
        answered = self._answers.get(token)
        return tuple(answered.open) if answered else ()

    def _measured(self, seated: Seated, seconds: float) -> None:
        each, model = seconds / max(seated.steps, 1.0), seated.entry.model
        known = self._step_s.get(model)
        self._step_s[model] = each if known is None else known + STEP_MEMORY * (each - known)

    def _freed_s(self, seats: Iterable[Seated], images: int, now: float) -> float:
        """Seconds until so many images of these seats should be drawn."""
        due_at = now
        for seated in sorted(seats, key=lambda one: one.due_at):
            due_at = seated.due_at
            images -= seated.seat.images
            if images <= 0:
                break
        return max(due_at - now, RETRY_S)


def split(
    images: int, places: Sequence[Place], *, waits: dict[str, float], has: set[str], image_s: float
) -> list[tuple[Place, int]]:
    """Share images out so that the last is drawn soonest. `waits`: a renderer's backlog; `has`: renderers with the model.

    A further renderer loads the model only where that saves more than the load takes, since it is in a shard's way too.
    Equal ones: first those without a shard, then those named first.
    """
    home = min(places, key=lambda one: (_start_s(one, waits, has) + _draw_s(one, image_s), one.busy))
    loads = {one.renderer for one in places if one.renderer not in has and one is not home}
    order = [
        (_start_s(one, waits, has) + one.load_s * (one.renderer in loads) + _draw_s(one, image_s), one.busy, number)
        for number, one in enumerate(places)
    ]
    heapq.heapify(order)
    counts: dict[int, int] = {}
    for _ in range(images):
        ends, busy, number = order[0]
        counts[number] = counts.get(number, 0) + 1
        heapq.heapreplace(order, (ends + _draw_s(places[number], image_s), busy, number))
    return [(places[number], count) for number, count in sorted(counts.items())]


def _start_s(place: Place, waits: dict[str, float], has: set[str]) -> float:
    """Seconds until a renderer begins with a model's first image; beside a shard it goes slower, and loads there and back."""
    load_s = 0.0 if place.renderer in has else place.load_s * (1 + place.busy)
    return waits[place.renderer] / _share(place) + load_s


def _draw_s(place: Place, image_s: float) -> float:
    return image_s / _share(place)


def _share(place: Place) -> float:
    return URGENT_SHARE if place.busy else 1.0
