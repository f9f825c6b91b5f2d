"""One shard, from its prompts to its receipt: render, write, climb down the failure ladder, commit.

A batch that fails is rendered again as it was, then image by image; what fails alone becomes a failed row. Out of
memory, a batch is halved. A store's error is nobody's row, nor is a lost device: they are raised, and no receipt is
left. The receipt comes last, when every object that it names is stored; it exists or the shard never happened. Knows no
leases and no Ray.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, Protocol

from farm import __version__
from farm.engine import Batch, Engine, Picture, RenderStep
from farm.errors import (
    CancelledError,
    ObjectMissingError,
    OutOfMemoryError,
    RendererDiedError,
    RenderError,
)
from farm.lease import Stage
from farm.ledger import Ledger
from farm.models.family import Embedding, Tokens
from farm.output import MAX_PENDING_BYTES, Names, Writer, Written
from farm.plan import ImageSpec, Plan, card_identity
from farm.prompts import PromptReader
from farm.provenance import Provenance
from farm.receipt import ImageRow, Receipt

log = logging.getLogger(__name__)

WAKE_S = 0.2
"""How often a shard that waits for the device looks whether it was cancelled."""
NAN_PICTURE = "nan_picture"
NOT_WRITTEN = "not_written"


@dataclass(frozen=True, slots=True)
class ShardProgress:
    """Where a shard stands. `ticks` counts steps, prompts and stored pictures: it only grows while there is progress.

    `fraction`: share of the work done, 0 to 1. `in_hand`: indexes of the batch on the device, none between batches.
    `last_batch`: nothing waits for the device after this. `announce`: these images may end the process; who keeps count
    should know first.
    """

    stage: Stage = "waiting"
    ticks: int = 0
    fraction: float = 0.0
    in_hand: tuple[int, ...] = ()
    last_batch: bool = False
    announce: bool = False


OnProgress = Callable[[ShardProgress], None]


class Place(Protocol):
    """A shard's place on the device, as a lock."""

    def acquire(self, *, timeout: float) -> bool:
        """Take it, or return False after `timeout` seconds."""

    def release(self) -> None:
        """Let the next shard have it."""


