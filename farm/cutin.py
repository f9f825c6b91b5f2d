"""Draw urgent images on a device that shards use too: within a step of a shard's batch, between two batches, or by itself.

Whoever holds a place on the device draws: a shard's thread when it comes by, threads of its own where a place is free. A
shard's pictures stay bit-identical, and nothing that an urgent image does reaches them but a lost device.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from farm.cores import Cores
from farm.drawing import Cancelled
from farm.engine import Batch, Engine, OnStep, RenderStep, Weights
from farm.engines import Engines
from farm.errors import DeviceLostError, FarmError, RendererDiedError, RenderError
from farm.lease import Report
from farm.meters import Meters
from farm.modelcard import ModelCard
from farm.plan import Numerics
from farm.urgent import LOOK, UrgentImage, UrgentQueue
from farm.urgentdrawing import Finished, Kind, UrgentDrawing

log = logging.getLogger(__name__)

STAY_S = 10.0
"""A model that was loaded for urgent images draws those that it can for so long at least, before another takes its place."""
STAY_LOADS = 3
"""Or for so many times what loading it took."""


class CutIn:
    """The urgent work of one renderer. `on_lost` is called when the device failed outside any shard."""

    def __init__(
        self,
        *,
        renderer: str,
        device: str,
        cores: Cores,
        queue: UrgentQueue,
        engines: Engines,
        meters: Meters,
        on_lost: Callable[[], object],
    ):
        self._renderer = renderer
        self._cores = cores
        self._queue = queue
        self._engines = engines
        self._drawing = UrgentDrawing(renderer=renderer, device=device, cores=cores, queue=queue, meters=meters)
        self._on_lost = on_lost
        self._claims = 0
        self._to_warm: tuple[ModelCard, Numerics] | None = None
        self._stay: tuple[Weights | None, float] = (None, 0.0)
        self._reports: dict[str, Report] = {}
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Start a thread for each place that urgent images may have to themselves."""
        for number in range(self._cores.total):
            name = f"urgent-{number}"
            self._threads.append(threading.Thread(target=self._serve, args=(name,), name=name, daemon=True))
        for thread in self._threads:
            thread.start()

    def close(self, error: FarmError) -> None:
        """Fail what is in hand within a step, and take nothing more."""
        self._queue.close(error)
        self._drawing.close()

    def warm(self, card: ModelCard, numerics: Numerics) -> None:
        """Load a model once nothing else wants the device; the last call counts."""
        with self._cores.changed:
            self._to_warm = card, numerics
            self._cores.changed.notify_all()

    def reports(self) -> tuple[Report, ...]:
        """Where the work of its own threads stands, for the watchdog; what shards' threads do shows in their leases."""
        return tuple(self._reports.values())

    # Within a shard

    def loaded(self, engine: Engine, seconds: float) -> None:
        """A shard waited so long for its engine: for urgent images, where those had it unloaded."""
        if self._engines.was_displaced(engine):
            self._queue.charge(seconds)

    def at_step(self, engine: Engine, on_step: OnStep, cancelled: Cancelled) -> float:
        """Draw what fits within a step of the batch in hand; returns the seconds it took. Raises DeviceLostError."""
        if not self._may_cut_in():
            return 0.0
        inner = engine.inside()
        if inner is None:
            return 0.0
        spent = 0.0
        while self._may_cut_in() and not cancelled():
            if self._queue.next(engine.weights, within_step=True) is None:
                break
            if not spent:
                engine.synchronize()  # before anything is taken: what fails here is the shard's own
            started = time.perf_counter()
            self._encode(self._drawn(inner, engine.weights, on_step, kind="step", fits=engine.fits_within_a_step))
            spent += self._charged(started)
        return spent

    def between(self, engine: Engine, on_step: OnStep, cancelled: Cancelled) -> float:
        """Draw whatever waits, of other models too, between two batches of `engine`; returns the seconds it took.

        `engine` is loaded again afterwards where it had to make room, unless its shard was cancelled; raises what that raises,
        and DeviceLostError.
        """
        spent = 0.0
        current = engine
        while self._may_cut_in() and not cancelled():
            image = self._next(current.weights)
            if image is None:
                break
            started = time.perf_counter()
            if image.weights != current.weights:
                current = self._swapped(engine, current, image, on_step)
            if current.weights == image.weights:
                self._encode(self._drawn(current, image.weights, on_step, kind="batch"))
            spent += self._charged(started)
        if current is not engine and cancelled():
            self._engines.displaced(engine)
            self._engines.give_back(current)
        elif current is not engine:
            started = time.perf_counter()
            self._back(engine, current, on_step)
            spent += self._charged(started)
        return spent

    def _swapped(self, engine: Engine, current: Engine, image: UrgentImage, on_step: OnStep) -> Engine:
        """Have the weights of an image on the device in place of the current ones; those of the shard where that fails."""
        found = None
        if image.weights != engine.weights:
            portion = image.hand.portion
            try:
                self._engines.prepare(portion.card, portion.numerics)
            except FarmError as exc:
                self._queue.fail(image.weights, exc)
                return current
            self._engines.leave(current)
            found = self._loaded(image, on_step)
        if found is None:
            self._back(engine, current, on_step)
            return engine
        if current is not engine:
            self._engines.give_back(current)
        return found

    def _back(self, engine: Engine, current: Engine, on_step: OnStep) -> None:
        """Have a shard's own engine loaded again where it had to leave, and on a GPU nothing else."""
        if current is not engine:
            self._engines.give_back(current)
        if engine.loaded:
            return
        self._ticking(on_step)(RenderStep(0, "load", 0, 1))
        started = time.perf_counter()
        self._engines.reload(engine)
        self._stays(engine.weights, time.perf_counter() - started)

    def worked(self, seconds: float) -> None:
        """A shard had the device for itself for some seconds."""
        self._queue.credit(seconds)

    def _charged(self, started: float) -> float:
        took = time.perf_counter() - started
        self._queue.charge(took)
        return took

    def _may_cut_in(self) -> bool:
        return self._queue.may_cut_in() and self._drawing.has_room()

    # Its own threads

    def _serve(self, name: str) -> None:
        while not self._queue.closed:
            try:
                self._serve_once(name)
            except DeviceLostError:
                log.critical("device lost while urgent images were drawn", extra={"renderer": self._renderer})
                self._on_lost()
                return
            except Exception:
                log.exception("urgent work failed", extra={"renderer": self._renderer})
                time.sleep(1.0)
            finally:
                self._reports.pop(name, None)

    def _serve_once(self, name: str) -> None:
        """Wait for a free place and something to do there, and do it."""
        with self._cores.changed:
            places = self._cores.take_when(self._wanted, again_s=self._gathers_s)
            if not places:
                return
            claimed = (
                len(self._queue) > self._claims
            )  # as `_wanted` has just seen it; a model to warm is no image's place
            self._claims += claimed

        def release_claim() -> None:
            nonlocal claimed
            if claimed:
                claimed = False
                with self._cores.changed:
                    self._claims -= 1

        def on_step(step: RenderStep) -> None:
            self._reports[name] = Report(name, step.stage, self._queue.ticks, 0.0)

        wanted_s = self._cores.wanted_s()
        try:
            if not claimed:
                self._warm_now(self._ticking(on_step))
                return
            image = self._next(self._stay[0])
            if image is None:
                return
            engine = self._loaded(image, on_step)
            if engine is None:
                return
            finished: list[Finished] = []
            started = time.monotonic()
            try:
                finished = self._drawn(engine, image.weights, on_step, kind="idle", taken=release_claim)
            finally:
                self._engines.give_back(engine)
            now = time.monotonic()
            self._queue.gather(len(finished), most=engine.numerics.batch, batch_s=now - started, now=now)
            # Only now: who gets the answer and asks again at once finds the engine free, and loads no other.
            self._encode(finished)
        finally:
            release_claim()
            self._queue.charge(self._cores.wanted_s() - wanted_s)
            self._cores.give_back(places)

    def _gathers_s(self) -> float | None:
        return self._queue.gathers_s(now=time.monotonic()) or None

    def _wanted(self) -> int:
        """How many cores the next thing to do needs, 0 where there is none, -1 when nothing more will come."""
        if self._queue.closed:
            return -1
        cores = self._cores
        if not cores.free:
            return 0
        image = self._queue.next() if len(self._queue) > self._claims else None
        if image is None:
            if self._to_warm is None or len(self._queue) or cores.wanted or cores.free < cores.total:
                return 0
            return min(self._to_warm[1].threads, cores.total)
        if self._gathers_s() and not cores.wanted:
            return 0
        if not self._drawing.has_room() or (cores.wanted and not self._queue.may_cut_in()):
            return 0
        return min(image.hand.portion.numerics.threads, cores.total)

    def _warm_now(self, on_step: OnStep) -> None:
        with self._cores.changed:
            wanted, self._to_warm = self._to_warm, None
        if wanted is None:
            return
        on_step(RenderStep(0, "load", 0, 1))
        try:
            self._engines.give_back(self._engines.take_weights(*wanted))
        except DeviceLostError:
            raise
        except FarmError as exc:
            log.warning("model not loaded ahead", extra={"model": wanted[0].name, "reason": exc.message})

    # Everywhere

    def _next(self, loaded: Weights | None) -> UrgentImage | None:
        """The image whose turn it is; one of the loaded model for as long as that has a right to stay."""
        weights, until = self._stay
        if loaded is not None and loaded == weights and time.monotonic() < until:
            return self._queue.next(loaded) or self._queue.next()
        return self._queue.next()

    def _loaded(self, image: UrgentImage, on_step: OnStep = lambda step: None) -> Engine | None:
        """An engine for an image; where it cannot be loaded all that wait for its model fail, and there is none."""
        portion = image.hand.portion
        started = time.perf_counter()
        loads = not self._engines.has_idle(image.weights)
        if loads:
            self._ticking(on_step)(RenderStep(0, "load", 0, 1))
        try:
            engine = self._engines.take_weights(portion.card, portion.numerics)
        except DeviceLostError as exc:
            self._queue.fail(image.weights, RendererDiedError(exc.message))
            raise
        except FarmError as exc:
            self._queue.fail(image.weights, exc)
            return None
        except Exception as exc:
            log.exception("model not loaded", extra={"model": portion.card.name})
            text = f"model {portion.card.name} could not be loaded: {type(exc).__name__}: {exc}"
            self._queue.fail(image.weights, RenderError(text))
            return None
        if loads:
            took = time.perf_counter() - started
            self._queue.loaded(image.weights, took, now=time.monotonic())
            self._stays(image.weights, took)
        return engine

    def _stays(self, weights: Weights, load_s: float) -> None:
        self._stay = weights, time.monotonic() + max(STAY_S, STAY_LOADS * load_s)

    def _drawn(
        self,
        engine: Engine,
        weights: Weights,
        on_step: OnStep,
        *,
        kind: Kind,
        fits: Callable[[Batch], bool] = lambda batch: True,
        taken: Callable[[], object] = lambda: None,
    ) -> list[Finished]:
        """Take one batch of images and draw it."""
        images: list[UrgentImage] = []
        with self._failing(images):
            images += self._queue.take(weights, self._most(engine), within_step=kind == "step")
            taken()
            if images:
                return self._drawing.draw(engine, images, self._ticking(on_step), kind=kind, fits=fits)
        return []

    def _encode(self, finished: list[Finished]) -> None:
        with self._failing([image for image, _ in finished]):
            self._drawing.encode(finished)

    @contextmanager
    def _failing(self, images: list[UrgentImage]) -> Iterator[None]:
        """Whatever is raised in here fails these images, and is nobody else's; only a lost device is raised on."""
        try:
            yield
        except DeviceLostError as exc:
            self._queue.fail_hands(images, RendererDiedError(f"{self._renderer} lost its device: {exc.message}"))
            raise
        except Exception as exc:
            log.exception("urgent images failed", extra={"renderer": self._renderer})
            self._queue.fail_hands(images, RenderError(f"could not draw the image: {type(exc).__name__}: {exc}"))

    def _ticking(self, on_step: OnStep) -> OnStep:
        """Have every step counted as progress, whosever thread it is."""

        def ticked(step: RenderStep) -> None:
            self._queue.progressed()
            on_step(step)

        return ticked

    def _most(self, engine: Engine) -> int:
        return LOOK * engine.numerics.batch
