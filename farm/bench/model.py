"""Measure one model on one device: cold start, pictures in a row, memory over time, sweeps of steps, sizes and batches.

The engine alone works, one picture after another, in this process; no store, no Ray, no file is in the seconds. Prompts
are encoded anew for each picture, as where somebody changes the prompt every time; what a job comes to, whose prompts are
encoded ahead where the encoder leaves the device, is measured apart, in the card's own batch. Memory is looked at from a
thread of its own meanwhile. The floor is the denoiser's steps: what stands above `steps x step` is encoding, decoding
and moving parts.
"""

import itertools
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

from farm.bench.figures import (
    GIB,
    ColdStart,
    Drawn,
    Measured,
    Part,
    Point,
    Sample,
    Span,
    peak_between,
    peaks,
)
from farm.engine import Batch, Engine, Picture, RenderStep
from farm.errors import OutOfMemoryError, RenderError
from farm.manifest import MAX_SEED
from farm.modelcard import RenderParams
from farm.models.family import Embedding, Tokens
from farm.plan import ImageSpec

SAMPLE_S = 0.02
"""Between two looks at the memory."""
SWEEP_SEEDS = 3
"""Pictures of each number of steps, at most."""
POINT_BATCHES = 3
"""Batches of each size and batch; the first one warms up and is dropped."""

_NO_MEMORY = "no memory left in this process"

Clock = Callable[[], float]
Keep = Callable[[Part, Picture], None]
"""Called with the pictures of the last round and of the sweep over steps, outside all that is timed."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What to measure. `batch`: how many images a job draws together; `steps`, `sizes` and `batches` are swept where given."""

    prompts: tuple[str, ...]
    params: RenderParams
    batch: int
    seed: int = 0
    images: int = 5
    rounds: int = 3
    steps: tuple[int, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()
    batches: tuple[int, ...] = ()


class MemoryWatch:
    """Looks at the memory again and again from a thread of its own while its block lasts."""

    def __init__(self, held_bytes: Callable[[], int], now: Clock, *, interval_s: float = SAMPLE_S):
        self.samples: list[Sample] = []
        self._held_bytes = held_bytes
        self._now = now
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)

    def look(self) -> None:
        """Take one sample."""
        held = self._held_bytes()
        self.samples.append(Sample(self._now(), held))

    def taken(self) -> list[Sample]:
        """The samples so far, by time."""
        return sorted(self.samples, key=lambda sample: sample.at_s)

    def __enter__(self) -> Self:
        self.look()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.look()

    def _watch(self) -> None:
        while not self._stop.wait(self._interval_s):
            self.look()


def measure(
    engine: Engine,
    wish: Wish,
    *,
    start_s: float,
    keep: Keep = lambda part, picture: None,
    say: Callable[[str], None] = lambda text: None,
    clock: Clock = time.perf_counter,
    interval_s: float = SAMPLE_S,
) -> Measured:
    """Load an engine and measure it. It should keep no embeddings (`EmbeddingCache(0)`), or encoding looks free.

    `start_s`: what had passed of this process before. A size or batch that needs more memory than there is stays without
    figures. Raises what loading and rendering raise, and OutOfMemoryError where this process has no memory left.
    """
    began = clock()

    def now() -> float:
        return clock() - began

    with MemoryWatch(lambda: engine.memory().reserved_bytes, now, interval_s=interval_s) as watch:
        before = watch.samples[0].held_bytes
        try:
            return _Bench(engine, wish, now, watch, keep, say).run(start_s, before / GIB)
        except (RenderError, MemoryError) as exc:
            if isinstance(exc, OutOfMemoryError) or not _no_memory(exc):
                raise
            raise OutOfMemoryError(f"{_NO_MEMORY}; ask for fewer or smaller pictures") from exc


