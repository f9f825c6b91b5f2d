"""A shard's way through the engine: batches, the failure ladder, and how far it is.

A batch that fails is drawn again as it was, then image by image; what fails alone becomes a failed row. Out of memory, a
batch is halved. A store's error is nobody's row, nor is a lost device: they are raised.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from farm.engine import Batch, Engine, OnStep, Picture, RenderStep
from farm.errors import OutOfMemoryError, RendererDiedError, RenderError
from farm.lease import Stage
from farm.models.family import Embedding, Tokens
from farm.output import Writer
from farm.plan import ImageSpec

log = logging.getLogger(__name__)

NAN_PICTURE = "nan_picture"


@dataclass(frozen=True, slots=True)
class ShardProgress:
    """Where a shard stands. `ticks` counts steps, prompts and stored pictures: it only grows while there is progress.

    `fraction`: share of the work done, 0 to 1. `in_hand`: indexes of the batch on the device, none between batches.
    `last_batch`: nothing waits for the device after this. `announce`: these images may end the process; who keeps count
    should know first. `aside`: other work has the device at this moment, and it is that which may end the process; `aside_s`:
    seconds for which other work has had it.
    """

    stage: Stage = "waiting"
    ticks: int = 0
    fraction: float = 0.0
    in_hand: tuple[int, ...] = ()
    last_batch: bool = False
    announce: bool = False
    aside: bool = False
    aside_s: float = 0.0


OnProgress = Callable[[ShardProgress], None]
Cancelled = Callable[[], bool]


class Aside(Protocol):
    """Other work that may have the device in between, and shows itself by `on_step`. It begins nothing more once the shard
    is `cancelled`.
    """

    def loaded(self, engine: Engine, seconds: float) -> None:
        """The shard has its engine, and waited for so long while it was loaded."""

    def at_step(self, engine: Engine, on_step: OnStep, cancelled: Cancelled) -> float:
        """Do what fits within a step of the batch in hand; returns the seconds it took."""

    def between(self, engine: Engine, on_step: OnStep, cancelled: Cancelled) -> float:
        """Do what waits, between two batches; returns the seconds it took.

        `engine` is loaded afterwards as before, but for a shard that was cancelled.
        """

    def worked(self, seconds: float) -> None:
        """The shard itself had the device for so long."""


class NoAside:
    """Nothing comes in between."""

    def loaded(self, engine: Engine, seconds: float) -> None:
        """Nobody asks."""

    def at_step(self, engine: Engine, on_step: OnStep, cancelled: Cancelled) -> float:
        """Do nothing."""
        return 0.0

    def between(self, engine: Engine, on_step: OnStep, cancelled: Cancelled) -> float:
        """Do nothing."""
        return 0.0

    def worked(self, seconds: float) -> None:
        """Nobody asks."""


@dataclass(frozen=True, slots=True)
class Failure:
    code: str
    message: str

    @property
    def no_memory(self) -> bool:
        return self.code == OutOfMemoryError.code


class Drawing:
    """A shard's way through the engine: what failed, what was drawn outside its batch, how far it is, how long it took.

    `alone` and `failures` are by image index. `aside_s`: seconds that other work had the device meanwhile; they are in none of
    `seconds`.
    """

    def __init__(
        self,
        specs: list[ImageSpec],
        *,
        skip: frozenset[int],
        alone: frozenset[int],
        ahead: bool,
        announce: bool,
        on_progress: Callable[[ShardProgress], None],
        cancelled: Callable[[], bool],
        aside: Aside | None = None,
    ):
        self._specs = specs
        self._skip = skip
        self._ask_alone = alone
        self._encodes_ahead = ahead
        self._announce = announce
        self._on_progress = on_progress
        self._cancelled = cancelled
        self._aside = aside or NoAside()
        self._own_since = 0.0
        self._aside_announced = False
        self.aside_s = 0.0
        self._showing = threading.Lock()
        self._progress = ShardProgress()
        self._drawn = 0
        self._ahead: dict[Tokens, Embedding] = {}
        self.alone: set[int] = set()
        self.failures = {
            spec.index: Failure(
                RendererDiedError.code,
                f"image {spec.index} ended every renderer that tried it; see the renderers' logs, then `farm retry`",
            )
            for spec in specs
            if spec.index in skip
        }
        self.seconds = {"load": 0.0, "encode": 0.0, "denoise": 0.0, "decode": 0.0}

    @property
    def anything_to_draw(self) -> bool:
        """False where every image is skipped."""
        return len(self.failures) < len(self._specs)

    def all(self, load: Callable[[], Engine], writer: Writer) -> None:
        """Load the model where it is not, and draw every batch."""
        self._show(stage="load")
        started = time.perf_counter()
        engine = load()
        self.seconds["load"] = time.perf_counter() - started
        self._aside.loaded(engine, self.seconds["load"])
        batches = [part for batch in self._cut(engine) for part in self._parts(batch)]
        if self._encodes_ahead:
            self._encode_ahead(engine, batches)
        self._own_since = time.perf_counter()
        for number, batch in enumerate(batches, start=1):
            self._let_in(engine, self._aside.between)
            self._draw(engine, batch, writer, last_batch=number == len(batches))

    def _let_in(self, engine: Engine, come_in: Callable[[Engine, OnStep, Cancelled], float]) -> float:
        """Let other work have the device, and return the seconds it took.

        The first time that some comes in it is announced: between two beats it could end the process unseen.
        """
        self._aside.worked(time.perf_counter() - self._own_since)
        stage = self._progress.stage
        since: float | None = None

        def on_step(step: RenderStep) -> None:
            nonlocal since
            now = time.perf_counter()
            since = now if since is None else since
            announce, self._aside_announced = not self._aside_announced, True
            self._show(stage=step.stage, aside=True, aside_s=self.aside_s + now - since, announce=announce)

        took = come_in(engine, on_step, self._cancelled)
        self._own_since = time.perf_counter()
        if took or since is not None:
            self.aside_s += took
            self._show(stage=stage, aside=False, aside_s=max(self.aside_s, self._progress.aside_s))
        return took

    def _encode_ahead(self, engine: Engine, batches: list[Batch]) -> None:
        try:
            self._ahead, took = engine.encode_ahead(batches, on_step=self._on_step, cancelled=self._cancelled)
        except RenderError as exc:
            # Each batch encodes its own then, and the prompt that cannot be encoded fails with its batch.
            log.warning("encoding ahead failed", extra={"reason": exc.message})
        else:
            self.seconds["encode"] += took
            return
        # Only here, past the block, have the exception and the tensors of its frames gone.
        engine.recover()

    def _cut(self, engine: Engine) -> list[Batch]:
        """Cut the planned batches; an image whose prompt the tokenizer fails on, twice and alone, fails and is left out."""
        for _ in range(2):
            try:
                return engine.batches(self._specs)
            except RenderError as exc:
                log.warning("batches not cut", extra={"reason": exc.message})
        sound = []
        for spec in self._specs:
            try:
                engine.batches([spec])
            except RenderError as exc:
                if spec.index not in self._skip:
                    self._fail(spec.index, Failure(exc.code, exc.message))
            else:
                sound.append(spec)
        return engine.batches(sound)

    def _parts(self, batch: Batch) -> list[Batch]:
        """Cut out what is to be skipped or drawn alone; whose batch is no longer the planned one is marked."""
        indexes = batch.indexes
        together = [i for i, index in enumerate(indexes) if index not in self._skip and index not in self._ask_alone]
        single = [i for i, index in enumerate(indexes) if index in self._ask_alone and index not in self._skip]
        if len(together) == len(indexes):
            return [batch]
        if len(indexes) > 1:
            self.alone.update(indexes[i] for i in (*together, *single))
        return [batch.part(places) for places in (together, *([i] for i in single)) if places]

    def _draw(self, engine: Engine, batch: Batch, writer: Writer, *, last_batch: bool) -> None:
        """Draw a batch: where it fails once again as it was, then each image alone; without memory in two halves."""
        indexes, size = batch.indexes, len(batch.specs)
        sole = indexes[0] in self._ask_alone
        self._show(in_hand=indexes, last_batch=last_batch, announce=self._announce or sole)
        failure = self._try(engine, batch, writer)
        if failure is not None and not failure.no_memory:
            log.warning("batch failed, once again", extra={"images": indexes, "reason": failure.message})
            failure = self._try(engine, batch, writer)
        if failure is None:
            return
        if size == 1:
            self._fail(indexes[0], failure)
            return
        self.alone.update(indexes)
        if failure.no_memory:
            log.warning("no memory, batch halved", extra={"images": indexes, "reason": failure.message})
            for places in (range(size // 2), range(size // 2, size)):
                self._draw(engine, batch.part(places), writer, last_batch=last_batch)
            return
        log.warning("batch failed twice, each image alone", extra={"images": indexes, "reason": failure.message})
        for place in range(size):
            self._show(in_hand=(indexes[place],), announce=True)
            failure = self._try(engine, batch.part([place]), writer)
            if failure is not None:
                self._fail(indexes[place], failure)

    def _fail(self, index: int, failure: Failure) -> None:
        log.error("image failed", extra={"image": index, "code": failure.code, "reason": failure.message})
        self.failures[index] = failure
        self._drawn += 1
        self._show(in_hand=())

    def _try(self, engine: Engine, batch: Batch, writer: Writer) -> Failure | None:
        """Draw a batch and hand its pictures to the writer; or return why not, what it held on the device let go of."""

        def on_picture(picture: Picture) -> None:
            if picture.nan:
                index = picture.spec.index
                self.failures[index] = Failure(
                    NAN_PICTURE,
                    f"image {index} came out as no finite numbers (NaN); the model is not sound in this dtype or at "
                    f"these parameters: change them, and give the job a new name",
                )
            else:
                writer.put(picture)
            self._drawn += 1

        try:
            spent = engine.render_batch(
                batch,
                on_picture=on_picture,
                on_step=self._on_step,
                cancelled=self._cancelled,
                ahead=self._ahead,
                images_done=self._drawn,
                between_steps=lambda: self._let_in(engine, self._aside.at_step),
            )
        except RenderError as exc:
            failure = Failure(exc.code, exc.message)
        else:
            for stage, took in spent.items():
                self.seconds[stage] += took
            self._show(in_hand=())
            return None
        # Only here, past the block, has the exception gone, and with its traceback the tensors of the frames that failed.
        engine.recover()
        return failure

    def _on_step(self, step: RenderStep) -> None:
        share = {"denoise": step.step / max(step.steps, 1), "decode": 1.0}.get(step.stage, 0.0)
        self._show(stage=step.stage, fraction=(self._drawn + share * len(self._progress.in_hand)) / len(self._specs))

    def storing(self) -> None:
        """All is drawn; what is left waits for the store."""
        self._show(stage="write", fraction=1.0, in_hand=(), last_batch=True)

    def written(self) -> None:
        """A picture is stored; called by the writer's threads."""
        self._show()

    def _show(self, **changes: object) -> None:
        """Publish under the lock, so that no thread's news is overtaken by older ones of another."""
        with self._showing:
            fresh: dict[str, Any] = {"announce": False, "ticks": self._progress.ticks + 1} | changes
            self._progress = replace(self._progress, **fresh)
            self._on_progress(self._progress)
