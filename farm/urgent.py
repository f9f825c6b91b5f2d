"""Urgent images that wait for a renderer's device: their order, and how much of the device's time they may have.

Images of one shape are drawn together, owners take turns, the oldest first. Knows no engine, no device and no clock: time
is an argument. Safe from several threads; they share one lock with the device's cores, so that nobody takes images without
a place to draw them in, nor a place without images.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import count

from farm.engine import Weights, weights_of
from farm.errors import CancelledError, FarmError
from farm.plan import ImageSpec
from farm.portion import Answer, Drawn, Portion

BULK_SHARE = 0.2
"""What of the device's seconds is left to shards, where a shard and urgent images want it at once."""
BURST_S = 10.0
"""Seconds that urgent images may take before that begins to count."""
LOOK = 4
"""So many times a batch is taken from the queue at once, since some may not share a batch once their tokens are known."""
GATHER_S = 0.03
GATHER_SHARE = 0.1
"""After a batch its clients are waited for, so long at most and for such a share of the batch's own seconds: who
draws in a loop is back by then. Without it whoever waits already is drawn alone, and the others again without him."""
DROPPED_KEPT = 10_000
"""Portions that were dropped before they came, and are refused when they do."""


class Share:
    """How many seconds urgent images may take from shards: BURST_S at first, and four for each that a shard has worked.

    So over any stretch of time in which shards want the device they have BULK_SHARE of it, but for the burst and the last
    batch begun.
    """

    def __init__(self, *, bulk: float = BULK_SHARE, burst_s: float = BURST_S):
        self._each = (1 - bulk) / bulk
        self._burst_s = burst_s
        self._left_s = burst_s

    def allows(self) -> bool:
        """Whether urgent images may take time from a shard now."""
        return self._left_s > 0

    def spent(self, seconds: float) -> None:
        """Urgent images took so many seconds while a shard wanted the device."""
        self._left_s -= seconds

    def worked(self, seconds: float) -> None:
        """A shard had the device for so many seconds."""
        self._left_s = min(self._burst_s, self._left_s + seconds * self._each)


@dataclass(eq=False, slots=True)
class InHand:
    """A portion in a renderer's hands, from its arrival to its answer. Times: monotonic seconds.

    `load_s`: loading its model took so long; `engine_s`: the time on the device of its batches, by its share of them.
    """

    portion: Portion
    arrived: float
    answer: Future[Answer] = field(default_factory=Future)
    begun: float | None = None
    load_s: float = 0.0
    engine_s: float = 0.0
    drawn: dict[int, Drawn] = field(default_factory=dict)

    @property
    def gone(self) -> bool:
        """Nobody waits for it any more: it was answered, dropped, or has failed."""
        return self.answer.done()


@dataclass(eq=False, slots=True)
class UrgentImage:
    """One image of a portion. `place`: which of the portion's; `number`: in order of arrival.

    `waits_for_batch`: it needs something that is not on the device within a step.
    """

    hand: InHand
    place: int
    number: int
    weights: Weights
    waits_for_batch: bool = False

    @property
    def spec(self) -> ImageSpec:
        """What to draw."""
        return self.hand.portion.specs[self.place]

    @property
    def owner(self) -> str:
        """Whose it is."""
        return self.hand.portion.owner

    @property
    def shape(self) -> tuple[Weights, int, int, int, float]:
        """What of it two images must share to be drawn together; their prompts' lengths are the engine's affair."""
        params = self.spec.params
        return self.weights, params.width, params.height, params.num_inference_steps, params.guidance_scale


