"""The engine: one model on one device, from image specs to pictures, batch by batch.

Which images share a batch follows from the plan and the shard alone. Each distinct prompt is encoded once and kept in a
bounded cache. One thread owns an engine. Knows nothing of files, stores or receipts; imports no torch of its own.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from farm.cardparts import PLAIN, Source
from farm.errors import CancelledError, FarmError, NumericsError, RenderError
from farm.modelcard import ModelCard
from farm.models.family import Embedding, Family, Tokens, Within, open_family
from farm.models.memory import Memory, memory_of
from farm.plan import ImageSpec, Numerics
from farm.records import WorkingMemory
from farm.versions import completed, installed, of_the_farm

CACHE_BYTES = 512 * 2**20
"""Embeddings kept: some 1,000 prompts of Z-Image, a hundred thousand of sketch."""

Stage = Literal["load", "encode", "denoise", "decode", "write"]


@dataclass(frozen=True, slots=True)
class Picture:
    """One rendered image. `pixels`: height x width x 3, uint8. `seconds`: its share of its batch's time.

    `nan`: the model's floats were not finite, and the pixels mean nothing.
    """

    spec: ImageSpec
    pixels: np.ndarray
    seconds: float
    nan: bool


@dataclass(frozen=True, slots=True)
class Batch:
    """Images of one shape that are denoised together, their prompts in tokens. `negative` is empty without guidance."""

    specs: tuple[ImageSpec, ...]
    positive: tuple[Tokens, ...]
    negative: tuple[Tokens, ...]

    def part(self, places: Sequence[int]) -> "Batch":
        """Return the batch of some of its images, by their places in it."""
        return Batch(
            tuple(self.specs[i] for i in places),
            tuple(self.positive[i] for i in places),
            tuple(self.negative[i] for i in places) if self.negative else (),
        )

    @property
    def indexes(self) -> tuple[int, ...]:
        """Image indexes."""
        return tuple(spec.index for spec in self.specs)


@dataclass(frozen=True, slots=True)
class RenderStep:
    """Where a render stands: images done of this call, the stage, and steps done of the batch in hand."""

    images_done: int
    stage: Stage
    step: int
    steps: int


OnPicture = Callable[[Picture], None]
OnStep = Callable[[RenderStep], None]
BetweenSteps = Callable[[], float]
"""Called after each denoising step, and after decoding; may use the device for other work, and returns its seconds."""


@dataclass(frozen=True, slots=True)
class Weights:
    """What two renders must share to be drawn with one loaded model. The batch may differ.

    `parts`: what the card has besides its source: a denoiser, a decoder, quantisation, adapters, a scheduler,
    acceleration on this kind of device, options, code. `versions`: what a plan does not name counts as it is here.
    """

    family: str
    source: str
    parts: tuple[str, ...]
    max_sequence_length: int
    device: str
    dtype: str
    threads: int
    versions: tuple[tuple[str, str], ...]


def weights_of(card: ModelCard, numerics: Numerics) -> Weights:
    """Return what a card's images are drawn with; where the revision is known the path has no part in it."""
    named: dict[str, Any] = {"denoiser": card.denoiser, "decoder": card.decoder, "scheduler": card.scheduler}
    if (how := card.accelerated_on(numerics.device)) != PLAIN:
        named["acceleration"] = how
    named |= {f"quantise.{part}": how for part, how in sorted(card.quantise.items())}
    named |= {f"adapters.{adapter.name}": adapter for adapter in card.adapters}
    named |= {f"options.{name}": value for name, value in sorted(card.options.items())}
    named |= {f"code.{name}": sha256 for name, sha256 in sorted(card.code.items())}
    return Weights(
        card.family,
        _identity(card.source),
        tuple(f"{name} {_identity(value)}" for name, value in named.items() if value is not None),
        card.max_sequence_length,
        numerics.device,
        numerics.dtype,
        numerics.threads,
        tuple(sorted(completed(numerics.versions, card, numerics.device).items())),
    )


