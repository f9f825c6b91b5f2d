"""The models of one renderer: which engine draws what, who leaves the device to make room, and who is kept at hand.

An engine that is taken belongs to one thread until it is given back. A model that leaves a GPU keeps its weights in host memory
while this renderer's share of the node's budget holds them, and comes back by a copy; those not used for longest go first. On a
CPU, where host memory is the device, models within that share stay loaded beside each other. Models are loaded one at a time,
since torch's and transformers' loading is not made for more.
"""

import threading
from collections.abc import Callable

from farm.devices import host_memory
from farm.engine import Engine, Weights, weights_of
from farm.meters import Meters
from farm.modelcard import ModelCard
from farm.plan import Numerics
from farm.records import WorkingMemory

GIB = 2**30
FREE_SHARE = 0.5
"""Of the memory that is free when a model leaves, what models kept at hand may take where no budget is set."""


class Engines:
    """Engines on one device; `loaded_model`: the name of the model that was loaded or taken last, None where none is.

    `load_s`: what loading it took, `loading`: whether a model is being loaded at this moment. `host_gib`: the node's budget for
    models that are not in use, None for half of what is free; `renderers`: how many share it; `free_bytes` measures.
    `measured`: what is known of a model's working memory on such a device.

    A small model on several cores has an engine for each who draws side by side.
    """

    def __init__(
        self,
        device: str,
        vram_gib: float,
        *,
        meters: Meters,
        host_gib: float | None = None,
        renderers: int = 1,
        free_bytes: Callable[[], int] = lambda: host_memory().free_bytes,
        measured: Callable[[ModelCard, Numerics], WorkingMemory | None] = lambda card, numerics: None,
    ):
        self._device = device
        self._vram_gib = vram_gib
        self._meters = meters
        self._host_gib = host_gib
        self._renderers = renderers
        self._free_bytes = free_bytes
        self._measured = measured
        self._beside = device.partition(":")[0] == "cpu"
        self._idle: list[Engine] = []  # loaded, the one not used for longest first; so are the kept ones
        self._kept: list[Engine] = []
        self._placed: list[Engine] = []  # found to fit, nothing of it loaded
        self._lock = threading.Lock()
        self._loading = threading.Lock()
        self.loaded_model: str | None = None
        self.load_s = 0.0
        self.loading = False
        self._displaced: set[Weights] = set()

    def __len__(self) -> int:
        """Return how many are loaded and not in use."""
        return len(self._idle)

    @property
    def kept(self) -> tuple[str, ...]:
        """Models that left the device and whose weights are in host memory, the one that goes first at the front."""
        with self._lock:
            return tuple(engine.card.name for engine in self._kept)

    def take(self, card: ModelCard, numerics: Numerics) -> Engine:
        """Return an engine for exactly these numerics, loaded where none is; called with a place on the device.

        On a GPU idle engines of other models leave first. Raises what loading raises.
        """
        return self._take(card, numerics, lambda engine: (engine.card, engine.numerics) == (card, numerics))

    def take_weights(self, card: ModelCard, numerics: Numerics) -> Engine:
        """Return an engine over the same weights, whatever its batch; otherwise as `take`."""
        weights = weights_of(card, numerics)
        return self._take(card, numerics, lambda engine: engine.weights == weights, displaces=True)

    def displaced(self, engine: Engine) -> None:
        """An engine of a shard left to make room for an urgent image, and comes not back."""
        with self._lock:
            if not engine.loaded:
                self._displaced.add(engine.weights)

    def was_displaced(self, engine: Engine) -> bool:
        """Whether a shard had to load this one since an urgent image took the room of its model; true once."""
        with self._lock:
            found = engine.weights in self._displaced
            self._displaced.discard(engine.weights)
            return found

    def has_idle(self, weights: Weights) -> bool:
        """Whether an engine over these weights is loaded and not in use."""
        with self._lock:
            return any(engine.weights == weights for engine in self._idle)

    def prepare(self, card: ModelCard, numerics: Numerics) -> None:
        """Make sure that an engine over these weights can be loaded, before another makes room. Raises what placing raises."""
        weights = weights_of(card, numerics)
        with self._lock:
            known = [*self._idle, *self._kept, *self._placed]
        if not any(engine.weights == weights for engine in known):
            engine = self._placed_anew(card, numerics)
            with self._lock:
                self._placed = [engine]  # whoever loads it next takes this one

    def leave(self, engine: Engine) -> None:
        """Have an engine that is in use make room for another model: it leaves a GPU, and stays loaded on a CPU that holds it."""
        with self._lock:
            kept = sum(other.host_bytes for other in self._at_hand())
            fits = kept + engine.host_bytes <= self._room(kept)
        if self._beside and fits:
            return
        if self._beside or not fits or not engine.park():
            engine.unload()

    def reload(self, engine: Engine) -> None:
        """Load an engine that is in use and left to make room. Raises what loading raises."""
        with self._loading:
            self._make_room(displaces=False)
            self._load(engine)
            self._trim()

    def give_back(self, engine: Engine) -> None:
        """Let others have an engine, or its weights; one that has none is forgotten."""
        with self._lock:
            if engine.loaded:
                self._idle.append(engine)
            elif engine.parked:
                self._kept.append(engine)
        if engine.parked:
            self._trim()

    def _take(
        self, card: ModelCard, numerics: Numerics, fits: Callable[[Engine], bool], *, displaces: bool = False
    ) -> Engine:
        found = self._one_of(self._idle, fits)
        if found is None:
            with self._loading:
                found = self._one_of(self._idle, fits)  # who loaded before may have given back what is wanted
                if found is None:
                    return self._brought(card, numerics, fits, displaces=displaces)
        if self.loaded_model != found.card.name:
            self.loaded_model, self.load_s = found.card.name, 0.0  # it was loaded before, and that was told then
        return found

    def _one_of(self, engines: list[Engine], fits: Callable[[Engine], bool]) -> Engine | None:
        with self._lock:
            found = next((engine for engine in reversed(engines) if fits(engine)), None)
            if found is not None:
                engines.remove(found)
            return found

    def _brought(
        self, card: ModelCard, numerics: Numerics, fits: Callable[[Engine], bool], *, displaces: bool
    ) -> Engine:
        """An engine that is not on the device: from host memory where it is kept, else from its files."""
        engine = self._one_of(self._kept, fits) or self._one_of(self._placed, fits)
        engine = engine or self._placed_anew(card, numerics)  # what cannot be loaded makes nobody leave
        self._make_room(displaces=displaces)
        self._load(engine)
        self._trim(displaces=displaces)
        return engine

    def _placed_anew(self, card: ModelCard, numerics: Numerics) -> Engine:
        engine = Engine(
            card,
            numerics,
            self._device,
            self._vram_gib,
            renderers=self._renderers,
            measured=self._measured(card, numerics),
        )
        engine.place()
        return engine

    def _make_room(self, *, displaces: bool) -> None:
        """Have idle engines leave a GPU. A CPU's stay, within the share."""
        if not self._beside:
            with self._lock:
                leaving, self._idle = self._idle, []
            for engine in leaving:
                self._note(engine, displaces=displaces)
                if engine.park():
                    with self._lock:
                        self._kept.append(engine)
                else:
                    engine.unload()
        self._trim(displaces=displaces)

    def _trim(self, *, displaces: bool = False) -> None:
        """Let those not used for longest go until the others are within the share."""
        while True:
            with self._lock:
                at_hand = self._at_hand()
                kept = sum(engine.host_bytes for engine in at_hand)
                if not at_hand or kept <= self._room(kept):
                    return
                engine = at_hand[0]
                (self._idle if self._beside else self._kept).remove(engine)
            self._note(engine, displaces=displaces and self._beside)
            engine.unload()

    def _at_hand(self) -> list[Engine]:
        return self._idle if self._beside else self._kept

    def _room(self, kept_bytes: float) -> float:
        if self._host_gib is not None:
            return self._host_gib * GIB / self._renderers
        return FREE_SHARE * (self._free_bytes() + kept_bytes) / self._renderers

    def _note(self, engine: Engine, *, displaces: bool) -> None:
        if displaces:
            with self._lock:
                self._displaced.add(engine.weights)

    def _load(self, engine: Engine) -> None:
        kind = "swap" if engine.parked else "load"
        self.loaded_model = None
        self.loading = True
        try:
            self.load_s = engine.load()
        finally:
            self.loading = False
        self.loaded_model = engine.card.name
        self._meters.observe("farm_model_load_seconds", self.load_s, model=engine.card.name, kind=kind)
