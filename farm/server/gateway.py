"""A gateway's errands: bring the images of a request to renderers, and see to it that they come back or are put down.

Every seat that the dispatcher gave is given back, drawn or not, also when the one who asked has gone: by then the renderer
has been told to drop the portion, which frees its device within a denoising step.
"""

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from farm.errors import (
    BusyError,
    CancelledError,
    FarmError,
    FarmUnavailableError,
    LimitedError,
    RendererDiedError,
)
from farm.manifest import Output
from farm.meters import Meters
from farm.plan import ImageSpec
from farm.portion import HOLD_S, Allowance, Answer, Drawn, Entry, Placing, Portion, Refusal, Seat, SeatEnd
from farm.retry import RENDERER_CODES
from farm.server.cards import Ready
from farm.server.link import FarmLink

log = logging.getLogger(__name__)

T = TypeVar("T")

TRIES = 3
"""How often images are brought to another renderer when theirs has ended."""
MOST_UNFIT = 16
"""How many renderers that cannot draw a model are asked: what is wrong with the card is wrong everywhere."""
AWAY_S = 10.0
"""How long a farm that does not answer is waited for: a dispatcher that restarts is back within seconds."""
AWAY_PAUSES_S = (0.05, 0.1, 0.2, 0.5, 1.0)
AWAY_RETRY_S = 5.0
"""What a client is told to wait when the farm stayed away."""
CLOSE_S = 5.0
"""How long a gateway that ends waits for its last words to be heard; the dispatcher frees what is not told anyway."""
_LIMITS = ("rate", "at_once", "quota")


@dataclass(frozen=True, slots=True)
class Errand:
    """Images to be drawn for somebody. `specs` are indexed from 0."""

    owner: str
    key: str
    allowance: Allowance
    ready: Ready
    specs: tuple[ImageSpec, ...]
    output: Output


@dataclass(frozen=True, slots=True)
class Result:
    """An image of an errand, and who drew it."""

    drawn: Drawn
    renderer: str
    device: str


