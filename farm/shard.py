"""One shard, from its prompts to its receipt: draw, write, commit.

The receipt comes last, when every object that it names is stored; it exists or the shard never happened. Knows no leases
and no Ray.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Protocol

from farm import __version__
from farm.drawing import Aside, Drawing, Failure, ShardProgress
from farm.engine import Engine
from farm.errors import (
    CancelledError,
    ObjectMissingError,
)
from farm.ledger import Ledger
from farm.lint import prompt_codes
from farm.meters import Meters
from farm.output import MAX_PENDING_BYTES, Names, Writer, Written
from farm.plan import ImageSpec, Plan, card_identity
from farm.prompts import PromptReader
from farm.provenance import Provenance
from farm.receipt import ImageRow, Receipt

log = logging.getLogger(__name__)

WAKE_S = 0.2
"""How often a shard that waits for the device looks whether it was cancelled."""
NOT_WRITTEN = "not_written"
STAGES = ("encode", "denoise", "decode", "write")
"""Stages whose seconds are counted; loading is counted where models are loaded."""


class Place(Protocol):
    """A shard's place on the device, as a lock."""

    def acquire(self, *, timeout: float) -> bool:
        """Take it, or return False after `timeout` seconds."""

    def release(self) -> None:
        """Let the next shard have it."""


class ShardRunner:
    """Renders shards of one plan, from several threads at once. `device` is what receipts call it.

    `meters` count what its receipts tell, each once: those that it stored itself.
    """

    def __init__(
        self,
        ledger: Ledger,
        plan: Plan,
        *,
        renderer: str,
        device: str,
        meters: Meters | None = None,
        max_pending_bytes: int = MAX_PENDING_BYTES,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ):
        self._ledger = ledger
        self.plan = plan
        self._renderer = renderer
        self._device = device
        self._meters = meters or Meters(renderer, "")
        self._max_pending_bytes = max_pending_bytes
        self._now = now
        self._prompts = PromptReader(plan, ledger)
        self._prompts_lock = threading.Lock()
        self._model = card_identity(plan.card, plan.numerics.device)

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
        on_progress: Callable[[ShardProgress], None] = lambda progress: None,
        cancelled: Callable[[], bool] = lambda: False,
        aside: Aside | None = None,
    ) -> Receipt:
        """Render a shard and commit its receipt; one that is there already is returned as it is.

        `engine` gives the loaded engine of a plan and is called with `on_device` held; the lock is let go as soon as
        the last batch is drawn, so that the next shard draws while this one's pictures are stored. `skip`: images that
        become failed rows untried, since they ended their renderers. `alone`: images drawn outside their batch. `cautious`: so
        are all of them, and none is encoded before its turn. From the
        second `attempt` on every batch is announced before it starts. `on_progress` is called from several threads, one
        at a time, and each call tells what was true after the one before. `aside`: other work that may have the device between
        steps and batches; its seconds are in none of the receipt's.

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
        draw = Drawing(
            specs,
            skip=skip,
            alone=frozenset(indexes) if cautious else alone,
            ahead=not cautious,
            announce=attempt > 1 or cautious,
            on_progress=on_progress,
            cancelled=cancelled,
            aside=aside,
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
        seconds = draw.seconds | {"write": writer.seconds, "total": time.perf_counter() - started - draw.aside_s}
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
            _count(self._meters, plan.card.name, receipt)
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

    def _row(self, spec: ImageSpec, draw: Drawing, written: Written | None, pass_number: int, attempt: int) -> ImageRow:
        failure = draw.failures.get(spec.index)
        if written is not None and written.error is not None:
            failure = Failure(NOT_WRITTEN, f"image {spec.index} could not be written: {written.error}")
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
            warnings=prompt_codes(
                spec.prompt, family=self.plan.card.family, max_tokens=self.plan.card.max_sequence_length
            ),
        )


def _count(meters: Meters, model: str, receipt: Receipt) -> None:
    bulk = {"class": "bulk"}
    for status, images in Counter(row.status for row in receipt.rows).items():
        meters.count("farm_images_total", images, model=model, status=status, **bulk)
    for code, images in Counter(row.error_code for row in receipt.rows if row.error_code).items():
        meters.count("farm_failures_total", images, code=code, **bulk)
    for stage in STAGES:
        meters.count("farm_stage_seconds_total", receipt.seconds.get(stage, 0.0), model=model, stage=stage, **bulk)
    meters.count("farm_stored_bytes_total", sum(row.size_bytes or 0 for row in receipt.rows), **bulk)


def _acquire(lock: Place, cancelled: Callable[[], bool]) -> None:
    while not lock.acquire(timeout=WAKE_S):
        if cancelled():
            raise CancelledError("the shard was taken away while it waited for the device")