class ShardRunner:
    """Renders shards of one plan, from several threads at once. `device` is what receipts call it."""

    def __init__(
        self,
        ledger: Ledger,
        plan: Plan,
        *,
        renderer: str,
        device: str,
        max_pending_bytes: int = MAX_PENDING_BYTES,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ):
        self._ledger = ledger
        self.plan = plan
        self._renderer = renderer
        self._device = device
        self._max_pending_bytes = max_pending_bytes
        self._now = now
        self._prompts = PromptReader(plan, ledger)
        self._prompts_lock = threading.Lock()
        self._model = card_identity(plan.card)

    def run(
        self,
        *,
        pass_number: int,
        shard: int,
        attempt: int,
        engine: Callable[[Plan], Engine],
        on_device: Place,
        skip: frozenset[int] = frozenset(),
        alone: frozenset[int] = frozenset(),
        cautious: bool = False,
        on_progress: OnProgress = lambda progress: None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Receipt:
        """Render a shard and commit its receipt; one that is there already is returned as it is.

        `engine` gives the loaded engine of a plan and is called with `on_device` held; the lock is let go as soon as
        the last batch is drawn, so that the next shard draws while this one's pictures are stored. `skip`: images that
        become failed rows untried, since they ended their renderers. `alone`: images drawn outside their batch. `cautious`: so
        are all of them, and none is encoded before its turn. From the
        second `attempt` on every batch is announced before it starts. `on_progress` is called from several threads, one
        at a time, and each call tells what was true after the one before.

        Raises CancelledError, StoreError, DeviceLostError, and what loading raises. No receipt is left then, and no
        thread.
        """
        try:
            return self._ledger.receipt(self.plan, pass_number, shard)
        except ObjectMissingError:
            pass
        plan = self.plan
        started = time.perf_counter()
        indexes = self._ledger.shard_indexes(plan, pass_number, shard)
        with self._prompts_lock:
            specs = self._prompts.specs(indexes)
        draw = _Drawing(
            specs,
            skip=skip,
            alone=frozenset(indexes) if cautious else alone,
            ahead=not cautious,
            announce=attempt > 1 or cautious,
            on_progress=on_progress,
            cancelled=cancelled,
        )
        writer = Writer(
            self._ledger.store,
            plan.output,
            names=Names(plan.job, plan.run, pass_number, attempt),
            provenance=self._provenance,
            max_pending_bytes=self._max_pending_bytes,
            cancelled=cancelled,
            on_written=draw.written,
        )
        with writer:
            if draw.anything_to_draw:
                _acquire(on_device, cancelled)
                try:
                    draw.all(lambda: engine(plan), writer)
                finally:
                    on_device.release()
            draw.storing()
            written = {file.spec.index: file for file in writer.finish()}
        seconds = draw.seconds | {"write": writer.seconds, "total": time.perf_counter() - started}
        receipt = Receipt(
            job=plan.job,
            run=plan.run,
            pass_number=pass_number,
            shard=shard,
            start=shard * plan.pass_shard_images(pass_number),
            stop=shard * plan.pass_shard_images(pass_number) + len(specs),
            attempt=attempt,
            renderer=self._renderer,
            device=self._device,
            versions=plan.numerics.versions | {"farm": __version__, "pillow": version("pillow")},
            finished_at=self._now().isoformat(timespec="seconds"),
            seconds=seconds,
            rows=tuple(self._row(spec, draw, written.get(spec.index), pass_number, attempt) for spec in specs),
        )
        if self._ledger.commit(plan, receipt):
            return receipt
        return self._ledger.receipt(plan, pass_number, shard)

    def _provenance(self, spec: ImageSpec, pixels_sha256: str) -> Provenance:
        plan = self.plan
        return Provenance(
            index=spec.index,
            key=spec.key,
            prompt=spec.prompt,
            seed=spec.seed,
            params=spec.params,
            model=self._model,
            numerics=plan.numerics,
            plan=plan.digest,
            format=plan.output.format,
            quality=plan.output.quality,
            pixels_sha256=pixels_sha256,
        )

    def _row(
        self, spec: ImageSpec, draw: "_Drawing", written: Written | None, pass_number: int, attempt: int
    ) -> ImageRow:
        failure = draw.failures.get(spec.index)
        if written is not None and written.error is not None:
            failure = _Failure(NOT_WRITTEN, f"image {spec.index} could not be written: {written.error}")
        done = written if failure is None else None
        params = spec.params
        return ImageRow(
            index=spec.index,
            key=spec.key,
            prompt=spec.prompt,
            negative_prompt=params.negative_prompt,
            width=params.width,
            height=params.height,
            num_inference_steps=params.num_inference_steps,
            guidance_scale=params.guidance_scale,
            seed=spec.seed,
            status="failed" if failure else "ok",
            object=done.object if done else None,
            thumbnail=done.thumbnail if done else None,
            size_bytes=done.size_bytes if done else None,
            sha256=done.sha256 if done else None,
            phash=done.phash if done else None,
            flag=done.flag if done else None,
            error_code=failure.code if failure else None,
            error_message=failure.message if failure else None,
            pass_number=pass_number,
            attempt=attempt,
            alone=spec.index in draw.alone,
            seconds=written.seconds if written else 0.0,
            renderer=self._renderer,
            device=self._device,
            carry=spec.carry,
        )


@dataclass(frozen=True, slots=True)
class _Failure:
    code: str
    message: str

    @property
    def no_memory(self) -> bool:
        return self.code == OutOfMemoryError.code


class _Drawing:
    """A shard's way through the engine: what failed, what was drawn outside its batch, how far it is, how long it took.

    `alone` and `failures` are by image index.
    """

    def __init__(
        self,
        specs: list[ImageSpec],
        *,
        skip: frozenset[int],
        alone: frozenset[int],
        ahead: bool,
        announce: bool,
        on_progress: OnProgress,
        cancelled: Callable[[], bool],
    ):
        self._specs = specs
        self._skip = skip
        self._ask_alone = alone
        self._encodes_ahead = ahead
        self._announce = announce
        self._on_progress = on_progress
        self._cancelled = cancelled
        self._showing = threading.Lock()
        self._progress = ShardProgress()
        self._drawn = 0
        self._ahead: dict[Tokens, Embedding] = {}
        self.alone: set[int] = set()
        self.failures = {
            spec.index: _Failure(
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
        batches = [part for batch in self._cut(engine) for part in self._parts(batch)]
        if self._encodes_ahead:
            self._encode_ahead(engine, batches)
        for number, batch in enumerate(batches, start=1):
            self._draw(engine, batch, writer, last_batch=number == len(batches))

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
                    self._fail(spec.index, _Failure(exc.code, exc.message))
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

    def _fail(self, index: int, failure: _Failure) -> None:
        log.error("image failed", extra={"image": index, "code": failure.code, "reason": failure.message})
        self.failures[index] = failure
        self._drawn += 1
        self._show(in_hand=())

    def _try(self, engine: Engine, batch: Batch, writer: Writer) -> _Failure | None:
        """Draw a batch and hand its pictures to the writer; or return why not, what it held on the device let go of."""

        def on_picture(picture: Picture) -> None:
            if picture.nan:
                index = picture.spec.index
                self.failures[index] = _Failure(
                    NAN_PICTURE,
                    f"image {index} came out as no finite numbers (NaN); the model is not sound in this dtype or at "
                    f"these parameters: change them, then `farm retry`",
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
            )
        except RenderError as exc:
            failure = _Failure(exc.code, exc.message)
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


def _acquire(lock: Place, cancelled: Callable[[], bool]) -> None:
    while not lock.acquire(timeout=WAKE_S):
        if cancelled():
            raise CancelledError("the shard was taken away while it waited for the device")