class Gateway:
    """One gateway's seats. For one event loop. `name` is of this process alone: another life of it holds nothing."""

    def __init__(
        self, name: str, link: FarmLink, meters: Meters, *, token: Callable[[], str] = lambda: secrets.token_hex(8)
    ):
        self._name = name
        self._link = link
        self._meters = meters
        self._token = token
        self._held: set[str] = set()
        self._telling: set[asyncio.Task[None]] = set()

    async def run(self, errand: Errand) -> list[Result]:
        """Have an errand's images drawn, in the order of its specs; one that could not be is told with its error code.

        Raises LimitedError and BusyError with `retry_after_s` when no seat is given, FarmUnavailableError when the farm
        stays away, RendererDiedError when every renderer that tried ended, and what loading the model raises, where it is a
        renderer's trouble (it does not fit its device, lacks a package) once all, or many, were asked.
        """
        results: dict[int, Result] = {}
        left = errand.specs
        deaths, unfit = 0, set[str]()
        while True:
            lost: list[ImageSpec] = []
            died: RendererDiedError | None = None
            placing = await self._enter(errand, left, again=bool(deaths or unfit))
            portions = _cut(left, placing.seats)
            if len(portions) == 1:
                answers = [await self._draw(*portions[0], errand)]
            else:
                answers = await _all(self._draw(seat, specs, errand) for seat, specs in portions)
            for (seat, specs), answer in zip(portions, answers, strict=True):
                if isinstance(answer, Answer):
                    results |= {one.index: Result(one, seat.renderer, answer.device) for one in answer.images}
                    continue
                lost.extend(specs)
                if isinstance(answer, RendererDiedError):
                    died = answer
                elif seat.renderer in unfit or len(unfit) == MOST_UNFIT:
                    raise answer  # those that may do it are asked before, so none can
                else:
                    unfit.add(seat.renderer)
            if not lost:
                return [results[spec.index] for spec in errand.specs]
            left = tuple(lost)
            deaths += died is not None
            if died is not None and deaths == TRIES:
                raise RendererDiedError(f"{TRIES} renderers ended while they drew this: {died.message}")

    async def hold(self) -> None:
        """Show life for as long as this gateway lives."""
        while True:
            try:
                await self._link.hold(self._name, tuple(self._held), self._meters.snapshot())
            except FarmUnavailableError as exc:
                log.info("the dispatcher did not hear this gateway", extra={"reason": exc.message})
            except Exception:
                log.exception("the dispatcher failed on a gateway's sign of life")
            await asyncio.sleep(HOLD_S)

    async def close(self) -> None:
        """Wait for what was still to be told, for CLOSE_S at most."""
        if self._telling:
            await asyncio.wait(self._telling, timeout=CLOSE_S)

    async def _enter(self, errand: Errand, specs: Sequence[ImageSpec], *, again: bool) -> Placing:
        entry = Entry(
            token=self._token(),
            gateway=self._name,
            owner=errand.owner,
            key=errand.key,
            allowance=errand.allowance,
            model=errand.ready.card.name,
            images=len(specs),
            steps=sum(spec.params.num_inference_steps for spec in specs),
            again=again,
        )
        entering = asyncio.create_task(answered(lambda: self._ask(entry)))
        try:
            placing = await asyncio.shield(entering)
        except asyncio.CancelledError:
            self._tell(self._give_up(entry, entering))
            raise
        except FarmUnavailableError:
            self._tell(self._leave(entry.token))
            raise
        if placing.refusal is not None:
            raise refused(placing.refusal)
        return placing

    async def _ask(self, entry: Entry) -> Placing:
        placing = await self._link.enter(entry)
        if placing.refusal is not None and placing.refusal.code == "no_renderer":
            raise FarmUnavailableError(placing.refusal.message)  # one that starts, or starts again, is waited for
        return placing

    async def _draw(self, seat: Seat, specs: tuple[ImageSpec, ...], errand: Errand) -> Answer | FarmError:
        """Have one portion drawn; what another renderer may do better is returned and not raised."""
        ready = errand.ready
        portion = Portion(
            token=seat.token,
            owner=errand.owner,
            card=ready.card,
            numerics=ready.numerics,
            specs=specs,
            output=errand.output,
        )
        self._held.add(seat.token)
        seconds, finished = 0.0, False
        end: SeatEnd = "done"
        try:
            answer = await self._link.draw(seat.renderer, portion)
            seconds, finished = answer.engine_s, True
            return answer
        except RendererDiedError as exc:
            finished, end = True, "lost"
            return exc
        except CancelledError as exc:
            # By the dispatcher, which gave the seat up, or with a renderer that was retired.
            finished, end = True, "lost"
            return RendererDiedError(f"{seat.renderer} put the images down: {exc.message}")
        except FarmUnavailableError as exc:
            end = "lost"
            return RendererDiedError(f"{seat.renderer} does not answer: {exc.message}")
        except FarmError as exc:
            if exc.code not in RENDERER_CODES:
                raise
            finished, end = True, "unfit"
            return exc
        finally:
            self._held.discard(seat.token)
            self._tell(self._leave(seat.token, seconds, end=end, drawn_by=None if finished else seat.renderer))

    async def _give_up(self, entry: Entry, entering: "asyncio.Task[Placing]") -> None:
        """Give back the seats of a question whose answer nobody waits for any more."""
        try:
            placing = await entering
        except FarmUnavailableError:
            await self._leave(entry.token)
            return
        for seat in placing.seats:
            await self._leave(seat.token)

    async def _leave(
        self, token: str, seconds: float = 0.0, *, end: SeatEnd = "done", drawn_by: str | None = None
    ) -> None:
        """Give a seat back, or all of an entry's: also of one that was not answered, and may be heard only later.

        `drawn_by`: the renderer that may be at it, and is told to drop it.
        """
        try:
            if drawn_by is not None:
                await self._link.drop(drawn_by, token)
            await answered(lambda: self._link.leave(token, seconds=seconds, end=end))
        except FarmUnavailableError as exc:
            log.info("a seat was not given back, and expires", extra={"token": token, "reason": exc.message})
        except Exception:
            log.exception("a seat could not be given back, and expires", extra={"token": token})

    def _tell(self, words: Coroutine[Any, Any, None]) -> None:
        """Say something that nobody waits for, and that must be said although whoever caused it has gone."""
        telling = asyncio.create_task(words)
        self._telling.add(telling)
        telling.add_done_callback(self._telling.discard)


def refused(refusal: Refusal) -> LimitedError | BusyError:
    """The error that a refusal is for who asked."""
    error = LimitedError if refusal.code in _LIMITS else BusyError
    return error(refusal.message, refusal.retry_after_s)


async def answered(call: Callable[[], Awaitable[T]]) -> T:
    """Make a call that may be repeated until the farm answers it. Raises FarmUnavailableError after AWAY_S of silence."""
    loop = asyncio.get_running_loop()
    gives_up_at = loop.time() + AWAY_S
    tries = 0
    while True:
        try:
            return await call()
        except FarmUnavailableError:
            pause = AWAY_PAUSES_S[min(tries, len(AWAY_PAUSES_S) - 1)]
            if loop.time() + pause > gives_up_at:
                raise
            await asyncio.sleep(pause)
            tries += 1


def _cut(specs: Sequence[ImageSpec], seats: Sequence[Seat]) -> list[tuple[Seat, tuple[ImageSpec, ...]]]:
    portions, start = [], 0
    for seat in seats:
        portions.append((seat, tuple(specs[start : start + seat.images])))
        start += seat.images
    return portions


async def _all(calls: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Wait for all of them; when one fails, or nobody waits any more, the others are ended."""
    tasks = [asyncio.create_task(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