def _identity(value: object) -> str:
    """A source by its revision where that is known, so that a copy elsewhere is the same; anything else as it is written."""
    if not isinstance(value, Source):
        return repr(value)
    place = f"{value.hub or ''}@{value.revision or value.given or ''}"
    own = {name: getattr(value, name) for name in type(value).model_fields if name not in Source.model_fields}
    return f"{place} {own}" if own else place


def check_numerics(numerics: Numerics, *, device: str) -> None:
    """Raise NumericsError where this machine would compute other bytes than the plan's: versions, kind of device."""
    kind = device.partition(":")[0]
    if kind != numerics.device:
        raise NumericsError(
            f"the plan was made for {numerics.device} and this renderer has {kind}; give it to one that fits"
        )
    for package, planned in sorted(numerics.versions.items()):
        here = installed(package)
        if here == planned:
            continue
        if of_the_farm(package):
            raise NumericsError(
                f"the plan was made with revision {planned} of {package}, the farm's own part in its pixels, and this farm has "
                f"{here}; go on with this run with the farm that made it, or give the job a new name to render it anew"
            )
        raise NumericsError(
            f"the plan was made with {package} {planned}, {here} is installed; install {package}=={planned} "
            f"to go on with this run, or give the job a new name to render it anew"
        )


class Engine:
    """Renders one model under one plan's numerics."""

    def __init__(
        self,
        card: ModelCard,
        numerics: Numerics,
        device: str,
        vram_gib: float,
        *,
        renderers: int | None = None,
        family: Family | None = None,
        cache: "EmbeddingCache | None" = None,
        measured: WorkingMemory | None = None,
    ):
        self.card = card
        self.numerics = numerics
        self.weights = weights_of(card, numerics)
        self.loaded = False
        self.parked = False
        self._device = device
        self._vram_gib = vram_gib
        self._family = family or open_family(
            card, numerics, device=device, vram_gib=vram_gib, renderers=renderers, measured=measured
        )
        self._cache = EmbeddingCache(CACHE_BYTES) if cache is None else cache
        self._inside: Engine | None = None

    def place(self) -> None:
        """Find out whether it can be loaded, before anything leaves the device for it. Raises NumericsError, ModelCardError,
        PlacementError."""
        check_numerics(self.numerics, device=self._device)
        self._family.place()

    def load(self) -> float:
        """Load the model; returns seconds. Raises NumericsError, ModelCardError or PlacementError."""
        check_numerics(self.numerics, device=self._device)
        started = time.perf_counter()
        self._family.load()
        self._family.synchronize()
        self.loaded, self.parked = True, False
        return time.perf_counter() - started

    @property
    def host_bytes(self) -> int:
        """What its weights and the embeddings kept take in host memory."""
        return self._family.host_bytes + self._cache.nbytes

    def park(self) -> bool:
        """Leave the device and keep the weights in host memory, so that `load` is a copy; returns False where none are there."""
        if not self._family.park():
            return False
        self.loaded, self.parked = False, True
        return True

    def unload(self) -> None:
        """Let go of weights, embeddings and device memory."""
        self.loaded = self.parked = False
        self._inside = None
        self._cache.clear()
        self._family.unload()

    def inside(self) -> "Engine | None":
        """Return the engine that draws within a step of this one, over its weights and embeddings; None where none can.

        It draws nothing within its own steps.
        """
        if self._inside is None and self._family.within != "nothing":
            family = self._family.inside()
            self._inside = Engine(
                self.card, self.numerics, self._device, self._vram_gib, family=family, cache=self._cache
            )
        return self._inside

    def fits_within_a_step(self, batch: Batch) -> bool:
        """Whether a batch needs nothing on the device that is not there while another one is denoised."""
        within: Within = self._family.within
        return within == "anything" or (
            within == "encoded" and all(tokens in self._cache for tokens in (*batch.positive, *batch.negative))
        )

    def memory(self) -> Memory:
        """Return what this process holds for the engine's device; from any thread."""
        return memory_of(self._device)

    def watch_memory(self) -> None:
        """Begin to measure, or anew, what each phase takes on the device beside the weights."""
        self._family.watch_memory()

    @property
    def working_bytes(self) -> Mapping[str, int]:
        """The most that each phase took since `watch_memory`: encode, denoise, decode; empty where that cannot be told."""
        return self._family.working_bytes

    def synchronize(self) -> None:
        """Wait until the device has done what was asked of it."""
        self._family.synchronize()

    def recover(self) -> None:
        """Free what a failed batch left behind. Call it outside the `except` block: a traceback keeps tensors alive."""
        self._family.recover()

    def batches(self, specs: Sequence[ImageSpec], *, most: int | None = None) -> list[Batch]:
        """Cut a shard's images into batches: by shape in order of first appearance, then `numerics.batch` at a time.

        `most`: so many at a time, if fewer. Raises RenderError where the tokenizer fails on a prompt.
        """
        size = min(self.numerics.batch, most or self.numerics.batch)
        tokens: dict[str, Tokens] = {}
        groups: dict[Hashable, list[ImageSpec]] = {}
        for spec in specs:
            params = spec.params
            positive = self._tokens(spec.prompt, tokens)
            guided = self._family.guided(params)
            negative = self._tokens(params.negative_prompt, tokens) if guided else None
            shape = (
                params.width,
                params.height,
                params.num_inference_steps,
                params.guidance_scale,
                guided,
                self._family.bucket(positive, negative),
            )
            groups.setdefault(shape, []).append(spec)
        return [
            Batch(
                tuple(some),
                tuple(tokens[spec.prompt] for spec in some),
                tuple(tokens[spec.params.negative_prompt] for spec in some)
                if self._family.guided(some[0].params)
                else (),
            )
            for group in groups.values()
            for some in (group[i : i + size] for i in range(0, len(group), size))
        ]

    def _tokens(self, prompt: str, known: dict[str, Tokens]) -> Tokens:
        found = known.get(prompt)
        if found is None:
            with _pipeline_errors("cut a prompt into tokens"):
                found = known[prompt] = self._family.tokenize(prompt)
        return found

    def encode_ahead(
        self, batches: Sequence[Batch], *, on_step: OnStep, cancelled: Callable[[], bool]
    ) -> tuple[dict[Tokens, Embedding], float]:
        """Encode all prompts of these batches where the encoder leaves the device before denoising; and the seconds.

        Where it stays, nothing is done: each batch encodes what it needs.
        """
        if not self._family.encodes_ahead:
            return {}, 0.0
        started = time.perf_counter()
        wanted = dict.fromkeys(tokens for batch in batches for tokens in (*batch.positive, *batch.negative))
        ahead: dict[Tokens, Embedding] = {}
        for done, tokens in enumerate(wanted):
            _stop_if(cancelled)
            ahead[tokens] = self._embedding(tokens, {})
            on_step(RenderStep(0, "encode", done + 1, len(wanted)))
        self._family.synchronize()
        return ahead, time.perf_counter() - started

    def _embedding(self, tokens: Tokens, ahead: dict[Tokens, Embedding]) -> Embedding:
        found = ahead.get(tokens) or self._cache.get(tokens)
        if found is None:
            with _pipeline_errors("encode a prompt"):
                found = self._family.encode(tokens)
            self._cache.put(tokens, found)
        return found

    def render_batch(
        self,
        batch: Batch,
        *,
        on_picture: OnPicture,
        on_step: OnStep,
        cancelled: Callable[[], bool],
        ahead: dict[Tokens, Embedding] | None = None,
        images_done: int = 0,
        between_steps: BetweenSteps = lambda: 0.0,
    ) -> dict[str, float]:
        """Render one batch; returns seconds by stage. Pictures come when all of the batch is done.

        The seconds that `between_steps` spent on other work are in none of them, nor in a picture's.

        Raises CancelledError after a denoising step, OutOfMemoryError, DeviceLostError, or RenderError for whatever the
        pipeline raised.
        """
        family, first = self._family, batch.specs[0]
        times = [time.perf_counter()]
        embed = ahead or {}
        away_s = 0.0

        def lap() -> None:
            family.synchronize()
            times.append(time.perf_counter())

        def after_step(step: int, steps: int) -> None:
            nonlocal away_s
            _stop_if(cancelled)
            on_step(RenderStep(images_done, "denoise", step, steps))
            away_s += between_steps()
            if away_s:
                _stop_if(cancelled)

        _stop_if(cancelled)
        on_step(RenderStep(images_done, "encode", 0, first.params.num_inference_steps))
        positive = [self._embedding(tokens, embed) for tokens in batch.positive]
        negative = [self._embedding(tokens, embed) for tokens in batch.negative]
        lap()
        with _pipeline_errors(f"denoise images {_span(batch)}"):
            latents = family.denoise(
                batch.specs, family.noise(batch.specs), positive=positive, negative=negative, on_step=after_step
            )
        lap()
        on_step(RenderStep(images_done, "decode", 0, 1))
        with _pipeline_errors(f"decode images {_span(batch)}"):
            decoded = family.decode(latents, first)
        lap()
        between_steps()  # after the last lap, so that it is in no stage's seconds
        each = (times[-1] - times[0] - away_s) / len(batch.specs)
        for spec, pixels, finite in zip(batch.specs, decoded.pixels, decoded.finite, strict=True):
            on_picture(Picture(spec, pixels, each, nan=not finite))
        seconds = {name: times[i + 1] - times[i] for i, name in enumerate(("encode", "denoise", "decode"))}
        seconds["denoise"] -= away_s
        return seconds

    def render(
        self,
        specs: Sequence[ImageSpec],
        *,
        on_picture: OnPicture,
        on_step: OnStep = lambda step: None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> dict[str, float]:
        """Render images in the batches that `batches` cuts; returns seconds by stage. The first failure ends it."""
        batches = self.batches(specs)
        ahead, encode_s = self.encode_ahead(batches, on_step=on_step, cancelled=cancelled)
        seconds = {"encode": encode_s, "denoise": 0.0, "decode": 0.0}
        done = 0
        for batch in batches:
            spent = self.render_batch(
                batch, on_picture=on_picture, on_step=on_step, cancelled=cancelled, ahead=ahead, images_done=done
            )
            done += len(batch.specs)
            for stage, took in spent.items():
                seconds[stage] += took
        return seconds


class EmbeddingCache:
    """The embeddings used last, as many as fit in `max_bytes`."""

    def __init__(self, max_bytes: int):
        self._max_bytes = max_bytes
        self._kept: OrderedDict[Tokens, Embedding] = OrderedDict()
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, tokens: Tokens) -> bool:
        return tokens in self._kept

    def get(self, tokens: Tokens) -> Embedding | None:
        """Return what was kept, and keep it longer."""
        found = self._kept.get(tokens)
        if found is not None:
            self._kept.move_to_end(tokens)
        return found

    def put(self, tokens: Tokens, embedding: Embedding) -> None:
        """Keep an embedding; those not used for longest make room. One larger than the cache is not kept."""
        if embedding.nbytes > self._max_bytes or tokens in self._kept:
            return
        self._kept[tokens] = embedding
        self.nbytes += embedding.nbytes
        while self.nbytes > self._max_bytes:
            _, dropped = self._kept.popitem(last=False)
            self.nbytes -= dropped.nbytes

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()
        self.nbytes = 0


class _pipeline_errors:  # noqa: N801  (used as a statement)
    """Turns whatever a pipeline raises into a RenderError that says what was being done; the farm's own errors pass.

    SystemExit is among it: code that comes with weights ends no process of ours.
    """

    def __init__(self, doing: str):
        self._doing = doing

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: object) -> None:
        if isinstance(exc, (Exception, SystemExit)) and not isinstance(exc, FarmError):
            line = " ".join(str(exc).split())[:500]
            raise RenderError(f"could not {self._doing}: {type(exc).__name__}: {line}") from exc


def _stop_if(cancelled: Callable[[], bool]) -> None:
    if cancelled():
        raise CancelledError("the render was asked to stop")


def _span(batch: Batch) -> str:
    indexes = batch.indexes
    return str(indexes[0]) if len(indexes) == 1 else f"{indexes[0]} to {indexes[-1]}"
