"""One batch of urgent images on an engine: cut, drawn, and its pictures made files off the device's path.

What fails together is tried alone, and fails by itself; only a lost device is raised. Knows nothing of shards: `farm.cutin`
says when there is a device to draw on.
"""

import hashlib
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Literal

from farm.cores import Cores
from farm.drawing import NAN_PICTURE, Failure
from farm.engine import Batch, Engine, OnStep, Picture
from farm.errors import CancelledError, DeviceLostError, FarmError, RendererDiedError, RenderError
from farm.meters import Meters
from farm.output import flag_of
from farm.plan import card_identity
from farm.portion import Answer, Drawn, Portion
from farm.provenance import Provenance, encode_picture, pixels_sha256
from farm.shard import NOT_WRITTEN
from farm.urgent import InHand, UrgentImage, UrgentQueue

log = logging.getLogger(__name__)

ENCODERS = 4
MAX_PENDING_BYTES = 256 * 2**20
"""Pixels that wait to be encoded; with more, no urgent image is begun."""

Kind = Literal["step", "batch", "idle"]
Finished = tuple[UrgentImage, Picture]


class UrgentDrawing:
    """Draws batches of urgent images, from whichever thread has the engine. `kind`: how they came to the device."""

    def __init__(self, *, renderer: str, device: str, cores: Cores, queue: UrgentQueue, meters: Meters):
        self._renderer = renderer
        self._device = device
        self._cores = cores
        self._queue = queue
        self._meters = meters
        self._pending_bytes = 0
        self._pending: dict[UrgentImage, int] = {}
        self._drawing = 0
        self._encoders = ThreadPoolExecutor(ENCODERS, thread_name_prefix="encode")

    def close(self) -> None:
        """Encode nothing more."""
        self._encoders.shutdown(wait=False, cancel_futures=True)

    def has_room(self) -> bool:
        """Whether pictures that wait to be encoded leave room for more."""
        return self._pending_bytes < MAX_PENDING_BYTES

    def draw(
        self,
        engine: Engine,
        images: list[UrgentImage],
        on_step: OnStep,
        *,
        kind: Kind,
        fits: Callable[[Batch], bool] = lambda batch: True,
    ) -> list[Finished]:
        """Draw one batch of some of these, and let the others wait again; what fails together is tried alone."""
        batch, members = self._cut(engine, images, fits)
        if batch is None:
            return []
        now = time.monotonic()
        for hand in {id(image.hand): image.hand for image in members if image.hand.begun is None}.values():
            self._meters.observe("farm_urgent_wait_seconds", now - hand.arrived, kind=kind)
        self._queue.begun(members, now=now)
        with self._cores.changed:
            self._drawing += 1
        try:
            return self._draw_each(engine, batch, members, on_step, kind)
        finally:
            with self._cores.changed:
                self._drawing -= 1

    def _draw_each(
        self, engine: Engine, batch: Batch, members: list[UrgentImage], on_step: OnStep, kind: Kind
    ) -> list[Finished]:
        """Draw a batch, and each image alone where that fails; one without room beside the batch in hand waits for its end."""
        drawn = self._try(engine, batch, members, on_step)
        if not isinstance(drawn, Failure):
            return drawn
        if len(members) == 1:
            if kind == "step" and drawn.no_memory:
                members[0].waits_for_batch = True
                self._queue.put_back(members)
            else:
                self._fail(members[0], drawn)
            return []
        log.warning("urgent batch failed, each image alone", extra={"reason": drawn.message})
        finished: list[Finished] = []
        for place, image in enumerate(members):
            if not image.hand.gone:
                finished += self._draw_each(engine, batch.part([place]), [image], on_step, kind)
        return finished

    def _cut(
        self, engine: Engine, images: list[UrgentImage], fits: Callable[[Batch], bool]
    ) -> tuple[Batch | None, list[UrgentImage]]:
        """Cut the first batch that fits, and put the others back. On a CPU waiting images are spread over its places."""
        places = self._cores.total // min(engine.numerics.threads, self._cores.total) - self._drawing
        most = -(-len(images) // max(places, 1))
        most = min(most, images[0].hand.portion.numerics.batch)
        numbered = [replace(image.spec, index=number) for number, image in enumerate(images)]
        try:
            batches = engine.batches(numbered, most=most)
        except RenderError as exc:
            if len(images) == 1:
                self._fail(images[0], Failure(exc.code, exc.message))
                return None, []
            # The tokenizer fails on one of them: each is found out when it is cut alone.
            self._queue.put_back(images[1:])
            return self._cut(engine, images[:1], fits)
        chosen = None
        for batch in batches:
            fitting = [place for place in range(len(batch.specs)) if fits(batch.part([place]))]
            for place, number in enumerate(batch.indexes):
                images[number].waits_for_batch |= place not in fitting
            if chosen is None and fitting:
                chosen = batch.part(fitting)
        drawn = chosen.indexes if chosen is not None else ()
        self._queue.put_back(image for number, image in enumerate(images) if number not in drawn)
        return chosen, [images[number] for number in drawn]

    def _try(
        self, engine: Engine, batch: Batch, members: list[UrgentImage], on_step: OnStep
    ) -> list[Finished] | Failure:
        """Draw a batch; or return why not, what it held on the device let go of."""
        pictures: list[Picture] = []
        started = time.perf_counter()
        try:
            spent = engine.render_batch(
                batch,
                on_picture=pictures.append,
                on_step=on_step,
                cancelled=lambda: all(image.hand.gone for image in members),
            )
        except CancelledError:
            return []
        except DeviceLostError as exc:
            self._queue.fail_hands(members, RendererDiedError(f"{self._renderer} lost its device: {exc.message}"))
            raise
        except FarmError as exc:
            failure = Failure(exc.code, exc.message)
        except Exception as exc:
            log.exception("urgent batch failed")
            failure = Failure(RenderError.code, f"could not draw the image: {type(exc).__name__}: {exc}")
        else:
            self._queue.spent(members, time.perf_counter() - started)
            for stage, took in spent.items():
                self._count("farm_stage_seconds_total", took, members[0], stage=stage)
            return list(zip(members, pictures, strict=True))
        self._queue.spent(members, time.perf_counter() - started)
        # Only here, past the block, have the exception and the tensors of its frames gone.
        engine.recover()
        return failure

    def _count(self, name: str, value: float, image: UrgentImage, **labels: str) -> None:
        self._meters.count(name, value, **{"model": image.hand.portion.card.name, "class": "urgent"}, **labels)

    def encode(self, finished: list[Finished]) -> None:
        """Turn pictures into files in other threads; the last one of a portion gives its answer."""
        for image, picture in finished:
            self._encode_later(image, picture)

    def _encode_later(self, image: UrgentImage, picture: Picture) -> None:
        if picture.nan:
            self._fail(
                image,
                Failure(
                    NAN_PICTURE,
                    "the image came out as no finite numbers (NaN); the model is not sound in this dtype or at these "
                    "parameters: change them",
                ),
            )
            return
        with self._cores.changed:
            self._pending[image] = picture.pixels.nbytes
            self._pending_bytes += picture.pixels.nbytes
        try:
            self._encoders.submit(self._encode, image, picture)
        except RuntimeError as exc:
            # It is closed, or has no thread; one that it gets later may still find the picture, and passes over it.
            if self._let_go(image) and not image.hand.gone:
                self._fail(image, Failure(NOT_WRITTEN, f"the image could not be encoded: {exc}"))

    def _let_go(self, image: UrgentImage) -> bool:
        """A picture waits no longer; False where it did not."""
        with self._cores.changed:
            nbytes = self._pending.pop(image, None)
            self._pending_bytes -= nbytes or 0
            self._cores.changed.notify_all()
            return nbytes is not None

    def _encode(self, image: UrgentImage, picture: Picture) -> None:
        if image not in self._pending:
            return
        try:
            if not image.hand.gone:
                self._settle(image, self._encoded(image, picture))
        except Exception as exc:
            log.exception("picture not encoded")
            self._fail(image, Failure(NOT_WRITTEN, f"the image could not be encoded: {type(exc).__name__}: {exc}"))
        finally:
            self._let_go(image)

    def _encoded(self, image: UrgentImage, picture: Picture) -> Drawn:
        spec = image.spec
        data = encode_picture(
            picture.pixels, _provenance(image.hand.portion, image.place, pixels_sha256(picture.pixels))
        )
        self._count("farm_images_total", 1, image, status="ok")
        return Drawn(
            index=spec.index,
            seed=spec.seed,
            seconds=picture.seconds,
            data=data,
            sha256=hashlib.sha256(data).hexdigest(),
            flag=flag_of(picture.pixels),
        )

    def _fail(self, image: UrgentImage, failure: Failure) -> None:
        log.warning("urgent image failed", extra={"code": failure.code, "reason": failure.message})
        self._count("farm_images_total", 1, image, status="failed")
        self._meters.count("farm_failures_total", 1, **{"class": "urgent", "code": failure.code})
        spec = image.spec
        self._settle(image, Drawn(spec.index, spec.seed, 0.0, error_code=failure.code, error_message=failure.message))

    def _settle(self, image: UrgentImage, drawn: Drawn) -> None:
        self._queue.settle(image, drawn, self._answer)

    def _answer(self, hand: InHand) -> Answer:
        return Answer(
            renderer=self._renderer,
            device=self._device,
            images=tuple(hand.drawn[place] for place in range(len(hand.portion.specs))),
            waited_s=(hand.begun or hand.arrived) - hand.arrived,
            load_s=hand.load_s,
            engine_s=hand.engine_s,
        )


def _provenance(portion: Portion, place: int, pixels: str) -> Provenance:
    """What made a picture; it was drawn under no plan."""
    spec, output = portion.specs[place], portion.output
    return Provenance(
        index=spec.index,
        key=spec.key,
        prompt=spec.prompt,
        seed=spec.seed,
        params=spec.params,
        model=card_identity(portion.card, portion.numerics.device),
        numerics=portion.numerics,
        plan="",
        format=output.format,
        quality=output.quality,
        pixels_sha256=pixels,
    )