class _Bench:
    """One benchmark in hand."""

    def __init__(
        self, engine: Engine, wish: Wish, now: Clock, watch: MemoryWatch, keep: Keep, say: Callable[[str], None]
    ):
        self._engine = engine
        self._wish = wish
        self._now = now
        self._watch = watch
        self._keep = keep
        self._say = say
        self._drawn: list[Drawn] = []
        self._spans: list[Span] = []
        self._first_step_s: float | None = None

    def run(self, start_s: float, before_gib: float) -> Measured:
        wish = self._wish
        self._say("cold start")
        cold = self._cold(start_s)
        for number in range(1, wish.rounds + 1):
            self._say(f"round {number} of {wish.rounds}")
            for index in range(wish.images):
                self._single("round", index, wish.params, number=number, kept=number == wish.rounds)
        self._say(f"as a job draws: batches of {wish.batch}")
        job = self._point("job", wish.params, wish.batch)
        if job.failed is not None:
            raise OutOfMemoryError(
                f"in batches of {wish.batch}, as the card says: {job.failed}; lower the card's batch"
            )
        job = self._coming_and_going(job)
        for steps in wish.steps:
            self._say(f"{steps} steps")
            params = wish.params.model_copy(update={"num_inference_steps": steps})
            for index in range(min(wish.images, SWEEP_SEEDS)):
                self._single("steps", index, params, kept=True)
        points = []
        for width, height in wish.sizes:
            self._say(f"{width}x{height}")
            params = wish.params.model_copy(update={"width": width, "height": height})
            points.append(self._point("size", params, wish.batch))
        for batch in wish.batches:
            self._say(f"batches of {batch}")
            points.append(self._point("batch", wish.params, batch))
        samples = self._watch.taken()
        as_the_card_says = [one for one in self._drawn if one.part not in ("size", "batch")]
        spans = [*self._spans, *(span for one in as_the_card_says for span in one.spans())]
        spans.sort(key=lambda span: span.began_s)
        return Measured(
            cold=cold,
            drawn=tuple(self._drawn),
            job=job,
            points=tuple(points),
            spans=tuple(spans),
            samples=tuple(samples),
            before_gib=before_gib,
            peak_gib=peaks(samples, spans),
            guided_above=self._guided_above(),
        )

    def _guided_above(self) -> float | None:
        """Families guide above 0, above 1, or never: a batch has negative prompts where it is guided."""
        for above in (0.0, 1.0):
            params = self._wish.params.model_copy(update={"guidance_scale": above + 1.0})
            (batch,) = self._engine.batches([_spec(0, self._wish.prompts[0], 0, params)])
            if batch.negative:
                return above
        return None

    def _cold(self, start_s: float) -> ColdStart:
        began = self._now()
        load_s = self._engine.load()
        self._spans.append(Span("load", began, self._now()))
        self._watch.look()
        first = self._single("cold", 0, self._wish.params)
        first_step_s = self._first_step_s or 0.0
        return ColdStart(
            start_s=start_s,
            load_s=load_s,
            encode_s=first.encode_s,
            first_step_s=first_step_s,
            further_steps_s=first.denoise_s - first_step_s,
            decode_s=first.decode_s,
        )

    def _single(self, part: Part, index: int, params: RenderParams, *, number: int = 0, kept: bool = False) -> Drawn:
        """Draw one picture by itself: prompts take turns, seeds count up."""
        wish = self._wish
        spec = _spec(index, wish.prompts[index % len(wish.prompts)], wish.seed, params)
        (batch,) = self._engine.batches([spec])
        pictures: list[Picture] = []
        drawn = self._draw(part, batch, pictures, number=number)
        self._drawn.append(drawn)
        if kept:
            self._keep(part, pictures[0])
        return drawn

    def _point(self, part: Part, params: RenderParams, size: int) -> Point:
        """Draw a few batches of one prompt as a shard does, and take the median without the first."""
        wish, engine = self._wish, self._engine
        shape = Point(part, params.width, params.height, params.num_inference_steps, params.guidance_scale, batch=size)
        began = self._now()
        failed, drawn, encode_s = None, list[Drawn](), None
        engine.watch_memory()
        try:
            specs = [_spec(index, wish.prompts[0], wish.seed, params) for index in range(POINT_BATCHES * size)]
            singles = engine.batches(specs, most=1)
            batches = [joined(singles[start : start + size]) for start in range(0, len(singles), size)]
            began = self._now()
            ahead, ahead_s = engine.encode_ahead(batches, on_step=_ignore, cancelled=_never)
            if ahead:
                if part == "job":
                    self._spans.append(Span("encode", began, began + ahead_s))
                encode_s = ahead_s / len(ahead)
            for batch in batches:
                drawn.append(self._draw(part, batch, [], ahead=ahead))
        except (RenderError, MemoryError) as exc:
            if not _no_memory(exc):
                raise
            failed = exc.message if isinstance(exc, OutOfMemoryError) else _NO_MEMORY
        if failed is not None:
            engine.recover()  # outside the except block, whose traceback keeps tensors alive
            return replace(shape, failed=failed)
        self._drawn.extend(drawn)
        self._watch.look()
        warm = drawn[1:]
        if encode_s is None:
            encode_s = statistics.median(one.encode_s / one.prompts for one in warm)
        return replace(
            shape,
            batches=len(warm),
            encode_s=encode_s,
            step_s=statistics.median(one.step_s for one in warm),
            decode_s=statistics.median(one.decode_s / size for one in warm),
            seconds_per_image=statistics.median(one.seconds / size for one in warm),
            peak_gib=peak_between(self._watch.taken(), began, self._now()) / GIB,
            working_gib={phase: taken / GIB for phase, taken in engine.working_bytes.items()},
        )

    def _coming_and_going(self, job: Point) -> Point:
        """Add how long parts take to come where prompts are encoded ahead: the first prompt waits for the encoder, and the next
        batch for the denoiser."""
        wish, engine = self._wish, self._engine
        texts = (
            *wish.prompts,
            f". {wish.prompts[0]}",
        )  # two that differ, one at least, also where long ones are cut off
        batches = engine.batches([_spec(0, text, wish.seed, wish.params) for text in texts], most=1)
        encoded = [self._now()]
        ahead, _ = engine.encode_ahead(batches, on_step=lambda step: encoded.append(self._now()), cancelled=_never)
        if len(ahead) < 2:
            return job
        first_s, *further_s = [ended - began for began, ended in itertools.pairwise(encoded)]
        encode_s = statistics.median(further_s)
        drawn = self._draw("job", joined(batches[:1] * job.batch), [], ahead=ahead)
        return replace(
            job,
            encode_s=encode_s,
            encoder_in_s=max(0.0, first_s - encode_s),
            denoiser_in_s=max(0.0, drawn.denoise_s - job.step_s * job.num_inference_steps * job.batch),
        )

    def _draw(
        self,
        part: Part,
        batch: Batch,
        pictures: list[Picture],
        *,
        number: int = 0,
        ahead: dict[Tokens, Embedding] | None = None,
    ) -> Drawn:
        engine, params = self._engine, batch.specs[0].params
        began = self._now()
        stepped: list[float] = []

        def on_step(step: RenderStep) -> None:
            if part == "cold" and step.stage == "denoise" and not stepped:
                engine.synchronize()  # callbacks come as work is queued, not as it is done
                stepped.append(self._now())

        took = engine.render_batch(batch, on_picture=pictures.append, on_step=on_step, cancelled=_never, ahead=ahead)
        if any(picture.nan for picture in pictures):
            raise RenderError(
                f"a picture came out as no finite numbers in {engine.numerics.dtype}; see farm doctor for this device, and the "
                "card's dtypes"
            )
        if stepped:
            self._first_step_s = stepped[0] - began - took["encode"]
        return Drawn(
            part=part,
            number=number,
            width=params.width,
            height=params.height,
            num_inference_steps=params.num_inference_steps,
            guidance_scale=params.guidance_scale,
            images=len(batch.specs),
            prompts=len(batch.positive) + len(batch.negative),
            began_s=began,
            encode_s=took["encode"],
            denoise_s=took["denoise"],
            decode_s=took["decode"],
        )


def joined(batches: Sequence[Batch]) -> Batch:
    """Return one batch of several that are of one shape: it may be larger than the plan's, where an engine's own never is."""
    return Batch(
        tuple(spec for batch in batches for spec in batch.specs),
        tuple(tokens for batch in batches for tokens in batch.positive),
        tuple(tokens for batch in batches for tokens in batch.negative),
    )


def _spec(index: int, prompt: str, first_seed: int, params: RenderParams) -> ImageSpec:
    seed = (first_seed + index) % (MAX_SEED + 1)
    return ImageSpec(index=index, row=index, key=None, prompt=prompt, seed=seed, params=params, carry={})


def _no_memory(error: RenderError | MemoryError) -> bool:
    """Whether the device's memory, or the process's, is at its end: an engine wraps the latter as whatever a pipeline raises."""
    return isinstance(error, OutOfMemoryError | MemoryError) or isinstance(error.__cause__, MemoryError)


def _ignore(step: RenderStep) -> None:
    pass


def _never() -> bool:
    return False
