"""Model cards as a gateway keeps them: read, pinned to their weights, and with the numerics that the farm draws them in.

Reading a card and hashing its weights takes longer than answering a request, so both are remembered; a change of a card's
file or of a local folder of weights is seen CARDS_S later at most, by whoever asks then, in the background.
"""

import asyncio
import logging
from dataclasses import dataclass, field

from farm.devices import DeviceInfo, numerics_for
from farm.errors import ModelCardError, UnknownModelError
from farm.modelcard import ModelCard, find_card, look_through
from farm.plan import Numerics
from farm.settings import Settings
from farm.weights import pinned

log = logging.getLogger(__name__)

CARDS_S = 30.0
NUMERICS_KEPT = 100


@dataclass(frozen=True, slots=True)
class Ready:
    """A card whose weights are pinned, and how this farm computes with it."""

    card: ModelCard
    numerics: Numerics


@dataclass(slots=True)
class _Known:
    card: ModelCard
    read_at: float
    numerics: dict[tuple[DeviceInfo, int], Numerics] = field(default_factory=dict)
    reading: "asyncio.Task[ModelCard] | None" = None


class Cards:
    """The cards of a farm's settings. For one event loop; files are read in threads."""

    def __init__(self, settings: Settings):
        self._settings = settings
        self._known: dict[str, _Known] = {}
        self._first: dict[str, asyncio.Task[ModelCard]] = {}

    async def all(self) -> list[ModelCard]:
        """All sound cards by name, as they stand in their files; one that is wrong is logged, and hides no other."""
        found = await asyncio.to_thread(look_through, self._settings)
        for name, card in found.items():
            if isinstance(card, ModelCardError):
                log.warning("model card is wrong", extra={"model": name, "reason": card.message})
        return [card for card in found.values() if isinstance(card, ModelCard)]

    async def pinned(self, name: str) -> ModelCard:
        """A card with its weights' revision. Raises UnknownModelError, ModelCardError."""
        return (await self._find(name)).card

    async def ready(self, name: str, machine: DeviceInfo, renderers: int) -> Ready:
        """A card for drawing on a farm of so many renderers. Raises UnknownModelError, ModelCardError, PlacementError."""
        known = await self._find(name)
        numerics = known.numerics.get((machine, renderers))
        if numerics is None:
            numerics = numerics_for(known.card, device=machine, renderers=renderers)
            if len(known.numerics) >= NUMERICS_KEPT:
                known.numerics.clear()
            known.numerics[machine, renderers] = numerics
        return Ready(known.card, numerics)

    async def _find(self, name: str) -> _Known:
        known = self._known.get(name)
        if known is None:
            return await self._read_first(name)
        if known.reading is None and asyncio.get_running_loop().time() - known.read_at > CARDS_S:
            known.reading = asyncio.create_task(asyncio.to_thread(self._read, name))
            known.reading.add_done_callback(lambda task: self._read_again(name, known, task))
        return known

    def _read(self, name: str) -> ModelCard:
        return pinned(find_card(name, self._settings), settings=self._settings)

    async def _read_first(self, name: str) -> _Known:
        """Read a card that nobody has asked for yet: once, however many ask at a time, and whoever of them goes away."""
        reading = self._first.get(name)
        if reading is None:
            reading = self._first[name] = asyncio.create_task(asyncio.to_thread(self._read, name))
            reading.add_done_callback(lambda task: self._read_once(name, task))
        card = await asyncio.shield(reading)
        return self._known.get(name) or _Known(card, asyncio.get_running_loop().time())

    def _read_once(self, name: str, task: "asyncio.Task[ModelCard]") -> None:
        del self._first[name]
        if not task.cancelled() and task.exception() is None:
            self._known[name] = _Known(task.result(), asyncio.get_running_loop().time())

    def _read_again(self, name: str, known: _Known, task: "asyncio.Task[ModelCard]") -> None:
        known.reading, known.read_at = None, asyncio.get_running_loop().time()
        if task.cancelled():
            return
        error = task.exception()
        if error is None and task.result() != known.card:
            self._known[name] = _Known(task.result(), known.read_at)
        elif isinstance(error, UnknownModelError):
            self._known.pop(name, None)
        elif error is not None:
            # A hub that is away, or a card being edited, is no reason to stop drawing what is known.
            log.warning("a model card could not be read again", extra={"model": name, "reason": str(error)})