class UrgentQueue:
    """The urgent images of one renderer. `changed` is notified whenever what waits has changed.

    `ticks` counts steps, loads and pictures: it only grows while there is progress.
    """

    def __init__(self, changed: threading.Condition, *, share: Share | None = None):
        self.changed = changed
        self._share = share or Share()
        self._hands: dict[str, InHand] = {}
        self._waiting: list[UrgentImage] = []
        self._turns: dict[str, int] = {}
        self._turn = count(1)
        self._numbers = count()
        self._gathering: tuple[int, float] = 0, 0.0
        self._closed: FarmError | None = None
        self._dropped: OrderedDict[str, None] = OrderedDict()
        self.ticks = 0

    def __len__(self) -> int:
        """Return how many images wait; cheap, and asked after every denoising step."""
        return len(self._waiting)

    @property
    def in_hand(self) -> int:
        """Images that wait, are being drawn or encoded."""
        return sum(len(hand.portion.specs) - len(hand.drawn) for hand in tuple(self._hands.values()))

    def put(self, portion: Portion, *, now: float) -> Future[Answer]:
        """Take in a portion; a token that is in hand already brings the same answer.

        Raises what `close` was given, and CancelledError for one that was dropped before it came.
        """
        weights = weights_of(portion.card, portion.numerics)
        with self.changed:
            if self._closed is not None:
                raise self._closed
            known = self._hands.get(portion.token)
            if known is not None:
                return known.answer
            if portion.token in self._dropped:
                raise CancelledError("the portion was dropped before it came")
            hand = self._hands[portion.token] = InHand(portion, now)
            hand.answer.set_running_or_notify_cancel()  # who waits for it may go without ending it for others
            for place in range(len(portion.specs)):
                self._waiting.append(UrgentImage(hand, place, next(self._numbers), weights))
            self.changed.notify_all()
            return hand.answer

    def drop(self, token: str) -> bool:
        """Let go of a portion: what waits is forgotten, what is drawn ends after its step.

        False for one not in hand; it may be on its way, and is refused then.
        """
        with self.changed:
            hand = self._hands.get(token)
            if hand is None:
                self._dropped[token] = None
                while len(self._dropped) > DROPPED_KEPT:
                    self._dropped.popitem(last=False)
            return self._end(hand, CancelledError("the portion was dropped"))

    def fail(self, weights: Weights, error: FarmError) -> None:
        """Fail all portions that wait to be drawn with these weights."""
        with self.changed:
            failed = {image.hand.portion.token: image.hand for image in self._waiting if image.weights == weights}
        for hand in failed.values():
            self._end(hand, error)

    def fail_hands(self, images: Iterable[UrgentImage], error: FarmError) -> None:
        """Fail the portions of some images."""
        for image in images:
            self._end(image.hand, error)

    def close(self, error: FarmError) -> None:
        """Fail everything in hand, and all that may come, with an error."""
        with self.changed:
            self._closed = error
            hands = tuple(self._hands.values())
            self.changed.notify_all()
        for hand in hands:
            self._end(hand, error)

    @property
    def closed(self) -> bool:
        """Nothing is taken in any more."""
        return self._closed is not None

    def _end(self, hand: InHand | None, error: FarmError) -> bool:
        with self.changed:
            if hand is None or hand.gone:
                return False
            self._forget(hand)
            hand.answer.set_exception(error)
            return True

    def _forget(self, hand: InHand) -> None:
        self._hands.pop(hand.portion.token, None)
        self._waiting = [image for image in self._waiting if image.hand is not hand]
        self.changed.notify_all()

    def next(self, weights: Weights | None = None, *, within_step: bool = False) -> UrgentImage | None:
        """Return the image whose turn it is, of those that these weights draw where some are named; it is not taken.

        `within_step`: pass over those that wait for the end of a batch.
        """
        with self.changed:
            fits = (
                image
                for image in self._waiting
                if (weights is None or image.weights == weights) and not (within_step and image.waits_for_batch)
            )
            return min(fits, key=lambda image: (self._turns.get(image.owner, 0), image.number), default=None)

    def take(self, weights: Weights, most: int, *, within_step: bool = False) -> list[UrgentImage]:
        """Take images of one shape that these weights draw, up to `most`: owners in turn, each one's oldest first.

        `within_step`: pass over those that wait for the end of a batch. `begun` those that are drawn, `put_back` the others.
        """
        with self.changed:
            fits = [
                image
                for image in self._waiting
                if image.weights == weights and not (within_step and image.waits_for_batch)
            ]
            if not fits:
                return []
            ordered = self._in_turn(fits)
            taken = [image for image in ordered if image.shape == ordered[0].shape][:most]
            away = set(map(id, taken))
            self._waiting = [image for image in self._waiting if id(image) not in away]
            return taken

    def _in_turn(self, images: Sequence[UrgentImage]) -> list[UrgentImage]:
        """Order images: who was served longest ago first, then one of each owner after the other."""
        rounds: dict[str, int] = {}
        keyed = []
        for image in images:
            nth = rounds[image.owner] = rounds.get(image.owner, -1) + 1
            keyed.append(((nth, self._turns.get(image.owner, 0), image.number), image))
        return [image for _, image in sorted(keyed, key=lambda pair: pair[0])]

    def put_back(self, images: Iterable[UrgentImage]) -> None:
        """Let images wait again where they stood."""
        with self.changed:
            self._waiting = sorted(
                (*self._waiting, *(image for image in images if not image.hand.gone)), key=lambda image: image.number
            )
            self.changed.notify_all()

    def begun(self, images: Iterable[UrgentImage], *, now: float) -> None:
        """These are being drawn: their owners' turns are over."""
        with self.changed:
            for image in images:
                self._turns[image.owner] = next(self._turn)
                if image.hand.begun is None:
                    image.hand.begun = now
            if not self._waiting:
                waiting = {image.owner for image in images}
                self._turns = {owner: turn for owner, turn in self._turns.items() if owner in waiting}

    def loaded(self, weights: Weights, seconds: float, *, now: float) -> None:
        """Loading a model took so long until now; whoever waited for these weights waited for that, or for its end."""
        with self.changed:
            self.ticks += 1
            for image in self._waiting:
                if image.weights == weights and image.hand.begun is None:
                    image.hand.load_s = min(seconds, now - image.hand.arrived)

    def progressed(self) -> int:
        """A step was done, or begun; returns the `ticks`."""
        with self.changed:
            self.ticks += 1
            return self.ticks

    def spent(self, images: Sequence[UrgentImage], seconds: float) -> None:
        """The device worked so long on these, each its share."""
        with self.changed:
            for image in images:
                image.hand.engine_s += seconds / len(images)

    def gather(self, images: int, *, most: int, batch_s: float, now: float) -> None:
        """A batch of so many images is done, in so many seconds; the next may have `most`."""
        with self.changed:
            enough = min(most, len(self._waiting) + images)
            self._gathering = enough, now + min(GATHER_S, GATHER_SHARE * batch_s)

    def gathers_s(self, *, now: float) -> float:
        """For how many seconds more images are worth waiting for; 0 once there are enough."""
        enough, until = self._gathering
        return max(0.0, until - now) if len(self._waiting) < enough else 0.0

    def settle(self, image: UrgentImage, drawn: Drawn, answer: Callable[[InHand], Answer]) -> None:
        """An image is ready, or has failed for good; the last one of its portion gives the answer."""
        hand = image.hand
        with self.changed:
            self.ticks += 1
            if hand.gone or image.place in hand.drawn:
                return
            hand.drawn[image.place] = drawn
            if len(hand.drawn) < len(hand.portion.specs):
                return
            self._forget(hand)
            hand.answer.set_result(answer(hand))

    # The share of the device's time

    def may_cut_in(self) -> bool:
        """Whether urgent images may take time from a shard that wants the device."""
        return bool(self._waiting) and self._share.allows()

    def charge(self, seconds: float) -> None:
        """Urgent images took seconds from a shard."""
        with self.changed:
            self._share.spent(seconds)

    def credit(self, seconds: float) -> None:
        """A shard had the device for some seconds."""
        with self.changed:
            self._share.worked(seconds)
            if self._waiting:
                self.changed.notify_all()
