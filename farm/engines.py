"""The loaded models of one renderer: which engine draws what, and who leaves to make room.

An engine that is taken belongs to one thread until it is given back. Models are loaded one at a time, since torch's and
transformers' loading is not made for more.
"""

import threading
from collections.abc import Callable

from farm.engine import Engine, Weights, weights_of
from farm.meters import Meters
from farm.modelcard import ModelCard
from farm.plan import Numerics


class Engines:
    """Engines on one device; `loaded_model`: the name of the model that was loaded last, None where none is.

    `load_s`: what loading it took, `loading`: whether a model is being loaded at this moment.

    A small model on several cores has an engine for each who draws side by side.
    """

    def __init__(self, device: str, vram_gib: float, *, meters: Meters):
        self._device = device
        self._vram_gib = vram_gib
        self._meters = meters
        self._idle: list[Engine] = []
        self._lock = threading.Lock()
        self._loading = threading.Lock()
        self.loaded_model: str | None = None
        self.load_s = 0.0
        self.loading = False
        self._displaced: set[Weights] = set()

    def __len__(self) -> int:
        """Return how many are loaded and not in use."""
        return len(self._idle)

    def take(self, card: ModelCard, numerics: Numerics) -> Engine:
        """Return an engine for exactly these numerics, loaded where none is; called with a place on the device.

        Idle engines of other models leave first. Raises what loading raises.
        """
        return self._take(card, numerics, lambda engine: (engine.card, engine.numerics) == (card, numerics))

    def take_weights(self, card: ModelCard, numerics: Numerics) -> Engine:
        """Return an engine over the same weights, whatever its batch; otherwise as `take`."""
        weights = weights_of(card, numerics)
        return self._take(card, numerics, lambda engine: engine.weights == weights, displaces=True)

    def displaced(self, engine: Engine) -> None:
        """An engine of a shard left to make room for an urgent image, and comes not back."""
        with self._lock:
            self._displaced.add(engine.weights)

    def was_displaced(self, engine: Engine) -> bool:
        """Whether a shard had to load this one since an urgent image took the room of its model; true once."""
        with self._lock:
            found = engine.weights in self._displaced
            self._displaced.discard(engine.weights)
            return found

    def _take(
        self, card: ModelCard, numerics: Numerics, fits: Callable[[Engine], bool], *, displaces: bool = False
    ) -> Engine:
        found = self._idle_one(fits)
        if found is not None:
            return found
        with self._loading:
            found = self._idle_one(fits)  # who loaded before may have given back what is wanted
            if found is not None:
                return found
            swaps = self._clear(displaces=displaces)
            engine = Engine(card, numerics, self._device, self._vram_gib)
            self._load(engine, "swap" if swaps else "load")
            return engine

    def _idle_one(self, fits: Callable[[Engine], bool]) -> Engine | None:
        with self._lock:
            found = next((engine for engine in self._idle if fits(engine)), None)
            if found is not None:
                self._idle.remove(found)
            return found

    def has_idle(self, weights: Weights) -> bool:
        """Whether an engine over these weights is loaded and not in use."""
        with self._lock:
            return any(engine.weights == weights for engine in self._idle)

    def _clear(self, *, displaces: bool = False) -> bool:
        with self._lock:
            leaving, self._idle = self._idle, []
            if displaces:
                self._displaced.update(engine.weights for engine in leaving)
        for engine in leaving:
            engine.unload()
        return bool(leaving)

    def _load(self, engine: Engine, kind: str) -> None:
        self.loaded_model = None
        self.loading = True
        try:
            self.load_s = engine.load()
        finally:
            self.loading = False
        self.loaded_model = engine.card.name
        self._meters.observe("farm_model_load_seconds", self.load_s, model=engine.card.name, kind=kind)

    def reload(self, engine: Engine) -> None:
        """Load an engine that is in use and was unloaded to make room. Raises what loading raises."""
        with self._loading:
            self._clear()
            self._load(engine, "swap")

    def give_back(self, engine: Engine) -> None:
        """Let others have an engine; one that is not loaded is forgotten."""
        if engine.loaded:
            with self._lock:
                self._idle.append(engine)
